"""Compares chunks of a cache file with their digests, in the digest worker's threads; here and only here.

A verification reads what nobody asked for: what it brings into the page cache it takes out again, so that it does not push out what readers
use. Whether a chunk was there before is asked of the kernel (cachestat, Linux 6.5); an older kernel keeps what is read.
"""

from __future__ import annotations

import ctypes
import os

from manta.cache.digests import READ_BYTES, extent_digest
from manta.errors import Corrupt
from manta.model.extents import Extent
from manta.wire.messages import Verified, Verify

_SYS_CACHESTAT = 451
"""On every architecture: it came after their numbers were unified."""


class _Range(ctypes.Structure):
    _fields_ = (("at", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def verify(order: Verify, fd: int) -> Verified:
    """SLOW. What cannot be read counts as damaged: nobody else can read it either."""
    buffer = bytearray(READ_BYTES)
    damaged = []
    # Asked before the first is read: the kernel's readahead runs into the next.
    cached = [_mostly_cached(fd, Extent(start, end)) for start, end, _ in order.chunks]
    for (start, end, digest), was_cached in zip(order.chunks, cached, strict=True):
        extent = Extent(start, end)
        try:
            if extent_digest(fd, extent, buffer) != digest:
                damaged.append((start, "does not match its digest"))
        except OSError as e:
            damaged.append((start, f"cannot be read from the cache disk ({e.strerror})"))
        except Corrupt:
            damaged.append((start, "is missing: the cache file is too short"))
        if not was_cached:
            os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
    return Verified(order.order, damaged)


def _mostly_cached(fd: int, extent: Extent) -> bool:
    """Whether more than half of `extent` is in the page cache: the readahead of an earlier order may have brought its beginning."""
    asked, pages = _Range(extent.start, len(extent)), _Pages()
    if ctypes.CDLL(None).syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(pages), 0) != 0:
        return True
    return bool(pages.cached * os.sysconf("SC_PAGESIZE") > len(extent) // 2)
