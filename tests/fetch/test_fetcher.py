"""The fetcher with fake workers: one fetch for all readers, bytes as they come, failures tried again, told, and forgotten afterwards."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from manta.cache.digests import chunk_digest
from manta.errors import Absent, CacheBroken, Corrupt, Denied, MantaError, NoSpace, Unavailable
from manta.fetch.locator import FIRST_ANSWER_SECONDS_MAX, LOCATING_MAX
from manta.fetch.pacing import CONNECTIONS_FIRST
from manta.fetch.retry import ATTEMPTS_MAX, REFUSALS_MAX
from manta.fetch.scheduler import Priority
from manta.fetch.sources import Provenance
from manta.fetch.stragglers import SILENCE_SECONDS
from manta.fetch.transfer import LATE_SECONDS
from manta.fetch.way import REFUSED_SECONDS
from manta.model.extents import Extent
from manta.model.snapshot import FileEntry
from manta.telemetry.events import Opener
from manta.testing.workers import SECRET, Order, failed
from manta.wire.messages import Fetch, Located, Reason
from tests.fetch.conftest import CHUNK, COMMIT, ENDPOINT, NEXT_BOOT, TOKEN, File, World, prefill
from tests.telemetry.scrape import samples

MakeWorld = Callable[..., World]
pytestmark = pytest.mark.trio


def of_chunk(chunk: int) -> Callable[[Order], bool]:
    return lambda order: isinstance(order, Fetch) and order.start == chunk * CHUNK


def of(world: World, file: File) -> Callable[[Order], bool]:
    """Orders for `file`, by its size: fetches do not name it."""
    return lambda order: isinstance(order, Fetch) and order.blob_size == len(file.data)


def throttled(seconds: int) -> Located:
    """The hub's answer when its quota is spent."""
    return Located(0, 429, ENDPOINT, {"ratelimit": f'"resolvers";r=0;t={seconds}'})


async def wait(world: World) -> None:
    """Until every task waits for something."""
    await trio.testing.wait_all_tasks_blocked()


# Readers -----------------------------------------------------------------------------------------------------------------


async def test_a_read_fetches_its_chunk_and_no_other(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 5 * CHUNK + 7)
        await world.read_once(file, 3 * CHUNK + 5, 3 * CHUNK + 10)
        assert [(f.start, f.end) for f in world.workers.fetches] == [(3 * CHUNK, 4 * CHUNK)]
        await world.read_once(file, 5 * CHUNK, 5 * CHUNK + 7)
        assert world.workers.fetches[-1].end == len(file.data)
        await world.quiet_fetches()
        assert world.fetcher.origin_meter.total == CHUNK + 7


async def test_many_readers_of_a_chunk_cause_one_fetch(autojump_clock: MockClock, world: World) -> None:
    async with world.running(), trio.open_nursery() as readers:
        file = world.publish("a", 3 * CHUNK)
        for number in range(50):
            readers.start_soon(world.read_once, file, CHUNK + number, CHUNK + number + 1000)
        await wait(world)
    assert len(world.workers.fetches) == 1
    assert len(world.workers.locates) == 1


async def test_a_read_across_chunks_has_them_all(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 4 * CHUNK)
        await world.read_once(file, CHUNK - 5, 3 * CHUNK + 5)
    assert sorted(f.start for f in world.workers.fetches) == [0, CHUNK, 2 * CHUNK, 3 * CHUNK]


async def test_what_is_there_is_read_without_a_wait(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, 10)
        await world.quiet_fetches()
        with trio.testing.assert_no_checkpoints():
            await transfer.ensure(Extent(5, CHUNK))
        world.fetcher.close(transfer)


