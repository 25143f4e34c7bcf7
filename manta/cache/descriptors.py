"""Descriptors of cache files, a bounded number of them, here and only here.

Thousands of blobs can be open at once, and a process may have as few as 1024 descriptors. So a file is opened when it is used, stays
open while it is among the latest used, and is opened again by its path later; what lies there must be the same file, or it is not taken.
Used for data files and chunk maps. Any thread.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

IDLE_MAX = 2048
"""Descriptors kept of files that nobody uses: of 1024 blobs, with their maps. To open one again takes 10 µs."""

RESERVED = 512
"""Descriptors for all else: control clients, workers, requests to the hub, and the files that are being read or fetched."""

IDLE_MIN = 16


def allowance() -> int:
    """Raises this process's limit on open files as far as it may go; returns how many descriptors may be kept idle within it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY or soft >= RESERVED + IDLE_MAX:
        return IDLE_MAX
    if soft < RESERVED:
        log.warning(
            "this process may open %d files, and Manta may need %d: raise the limit (LimitNOFILE, ulimit -Hn)",
            soft,
            RESERVED,
        )
    return max(soft - RESERVED, IDLE_MIN)


class Descriptors:
    """At most `bound` descriptors of files that nobody uses right now, the latest used; those in use come on top."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._idle: OrderedDict[CacheFile, None] = OrderedDict()

    def __len__(self) -> int:
        """Files that are open and not in use."""
        return len(self._idle)


class CacheFile:
    """One file of the cache: open while it is used, and for a while after."""

    def __init__(self, descriptors: Descriptors, path: Path, fd: int = -1, *, writable: bool = True) -> None:
        """Takes over `fd`; -1: it is opened when it is used. `writable` False: it is open for reading only."""
        self.path = path
        self._all = descriptors
        self._fd = fd
        self._writable = writable
        self._status = os.fstat(fd) if fd >= 0 else None
        self._uses = 1
        self._closed = False
        self._abandoned = False
        self.give_back()

    def take(self, *, writing: bool = False) -> int:
        """A descriptor that is good until `give_back`, for reading or also for writing.

        Raises OSError where it cannot be opened again: ESTALE where it is not the same file. ValueError where it is closed.
        """
        with self._all._lock:
            if self._closed:
                raise ValueError(f"{self.path} is closed")
            if self._fd < 0:
                self._fd, self._writable = self._open(writing)
            elif writing and not self._writable:
                writable, _ = self._open(writing)
                # In place, under the number that readers have.
                os.dup2(writable, self._fd, inheritable=False)
                os.close(writable)
                self._writable = True
            self._uses += 1
            self._all._idle.pop(self, None)
            return self._fd

    def give_back(self) -> None:
        with self._all._lock:
            self._uses -= 1
            if self._uses:
                return
            if self._closed:
                self._shut()
            elif self._fd >= 0:
                self._all._idle[self] = None
                while len(self._all._idle) > self._all._bound:
                    oldest, _ = self._all._idle.popitem(last=False)
                    oldest._shut()

    @contextmanager
    def used(self, *, writing: bool = False) -> Iterator[int]:
        """``with file.used() as fd: ...``; raises as `take`."""
        fd = self.take(writing=writing)
        try:
            yield fd
        finally:
            self.give_back()

    def rest(self) -> None:
        """Shuts it until it is used again, for one that rarely is."""
        with self._all._lock:
            if not self._uses:
                self._all._idle.pop(self, None)
                self._shut()

    @property
    def ours(self) -> bool:
        """Whether what is at its path is still this file, for us to change."""
        return not (self._closed or self._abandoned)

    def abandon(self) -> None:
        """What is at its path from now on is another file: once this one is shut it is not opened again."""
        with self._all._lock:
            self._abandoned = True

    def close(self) -> None:
        """No use can begin any more; one that has begun goes on to its end."""
        with self._all._lock:
            self._closed = True
            if not self._uses:
                self._all._idle.pop(self, None)
                self._shut()

    # With the lock held --------------------------------------------------------------------------------------------------

    def _open(self, writing: bool) -> tuple[int, bool]:
        """A new descriptor, and whether it can be written to: on a disk that is read-only what is cached can still be read."""
        if self._abandoned:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        writable = True
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EROFS or writing:
                raise
            fd, writable = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), False
        status = os.fstat(fd)
        if self._status is not None and not os.path.samestat(status, self._status):
            os.close(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self._status = status
        return fd, writable

    def _shut(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
