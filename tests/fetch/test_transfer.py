"""One blob in transfer, without a fetcher: which bytes are readable, what to fetch of a chunk, who is woken by what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from manta.cache.digests import chunk_digest
from manta.cache.store import Store
from manta.errors import Corrupt, NoSpace, Unavailable
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.sources import Provenance
from manta.fetch.transfer import HEAD_START_BYTES, PART_BYTES_MIN, Transfer
from manta.hub.origin import Access
from manta.model.extents import Extent
from manta.model.ids import BlobAlgorithm, BlobId, RepoId, RepoKind
from manta.model.snapshot import FileEntry
from tests.fetch.conftest import CHUNK, COMMIT

SIZE = 4 * CHUNK + 1000
BLOB = BlobId(BlobAlgorithm.SHA256, "0" * 64)


class Asked:
    """Stands where the fetcher does: counts how often the transfer has asked."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _transfer: Transfer) -> None:
        self.count += 1


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def transfer(tmp_path: Path, asked: Asked) -> Iterator[Transfer]:
    with Store(tmp_path / "cache", chunk_size=CHUNK) as store, store.open_blob(BLOB, SIZE) as blob:

        def missing(_blob: BlobId, chunk: int) -> int | None:
            return next((c for c in range(chunk, len(blob.grid)) if not blob.has(c)), None)

        made = Transfer(blob, Scheduler(lambda: 4, missing), asked, 60.0)
        entry = FileEntry("model.bin", SIZE, BLOB)
        made.sources.add(Provenance(RepoId(RepoKind.MODEL, "org/one"), COMMIT, entry, Access.anonymous()))
        yield made


def record(transfer: Transfer, chunk: int) -> None:
    """The chunk is complete; nobody is told yet."""
    extent = transfer.blob.grid.extent(chunk)
    transfer.blob.record(chunk, chunk_digest(os.pread(transfer.blob.fd, len(extent), extent.start)))


def want(transfer: Transfer, chunk: int, first: int) -> list[tuple[int, int]]:
    extents, last = transfer.extents_for(Want(BLOB, chunk, Priority.DEMAND, first))
    assert last
    return [(extent.start, extent.end) for extent in extents]


# What is readable --------------------------------------------------------------------------------------------------------


def test_bytes_are_readable_where_they_arrived(transfer: Transfer) -> None:
    assert transfer.readable(Extent(5, 5))
    assert not transfer.readable(Extent(0, 1))
    transfer.arrived(0, 100, 200)
    assert transfer.readable(Extent(100, 200))
    assert not transfer.readable(Extent(99, 200))
    assert not transfer.readable(Extent(100, 201))


def test_bytes_are_readable_across_what_is_recorded_and_what_arrived(transfer: Transfer) -> None:
    record(transfer, 1)
    transfer.arrived(0, CHUNK - 50, CHUNK)
    transfer.arrived(2, 2 * CHUNK, 2 * CHUNK + 50)
    assert transfer.readable(Extent(CHUNK - 50, 2 * CHUNK + 50))
    assert not transfer.readable(Extent(CHUNK - 51, 2 * CHUNK))


def test_what_is_distrusted_is_not_readable(transfer: Transfer) -> None:
    transfer.arrived(0, 0, CHUNK)
    transfer.distrust(0)
    assert not transfer.readable(Extent(0, 1))
    assert want(transfer, 0, 0) == [(0, CHUNK)]


def test_a_recorded_chunk_leaves_nothing_in_memory(transfer: Transfer) -> None:
    transfer.arrived(0, 0, CHUNK)
    transfer.attempts[0] = Counter(["unavailable"])
    record(transfer, 0)
    transfer.recorded(0)
    assert not transfer._arrived
    assert not transfer.attempts


# What to fetch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, CHUNK, CHUNK + HEAD_START_BYTES, 3 * CHUNK, 99 * CHUNK])
def test_a_chunk_is_fetched_whole_from_its_beginning_unless_a_reader_waits_far_in(
    transfer: Transfer, first: int
) -> None:
    assert want(transfer, 1, first) == [(CHUNK, 2 * CHUNK)]


def test_what_a_reader_waits_for_goes_first(transfer: Transfer) -> None:
    first = CHUNK + HEAD_START_BYTES + 1
    assert want(transfer, 1, first) == [(first, 2 * CHUNK), (CHUNK, first)]


