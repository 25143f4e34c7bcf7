"""benchmarks.simulation.links: rates are max-min fair, nothing is lost or made, and the coarse step costs little."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.simulation.links import Links, fair_rates


def rates(
    flows: list[tuple[int, int]], up: list[float], down: list[float], caps: list[float] | None = None
) -> list[float]:
    source, target = (np.array(side, np.int64) for side in zip(*flows, strict=True))
    limits = np.array(caps or [np.inf] * len(flows))
    return [float(rate) for rate in fair_rates(source, target, limits, np.array(up), np.array(down))]


@pytest.mark.parametrize(
    ("flows", "up", "down", "caps", "expected"),
    [
        ([(0, 1)], [10, 10], [10, 4], None, [4]),
        ([(0, 1), (0, 2)], [10, 0, 0], [9, 9, 9], None, [5, 5]),
        # What the slow receiver cannot take goes to the other.
        ([(0, 1), (0, 2)], [10, 0, 0], [9, 2, 9], None, [2, 8]),
        ([(0, 2), (1, 2)], [10, 1, 0], [0, 0, 10], None, [9, 1]),
        ([(0, 1), (0, 2)], [10, 0, 0], [9, 9, 9], [3, np.inf], [3, 7]),
        ([(0, 1), (0, 1)], [10, 0], [9, 9], [0, np.inf], [0, 9]),
    ],
)
def test_shares(
    flows: list[tuple[int, int]], up: list[float], down: list[float], caps: list[float] | None, expected: list[float]
) -> None:
    assert rates(flows, up, down, caps) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_can_have_more_without_one_who_has_less(seed: int) -> None:
    """The definition: each flow is at its cap, or crosses a full link on which none has more than it."""
    chance = random.Random(seed)
    ends = chance.randint(2, 12)
    up, down = ([chance.choice([1.0, 5.0, 10.0]) for _ in range(ends)] for _ in range(2))
    flows = [(chance.randrange(ends), chance.randrange(ends)) for _ in range(chance.randint(1, 60))]
    caps = [chance.choice([np.inf, 0.7]) for _ in flows]
    found = rates(flows, up, down, caps)
    for side, links in ((0, up), (1, down)):
        for end, link in enumerate(links):
            assert sum(rate for rate, flow in zip(found, flows, strict=True) if flow[side] == end) <= link * 1.001
    for rate, flow, cap in zip(found, flows, caps, strict=True):
        held = rate >= cap * 0.999
        for side, links in ((0, up), (1, down)):
            beside = [other for other, its in zip(found, flows, strict=True) if its[side] == flow[side]]
            held |= sum(beside) >= links[flow[side]] * 0.995 and rate >= max(beside) * 0.995
        assert held


def carried(step: float, seed: int) -> tuple[float, list[float]]:
    """Each of 20 nodes sends ten pieces, one after the other, to whom it likes. When all are done, and how each went."""
    chance = random.Random(seed)
    links = Links(np.full(20, 10.0), np.full(20, 10.0), step)
    orders = {node: [(chance.randrange(20), chance.uniform(5, 15)) for _ in range(10)] for node in range(20)}
    owners: dict[int, int] = {}
    now, ends = 0.0, []

    def begin(node: int) -> None:
        if orders[node]:
            target, size = orders[node].pop()
            owners[links.start(now, node, target, size)] = node

    for node in orders:
        begin(node)
    while owners:
        now = links.due()
        ended = links.proceed(now)
        for node in [owners.pop(flow) for flow in ended]:
            ends.append(now)
            begin(node)
    return now, ends


@pytest.mark.parametrize("seed", range(5))
def test_a_coarse_step_costs_little(seed: int) -> None:
    """A piece takes about a second alone: with a step of a hundredth of that the end is hardly later."""
    exact, ends = carried(0.0, seed)
    coarse, _ = carried(0.01, seed)
    assert len(ends) == 200
    assert coarse == pytest.approx(exact, rel=0.03)


def test_a_flow_can_be_held_and_stopped() -> None:
    links = Links(np.array([10.0, 10.0]), np.array([10.0, 10.0]))
    flow = links.start(0.0, 0, 1, 100.0)
    assert links.proceed(0.0) == []
    assert links.due() == pytest.approx(10.0)
    links.set_cap(4.0, flow, 0.0)
    links.proceed(4.0)
    assert links.due() == float("inf")
    assert links.stop(9.0, flow) == pytest.approx(60.0)
    assert links.start(9.0, 1, 0, 10.0) == flow
    links.proceed(9.0)
    assert links.due() == pytest.approx(10.0)
    assert links.proceed(10.0) == [flow]
