"""Room in the cache: what is evicted for what comes, what waits, what is refused, what is said, and that it ends by itself."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from manta.config import CacheConfig
from manta.control.protocol import MountRequest
from manta.errors import CacheBroken, NoSpace
from manta.fetch.scheduler import Priority
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.model.extents import Extent
from manta.model.ids import BlobId, parse_target
from manta.operations.room import LOOK_SECONDS, RETRY_SECONDS, Room
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, blob_of, content
from tests.operations.node import Node, node

A, B, C = (content(size * CHUNK, seed=size) for size in (2, 3, 4))
FREE = CacheConfig(free_space_floor=0)


A_ID, B_ID, C_ID = blob_of(A), blob_of(B), blob_of(C)


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.lfs("a.bin", A), hub.lfs("b.bin", B)], None, "main")
    hub.commit(OTHER, SECOND, [hub.lfs("c.bin", C)], None, "main")
    return hub


@asynccontextmanager
async def bounded(n: Node, config: CacheConfig) -> AsyncIterator[Room]:
    """The node with bounds, kept."""
    room = n.room_with(config)
    n.blobs.fetcher._room = room
    async with trio.open_nursery() as nursery:
        nursery.start_soon(room.run, n.blobs.fetcher)
        yield room
        nursery.cancel_scope.cancel()


def left(n: Node) -> set[BlobId]:
    return {info.id for info in n.store.listing() if info.cached}


def said(room: Room) -> str:
    return room.problem or ""


async def read_all(transfer: Transfer, chunks: int) -> None:
    for chunk in range(chunks):
        await transfer.ensure(Extent(chunk * CHUNK, (chunk + 1) * CHUNK))


async def settle(seconds: float, mock_clock: trio.testing.MockClock) -> None:
    """Lets `seconds` pass, and what they start come to its end."""
    mock_clock.jump(seconds)
    for _ in range(20):
        await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.to_thread.run_sync(lambda: None)


@pytest.mark.trio
async def test_what_comes_takes_the_place_of_what_was_used_least(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        n.store._inventory.update(A_ID, last_used=1.0)
        n.store._inventory.update(B_ID, last_used=2.0)
        async with bounded(n, CacheConfig(size=7 * CHUNK, free_space_floor=0)):
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, n.store.cached_bytes)
                    await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await n.fetch("org/other")
                nursery.cancel_scope.cancel()
        assert most <= 8 * CHUNK
        assert C_ID in left(n)
        assert A_ID not in left(n)


@pytest.mark.trio
async def test_a_reader_of_what_has_no_room_is_refused_and_told_why(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    mock_clock.rate = 20.0
    async with node(tmp_path, hub) as n:
        await n.mount(MountRequest("org/name", "/m"))
        await n.fetch("org/name")
        async with bounded(n, CacheConfig(size=7 * CHUNK, free_space_floor=0)) as room:
            transfer = n.blobs.open(Provenance(OTHER, SECOND, hub.trees[OTHER, SECOND].files["c.bin"], ACCESS))
            with pytest.raises(NoSpace, match="nothing cached may go") as refused:
                await read_all(transfer, 4)
            assert n.store.cached_bytes <= 8 * CHUNK
            assert "mounted" in said(room)
            assert "raise cache.size" in refused.value.message
            # What is there is read, and a prefetch ends with the same words.
            await transfer.ensure(Extent(0, CHUNK))
            job = await n.end_of(await n.jobs.prefetch(parse_target("org/other"), ACCESS))
            assert job.state == "failed"
            assert "cache.size" in job.problems[0]
            assert caplog.text.count("reads of what is not cached fail") == 1
            # The mount goes: there is room, without a restart.
            for mounted in n.mounts:
                n.mounts.remove(mounted.id)
            while said(room):
                await trio.sleep(RETRY_SECONDS)
            await transfer.ensure(Extent(0, 4 * CHUNK))
            n.blobs.close(transfer)


@pytest.mark.trio
async def test_near_a_bound_only_readers_are_served_and_the_rest_goes_on_later(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        space = [100 * CHUNK, 1000 * CHUNK]
        monkeypatch.setattr(n.store, "disk_space", lambda: tuple(space))
        room = n.room_with(CacheConfig(free_space_floor=90 * CHUNK))
        assert room.least_urgent(0) is Priority.DEMAND
        assert room.least_urgent(10 * CHUNK) is None, "until it is known whether anything may go"
        space[0] = 500 * CHUNK
        mock_clock.jump(1)
        assert room.least_urgent(0) is Priority.FILL
        async with bounded(n, CacheConfig(free_space_floor=90 * CHUNK)) as room:
            space[0] = 100 * CHUNK
            transfer = n.blobs.open(Provenance(OTHER, SECOND, hub.trees[OTHER, SECOND].files["c.bin"], ACCESS))
            transfer.want_whole(Priority.FILL)
            await settle(LOOK_SECONDS, mock_clock)
            assert n.cached(C_ID) == 0
            assert "only what readers wait for" in said(room)
            await transfer.ensure(Extent(0, CHUNK))
            space[0] = 500 * CHUNK
            await settle(LOOK_SECONDS, mock_clock)
            while n.cached(C_ID) < 4 * CHUNK:
                await trio.lowlevel.checkpoint()
            assert said(room) == ""
            n.blobs.close(transfer)


@pytest.mark.trio
async def test_a_directory_that_goes_away_is_said_once_and_used_again(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, mock_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    async with node(tmp_path, hub) as n:
        really, gone = n.store.disk_space, True

        def disk_space() -> tuple[int, int]:
            if gone:
                raise CacheBroken("The disk is away. Check it.")
            return really()

        monkeypatch.setattr(n.store, "disk_space", disk_space)
        async with bounded(n, FREE) as room:
            assert room.disk_free() == 0
            assert room.least_urgent(0) is Priority.DEMAND, "a reader's fetch finds out more"
            for _ in range(3):
                await settle(LOOK_SECONDS + RETRY_SECONDS, mock_clock)
            assert said(room) == "The disk is away. Check it."
            assert caplog.text.count("The disk is away") == 1
            gone = False
            await settle(RETRY_SECONDS, mock_clock)
            await settle(LOOK_SECONDS, mock_clock)
            assert said(room) == ""
            assert "well again" in caplog.text
            assert room.disk_free() > 0
