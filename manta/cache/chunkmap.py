"""The chunk map file: which chunks of a blob are in the cache and what their digests are. Its format is here and only here.

Written by the daemon alone: by its trio thread, and by a thread that verifies or seals (a lock keeps the two apart). Peer servers map the
file read-only. All numbers are little-endian:

    header     128 bytes: magic, version, header size, chunk size, blob size, blob id, boot id, flags, zeros, CRC-32 of it all
    bitmap     one bit per chunk, chunk 0 in the lowest bit of byte 0: the chunk was written
    entries    20 bytes per chunk: its xxh3-128, and a CRC-32 of the blob's id and size, the chunk's number and that digest

A chunk is present where its bit is set *and* its entry checks. The entry is written before the bit, and the bit is cleared before the
entry is zeroed, so an absent chunk lacks both and no single damaged bit makes it present; CRC-32 finds every single flipped bit in an
entry and in the header. Whatever else is wrong (length, magic, version, chunk size, blob) makes the whole file worthless, and no more
than that.

A chunk that became absent must not come back with the next start, whatever the disk refuses: where the map's file does not take it, the
file is removed, and with it all that it said (a data file without a map is dropped). Where not even that is possible the map is
`condemned`, and the store tries on (`manta.cache.condemned`).

A killed daemon loses nothing that it wrote: the kernel has it. After a host crash neither the map nor the data can be believed, which is
seen by the boot id (`manta.cache.incarnation`: it changes also when the disk is mounted anew): then every chunk of an unsealed blob is
*doubtful*, that is not present until its bytes were checked against its entry. Sealed blobs were fsynced, data before entries before flag,
and stay present. The boot id becomes today's when no doubt is left. A peer server follows the same rule: it serves nothing of an unsealed
map with another boot id.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from manta.cache.descriptors import CacheFile, Descriptors
from manta.cache.digests import DIGEST_BYTES
from manta.cache.disk import disk_error, disk_errors, fsync_directory, pwrite_all
from manta.errors import Corrupt, MantaError
from manta.model.extents import ChunkGrid
from manta.model.ids import BlobAlgorithm, BlobId

logger = logging.getLogger(__name__)

VERSION = 1
BOOT_ID_BYTES = 16

_MAGIC = b"MANTAMAP"
# magic, version, header size, chunk size, blob size, algorithm, digest, boot id, flags
_HEADER = struct.Struct("<8sIIQQ8s32s16sI")
_CRC = struct.Struct("<I")
HEADER_BYTES = 128
"""Within one disk sector and one page, so that a header is written entirely or not at all."""
ENTRY_BYTES = DIGEST_BYTES + _CRC.size
_NO_ENTRY = bytes(ENTRY_BYTES)
_SEALED = 1

_ZEROS = bytes(64 * 1024)


@dataclass(frozen=True, slots=True)
class Header:
    """What a map file says about itself and its blob."""

    blob: BlobId
    grid: ChunkGrid
    boot_id: bytes
    sealed: bool

    @property
    def bitmap_at(self) -> int:
        return HEADER_BYTES

    @property
    def entries_at(self) -> int:
        return HEADER_BYTES + bitmap_bytes(self.grid)

    def encode(self) -> bytes:
        packed = _HEADER.pack(
            _MAGIC,
            VERSION,
            HEADER_BYTES,
            self.grid.chunk_size,
            self.grid.size,
            self.blob.algorithm.value.encode(),
            bytes.fromhex(self.blob.hex),
            self.boot_id,
            _SEALED if self.sealed else 0,
        ).ljust(HEADER_BYTES - _CRC.size, b"\0")
        return packed + _CRC.pack(zlib.crc32(packed))


def bitmap_bytes(grid: ChunkGrid) -> int:
    return (len(grid) + 7) // 8


def map_bytes(grid: ChunkGrid) -> int:
    """Length of a map file: 258 KB for 100 GiB in chunks of 8 MiB."""
    return HEADER_BYTES + bitmap_bytes(grid) + len(grid) * ENTRY_BYTES


def decode_header(data: bytes, file_bytes: int) -> Header:
    """Reads a header out of the first bytes of a map file that is `file_bytes` long. Raises Corrupt with a clause that says why not."""
    if len(data) < HEADER_BYTES:
        raise Corrupt(f"it is {file_bytes} bytes long, less than a header")
    packed, (crc,) = data[: HEADER_BYTES - _CRC.size], _CRC.unpack_from(data, HEADER_BYTES - _CRC.size)
    magic, version, header_bytes, chunk_size, size, algorithm, digest, boot_id, flags = _HEADER.unpack_from(packed)
    if magic != _MAGIC:
        raise Corrupt("it is no chunk map")
    if zlib.crc32(packed) != crc:
        raise Corrupt("its header is damaged")
    if version != VERSION or header_bytes != HEADER_BYTES:
        raise Corrupt(f"its format is version {version}, not {VERSION}")
    name = algorithm.rstrip(b"\0").decode("ascii", "replace")
    if name not in {known.value for known in BlobAlgorithm} or chunk_size < 1:
        raise Corrupt("its header makes no sense")
    known = BlobAlgorithm(name)
    header = Header(
        BlobId(known, digest[: 32 if known is BlobAlgorithm.SHA256 else 20].hex()),
        ChunkGrid(size, chunk_size),
        boot_id,
        bool(flags & _SEALED),
    )
    if file_bytes != map_bytes(header.grid):
        raise Corrupt(f"it is {file_bytes} bytes long instead of {map_bytes(header.grid)}")
    return header


def entry_seed(header: Header) -> int:
    """What the CRC of every entry of that map begins with."""
    return zlib.crc32(header.encode()[16:72])


def entry_digest(seed: int, chunk: int, entry: bytes) -> bytes | None:
    """The digest that the entry of `chunk` holds; None where it is damaged or was never written."""
    # An entry never written is all zeros, and a file hole reads as zeros: never an entry, whatever the CRC makes of them.
    digest = entry[:DIGEST_BYTES]
    return digest if entry != _NO_ENTRY and entry[DIGEST_BYTES:] == _check(seed, chunk, digest) else None


def _check(seed: int, chunk: int, digest: bytes) -> bytes:
    return _CRC.pack(zlib.crc32(digest, zlib.crc32(chunk.to_bytes(8, "little"), seed)))


class ChunkMap:
    """The chunk map of one blob: a mirror in memory, which answers, and its file, which survives."""

    def __init__(self, path: Path, header: Header, boot_id: bytes, file: CacheFile) -> None:
        """Use `create` or `load`."""
        self.path = path
        self._file = file
        self.blob = header.blob
        self.grid = header.grid
        self._boot_id = boot_id
        self._header = header
        self._bitmap = bytearray(bitmap_bytes(header.grid))
        self._present = bytearray(len(header.grid))
        self._doubtful: set[int] = set()
        self._present_count = 0
        self._prefix = 0
        self._generation = 0
        self._seed = entry_seed(header)
        self._condemned = False
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls, path: Path, blob: BlobId, grid: ChunkGrid, boot_id: bytes, descriptors: Descriptors | None = None
    ) -> Self:
        """A new map in which no chunk is present, instead of any file at `path`. Raises NoSpace and CacheBroken."""
        header = Header(blob, grid, boot_id, sealed=False)
        with disk_errors(path, "creating a chunk map"):
            # Not O_TRUNC: a peer server that still has the old file mapped would get SIGBUS.
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _reserve(fd, map_bytes(grid))
                pwrite_all(fd, header.encode(), 0)
            except OSError:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
        return cls(path, header, boot_id, CacheFile(descriptors or Descriptors(1), path, fd))

    @classmethod
    def load(
        cls, path: Path, blob: BlobId, grid: ChunkGrid, boot_id: bytes, descriptors: Descriptors | None = None
    ) -> Self | None:
        """The map at `path`, or None where there is none or it is not the map of `blob` in `grid`, which is logged: the caller starts anew.

        Reads the whole file: about 9 ms for 100 GiB. Raises NoSpace and CacheBroken.
        """
        try:
            file = CacheFile(descriptors or Descriptors(1), path)
            with file.used() as fd:
                data = os.pread(fd, os.fstat(fd).st_size, 0)
            file.rest()  # a sealed blob's map is never written, and thousands of them may be in use
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, path, "reading a chunk map") from error
        try:
            header = decode_header(data[:HEADER_BYTES], len(data))
            if header.blob != blob or header.grid != grid:
                raise Corrupt(f"it is the map of {header.blob} with {header.grid}, not of {blob} with {grid}")
        except Corrupt as reason:
            logger.warning(
                "The chunk map %s is worthless: %s. What it described is fetched again.", path, reason.message
            )
            file.close()
            return None
        loaded = cls(path, header, boot_id, file)
        loaded._adopt(data)
        return loaded

    def _adopt(self, data: bytes) -> None:
        """Takes over bitmap and entries from the file's content; keeps only bits whose entries check."""
        entries_at = self._header.entries_at
        trusted = self._header.sealed or self._header.boot_id == self._boot_id
        damaged = 0
        for chunk in _set_bits(data[HEADER_BYTES:entries_at], len(self.grid)):
            at = entries_at + chunk * ENTRY_BYTES
            entry = data[at : at + ENTRY_BYTES]
            if entry_digest(self._seed, chunk, entry) is None:
                damaged += 1
                continue
            self._bitmap[chunk >> 3] |= 1 << (chunk & 7)
            if trusted:
                self._present[chunk] = 1
                self._present_count += 1
            else:
                self._doubtful.add(chunk)
        self._prefix = self._advanced(0)
        if damaged:
            logger.warning(
                "%d entries of the chunk map %s are damaged. Those chunks are fetched again.", damaged, self.path
            )
        if self._header.sealed and not self.complete:
            # What will be fetched for the gap was neither verified nor fsynced: the seal may not cover it.
            self._break_seal()

    # Questions, answered from memory -------------------------------------------------------------------------------------

    def has(self, chunk: int) -> bool:
        """Whether `chunk` may be read. Raises IndexError for one beyond the end; like an index, a negative one counts from the end."""
        return self._present[chunk] == 1

    def missing(self, chunks: range) -> list[int]:
        """Those of `chunks` (step 1) that may not be read, in order. Doubtful ones are among them."""
        found = []
        at = self._present.find(0, chunks.start, chunks.stop)
        while at >= 0:
            found.append(at)
            at = self._present.find(0, at + 1, chunks.stop)
        return found

    @property
    def present_count(self) -> int:
        """How many chunks may be read."""
        return self._present_count

    @property
    def prefix(self) -> int:
        """How many chunks from the start on may be read without a gap."""
        return self._prefix

    @property
    def complete(self) -> bool:
        return self._present_count == len(self.grid)

    @property
    def sealed(self) -> bool:
        """The whole blob matched its id and is on the disk."""
        return self._header.sealed

    @property
    def doubtful(self) -> Sequence[int]:
        """The chunks that a host crash put in doubt, in order. They are not present until `settle` says so."""
        with self._lock:
            return sorted(self._doubtful)

    @property
    def doubtful_count(self) -> int:
        return len(self._doubtful)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the chunks that are present or doubtful: what they take on the disk."""
        last = len(self.grid) - 1
        return _chunk_bytes(
            self.grid, self._present_count + len(self._doubtful), self._has_last or last in self._doubtful
        )

    @property
    def present_bytes(self) -> int:
        """Bytes of the chunks that may be read."""
        return _chunk_bytes(self.grid, self._present_count, self._has_last)

    @property
    def _has_last(self) -> bool:
        return self._present.endswith(b"\x01")

    @property
    def generation(self) -> int:
        """Grows whenever a chunk that could be read becomes absent: what was concluded from the bytes before may not hold any more."""
        return self._generation

    @property
    def condemned(self) -> bool:
        """The file says of a chunk that it is present, which must not be believed any more, and the disk lets nobody change that."""
        return self._condemned

    def digest(self, chunk: int) -> bytes | None:
        """The recorded digest of a present or doubtful chunk, read from the file. Raises CacheBroken."""
        with self._lock:
            return self._digest(chunk)

    # Changes, written to the file first ----------------------------------------------------------------------------------

    def record(self, chunk: int, digest: bytes) -> None:
        """Notes that `chunk` is in the data file and hashes to `digest` (16 bytes). Two small writes, no fsync.

        Raises NoSpace and CacheBroken, after which the chunk is not present; Corrupt where the blob is sealed with another digest.
        """
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"a chunk's digest is {DIGEST_BYTES} bytes, not {len(digest)}")
        if not 0 <= chunk < len(self.grid):
            raise IndexError(f"chunk {chunk} of {len(self.grid)}")
        with self._lock:
            if self._present[chunk]:
                if self._digest(chunk) == digest:
                    return
                if self._header.sealed:
                    raise Corrupt(
                        f"Chunk {chunk} of {self.blob} was written again with other bytes than those it was verified with."
                    )
            self._forget(chunk)
            with disk_errors(self.path, "recording a chunk"):
                self._write(digest + _check(self._seed, chunk, digest), self._entry_at(chunk))
                self._write_bit(chunk, present=True)
            self._admit(chunk)
            self._settle_boot_id()

    def settle(self, chunk: int, digest: bytes, good: bool) -> bool:
        """Ends the doubt about a chunk: its bytes were compared with `digest`. False where that is not its digest (any more).

        Raises NoSpace and CacheBroken.
        """
        with self._lock:
            if chunk not in self._doubtful or self._digest(chunk) != digest:
                return False
            if good:
                self._doubtful.discard(chunk)
                self._admit(chunk)
            else:
                self._forget(chunk)
            self._settle_boot_id()
            return True

    def clear(self, chunk: int) -> None:
        """Makes `chunk` absent: its bytes are damaged. SLOW where the blob was sealed (fsync). Raises NoSpace and CacheBroken."""
        with self._lock:
            if not 0 <= chunk < len(self.grid):
                raise IndexError(f"chunk {chunk} of {len(self.grid)}")
            self._absent(chunk)
            with self._condemning():
                self._break_seal()
            self._forget(chunk)

    def reset(self) -> None:
        """Makes every chunk absent. SLOW where the blob was sealed (fsync). Raises NoSpace and CacheBroken; memory is reset in any case."""
        with self._lock:
            self._present[:] = bytes(len(self._present))
            self._bitmap[:] = bytes(len(self._bitmap))
            self._doubtful.clear()
            self._present_count = 0
            self._prefix = 0
            self._generation += 1
            with self._condemning(), disk_errors(self.path, "clearing a chunk map"):
                self._break_seal()
                # Bits before entries. Written, not truncated: a peer server that has the file mapped would get SIGBUS.
                at, end = self._header.bitmap_at, map_bytes(self.grid)
                while at < end:
                    count = min(len(_ZEROS), end - at)
                    self._write(_ZEROS[:count], at)
                    at += count
            self._settle_boot_id()

    def mark_sealed(self, generation: int) -> None:
        """SLOW: entries to the disk, then the flag, then the flag to the disk. The caller has fsynced the data and compared its digest.

        `generation` is what it was before the digest was begun. Raises Corrupt where a chunk is or was absent since then, NoSpace and
        CacheBroken.
        """
        with disk_errors(self.path, "sealing a blob"), self._file.used(writing=True) as fd:
            # No lock around an fsync: the daemon's trio thread may want to record or clear.
            os.fsync(fd)
            with self._lock:
                if generation != self._generation or not self.complete:
                    raise Corrupt(f"{self.blob} lost a chunk while it was being sealed. It will be fetched again.")
                self._write_header(Header(self.blob, self.grid, self._boot_id, sealed=True))
            os.fsync(fd)

    def abandon(self) -> None:
        """The directory was removed and is made anew: what is at `path` from now on is another map. Changes fail, or go into the file that
        has no name any more."""
        self._file.abandon()

    def close(self) -> None:
        """Closes the file for good. The mirror still answers; a change raises ValueError: the directory may be another daemon's by then."""
        self._file.close()

    # With the lock held --------------------------------------------------------------------------------------------------

    def _entry_at(self, chunk: int) -> int:
        return self._header.entries_at + chunk * ENTRY_BYTES

    def _write(self, data: bytes, at: int) -> None:
        with self._file.used(writing=True) as fd:
            pwrite_all(fd, data, at)

    def _write_bit(self, chunk: int, *, present: bool) -> None:
        byte, bit = chunk >> 3, 1 << (chunk & 7)
        value = self._bitmap[byte] | bit if present else self._bitmap[byte] & ~bit
        self._write(bytes([value]), self._header.bitmap_at + byte)
        self._bitmap[byte] = value

    def _write_header(self, header: Header) -> None:
        self._write(header.encode(), 0)
        self._header = header

    def _digest(self, chunk: int) -> bytes | None:
        if not self._bitmap[chunk >> 3] >> (chunk & 7) & 1:
            return None
        with disk_errors(self.path, "reading a chunk map"), self._file.used() as fd:
            entry = os.pread(fd, ENTRY_BYTES, self._entry_at(chunk))
        return entry_digest(self._seed, chunk, entry)

    def _advanced(self, prefix: int) -> int:
        end = self._present.find(0, prefix)
        return end if end >= 0 else len(self._present)

    def _admit(self, chunk: int) -> None:
        self._present[chunk] = 1
        self._present_count += 1
        if chunk == self._prefix:
            self._prefix = self._advanced(chunk)

    def _absent(self, chunk: int) -> None:
        """In memory only, and before the disk, so that no reader is let in whatever the disk answers."""
        if self._present[chunk]:
            self._present[chunk] = 0
            self._present_count -= 1
            self._prefix = min(self._prefix, chunk)
            self._generation += 1

    def _forget(self, chunk: int) -> None:
        self._absent(chunk)
        self._doubtful.discard(chunk)
        if self._bitmap[chunk >> 3] >> (chunk & 7) & 1:
            with self._condemning(), disk_errors(self.path, "clearing a chunk"):
                self._write_bit(chunk, present=False)
                self._write(_NO_ENTRY, self._entry_at(chunk))

    @contextmanager
    def _condemning(self) -> Iterator[None]:
        """Around writes that make chunks absent: where the disk refuses one, the file must not be read again."""
        try:
            yield
        except MantaError:
            if self._file.ours:
                try:
                    remove_map(self.path)
                except OSError:
                    self._condemned = True
            raise

    def _break_seal(self) -> None:
        """A seal is believed after a host crash, so it must be gone from the disk before the data under it changes."""
        if self._header.sealed:
            with disk_errors(self.path, "breaking a seal"):
                self._write_header(Header(self.blob, self.grid, self._header.boot_id, sealed=False))
                with self._file.used(writing=True) as fd:
                    os.fsync(fd)

    def _settle_boot_id(self) -> None:
        if not self._doubtful and self._header.boot_id != self._boot_id:
            with disk_errors(self.path, "ending the doubt about a chunk map"):
                self._write_header(Header(self.blob, self.grid, self._boot_id, self._header.sealed))


