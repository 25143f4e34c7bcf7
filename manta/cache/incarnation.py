"""Which life of the host and of the disk's mount a chunk map was written in, here and only here. Used by `manta.cache.store`.

While both go on, the kernel has every byte that was written, whether the daemon lives or not. After a crash of the host, and after a
filesystem was shut down by an error and mounted again, what was not fsynced may be lost or half there: unsealed chunks are then doubtful.
A mount in another mount namespace is another mount, so a daemon in a new container doubts too: that costs one read of what is unsealed,
no fetch.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from pathlib import Path
from uuid import UUID, uuid4

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# statx(2), which Python has from 3.15 on.
_AT_FDCWD = -100
_STATX_MNT_ID_UNIQUE = 0x4000  # Linux 6.8; older kernels give numbers out again
_STATX_BYTES = 256
_STX_MASK_AT, _STX_MNT_ID_AT = 0, 0x90


def incarnation(directory: Path) -> bytes:
    """16 bytes that change when the host boots, and when the filesystem of `directory` is mounted anew. Where the kernel does not say, they
    are never the same, so that everything is doubted."""
    try:
        boot = UUID(_BOOT_ID.read_text("ascii").strip()).bytes
    except (OSError, ValueError) as error:
        logger.warning("The kernel tells no boot id (%s): unsealed blobs are verified again at every start.", error)
        return uuid4().bytes
    mount = _mount_number(directory)
    return hashlib.blake2b(boot + mount.to_bytes(8, "little"), digest_size=16).digest() if mount else boot


def _mount_number(directory: Path) -> int:
    """A number that no other mount has had since the boot; 0 where the kernel has none."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    try:
        failed = ctypes.CDLL(None).statx(_AT_FDCWD, os.fsencode(directory), 0, _STATX_MNT_ID_UNIQUE, answer)
    except AttributeError:  # a C library without statx
        return 0
    told = int.from_bytes(answer.raw[_STX_MASK_AT : _STX_MASK_AT + 4], "little")
    if failed or not told & _STATX_MNT_ID_UNIQUE:
        return 0
    return int.from_bytes(answer.raw[_STX_MNT_ID_AT : _STX_MNT_ID_AT + 8], "little")
