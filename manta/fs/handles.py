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
from manta.model.extents import Extent

READ_BYTES_MAX = 1024 * 1024
"""The largest read the kernel sends: 256 pages."""

# One buffer for all reads that the page cache answers: a fresh MiB for each would cost more in page faults than the copy itself.
_scratch = bytearray(READ_BYTES_MAX)


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
    """An open blob. `begin` gives its transfer, which `done` gets back at the end; `failed` hears why a read got nothing, `count` of the
    bytes read."""

    def __init__(
        self,
        begin: Callable[[], Transfer],
        done: Callable[[Transfer], None],
        failed: Callable[[Transfer, MantaError], None],
        count: Callable[[int], None],
        *,
        fill: bool,
    ) -> None:
        self._begin = begin
        self._done = done
        self._failed = failed
        self._count = count
        self._fill = self._fill_wanted = fill
        self._attached: tuple[Transfer, Readahead] | None = None

    def attach(self) -> tuple[Transfer, Readahead]:
        """Opens the blob in the cache, which the first read does otherwise. Raises Denied, NoSpace, CacheBroken."""
        if self._attached is None:
            transfer = self._begin()
            self._attached = transfer, Readahead(transfer.blob.grid)
        return self._attached

    async def read(self, offset: int, size: int) -> bytes | memoryview:
        """Raises what became of the fetch, Unavailable after the reader's deadline, CacheBroken when the cache disk fails."""
        transfer, readahead = self.attach()
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
        if not blob.complete:
            # No checkpoint before `ensure` asks for what is read now, so the fetcher hears of both at once and sends this first.
            ahead = readahead.observe(extent)
            self._follow_up(transfer, ahead, extent)
        else:
            ahead = range(0)
        while True:
            # None after it either: what it found there is read at once, or in a thread, and then again if it was thrown away meanwhile.
            await transfer.ensure(extent, onward=bool(ahead))
            generation = blob.generation
            data = await _from_cache(transfer, extent)
            if blob.generation == generation:
                self._count(len(data))
                return data

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


async def _from_cache(transfer: Transfer, extent: Extent) -> bytes | memoryview:
    """Bytes that are there. Raises CacheBroken."""
    blob, length = transfer.blob, len(extent)
    # A short answer would tell the kernel that the file ends there, so what is larger gets a buffer of its own.
    view = memoryview(_scratch)[:length] if length <= READ_BYTES_MAX else memoryview(bytearray(length))
    with blob.descriptor() as fd:
        try:
            # Without waiting, so that a slow disk never holds the thread that serves everybody.
            if os.preadv(fd, [view], extent.start, os.RWF_NOWAIT) == length:
                return view
        except OSError:
            pass  # not in the page cache, or a filesystem without RWF_NOWAIT
    try:
        data = await trio.to_thread.run_sync(_read_slowly, transfer, extent)
    except OSError as e:
        raise CacheBroken(
            f"{transfer.name} could not be read from the cache disk: {e.strerror}. Check the disk (dmesg); `manta cache verify`"
            " has what is damaged fetched anew."
        ) from e
    if len(data) != length:
        raise CacheBroken(
            f"The cache file of {transfer.name} is too short: something outside Manta changed it. Run `manta cache verify`,"
            " which has what is damaged fetched anew."
        )
    return data


def _read_slowly(transfer: Transfer, extent: Extent) -> bytes:
    """In a thread, which takes the descriptor for itself: a thousand reads may wait for a thread."""
    with transfer.blob.descriptor() as fd:
        return os.pread(fd, len(extent), extent.start)
