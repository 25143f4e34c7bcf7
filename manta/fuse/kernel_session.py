"""The kernel session: drives `manta.fs.filesystem` by the kernel's own protocol on /dev/fuse, from trio. A thin adapter. Needs root.

It does what libfuse's bindings do not offer: sealed files are opened with their cache file behind them, so that reads and mmap of them
never come here (passthrough); and the connection can be taken over by the next daemon, which asks the kernel to send again what the one
before had not answered. Both are the kernel's to offer (Linux 6.9); without them everything else works.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import msgspec
import trio

from manta.errors import Absent, Corrupt, MantaError
from manta.fs.filesystem import (
    BLOCK_BYTES,
    MTIME_NS,
    NAME_BYTES_MAX,
    PREFERRED_READ_BYTES,
    Attributes,
    Filesystem,
    NativeFile,
)
from manta.fuse import protocol
from manta.fuse.device import Device, backing_refusal, detach
from manta.fuse.errno import errno_of
from manta.fuse.kernel_settings import BACKGROUND_MAX
from manta.fuse.protocol import NOTHING, Init, Inode, Opcode, Open, Request
from manta.fuse.turns import Turns

log = logging.getLogger(__name__)

REQUESTS_MAX = 2 * BACKGROUND_MAX
"""Requests served at once. A read that waits for the network holds one, and must not keep out a lookup or the read of a cached file: so
this is twice what the kernel sends of its own accord."""

NOTIFIERS_MAX = 4
"""Threads that tell the kernel what it must forget, each of which may wait for a reader of just that."""

_ROOT = 1
_MODES = {"folder": stat.S_IFDIR | 0o555, "file": stat.S_IFREG | 0o444, "link": stat.S_IFLNK | 0o777}


FEATURES = {
    "passthrough": Init.PASSTHROUGH,
    "resend": Init.HAS_RESEND,
    "readdirplus": Init.DO_READDIRPLUS,
    "max_pages": Init.MAX_PAGES,
}
"""What can be left unused, by the names that `fuse.without` takes."""


class _Refusal(Exception):
    """An answer that is an errno, for what is no error of Manta's."""

    def __init__(self, number: int) -> None:
        self.number = number


