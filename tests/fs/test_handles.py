"""Reads of open files: from the page cache, through a thread, through a fetch; and what is raised when none works."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from manta.config import FetchConfig
from manta.errors import CacheBroken, Denied, NoSpace, Unavailable
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.fs import handles
from manta.fs.handles import READ_BYTES_MAX, BlobHandle, TextHandle
from manta.model.snapshot import FileEntry
from manta.telemetry.events import Opener, Telemetry
from manta.telemetry.metrics import Tally
from manta.testing.workers import failed
from manta.wire.messages import Reason
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, Blobs, MemoryHub, content, fetching
from tests.telemetry.scrape import samples

SIZE = 40 * CHUNK + 123
DATA = content(SIZE)

NO_FILL = FetchConfig(fill=False)


class Reader:
    """An open blob of DATA and everything below it."""

    def __init__(self, hub: MemoryHub, entry: FileEntry, blobs: Blobs) -> None:
        self.hub = hub
        self.entry = entry
        self.blobs = blobs
        self.telemetry = Telemetry()

    def open(self, *, fill: bool = False) -> BlobHandle:
        begin = partial(self.blobs.open, Provenance(MODEL, FIRST, self.entry, ACCESS))
        return BlobHandle(begin, self.blobs.close, self.blobs.failed, self.telemetry, Opener(), fill=fill)

    @property
    def fetched(self) -> list[int]:
        """The chunks that were ordered, in that order."""
        return [order.start // CHUNK for order in self.hub.workers.fetches]

    async def fetch_all(self) -> None:
        transfer = self.blobs.open(Provenance(MODEL, FIRST, self.entry, ACCESS))
        await transfer.complete()
        self.blobs.close(transfer)


@asynccontextmanager
async def reading(directory: Path, data: bytes = DATA, config: FetchConfig = NO_FILL) -> AsyncIterator[Reader]:
    hub = MemoryHub()
    entry = hub.lfs("model.safetensors", data)
    hub.commit(MODEL, FIRST, [entry], "main")
    async with fetching(directory, hub, config) as blobs:
        yield Reader(hub, entry, blobs)


@pytest.mark.trio
async def test_a_text_is_what_it_was_when_it_was_opened() -> None:
    handle = TextHandle(b"0123456789")
    assert await handle.read(2, 3) == b"234"
    assert await handle.read(8, 100) == b"89"
    assert await handle.read(10, 1) == b""
    assert await handle.read(100, 1) == b""
    handle.close()


@pytest.mark.trio
async def test_reads_come_from_the_hub_and_then_from_the_cache(tmp_path: Path) -> None:
    async with reading(tmp_path) as reader:
        handle = reader.open()
        offset, size = 3 * CHUNK - 5, 2 * CHUNK
        assert bytes(await handle.read(offset, size)) == DATA[offset : offset + size]
        fetched = reader.fetched
        assert bytes(await handle.read(offset, size)) == DATA[offset : offset + size]
        assert reader.fetched == fetched
        assert reader.telemetry.tally.bytes == 2 * size


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (SIZE - 10, 100, DATA[-10:]),
        (SIZE, 1, b""),
        (SIZE + 1000, 4096, b""),
        (2**62, 4096, b""),
        (5, 0, b""),
    ],
)
@pytest.mark.trio
async def test_reads_at_and_beyond_the_end(tmp_path: Path, offset: int, size: int, expected: bytes) -> None:
    async with reading(tmp_path) as reader:
        assert bytes(await reader.open().read(offset, size)) == expected


@pytest.mark.trio
async def test_a_read_larger_than_the_scratch_buffer_is_not_cut_short(tmp_path: Path) -> None:
    """A short answer means end of file to the kernel."""
    data = content(READ_BYTES_MAX + 3 * CHUNK)
    async with reading(tmp_path, data) as reader:
        await reader.fetch_all()
        handle = reader.open()
        assert bytes(await handle.read(1, len(data))) == data[1:]


@pytest.mark.trio
async def test_what_is_read_stays_right_until_the_next_checkpoint(tmp_path: Path) -> None:
    """The one scratch buffer: each reader takes its bytes before another may fill it."""
    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        handle = reader.open()

        async def read(start: int) -> None:
            for n in range(50):
                offset = (start + 7919 * n) % (SIZE - CHUNK)
                data = await handle.read(offset, CHUNK)
                assert bytes(data) == DATA[offset : offset + CHUNK]  # as the session copies it: at once
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for task in range(8):
                nursery.start_soon(read, task * 1000)


@pytest.mark.trio
async def test_a_warm_read_goes_through_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one whose bytes came while it waited: after a checkpoint they might be doubted again."""
    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        handle = reader.open()
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset, flags: preadv(fd, views, offset))
        with trio.CancelScope() as scope:
            scope.cancel()  # any checkpoint would raise
            assert bytes(await handle.read(0, CHUNK)) == DATA[:CHUNK]
        assert not scope.cancelled_caught


