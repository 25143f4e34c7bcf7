"""What the kernel is told about a FUSE mount once it is there: readahead and queue depths, here and only here. Needs root.

The INIT handshake cannot ask for these (facts/fuse.md: the kernel offers 128 KiB of readahead whatever is asked).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

_MNT_DETACH = 2

BACKGROUND_MAX = 4096
"""Reads that the kernel has under way on its own account (readahead), which is how nearly every read comes. The others wait in one queue,
those of cached files too: with 512, the first reads of 1000 files at a stalled hub kept every cached file from being read."""


def apply(device: str, readahead_kib: int, scratch: Path) -> bool:
    """Sets them for the mount with this MAJOR:MINOR. False, with a line in the log, where that is not permitted.

    `scratch`: a directory of ours, see `_connection`.
    """
    done = _write(Path("/sys/class/bdi") / device / "read_ahead_kb", readahead_kib)
    with _connection(device, scratch) as connection:
        done &= _write(connection / "max_background", BACKGROUND_MAX)
        done &= _write(connection / "congestion_threshold", BACKGROUND_MAX * 3 // 4)
    return done


def abort(device: str, scratch: Path) -> bool:
    """Ends the connection: everything that waits for the filesystem gets an error. For a mount that nobody serves."""
    with _connection(device, scratch) as connection:
        return _write(connection / "abort", 1)


def _write(path: Path, value: int) -> bool:
    try:
        path.write_text(str(value))
    except OSError as e:
        log.info("%s stays as it is: %s", path, e.strerror)
        return False
    return True


@contextlib.contextmanager
def _connection(device: str, scratch: Path) -> Iterator[Path]:
    """The control directory of a FUSE connection. Where fusectl is not mounted (containers), it is for the moment, in `scratch`."""
    number = device.partition(":")[2]
    usual = Path("/sys/fs/fuse/connections") / number
    if usual.exists() or os.geteuid() != 0:
        yield usual
        return
    libc = ctypes.CDLL(None, use_errno=True)
    folder = scratch / "fusectl"
    folder.mkdir(exist_ok=True)
    mounted = libc.mount(b"fusectl", os.fsencode(folder), b"fusectl", 0, None) == 0
    try:
        yield folder / number
    finally:
        if mounted:
            libc.umount2(os.fsencode(folder), _MNT_DETACH)
        with contextlib.suppress(OSError):  # busy: the next daemon here uses it again
            folder.rmdir()
