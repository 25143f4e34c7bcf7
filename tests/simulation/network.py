"""A node and its network in discrete time: the policy that the daemon runs, driven without a clock, a socket or a file.

Each order is a connection that is silent for the origin's latency, then carries its share of the link (at most what one connection can),
and may stall for ever. The policy is `manta.fetch`'s own: `Scheduler`, `Pacer`, `Stragglers`, put together as the fetcher does.
Everything random comes from the seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field

from manta.fetch.fetcher import HEDGES_PER_CONNECTION, LOOK_SECONDS
from manta.fetch.pacing import Pacer
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.stragglers import Course, Stragglers
from manta.model.ids import BlobAlgorithm, BlobId

CHUNK = 8 * 1024 * 1024
STEP_SECONDS = 0.01
STALL_SECONDS = 10.0
"""After which a worker gives a transfer up."""


@dataclass(frozen=True)
class Link:
    """What lies between the node and the origin. Bytes per second, seconds."""

    rate: float
    per_connection: float
    latency_s: float
    stalls: float = 0.0
    """The share of connections that stall somewhere in their chunk."""


@dataclass(eq=False)
class Connection:
    """One order on its way, or its hedge."""

    began: float
    left: float
    stalls_at: float
    """Bytes left at which nothing more comes; negative: never."""
    last: float


@dataclass(eq=False)
class Flight:
    want: Want
    course: Course
    connections: list[Connection] = field(default_factory=list)


@dataclass
class Reader:
    """Reads a file's chunks in order; each wait is noted."""

    blob: BlobId
    chunks: Iterator[int]
    at: int | None = None
    since: float = 0.0
    waits: list[float] = field(default_factory=list)


class Node:
    """`group` of a blob as the scheduler wants it; `stuck` says whose connections all stall at once."""

    def __init__(
        self,
        seed: object,
        link: Link,
        files: dict[BlobId, int],
        *,
        group: Callable[[BlobId], Hashable] = lambda _blob: None,
        stuck: Callable[[BlobId], bool] = lambda _blob: False,
        connections: int = 16,
    ) -> None:
        self.chance = random.Random(repr(seed))
        self.link = link
        self.files = files  # chunks of each
        self.stuck = stuck
        self.now = 0.0
        self.present: dict[BlobId, set[int]] = defaultdict(set)
        self.bytes_sent = 0.0
        self.pacer = Pacer(connections)
        self.scheduler = Scheduler(lambda: self.pacer.connections, self._missing, group)
        self.stragglers = Stragglers()
        self.flights: list[Flight] = []
        self.readers: list[Reader] = []
        self._looked = 0.0

    def _missing(self, blob: BlobId, chunk: int) -> int | None:
        present = self.present[blob]
        return next((c for c in range(chunk, self.files[blob]) if c not in present), None)

    def read(self, blob: BlobId, chunks: Iterator[int] | None = None) -> Reader:
        """A reader of `chunks` of `blob` (None: all, in order), each as soon as it has the one before."""
        reader = Reader(blob, chunks or iter(range(self.files[blob])))
        self.readers.append(reader)
        self._next_chunk(reader)
        return reader

    def run(self, until: Callable[[], bool], limit_s: float = 3600.0) -> float:
        """Lets time pass until `until`. Returns the time; AssertionError where it takes longer than `limit_s`."""
        while not until():
            assert self.now < limit_s, "it never ended"
            self._order()
            self._carry()
            self.now += STEP_SECONDS
            if self.now - self._looked >= LOOK_SECONDS:
                self._looked = self.now
                self._look()
        return self.now

    def complete(self, *blobs: BlobId) -> bool:
        return all(len(self.present[blob]) == self.files[blob] for blob in blobs)

    @property
    def readers_done(self) -> bool:
        return all(reader.at is None for reader in self.readers if not self.stuck(reader.blob))

    def _next_chunk(self, reader: Reader) -> None:
        for chunk in reader.chunks:
            if chunk not in self.present[reader.blob]:
                reader.at, reader.since = chunk, self.now
                self.scheduler.demand(reader.blob, chunk, chunk * CHUNK)
                return
        reader.at = None

    def _order(self) -> None:
        while (want := self.scheduler.next(self.now)) is not None:
            flight = Flight(want, Course(self.now, CHUNK))
            self._connect(flight, CHUNK)
            self.flights.append(flight)

    def _connect(self, flight: Flight, size: float) -> None:
        stalls = self.stuck(flight.want.blob) or self.chance.random() < self.link.stalls
        at = size if self.stuck(flight.want.blob) else self.chance.random() * size
        flight.connections.append(Connection(self.now, size, at if stalls else -1.0, self.now))

    def _carry(self) -> None:
        moving = [
            (flight, connection)
            for flight in self.flights
            for connection in flight.connections
            if self.now - connection.began >= self.link.latency_s and connection.left > connection.stalls_at
        ]
        share = min(self.link.per_connection, self.link.rate / max(len(moving), 1)) * STEP_SECONDS
        for flight, connection in moving:
            count = min(share, connection.left)
            connection.left -= count
            connection.last = self.now
            self.bytes_sent += count
            self.pacer.came(int(count))
            flight.course.progress(int(count), self.now)
        for flight in list(self.flights):
            self._settle(flight)

    def _settle(self, flight: Flight) -> None:
        want, course = flight.want, flight.course
        if any(connection.left <= 0 for connection in flight.connections):
            first = course.first or self.now
            self.present[want.blob].add(want.chunk)
            self.pacer.succeeded()
            self.stragglers.learn(first - course.began, self.now - course.began, CHUNK)
            self.scheduler.learn(first - course.began, self.now - course.began)
            self.scheduler.finished(want)
        else:
            flight.connections = [c for c in flight.connections if self.now - c.last < STALL_SECONDS]
            if flight.connections:
                return
            self.pacer.lost(self.now)
            self.scheduler.again(want)
        self.flights.remove(flight)
        for reader in self.readers:
            if reader.blob == want.blob and reader.at in self.present[want.blob]:
                reader.waits.append(self.now - reader.since)
                self._next_chunk(reader)

    def _look(self) -> None:
        by_course = {flight.course: flight for flight in self.flights}
        self.scheduler.set_silent({f.want.key for c, f in by_course.items() if self.stragglers.silent(c, self.now)})
        hedges = max(1, int(self.pacer.connections * HEDGES_PER_CONNECTION))
        for course in self.stragglers.to_hedge(list(by_course), self.now, hedges):
            flight = by_course[course]
            self._connect(flight, flight.connections[0].left)
        self.pacer.look(len(self.flights), self.now)


def files(number: int, chunks: int, *, first: int = 0) -> dict[BlobId, int]:
    """`number` blobs of so many chunks."""
    return {BlobId(BlobAlgorithm.SHA256, f"{first + n:064x}"): chunks for n in range(number)}


def random_link(chance: random.Random, *, stalls: float = 0.0) -> Link:
    """From a shared 200 Mbit/s far away to 10 Gbit/s near by."""
    rate = chance.choice([25e6, 125e6, 1250e6])
    return Link(rate, rate / chance.choice([1, 2, 6]), chance.choice([0.001, 0.05, 0.2]), stalls)


def prefetch(node: Node, *blobs: BlobId) -> None:
    for blob in blobs:
        node.scheduler.want_whole(blob, Priority.PREFETCH)