def _blob(reader: Reader) -> Any:
    return reader.entry.blob


@pytest.mark.parametrize(
    "refusal",
    [BlockingIOError(errno.EAGAIN, "not in the page cache"), OSError(errno.EOPNOTSUPP, "no RWF_NOWAIT here"), 100],
    ids=["would block", "not supported", "only a part of it in the page cache"],
)
@pytest.mark.trio
async def test_what_is_not_in_the_page_cache_is_read_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: OSError | int
) -> None:
    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        handle = reader.open()
        monkeypatch.setattr(os, "preadv", _refusing(refusal))
        assert bytes(await handle.read(CHUNK + 1, 3 * CHUNK)) == DATA[CHUNK + 1 : 4 * CHUNK + 1]


def _refusing(refusal: OSError | int) -> Callable[..., int]:
    preadv_really = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags != os.RWF_NOWAIT:
            return preadv_really(fd, views, offset, flags)  # a digest
        if isinstance(refusal, OSError):
            raise refusal
        views[0][:refusal] = b"\xee" * refusal  # what it filled must not reach the reader
        return refusal

    return preadv


@pytest.mark.trio
async def test_a_cache_file_that_became_too_short_is_a_broken_cache(tmp_path: Path) -> None:
    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        handle = reader.open()
        handle.attach()
        os.truncate(reader.blobs.store.layout.data(_blob(reader)), SIZE - 1)
        assert bytes(await handle.read(0, CHUNK)) == DATA[:CHUNK]
        with pytest.raises(CacheBroken, match=r"org/name/model.safetensors is too short.*cache verify"):
            await handle.read(SIZE - CHUNK, CHUNK)


@pytest.mark.trio
async def test_a_disk_that_fails_is_a_broken_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        handle = reader.open()
        handle.attach()
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(os, "pread", fail)
        with pytest.raises(CacheBroken, match="could not be read from the cache disk: Input/output error"):
            await handle.read(0, CHUNK)


@pytest.mark.parametrize(("reason", "kind"), [("denied", Denied), ("no_space", NoSpace)])
@pytest.mark.trio
async def test_a_reader_is_told_what_became_of_the_fetch(
    tmp_path: Path, reason: Reason, kind: type[Exception], autojump_clock: trio.testing.MockClock
) -> None:
    """By the error itself, not by a group with it inside: the session looks for its errno."""
    async with reading(tmp_path) as reader:
        reader.hub.workers.fault("fetch", failed(reason, "the disk or the hub said no"), times=None)
        handle = reader.open()
        with pytest.raises(kind, match=r"org/name/model.safetensors: the disk or the hub said no"):
            await handle.read(0, CHUNK)


