"""The fetcher among other nodes: members that have, lack, lie, stall, are busy, fail, leave; an origin that is there or not."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from manta.errors import MantaError, NoSpace, Unavailable
from manta.fetch.ledger import Ledger
from manta.fetch.peer_flight import Contact
from manta.fetch.scheduler import Priority
from manta.fetch.sources import Provenance
from manta.fetch.throttle import HEARD_SECONDS_MAX
from manta.fetch.transfer import Transfer
from manta.hub.origin import Location
from manta.model.extents import Extent
from manta.model.ids import BlobId
from manta.swarm.choice import LIAR_SECONDS, Choice
from manta.swarm.ownership import owned
from manta.testing.workers import Order, failed
from manta.wire.messages import Fetch, Pull
from tests.fetch.conftest import CHUNK, ENDPOINT, File, World

pytestmark = pytest.mark.trio

ME, A, B, C = ("0" * 16, "a" * 16, "b" * 16, "c" * 16)


class Neighbours:
    """A `Peers`: the members are what a test says, all of them reached at once."""

    def __init__(self, *nodes: str) -> None:
        self.choice = Choice(ME, 16)
        self.choice.set_members(nodes)
        self.ledger = Ledger()
        self.wronged: list[tuple[str, int]] = []
        self.touched: dict[str, None] = {}

    def contact(self, node: str) -> Contact | None:
        if node not in self.choice.members:
            return None
        return Contact(node, f"{node}:1", ME, [], "", "", lz4=False)

    def touch(self, blob: BlobId, size: int) -> None:
        if str(blob) not in self.touched:
            self.touched[str(blob)] = None
            self.choice.follow(self.touched, trio.current_time())
            for node in self.choice.members:
                self.choice.presence(node, str(blob), b"")

    async def location(self, provenance: Provenance) -> Location | None:
        return None

    def wrong(self, node: str, transfer: Transfer, chunk: int) -> None:
        self.wronged.append((node, chunk))


class Cluster:
    """A node among `nodes`."""

    def __init__(self, world: World, neighbours: Neighbours) -> None:
        self.world = world
        self.peers = neighbours
        self.workers = world.workers

    def holds(self, node: str, file: File, *chunks: int) -> None:
        """`node` has these chunks (none: all), and says so."""
        have = bytearray(len(file.data) // CHUNK // 8 + 1)
        for chunk in chunks or range(-(-len(file.data) // CHUNK)):
            have[chunk >> 3] |= 1 << (chunk & 7)
        self.workers.give(node, str(file.blob), file.data)
        self.peers.touch(file.blob, len(file.data))
        self.peers.choice.presence(node, str(file.blob), bytes(have))

    def fetches_for(self, node: str, file: File) -> None:
        """`node` has nothing of it, and gets what it is asked to fetch."""
        self.workers.give(node, str(file.blob), file.data, held=False)

    def cut_off(self) -> None:
        """Neither the hub nor the origin is there any more."""
        away = failed("unavailable", "no connection", unreachable=True)
        self.workers.fault("locate", away, times=None)
        self.workers.fault("fetch", away, times=None)


MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_cluster(tmp_path: Path, autojump_clock: MockClock) -> MakeCluster:
    def make(*nodes: str, **options: float | bool) -> Cluster:
        neighbours = Neighbours(*(nodes or (A, B)))
        world = World(tmp_path / "cache", peers=neighbours, **options)  # type: ignore[arg-type]
        world.clock = autojump_clock
        return Cluster(world, neighbours)

    return make


@asynccontextmanager
async def running(cluster: Cluster, *, leave: bool = False) -> AsyncIterator[World]:
    """As `World.running`; at the end no member is counted as asked, and nobody was asked for a chunk from two places at once."""
    world, workers = cluster.world, cluster.workers
    under_way: dict[tuple[str, int], list[str]] = {}

    def watched(kind: str) -> None:
        inner = getattr(workers, kind)

        @functools.wraps(inner)
        async def outer(order, *args):  # type: ignore[no-untyped-def]
            told = order(0)
            content = told.blob if isinstance(told, Pull) else str(told.blob_size)
            sizes = {str(b): str(t.blob.size) for b, t in world.fetcher._transfers.items()}
            key = sizes.get(content, content), told.start
            asked = under_way.setdefault(key, [])
            asked.append(kind)
            if "pull" in asked:
                assert len(asked) == 1, (key, asked)  # the unverified bytes of one would be another's
            try:
                return await inner(order, *args)
            finally:
                asked.remove(kind)

        setattr(workers, kind, outer)

    watched("pull")
    watched("fetch")
    async with world.running(leave=leave):
        yield world
    assert leave or cluster.peers.choice.in_flight == 0
    assert leave or not any(m.in_flight for m in cluster.peers.choice._members.values())


def pulled_from(world: World) -> list[tuple[str, int, bool]]:
    return [(p.node, p.chunk, bool(p.pull)) for p in world.workers.pulls]


def chunk_owned_by(file: File, node: str, *others: str) -> int:
    """A chunk of `file` that `node` owns."""
    nodes = [node, *others]
    chunks = range(-(-len(file.data) // CHUNK))
    return owned(nodes, node, str(file.blob), chunks)[0]


def pulls(node: str) -> Callable[[Order], bool]:
    return lambda order: isinstance(order, Pull) and order.node == node


async def read_chunk(world: World, file: File, chunk: int) -> None:
    await world.read_once(file, chunk * CHUNK, min(chunk * CHUNK + 100, len(file.data)))


# Where chunks come from --------------------------------------------------------------------------------------------------


async def test_what_a_member_has_comes_from_it(autojump_clock: MockClock, make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        for chunk in (3, 0, 7):
            await read_chunk(world, file, chunk)
        assert pulled_from(world) == [(A, 3, False), (A, 0, False), (A, 7, False)]
        assert world.workers.fetches == []
        assert world.workers.locates == []
    assert cluster.peers.ledger.from_peers == 3 * CHUNK
    assert cluster.peers.ledger.from_origin == 0


async def test_the_owner_fetches_on_our_behalf_and_our_own_come_from_the_origin(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        for node in (A, B):
            cluster.fetches_for(node, file)
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        world.fetcher.close(transfer)
        own = set(owned([A, B], ME, str(file.blob), range(8)))
        assert {f.start // CHUNK for f in world.workers.fetches} == own
        assert {(p.node, p.chunk) for p in world.workers.pulls} == {
            (node, chunk)
            for node, other in ((A, B), (B, A))
            for chunk in owned([ME, other], node, str(file.blob), range(8))
        }
        assert all(p.pull for p in world.workers.pulls)


async def test_nothing_of_a_member_is_readable_before_it_is_recorded(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A)
    async with running(cluster) as world:
        file = world.publish("a", 2 * CHUNK)
        cluster.holds(A, file)
        fault = world.workers.fault("pull", hold=True, after_bytes=CHUNK)
        async with trio.open_nursery() as readers:
            readers.start_soon(read_chunk, world, file, 0)
            await fault.reached.wait()
            transfer = world.fetcher.transfer(str(file.blob))
            assert transfer is not None
            assert world.workers.bytes_sent == CHUNK
            assert transfer.came == CHUNK
            assert not transfer.readable(Extent(0, 1))
            assert not transfer.blob.has(0)
            fault.release()
        assert transfer.readable(Extent(0, CHUNK))


async def test_a_reader_that_reads_on_has_every_byte_right(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A, B, C)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK + 3)
        cluster.holds(A, file, 0, 1, 2)
        cluster.holds(B, file, 2, 3, 8)
        await world.read_once(file, 0, len(file.data))
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        assert transfer.blob.sealed
        assert cluster.peers.wronged == []
        world.fetcher.close(transfer)


# Members that do not give it ---------------------------------------------------------------------------------------------


async def test_one_that_lacks_it_is_corrected_and_the_next_asked(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        cluster.holds(B, file)
        world.workers.fault("pull", failed("absent"), where=pulls(A), times=None)
        for chunk in range(8):
            await read_chunk(world, file, chunk)
        assert {p.chunk for p in world.workers.pulls if p.node == B} == set(range(8))
        assert len(world.workers.pulls) <= 16
        assert world.workers.fetches == []


async def test_a_liar_is_refetched_from_elsewhere_and_not_asked_again(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", where=pulls(A), times=None, flip=100)
        await read_chunk(world, file, 0)
        assert cluster.peers.wronged == [(A, 0)]
        assert not cluster.peers.choice.usable(A, trio.current_time() + LIAR_SECONDS - 60)
        await world.read_once(file, CHUNK, 8 * CHUNK)
        assert sum(p.node == A for p in world.workers.pulls) == 1


async def test_bytes_that_were_here_before_are_not_held_against_a_member(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    """Half of a chunk came from the origin and was wrong; a member gives the other half."""
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        chunk = chunk_owned_by(file, ME, A, B)
        transfer = world.fetcher.open(file.provenance)
        transfer.arrived(chunk, chunk * CHUNK, chunk * CHUNK + CHUNK // 2)  # whose bytes in the file are zero
        cluster.holds(A, file)
        transfer._scheduler.want_rest(file.blob, chunk)
        transfer._asked(transfer)
        while not transfer.blob.has(chunk):
            await trio.sleep(0.5)
        world.fetcher.close(transfer)
        assert cluster.peers.wronged == []
        assert world.workers.pulls[0].extents == [(chunk * CHUNK + CHUNK // 2, (chunk + 1) * CHUNK)]
        await read_chunk(world, file, chunk)


async def test_a_busy_member_is_asked_again_soon_and_not_in_a_hurry(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", failed("busy", retry_after_s=1e-9), times=10)
        began = trio.current_time()
        await read_chunk(world, file, 2)
        assert 0.4 <= trio.current_time() - began < 3
        assert len(world.workers.pulls) == 11
        assert world.workers.fetches == []


async def test_busy_for_ever_a_reader_is_served_by_the_origin(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", failed("busy", retry_after_s=1e9), times=None)
        await read_chunk(world, file, 2)
        assert len(world.workers.fetches) == 1


async def test_who_is_busy_names_who_has_it(autojump_clock: MockClock, make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.give(B, str(file.blob), file.data)
        world.workers.fault("pull", failed("busy", holders=[B, "stranger"]), where=pulls(A))
        await read_chunk(world, file, 2)
        assert pulled_from(world) == [(A, 2, False), (B, 2, False)]


async def test_a_member_that_stalls_is_given_up_for_a_reader(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        stuck = world.workers.fault("pull", hold=True, where=pulls(A), times=None)
        began = trio.current_time()
        await read_chunk(world, file, 0)
        assert trio.current_time() - began < 2
        stuck.release()


async def test_a_silent_member_is_not_avoided_for_ever_when_its_last_order_has_ended(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A, offline=True)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", hold=True)
        began = trio.current_time()
        await read_chunk(world, file, 0)  # there is nobody else
        assert trio.current_time() - began < 10
        assert cluster.peers.choice.usable(A, trio.current_time())


async def test_a_member_that_fails_is_avoided_at_once_and_tried_again(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", failed("unavailable"), where=pulls(A))
        await world.read_once(file, 0, CHUNK)
        assert sum(p.node == A for p in world.workers.pulls) == 1
        await trio.sleep(2)
        await read_chunk(world, file, 5)
        assert world.workers.pulls[-1].node == A


async def test_a_member_that_leaves_while_it_is_asked_and_comes_back_is_counted_right(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world, trio.open_nursery() as readers:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        fault = world.workers.fault("pull", hold=True, after_bytes=1000)
        readers.start_soon(read_chunk, world, file, 0)
        await fault.reached.wait()
        cluster.peers.choice.set_members([B])
        world.fetcher.members_changed()
        cluster.peers.choice.set_members([A, B])
        world.fetcher.members_changed()
        assert cluster.peers.choice._members[A].in_flight == 1
        fault.release()


async def test_an_owner_that_cannot_fetch_it_is_passed_over(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        chunk = chunk_owned_by(file, A, B, ME)
        world.workers.fault("pull", failed("unavailable", behind=True), times=None)
        for node in (A, B):
            cluster.fetches_for(node, file)
        await read_chunk(world, file, chunk)
        assert cluster.peers.choice.usable(A, trio.current_time())
        assert [f.start for f in world.workers.fetches] == [chunk * CHUNK]
        assert len(world.workers.pulls) <= 2


async def test_a_disk_that_is_full_here_is_not_the_members_fault(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster()
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", failed("no_space"))
        with pytest.raises(NoSpace):
            await read_chunk(world, file, 0)
        assert cluster.peers.choice.usable(A, trio.current_time())


# The origin is not there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
async def test_what_any_member_has_is_served_without_the_origin(
    autojump_clock: MockClock, make_cluster: MakeCluster, offline: bool
) -> None:
    cluster = make_cluster(A, B, C, offline=offline, read_timeout_s=30.0)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.cut_off()
        cluster.holds(A, file, 0, 2, 4, 6)
        cluster.holds(C, file, 1, 3, 5, 7)
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        world.fetcher.close(transfer)
        assert world.failures == []


@pytest.mark.parametrize("offline", [True, False])
async def test_what_nobody_has_fails_for_a_said_reason_and_the_rest_does_not(
    autojump_clock: MockClock, make_cluster: MakeCluster, offline: bool
) -> None:
    cluster = make_cluster(A, B, offline=offline, read_timeout_s=20.0)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.cut_off()
        cluster.holds(A, file, 0, 1, 2, 3)
        cluster.workers.fault("pull", failed("absent"), where=lambda o: isinstance(o, Pull) and o.chunk > 3, times=None)
        for chunk in range(8):
            if chunk < 4:
                await read_chunk(world, file, chunk)
            else:
                with pytest.raises(Unavailable, match="offline" if offline else "no connection"):
                    await read_chunk(world, file, chunk)


async def test_cut_off_alone_a_node_gets_everything_through_the_others(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    """Nobody has anything yet; the others reach the origin."""
    cluster = make_cluster(A, B)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.cut_off()
        for node in (A, B):
            cluster.fetches_for(node, file)
        await world.read_once(file, 0, len(file.data))


async def test_a_refused_location_does_not_fail_what_members_hold_and_costs_one_request(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        world.workers.withdraw(file.url)
        cluster.holds(A, file, 0, 1, 2, 3)
        cluster.workers.fault("pull", failed("absent"), where=lambda o: isinstance(o, Pull) and o.chunk > 3, times=None)
        failures = 0
        for chunk in (0, 4, 1, 5, 2, 6, 3, 7):
            try:
                await read_chunk(world, file, chunk)
            except MantaError:
                failures += 1
                assert chunk > 3
        assert failures == 4
        assert len(world.workers.locates) == 1


async def test_held_back_background_is_not_looked_at_in_a_hurry(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    """Offline, and nobody has the rest: an hour of that costs a look a second, and a change is seen at once."""
    cluster = make_cluster(A, offline=True)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file, 0)
        world.workers.fault(
            "pull", failed("unavailable", behind=True), where=lambda o: isinstance(o, Pull) and o.chunk > 0, times=None
        )
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        await trio.sleep(30)
        pulled = len(world.workers.pulls)
        looks, choose = 0, cluster.peers.choice.choose

        def counted(*args, **options):  # type: ignore[no-untyped-def]
            nonlocal looks
            looks += 1
            return choose(*args, **options)

        cluster.peers.choice.choose = counted  # type: ignore[method-assign]
        await trio.sleep(60)
        assert looks < 60 * 2 * 8
        assert len(world.workers.pulls) - pulled < 30
        world.fetcher.stop_background(str(file.blob))
        world.fetcher.close(transfer)


async def test_a_prefetch_that_takes_long_is_not_one_of_which_nothing_comes(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A, read_timeout_s=5.0)
    async with running(cluster) as world:
        world.workers.seconds_per_piece = 0.5
        world.workers.piece_bytes = CHUNK // 8
        file = world.publish("a", 8 * CHUNK)
        cluster.peers.choice._per_member = 1
        cluster.holds(A, file)
        transfer = world.fetcher.open(file.provenance)
        began = trio.current_time()
        await transfer.complete()
        assert trio.current_time() - began > 20
        world.fetcher.close(transfer)


async def test_while_the_origin_wants_a_pause_a_member_that_gets_it_is_asked(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A)
    async with running(cluster) as world, trio.open_nursery() as readers:
        file = world.publish("a", 8 * CHUNK)
        chunk = chunk_owned_by(file, ME, A)
        world.workers.fault("pull", failed("absent"))
        world.workers.fault("fetch", failed("throttled", status=429, retry_after_s=50.0))
        began = trio.current_time()
        readers.start_soon(read_chunk, world, file, chunk)
        await trio.sleep(10)
        cluster.holds(A, file)
        world.fetcher.presence_changed()
        while readers.child_tasks:
            await trio.sleep(0.1)
        assert trio.current_time() - began < 13


# Pauses ------------------------------------------------------------------------------------------------------------------


async def test_a_pause_that_was_heard_of_is_bounded_and_not_told_on(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A)
    async with running(cluster) as world:
        world.fetcher.heed_pause(ENDPOINT, 1e12)
        world.fetcher.heed_pause(ENDPOINT, -5)
        assert world.fetcher.pauses() == {ENDPOINT: HEARD_SECONDS_MAX}
        assert world.fetcher.own_pauses() == {}


# For other nodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("urgent", [True, False])
async def test_what_is_fetched_for_another_is_asked_of_no_third(
    autojump_clock: MockClock, make_cluster: MakeCluster, urgent: bool
) -> None:
    cluster = make_cluster(A, B)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        for node in (A, B):
            cluster.fetches_for(node, file)
        for chunk in range(8):
            await world.fetcher.supply(file.provenance, chunk, urgent=urgent)
        assert not any(p.pull for p in world.workers.pulls)
        assert {f.start // CHUNK for f in world.workers.fetches} == set(range(8))


async def test_two_who_want_the_same_cause_one_fetch_and_the_end_of_one_changes_nothing(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A, B)
    async with running(cluster) as world, trio.open_nursery() as others:
        file = world.publish("a", 8 * CHUNK)
        for node in (A, B):
            cluster.fetches_for(node, file)
        chunk = chunk_owned_by(file, A, B, ME)
        lost = world.workers.fault("fetch", failed("unavailable"), hold=True)
        first = trio.CancelScope()

        async def supply(scope: trio.CancelScope) -> None:
            with scope:
                await world.fetcher.supply(file.provenance, chunk, urgent=True)

        others.start_soon(supply, first)
        await lost.reached.wait()
        others.start_soon(supply, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        lost.release()
    assert [bool(p.pull) for p in world.workers.pulls] == [False] * len(world.workers.pulls)
    assert len(world.workers.fetches) == 2


async def test_another_chunks_failure_does_not_lose_what_another_node_waits_for(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A)
    async with running(cluster) as world, trio.open_nursery() as others:
        file = world.publish("a", 8 * CHUNK)
        world.workers.fault(
            "fetch", failed("denied", status=403), where=lambda o: isinstance(o, Fetch) and o.start == 0
        )
        world.workers.fault("pull", failed("absent"), times=None)
        slow = world.workers.fault("locate", hold=True)
        began = trio.current_time()

        async def supply() -> None:
            await world.fetcher.supply(file.provenance, 5, urgent=False)

        others.start_soon(supply)
        await slow.reached.wait()
        transfer = world.fetcher.transfer(str(file.blob))
        assert transfer is not None
        world.fetcher._give_up(transfer, Unavailable("Another chunk failed."), 0)
        slow.release()
        while others.child_tasks:
            await trio.sleep(0.1)
        assert trio.current_time() - began < 10


# The rate ----------------------------------------------------------------------------------------------------------------


async def test_no_more_comes_than_the_rate_lets_and_refusals_cost_nothing(
    autojump_clock: MockClock, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(A, peer_rate=CHUNK)
    async with running(cluster) as world:
        file = world.publish("a", 8 * CHUNK)
        cluster.holds(A, file)
        world.workers.fault("pull", failed("busy"), times=5)
        began = trio.current_time()
        await world.read_once(file, 0, 8 * CHUNK)
        assert 6.5 < trio.current_time() - began < 12