def test_what_has_arrived_is_left_out(transfer: Transfer) -> None:
    first = CHUNK + HEAD_START_BYTES + 1
    transfer.arrived(1, first + 10, first + 20)
    transfer.arrived(1, CHUNK, CHUNK + 5)
    assert want(transfer, 1, first) == [(first, first + 10), (first + 20, 2 * CHUNK), (CHUNK + 5, first)]
    transfer.arrived(1, CHUNK, 2 * CHUNK)
    assert want(transfer, 1, first) == []


def test_the_last_chunk_ends_with_the_blob(transfer: Transfer) -> None:
    assert want(transfer, 4, 4 * CHUNK + 10) == [(4 * CHUNK, SIZE)]


# Waiting -----------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_waiter_is_woken_when_its_last_byte_arrives(
    autojump_clock: MockClock, transfer: Transfer, asked: Asked
) -> None:
    done = trio.Event()

    async def read() -> None:
        await transfer.ensure(Extent(CHUNK - 10, CHUNK + 10))
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert asked.count == 1
        assert transfer._scheduler.next(0.0) == Want(BLOB, 0, Priority.DEMAND, CHUNK - 10)
        assert transfer._scheduler.next(0.0) == Want(BLOB, 1, Priority.DEMAND, CHUNK)
        transfer.arrived(1, CHUNK, CHUNK + 10)
        await wait_all_tasks_blocked()
        assert not done.is_set()
        transfer.arrived(0, CHUNK - 10, CHUNK)
        await wait_all_tasks_blocked()
        assert done.is_set()
    assert not transfer._waiters


@pytest.mark.trio
async def test_bytes_that_are_there_beat_an_error(autojump_clock: MockClock, transfer: Transfer) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer.ensure, Extent(0, 10))
        await wait_all_tasks_blocked()
        transfer.fail(NoSpace("The disk is full."), 0)
        transfer.arrived(0, 0, 10)


@pytest.mark.trio
async def test_an_error_goes_to_those_who_wait_for_its_chunk(autojump_clock: MockClock, transfer: Transfer) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer.ensure, Extent(0, 10))
        await wait_all_tasks_blocked()

        async def other() -> None:
            with pytest.raises(NoSpace):
                await transfer.ensure(Extent(CHUNK - 1, CHUNK + 1))

        nursery.start_soon(other)
        await wait_all_tasks_blocked()
        transfer.fail(NoSpace("The disk is full."), 1)
        await wait_all_tasks_blocked()
        assert len(transfer._waiters) == 1
        transfer.arrived(0, 0, 10)


@pytest.mark.trio
async def test_a_waiter_that_is_stirred_asks_again(autojump_clock: MockClock, transfer: Transfer, asked: Asked) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer.ensure, Extent(0, 10))
        await wait_all_tasks_blocked()
        transfer._scheduler.forget(BLOB)
        transfer.stir()
        await wait_all_tasks_blocked()
        assert asked.count == 2
        assert transfer._scheduler.wants(BLOB)
        transfer.arrived(0, 0, 10)


