"""Open files: reads, with the readahead each needs, here and only here. In the daemon's trio thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

import trio

from manta.errors import CacheBroken, MantaError
from manta.fetch.readahead import Readahead
from manta.fetch.scheduler import Priority
from manta.fetch.transfer import Transfer
from manta.model.buffer import page_aligned
from manta.model.extents import Extent
from manta.telemetry.events import Opener, ReadWait, Telemetry

READ_BYTES_MAX = 1024 * 1024
"""The largest read the kernel sends: 256 pages."""

ONWARD_SHARE = 8
"""A reader who is past the first 1/ONWARD_SHARE of a blob will want the next part of the model too: who looks at the head of a safetensors
file only does not come that far. (8 nodes, 1 GiB in 4 parts, 100 Mbit/s everywhere: 128 s with 2, 119 s with 8.)"""

# One buffer for all reads that the page cache answers: a fresh MiB for each would cost more in page faults than the copy itself.
_scratch = page_aligned(READ_BYTES_MAX)


class Handle(Protocol):
    """An open file."""

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """At most `size` bytes from `offset`, fewer only at the end of the file. Valid until the caller's next checkpoint."""
        ...

    def close(self) -> None: ...


class TextHandle:
    """A file that Manta wrote itself: one state of it for as long as it is open."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        pass


class BlobHandle:
    """An open blob, opened by `opener`.

    `begin` gives its transfer, which `done` gets back at the end; `failed` hears why a read got nothing, `telemetry` of all reads.
    """

    def __init__(
        self,
        begin: Callable[[], Transfer],
        done: Callable[[Transfer], None],
        failed: Callable[[Transfer, MantaError], None],
        telemetry: Telemetry,
        opener: Opener,
        *,
        fill: bool,
        onward: Callable[[], None] | None = None,
    ) -> None:
        self._onward = onward
        self._begin = begin
        self._done = done
        self._failed = failed
        self._telemetry = telemetry
        self._tally = telemetry.tally
        self._opener = opener
        self._fill = self._fill_wanted = fill
        self._attached: tuple[Transfer, Readahead] | None = None

    def attach(self) -> tuple[Transfer, Readahead]:
        """Opens the blob in the cache, which the first read does otherwise. Raises Denied, NoSpace, CacheBroken."""
        if self._attached is None:
            transfer = self._begin()
            self._attached = transfer, Readahead(transfer.blob.grid)
        return self._attached

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Raises what became of the fetch, Unavailable after the reader's deadline, CacheBroken and NoSpace when the cache disk fails."""
        try:
            transfer, readahead = self.attach()
        except MantaError as e:
            self._telemetry.read_failed(f"inode {self._opener.inode}", e)
            raise
        try:
            return await self._read(transfer, readahead, offset, size)
        except MantaError as e:
            self._fill = self._fill_wanted  # giving up on a fetch ends the fill too: the next read starts it again
            self._failed(transfer, e)
            raise

    async def _read(self, transfer: Transfer, readahead: Readahead, offset: int, size: int) -> bytes | memoryview:
        blob = transfer.blob
        extent = Extent(offset, offset + size).clamp(blob.size)
        if not len(extent):
            return b""
        if self._onward is not None and ONWARD_SHARE * extent.end > blob.size:
            onward, self._onward = self._onward, None
            onward()
        if not blob.complete:
            # No checkpoint before `ensure` asks for what is read now, so the fetcher hears of both at once and sends this first.
            ahead = readahead.observe(extent)
            self._follow_up(transfer, ahead, extent)
        else:
            ahead = range(0)
        wait: ReadWait | None = None
        try:
            while True:
                if not transfer.readable(extent):
                    wait = wait or self._begin_wait(transfer, extent)
                    await transfer.ensure(extent, onward=bool(ahead))
                # None after it either: what it found there is read at once, or in a thread, and then again if it was thrown away
                # meanwhile.
                generation = blob.generation
                at_once = _from_page_cache(transfer, extent)
                data = await _from_disk(transfer, extent) if at_once is None else at_once
                if blob.generation == generation:
                    break
        except BaseException as e:
            if wait is not None:
                wait.failed(e)
            else:
                self._telemetry.read_failed(transfer.name, e)
            raise
        if wait is not None:
            wait.served(len(data))
            return data
        # Every read comes by here: numbers, and no call.
        tally = self._tally
        tally.hits += 1
        tally.chunks_found += (extent.end - 1) // blob.grid.chunk_size - extent.start // blob.grid.chunk_size + 1
        if at_once is not None:
            tally.page_cache_bytes += len(data)
        else:
            tally.disk_bytes += len(data)
        return data

    async def complete(self) -> Transfer:
        """Returns when all of it is in the cache. Raises as `read`, by the same deadline."""
        try:
            transfer, _ = self.attach()
        except MantaError as e:
            self._telemetry.read_failed(f"inode {self._opener.inode}", e)
            raise
        whole = Extent(0, transfer.blob.size)
        if not transfer.readable(whole):
            wait = self._begin_wait(transfer, whole)
            try:
                await transfer.ensure(whole)
                for chunk in transfer.missing():  # what has just come, and is about to be recorded
                    await transfer.supply(chunk, urgent=False)
            except BaseException as e:
                wait.failed(e)
                if isinstance(e, MantaError):
                    self._failed(transfer, e)
                raise
            wait.served(0)
        return transfer

    def _begin_wait(self, transfer: Transfer, extent: Extent) -> ReadWait:
        blob = transfer.blob
        chunks, missing = blob.grid.chunks(extent), len(blob.missing(extent))
        return self._telemetry.read_waits(blob.id, transfer.name, extent, chunks, missing, self._opener)

    def _follow_up(self, transfer: Transfer, ahead: range, extent: Extent) -> None:
        transfer.look_ahead(self, ahead, extent)
        if self._fill:
            # Once per open is enough: it was read from, so the rest is wanted while there is nothing else to do.
            self._fill = False
            transfer.want_whole(Priority.FILL)

    def close(self) -> None:
        if self._attached is not None:
            transfer, _ = self._attached
            transfer.leave(self)
            self._done(transfer)


def _from_page_cache(transfer: Transfer, extent: Extent) -> memoryview | None:
    """None where it would have to wait for the disk: a slow one never holds the thread that serves everybody."""
    length = len(extent)
    # A short answer would tell the kernel that the file ends there, so what is larger gets a buffer of its own.
    view = _scratch[:length] if length <= READ_BYTES_MAX else page_aligned(length)
    with transfer.blob.descriptor() as fd:
        try:
            if os.preadv(fd, [view], extent.start, os.RWF_NOWAIT) == length:
                return view
        except OSError:
            pass  # not in the page cache, or a filesystem without RWF_NOWAIT
    return None


async def _from_disk(transfer: Transfer, extent: Extent) -> bytes:
    """Raises CacheBroken."""
    try:
        data = await trio.to_thread.run_sync(_read_slowly, transfer, extent)
    except OSError as e:
        raise CacheBroken(
            f"{transfer.name} could not be read from the cache disk: {e.strerror}. Check the disk (dmesg); `manta cache verify`"
            " has what is damaged fetched anew."
        ) from e
    if len(data) != len(extent):
        raise CacheBroken(
            f"The cache file of {transfer.name} is too short: something outside Manta changed it. Run `manta cache verify`,"
            " which has what is damaged fetched anew."
        )
    return data


def _read_slowly(transfer: Transfer, extent: Extent) -> bytes:
    """In a thread, which takes the descriptor for itself: a thousand reads may wait for a thread."""
    with transfer.blob.descriptor() as fd:
        return os.pread(fd, len(extent), extent.start)