async def test_a_reader_in_the_middle_is_served_before_the_beginning_and_before_the_end(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        middle = 400 * 1024
        fault = world.workers.fault("fetch", hold=True, after_bytes=10_000)
        await world.read_once(file, middle, middle + 10_000)
        assert fault.reached.is_set()
        (order,) = world.workers.fetches
        assert order.extents == [(middle, CHUNK), (0, middle)]
        assert world.workers.under_way == 1
        fault.release()


async def test_a_reader_near_the_beginning_costs_no_second_request(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        await world.read_once(file, CHUNK + 1000, CHUNK + 2000)
    assert world.workers.fetches[0].extents == [(CHUNK, 2 * CHUNK)]


async def test_a_cancelled_reader_cancels_no_fetch(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        fault = world.workers.fault("fetch", hold=True, after_bytes=5)
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, 100)
            await fault.reached.wait()
            readers.start_soon(world.read_once, file, 0, 200)
            await wait(world)
            readers.cancel_scope.cancel()
        assert world.workers.under_way == 1
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, 300)
            await wait(world)
            fault.release()
        assert len(world.workers.fetches) == 1


async def test_a_reader_has_a_deadline_and_the_fetch_has_not(autojump_clock: MockClock, make_world: MakeWorld) -> None:
    world = make_world(read_timeout_s=20.0)
    async with world.running():
        file = world.publish("a", CHUNK)
        fault = world.workers.fault("fetch", hold=True, times=None)
        began = trio.current_time()
        with pytest.raises(Unavailable, match="did not come within 20 s"):
            await world.read_once(file, 0, 100)
        assert trio.current_time() - began == pytest.approx(20)
        fault.release()
        await trio.sleep(LATE_SECONDS)
        await world.read_once(file, 0, 100)
        assert sum(1 for order in world.workers.fetches if order.extents) == 2  # it was hedged


async def test_readers_of_other_chunks_are_not_woken_by_an_error(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        world.workers.fault("fetch", failed("no_space"), where=of_chunk(0))
        held = world.workers.fault("fetch", hold=True, where=of_chunk(1))
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, CHUNK, CHUNK + 1)
            await held.reached.wait()
            with pytest.raises(NoSpace):
                await world.read_once(file, 0, 1)
            held.release()


# Whole blobs -------------------------------------------------------------------------------------------------------------


async def test_a_prefetch_ends_with_the_seal(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 6 * CHUNK + 1)
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        assert transfer.blob.sealed
        world.fetcher.close(transfer)
        info = world.store.find(file.blob)
        assert info is not None
        assert info.sealed
    assert world.workers.bytes_sent == len(file.data)
    assert len(world.workers.locates) == 1


async def test_background_goes_on_when_the_file_is_closed(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 6 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        world.fetcher.close(transfer)
        await world.quiet()
        info = world.store.find(file.blob)
        assert info is not None
        assert info.sealed


async def test_background_that_is_stopped_leaves_nothing(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 60 * CHUNK, data=bytes(60 * CHUNK))
        fault = world.workers.fault("fetch", hold=True, times=None)
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.PREFETCH)
        await fault.reached.wait()
        world.fetcher.close(transfer)
        world.fetcher.stop_background(str(file.blob))
        assert world.fetcher.transfer(str(file.blob)) is transfer  # orders are under way
        fault.release()
        await world.quiet()
        assert len(world.workers.fetches) == CONNECTIONS_FIRST


async def test_background_that_is_stopped_while_its_location_is_asked_for_leaves_nothing(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 5 * CHUNK)
        fault = world.workers.fault("locate", hold=True)
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.PREFETCH)
        await fault.reached.wait()
        world.fetcher.stop_background(str(file.blob))
        world.fetcher.close(transfer)
        fault.release()
        await world.quiet()
        assert world.workers.fetches == []


async def test_background_that_is_stopped_while_an_order_fails_leaves_nothing(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        fault = world.workers.fault("fetch", failed(), hold=True)
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.PREFETCH)
        await fault.reached.wait()
        world.fetcher.stop_background(str(file.blob))
        world.fetcher.close(transfer)
        fault.release()


