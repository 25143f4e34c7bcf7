"""/dev/fuse: one connection to the kernel, and the system calls on it, here and only here. Needs root.

A connection lives as long as any process has its descriptor open; the keeper is one. It is non-blocking, for all who share it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import select
import struct
import tempfile
from pathlib import Path
from typing import Self

from manta.errors import Denied, Unavailable
from manta.fuse import protocol

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"

ANSWER_SECONDS_MAX = 5.0
"""The kernel asks for the handshake as it mounts; this long it is waited for."""

# linux/mount.h
_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MNT_DETACH = 2

# linux/fuse.h: _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32_t)
_BACKING_OPEN = 0x4010E501
_BACKING_CLOSE = 0x4004E502
_BACKING_MAP = struct.Struct("<iIQ")
_BACKING_ID = struct.Struct("<I")


def why_not() -> str:
    """Why this process cannot mount by itself, as a clause; empty where it can."""
    if os.geteuid() != 0:
        return "only root can mount without fusermount3"
    if not os.path.exists(DEVICE):
        return f"{DEVICE} does not exist"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened"
    return ""


class Device:
    """One connection. `fd` is its own; `close` ends it unless another process has it too."""

    def __init__(self, fd: int) -> None:
        """Takes over the descriptor of a connection that is there, see `mount`."""
        self.fd = fd
        os.set_blocking(fd, False)
        os.set_inheritable(fd, False)

    @classmethod
    def mount(cls, directory: Path, source: str) -> Self:
        """A new filesystem on `directory`, called `source` in mountinfo. Raises Denied, Unavailable with what to do."""
        try:
            device = cls(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
        except FileNotFoundError as e:
            raise Unavailable(
                f"FUSE is not there: {DEVICE} does not exist. Load the module with `modprobe fuse`; in a container, pass the device"
                " (--device /dev/fuse, and CAP_SYS_ADMIN)."
            ) from e
        except OSError as e:
            raise Denied(
                f"{DEVICE} may not be opened: {e.strerror}. In a container, pass the device (--device /dev/fuse)."
            ) from e
        options = f"fd={device.fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()},allow_other,default_permissions"
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        if libc.mount(source.encode(), os.fsencode(directory), b"fuse.manta", flags, options.encode()) != 0:
            number = ctypes.get_errno()
            device.close()
            raise Denied(
                f"The FUSE filesystem could not be mounted on {directory}: {os.strerror(number)}. `manta doctor` checks /dev/fuse and the"
                " privileges; in a container, CAP_SYS_ADMIN is needed."
            )
        return device

    def shake_hands(self, without: protocol.Init, max_background: int) -> protocol.Negotiated:
        """Answers the kernel's INIT, the first request of a new connection. Raises Unavailable where the kernel is too old or silent."""
        try:
            while True:
                ready, _, _ = select.select([self.fd], [], [], ANSWER_SECONDS_MAX)
                message = self.read() if ready else None
                if message is None:
                    raise Unavailable(
                        f"The kernel asked for no handshake within {ANSWER_SECONDS_MAX:g} s. Try --fuse pyfuse3."
                    )
                request = protocol.parse(message)
                if request.opcode != protocol.Opcode.INIT:
                    raise protocol.Malformed(f"opcode {request.opcode} before the handshake")
                offered = protocol.parse_init(request.body)
                agreed = protocol.negotiate(offered, without)
                self.write(protocol.answer(request.unique, protocol.init_out(agreed, max_background)))
                if offered.major == protocol.MAJOR:
                    return agreed  # a newer kernel asks once more, in our version
        except protocol.Malformed as e:
            raise Unavailable(
                f"The kernel's FUSE protocol is not one that this session speaks: {e}. Try --fuse pyfuse3."
            ) from e

    def read(self) -> bytes | None:
        """One request; None where there is none now. Raises OSError: ENODEV when the filesystem is unmounted."""
        while True:
            try:
                return os.read(self.fd, protocol.REQUEST_BYTES_MAX)
            except BlockingIOError:
                return None
            except OSError as e:
                # ENOENT: whoever asked has given up before we had it.
                if e.errno not in {errno.ENOENT, errno.EINTR}:
                    raise

    def write(self, *parts: bytes | memoryview) -> None:
        """One answer or notification. That nobody waits for it any more is no error. Raises OSError where the kernel does not take it."""
        try:
            os.writev(self.fd, parts)
        except OSError as e:
            # ENOENT: interrupted or aborted meanwhile. ENODEV: unmounted, which the next read tells.
            if e.errno not in {errno.ENOENT, errno.ENODEV}:
                raise

    def open_backing(self, fd: int) -> int:
        """The id by which answers to OPEN name the file `fd`. Raises OSError where the kernel or the file's filesystem refuses."""
        request = bytearray(_BACKING_MAP.pack(fd, 0, 0))
        backing: int = fcntl.ioctl(self.fd, _BACKING_OPEN, request, True)
        return backing

    def close_backing(self, backing: int) -> None:
        """Files that were opened with it keep it."""
        try:
            fcntl.ioctl(self.fd, _BACKING_CLOSE, _BACKING_ID.pack(backing))
        except OSError as e:
            log.debug("backing file %d could not be closed: %s", backing, e.strerror)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_BACKING_REFUSALS = {
    errno.ELOOP: "the cache is on a stacked filesystem, such as overlayfs",
    errno.EPERM: "it needs CAP_SYS_ADMIN in the initial user namespace",
    errno.EOPNOTSUPP: "the cache's filesystem does not support it",
}


def backing_refusal(error: OSError) -> str:
    """Why a file was not taken as a backing file, as a clause."""
    return _BACKING_REFUSALS.get(error.errno or 0, error.strerror or type(error).__name__)


def try_backing(directory: Path, without: protocol.Init = protocol.NOTHING) -> str:
    """Why the kernel would not read files below `directory` by itself, as a clause; empty where it would.

    Mounts for a moment, in a temporary folder, what nobody looks into. Raises Denied, Unavailable where nothing can be mounted.
    """
    with tempfile.TemporaryDirectory(prefix="manta-try-") as folder, tempfile.TemporaryFile(dir=directory) as file:
        device = Device.mount(Path(folder), "manta:try")
        try:
            if not device.shake_hands(without, 16).has(protocol.Init.PASSTHROUGH):
                return "this kernel does not offer it (Linux 6.9 does)"
            try:
                device.close_backing(device.open_backing(file.fileno()))
            except OSError as e:
                return backing_refusal(e)
            return ""
        finally:
            detach(Path(folder))
            device.close()


def detach(directory: Path) -> None:
    """Unmounts lazily what is on `directory`; nothing where nothing is."""
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(directory), _MNT_DETACH)
