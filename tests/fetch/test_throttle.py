"""Pauses that origins ask for: the longest counts, each origin for itself, and none for ever."""

from __future__ import annotations

from manta.fetch.throttle import ORIGINS_MAX, Throttles

HUB, CDN = "https://hub.test:443", "https://cdn.test:443"


def test_the_longest_pause_counts_and_ends() -> None:
    throttles = Throttles()
    throttles.pause(HUB, 10.0)
    throttles.pause(HUB, 4.0)
    assert throttles.until(HUB, 9.9) == 10.0
    assert throttles.until(HUB, 10.0) is None
    throttles.pause(HUB, 12.0)
    assert throttles.until(HUB, 11.0) == 12.0


def test_an_origin_pauses_for_itself() -> None:
    throttles = Throttles()
    throttles.pause(HUB, 10.0)
    assert throttles.until(CDN, 1.0) is None
    assert throttles.pauses(1.0) == {HUB: 10.0}
    assert throttles.pauses(10.0) == {}


def test_origins_are_bounded() -> None:
    throttles = Throttles()
    for number in range(10 * ORIGINS_MAX):
        throttles.pause(f"https://h{number}.test:443", float(number))
    assert len(throttles.pauses(0.0)) == ORIGINS_MAX
