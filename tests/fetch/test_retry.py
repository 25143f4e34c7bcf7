"""What is done about a failure: tried again with growing pauses, asked for anew, waited for, or given up; never for ever without a wait."""

from __future__ import annotations

import pytest

from manta.fetch.retry import ATTEMPTS_MAX, PAUSE_SECONDS, PAUSE_SECONDS_MAX, REFUSALS_MAX, judge
from manta.testing.workers import failed
from manta.wire.messages import Reason


def test_the_pauses_of_a_failing_origin_grow_to_their_bound_and_end() -> None:
    verdicts = [judge(failed("unavailable"), attempt) for attempt in range(1, ATTEMPTS_MAX + 1)]
    assert [v.retry for v in verdicts] == [True] * (ATTEMPTS_MAX - 1) + [False]
    pauses = [v.pause_s for v in verdicts[:-1]]
    assert pauses[:2] == [0.0, PAUSE_SECONDS]  # most failures are one connection's
    assert pauses == sorted(pauses)
    assert max(pauses) <= PAUSE_SECONDS_MAX
    assert sum(pauses) == pytest.approx(7.75)
    assert not any(v.relocate or v.origin_pause_s for v in verdicts)


@pytest.mark.parametrize("reason", ["denied", "absent"])
def test_a_location_that_is_refused_is_asked_for_anew_at_once_and_not_for_ever(reason: Reason) -> None:
    first = judge(failed(reason), 1)
    assert (first.retry, first.pause_s, first.relocate) == (True, 0.0, True)
    second = judge(failed(reason), 2)
    assert second.retry
    assert second.pause_s > 0
    assert not judge(failed(reason), REFUSALS_MAX).retry


def test_wrong_bytes_are_asked_for_elsewhere() -> None:
    verdict = judge(failed("corrupt"), 1)
    assert verdict.retry
    assert verdict.relocate
    assert not judge(failed("corrupt"), REFUSALS_MAX).retry


@pytest.mark.parametrize("attempts", [1, 100])
def test_an_origin_that_asks_for_a_pause_gets_it_from_everybody(attempts: int) -> None:
    verdict = judge(failed("throttled", retry_after_s=17), attempts)
    assert (verdict.retry, verdict.origin_pause_s, verdict.pause_s) == (True, 17, 0.0)


def test_a_server_that_is_overloaded_says_how_long_and_that_counts() -> None:
    verdict = judge(failed("unavailable", status=503, retry_after_s=7), 1)
    assert (verdict.retry, verdict.origin_pause_s) == (True, 7)
    assert not judge(failed("unavailable", status=503, retry_after_s=7), ATTEMPTS_MAX).retry


def test_a_pause_of_nothing_is_still_a_pause() -> None:
    assert judge(failed("throttled", retry_after_s=0), 1).origin_pause_s >= PAUSE_SECONDS


@pytest.mark.parametrize("reason", ["no_space", "cache_broken"])
def test_a_disk_that_refuses_is_not_asked_again(reason: Reason) -> None:
    assert not judge(failed(reason), 1).retry


def test_what_was_cancelled_goes_on() -> None:
    assert judge(failed("cancelled"), 1).retry


@pytest.mark.parametrize("reason", ["absent", "denied", "unavailable", "corrupt", "no_space", "cache_broken"])
def test_every_real_failure_ends(reason: Reason) -> None:
    assert any(not judge(failed(reason), attempt).retry for attempt in range(1, 20))