@pytest.mark.trio
async def test_a_broken_blob_is_told_to_who_waits_and_who_comes(autojump_clock: MockClock, transfer: Transfer) -> None:
    async def read() -> None:
        with pytest.raises(Corrupt):
            await transfer.ensure(Extent(0, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        transfer.broken = Corrupt("It is corrupt.")
        transfer.stir()
    await read()
    with pytest.raises(Corrupt):
        await transfer.complete()


@pytest.mark.trio
async def test_a_deadline_is_told_with_what_to_do(autojump_clock: MockClock, transfer: Transfer) -> None:
    with pytest.raises(Unavailable, match=r"org/one/model.bin: what was read did not come within 60 s"):
        await transfer.ensure(Extent(0, 10))
    assert trio.current_time() == pytest.approx(60)
    assert not transfer._waiters


@pytest.mark.trio
async def test_a_waiter_that_leaves_leaves_nothing(autojump_clock: MockClock, transfer: Transfer) -> None:
    with trio.move_on_after(1):
        await transfer.ensure(Extent(0, 10))
    with trio.move_on_after(1):
        await transfer.complete()
    assert not transfer._waiters


@pytest.mark.trio
async def test_who_wants_all_of_it_waits_for_the_seal(autojump_clock: MockClock, transfer: Transfer) -> None:
    sealed = trio.Event()

    async def complete() -> None:
        await transfer.complete()
        sealed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(complete)
        await wait_all_tasks_blocked()
        for chunk in range(5):
            record(transfer, chunk)
            transfer.recorded(chunk)
        await wait_all_tasks_blocked()
        assert not sealed.is_set()
        transfer.sealed.set()
        transfer.stir()


@pytest.mark.trio
async def test_who_wants_all_of_it_is_told_when_it_cannot_be_verified_and_readers_are_not(
    autojump_clock: MockClock, transfer: Transfer
) -> None:
    async def complete() -> None:
        with pytest.raises(Unavailable, match="not be verified"):
            await transfer.complete()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(complete)
        nursery.start_soon(transfer.ensure, Extent(0, 10))
        await wait_all_tasks_blocked()
        transfer.unverified(Unavailable("It could not be verified."))
        await wait_all_tasks_blocked()
        assert len(transfer._waiters) == 1
        transfer.arrived(0, 0, 10)


def test_nothing_is_wanted_of_a_complete_or_broken_blob(transfer: Transfer, asked: Asked) -> None:
    transfer.broken = Corrupt("It is corrupt.")
    transfer.want_whole(Priority.FILL)
    transfer.broken = None
    for chunk in range(5):
        record(transfer, chunk)
    transfer.want_whole(Priority.FILL)
    transfer.look_ahead("reader", range(1, 3), Extent(0, 10))
    assert asked.count == 0
    assert not transfer._scheduler.wants(BLOB)


def test_readahead_goes_on_behind_the_read(transfer: Transfer) -> None:
    record(transfer, 1)
    transfer.look_ahead("reader", range(3), Extent(0, 300_000))
    scheduler = transfer._scheduler
    assert scheduler.next(0.0) == Want(BLOB, 0, Priority.READAHEAD, 300_000)
    assert scheduler.next(0.0) == Want(BLOB, 2, Priority.READAHEAD, 2 * CHUNK)
    assert scheduler.next(0.0) is None


# Parts -------------------------------------------------------------------------------------------------------------------

BIG_CHUNK = 8 * PART_BYTES_MIN


@pytest.fixture
def roomy(tmp_path: Path, asked: Asked) -> Iterator[Transfer]:
    """A transfer whose chunks have room for parts."""
    with Store(tmp_path / "big", chunk_size=BIG_CHUNK) as store, store.open_blob(BLOB, 3 * BIG_CHUNK) as blob:
        yield Transfer(blob, Scheduler(lambda: 4, lambda _blob, chunk: chunk), asked, 60.0)


def part(transfer: Transfer, first: int, upto: int) -> tuple[list[tuple[int, int]], bool]:
    extents, last = transfer.extents_for(Want(BLOB, 1, Priority.DEMAND, first, upto))
    return [(extent.start, extent.end) for extent in extents], last


def test_a_reader_that_jumps_about_gets_its_part_first(roomy: Transfer) -> None:
    first = BIG_CHUNK + 3 * PART_BYTES_MIN
    assert part(roomy, first, first + 4096) == ([(first, first + PART_BYTES_MIN)], False)
    assert part(roomy, first, first + 2 * PART_BYTES_MIN) == ([(first, first + 2 * PART_BYTES_MIN)], False)
    # Near the chunk's beginning the part begins there.
    assert part(roomy, BIG_CHUNK + 10, BIG_CHUNK + 20) == ([(BIG_CHUNK, BIG_CHUNK + PART_BYTES_MIN)], False)


def test_a_part_that_leaves_little_is_the_whole_chunk(roomy: Transfer) -> None:
    first = 2 * BIG_CHUNK - PART_BYTES_MIN - 5
    assert part(roomy, first, first + 10) == ([(first, 2 * BIG_CHUNK), (BIG_CHUNK, first)], True)


def test_what_has_arrived_of_a_part_is_left_out_and_the_last_part_completes_the_chunk(roomy: Transfer) -> None:
    first = BIG_CHUNK + 3 * PART_BYTES_MIN
    upto = first + PART_BYTES_MIN
    roomy.arrived(1, first, first + 1000)
    assert part(roomy, first, first + 4096) == ([(first + 1000, upto)], False)
    roomy.arrived(1, BIG_CHUNK, first)
    roomy.arrived(1, upto, 2 * BIG_CHUNK)
    assert part(roomy, first, first + 4096) == ([(first + 1000, upto)], True)
    # A part that is all there has nothing to ask for: the rest of the chunk then.
    roomy.distrust(1)
    roomy.arrived(1, first, upto)
    assert part(roomy, first, first + 4096) == ([(upto, 2 * BIG_CHUNK), (BIG_CHUNK, first)], True)
