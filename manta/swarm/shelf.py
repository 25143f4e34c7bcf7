"""What of the cache may be given to other nodes, read from its files, here and only here. Used by `manta.swarm.server`.

The daemon alone writes these files (`manta.cache.chunkmap` says how); here they are opened for reading, by blob id and nothing else, for
one answer: a descriptor that is kept would keep an evicted blob's room on the disk. A chunk is here where the map can be believed (sealed,
or written in this life of the host), its bit is set and its entry checks. Read with pread: an error of the disk is then an exception, in
a mapping it is SIGBUS.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from manta.cache.chunkmap import (
    ENTRY_BYTES,
    HEADER_BYTES,
    Header,
    bitmap_bytes,
    decode_header,
    entry_digest,
    entry_seed,
)
from manta.cache.incarnation import incarnation
from manta.cache.layout import Layout
from manta.errors import Corrupt, Unavailable
from manta.model.extents import CHUNK_SIZE, ChunkGrid, Extent
from manta.model.ids import BlobId

T = TypeVar("T")

_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}


@dataclass(slots=True)
class OpenChunk:
    """A chunk that is here. `fd` is the blob's data file, to be closed by who opened it; `extent` says where in it the chunk is."""

    fd: int
    extent: Extent
    digest: bytes

    def close(self) -> None:
        os.close(self.fd)


class Shelf:
    """Of the cache in `directory`. `boot_id` is the life in which unsealed maps must have been written; None: this one."""

    def __init__(self, directory: Path, boot_id: bytes | None = None) -> None:
        self._layout = Layout(directory)
        self._boot_id = incarnation(directory) if boot_id is None else boot_id

    def bitmap(self, blob: BlobId, size: int) -> bytes | None:
        """A bit for each chunk that is here, chunk 0 in the lowest bit of byte 0; None where nothing is known of a blob of that size.

        The entries are not looked at: a damaged one is found when its chunk is asked for. Raises Unavailable.
        """
        return self._read(blob, size, _bitmap)

    def open_chunk(self, blob: BlobId, size: int, chunk: int) -> OpenChunk | None:
        """The chunk, open; None where it is not here, or the blob has another size. Raises Unavailable where nothing can be opened now."""

        def take(fd: int, header: Header) -> OpenChunk | None:
            digest = _digest(fd, header, chunk)
            if digest is None:
                return None
            data = os.open(self._layout.data(blob), os.O_RDONLY | os.O_CLOEXEC)
            # A blob that is removed loses its map first, then its data: a map that still has its name belongs to the data at that name.
            if os.fstat(fd).st_nlink and os.fstat(data).st_size == size:
                return OpenChunk(data, header.grid.extent(chunk), digest)
            os.close(data)
            return None

        return self._read(blob, size, take)

    def _read(self, blob: BlobId, size: int, take: Callable[[int, Header], T | None]) -> T | None:
        """What `take` finds in the blob's map; None where there is no map that can be believed, and where the disk refuses."""
        try:
            fd = os.open(self._layout.map(blob), os.O_RDONLY | os.O_CLOEXEC)
            try:
                header = decode_header(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size)
                if header.blob != blob or header.grid != ChunkGrid(size, CHUNK_SIZE):
                    return None
                return take(fd, header) if header.sealed or header.boot_id == self._boot_id else None
            finally:
                os.close(fd)
        except Corrupt:
            return None
        except OSError as error:
            if error.errno in _OUT_OF_DESCRIPTORS:
                raise Unavailable("This node has too many files open; try again.") from error
            return None


def _bitmap(fd: int, header: Header) -> bytes | None:
    bits = os.pread(fd, bitmap_bytes(header.grid), header.bitmap_at)
    return bits if len(bits) == bitmap_bytes(header.grid) else None


def _digest(fd: int, header: Header, chunk: int) -> bytes | None:
    """What the map says of `chunk`; None where it is absent or its entry is damaged."""
    if not 0 <= chunk < len(header.grid):
        return None
    bits = os.pread(fd, 1, header.bitmap_at + (chunk >> 3))
    if not bits or not bits[0] >> (chunk & 7) & 1:
        return None
    entry = os.pread(fd, ENTRY_BYTES, header.entries_at + chunk * ENTRY_BYTES)
    return entry_digest(entry_seed(header), chunk, entry)
