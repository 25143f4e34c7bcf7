"""Many nodes, from the start to the end of the last one: what happens, and what is counted. Here and only here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.report import quantile
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.links import Links
from benchmarks.simulation.node import Node
from benchmarks.simulation.order import Order, Policy
from benchmarks.simulation.origin import Origin
from benchmarks.simulation.roster import Roster
from benchmarks.simulation.weather import Crash, Weather
from manta.errors import Unavailable
from manta.fetch.scheduler import Want
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobAlgorithm, BlobId

EXACT_NODES_MAX = 100
"""With more of them, rates are worked out at most every STEP_SHARE of the time that a chunk takes alone on the usual link."""

STEP_SHARE = 0.1

LOOK_SECONDS = 0.05
"""With more than EXACT_NODES_MAX a node looks what to order no more often than this, where the daemon does at every change: less than a
chunk takes alone at 1 Gbit/s, and the daemon's own pause where members had no time."""

NODES_NAMED = 0x6D616E7461


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to. Seconds, bytes, numbers; times are from each node's own start to its last byte."""

    nodes: int
    size: int
    bound_s: float
    """The least time in which any way of sharing could serve all that started at once: the slowest of the origin's link sending one copy,
    each node's link taking one, and all uplinks together sending as many as there are nodes."""
    median_s: float
    p99_s: float
    slowest_s: float
    origin_bytes: float
    origin_requests: int
    origin_refused: int
    peer_bytes: float
    wasted_bytes: float
    asked: int
    busy: int
    lacked: int
    held: int
    failed: int
    crashes: int
    slots_most: int
    unfinished: int
    events: int
    looks: int

    @property
    def copies(self) -> float:
        """The origin multiple: bytes that the origin sent, over the model's size."""
        return self.origin_bytes / self.size