class KernelSession:
    """One connection: `mount` a new one or `adopt` one that is there, then `serve` until it is unmounted, then `close`.

    `refused` hears why a request got an error. `without`: features of the kernel that are not to be used.
    """

    name = "kernel"

    def __init__(
        self, filesystem: Filesystem, refused: Callable[[MantaError], None], *, without: Init = NOTHING
    ) -> None:
        self._fs = filesystem
        self._refused = refused
        self._without = without
        self._device: Device
        self._directory: Path
        self._agreed: protocol.Negotiated
        self._interruptible: dict[int, trio.CancelScope] = {}
        self._notifiers = trio.CapacityLimiter(NOTIFIERS_MAX)
        self._nursery: trio.Nursery | None = None
        self._owner = os.geteuid(), os.getegid()
        self.native_refusal = ""
        """Why the kernel does not take cache files to read them by itself, if it said so; a clause."""
        self._handlers: dict[int, Callable[[Request], Awaitable[bytes]]] = {
            Opcode.LOOKUP: self._look_up,
            Opcode.GETATTR: self._getattr,
            Opcode.STATX: self._statx,
            Opcode.READLINK: self._readlink,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.FSYNC: self._nothing,
            Opcode.FSYNCDIR: self._nothing,
            Opcode.SYNCFS: self._nothing,
            Opcode.DESTROY: self._nothing,
        }

    # Life ------------------------------------------------------------------------------------------------------------

    def mount(self, directory: Path, source: str) -> None:
        """Mounts on `directory` and agrees with the kernel. Raises Denied, Unavailable with what to do."""
        self._directory = directory
        self._device = Device.mount(directory, source)
        try:
            self._agreed = self._device.shake_hands(self._without, BACKGROUND_MAX)
        except BaseException:
            self.close()
            raise

    def adopt(self, directory: Path, fd: int, state: bytes) -> None:
        """Takes over the connection `fd`, mounted on `directory`, from a daemon that is gone. `state` is what it had for `state`.

        Raises Corrupt where that is of another kind of session; then `fd` is still the caller's.
        """
        try:
            self._agreed = msgspec.json.decode(state, type=protocol.Negotiated)
        except msgspec.MsgspecError as e:
            raise Corrupt(f"What the daemon before agreed on with the kernel cannot be read: {e}.") from e
        self._directory = directory
        self._device = Device(fd)

    @property
    def state(self) -> bytes:
        """What the next daemon must know to take over."""
        return msgspec.json.encode(self._agreed)

    @property
    def fd(self) -> int:
        """The connection, for whoever is to keep it."""
        return self._device.fd

    @property
    def native(self) -> bool:
        """Whether the kernel reads sealed files by itself."""
        return self._agreed.has(Init.PASSTHROUGH) and not self._without & Init.PASSTHROUGH

    @property
    def resends(self) -> bool:
        """Whether the kernel sends again what a daemon that is gone had not answered, so that another can take over."""
        return self._agreed.has(Init.HAS_RESEND)

    async def serve(self, *, resend: bool = False) -> None:
        """Answers the kernel until the filesystem is unmounted or this is cancelled. `resend`: after `adopt`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._fs.close_backing = self._device.close_backing
            try:
                if resend:
                    self._device.write(protocol.resend())
                await Turns(self, REQUESTS_MAX).run()
            finally:
                self._nursery = None
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Unmounts where it still is, and ends the connection."""
        detach(self._directory)
        self._device.close()

    def leave(self) -> None:
        """Ends our part in the connection, for the next daemon to take over."""
        self._device.close()

    # What the kernel must forget -----------------------------------------------------------------------------------------

    def forget_name(self, name: str) -> None:
        """Has the kernel drop a name in the top directory that is gone. Returns at once."""
        self._notify(protocol.invalidate_entry(_ROOT, os.fsencode(name)))

    def forget_pages(self, nodeids: Iterable[int]) -> None:
        """Has the kernel drop what it cached of these files. Returns at once."""
        for nodeid in nodeids:
            self._notify(protocol.invalidate_inode(nodeid))

    def _notify(self, message: bytes) -> None:
        """In a thread: it may wait for a page under read, or for a directory under lookup, which this thread serves."""
        if self._nursery is not None:
            self._nursery.start_soon(self._told, message)

    async def _told(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the kernel does not know it any more
            await trio.to_thread.run_sync(self._device.write, message, abandon_on_cancel=True, limiter=self._notifiers)

    # Requests ------------------------------------------------------------------------------------------------------------

    async def next(self) -> bytes | None:
        """See `Turns`."""
        while True:
            try:
                message = self._device.read()
            except OSError as e:
                if e.errno != errno.ENODEV:
                    log.error("the FUSE connection ended: %s", e.strerror)
                return None
            if message is not None:
                return message
            await trio.lowlevel.wait_readable(self._device.fd)

    async def answer(self, message: bytes) -> None:
        """See `Turns`. Whatever goes wrong becomes an errno, here."""
        try:
            request = protocol.parse(message)
        except protocol.Malformed as e:
            log.error("the kernel sent %s", e)
            return
        match request.opcode:
            case Opcode.FORGET | Opcode.BATCH_FORGET:
                self._forget(request)
                return
            case Opcode.INTERRUPT:
                self._interrupt(request)
                return
        with trio.CancelScope() as scope:
            self._interruptible[request.unique] = scope
            try:
                if request.opcode == Opcode.READ:
                    await self._read(request)
                else:
                    self._write(protocol.answer(request.unique, await self._answered(request)))
            except _Refusal as e:
                self._fail(request, e.number)
            except MantaError as e:
                if request.opcode != Opcode.READ:  # the log has those already, with the read's id
                    log.info("a request was refused: %s", e.message)
                self._refused(e)
                self._fail(request, errno_of(e))
            except protocol.Malformed as e:
                log.error("the kernel sent %s", e)
                self._fail(request, errno.EIO)
            except Exception as e:
                log.exception("a request failed in an unforeseen way")
                self._fail(request, errno_of(e))
            finally:
                del self._interruptible[request.unique]
        if scope.cancelled_caught:
            self._fail(request, errno.EINTR)

    async def _answered(self, request: Request) -> bytes:
        handler = self._handlers.get(request.opcode)
        if handler is None:
            raise _Refusal(protocol.unknown(request.opcode))
        return await handler(request)

    def _fail(self, request: Request, number: int) -> None:
        self._write(protocol.failure(request.unique, number))

    def _write(self, *parts: bytes | memoryview) -> None:
        try:
            self._device.write(*parts)
        except OSError as e:
            # EINVAL: it makes no sense to the kernel, which then goes on waiting for one that does.
            log.error("the kernel does not take an answer: %s", e.strerror)
            with contextlib.suppress(OSError):
                self._device.write(protocol.failure(_unique_of(parts[0]), errno.EIO))

    def _forget(self, request: Request) -> None:
        try:
            for nodeid, lookups in protocol.parse_forgets(request):
                self._fs.forget(nodeid, lookups)
        except protocol.Malformed as e:
            log.error("the kernel sent %s", e)

    def _interrupt(self, request: Request) -> None:
        """Whoever made a request was killed, or got a signal: it is answered at once, and a fetch that it began goes on."""
        try:
            unique = protocol.parse_interrupt(request.body)
        except protocol.Malformed as e:
            log.error("the kernel sent %s", e)
            return
        if (scope := self._interruptible.get(unique)) is not None:
            scope.cancel()
        # Otherwise it is answered already, or has not come yet: the kernel sends those in order.

    # Names and attributes ------------------------------------------------------------------------------------------------

    def _inode(self, a: Attributes) -> Inode:
        return Inode(a.number, _MODES[a.kind], a.size, MTIME_NS, *self._owner, PREFERRED_READ_BYTES)

    async def _look_up(self, request: Request) -> bytes:
        try:
            found = await self._fs.look_up(request.nodeid, protocol.parse_name(request.body))
        except Absent:
            return protocol.absent_out(self._fs.absence_valid_s(request.nodeid))
        return protocol.entry_out(found.inode, self._inode(found), found.name_valid_s, found.valid_s)

    async def _getattr(self, request: Request) -> bytes:
        found = await self._fs.attributes(request.nodeid)
        return protocol.attr_out(self._inode(found), found.valid_s)

    async def _statx(self, request: Request) -> bytes:
        found = await self._fs.attributes(request.nodeid)
        return protocol.statx_out(self._inode(found), found.valid_s)

    async def _readlink(self, request: Request) -> bytes:
        return await self._fs.read_link(request.nodeid)

    async def _statfs(self, request: Request) -> bytes:
        totals = self._fs.totals()
        return protocol.statfs_out(totals.size, totals.files, BLOCK_BYTES, NAME_BYTES_MAX)

    async def _getxattr(self, request: Request) -> bytes:
        size, name = protocol.parse_getxattr(request.body)
        found = (await self._fs.extended_attributes(request.nodeid)).get(os.fsdecode(name))
        if found is None:
            raise _Refusal(errno.ENODATA)
        return _fitting(os.fsencode(found), size)

    async def _listxattr(self, request: Request) -> bytes:
        names = await self._fs.extended_attributes(request.nodeid)
        return _fitting(b"".join(os.fsencode(name) + b"\0" for name in names), protocol.parse_listxattr(request.body))

    async def _nothing(self, request: Request) -> bytes:
        return b""

    # Directories ---------------------------------------------------------------------------------------------------------

    async def _opendir(self, request: Request) -> bytes:
        opened = await self._fs.open_folder(request.nodeid)
        flags = Open.CACHE_DIR | Open.KEEP_CACHE if opened.cacheable else Open(0)
        return protocol.open_out(opened.handle, flags)

    async def _readdir(self, request: Request) -> bytes:
        asked = protocol.parse_read(request.body)
        plus = request.opcode == Opcode.READDIRPLUS
        listing = protocol.Listing(asked.size, plus=plus)
        for listed in await self._fs.list_folder(asked.handle, request.nodeid, asked.offset):
            a = listed.attributes
            if not listing.add(listed.name, a.inode, self._inode(a), listed.following, a.name_valid_s, a.valid_s):
                break
            if plus:
                self._fs.told(listed)
        return bytes(listing.content)

    async def _releasedir(self, request: Request) -> bytes:
        self._fs.close_folder(protocol.parse_handle(request.body))
        return b""

    # Files ---------------------------------------------------------------------------------------------------------------

    async def _open(self, request: Request) -> bytes:
        if protocol.parse_open(request.body) & os.O_ACCMODE != os.O_RDONLY:
            raise _Refusal(errno.EROFS)
        opened = await self._fs.open_file(request.nodeid, request.pid, request.unique & ~protocol.RESENT)
        if opened.native is None:
            return protocol.open_out(opened.handle, Open.KEEP_CACHE if opened.keep_cache else Open.DIRECT_IO)
        backing = self._back(opened.native)
        self._fs.opened(opened.handle, backing > 0, backing)
        if not backing:
            return protocol.open_out(opened.handle, Open.KEEP_CACHE)
        return protocol.open_out(opened.handle, Open.PASSTHROUGH, backing)

    def _back(self, native: NativeFile) -> int:
        """The id of the file's backing file, which all files open on one nodeid share; 0 where the kernel does not take it."""
        if native.backing is not None:
            return native.backing
        try:
            with native.descriptor() as fd:
                return self._device.open_backing(fd)
        except OSError as e:
            self._note_refusal(e)
        except MantaError as e:
            log.info("a file is read through the daemon: %s", e.message)
        return 0

    def _note_refusal(self, e: OSError) -> None:
        if not self.native_refusal:
            self.native_refusal = backing_refusal(e)
            log.warning(
                "the kernel does not read cached files by itself: %s. They are read through the daemon.",
                self.native_refusal,
            )

    async def _release(self, request: Request) -> bytes:
        unused = self._fs.close_file(protocol.parse_handle(request.body))
        if unused is not None:
            # Here, so that the file's space is free when the blob is evicted.
            self._device.close_backing(unused)
        return b""

    async def _read(self, request: Request) -> None:
        asked = protocol.parse_read(request.body)
        data = await self._fs.read(asked.handle, asked.offset, asked.size)
        self._write(protocol.header(request.unique, len(data)), data)


def _fitting(content: bytes, room: int) -> bytes:
    if room == 0:
        return protocol.xattr_size_out(len(content))
    if len(content) > room:
        raise _Refusal(errno.ERANGE)
    return content


def _unique_of(head: bytes | memoryview) -> int:
    return int.from_bytes(head[8:16], "little")
