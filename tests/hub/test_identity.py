"""The daemon's own token: followed as it changes, known by its former ones, and the one before where none can be had."""

from __future__ import annotations

import pytest
import trio

from manta.errors import Denied
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
