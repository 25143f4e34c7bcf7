"""Where a chunk's bytes go: into the blob's cache file at their offset, digested on the way. Here and only here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from manta.cache.digests import RunningDigest, extent_digest, running_chunk_digest
from manta.errors import Corrupt
from manta.model.extents import Extent
from manta.worker.failure import OrderFailed, disk_failure

PROGRESS_BYTES_MIN = 128 * 1024
"""A reader's request is at least this large when it reads in order (the kernel's readahead), so less would wake it in vain."""

PROGRESS_SECONDS_MIN = 0.004
"""Bounds the messages of one transfer to 250 a second: the daemon spends about 0.1 ms on each."""


class ChunkSink:
    """Takes the bytes of one chunk, extent after extent. Not thread-safe; `fd` stays the caller's."""

    def __init__(
        self,
        fd: int,
        start: int,
        end: int,
        progress: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        watched: bool = True,
    ) -> None:
        self._fd = fd
        self._start = start
        self._end = end
        self._progress = progress
        self._clock = clock
        self.watched = watched
        """A reader waits: report bytes as they come. Otherwise `tell` is called now and then."""
        self.first_written: float | None = None
        """When the first bytes came, by `clock`."""
        self._digest: RunningDigest | None = running_chunk_digest()
        self._digested = start
        self._at = start
        self._told = start
        self._told_when = 0.0

    def begin(self, at: int) -> None:
        """The next bytes belong at `at`."""
        self.tell()
        self._at = self._told = at
        self._told_when = 0.0  # the first bytes of an extent are what a reader waits for: tell them at once

    def write(self, data: bytes | memoryview) -> None:
        """Raises OrderFailed (no_space, cache_broken) where the disk refuses."""
        if self.first_written is None:
            self.first_written = self._clock()
        view = memoryview(data)
        at = self._at
        try:
            while view:
                written = os.pwrite(self._fd, view, at)
                at += written
                view = view[written:]
        except OSError as e:
            raise disk_failure(e) from e
        if self._digest is not None:
            if self._digested == self._at:
                self._digest.update(data)
                self._digested = at
            else:
                self._digest = None  # out of order: `finish` reads the chunk back instead
        self._at = at
        if self.watched and (at - self._told >= PROGRESS_BYTES_MIN or self._told_when == 0.0):
            now = self._clock()
            if now - self._told_when >= PROGRESS_SECONDS_MIN:
                self.tell()
                self._told_when = now

    @property
    def at(self) -> int:
        """Where the next byte goes."""
        return self._at

    def tell(self) -> None:
        """Reports what has come and was not reported yet."""
        if self._at > self._told:
            self._progress(self._told, self._at)
            self._told = self._at

    def finish(self) -> bytes:
        """The chunk's digest, once all its bytes are in the file. Raises OrderFailed where they cannot be read back."""
        self.tell()
        if self._digest is not None and self._digested == self._end:
            return self._digest.digest()
        try:
            return extent_digest(self._fd, Extent(self._start, self._end))
        except OSError as e:
            raise disk_failure(e) from e
        except Corrupt as e:
            raise OrderFailed("cache_broken", "the cache file is shorter than what was written to it") from e
