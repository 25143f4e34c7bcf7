"""How an error of the cache's disk becomes one of Manta's, and how a small file is replaced, here and only here.

Used by the rest of `manta.cache`, and by whoever reads a blob's descriptor itself (`disk_error`). Any thread may call it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manta.errors import CacheBroken, MantaError, NoSpace

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that is being written and not yet in its place. One that is found later is left over from a crash."""

_SYNC_FILE_RANGE_WAIT_BEFORE = 1
_PAGE_BYTES_MAX = 1 << 21

_REMEDY = {
    errno.EROFS: "Remount its filesystem writable (the kernel log says why it is not), or name another cache directory.",
    errno.ENOENT: "The cache directory was removed or unmounted while in use: bring it back, and it is used again.",
    errno.ESTALE: "The cache directory was removed while this was open: close the programs that read it, and open it again.",
    errno.EACCES: "Give the daemon's user the rights to it, or name another cache directory.",
    errno.EPERM: "Give the daemon's user the rights to it, or name another cache directory.",
    errno.EMFILE: "Raise the daemon's limit on open files (LimitNOFILE, ulimit -n).",
    errno.ENFILE: "Raise the machine's limit on open files (sysctl fs.file-max).",
}
_REMEDY_OTHERWISE = "Check that disk (the kernel log says more), or name another cache directory."


def disk_error(error: OSError, path: Path, doing: str) -> MantaError:
    """What `error` means for the cache: NoSpace for a full disk or quota, else CacheBroken.

    `doing` is a clause such as "recording a chunk"; it starts the sentence.
    """
    attempt = f"{doing[:1].upper()}{doing[1:]} in {path} failed"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return NoSpace(f"{attempt}: the disk is full. Free space on it, or shrink the cache with `manta cache gc`.")
    reason = error.strerror or str(error)
    return CacheBroken(f"{attempt}: {reason}. {_REMEDY.get(error.errno or 0, _REMEDY_OTHERWISE)}")


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Raises what `disk_error` makes of an OSError from within."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, doing) from error


def writeback_error(fd: int) -> OSError | None:
    """Why the disk did not take what was written to a file that `fd` has open, told once; None where it took everything so far.

    The kernel calls pages clean that it could not write: it drops them when it likes, and then a read gives what the disk has. It tells
    of it at the next sync; this asks without waiting for any write (a range beyond the end has none).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    beyond = ctypes.c_int64(os.fstat(fd).st_size + _PAGE_BYTES_MAX)
    if libc.sync_file_range(fd, beyond, ctypes.c_int64(1), _SYNC_FILE_RANGE_WAIT_BEFORE) == 0:
        return None
    number = ctypes.get_errno()
    # A filesystem or a sandbox without the call: the seal's fdatasync tells.
    return OSError(number, os.strerror(number)) if number in {errno.EIO, errno.ENOSPC, errno.EDQUOT} else None


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Writes all of `data`: a disk that fills up takes a part first and refuses only the next call. Raises OSError."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset += written
        rest = rest[written:]


def fsync_directory(directory: Path) -> None:
    """SLOW. Makes the creations, renames and removals in `directory` survive a host crash. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """SLOW. Puts `data` at `path` so that after any crash there is the old content or the new. Raises OSError.

    One writer per path at a time: the temporary name is fixed, so that a crash leaves at most one behind, and the next write takes it.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            pwrite_all(fd, data, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)