@pytest.mark.trio
async def test_a_reader_does_not_wait_for_ever(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with reading(tmp_path, config=replace(NO_FILL, read_timeout_s=5)) as reader:
        reader.hub.workers.fault("fetch", hold=True, times=None)
        with pytest.raises(Unavailable, match="what was read did not come within 5 s"):
            await reader.open().read(0, CHUNK)


@pytest.mark.trio
async def test_a_reader_that_gives_up_leaves_the_fetch_to_the_others(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with reading(tmp_path) as reader:
        held = reader.hub.workers.fault("fetch", hold=True)
        handle = reader.open()
        with trio.move_on_after(1):
            await handle.read(0, CHUNK)
        held.release()
        assert bytes(await handle.read(0, CHUNK)) == DATA[:CHUNK]
        assert reader.fetched.count(0) == 1


@pytest.mark.trio
async def test_the_bytes_that_are_read_are_asked_for_before_those_ahead(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with reading(tmp_path, config=replace(NO_FILL, connections=1)) as reader:
        reader.hub.workers.fault("fetch", hold=True, times=None)
        handle = reader.open(fill=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(handle.read, 0, 10)  # who reads the first bytes reads on: chunk 1 is read ahead
            await trio.testing.wait_all_tasks_blocked()
            assert sorted(reader.fetched) == [0, 1]
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_what_was_read_from_is_completed_in_the_background(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with reading(tmp_path) as reader:
        handle = reader.open(fill=True)
        await handle.read(17 * CHUNK, 1)
        transfer = reader.blobs.fetcher.transfer(str(_blob(reader)))
        assert transfer is not None
        await transfer.sealed.wait()
        assert sorted(reader.fetched) == list(range(41))


@pytest.mark.trio
async def test_opening_alone_fetches_nothing(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with reading(tmp_path) as reader:
        handle = reader.open(fill=True)
        await trio.sleep(10)
        handle.close()
        assert reader.fetched == []
        assert reader.blobs.opened == 0
        assert reader.blobs.store.listing() == []


def test_the_scratch_buffer_is_one_read_large() -> None:
    assert len(handles._scratch) == READ_BYTES_MAX


@pytest.mark.trio
async def test_what_is_thrown_away_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification finds a damaged chunk while a thread reads it: the reader gets what is fetched instead."""
    async with reading(tmp_path) as reader:
        await reader.fetch_all()
        path = reader.blobs.store.layout.data(_blob(reader))
        with path.open("r+b") as file:
            file.write(b"\xee" * 10)
        handle = reader.open()
        transfer, _ = handle.attach()
        pread, damaged = os.pread, []

        def read_damaged(fd: int, length: int, offset: int) -> bytes:
            data = pread(fd, length, offset)
            if data.startswith(b"\xee" * 10):
                damaged.append(data)
                transfer.blob.clear(0)
            return data

        monkeypatch.setattr(os, "preadv", _refusing(BlockingIOError()))
        monkeypatch.setattr(os, "pread", read_damaged)
        assert bytes(await handle.read(0, CHUNK)) == DATA[:CHUNK]
        assert len(damaged) == 1


@pytest.mark.trio
async def test_reads_are_counted_by_what_they_had_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with reading(tmp_path) as reader:
        handle = reader.open()
        await handle.read(3 * CHUNK - 5, CHUNK)  # two chunks, none there
        await handle.read(3 * CHUNK - 5, CHUNK)
        assert reader.telemetry.tally == Tally(1, 2, CHUNK, 0, CHUNK)
        caplog.clear()
        await handle.read(0, 0)
        assert caplog.records == []
        monkeypatch.setattr(os, "preadv", lambda *_: 0)  # not in the page cache
        await handle.read(2 * CHUNK, 10)
        assert reader.telemetry.tally == Tally(2, 3, CHUNK, 10, CHUNK)
        monkeypatch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(CacheBroken):
            await handle.read(2 * CHUNK, 10)
        reader.hub.workers.fault("fetch", failed("denied", "no"), times=None)
        with pytest.raises(Denied):
            await handle.read(0, 10)
        handle.close()
        numbers = samples(reader.telemetry.metrics)
        shown = {
            name: numbers[f"manta_reads_total{{outcome={name}}}"]
            for name in ("hit", "waited", "cache_broken", "denied")
        }
        assert shown == {"hit": 2, "waited": 1, "cache_broken": 1, "denied": 1}
        assert numbers["manta_cache_chunk_requests_total{result=miss}"] == 3
        assert [r.levelname for r in caplog.records if r.getMessage().startswith("read failed")] == ["WARNING"] * 2
        assert reader.telemetry.waiting() == 0


@pytest.mark.trio
async def test_a_blob_that_its_first_read_cannot_open_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with reading(tmp_path) as reader:

        def begin() -> Transfer:
            raise CacheBroken("The cache's directory is gone. Bring it back.")

        handle = BlobHandle(
            begin, reader.blobs.close, reader.blobs.failed, reader.telemetry, Opener(inode=7), fill=False
        )
        with pytest.raises(CacheBroken):
            await handle.read(0, 10)
        handle.close()
        assert samples(reader.telemetry.metrics)["manta_reads_total{outcome=cache_broken}"] == 1
        assert "read failed: The cache's directory is gone." in caplog.text
