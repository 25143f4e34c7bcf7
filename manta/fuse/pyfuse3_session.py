"""The portable FUSE session: pyfuse3 (libfuse 3) drives `manta.fs.filesystem`. A thin adapter; here and only here is pyfuse3 known.

libfuse allows one session per process, and it runs in the daemon's trio thread. Works for root (mount(2)) and for other users
(fusermount3).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyfuse3
import trio

from manta.errors import Absent, Denied, MantaError, Unavailable
from manta.fs.filesystem import (
    BLOCK_BYTES,
    MTIME_NS,
    NAME_BYTES_MAX,
    PREFERRED_READ_BYTES,
    Attributes,
    Filesystem,
)
from manta.fuse.errno import errno_of

log = logging.getLogger(__name__)

REQUESTS_MAX = 8192
"""FUSE requests served at once. A read that waits for the network holds one, and must not keep out a lookup or the read of a cached file:
so this is twice what the kernel sends of its own accord (`kernel_settings.BACKGROUND_MAX`). A waiting read takes about 9 KB."""

LISTED_MAX = 512
"""Entries in one reply to a listing. The kernel has room for thousands, and readers would wait for 10 µs times that."""

_MODES = {
    "folder": pyfuse3.ModeT(stat.S_IFDIR | 0o555),
    "file": pyfuse3.ModeT(stat.S_IFREG | 0o444),
    "link": pyfuse3.ModeT(stat.S_IFLNK | 0o777),
}


class _Operations(pyfuse3.Operations):
    """Requests of the kernel, each one call into the filesystem. Whatever goes wrong becomes an errno, here."""

    supports_dot_lookup = False
    enable_acl = False
    enable_writeback_cache = False

    def __init__(self, filesystem: Filesystem, refused: Callable[[MantaError], None]) -> None:
        super().__init__()
        self._fs = filesystem
        self._refused = refused
        self._reply = reply = pyfuse3.EntryAttributes()
        reply.st_nlink = 1
        reply.st_uid, reply.st_gid = os.getuid(), os.getgid()
        reply.st_blksize = PREFERRED_READ_BYTES
        reply.st_atime_ns = reply.st_mtime_ns = reply.st_ctime_ns = MTIME_NS

    def _refuse(self, e: Exception) -> pyfuse3.FUSEError:
        if not isinstance(e, MantaError):
            log.exception("a request failed in an unforeseen way", exc_info=e)
        else:
            log.info("a request was refused: %s", e.message)
            self._refused(e)
        return pyfuse3.FUSEError(errno_of(e))

    def _entry(self, a: Attributes) -> pyfuse3.EntryAttributes:
        """For the reply that is made before the next checkpoint: there is one such object, since most of it never changes."""
        entry = self._reply
        entry.st_ino = pyfuse3.InodeT(a.inode)
        entry.st_mode = _MODES[a.kind]
        entry.st_size = a.size
        entry.st_blocks = -(-a.size // 512)
        entry.attr_timeout = a.valid_s
        entry.entry_timeout = a.name_valid_s
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self._fs.look_up(parent_inode, name))
        except Absent:
            # Inode 0 with a timeout: the kernel remembers that the name is absent.
            absent = pyfuse3.EntryAttributes()
            absent.st_ino = pyfuse3.InodeT(0)
            absent.entry_timeout = self._fs.absence_valid_s(parent_inode)
            return absent
        except Exception as e:
            raise self._refuse(e) from e

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        for inode, lookups in inode_list:
            self._fs.forget(inode, lookups)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            return self._entry(await self._fs.attributes(inode))
        except Exception as e:
            raise self._refuse(e) from e

    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        try:
            return pyfuse3.FileNameT(await self._fs.read_link(inode))
        except Exception as e:
            raise self._refuse(e) from e

    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        try:
            return pyfuse3.FileHandleT((await self._fs.open_folder(inode)).handle)
        except Exception as e:
            raise self._refuse(e) from e

    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        try:
            # libfuse does not say which folder it is; its handles are all of this daemon.
            listing = await self._fs.list_folder(fh, 0, start_id)
            for listed in itertools.islice(listing, LISTED_MAX):
                if not pyfuse3.readdir_reply(
                    token, pyfuse3.FileNameT(listed.name), self._entry(listed.attributes), listed.following
                ):
                    return
                self._fs.told(listed)
        except Exception as e:
            raise self._refuse(e) from e

    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._fs.close_folder(fh)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        try:
            opened = await self._fs.open_file(inode, ctx.pid)
        except Exception as e:
            raise self._refuse(e) from e
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(opened.handle), keep_cache=opened.keep_cache, direct_io=not opened.keep_cache
        )

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        try:
            # pyfuse3 takes any buffer, and copies it to the kernel before it yields.
            return await self._fs.read(fh, off, size)  # type: ignore[return-value]
        except MantaError as e:
            # The log has it already, with the read's id.
            self._refused(e)
            raise pyfuse3.FUSEError(errno_of(e)) from e
        except Exception as e:
            raise self._refuse(e) from e

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._fs.close_file(fh)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        totals = self._fs.totals()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = -(-totals.size // BLOCK_BYTES)
        data.f_bfree = data.f_bavail = 0
        data.f_files = totals.files
        data.f_ffree = data.f_favail = 0
        data.f_namemax = NAME_BYTES_MAX
        return data

    async def getxattr(self, inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        try:
            found = (await self._fs.extended_attributes(inode)).get(os.fsdecode(name))
        except Exception as e:
            raise self._refuse(e) from e
        if found is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return os.fsencode(found)

    async def listxattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        try:
            return [os.fsencode(name) for name in await self._fs.extended_attributes(inode)]
        except Exception as e:
            raise self._refuse(e) from e

    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        return not mode & os.W_OK


class Pyfuse3Session:
    """One mount. `mount`, then `serve` until the filesystem is unmounted, then `close`. `refused` hears why a request got an error."""

    name = "pyfuse3"
    native = False
    resends = False
    native_refusal = ""

    def __init__(self, filesystem: Filesystem, refused: Callable[[MantaError], None]) -> None:
        self._operations = _Operations(filesystem, refused)
        self._nursery: trio.Nursery | None = None

    def mount(self, directory: Path, source: str) -> None:
        """Mounts on `directory`, called `source` in mountinfo. Raises Unavailable or Denied with what to do.

        libfuse prints its own reason to stderr, which is the daemon's log.
        """
        options = {f"fsname={source}", "subtype=manta", "ro", "default_permissions"}
        if os.getuid() == 0:
            options.add("allow_other")
        if not os.path.exists("/dev/fuse"):
            raise Unavailable(
                "FUSE is not there: /dev/fuse does not exist. Load the module with `modprobe fuse`; in a container, pass the device"
                " (--device /dev/fuse, and CAP_SYS_ADMIN)."
            )
        if not os.access("/dev/fuse", os.R_OK | os.W_OK):
            raise Denied("/dev/fuse may not be opened by this user. Ask an administrator, or run as root.")
        try:
            pyfuse3.init(self._operations, str(directory), options)
        except RuntimeError as e:
            raise Denied(
                f"The FUSE filesystem could not be mounted on {directory}: {e}. `manta doctor` checks /dev/fuse, fusermount3 and the"
                " privileges; as root in a container, CAP_SYS_ADMIN is needed."
            ) from e

    async def serve(self, *, resend: bool = False) -> None:
        """Answers the kernel until the filesystem is unmounted or this is cancelled. `resend` is for sessions that can be taken over."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await pyfuse3.main(min_tasks=4, max_tasks=REQUESTS_MAX)
            finally:
                self._nursery = None
            nursery.cancel_scope.cancel()

    @staticmethod
    def forget_name(name: str) -> None:
        """Has the kernel drop a name in the top directory that is gone. Returns at once: a thread of pyfuse3's does it."""
        # Not as one that was deleted: where readers are still in it (umount --lazy) the kernel would refuse, and the log would cry wolf.
        pyfuse3.invalidate_entry_async(pyfuse3.ROOT_INODE, pyfuse3.FileNameT(os.fsencode(name)), ignore_enoent=True)

    def forget_pages(self, nodeids: Iterable[int]) -> None:
        """Has the kernel drop what it cached of these files. Returns at once."""
        for nodeid in nodeids:
            if self._nursery is not None:
                self._nursery.start_soon(self._forget, nodeid)

    @staticmethod
    async def _forget(nodeid: int) -> None:
        """In a thread: it may wait for a page under read, which this thread serves."""
        with contextlib.suppress(OSError):  # ENOENT: the kernel does not know the inode
            await trio.to_thread.run_sync(
                pyfuse3.invalidate_inode, pyfuse3.InodeT(nodeid), False, abandon_on_cancel=True
            )

    def close(self) -> None:
        """Unmounts where it still is, and ends the session."""
        pyfuse3.close(unmount=True)
