"""Files that the kernel reads by itself: which are, by which nodeid, and that no open fails for the rule that the ways cannot be mixed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from manta.errors import InUse, MantaError, Superseded, Unavailable
from manta.fetch.sources import Provenance
from manta.fs.filesystem import SENT_BACK_SECONDS, Filesystem, OpenedFile
from manta.fs.inodes import ROOT
from manta.fs.journal import Journal
from manta.fs.views import SnapshotFolder
from manta.model.ids import BlobId
from manta.telemetry.events import Telemetry
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, Blobs, MemoryHub, MemorySource, content, fetching, hidden

WEIGHTS = content(3 * CHUNK + 5)
CONFIG = content(CHUNK + 1, seed=1)

PID = 4711


class Bench:
    """A filesystem of a big file, "weights", and one small enough to be completed, "config". `dropped`: what the session heard."""

    def __init__(self, hub: MemoryHub, blobs: Blobs, journal: Journal | None) -> None:
        self.hub = hub
        self.blobs = blobs
        self.weights = hub.lfs("weights", WEIGHTS)
        self.config = hub.lfs("config", CONFIG)
        snapshot = hub.commit(MODEL, FIRST, [self.weights, self.config, hidden("hidden")], "main")
        self.fs = Filesystem(
            SnapshotFolder(MemorySource(hub), snapshot),
            blobs,
            Telemetry(),
            fill=False,
            native=True,
            complete_bytes_max=2 * CHUNK,
            journal=journal,
        )
        self.dropped: list[int] = []
        self.fs.drop_pages = self.dropped.append

    @property
    def blob(self) -> BlobId:
        assert self.weights.blob is not None
        return self.weights.blob

    async def inode(self, name: bytes = b"weights") -> int:
        return (await self.fs.look_up(ROOT, name)).inode

    async def open(self, inode: int, backing: int = 1, pid: int = PID) -> OpenedFile:
        """As the session does where the kernel takes every backing file."""
        opened = await self.fs.open_file(inode, pid)
        if opened.native is not None:
            self.fs.opened(opened.handle, True, opened.native.backing or backing)
        return opened

    async def open_by_name(self, name: bytes = b"weights", pid: int = PID) -> tuple[int, OpenedFile]:
        """As the kernel does: where the number it knows is answered ESTALE, it looks the name up and tries once more."""
        inode = await self.inode(name)
        try:
            return inode, await self.open(inode, pid=pid)
        except Superseded:
            inode = await self.inode(name)
            return inode, await self.open(inode, pid=pid)

    async def fetch(self) -> None:
        """Has all of "weights" in the cache, sealed."""
        transfer = self.blobs.open(Provenance(MODEL, FIRST, self.weights, ACCESS))
        await transfer.complete()
        self.blobs.close(transfer)

    async def damage(self) -> None:
        """As `manta cache verify` does with a chunk that it found damaged."""
        with self.blobs.store.open_blob(self.blob, len(WEIGHTS)) as blob:
            await trio.to_thread.run_sync(blob.clear, 1)
            if (transfer := self.blobs.fetcher.transfer(str(self.blob))) is not None:
                transfer.sealed = trio.Event()


@asynccontextmanager
async def bench(directory: Path, journal: Journal | None = None) -> AsyncIterator[Bench]:
    hub = MemoryHub()
    async with fetching(directory, hub) as blobs:
        yield Bench(hub, blobs, journal)


def data_of(opened: OpenedFile) -> bytes:
    """What the kernel would read of the backing file."""
    assert opened.native is not None
    with opened.native.descriptor() as fd:
        return os.pread(fd, 1 << 20, 0)


@pytest.mark.trio
async def test_a_sealed_blob_is_opened_natively_and_another_is_not(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        cold = await b.open(inode)
        assert cold.native is None
        b.fs.close_file(cold.handle)
        await b.fetch()
        warm = await b.open(inode, backing=5)
        assert warm.native is not None
        assert (warm.native.inode, warm.native.blob, warm.native.backing) == (inode, b.blob, None)
        assert data_of(warm) == WEIGHTS
        # The kernel has one backing file per inode: the second is told of it, and the last to close gives it back.
        again = await b.open(inode)
        assert again.native is not None
        assert again.native.backing == 5
        assert b.fs.close_file(warm.handle) is None
        assert b.fs.close_file(again.handle) == 5
        assert b.fs.close_file(again.handle) is None


@pytest.mark.trio
async def test_a_session_that_cannot_is_offered_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.fetch()
        snapshot = b.hub.trees[MODEL, FIRST]
        plain = Filesystem(SnapshotFolder(MemorySource(b.hub), snapshot), b.blobs, Telemetry(), fill=False)
        opened = await plain.open_file((await plain.look_up(ROOT, b"weights")).inode)
        assert opened.native is None


@pytest.mark.trio
async def test_a_native_file_keeps_its_blob_in_use(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        opened = await b.open(inode)
        with pytest.raises(InUse):
            b.blobs.store.remove(b.blob)
        b.fs.close_file(opened.handle)
        b.blobs.store.remove(b.blob)


@pytest.mark.trio
async def test_a_backing_file_that_the_kernel_refuses_is_served_by_copying(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        opened = await b.fs.open_file(inode, PID)
        b.fs.opened(opened.handle, False)
        assert bytes(await b.fs.read(opened.handle, 0, 10)) == WEIGHTS[:10]
        # And while it is open, those that could be native get another nodeid.
        other, native = await b.open_by_name()
        assert native.native is not None
        assert other != inode
        assert (await b.fs.attributes(other)).number == inode
        assert b.fs.numbers_of(b.blob) == [inode, other]
        refused = await b.fs.open_file(other, PID)
        with pytest.raises(Superseded):
            b.fs.opened(refused.handle, False)
        assert b.fs.open_files == 2
        b.fs.opened(opened.handle, False)  # nothing to say of it any more


@pytest.mark.trio
async def test_a_blob_sealed_while_open_is_native_by_another_nodeid(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        await b.fetch()
        with pytest.raises(Superseded):
            await b.open(inode)
        other, native = await b.open_by_name(pid=PID + 1)
        assert other != inode
        assert native.native is not None
        assert bytes(await b.fs.read(reader.handle, 0, 5)) == WEIGHTS[:5]
        b.fs.close_file(reader.handle)
        assert await b.inode() == other  # it stays the one in use
        listing = await b.fs.list_folder((await b.fs.open_folder(ROOT)).handle, ROOT, 0)
        assert {e.name: (e.attributes.inode, e.attributes.number) for e in listing}[b"weights"] == (other, inode)


@pytest.mark.trio
async def test_an_open_that_has_no_name_to_look_up_is_not_sent_back_twice(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """/proc/PID/fd: the kernel comes again with the same number."""
    async with bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        await b.fetch()
        for _ in range(2):
            with pytest.raises(Superseded):
                await b.open(inode)
            again = await b.open(inode)
            assert again.native is None
            assert bytes(await b.fs.read(again.handle, 7, 5)) == WEIGHTS[7:12]
        with pytest.raises(Superseded):
            await b.open(inode)
        mock_clock.jump(SENT_BACK_SECONDS)
        with pytest.raises(Superseded):
            await b.open(inode)
        with pytest.raises(Superseded):
            await b.open(inode, pid=PID + 1)
        b.fs.close_file(reader.handle)


# Damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_blob_damaged_under_native_readers_is_copied_to_others_and_repaired_in_place(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        old = await b.open(inode)
        file = b.blobs.store.layout.data(b.blob).stat().st_ino
        with b.blobs.store.layout.data(b.blob).open("r+b") as data:
            data.seek(CHUNK)
            data.write(bytes(CHUNK))
        await b.damage()
        with pytest.raises(Superseded):
            await b.open(inode)
        other, copying = await b.open_by_name(pid=PID + 1)
        assert other != inode
        assert copying.native is None
        assert bytes(await b.fs.read(copying.handle, CHUNK, CHUNK)) == WEIGHTS[CHUNK : 2 * CHUNK]
        await b.fetch()
        assert data_of(old) == WEIGHTS
        assert b.blobs.store.layout.data(b.blob).stat().st_ino == file
        # Whole again: natively, by the number whose readers are.
        found, native = await b.open_by_name()
        assert native.native is not None
        assert found == inode
        assert native.native.backing == 1


@pytest.mark.trio
async def test_a_damaged_blob_is_never_given_to_the_kernel_also_where_there_is_no_name_to_look_up(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.1
    async with bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        await b.open(inode)
        await b.damage()
        with pytest.raises(Superseded):
            await b.open(inode)
        again = await b.open(inode)  # after it was made whole
        assert again.native is not None
        assert data_of(again) == WEIGHTS
        await b.damage()
        b.hub.workers.fault("fetch", hold=True, times=None)
        for _ in range(2):
            with pytest.raises(Superseded):
                await b.open(inode)
        assert b.fs.open_files == 2


# Small files -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_small_file_is_complete_when_it_is_open(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode(b"config")
        opened = await b.open(inode)
        assert opened.native is not None
        assert data_of(opened) == CONFIG


@pytest.mark.trio
async def test_small_files_opened_at_once_are_fetched_once(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode(b"config")
        natives = []

        async def open_one() -> None:
            natives.append((await b.open(inode)).native)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(open_one)
        assert None not in natives
        assert len(b.hub.workers.fetches) == 2


@pytest.mark.trio
async def test_a_small_file_that_does_not_come_in_time_is_copied(tmp_path: Path, mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.1
    async with bench(tmp_path) as b:
        b.hub.workers.fault("locate", hold=True, times=None)
        began = trio.current_time()
        opened = await b.open(await b.inode(b"config"))
        assert opened.native is None
        assert trio.current_time() - began <= 2.0
        with pytest.raises(Unavailable):
            await b.fs.read(opened.handle, 0, 1)


@pytest.mark.trio
async def test_opening_a_small_file_can_be_cancelled(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode(b"config")
        with trio.CancelScope() as scope:
            scope.cancel()
            await b.open(inode)
        assert scope.cancelled_caught
        assert (b.fs.open_files, b.blobs.opened) == (0, 0)


@pytest.mark.trio
async def test_what_is_hidden_is_refused_as_ever(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        with pytest.raises(MantaError, match="gated"):
            await b.open(await b.inode(b"hidden"))
        assert b.blobs.opened == 0


@pytest.mark.trio
async def test_an_error_of_the_hub_is_not_one_of_the_open(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode(b"config")
        b.hub.denied.add(ACCESS)
        opened = await b.open(inode)
        assert opened.native is None
        with pytest.raises(MantaError, match="may not be read"):
            await b.fs.read(opened.handle, 0, 1)


# A second copy of the pages --------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_pages_that_were_copied_are_dropped_when_the_last_copying_file_is_closed(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        first, second = await b.open(inode), await b.open(inode)
        b.fs.close_file(first.handle)
        await b.fetch()
        assert b.dropped == []
        b.fs.close_file(second.handle)
        assert b.dropped == [inode]


@pytest.mark.trio
async def test_pages_copied_before_the_blob_was_sealed_are_dropped_when_it_is_opened_natively(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        b.fs.close_file(reader.handle)
        await b.fetch()
        assert b.dropped == []
        await b.open(inode)
        assert b.dropped == [inode]
        await b.open(inode)
        assert b.dropped == [inode]
