"""The one table from Manta's errors to the numbers that the kernel gives to readers."""

from __future__ import annotations

import errno

from manta.errors import (
    Absent,
    CacheBroken,
    Corrupt,
    Denied,
    InUse,
    Invalid,
    MantaError,
    NoSpace,
    Superseded,
    Unavailable,
)

_ERRNO: dict[type[MantaError], int] = {
    Absent: errno.ENOENT,
    Denied: errno.EACCES,
    Invalid: errno.EINVAL,
    NoSpace: errno.ENOSPC,
    InUse: errno.EBUSY,
    # The kernel then looks the name up anew (LOOKUP_REVAL) and opens what that gives.
    Superseded: errno.ESTALE,
    # The reader cannot act on the difference, and programs know EIO; the sentence is in `manta status` and the log.
    Unavailable: errno.EIO,
    Corrupt: errno.EIO,
    CacheBroken: errno.EIO,
}


def errno_of(error: BaseException) -> int:
    """EIO for whatever the table does not name."""
    for kind in type(error).__mro__:
        if (number := _ERRNO.get(kind)) is not None:
            return number
    return errno.EIO