def remove_map(path: Path) -> None:
    """SLOW: takes a map away so that no crash brings it back. Raises OSError."""
    path.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _chunk_bytes(grid: ChunkGrid, count: int, with_last: bool) -> int:
    """Bytes of `count` chunks, of which one is the grid's last, maybe short one if `with_last`."""
    if not with_last:
        return count * grid.chunk_size
    return (count - 1) * grid.chunk_size + len(grid.extent(len(grid) - 1))


def _reserve(fd: int, size: int) -> None:
    """Room for all entries at once: a chunk that is on the disk must not be lost because its 20 bytes found no room. Raises OSError."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        os.ftruncate(fd, size)  # a filesystem that cannot reserve: then `record` may find no room, and says so


def _set_bits(bitmap: bytes, count: int) -> list[int]:
    """The numbers below `count` of the bits that are set."""
    return [
        number
        for byte, value in enumerate(bitmap)
        if value
        for number in range(byte * 8, min(byte * 8 + 8, count))
        if value >> (number & 7) & 1
    ]


def read_outline(path: Path, data_bytes: int) -> tuple[Header, int]:
    """The header of the map at `path`, and the bytes of the chunks whose bits are set, without a look at the entries.

    `data_bytes` is the size of the data file beside it. Raises Corrupt with a clause that says why the two are worthless, and OSError.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = decode_header(os.pread(fd, HEADER_BYTES, 0), os.fstat(fd).st_size)
        bitmap = os.pread(fd, bitmap_bytes(header.grid), header.bitmap_at)
    finally:
        os.close(fd)
    if data_bytes != header.grid.size:
        raise Corrupt(f"its data file has {data_bytes} bytes instead of {header.grid.size}")
    last = len(header.grid) - 1
    with_last = last >= 0 and bool(bitmap[last >> 3] >> (last & 7) & 1)
    return header, _chunk_bytes(header.grid, int.from_bytes(bitmap, "little").bit_count(), with_last)
