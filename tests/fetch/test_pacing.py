"""How many connections pay: they grow while the throughput does, and no further; trouble halves them, and noise does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from manta.fetch.pacing import CONNECTIONS_FIRST, EPOCH_SECONDS, LOSSES_MIN, PROBE_SECONDS, Pacer

MB = 1_000_000


def drive(
    pacer: Pacer, seconds: float, rate: Callable[[int], float], *, since: float = 0.0, busy: bool = True
) -> float:
    """An origin that gives `rate(connections)` bytes per second, looked at ten times a second. Returns when it ends."""
    now = since
    while now < since + seconds:
        now += 0.1
        pacer.came(int(rate(pacer.connections) / 10))
        pacer.look(pacer.connections if busy else pacer.connections - 1, now)
    return now


def per_connection(each: float, link: float) -> Callable[[int], float]:
    return lambda connections: min(each * connections, link)


@pytest.mark.parametrize(("maximum", "first"), [(1, 1), (4, 4), (16, CONNECTIONS_FIRST), (64, CONNECTIONS_FIRST)])
def test_it_begins_within_its_bound(maximum: int, first: int) -> None:
    assert Pacer(maximum).connections == first


def test_no_connections_are_no_pacer() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Pacer(0)


def test_it_grows_to_its_bound_while_each_connection_adds() -> None:
    pacer = Pacer(32)
    drive(pacer, 60, per_connection(20 * MB, 10_000 * MB))
    assert pacer.connections == 32


def test_it_stays_where_the_link_is_full() -> None:
    pacer = Pacer(64)
    now = drive(pacer, 20, per_connection(15 * MB, 120 * MB))
    seen = set()
    for _ in range(int(2 * PROBE_SECONDS * 10)):
        now = drive(pacer, 0.1, per_connection(15 * MB, 120 * MB), since=now)
        seen.add(pacer.connections)
    assert min(seen) == CONNECTIONS_FIRST
    assert max(seen) <= CONNECTIONS_FIRST + CONNECTIONS_FIRST // 4  # a probe now and then


def test_it_does_not_grow_where_connections_are_not_used() -> None:
    pacer = Pacer(64)
    drive(pacer, 30, per_connection(20 * MB, 10_000 * MB), busy=False)
    assert pacer.connections == CONNECTIONS_FIRST


def test_a_link_that_gets_wider_is_found_out() -> None:
    pacer = Pacer(32)
    now = drive(pacer, 20, per_connection(15 * MB, 120 * MB))
    drive(pacer, 2 * PROBE_SECONDS + 60, per_connection(15 * MB, 1000 * MB), since=now)
    assert pacer.connections == 32


def test_a_pause_that_is_asked_for_halves_it_once_per_burst() -> None:
    pacer = Pacer(16)
    for moment in range(8):
        pacer.throttled(100 + moment / 10)
    assert pacer.connections == CONNECTIONS_FIRST // 2
    pacer.throttled(100 + EPOCH_SECONDS)
    assert pacer.connections == CONNECTIONS_FIRST // 4


def test_it_never_gets_to_nothing_and_comes_back() -> None:
    pacer = Pacer(16)
    for moment in range(10):
        pacer.throttled(moment * 10.0)
    assert pacer.connections == 1
    drive(pacer, 60, per_connection(20 * MB, 10_000 * MB), since=100.0)
    assert pacer.connections == 16


def test_single_failures_are_noise_and_many_are_not() -> None:
    pacer = Pacer(8)
    for transfer in range(1000):
        pacer.succeeded()
        if transfer % 50 == 49:
            pacer.lost(0.0)
    assert pacer.connections == 8
    for _ in range(LOSSES_MIN - 1):
        pacer.lost(100.0)
    assert pacer.connections == 8
    while pacer.connections == 8:
        pacer.lost(100.0)
    assert pacer.connections == 4


def test_nodes_that_share_an_origin_begin_with_few_and_never_have_more_than_one_alone() -> None:
    for among, first, most in ((1, 8, 16), (2, 2, 8), (4, 1, 4), (8, 1, 2), (100, 1, 1)):
        pacer = Pacer(16)
        pacer.share(among)
        assert pacer.connections == first
        pacer.share(1)
        pacer.share(among)
        assert (pacer.connections, pacer._maximum) == (first, most)


def test_a_connection_that_only_takes_from_other_nodes_does_not_pay() -> None:
    """A link of 100 bytes per second that two nodes fill: with one more of ours, we have more and the other has less."""
    pacer = Pacer(16)
    pacer.share(2)
    now, theirs = 0.0, 2
    for _ in range(200):
        now += 0.25
        ours = 100 * pacer.connections / (pacer.connections + theirs)
        pacer.elsewhere = 100 - ours
        pacer.came(round(ours / 4))
        pacer.look(pacer.connections, now)
    assert pacer.connections <= 3
