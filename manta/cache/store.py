"""The store of blobs on disk: one sparse data file and one chunk map per blob, here and only here.

Used by the daemon alone, the one writer. Calls belong to its trio thread unless they are marked SLOW: those wait for the disk and belong
in a worker thread, where they may run beside everything else. Workers and peer servers get a blob's descriptor from the daemon, or read
its files, and change nothing in the maps.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from manta.cache import recovery
from manta.cache.chunkmap import ChunkMap, remove_map
from manta.cache.condemned import Condemned
from manta.cache.descriptors import IDLE_MAX, CacheFile, Descriptors
from manta.cache.disk import disk_error, disk_errors, fsync_directory, writeback_error
from manta.cache.incarnation import incarnation
from manta.cache.inventory import BlobInfo, Inventory
from manta.cache.layout import DOOMED_SUFFIX, Layout
from manta.cache.lock import DirectoryLock
from manta.errors import Absent, CacheBroken, Corrupt, InUse, MantaError
from manta.model.extents import CHUNK_SIZE, ChunkGrid, Extent
from manta.model.ids import BlobId

logger = logging.getLogger(__name__)

SIZE_MAX = 16 * 1024**4
"""Bytes in the largest blob: the most that a file on ext4 can have, far more than a hub takes. Its presence takes 2 MiB of memory; the size
comes from the origin, and memory is taken by it before the disk could refuse.
"""


UNSYNCED_MAX = 64
"""Blobs that were closed unsealed since the last look at the directory. Whether their bytes reach the disk the kernel tells only to who has
the file open; of more than these it is asked when they are opened again."""


class Blob:
    """One blob that is open. Everyone who opens it gets the same object, and closes it once.

    Presence is what the daemon recorded: bytes are readable where `has` says so. Sizes and offsets are bytes.
    """

    def __init__(self, store: Store, file: CacheFile, chunk_map: ChunkMap) -> None:
        """Use `Store.open_blob`."""
        self.id = chunk_map.blob
        self.grid = chunk_map.grid
        self.size = chunk_map.grid.size
        self.path = file.path
        """The data file, for messages."""
        self._store = store
        self._file = file
        self._pinned: int | None = None
        self._map = chunk_map
        self._holders = 1
        self._used = True
        self._written = False
        self._noting = threading.Lock()
        self._sealing = threading.Lock()

    @contextmanager
    def descriptor(self, *, writing: bool = False) -> Iterator[int]:
        """The data file, for reading or also for writing inside the `with`. Raises ValueError where the blob is closed; NoSpace, and
        CacheBroken, also while the disk is read-only and it is for writing."""
        with disk_errors(self.path, "opening a blob"):
            fd = self._file.take(writing=writing)
        try:
            yield fd
        finally:
            self._file.give_back()

    @property
    def fd(self) -> int:
        """As `descriptor`, for reading and, where the disk lets us, writing, but from now on until the last `close`."""
        if self._pinned is None:
            with disk_errors(self.path, "opening a blob"):
                self._pinned = self._file.take()
        return self._pinned

    def has(self, chunk: int) -> bool:
        """Whether `chunk` may be read."""
        return self._map.has(chunk)

    def missing(self, extent: Extent) -> list[int]:
        """The chunks that `extent` touches and that may not be read yet, in order."""
        return self._map.missing(self.grid.chunks(extent))

    @property
    def cached_bytes(self) -> int:
        """Bytes that may be read. Less than the listing's `cached` while chunks are in doubt."""
        return self._map.present_bytes

    @property
    def complete(self) -> bool:
        """Whether every chunk may be read. A blob of size zero is, at once."""
        return self._map.complete

    @property
    def sealed(self) -> bool:
        """Whether the whole blob matched its id and is safe on the disk."""
        return self._map.sealed

    @property
    def prefix_end(self) -> int:
        """Bytes from the start on that may be read without a gap."""
        return min(self._map.prefix * self.grid.chunk_size, self.size)

    @property
    def generation(self) -> int:
        """Grows whenever a readable chunk becomes absent (`clear`, `discard`).

        Who reads bytes without the trio thread in between looks at it before `has` and after the read; who digests the blob, before the
        first byte, and passes it to `seal`.
        """
        return self._map.generation

    @property
    def doubtful(self) -> Sequence[int]:
        """Chunks that a host crash put in doubt: missing, until `recovery.settle_doubtful` has looked, or they are fetched again."""
        return self._map.doubtful

    def digest(self, chunk: int) -> bytes | None:
        """The recorded digest of `chunk`, None where it is absent. Raises CacheBroken."""
        return self._map.digest(chunk)

    def record(self, chunk: int, digest: bytes) -> None:
        """Notes that all bytes of `chunk` are in the data file and have this xxh3-128 (16 bytes).

        Raises NoSpace and CacheBroken, after which the chunk is missing; Corrupt where a sealed blob has another digest for it.
        """
        self._written = True
        try:
            self._map.record(chunk, digest)
        finally:
            self._note()

    def settle(self, chunk: int, digest: bytes, *, good: bool) -> bool:
        """Ends the doubt about `chunk`, whose bytes were compared with `digest`: see `ChunkMap.settle`. For `manta.cache.recovery`."""
        try:
            return self._map.settle(chunk, digest, good)
        finally:
            self._note()

    def clear(self, chunk: int) -> None:
        """Makes `chunk` missing, because its bytes are damaged. SLOW where the blob was sealed. Raises NoSpace and CacheBroken."""
        try:
            self._map.clear(chunk)
        finally:
            self._note()

    def discard(self, reason: str) -> None:
        """Makes every chunk missing, because the whole does not match the blob's id. SLOW where the blob was sealed.

        The data file stays as it is, to be overwritten in place: a reader that is between `has` and its read gets the bytes that were
        there, never zeros, and open descriptors stay good. `generation` tells it. What the kernel has cached of the file through a mount
        is the caller's to invalidate. Raises NoSpace and CacheBroken; also then every chunk is missing.
        """
        logger.warning("Discarding the %d cached bytes of %s: %s", self.cached_bytes, self.id, reason)
        try:
            self._map.reset()
        finally:
            self._note()

    def seal(self, generation: int | None = None) -> None:
        """SLOW: makes data and map durable and marks the blob as verified. The caller has compared its digest with its id.

        `generation` is what it was before that digest was begun (None: what it is now). Raises Corrupt where a chunk is or went missing;
        NoSpace and CacheBroken, and where it was the data that the disk did not take, every chunk is missing after that.
        """
        with self.hold(), self._sealing, self.descriptor() as fd:
            if self.sealed:
                return
            generation = self.generation if generation is None else generation
            try:
                os.fdatasync(fd)
            except OSError as error:
                self._lost(error)
                raise disk_error(error, self.path, "sealing a blob") from error
            try:
                self._map.mark_sealed(generation)
            finally:
                self._note()
            with disk_errors(self.path, "sealing a blob"):
                fsync_directory(self.path.parent)
                fsync_directory(self.path.parent.parent)

    def check_written(self) -> None:
        """Makes every chunk missing where the disk did not take what was written in the background. Sealed blobs were taken."""
        if self.sealed:
            return
        with self.descriptor() as fd:
            error = writeback_error(fd)
        if error is not None:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """After a failed sync the kernel calls pages clean although the disk does not have them: later reads could be wrong. Without its
        map the blob begins with new files when it is opened next."""
        with suppress(MantaError):
            self.discard(f"the disk did not take it ({error.strerror})")
        with suppress(OSError):
            remove_map(self._map.path)

    def hold(self) -> Self:
        """One more holder, who calls `close` too: for work in a thread that outlives the caller. ``with blob.hold(): ...``"""
        self._store._hold(self)
        return self

    def close(self) -> None:
        """Gives it back. The last one closes the descriptors and notes the time on the data file. Raises ValueError where it is closed."""
        self._store._give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _unpin(self) -> None:
        if self._pinned is not None:
            self._pinned = None
            self._file.give_back()

    def _note(self) -> None:
        # Looked up under the lock, so that of two threads the later writes the later number.
        with self._noting:
            self._store._noted(self)