class Cluster:
    """A model of `size` bytes in `shards` files, which every node of `weather` reads from the first byte to the last. See `order.Swarm`."""

    def __init__(
        self, weather: Weather, size: int, policy: Policy | None = None, *, shards: int = 1, seed: int = 0
    ) -> None:
        self.weather, self.policy = weather, policy or Policy()
        self._shard_bytes = size // shards
        self.size = self._shard_bytes * shards
        blobs = (BlobId(BlobAlgorithm.SHA256, f"{(seed << 32) + shard:064x}") for shard in range(shards))
        self.files = dict.fromkeys(blobs, -(-self._shard_bytes // CHUNK_SIZE))
        self.clock = Clock()
        self.origin = Origin(weather.hub)
        sites = weather.sites
        step = 0.0
        if len(sites) > EXACT_NODES_MAX:
            step = STEP_SHARE * CHUNK_SIZE / float(np.median([site.down for site in sites]))
        self.look_s = LOOK_SECONDS if step else 0.0
        up = np.array([*(site.up for site in sites), weather.hub.rate])
        down = np.array([*(site.down for site in sites), math.inf])
        self.links = Links(up, down, step)
        self.roster = Roster(f"{NODES_NAMED + (seed << 32) + place:016x}" for place in range(len(sites)))
        self._flows: dict[int, tuple[Callable[[Order], None], Order]] = {}
        self._sides: list[frozenset[int]] = []  # of the partitions in force
        self.nodes = [Node(self, place, seed) for place in range(len(sites))]
        self._to_come = set(range(len(sites)))
        self._prepare()

    def _prepare(self) -> None:
        clock = self.clock
        for node, site in zip(self.nodes, self.weather.sites, strict=True):
            for blob, chunks in self.files.items():
                for chunk in range(round(site.has * chunks)):
                    node.cache.put(blob, chunk)
            clock.at(site.starts, node.start)
        for crash in self.weather.crashes:
            node = self.nodes[crash.node]
            clock.at(crash.at, self._crash, node, crash)
            if math.isfinite(crash.seconds):
                clock.at(crash.at + crash.seconds, self._restart, node)
            else:
                self._to_come.discard(crash.node)
        for partition in self.weather.partitions:
            clock.at(partition.at, self._part, partition.nodes)
            clock.at(partition.at + partition.seconds, self._sides.remove, partition.nodes)

    def _crash(self, node: Node, crash: Crash) -> None:
        node.crash(keeps_cache=crash.keeps_cache, silently=crash.silently)
        if not crash.keeps_cache and math.isfinite(crash.seconds):
            self._to_come.add(node.place)

    def _restart(self, node: Node) -> None:
        if not node.up and node.counts.crashes:
            node.start()

    def _part(self, side: frozenset[int]) -> None:
        self._sides.append(side)
        for _, order in list(self._flows.values()):
            if order.giver is not None and self.apart(order.taker.place, order.giver.place):
                order.taker.unanswered(order)

    # order.Swarm -----------------------------------------------------------------------------------------------------

    def size_of(self, want: Want) -> int:
        return min(CHUNK_SIZE, self._shard_bytes - want.chunk * CHUNK_SIZE)

    def apart(self, one: int, other: int) -> bool:
        return any((one in side) != (other in side) for side in self._sides)

    def carry(
        self, source: int, target: int, size: float, cap: float, done: Callable[[Order], None], order: Order
    ) -> int:
        flow = self.links.start(self.clock.now, source, target, size, cap)
        self._flows[flow] = done, order
        return flow

    def drop(self, flow: int) -> float:
        del self._flows[flow]
        return self.links.stop(self.clock.now, flow)

    def completed(self, node: Node) -> None:
        self._to_come.discard(node.place)

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self, limit_s: float = 3600.0) -> Outcome:
        """Until every node that is not gone for good has all of it. Raises Unavailable where that takes longer than `limit_s`."""
        clock, links = self.clock, self.links
        while self._to_come:
            due = links.due()
            if clock.next < due:
                clock.step()
            elif math.isinf(due):
                raise Unavailable(f"{len(self._to_come)} nodes wait for something that never happens.")
            else:
                clock.now = max(due, clock.now)
                # All of them first: what one's end begins may get another's number.
                for done, order in [self._flows.pop(flow) for flow in links.proceed(clock.now)]:
                    order.flow = None
                    done(order)
            if clock.now > limit_s:
                raise Unavailable(f"After {limit_s:g} simulated seconds {len(self._to_come)} nodes are not done.")
        return self.outcome()

    def bound_s(self) -> float:
        sites = self.weather.sites
        hub, cold = self.weather.hub.rate, [site for site in sites if site.has < 1]
        alone = max(self.size / min(site.down for site in cold), self.size / hub) if cold else 0.0
        return (
            max(alone, len(cold) * self.size / (sum(site.up for site in sites) + hub)) if self.policy.swarm else alone
        )

    def outcome(self) -> Outcome:
        counts = [node.counts for node in self.nodes]
        times = [count.done_at - count.began_at for count in counts if count.done_at is not None]
        return Outcome(
            nodes=len(counts),
            size=self.size,
            bound_s=self.bound_s(),
            median_s=quantile(times, 0.5),
            p99_s=quantile(times, 0.99),
            slowest_s=max(times),
            origin_bytes=self.origin.sent,
            origin_requests=self.origin.requests,
            origin_refused=self.origin.refused,
            peer_bytes=sum(count.from_peers for count in counts),
            wasted_bytes=sum(count.wasted for count in counts),
            asked=sum(count.asked for count in counts),
            busy=sum(count.busy for count in counts),
            lacked=sum(count.lacked for count in counts),
            held=sum(count.held for count in counts),
            failed=sum(count.failed for count in counts),
            crashes=sum(count.crashes for count in counts),
            slots_most=max(count.slots_most for count in counts),
            unfinished=sum(count.done_at is None for count in counts),
            events=self.clock.events,
            looks=sum(count.looks for count in counts),
        )
