"""The sealer: a blob is sealed when its digest is the hub's, thrown away when it is not, and never left to itself in between."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from manta.cache.digests import chunk_digest
from manta.errors import CacheBroken, Corrupt, MantaError, Unavailable
from manta.fetch import sealer as module
from manta.fetch.quarantine import CONDEMNED_SECONDS
from manta.fetch.scheduler import Priority
from manta.fetch.sealer import FAILURES_MAX
from manta.model.extents import Extent
from manta.testing.workers import failed
from tests.fetch.conftest import CHUNK, NEXT_BOOT, File, World, prefill

MakeWorld = Callable[..., World]
pytestmark = pytest.mark.trio


async def complete(world: World, file: File) -> None:
    transfer = world.fetcher.open(file.provenance)
    try:
        await transfer.complete()
    finally:
        world.fetcher.close(transfer)


def is_sealed(world: World, file: File) -> bool:
    info = world.store.find(file.blob)
    return info is not None and info.sealed


async def test_the_digest_follows_the_chunks(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 4 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, 10)
        await world.quiet_fetches()
        await wait_all_tasks_blocked()
        assert transfer.digested == CHUNK
        await world.read(file, transfer, 2 * CHUNK, 2 * CHUNK + 10)
        await world.quiet_fetches()
        await wait_all_tasks_blocked()
        assert transfer.digested == CHUNK  # chunk 1 is missing
        await transfer.complete()
        assert transfer.blob.sealed
        world.fetcher.close(transfer)
    ends = [(order.start, order.end) for order in world.workers.digests]
    assert ends[0] == (0, CHUNK)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))


async def test_large_blobs_are_digested_in_steps(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP_BYTES_MAX", 300_000)
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        await complete(world, file)
    assert max(order.end - order.start for order in world.workers.digests) == 300_000


async def test_digests_under_way_are_bounded(autojump_clock: MockClock, world: World) -> None:
    async with world.running(), trio.open_nursery() as nursery:
        fault = world.workers.fault("digest", hold=True, times=None)
        for number in range(10):
            nursery.start_soon(complete, world, world.publish(f"f{number}", 100 + number))
        with trio.move_on_after(10):
            await trio.sleep_forever()
        assert world.workers.under_way == module.DIGESTS_MAX
        fault.release()


async def test_an_empty_blob_is_sealed(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("empty", 0)
        await complete(world, file)
        assert is_sealed(world, file)
    assert world.workers.fetches == []


async def test_wrong_bytes_are_thrown_away_and_fetched_anew_once(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        world.workers.fault("fetch", flip=CHUNK + 5, where=lambda o: getattr(o, "start", 0) == CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        assert transfer.blob.sealed
        await world.read(file, transfer, CHUNK, 2 * CHUNK)
        world.fetcher.close(transfer)
    assert [type(error) for _, error in world.failures] == [Corrupt]
    assert world.discarded == [transfer]
    assert len(world.workers.fetches) == 6
    assert len(world.workers.locates) == 2  # another location may lead to other bytes


async def test_wrong_twice_is_broken_and_told(autojump_clock: MockClock, make_world: MakeWorld) -> None:
    # No deadline: the clock would jump to it while a thread seals.
    world = make_world(read_timeout_s=math.inf)
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        fault = world.workers.fault("fetch", flip=5, times=None)
        transfer = world.fetcher.open(file.provenance)
        with pytest.raises(Corrupt, match="Report it to the owner"):
            await transfer.complete()
        orders = len(world.workers.orders)
        with pytest.raises(Corrupt, match="Report it to the owner"):
            await world.read(file, transfer, 0, 10)
        transfer.want_whole(Priority.FILL)
        await wait_all_tasks_blocked()
        assert len(world.workers.orders) == orders
        assert transfer.blob.cached_bytes == 0
        world.fetcher.close(transfer)
        assert world.fetcher.transfer(str(file.blob)) is None
        # Who opens it soon gets the same answer, without a request; later there is another try, and nothing unverified is given out.
        with pytest.raises(Corrupt, match="Report it to the owner"):
            await world.read_once(file, 0, 10)
        assert len(world.workers.orders) == orders
        fault.times = 0
        autojump_clock.jump(CONDEMNED_SECONDS)
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, 10)
        assert transfer.blob.sealed
        world.fetcher.close(transfer)
    assert len(world.failures) == 2


async def test_nothing_is_given_out_of_a_blob_that_was_wrong_before_all_of_it_is_verified(
    autojump_clock: MockClock, make_world: MakeWorld
) -> None:
    # No deadline: the clock would jump to it while a thread seals.
    world = make_world(read_timeout_s=math.inf)
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        world.workers.fault("fetch", flip=5, where=lambda o: getattr(o, "start", 1) == 0)
        digest = world.workers.fault("digest", hold=True, where=lambda o: getattr(o, "end", 0) == len(file.data))
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        await digest.reached.wait()
        assert transfer.readable(Extent(0, len(file.data)))
        last = world.workers.fault("fetch", hold=True, where=lambda o: getattr(o, "start", 0) == 2 * CHUNK)
        digest.release()
        await last.reached.wait()
        await wait_all_tasks_blocked()
        assert transfer.blob.has(0)
        assert not transfer.readable(Extent(0, 10))
        done = trio.Event()

        async def read() -> None:
            await world.read(file, transfer, 0, 10)
            assert transfer.blob.sealed
            done.set()

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            await wait_all_tasks_blocked()
            assert not done.is_set()
            last.release()
        world.fetcher.close(transfer)
        await world.read_once(file, 0, 10)


async def test_the_pages_of_bytes_that_were_thrown_away_are_forgotten_at_the_latest_with_the_seal(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed("corrupt"), after_bytes=100_000)
        await complete(world, file)
        assert len(world.discarded) == 1
        assert is_sealed(world, file)


async def test_readers_who_wait_when_bytes_are_thrown_away_get_the_new_ones(
    autojump_clock: MockClock, make_world: MakeWorld
) -> None:
    # No deadline: the clock would jump to it while a thread seals.
    world = make_world(read_timeout_s=math.inf)
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        world.workers.fault("fetch", flip=5, where=lambda o: getattr(o, "start", 1) == 0)
        digest = world.workers.fault("digest", hold=True, where=lambda o: getattr(o, "end", 0) == len(file.data))
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        await digest.reached.wait()
        hold = world.workers.fault("fetch", hold=True, times=None)
        digest.release()
        await hold.reached.wait()
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read, file, transfer, 0, 10)
            await wait_all_tasks_blocked()
            hold.release()
        world.fetcher.close(transfer)


async def test_a_digest_worker_that_dies_costs_a_new_start(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        world.workers.fault("digest", failed("unavailable"), where=lambda o: getattr(o, "start", 0) > 0)
        await world.read_once(file, 0, CHUNK)
        await complete(world, file)
        assert is_sealed(world, file)
    assert [order.start for order in world.workers.digests].count(0) == 2
    assert world.failures == []


async def test_a_digest_that_keeps_failing_is_told_and_tried_when_the_file_is_opened_again(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        fault = world.workers.fault("digest", failed("unavailable", "was cut short"), times=None)
        transfer = world.fetcher.open(file.provenance)
        with pytest.raises(Unavailable, match="could not be verified: was cut short"):
            await transfer.complete()
        assert fault.struck == FAILURES_MAX + 1
        await world.read(file, transfer, 0, CHUNK)  # its bytes stay
        fault.times = 0
        again = world.fetcher.open(file.provenance)
        assert again is transfer
        await transfer.complete()
        world.fetcher.close(transfer)
        world.fetcher.close(again)


async def test_a_blob_that_could_not_be_verified_is_let_go(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("digest", Unavailable("No digest worker process could be started."), times=None)
        await world.read_once(file, 0, 10)
        await world.quiet()
        world.assert_nothing_left()
    assert [type(error) for _, error in world.failures] == [Unavailable]


async def test_a_disk_that_cannot_be_read_is_told(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("digest", failed("cache_broken", "the cache disk failed"), times=None)
        with pytest.raises(CacheBroken, match="could not be verified: the cache disk failed"):
            await complete(world, file)


@pytest.mark.parametrize("when", ["digesting", "sealing"])
async def test_a_seal_that_the_disk_refuses_is_told(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)

        def refuse(_fd: int) -> None:
            raise OSError(5, "Input/output error")

        transfer = world.fetcher.open(file.provenance)
        if when == "sealing":
            with monkeypatch.context() as patch:
                patch.setattr(os, "fdatasync", refuse)
                transfer.want_whole(Priority.FILL)
                while not world.failures:
                    await trio.sleep(1)
            assert [type(error) for _, error in world.failures] == [CacheBroken]
            assert transfer.blob.cached_bytes == 0
        await transfer.complete()
        world.fetcher.close(transfer)


async def test_what_an_earlier_daemon_left_unverified_is_sealed_when_it_is_opened(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    first = make_world()
    file = first.publish("a", 3 * CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0, 1, 2])
    world = make_world()
    async with world.running():
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        assert transfer.blob.sealed
        world.fetcher.close(transfer)
    assert world.workers.fetches == []


async def test_what_is_left_unverified_after_a_crash_is_settled_and_sealed(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    autojump_clock.autojump_threshold = 0.1
    first = make_world()
    file = first.publish("a", 3 * CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0, 1, 2])
    world = make_world(boot_id=NEXT_BOOT, offline=True)
    async with world.running():
        world.fetcher.close(world.fetcher.open(file.provenance))
        await world.quiet()
        assert is_sealed(world, file)


async def test_blobs_that_grew_before_it_ran_are_followed_when_it_does(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    first = make_world()
    file = first.publish("a", CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0])
    world = make_world()
    async with world.running(seal=False):
        world.fetcher.close(world.fetcher.open(file.provenance))
        assert world.fetcher.transfer(str(file.blob)) is not None
        world.nursery.start_soon(world.sealer.run, world.fetcher)
        await world.quiet()
        assert is_sealed(world, file)


async def test_a_chunk_that_is_cleared_while_it_is_digested_does_not_get_into_the_seal(
    autojump_clock: MockClock, world: World
) -> None:
    """`manta cache verify` finds damage in what the running digest has passed; what comes in its place is digested too."""
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, CHUNK)
        await world.quiet_fetches()
        last = world.workers.fault("digest", hold=True, where=lambda o: getattr(o, "end", 0) == len(file.data))
        transfer.want_whole(Priority.FILL)
        await last.reached.wait()
        wrong = bytes(CHUNK)
        transfer.blob.clear(0)
        os.pwrite(transfer.blob.fd, wrong, 0)
        transfer.blob.record(0, chunk_digest(wrong))
        last.release()
        await transfer.complete()
        await world.read(file, transfer, 0, CHUNK)  # right again: found, thrown away and fetched anew
        world.fetcher.close(transfer)
    assert [type(error) for _, error in world.failures] == [Corrupt]


async def test_it_ends_while_chunks_still_come(autojump_clock: MockClock, world: World) -> None:
    async with world.running(seal=False, leave=True):
        file = world.publish("a", CHUNK)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.sealer.run, world.fetcher)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await world.read_once(file, 0, 10)
        await world.quiet_fetches()


async def test_offline_wrong_bytes_are_thrown_away_and_told(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    first = make_world()
    file = first.publish("a", CHUNK)
    first.store.close()
    wrong = File(file.provenance, bytes(CHUNK))
    prefill(tmp_path / "cache", wrong, [0])
    world = make_world(offline=True)
    async with world.running():
        with pytest.raises(MantaError):
            await complete(world, file)
    assert Corrupt in {type(error) for _, error in world.failures}