class Store:
    """The blobs of one cache directory. It is this process's alone until `close` or the process ends."""

    def __init__(
        self,
        directory: Path,
        *,
        chunk_size: int = CHUNK_SIZE,
        descriptors_max: int = IDLE_MAX,
        journal: Path | None = None,
        boot_id: bytes | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """SLOW: locks and prepares the directory, and scans it. `descriptors_max`: cache files kept open while nobody uses them.
        `journal` is a file on another disk, see `manta.cache.condemned`;
        `boot_id` (None: `manta.cache.incarnation`) and `clock` (epoch seconds) are for tests.

        Raises InUse where another daemon has the directory, Invalid where it is none of ours, NoSpace, and CacheBroken where it cannot be
        read and written.
        """
        self.layout = Layout(directory)
        self._chunk_size = chunk_size
        self._clock = clock
        self._fixed_boot_id = boot_id
        self._lock = threading.RLock()
        self._open: dict[BlobId, Blob] = {}
        self._descriptors = Descriptors(descriptors_max)
        self._unsynced: dict[BlobId, tuple[int, int]] = {}
        """Closed unsealed: their size, and a descriptor to hear of failed writes."""
        self.layout.claim()
        self._directory_lock = DirectoryLock(self.layout.lock)
        try:
            self.layout.prepare()
            self._device = os.stat(directory).st_dev
            self._condemned = Condemned(self.layout, journal)
            self._inventory = self._scanned()
        except BaseException:
            self._directory_lock.release()
            raise
        self._stamp_refused = False

    def _scanned(self) -> Inventory:
        self._boot_id = incarnation(self.directory) if self._fixed_boot_id is None else self._fixed_boot_id
        self.recovered = recovery.scan(self.layout)
        """What was found in the directory. Its `unsealed` blobs are complete and wait for their digest to be compared."""
        inventory = Inventory(info for info in self.recovered.blobs if info.id not in self._condemned)
        self.recovered.blobs.clear()  # the inventory has them, and keeps them true
        return inventory

    @property
    def directory(self) -> Path:
        return self.layout.directory

    @property
    def cached_bytes(self) -> int:
        """Bytes of all chunks in the cache."""
        return self._inventory.cached_bytes

    def cached_of(self, blobs: Mapping[BlobId, int]) -> int:
        """Bytes of `blobs` in the cache, each as many times as it says. Takes as long as the fewer of them and of the cache's blobs."""
        few = len(blobs) < len(self._inventory)
        infos = map(self._inventory.find, blobs) if few else self._inventory.listing()
        return sum(min(info.cached, info.size) * blobs.get(info.id, 0) for info in infos if info is not None)

    def disk_space(self) -> tuple[int, int]:
        """Bytes that the cache's disk has left for this user, and that it has in all. Raises CacheBroken."""
        with disk_errors(self.directory, "asking for free space"):
            status = os.statvfs(self.directory)
        return status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize

    # A directory that goes and comes back -------------------------------------------------------------------------------

    def look_after(self) -> bool:
        """SLOW: sees that the directory is still there and does what the disk refused before. True where it was gone and is ours again.

        It is made anew where it was removed, and taken again where what is there now is a cache. An empty directory on another disk is the
        place where ours was mounted: nothing is written there. Raises CacheBroken while it is gone; InUse, Invalid, NoSpace.
        """
        self._condemned.retry()
        self._check_written()
        if self._directory_lock.holds(self.layout.lock) and self.layout.blobs.is_dir():
            return False
        with disk_errors(self.directory, "looking for the cache directory"):
            self._check_return()
        self.layout.claim()
        lock = None if self._directory_lock.holds(self.layout.lock) else DirectoryLock(self.layout.lock)
        try:
            self.layout.prepare()
            device = os.stat(self.directory).st_dev
            inventory = self._scanned()
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        with self._lock:
            for blob in self._open.values():
                blob._map.abandon()
                blob._file.abandon()  # whoever reads it reads on from a file that has no name any more
            self._open.clear()
            self._inventory, self._device = inventory, device
            if lock is not None:
                self._directory_lock.release()
                self._directory_lock = lock
        logger.warning(
            "The cache directory %s was gone and is used again: %d blobs are in it.",
            self.directory,
            len(inventory.listing()),
        )
        return True

    def _check_written(self) -> None:
        for blob in [blob for blob in self._open.values() if blob._written]:
            with suppress(ValueError), blob.hold():  # closed meanwhile
                blob.check_written()
        for blob_id in list(self._unsynced):
            size, fd = self._unsynced.pop(blob_id, (0, -1))
            if fd < 0:
                continue  # removed meanwhile
            try:
                os.fdatasync(fd)
            except OSError as error:
                with suppress(MantaError), self.open_blob(blob_id, size, use=False) as closed:
                    closed._lost(error)
            finally:
                os.close(fd)

    def _forget_unsynced(self, blob: BlobId) -> None:
        _, fd = self._unsynced.pop(blob, (0, -1))
        if fd >= 0:
            os.close(fd)

    def _check_return(self) -> None:
        """Raises OSError (ENOENT) where what is at our path now is not for us to use."""
        if self.layout.version.exists():
            return
        there = self.directory if self.directory.exists() else self.directory.parent
        if os.stat(there).st_dev != self._device:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def find(self, blob: BlobId) -> BlobInfo | None:
        """What the cache has of `blob`, open or not; None for nothing."""
        return self._inventory.find(blob)

    def listing(self) -> list[BlobInfo]:
        """Every blob in the cache, in no order. From memory."""
        return self._inventory.listing()

    def open_blob(self, blob: BlobId, size: int, *, use: bool = True) -> Blob:
        """The blob with that id and size, of which the cache may have all, some or nothing. The caller closes it.

        `use` False: to look after it, which does not make it recently used.
        The first to open it pays for a few system calls and the reading of its map. Raises Corrupt where the cache has it open or sealed
        with another size, NoSpace and CacheBroken; then nothing of it is left behind.
        """
        if not 0 <= size <= SIZE_MAX:
            raise Corrupt(f"The origin says that {blob} has {size} bytes; no file can have that. Ask it again.")
        with self._lock:
            opened = self._open.get(blob)
            known = self._inventory.find(blob)
            if known is not None and known.size != size and (known.sealed or opened is not None):
                raise Corrupt(
                    f"The origin says that {blob} has {size} bytes; the cache has it with {known.size}."
                    f" Ask the origin again, or remove it with `manta cache rm {blob}`."
                )
            if opened is not None:
                opened._holders += 1
                opened._used = opened._used or use
                return opened
            with disk_errors(self.layout.data(blob), "opening a blob"):
                opened = self._open_files(blob, ChunkGrid(size, self._chunk_size), known is not None)
            self._open[blob] = opened
            opened._used = use
            now = self._clock() if use or known is None else known.last_used
            self._inventory.put(BlobInfo(blob, size, opened._map.kept_bytes, opened.sealed, now, in_use=True))
            self._stamp(opened, now)
            return opened

    def remove(self, blob: BlobId) -> int:
        """SLOW: takes `blob` out of the cache. Returns the bytes of its chunks. Raises InUse where it is open, Absent and CacheBroken."""
        data = self.layout.data(blob)
        doomed = data.with_name(data.name + DOOMED_SUFFIX)
        with self._lock, disk_errors(data, "removing a blob"):
            known = self._inventory.find(blob)
            if known is None:
                raise Absent(f"{blob} is not in the cache.")
            if blob in self._open:
                raise InUse(f"{blob} is open. Close the programs that read it, or unmount it, and try again.")
            # The map first: a map must never be found beside data that is not its own.
            self.layout.map(blob).unlink(missing_ok=True)
            self._inventory.drop(blob)
            self._forget_unsynced(blob)  # or its space would stay taken
            with suppress(FileNotFoundError):
                os.rename(data, doomed)
        # The unlink of a large file takes time: the name is free already, and who asks for the blob meanwhile gets a new file.
        with disk_errors(data, "removing a blob"):
            doomed.unlink(missing_ok=True)
        return known.cached

    def close(self) -> None:
        """Closes what is open, whoever holds it, and gives the directory free. Everything recorded stays. Does nothing the second time.

        Work in threads has ended before; what has not gets ValueError and changes nothing any more.
        """
        with self._lock:
            for blob in list(self._open.values()):
                blob._holders = 1
                blob.close()
            self._condemned.retry()
            for blob_id in list(self._unsynced):
                self._forget_unsynced(blob_id)
            self._directory_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _open_files(self, blob: BlobId, grid: ChunkGrid, known: bool) -> Blob:
        data, map_path = self.layout.data(blob), self.layout.map(blob)
        created = not known and not data.exists()
        if created:
            data.parent.mkdir(mode=0o700, exist_ok=True)
        if blob in self._condemned:
            self._condemned.retry()
            if blob in self._condemned:
                raise CacheBroken(
                    f"{blob} has damaged chunks, and the cache disk lets nobody forget them: it is not read. Make the disk writable"
                    " (the kernel log says why it is not)."
                )
        read_only = False
        try:
            fd = os.open(data, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS or created:
                raise
            # What is cached can still be read.
            fd, read_only = os.open(data, os.O_RDONLY | os.O_CLOEXEC), True
        try:
            chunk_map = ChunkMap.load(map_path, blob, grid, self._boot_id, self._descriptors)
            if chunk_map is None or os.fstat(fd).st_size != grid.size:
                # The map first: a map must never be found beside data that is not its own. A new file, because the disk may have
                # spoiled the old one in a way that no truncation mends.
                map_path.unlink(missing_ok=True)
                data.unlink(missing_ok=True)
                replacement = os.open(data, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                os.dup2(replacement, fd, inheritable=False)
                os.close(replacement)
                created = True
                os.ftruncate(fd, grid.size)
                chunk_map = ChunkMap.create(map_path, blob, grid, self._boot_id, self._descriptors)
            file = CacheFile(self._descriptors, data, fd, writable=not read_only)
        except BaseException:
            os.close(fd)
            if created:
                with suppress(OSError):
                    data.unlink()
            raise
        opened = Blob(self, file, chunk_map)
        opened.check_written()
        return opened

    def _hold(self, blob: Blob) -> None:
        with self._lock:
            if blob._holders < 1:
                raise ValueError(f"{blob.id} is closed")
            blob._holders += 1

    def _give_back(self, blob: Blob) -> None:
        with self._lock:
            if blob._holders < 1:
                raise ValueError(f"{blob.id} is closed")
            blob._holders -= 1
            if blob._holders:
                return
            doubtful = blob._written and not blob.sealed and blob.id not in self._unsynced
            if doubtful and len(self._unsynced) < UNSYNCED_MAX:
                with suppress(OSError), blob._file.used() as fd:
                    self._unsynced[blob.id] = blob.size, os.dup(fd)
            if blob._used:
                now = self._clock()
                self._stamp(blob, now)
            if self._open.get(blob.id) is blob:
                self._inventory.update(blob.id, last_used=now if blob._used else None, in_use=False)
                del self._open[blob.id]
            blob._map.close()
            blob._file.close()
            blob._unpin()

    def _noted(self, blob: Blob) -> None:
        """What is known of an open blob has changed."""
        if blob._map.condemned:
            self._condemned.add(blob.id)
        if self._open.get(blob.id) is blob:
            self._inventory.update(blob.id, cached=blob._map.kept_bytes, sealed=blob._map.sealed)

    def _stamp(self, blob: Blob, now: float) -> None:
        """The data file's time is when the blob was last used: two cheap calls per use, and none per read."""
        try:
            os.utime(blob.path, (now, now))
            self._stamp_refused = False
        except OSError as error:
            if self._stamp_refused:
                return  # said once
            self._stamp_refused = True
            logger.warning("Cannot note the time of use on %s: %s", blob.path, error.strerror)
