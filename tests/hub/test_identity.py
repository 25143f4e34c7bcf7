from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from manta.errors import Denied
from manta.hub import identity as module
from manta.hub.identity import FOLLOW_S, TOKENS_MAX, Identity
from manta.hub.origin import Access

FIRST, SECOND, STRANGER = Access("hf_first"), Access("hf_second"), Access("hf_stranger")


class Saved:
    """The token that is saved, or why it cannot be had."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.error: Exception | None = None
        self.reads = 0
        self.read_again = trio.Event()

    def read(self) -> Access:
        self.reads += 1
        trio.from_thread.run_sync(self.read_again.set)
        if self.error is not None:
            raise self.error
        return self.access


async def look(saved: Saved, clock: MockClock) -> None:
    """Returns when what is saved now has been noticed."""
    for _ in range(2):  # the second look begins when the first is over
        saved.read_again = trio.Event()
        await trio.testing.wait_all_tasks_blocked()
        clock.jump(FOLLOW_S)
        await saved.read_again.wait()


@pytest.mark.trio
async def test_a_new_token_is_used_for_what_was_begun_with_the_old_one(
    mock_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", module.__name__)
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    nursery.start_soon(identity.follow)
    mounted = identity.of("hf_first")
    assert mounted == identity.of("") == FIRST
    saved.access = SECOND
    await look(saved, mock_clock)
    assert identity.latest(mounted) == SECOND
    assert identity.of("hf_second") == identity.of("hf_first") == identity.of("") == mounted
    assert identity.of("hf_stranger") == STRANGER
    assert identity.latest(STRANGER) == STRANGER
    assert "hf_" not in caplog.text
    assert SECOND.fingerprint in caplog.text


@pytest.mark.trio
async def test_logging_in_and_out(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    saved = Saved(Access.anonymous())
    identity = Identity(Access.anonymous(), saved.read)
    nursery.start_soon(identity.follow)
    mounted = identity.of("")
    saved.access = FIRST
    await look(saved, mock_clock)
    assert identity.latest(mounted) == FIRST
    saved.access = Access.anonymous()
    await look(saved, mock_clock)
    assert identity.latest(mounted).is_anonymous


@pytest.mark.trio
async def test_a_token_that_cannot_be_had_leaves_the_one_before(
    mock_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    nursery.start_soon(identity.follow)
    saved.error = Denied("The saved token could not be had.")
    for _ in range(3):
        await look(saved, mock_clock)
    assert identity.latest(identity.access) == FIRST
    assert caplog.text.count("could not be had") == 1


@pytest.mark.trio
async def test_former_tokens_are_bounded(mock_clock: MockClock, nursery: trio.Nursery) -> None:
    saved = Saved(FIRST)
    identity = Identity(FIRST, saved.read)
    nursery.start_soon(identity.follow)
    for number in range(TOKENS_MAX + 3):
        saved.access = Access(f"hf_token{number}")
        await look(saved, mock_clock)
    assert len(identity._own) == TOKENS_MAX
    assert identity.of(f"hf_token{TOKENS_MAX + 2}") == identity.access
