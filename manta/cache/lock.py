"""The lock that makes one daemon the only writer of a cache directory, here and only here. Used by `manta.cache.store`.

An flock, so the kernel releases it however the daemon ends. The file's content, the holder's pid, is only for the sentence about it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from manta.cache.disk import disk_errors
from manta.errors import InUse


class DirectoryLock:
    """Held from its creation to `release` or the end of the process. Its descriptor is not inherited by programs that are started."""

    def __init__(self, path: Path) -> None:
        """Takes the lock at `path` without waiting. Raises InUse with the holder's pid, and CacheBroken."""
        with disk_errors(path, "locking the cache directory"):
            while True:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    holder = os.read(self._fd, 32).decode("ascii", "replace").strip()
                    os.close(self._fd)
                    who = f"the daemon with pid {holder}" if holder.isdecimal() else "another daemon"
                    raise InUse(
                        f"The cache {path.parent} is in use by {who}. Stop it (`manta umount` its mounts), or name another cache directory."
                    ) from None
                except OSError:
                    os.close(self._fd)
                    raise
                if self.holds(path):
                    break
                os.close(
                    self._fd
                )  # someone removed the file between open and lock: what is locked is not what others will find
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def holds(self, path: Path) -> bool:
        """Whether the file at `path` is the one that is locked: it may have been removed, or its disk unmounted."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(path))
        except OSError:
            return False

    def release(self) -> None:
        """Does nothing the second time."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
