"""Which missing chunks may go, in which order, and at which rate."""

from __future__ import annotations

import pytest

from manta.fetch.gate import ORDERS_MAX, SwarmGate
from manta.fetch.scheduler import BLOCKED_MAX, Priority
from manta.model.ids import BlobAlgorithm, BlobId
from manta.swarm.choice import Choice, FromOrigin, NotNow, Peer
from manta.swarm.ownership import owned

BLOB = BlobId(BlobAlgorithm.SHA256, "0" * 64)
CHUNKS = 300


class Origin:
    """A `gate.Origin` as a test says."""

    def __init__(self) -> None:
        self.there = self.is_ready = True
        self.only = False
        self.here: set[int] = set()
        self.lost = 0
        self.listed = 0

    def reachable(self, blob: BlobId, now: float) -> bool:
        return self.there

    def ready(self, blob: BlobId) -> bool:
        return self.is_ready

    def alone(self, blob: BlobId) -> bool:
        return self.only

    def missing(self, blob: BlobId) -> list[int]:
        self.listed += 1
        return [chunk for chunk in range(CHUNKS) if chunk not in self.here]

    def lacks(self, blob: BlobId, chunk: int) -> bool:
        return chunk not in self.here

    def generation(self, blob: BlobId) -> int:
        return self.lost


class World:
    def __init__(self, *nodes: str, rate: int = 0, me: str = "me") -> None:
        self.now = 0.0
        self.origin = Origin()
        self.choice = Choice(me, 1000, per_member=1000)
        self.choice.set_members(nodes)
        self.gate = SwarmGate(self.choice, self.origin, lambda: self.now, rate)

    def holds(self, node: str, *chunks: int) -> None:
        have = bytearray(CHUNKS // 8 + 1)
        for chunk in chunks:
            have[chunk >> 3] |= 1 << (chunk & 7)
        self.choice.follow([str(BLOB)], self.now - 10)
        self.choice.presence(node, str(BLOB), bytes(have))

    def order(self, *, connection: bool = True, most: int = CHUNKS) -> list[int]:
        """All that may go one after the other; each is in the cache at once."""
        came = list[int]()
        while len(came) < most:
            chunk = self.gate.next_missing(BLOB, lambda _: True, connection=connection)
            if chunk is None:
                break
            came.append(chunk)
            self.origin.here.add(chunk)
        return came


def admits(world: World, chunk: int, priority: Priority, *, connection: bool = True) -> bool:
    return world.gate.admits(BLOB, chunk, priority, connection=connection)


def test_a_reader_goes_to_the_origin_to_hear_why_not_and_background_waits() -> None:
    world = World()
    assert admits(world, 0, Priority.FILL)
    world.origin.there = False
    assert admits(world, 0, Priority.DEMAND)
    assert world.gate.blocked is None
    assert not admits(world, 0, Priority.FILL)
    assert world.gate.blocked is Priority.FILL


def test_what_waits_for_a_connection_or_a_location_is_not_looked_at_again_before_it_ends() -> None:
    world = World()
    assert not admits(world, 0, Priority.DEMAND, connection=False)
    world.origin.is_ready = False
    assert not admits(world, 0, Priority.DEMAND)
    assert world.gate.blocked is None


def test_what_a_member_has_needs_neither() -> None:
    world = World("a")
    world.holds("a", 5)
    world.origin.is_ready = world.origin.there = False
    assert admits(world, 5, Priority.FILL, connection=False)
    world.origin.only = True  # what members gave was wrong
    assert isinstance(world.gate.source(BLOB, 5, Priority.FILL), FromOrigin)


def test_of_what_is_held_back_the_most_urgent_tells_when_to_look_again() -> None:
    world = World("a")
    world.choice.joining_until = 1.0
    for priority in (Priority.FILL, Priority.DEMAND, Priority.PREFETCH):
        assert not admits(world, 0, priority)
    assert world.gate.blocked is Priority.DEMAND


def test_its_own_come_first_and_each_node_begins_elsewhere() -> None:
    orders = {}
    for me, *others in (("a", "b", "c"), ("b", "a", "c"), ("c", "a", "b")):
        world = World(*others, me=me)
        for node in others:
            world.holds(node)
        own = owned(others, me, str(BLOB), range(CHUNKS))
        order = world.order()
        assert order[: len(own)] == own
        assert sorted(order) == list(range(CHUNKS))
        orders[me] = order[len(own)]
    assert len(set(orders.values())) == 3


def test_chunks_that_nobody_can_give_hide_none_that_somebody_can() -> None:
    world = World("a")
    world.origin.there = False
    world.choice.set_silent([])
    last = [chunk for chunk in range(CHUNKS) if chunk % 100 == 99]
    world.holds("a", *last)
    for chunk in range(CHUNKS):
        if chunk not in last:
            world.choice.begin("a")
            world.choice.unable("a", str(BLOB), chunk, 0.0)
    came: list[int] = []
    for _ in range(CHUNKS // BLOCKED_MAX + 2):
        came += world.order()
    assert sorted(came) == last


def test_what_waits_for_connections_keeps_its_order() -> None:
    world = World()
    for _ in range(5):
        assert world.order(connection=False) == []
    assert world.order() == list(range(CHUNKS))


def test_chunks_that_were_lost_again_come_again() -> None:
    world = World("a")
    world.holds("a", *range(CHUNKS))
    world.order(most=250)
    world.origin.here.clear()
    world.origin.lost += 1
    world.order()
    assert len(world.origin.here) == CHUNKS


def test_a_file_that_is_opened_anew_is_looked_at_anew() -> None:
    world = World("a")
    world.holds("a", *range(CHUNKS))
    world.order(most=250)
    world.gate.closed(BLOB)
    world.origin.here.clear()
    world.order()
    assert len(world.origin.here) == CHUNKS


def test_the_order_is_made_once_and_anew_when_the_members_change() -> None:
    world = World("a", "b")
    for node in "ab":
        world.holds(node, *range(CHUNKS))
    world.order(most=200)
    assert world.origin.listed == 1
    world.choice.set_members(["b", "a"])
    world.order(most=10)
    assert world.origin.listed == 1
    world.choice.set_members(["a"])
    world.order(most=10)
    assert world.origin.listed == 2
    for number in range(ORDERS_MAX + 9):
        world.gate.next_missing(BlobId(BlobAlgorithm.SHA256, f"{number:064x}"), lambda _: True, connection=True)
    assert len(world.gate._plans) == ORDERS_MAX


@pytest.mark.parametrize("size", [1000, 100_000])
def test_the_rate_holds_over_time_and_what_did_not_come_is_given_back(size: int) -> None:
    world, ordered = World("a", rate=10_000), 0
    world.holds("a", *range(CHUNKS))
    for tick in range(10_000):
        world.now = tick / 100
        while isinstance(world.gate.source(BLOB, 0, Priority.DEMAND), Peer):
            world.gate.spend(size)
            if tick % 3:
                world.gate.spend(-size)  # refused
                break
            ordered += size
    assert 0.9 * 1_000_000 - size <= ordered <= 1_000_000 + 1000 + size
    world.gate.spend(10 * size)
    assert isinstance(world.gate.source(BLOB, 0, Priority.DEMAND), NotNow)
