"""Whole clusters in discrete time: everybody finishes, the origin sends about one copy, what must never be is not. Seeded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.simulation.cluster import Cluster, Outcome
from benchmarks.simulation.node import Node
from benchmarks.simulation.order import Order, Policy
from benchmarks.simulation.weather import Crash, Partition, Site, Weather, churning, equal, heterogeneous
from manta.errors import Unavailable

MIB = 1024 * 1024
SIZE = 256 * MIB
RATE = 25e6


class Watched(Cluster):
    """Looks at every flow that begins."""

    def carry(self, source: int, target: int, size: float, cap: float, done, order: Order) -> int:  # type: ignore[no-untyped-def]
        assert source != target, "a node asks itself"
        if order.giver is not None:
            # What an earlier life of it gave hangs where it vanished without a word.
            giving = sum(1 for _, other in self._flows.values() if other in order.giver.uploads.open)
            assert giving < self.policy.slots
            assert order.giver.cache.has(order.want.blob, order.want.chunk), "bytes of what is not there"
        assert not self.nodes[target].cache.has(order.want.blob, order.want.chunk), "bytes of what is there already"
        return super().carry(source, target, size, cap, done, order)


def run(weather: Weather, size: int = SIZE, policy: Policy | None = None, **more: int) -> Outcome:
    found = Watched(weather, size, policy, **more).run(limit_s=600)
    assert found.unfinished == 0
    assert found.slots_most <= (policy or Policy()).slots
    return found


@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_nodes_that_start_together_cost_one_copy(nodes: int) -> None:
    found = run(equal(nodes, RATE), shards=2)
    assert found.copies == pytest.approx(1.0, abs=0.01)
    assert found.slowest_s < 1.8 * found.bound_s  # of 32 chunks: 4 each at 8 nodes, so that starting and ending counts
    # Everybody has got all of it, and nobody more.
    assert found.peer_bytes + found.origin_bytes - found.wasted_bytes == pytest.approx(nodes * SIZE)


def test_one_node_takes_its_links_time() -> None:
    found = run(equal(1, RATE))
    assert found.copies == 1.0
    assert found.slowest_s == pytest.approx(found.bound_s, rel=0.02)


def test_without_the_swarm_every_node_takes_a_copy() -> None:
    found = run(equal(4, RATE), policy=Policy(swarm=False))
    assert found.copies == 4.0
    assert found.slowest_s == pytest.approx(4 * found.bound_s, rel=0.02)


def test_a_seed_is_a_run() -> None:
    weather = churning(6, RATE, 20.0, seed=3)
    assert Cluster(weather, SIZE, seed=1).run() == Cluster(weather, SIZE, seed=1).run()
    assert Cluster(weather, SIZE, seed=2).run() != Cluster(weather, SIZE, seed=1).run()


def test_one_that_joins_takes_nothing_from_the_origin() -> None:
    weather = equal(5, RATE)
    sites = [*(replace(site, has=1.0) for site in weather.sites[:-1]), weather.sites[-1]]
    found = run(replace(weather, sites=sites))
    assert found.origin_bytes == 0
    assert found.slowest_s <= 1.15 * found.bound_s


@pytest.mark.parametrize("seed", range(4))
def test_everybody_finishes_under_churn(seed: int) -> None:
    found = run(churning(8, RATE, 25.0, seed=seed), seed=seed)
    assert found.crashes > 3
    # A third of those that crashed lost what they had; what nobody else had of that comes twice.
    assert found.copies < 2.0


def test_those_that_are_gone_for_good_hold_nobody_up() -> None:
    weather = equal(6, RATE)
    crashes = [Crash(0, 3.0, math.inf, silently=True), Crash(1, 5.0, math.inf)]
    cluster = Watched(replace(weather, crashes=crashes), SIZE)
    found = cluster.run(limit_s=600)
    assert found.unfinished == 2
    assert found.slowest_s < 4 * found.bound_s
    assert all(node.cache.all for node in cluster.nodes[2:])


def test_a_partition_costs_at_most_a_copy_for_each_side() -> None:
    found = run(replace(equal(6, RATE), partitions=[Partition(frozenset({0, 1, 2}), 2.0, 30.0)]))
    assert found.copies <= 2.05


def test_slow_members_do_not_hold_up_the_others() -> None:
    weather = equal(6, RATE)
    slow = Site(weather.sites[0].up / 20, weather.sites[0].down)
    times = [run(replace(weather, sites=sites)).median_s for sites in (weather.sites, [slow, *weather.sites[1:]])]
    # Its uplink is a twentieth: what it owns comes late, or from the origin where a reader has waited long enough.
    assert times[1] < 5 * times[0]


@pytest.mark.parametrize("seed", range(3))
def test_links_of_all_sorts(seed: int) -> None:
    found = run(heterogeneous(12, RATE, spread_s=2.0, seed=seed), 128 * MIB)
    assert found.copies < 1.3


def test_an_origin_that_refuses_slows_the_cluster_and_stops_nobody() -> None:
    weather = equal(6, RATE)
    found = run(replace(weather, hub=replace(weather.hub, requests=8, window_s=2.0)))
    assert found.origin_refused > 0
    assert found.copies < 1.3


def test_a_cluster_that_has_all_needs_no_origin() -> None:
    """Each has another half, and the origin is out of reach."""
    weather = equal(4, RATE)
    sites = [replace(site, has=1.0 if place == 0 else 0.0) for place, site in enumerate(weather.sites)]
    found = run(replace(weather, sites=sites, hub=replace(weather.hub, dark=(0.0, 1e9))))
    assert found.origin_bytes == 0


def test_what_never_happens_is_said() -> None:
    weather = equal(2, RATE)
    with pytest.raises(Unavailable, match="2 nodes are not done"):
        Cluster(replace(weather, hub=replace(weather.hub, dark=(0.0, 1e9))), SIZE).run(limit_s=30)


def test_a_hundred_and_fifty_nodes_with_coarse_rates() -> None:
    found = run(equal(150, 10 * RATE), 64 * MIB)
    assert found.copies < 1.5
    assert found.slowest_s < 20 * found.bound_s


def test_a_node_polls_at_most_sixteen() -> None:
    cluster = Cluster(equal(40, RATE), 64 * MIB)
    cluster.clock.step()
    node: Node = cluster.nodes[0]
    blob = next(iter(cluster.files))
    assert len(node.choice._have[str(blob)]) == 16
