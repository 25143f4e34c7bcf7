"""The scheduler, its gate and the choice of source over random members that come, go, lie, stall and are slow. Seeded, on a made-up clock.

One node is simulated to the second decimal; the members are what it sees of them.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from manta.fetch.gate import SwarmGate
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.model.ids import BlobAlgorithm, BlobId
from manta.swarm.choice import LIAR_SECONDS, Choice, FromOrigin, NotNow, Peer

ME = "me"
CHUNKS = 40
PIECE = 8 * 1024 * 1024
LOOK = 0.05
DEADLINE = 400.0


@dataclass
class Member:
    """How one answers, and what it has."""

    name: str
    have: set[tuple[BlobId, int]]
    seconds: float
    fails: float
    """Share of orders that break off."""
    busy: float
    stalls: float
    liar: bool
    reaches_origin: bool
    there: bool = True
    told: dict[BlobId, bytes] = field(default_factory=dict)


class Sim:
    """`run` until `done`. `violations` is what must never be."""

    def __init__(self, seed: int, *, origin: bool = True, everything_held: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 0.0
        self.origin_there = origin
        self.blobs = [BlobId(BlobAlgorithm.SHA256, f"{number:064x}") for number in range(rng.randint(1, 4))]
        self.here: set[tuple[BlobId, int]] = set()
        self.failed: Counter[tuple[BlobId, int]] = Counter()
        self.waiting: dict[tuple[BlobId, int], float] = {}
        self.longest_wait = 0.0
        self.choice = Choice(ME, rng.choice([2, 4, 16]))
        self.members = {name: self._member(name) for name in "abcdefgh"[: rng.randint(1, 8)]}
        if everything_held:
            steady = Member("steady", {(b, c) for b in self.blobs for c in range(CHUNKS)}, 0.2, 0, 0, 0, False, False)
            self.members["steady"] = steady
        self.chooses: Counter[int] = Counter()
        self._count_chooses()
        self.gate = SwarmGate(self.choice, self, lambda: self.now)
        self.scheduler = Scheduler(lambda: 4, self._missing, lambda _: None, self.gate)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = itertools.count()
        self.under_way: dict[tuple[BlobId, int], str] = {}
        self.asked: list[tuple[float, str]] = []
        self.lied_at: dict[str, float] = {}
        self.failed_at: dict[str, float] = {}
        self.pulls_on_behalf = 0
        self.look = float("inf")
        self.choice.set_members(name for name, m in self.members.items() if m.there)
        self.choice.follow(map(str, self.blobs), 0.0)
        self.poll()

    def _member(self, name: str) -> Member:
        rng = self.rng
        have = {(b, c) for b in self.blobs for c in range(CHUNKS) if rng.random() < 0.3}
        return Member(
            name,
            have,
            rng.choice([0.05, 0.3, 2.0]),
            rng.choice([0, 0, 0.3, 1.0]),
            rng.choice([0, 0.5]),
            rng.choice([0, 0.1]),
            rng.random() < 0.15,
            rng.random() < 0.8,
        )

    def _count_chooses(self) -> None:
        choose = self.choice.choose

        def counted(*args, **options):  # type: ignore[no-untyped-def]
            self.chooses[int(self.now)] += 1
            return choose(*args, **options)

        self.choice.choose = counted  # type: ignore[method-assign]

    # gate.Origin -----------------------------------------------------------------------------------------------------

    def reachable(self, blob: BlobId, now: float) -> bool:
        return self.origin_there

    def ready(self, blob: BlobId) -> bool:
        return True

    def alone(self, blob: BlobId) -> bool:
        return False

    def missing(self, blob: BlobId) -> list[int]:
        return [chunk for chunk in range(CHUNKS) if (blob, chunk) not in self.here]

    def lacks(self, blob: BlobId, chunk: int) -> bool:
        return (blob, chunk) not in self.here

    def generation(self, blob: BlobId) -> int:
        return 0

    def _missing(self, blob: BlobId, chunk: int) -> int | None:
        return next((c for c in range(chunk, CHUNKS) if (blob, c) not in self.here), None)

    # What happens ----------------------------------------------------------------------------------------------------

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.serial), what))

    def poll(self) -> None:
        """What members say of themselves, some of it wrong."""
        for member in self.members.values():
            if member.there:
                for blob in self.blobs:
                    bits = bytearray(CHUNKS // 8)
                    for chunk in range(CHUNKS):
                        if (blob, chunk) in member.have or (member.liar and self.rng.random() < 0.2):
                            bits[chunk >> 3] |= 1 << (chunk & 7)
                    if member.told.get(blob) != bytes(bits):
                        member.told[blob] = bytes(bits)
                        self.choice.presence(member.name, str(blob), bytes(bits))

    def churn(self) -> None:
        member = self.rng.choice(list(self.members.values()))
        if member.name != "steady":
            member.there = not member.there
            member.told.clear()
        self.choice.set_members(m.name for m in self.members.values() if m.there)
        self.poll()
        self.at(self.rng.uniform(0.5, 5), self.churn)

    def demand(self, blob: BlobId, chunk: int) -> None:
        if (blob, chunk) not in self.here:
            self.waiting.setdefault((blob, chunk), self.now)
            self.scheduler.demand(blob, chunk, 0)

    def drive(self) -> None:
        while (want := self.scheduler.next(self.now)) is not None:
            self.send(want)
        blocked, self.gate.blocked = self.gate.blocked, None
        self.look = self.now + LOOK if blocked is not None else float("inf")

    def send(self, want: Want) -> None:
        source = self.gate.source(want.blob, want.chunk, want.priority)
        if isinstance(source, NotNow):
            self.scheduler.again(want, self.now + LOOK)
            return
        assert want.key not in self.under_way, "ordered twice at once"
        assert want.key not in self.here
        if isinstance(source, FromOrigin):
            self.under_way[want.key] = "origin"
            if self.origin_there:
                self.at(self.rng.uniform(0.1, 1), lambda: self.ended(want, "origin"))
            else:
                self.at(0.0, lambda: self.ended(want, "origin", failed=True))
            return
        self.to_member(want, source)

    def to_member(self, want: Want, source: Peer) -> None:
        node, key, rng, member = source.node, want.key, self.rng, self.members[source.node]
        assert member.there, "one that left is asked"
        assert self.now >= self.lied_at.get(node, -LIAR_SECONDS) + LIAR_SECONDS, "a liar is asked"
        assert self.now >= self.failed_at.get(node, -10.0) + 0.99, "one that has just failed is asked"
        if key in self.gate.behalf:
            assert not source.pull, "a third node is to pull"
        self.under_way[key] = node
        self.asked.append((self.now, node))
        self.choice.begin(node)
        self.scheduler.beside(want)
        blob, chunk = str(want.blob), want.chunk

        def over(outcome: Callable[[], None], *, came: bool = False) -> Callable[[], None]:
            def end() -> None:
                outcome()
                del self.under_way[key]
                if came:
                    self.came(key)
                    self.scheduler.finished(want)
                else:
                    self.scheduler.again(want)

            return end

        def fail() -> None:
            avoided = not self.choice.usable(node, self.now)
            self.choice.failed(node, self.now)
            if not avoided:
                self.failed_at[node] = self.now

        def lie() -> None:
            self.lied_at[node] = self.now
            self.choice.failed(node, self.now)
            self.choice.lied(node, self.now)

        if rng.random() < member.stalls:
            self.at(3.0, over(fail))
        elif rng.random() < member.fails:
            self.at(rng.uniform(0.001, 1), over(fail))
        elif rng.random() < member.busy:
            others = rng.sample(sorted(self.members), min(2, len(self.members)))
            self.at(0.001, over(lambda: self.choice.busy(node, blob, chunk, others, self.now, rng.random())))
        elif member.liar and rng.random() < 0.5:
            self.at(member.seconds, over(lie))
        elif key in member.have:
            seconds = member.seconds
            self.at(seconds, over(lambda: self.choice.got(node, blob, chunk, PIECE, seconds), came=True))
        elif source.pull and member.reaches_origin and self.origin_there:
            member.have.add(key)
            self.at(1 + member.seconds, over(lambda: self.choice.got(node, blob, chunk, PIECE, 1.0), came=True))
        elif source.pull:
            self.at(0.01, over(lambda: self.choice.unable(node, blob, chunk, self.now)))
        else:
            self.at(0.001, over(lambda: self.choice.lacks(node, blob, chunk, self.now)))

    def came(self, key: tuple[BlobId, int]) -> None:
        self.here.add(key)
        if (since := self.waiting.pop(key, None)) is not None:
            self.longest_wait = max(self.longest_wait, self.now - since)

    def ended(self, want: Want, source: str, *, failed: bool = False) -> None:
        assert self.under_way.pop(want.key) == source
        self.scheduler.finished(want)
        if failed:
            self.failed[want.key] += 1
            self.waiting.pop(want.key, None)
        else:
            self.came(want.key)

    def run(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self.now < DEADLINE, f"stuck: {len(self.here)} came, under way {self.under_way}"
            self.drive()
            change = self.scheduler.next_change(self.now)
            next_event = self.events[0][0] if self.events else float("inf")
            then = min(next_event, self.look, float("inf") if change is None else change)
            assert then < float("inf") or done(), "nothing is under way, and nothing will happen"
            if then < float("inf"):
                self.now = max(self.now, then)
            while self.events and self.events[0][0] <= self.now:
                heapq.heappop(self.events)[2]()

    def check(self) -> None:
        assert self.choice.in_flight == sum(1 for source in self.under_way.values() if source != "origin")
        for name, member in (self.choice._members | self.choice._gone).items():
            assert member.in_flight == sum(1 for source in self.under_way.values() if source == name)
        assert max(self.chooses.values()) < 20_000, "a busy loop"


def polls(sim: Sim) -> None:
    sim.poll()
    sim.at(1.0, lambda: polls(sim))


@pytest.mark.parametrize("seed", range(150))
def test_all_that_is_wanted_comes(seed: int) -> None:
    sim = Sim(seed)
    polls(sim)
    if seed % 2:
        sim.at(1.0, sim.churn)
    for blob in sim.blobs:
        sim.scheduler.want_whole(blob, sim.rng.choice([Priority.PREFETCH, Priority.FILL]))
        sim.at(sim.rng.uniform(0, 20), lambda blob=blob: sim.demand(blob, sim.rng.randrange(CHUNKS)))  # type: ignore[misc]
    sim.run(lambda: len(sim.here) == CHUNKS * len(sim.blobs))
    assert not sim.waiting
    assert not sim.failed
    sim.check()


@pytest.mark.parametrize("seed", range(60))
def test_what_any_member_has_comes_without_the_origin(seed: int) -> None:
    sim = Sim(seed, origin=False, everything_held=True)
    polls(sim)
    sim.at(1.0, sim.churn)
    for blob in sim.blobs:
        sim.scheduler.want_whole(blob, Priority.FILL)
    sim.run(lambda: len(sim.here) == CHUNKS * len(sim.blobs))
    assert not sim.failed
    sim.check()


@pytest.mark.parametrize("seed", range(60))
def test_without_the_origin_a_reader_gets_it_or_hears_that_nobody_has_it(seed: int) -> None:
    sim = Sim(seed, origin=False)
    polls(sim)
    wanted = [(blob, chunk) for blob in sim.blobs for chunk in range(0, CHUNKS, 3)]
    for blob in sim.blobs:
        sim.scheduler.want_whole(blob, Priority.FILL)
    for blob, chunk in wanted:
        sim.at(sim.rng.uniform(0, 10), lambda b=blob, c=chunk: sim.demand(b, c))  # type: ignore[misc]
    sim.run(lambda: sim.now > 10 and not sim.waiting)
    assert all(key in sim.here or sim.failed[key] for key in wanted)
    reliable = [m for m in sim.members.values() if not (m.fails or m.stalls or m.liar)]
    for key in wanted:
        if any(key in member.have for member in reliable):
            assert key in sim.here, "somebody had it"
    sim.check()


@pytest.mark.parametrize("seed", range(40))
def test_a_reader_never_waits_for_what_was_asked_in_advance(seed: int) -> None:
    """One member has everything and takes two seconds a chunk; all that is asked of it in advance is there at once, the reader is too."""
    sim = Sim(seed, everything_held=True)
    sim.members = {"steady": sim.members["steady"]}
    sim.members["steady"].seconds = 2.0
    sim.choice.set_members(["steady"])
    sim.poll()
    for blob in sim.blobs:
        sim.scheduler.want_whole(blob, Priority.FILL)
    blob, chunk = sim.blobs[0], CHUNKS - 1
    at = sim.rng.uniform(1, 3)
    sim.at(at, lambda: sim.demand(blob, chunk))
    sim.run(lambda: sim.now > at and (blob, chunk) in sim.here)
    assert sim.longest_wait <= 2.1


@pytest.mark.parametrize("seed", range(40))
def test_for_another_node_no_third_is_asked_to_fetch(seed: int) -> None:
    sim = Sim(seed)
    polls(sim)
    keys = [(blob, chunk) for blob in sim.blobs for chunk in range(0, CHUNKS, 2)]
    for key in keys:
        sim.gate.behalf[key] += 1
        sim.scheduler.want_rest(*key)
    sim.run(lambda: all(key in sim.here for key in keys))
    sim.check()
