"""The meter: totals are exact, the rate is of late, and memory does not grow with time."""

from __future__ import annotations

import random

from manta.telemetry.meter import WINDOW_SECONDS, Meter


def test_nothing_has_no_rate() -> None:
    assert Meter().rate(5.0) == 0.0


def test_a_steady_stream_has_its_rate() -> None:
    meter = Meter()
    for tick in range(1000):
        meter.add(1000, tick * 0.01)
    assert 95_000 < meter.rate(10.0) < 105_000
    assert meter.total == 1_000_000


def test_a_burst_is_no_infinite_rate() -> None:
    meter = Meter()
    meter.add(1000, 5.0)
    assert meter.rate(5.0) == 10_000


def test_a_stall_shows_and_then_the_rate_is_nothing() -> None:
    meter = Meter()
    for tick in range(100):
        meter.add(1000, tick * 0.01)
    running = meter.rate(1.0)
    assert meter.rate(2.0) < running
    assert meter.rate(1.0 + WINDOW_SECONDS + 1) == 0.0
    assert meter.total == 100_000


def test_memory_is_bounded() -> None:
    meter, chance, now = Meter(), random.Random(3), 0.0
    total = 0
    for _ in range(20_000):
        now += chance.expovariate(50)
        count = chance.randrange(100_000)
        meter.add(count, now)
        total += count
        assert len(meter._slots) <= 32
    assert meter.total == total


def test_what_is_told_once_a_second_has_taken_a_second() -> None:
    meter = Meter(lump_s=1.0)
    meter.add(500, 10.0)
    assert meter.rate(10.0) == 500
    meter.add(500, 11.0)
    assert meter.rate(11.0) == 500
