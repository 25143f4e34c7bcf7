"""The daemon's own token: followed as it changes, known by its former ones, and the one before where none can be had."""

from __future__ import annotations

import pytest
import trio

from manta.errors import Denied, Invalid
from manta.hub import identity as module
from manta.hub.identity import TOKENS_MAX, Identity
from manta.hub.origin import Access

FIRST, SECOND, STRANGER = Access("hf_first"), Access("hf_second"), Access("hf_stranger")


class Saved:
    """The token that is saved, or why it cannot be had."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.error: Exception | None = None

    def read(self) -> Access:
        if self.error is not None:
            raise self.error
        return self.access


@pytest.mark.trio
async def test_a_new_token_is_used_for_what_was_begun_with_the_old_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", module.__name__)
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    mounted = identity.of("hf_first")
    assert mounted == identity.of("") == FIRST
    saved.access = SECOND
    await identity.look()
    assert identity.latest(mounted) == SECOND
    assert identity.of("hf_second") == identity.of("hf_first") == identity.of("") == mounted
    assert identity.of("hf_stranger") == STRANGER
    assert identity.latest(STRANGER) == STRANGER
    assert "hf_" not in caplog.text
    assert SECOND.fingerprint in caplog.text


@pytest.mark.trio
async def test_logging_in_and_out() -> None:
    saved = Saved(Access.anonymous())
    identity = Identity(Access.anonymous(), saved.read)
    mounted = identity.of("")
    saved.access = FIRST
    await identity.look()
    assert identity.latest(mounted) == FIRST
    saved.access = Access.anonymous()
    await identity.look()
    assert identity.latest(mounted).is_anonymous


@pytest.mark.trio
async def test_a_token_that_cannot_be_had_leaves_the_one_before(caplog: pytest.LogCaptureFixture) -> None:
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    saved.error = Denied("The saved token could not be had.")
    for _ in range(3):
        await identity.look()
    assert identity.latest(identity.access) == FIRST
    assert caplog.text.count("could not be had") == 1


@pytest.mark.trio
async def test_former_tokens_are_bounded() -> None:
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    for number in range(TOKENS_MAX + 3):
        saved.access = Access(f"hf_token{number}")
        await identity.look()
    assert len(identity._own) == TOKENS_MAX
    assert identity.of(f"hf_token{TOKENS_MAX + 2}") == identity.access


@pytest.mark.trio
async def test_it_looks_now_and_then(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FOLLOW_S", 0.01)
    identity = Identity(FIRST, Saved(SECOND).read)
    nursery.start_soon(identity.follow)
    with trio.fail_after(20):
        while identity.latest(FIRST) != SECOND:
            await trio.sleep(0.01)


# The tokens that mounts came with -----------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_pod_without_a_token_is_nobody_whatever_the_daemon_has() -> None:
    saved = Saved(Access.anonymous())
    identity = Identity(Access.anonymous(), saved.read)
    pod = identity.of_pod("", anonymous=True)
    held = identity.hold("1-a", pod)
    saved.access = FIRST
    await identity.look()
    assert identity.latest(pod).is_anonymous
    assert identity.latest(held).is_anonymous
    assert identity.latest(identity.of_pod("", anonymous=False)) == FIRST


@pytest.mark.trio
async def test_a_pods_token_stays_its_own_where_the_daemon_has_the_same() -> None:
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    pod = identity.of_pod("hf_first", anonymous=False)
    saved.access = SECOND
    await identity.look()
    assert identity.latest(pod).token == "hf_first"
    assert identity.latest(identity.hold("1-a", pod)).token == "hf_first"
    assert pod != identity.access


def test_what_a_mount_is_read_by_changes_with_its_token_and_ends_with_it() -> None:
    identity = Identity(FIRST, Saved(FIRST).read)
    held = identity.hold("1-a", identity.of_pod("hf_old", anonymous=False))
    assert identity.hold("1-a", identity.of_pod("hf_new", anonymous=False)) == held
    assert identity.latest(held).token == "hf_new"
    assert identity.latest(identity.hold("2-b", identity.access)) == FIRST
    assert not identity.is_released(held)
    assert "hf_" not in repr(held)
    identity.release("1-a")
    assert identity.latest(held).is_anonymous
    assert identity.is_released(held)
    assert not identity.is_released(FIRST)


def test_a_token_and_none_at_once_is_a_contradiction() -> None:
    with pytest.raises(Invalid, match="anonymous"):
        Identity(FIRST, Saved(FIRST).read).of_pod("hf_x", anonymous=True)