async def test_a_readahead_window_alone_keeps_nothing_open(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 5 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        transfer.look_ahead("reader", range(2, 4), Extent(0, 2 * CHUNK))
        transfer.look_ahead("reader", range(0), Extent(0, 10))
        world.fetcher.close(transfer)
        assert not world.fetcher._transfers


async def test_a_prefetch_that_gets_nothing_gives_up_and_a_slow_one_does_not(
    autojump_clock: MockClock, make_world: MakeWorld
) -> None:
    world = make_world(read_timeout_s=20.0)
    async with world.running():
        slow = world.publish("slow", CHUNK)
        world.workers.seconds_per_piece = 15.0  # 8 pieces: two minutes for the chunk
        transfer = world.fetcher.open(slow.provenance)
        await transfer.complete()
        world.fetcher.close(transfer)
        world.workers.seconds_per_piece = 0.0
        stuck = world.publish("stuck", CHUNK)
        fault = world.workers.fault("fetch", hold=True, times=None)
        transfer = world.fetcher.open(stuck.provenance)
        with pytest.raises(Unavailable, match="nothing came for 20 s"):
            await transfer.complete()
        world.fetcher.close(transfer)
        fault.release()


async def test_progress_of_a_whole_blob_looks_at_no_chunks(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 GiB that would be 12,800 chunks, a few thousand times per second."""
    async with world.running():
        file = world.publish("a", 6 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        looked: list[Extent] = []
        monkeypatch.setattr(transfer, "readable", looked.append)
        await transfer.complete()
        world.fetcher.close(transfer)
        assert looked == []


# Failures of an order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["unavailable", "denied", "absent", "throttled", "cancelled"])
async def test_a_failure_is_tried_again_and_what_came_is_not_fetched_again(
    autojump_clock: MockClock, world: World, reason: Reason
) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        world.workers.fault("fetch", failed(reason), after_bytes=100_000)
        await world.read_once(file, 0, CHUNK)
    first, second = world.workers.fetches
    assert first.extents == [(0, CHUNK)]
    assert second.extents == [(100_000, CHUNK)]
    assert world.workers.bytes_sent == CHUNK
    assert world.failures == []
    relocated = reason in {"denied", "absent"}
    assert len(world.workers.locates) == 1 + relocated
    assert (first.url != second.url) == relocated


async def test_failures_of_one_kind_do_not_count_against_another(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed("unavailable"), times=3)
        world.workers.fault("fetch", failed("denied", status=403))
        await world.read_once(file, 0, 10)
    assert len(world.workers.locates) == 2


async def test_what_may_be_wrong_is_fetched_again(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed("corrupt"), after_bytes=100_000, flip=None)
        await world.read_once(file, CHUNK - 10, CHUNK)
    first, second = world.workers.fetches
    assert first.extents == second.extents
    assert first.url != second.url


@pytest.mark.parametrize(
    ("reason", "kind", "orders", "locates"),
    [
        ("unavailable", Unavailable, ATTEMPTS_MAX, 1),
        ("denied", Denied, REFUSALS_MAX, REFUSALS_MAX),
        ("absent", Absent, REFUSALS_MAX, REFUSALS_MAX),
        ("corrupt", Corrupt, REFUSALS_MAX, REFUSALS_MAX),
        ("no_space", NoSpace, 1, 1),
        ("cache_broken", CacheBroken, 1, 1),
    ],
)
async def test_what_keeps_failing_is_told_and_the_next_read_tries_again(
    autojump_clock: MockClock, world: World, reason: Reason, kind: type[MantaError], orders: int, locates: int
) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        fault = world.workers.fault("fetch", failed(reason, "the origin did as told"), times=None)
        with pytest.raises(kind, match=r"org/one/a: the origin did as told\. ") as told:
            await world.read_once(file, 0, 10)
        assert type(told.value) is kind
        assert len(world.workers.fetches) == orders
        assert len(world.workers.locates) == locates
        assert [type(error) for _, error in world.failures] == [kind]
        fault.times = 0
        await world.read_once(file, 0, 10)
        assert len(world.workers.fetches) == orders + 1


async def test_a_failure_ends_the_background_of_its_blob_and_readers_go_on(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        world.workers.fault("fetch", failed("no_space"), where=of_chunk(0))
        transfer = world.fetcher.open(file.provenance)
        with pytest.raises(NoSpace):
            await transfer.complete()
        await world.read(file, transfer, 2 * CHUNK, 3 * CHUNK)
        world.fetcher.close(transfer)


async def test_a_link_that_breaks_often_but_gets_further_is_not_given_up(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed(), after_bytes=50_000, times=None)
        await world.read_once(file, 0, CHUNK)
    assert len(world.workers.fetches) == -(-CHUNK // 50_000)
    assert world.workers.bytes_sent == CHUNK


async def test_a_reader_of_a_chunk_that_is_being_read_ahead_is_not_lost_when_that_fails(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        fault = world.workers.fault("fetch", failed(), hold=True, where=of_chunk(1))
        transfer = world.fetcher.open(file.provenance)
        transfer.look_ahead("reader", range(1, 2), Extent(0, CHUNK))
        await fault.reached.wait()
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read, file, transfer, CHUNK, CHUNK + 10)
            await wait(world)
            transfer.look_ahead("reader", range(0), Extent(0, 10))  # another reader's
            began = trio.current_time()
            fault.release()
        assert trio.current_time() - began < 1
        world.fetcher.close(transfer)


async def test_failures_pause_longer_each_time(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        began = trio.current_time()
        world.workers.fault("fetch", failed(), times=ATTEMPTS_MAX - 1)
        await world.read_once(file, 0, 10)
        assert trio.current_time() - began == pytest.approx(7.75, abs=0.1)


async def test_a_worker_that_dies_costs_its_order_only(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        dead = failed("unavailable", "was cut short: its worker process ended")
        world.workers.fault("fetch", dead, after_bytes=CHUNK // 2)
        await world.read_once(file, 0, CHUNK)
    assert world.workers.bytes_sent == CHUNK


async def test_without_workers_readers_are_told(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", Unavailable("No fetch worker process could be started in 30 s; see the log."))
        with pytest.raises(Unavailable, match="No fetch worker"):
            await world.read_once(file, 0, 10)
        world.workers.fault("locate", Unavailable("No fetch worker process could be started in 30 s; see the log."))
        other = world.publish("b", CHUNK)
        with pytest.raises(Unavailable, match="No fetch worker"):
            await world.read_once(other, 0, 10)
        await world.read_once(file, 0, 10)
        await world.read_once(other, 0, 10)


async def test_a_429_holds_every_file(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        one, two = world.publish("a", CHUNK), world.publish("b", CHUNK + 1)
        world.workers.fault("fetch", failed("throttled", status=429, retry_after_s=12.0), where=of(world, one))
        began = trio.current_time()
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, one, 0, 10)
            await wait(world)
            readers.start_soon(world.read_once, two, 0, 10)
        assert trio.current_time() - began == pytest.approx(12, abs=0.1)


async def test_a_chunk_map_without_room_is_told(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        transfer = world.fetcher.open(file.provenance)

        def no_room(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr("manta.cache.chunkmap.pwrite_all", no_room)
            with pytest.raises(NoSpace):
                await transfer.complete()
        await world.quiet_fetches()
        assert {type(error) for _, error in world.failures} == {NoSpace}
        await transfer.complete()
        world.fetcher.close(transfer)


# Locations ---------------------------------------------------------------------------------------------------------------


async def test_a_location_is_asked_for_once_for_many_chunks_and_with_the_token(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 8 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        world.fetcher.close(transfer)
    (order,) = world.workers.locates
    assert order.headers["authorization"] == f"Bearer {TOKEN}"
    assert order.deadline_s == FIRST_ANSWER_SECONDS_MAX
    assert all(SECRET in fetch.url and "authorization" not in fetch.headers for fetch in world.workers.fetches)


async def test_a_location_is_refreshed_before_it_expires(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        world.workers.lifetime_s = 3600
        file = world.publish("a", 3 * CHUNK)
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, 10)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 1800)
        await world.read(file, transfer, CHUNK, CHUNK + 10)
        assert len(world.workers.locates) == 1
        monkeypatch.setattr(time, "time", lambda: now + 3599)
        await world.read(file, transfer, 2 * CHUNK, 2 * CHUNK + 10)
        assert len(world.workers.locates) == 2
        world.fetcher.close(transfer)


async def test_many_chunks_that_are_denied_ask_for_one_new_location(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 6 * CHUNK)
        world.workers.fault("fetch", failed("denied", status=403), times=6)
        await world.read_once(file, 0, 6 * CHUNK)
    assert len(world.workers.locates) == 2


async def test_a_hub_that_does_not_answer_is_asked_again_and_given_up(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("locate", failed("unavailable", "hub.test cannot be reached"), times=2)
        await world.read_once(file, 0, 10)
        other = world.publish("b", CHUNK)
        fault = world.workers.fault("locate", failed("unavailable", "hub.test cannot be reached"), times=None)
        with pytest.raises(Unavailable, match=r"org/one/b: hub\.test cannot be reached"):
            await world.read_once(other, 0, 10)
        assert fault.struck == ATTEMPTS_MAX
        fault.times = 0
        await world.read_once(other, 0, 10)


@pytest.mark.parametrize(
    ("status", "headers", "kind"),
    [
        (404, {"x-error-code": "EntryNotFound"}, Absent),
        (401, {}, Denied),
        (403, {"x-error-code": "GatedRepo"}, Denied),
        (200, {"x-repo-commit": "d" * 40}, Corrupt),
        (503, {}, Unavailable),
    ],
)
async def test_what_the_hub_refuses_is_told_with_its_error(
    autojump_clock: MockClock, world: World, status: int, headers: dict[str, str], kind: type[MantaError]
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("locate", Located(0, status, file.url, headers), times=None)
        with pytest.raises(kind) as told:
            await world.read_once(file, 0, 10)
        assert type(told.value) is kind
        assert world.workers.fetches == []


async def test_a_throttled_hub_is_waited_for_and_nobody_else_asks(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        one, two = world.publish("a", CHUNK), world.publish("b", CHUNK)
        world.workers.fault("locate", throttled(30))
        began = trio.current_time()
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, one, 0, 10)
            await wait(world)
            readers.start_soon(world.read_once, two, 0, 10)
            await wait(world)
            assert len(world.workers.locates) == 1
        assert trio.current_time() - began == pytest.approx(31, abs=0.1)


async def test_a_hub_that_throttles_for_ever_is_told_by_the_readers_deadline(
    autojump_clock: MockClock, make_world: MakeWorld
) -> None:
    world = make_world(read_timeout_s=60.0)
    async with world.running():
        file = world.publish("a", CHUNK)
        answer = Located(0, 429, file.url, {"retry-after": "10"})
        fault = world.workers.fault("locate", answer, times=None)
        with pytest.raises(Unavailable, match="within 60 s"):
            await world.read_once(file, 0, 10)
        assert fault.struck <= 7
        fault.times = 0


async def test_a_repo_that_vanished_does_not_matter_while_another_has_the_file(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        one = world.publish("a", 2 * CHUNK, repo="org/one")
        two = world.publish("a", 2 * CHUNK, repo="org/two", data=one.data)
        assert one.blob == two.blob
        first = world.fetcher.open(two.provenance)
        second = world.fetcher.open(one.provenance)
        assert first is second
        world.workers.withdraw(one.url)
        await world.read(one, first, 0, 10)
        assert [order.url for order in world.workers.locates] == [one.url, two.url]
        assert world.failures == []
        world.workers.withdraw(two.url)
        first.sources.location = None
        with pytest.raises(Absent):
            await world.read(one, first, CHUNK, CHUNK + 10)
        world.fetcher.close(first)
        world.fetcher.close(second)


async def test_one_file_whose_location_never_comes_holds_no_other(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        stuck = world.publish("stuck", CHUNK)
        files = [world.publish(f"f{number}", CHUNK + number) for number in range(16)]
        fault = world.workers.fault("locate", failed(), hold=True, times=None, where=lambda o: o.url == stuck.url)  # type: ignore[union-attr]
        async with trio.open_nursery() as readers:
            readers.start_soon(swallow, world.read_once, stuck, 0, 10)
            await fault.reached.wait()
            began = trio.current_time()
            for file in files:
                await world.read_once(file, 0, 10)
            assert trio.current_time() == began
            fault.release()


async def test_one_file_that_stalls_holds_no_other(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        stuck = world.publish("stuck", 12 * CHUNK, data=bytes(12 * CHUNK))
        files = [world.publish(f"f{number}", CHUNK + number) for number in range(16)]
        fault = world.workers.fault("fetch", hold=True, times=None, where=of(world, stuck))
        transfer = world.fetcher.open(stuck.provenance)
        transfer.look_ahead("reader", range(1, 12), Extent(0, 10))
        transfer.want_whole(Priority.FILL)
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read, stuck, transfer, 0, 10)
            await fault.reached.wait()
            began = trio.current_time()
            async with trio.open_nursery() as others:
                for file in files:
                    others.start_soon(world.read_once, file, 0, 10)
            assert trio.current_time() == began
            fault.release()
        world.fetcher.close(transfer)


async def test_locations_under_way_are_bounded(autojump_clock: MockClock, world: World) -> None:
    async with world.running(), trio.open_nursery() as readers:
        fault = world.workers.fault("locate", hold=True, times=None)
        for number in range(LOCATING_MAX + 10):
            readers.start_soon(world.read_once, world.publish(f"f{number}", 10), 0, 10)
        await wait(world)
        # A scheduler's order starts each: so many are started, and no more under way than the bound.
        assert world.workers.under_way == LOCATING_MAX
        fault.release()


async def test_connections_are_bounded(autojump_clock: MockClock, world: World) -> None:
    async with world.running(), trio.open_nursery() as readers:
        world.workers.seconds_per_piece = 0.01
        for number in range(30):
            readers.start_soon(world.read_once, world.publish(f"f{number}", 2 * CHUNK), 0, 2 * CHUNK)
    assert world.workers.under_way_max <= 2 * world.config.connections + LOCATING_MAX


# Opening and closing -----------------------------------------------------------------------------------------------------


async def test_a_hidden_blob_is_denied(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        entry = FileEntry("a", CHUNK, None)
        with pytest.raises(Denied, match="gated"):
            world.fetcher.open(Provenance(file.provenance.repo, COMMIT, entry, file.provenance.access))


async def test_what_cannot_be_opened_leaves_nothing(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        transfer = world.fetcher.open(file.provenance)
        entry = FileEntry("a", CHUNK + 1, file.blob)
        with pytest.raises(Corrupt):
            world.store.open_blob(file.blob, CHUNK + 1)
        world.fetcher.close(transfer)
        assert entry.size != file.provenance.entry.size


async def test_every_opener_closes_once(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        one, two = world.fetcher.open(file.provenance), world.fetcher.open(file.provenance)
        assert one is two
        world.fetcher.close(one)
        await world.read(file, two, 0, 10)
        world.fetcher.close(two)


async def test_no_descriptor_stays_open(autojump_clock: MockClock, world: World) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with world.running():
        opened = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            file = world.publish(f"f{number}", 3 * CHUNK)
            transfer = world.fetcher.open(file.provenance)
            await transfer.complete()
            world.fetcher.close(transfer)
            await world.read_once(file, 0, 10)
        await world.quiet()
        assert len(os.listdir("/proc/self/fd")) == opened
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_active_shows_what_is_still_to_come(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        fault = world.workers.fault("fetch", hold=True)
        transfer = world.fetcher.open(file.provenance)
        assert list(world.fetcher.active) == []
        transfer.want_whole(Priority.FILL)
        await fault.reached.wait()
        assert list(world.fetcher.active) == [transfer]
        fault.release()
        await transfer.complete()
        assert list(world.fetcher.active) == []
        world.fetcher.close(transfer)


# Offline -----------------------------------------------------------------------------------------------------------------


async def test_offline_what_is_cached_is_read_and_the_rest_is_told(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    online = make_world()
    file = online.publish("a", 3 * CHUNK)
    online.store.close()
    prefill(tmp_path / "cache", file, [0])
    world = make_world(offline=True)
    async with world.running():
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        transfer.look_ahead("reader", range(1, 3), Extent(0, 10))
        await world.read(file, transfer, 0, CHUNK)
        with pytest.raises(Unavailable, match="offline"):
            await world.read(file, transfer, CHUNK - 1, CHUNK + 1)
        with pytest.raises(Unavailable, match="offline"):
            await transfer.complete()
        world.fetcher.close(transfer)
    assert world.workers.orders == []


# After a host crash ------------------------------------------------------------------------------------------------------


async def test_chunks_in_doubt_are_settled_and_only_damaged_ones_fetched(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    autojump_clock.autojump_threshold = 0.1  # threads settle the doubt, which the clock does not see
    first = make_world()
    file = first.publish("a", 5 * CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0, 1, 2, 3, 4], damaged=(3,))
    world = make_world(boot_id=NEXT_BOOT)
    world.publish("a", 5 * CHUNK)
    async with world.running():
        transfer = world.fetcher.open(file.provenance)
        world.fetcher.close(transfer)  # settling goes on
        transfer = world.fetcher.open(file.provenance)
        await world.read(file, transfer, 0, 5 * CHUNK)
        await transfer.complete()
        world.fetcher.close(transfer)
    assert [f.start for f in world.workers.fetches] == [3 * CHUNK]


async def test_doubt_is_settled_offline_before_a_reader_is_told_no(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    autojump_clock.autojump_threshold = 0.1
    first = make_world()
    file = first.publish("a", 3 * CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0, 1], damaged=(1,))
    world = make_world(boot_id=NEXT_BOOT, offline=True)
    async with world.running():
        transfer = world.fetcher.open(file.provenance)
        transfer.want_whole(Priority.FILL)
        await world.read(file, transfer, 0, 100)
        with pytest.raises(Unavailable, match="offline"):
            await world.read(file, transfer, CHUNK, CHUNK + 100)
        world.fetcher.close(transfer)
    assert world.workers.orders[1:] == []


async def test_what_an_earlier_daemon_had_is_not_fetched_again(
    autojump_clock: MockClock, make_world: MakeWorld, tmp_path: Path
) -> None:
    first = make_world()
    file = first.publish("a", 4 * CHUNK)
    first.store.close()
    prefill(tmp_path / "cache", file, [0, 2])
    world = make_world()
    world.publish("a", 4 * CHUNK)
    async with world.running():
        await world.read_once(file, 0, 4 * CHUNK)
    assert sorted(f.start for f in world.workers.fetches) == [CHUNK, 3 * CHUNK]


# Secrets -----------------------------------------------------------------------------------------------------------------


async def test_no_secret_is_logged(autojump_clock: MockClock, world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        for reason in ("denied", "unavailable", "corrupt"):
            world.workers.fault("fetch", failed(reason))
        world.workers.fault("locate", failed())
        world.workers.fault("locate", Located(0, 429, file.url, {"retry-after": "1"}))
        await world.read_once(file, 0, 10)
        world.workers.fault("fetch", failed("no_space"))
        with pytest.raises(NoSpace):
            await world.read_once(file, CHUNK, CHUNK + 10)
    assert "denied" in caplog.text or "failed as told" in caplog.text
    assert SECRET not in caplog.text
    assert TOKEN not in caplog.text
    assert "signature" not in caplog.text


async def swallow(read: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(MantaError):
        await read(*arguments)  # type: ignore[misc]


async def test_who_comes_during_the_last_attempt_gets_attempts_of_its_own(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed(), times=ATTEMPTS_MAX - 1)
        last = world.workers.fault("fetch", failed(), hold=True)
        world.workers.fault("fetch", failed())  # its hedge
        async with trio.open_nursery() as readers:
            readers.start_soon(swallow, world.read_once, file, 0, 10)
            await last.reached.wait()
            await trio.sleep(0.1)
            readers.start_soon(world.read_once, file, 0, 10)
            await trio.sleep(0.1)
            last.release()


async def test_the_kernels_second_question_after_a_deadline_is_answered_at_once(
    autojump_clock: MockClock, make_world: MakeWorld
) -> None:
    world = make_world(read_timeout_s=20.0)
    async with world.running():
        file = world.publish("a", CHUNK)
        fault = world.workers.fault("fetch", hold=True, times=None)
        transfer = world.fetcher.open(file.provenance)
        began = trio.current_time()
        for _ in range(2):
            with pytest.raises(Unavailable, match="did not come within 20 s"):
                await world.read(file, transfer, 0, 100)
        assert trio.current_time() - began == pytest.approx(20)
        await trio.sleep(LATE_SECONDS)
        fault.release()
        await world.read(file, transfer, 0, 100)
        world.fetcher.close(transfer)


# Stragglers --------------------------------------------------------------------------------------------------------------


async def test_a_stalled_order_is_hedged_and_its_reader_waits_no_longer_than_that(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        world.workers.fault("fetch", hold=True, after_bytes=CHUNK // 2)
        began = trio.current_time()
        await world.read_once(file, 0, CHUNK)
        assert SILENCE_SECONDS < trio.current_time() - began < SILENCE_SECONDS + 1
        assert len(world.workers.fetches) == 2
        assert world.workers.fetches[1].extents == [(CHUNK // 2, CHUNK)]  # what came is not asked for again
        await wait(world)
        transfer = world.fetcher.open(file.provenance)
        assert transfer.blob.digest(0) == chunk_digest(file.data[:CHUNK])
        world.fetcher.close(transfer)


async def test_a_straggler_that_wins_after_all_counts(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        late = world.workers.fault("fetch", hold=True, after_bytes=5)
        hedge = world.workers.fault("fetch", hold=True, after_bytes=7)
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, CHUNK)
            await hedge.reached.wait()
            late.release()
    assert len(world.workers.fetches) == 3  # the third reads back what two have written
    assert world.workers.fetches[-1].extents == []


async def test_a_hedge_that_fails_costs_nothing(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        late = world.workers.fault("fetch", hold=True, after_bytes=5)
        hedge = world.workers.fault("fetch", failed("denied", status=403))
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, CHUNK)
            await hedge.reached.wait()
            await wait(world)
            late.release()
    assert world.failures == []
    assert len(world.workers.locates) == 1


async def test_two_that_fail_are_one_failure(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        late = world.workers.fault("fetch", failed(), hold=True, after_bytes=5)
        hedge = world.workers.fault("fetch", failed())
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, CHUNK)
            await hedge.reached.wait()
            late.release()
    assert len(world.workers.fetches) == 3


async def test_a_wrong_byte_that_a_straggler_wrote_is_in_the_digest(autojump_clock: MockClock, world: World) -> None:
    """Two write to one chunk: what is recorded is the digest of what is there, and the blob's digest finds it out."""
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", hold=True, after_bytes=CHUNK // 2)
        transfer = world.fetcher.open(file.provenance)
        with trio.fail_after(60):
            while not world.workers.fetches:
                transfer.want_whole(Priority.PREFETCH)
                await trio.sleep(0.1)
            await wait(world)
            os.pwrite(transfer.blob.fd, b"\x00wrong\x00", 10)
            while not world.failures:
                await trio.sleep(0.5)
        assert "digest" in world.failures[0][1].message
        await transfer.complete()
        assert os.pread(transfer.blob.fd, CHUNK, 0) == file.data
        world.fetcher.close(transfer)


async def test_one_stalled_file_never_holds_sixteen_healthy_readers(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        stuck = world.publish("stuck", 40 * CHUNK, data=bytes(40 * CHUNK))
        files = [world.publish(f"f{number}", 3 * CHUNK) for number in range(16)]
        fault = world.workers.fault("fetch", hold=True, times=None, where=of(world, stuck))
        async with trio.open_nursery() as nursery:
            for chunk in range(40):  # a reader for each of its chunks
                nursery.start_soon(world.read_once, stuck, chunk * CHUNK, chunk * CHUNK + 10)
            await fault.reached.wait()
            began = trio.current_time()
            async with trio.open_nursery() as healthy:
                for file in files:
                    healthy.start_soon(world.read_once, file, 0, len(file.data))
            assert trio.current_time() == began
            fault.release()


# Pauses that origins ask for ---------------------------------------------------------------------------------------------


async def test_a_pause_of_the_hub_does_not_stop_what_has_a_location(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        known, other = world.publish("a", 2 * CHUNK), world.publish("b", CHUNK)
        transfer = world.fetcher.open(known.provenance)
        await world.read(known, transfer, 0, 10)
        world.workers.fault("locate", throttled(30))
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, other, 0, 10)
            await wait(world)
            began = trio.current_time()
            await world.read(known, transfer, CHUNK, CHUNK + 10)
            assert trio.current_time() == began
        assert trio.current_time() - began >= 30
        world.fetcher.close(transfer)


async def test_a_quota_that_is_spent_is_heeded_before_the_hub_refuses(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        one, two = world.publish("a", CHUNK), world.publish("b", CHUNK)
        world.workers.quota = {"ratelimit": '"resolvers";r=0;t=40'}
        began = trio.current_time()
        await world.read_once(one, 0, 10)
        assert trio.current_time() == began
        world.workers.quota = {}
        await world.read_once(two, 0, 10)
        assert 40 <= trio.current_time() - began < 45
        assert len(world.workers.locates) == 2


async def test_a_prefetch_outlasts_a_pause_that_was_asked_for(autojump_clock: MockClock, make_world: MakeWorld) -> None:
    world = make_world(read_timeout_s=20.0)
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        world.workers.fault("fetch", failed("throttled", status=429, retry_after_s=100))
        transfer = world.fetcher.open(file.provenance)
        await transfer.complete()
        world.fetcher.close(transfer)
        other = world.publish("b", CHUNK)
        world.workers.fault("locate", throttled(100))
        with pytest.raises(Unavailable, match="asked for a pause of"):
            await world.read_once(other, 0, 10)


# Refusals ----------------------------------------------------------------------------------------------------------------


async def test_every_provenance_is_refused_once_and_the_hub_is_left_alone_for_a_while(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        one = world.publish("a", 5 * CHUNK)
        two = world.publish("a", 5 * CHUNK, repo="org/two", data=one.data)
        for file in (one, two):
            world.workers.withdraw(file.url)
        transfer = world.fetcher.open(one.provenance)
        world.fetcher.open(two.provenance)
        for chunk in range(5):
            with pytest.raises(Absent, match="org/two"):
                await world.read(one, transfer, chunk * CHUNK, chunk * CHUNK + 10)
        assert len(world.workers.locates) == 2
        world.workers.publish(one.url, one.data)
        await trio.sleep(REFUSED_SECONDS)
        await world.read(one, transfer, 0, 10)
        for _ in range(2):
            world.fetcher.close(transfer)


# What is told ------------------------------------------------------------------------------------------------------------


async def test_what_becomes_of_a_fetch_is_told_and_counted(
    autojump_clock: MockClock, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "manta")
    async with world.running():
        file = world.publish("a", 2 * CHUNK)
        world.workers.fault("locate", failed("unavailable", "hub.test went away"), times=1)
        world.workers.fault("fetch", failed("unavailable", "cdn answered 503", status=503), times=1)
        transfer = world.fetcher.open(file.provenance)
        read = world.telemetry.read_waits(
            transfer.blob.id, transfer.name, Extent(CHUNK, CHUNK + 9), range(1, 2), 1, Opener()
        )
        await world.read(file, transfer, CHUNK, CHUNK + 9)
        read.served(9)
        transfer.want_whole(Priority.PREFETCH)
        await transfer.complete()
        world.fetcher.close(transfer)
        assert world.hub.noted["x-linked-size"] == str(2 * CHUNK), "the hub's quota comes with these"
    told = [(r.getMessage(), r.__dict__["fields"]) for r in caplog.records if r.name in {"manta.fetch", "manta.read"}]
    of_the_read = [message for message, said in told if read.id in (said.get("read"), *said.get("reads", ()))]
    assert of_the_read[:2] == ["read waits", "location asked"]
    assert of_the_read[2].startswith("location refused: org/one/a: hub.test went away")
    assert of_the_read[3:8] == [
        "location asked",
        "location answered",
        "order given",
        "order failed: cdn answered 503",
        "order given",
    ]
    assert "first byte" in of_the_read
    assert of_the_read[-1] == "read answered"
    assert TOKEN not in caplog.text
    assert SECRET not in caplog.text
    numbers = samples(world.telemetry.metrics)
    assert numbers["manta_fetches_total{outcome=ok}"] == 2
    assert (
        numbers["manta_fetches_total{outcome=unavailable}"] == numbers["manta_retries_total{reason=unavailable}"] == 1
    )
    assert numbers["manta_location_requests_total{outcome=ok}"] == 1
    assert numbers["manta_location_requests_total{outcome=unavailable}"] == 1
    assert numbers["manta_fetched_bytes_total{source=origin}"] == 2 * CHUNK
    assert numbers["manta_seals_total{outcome=sealed}"] == 1
    assert all(source.in_flight == 0 for source, _ in world.telemetry.sources())
    assert not world.telemetry._orders


async def test_what_becomes_of_a_hedge_is_counted(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        for name, outcome in (("a", "won"), ("b", "lost"), ("c", "failed")):
            file = world.publish(name, CHUNK)
            late = world.workers.fault("fetch", hold=True, after_bytes=5)
            hedge = world.workers.fault(
                "fetch", failed("denied") if outcome == "failed" else None, hold=outcome == "lost"
            )
            async with trio.open_nursery() as readers:
                readers.start_soon(world.read_once, file, 0, CHUNK)
                await hedge.reached.wait()
                if outcome != "won":
                    await wait(world)
                    late.release()
            await wait(world)
            assert samples(world.telemetry.metrics)[f"manta_hedges_total{{outcome={outcome}}}"] == 1
        assert all(source.in_flight == 0 for source, _ in world.telemetry.sources())


async def test_who_wants_to_be_left_alone_is_known(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.fault("fetch", failed("throttled", status=429, retry_after_s=30))
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, file, 0, 10)
            await trio.sleep(10)
            assert world.fetcher.pauses() == {"https://cdn.test:443": pytest.approx(20, abs=1)}
        assert world.fetcher.pauses() == {}
    numbers = samples(world.telemetry.metrics)
    assert numbers["manta_throttles_total{request=bytes}"] == 1
    assert numbers["manta_throttle_seconds_total"] == 30
