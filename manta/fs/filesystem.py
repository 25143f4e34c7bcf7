"""The filesystem: what each request of a kernel means, without any kernel. Here and only here; `manta.fuse` adapts it.

Read-only. Runs in the daemon's trio thread. Errors are `manta.errors`; no errno here.

Calls that name an inode are async for one reason: an earlier daemon may have given it, and then the way to it is walked once more, which
may read stored trees. Otherwise they come to their answer without a checkpoint.

Where the session can hand files to the kernel (`native`), a sealed blob is opened *natively*: the kernel reads its data file by itself.
The others are opened by *copying*: their reads come here. One nodeid cannot have both open (`manta.fs.inodes`), so an open that needs the
other way is answered Superseded once: the kernel then looks the name up and gets another nodeid.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

import trio

from manta.errors import Absent, Invalid, MantaError, Superseded
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.fs.handles import BlobHandle, Handle, TextHandle
from manta.fs.inodes import Inode, InodeTable, inode_number
from manta.fs.journal import Journal, NoJournal, Recovered
from manta.fs.nodes import FOREVER_SECONDS, BlobNode, Folder, LinkNode, Node, TextNode, blob_key
from manta.model.extents import Extent
from manta.model.ids import BlobId
from manta.telemetry.events import Opener, Telemetry

XATTR_PREFIX = "user.manta."

MTIME_NS = 946_684_800 * 10**9
"""2000-01-01: every file's times. A blob is one inode in many commits, so it has no date of its own; tar and zip take this one."""

BLOCK_BYTES = 4096
PREFERRED_READ_BYTES = 1024 * 1024
NAME_BYTES_MAX = 255

COMPLETE_SECONDS_MAX = 2.0
"""How long an open waits for the whole of a small file: at 1 Gbit/s, 8 MiB take 70 ms."""

SENT_BACK_SECONDS = 5.0
"""How long an open that comes again is taken for the same one, sent back before: the kernel looks up the name and is there at once."""

SENT_BACK_MAX = 1024
"""Opens that were sent back and may come again. Of more than these the earliest are sent back twice."""

DEPTH_MAX = 4096
"""Folders on the way to a node: a path in Linux has no more."""


class Hold(Protocol):
    """Keeps a blob in use until `close`."""

    def close(self) -> None: ...


class BlobSource(Protocol):
    """What the filesystem needs of the fetcher and the cache."""

    def open(self, provenance: Provenance) -> Transfer: ...

    def close(self, transfer: Transfer) -> None: ...

    def failed(self, transfer: Transfer, error: MantaError) -> None:
        """A reader of `transfer` is about to get `error`."""
        ...

    def cached_bytes(self, provenance: Provenance) -> tuple[int, bool]:
        """Bytes of the blob in the cache, and whether it is sealed."""
        ...

    def cached(self) -> Iterable[BlobId]:
        """Every blob of which the cache has anything."""
        ...

    def hold(self, blob: BlobId) -> Hold:
        """Keeps a blob that is cached in use. Raises MantaError where the cache disk fails."""
        ...

    def totals(self) -> tuple[int, int]:
        """Bytes and files of all mounts together, for statfs."""
        ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat shows. `valid_s` is how long the kernel may keep it, `name_valid_s` how long the name that led to it.

    `inode` is the nodeid, by which the kernel names it to us; `number` is what stat shows as st_ino.
    """

    inode: int
    number: int
    kind: Literal["folder", "file", "link"]
    size: int
    valid_s: float
    name_valid_s: float


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a listing. `following` is the position after it."""

    name: bytes
    attributes: Attributes
    following: int
    _node: Node
    _parent: int


@dataclass(frozen=True, slots=True)
class NativeFile:
    """A file that the kernel may read by itself from the blob's data file."""

    inode: int
    blob: BlobId
    backing: int | None
    """The kernel's number of the backing file by which this inode is open natively already: it takes no other. None: register it."""
    _transfer: Transfer

    def descriptor(self) -> AbstractContextManager[int]:
        """The data file, for reading, within the `with`. Raises NoSpace, CacheBroken."""
        return self._transfer.blob.descriptor()


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """`handle` names the open file. `keep_cache`: pages the kernel has are still right; otherwise it must not cache any.

    `native`: say how it was opened with `Filesystem.opened` before the kernel is answered, and without a checkpoint in between.
    """

    handle: int
    keep_cache: bool
    native: NativeFile | None = None


@dataclass(frozen=True, slots=True)
class OpenedFolder:
    """`handle` names the open folder. `cacheable`: what it lists never changes."""

    handle: int
    cacheable: bool


@dataclass(eq=False, slots=True)
class _File:
    """An open file. `handle` None: an earlier daemon opened it, and nobody has read from it since."""

    handle: Handle | None
    inode: int
    counted: Inode | None
    """The inode whose open files it counts with."""
    native: bool
    backing: int = 0
    request: int = 0
    hold: Hold | None = None
    """Keeps the blob of a native file of an earlier daemon in use."""

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()
        if self.hold is not None:
            self.hold.close()


@dataclass(frozen=True, slots=True)
class _Listing:
    folder: Folder
    inode: int
    entries: Sequence[tuple[str, Node]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Totals:
    """What statfs shows: bytes and files of all mounts; nothing is free in a read-only filesystem."""

    size: int
    files: int


class Filesystem:
    """`fill`: complete in the background what was read from. `onward` hears of a blob that is read beyond its head.
    `telemetry` hears of reads. `whole` says of which files an open returns only when all of them is there.

    `native`: the session can hand files to the kernel. Then files of up to `complete_bytes_max` are fetched, verified and sealed while they
    are opened, for at most `complete_seconds_max`. `journal` is told what the next daemon must know.
    """

    def __init__(
        self,
        root: Folder,
        blobs: BlobSource,
        telemetry: Telemetry,
        *,
        fill: bool = True,
        onward: Callable[[Provenance], None] | None = None,
        native: bool = False,
        complete_bytes_max: int = 0,
        complete_seconds_max: float = COMPLETE_SECONDS_MAX,
        journal: Journal | None = None,
        whole: Callable[[Provenance], bool] = lambda _: False,
    ) -> None:
        self._whole = whole
        self._journal = journal or NoJournal()
        self._inodes = InodeTable(root, self._journal)
        self._blobs = blobs
        self._telemetry = telemetry
        self._fill = fill
        self._onward = onward
        self.native = native
        """Known when the session has agreed with the kernel, before the first request."""
        self._complete_bytes_max = complete_bytes_max
        self._complete_seconds_max = complete_seconds_max
        self._first_handle = self._journal.first_handle
        self._numbers = itertools.count(self._first_handle)
        self._files: dict[int, _File] = {}
        self._folders: dict[int, _Listing] = {}
        self._sent_back: dict[tuple[int, int], float] = {}
        self._requests: dict[int, int] = {}
        """Of files that an earlier daemon opened: the handle by the request. One that comes again was never answered."""
        self.drop_pages: Callable[[int], None] = lambda _inode: None
        """Hears of inodes of which the kernel has pages that nobody will read any more, because what is opened from now on has its own."""
        self.close_backing: Callable[[int], None] = lambda _backing: None
        """Hears of the kernel's numbers of backing files that are not in use any more, where the kernel did not close the file."""
        self._journal.rewritten_by(self._rewrite)

    # Names -----------------------------------------------------------------------------------------------------------

    async def look_up(self, parent: int, name: bytes) -> Attributes:
        """One more lookup to `forget`. Raises Absent; `absence_valid_s` tells how long that holds."""
        folder = self._inodes.node(parent) or await self._found(parent)
        if not isinstance(folder, Folder):
            raise Invalid("This is not a directory.")
        node = await folder.child(os.fsdecode(name))
        inode, number = self._inodes.choose(node, native=self._wants_native(node))
        self._inodes.told(node, inode, number, parent, name)
        return self._attributes(inode, number, node, folder.lifetime_s)

    def absence_valid_s(self, parent: int) -> float:
        """How long the kernel may remember that a name is absent in `parent`; not at all where `parent` itself is not known."""
        known = self._inodes.find(parent)
        return known.node.lifetime_s if known is not None and isinstance(known.node, Folder) else 0.0

    def forget(self, inode: int, lookups: int) -> None:
        self._inodes.forget(inode, lookups)

    async def attributes(self, inode: int) -> Attributes:
        node = self._inodes.node(inode) or await self._found(inode)
        return self._attributes(inode, self._inodes[inode].number, node, FOREVER_SECONDS)

    async def read_link(self, inode: int) -> bytes:
        node = self._inodes.node(inode) or await self._found(inode)
        if not isinstance(node, LinkNode):
            raise Invalid("This is not a symbolic link.")
        return os.fsencode(node.target)

    def numbers_of(self, blob: BlobId) -> list[int]:
        """Every inode (nodeid) by which the kernel may know `blob`: what it has cached of one it may have of all."""
        return self._inodes.nodeids(blob_key(blob))

    async def _found(self, inode: int) -> Node:
        """The node that the kernel means by what an earlier daemon gave it. Raises Superseded where it is not there any more, Absent for
        what nobody gave, and why the hub could not tell, where trees are not stored."""
        way: list[int] = []
        at = inode
        while (node := self._inodes.node(at)) is None:
            way.append(at)
            if len(way) > DEPTH_MAX:
                raise Superseded(f"The way to inode {inode} has no beginning: look its name up again.")
            at = self._inodes[at].parent
        for step in reversed(way):
            try:
                if not isinstance(node, Folder):
                    raise Absent(f"Inode {step} is in no folder.")
                node = await node.child(os.fsdecode(self._inodes[step].name))
                if not self._inodes.found(step, node):
                    raise Absent(f"Inode {step} is another file now.")
            except Absent as e:
                raise Superseded(
                    f"What an earlier daemon showed as inode {inode} is not there any more: {e.message} Look its name up again."
                ) from e
        return node

    # Folders ---------------------------------------------------------------------------------------------------------

    async def open_folder(self, inode: int) -> OpenedFolder:
        """A handle on the listing as it is now."""
        listing = await self._listing(inode)
        number = next(self._numbers)
        self._folders[number] = listing
        return OpenedFolder(number, listing.folder.lifetime_s == FOREVER_SECONDS)

    async def list_folder(self, handle: int, inode: int, start: int) -> Iterator[Listed]:
        """The entries from position `start` on, each made when it is asked for; `told` is due for each that the kernel takes.

        `inode` is the folder's, by which a handle of an earlier daemon is opened again; 0 where the kernel did not say.
        """
        listing = self._folders.get(handle)
        if listing is None:
            if not inode or handle >= self._first_handle:
                raise Invalid(f"Directory handle {handle} is not open.")
            listing = self._folders[handle] = await self._listing(inode)
        return self._listed(listing, start)

    async def _listing(self, inode: int) -> _Listing:
        folder = self._inodes.node(inode) or await self._found(inode)
        if not isinstance(folder, Folder):
            raise Invalid("This is not a directory.")
        return _Listing(folder, inode, await folder.children())

    def _listed(self, listing: _Listing, start: int) -> Iterator[Listed]:
        lifetime_s, entries = listing.folder.lifetime_s, listing.entries
        for position in range(start, len(entries)):
            name, node = entries[position]
            inode, number = self._inodes.choose(node, native=self._wants_native(node))
            attributes = self._attributes(inode, number, node, lifetime_s)
            yield Listed(os.fsencode(name), attributes, position + 1, node, listing.inode)

    def told(self, listed: Listed) -> None:
        """The kernel has learned of an entry: one more lookup to `forget`."""
        attributes = listed.attributes
        self._inodes.told(listed._node, attributes.inode, attributes.number, listed._parent, listed.name)

    def close_folder(self, handle: int) -> None:
        self._folders.pop(handle, None)

    # Files -----------------------------------------------------------------------------------------------------------

    async def open_file(self, inode: int, pid: int = 0, request: int = 0) -> OpenedFile:
        """`pid`: which process (or thread) opens it, 0 where it is not known. `request`: the kernel's number of the request, 0 for none;
        one that an earlier daemon took and did not answer comes again, and what was opened for it then is closed. Asks the hub nothing
        but, where small files are completed, for those; what becomes of that fetch is no error of the open.

        Where the file is to be complete when its open returns (`whole`), that is waited for as a read would wait for its bytes.

        Raises Denied for what the hub hides from us, NoSpace and CacheBroken when the cache disk fails, Superseded where the kernel must
        look the name up again; for a file that is to be complete what `BlobHandle.read` does.
        """
        if request and (unanswered := self._requests.pop(request, None)) is not None:
            backing = self.close_file(unanswered)
            if backing is not None:
                self.close_backing(backing)
        node = self._inodes.node(inode) or await self._found(inode)
        match node:
            case TextNode():
                return self._opened(TextHandle(node.content), inode, request, node.lifetime_s == FOREVER_SECONDS)
            case BlobNode() if node.size == 0 and node.provenance.entry.blob is not None:
                return self._opened(TextHandle(b""), inode, request, True)
            case BlobNode():
                handle = self._blob_handle(node, inode, pid)
                try:
                    return await self._open_blob(node, handle, inode, pid, request)
                except BaseException:
                    handle.close()
                    raise
            case _:
                raise Invalid("This is not a file.")

    async def _open_blob(self, node: BlobNode, handle: BlobHandle, inode: int, pid: int, request: int) -> OpenedFile:
        blob = node.provenance.entry.blob
        cached, sealed = self._blobs.cached_bytes(node.provenance)
        if blob is not None and not sealed and self._whole(node.provenance):
            sealed = (await handle.complete()).blob.sealed
        if self.native and blob is not None and not sealed and node.size <= self._complete_bytes_max:
            sealed = await self._completed(handle, node.size)
        if blob is None or cached or sealed:
            # What is hidden is refused here, and what is cached is kept from eviction from here on. Otherwise opening alone leaves no
            # trace in the cache: programs open far more files than they read.
            transfer, _ = handle.attach()
            sealed = transfer.blob.sealed
        native = self.native and sealed
        known = self._inodes[inode]
        if not known.fits(native):
            self._send_back(inode, pid)
            # It came again by a way that has no name to look up, such as /proc/PID/fd, so it is opened in the way of the others. Natively
            # only with all its bytes: the kernel would not ask for what is missing.
            native = not native
            if native and not await self._completed(handle, node.size):
                raise Superseded(
                    f"{node.provenance} lost a part of what is cached of it: it can be opened by its name."
                )
            known = self._inodes[inode]
        if not native:
            return self._opened(handle, inode, request, True)
        assert blob is not None
        transfer, _ = handle.attach()
        number = next(self._numbers)
        known.native += 1
        self._files[number] = _File(handle, inode, known, True, request=request)
        return OpenedFile(number, True, NativeFile(inode, blob, known.backing, transfer))

    def _opened(self, handle: Handle, inode: int, request: int, keep_cache: bool) -> OpenedFile:
        """One that is served by copying."""
        known = self._inodes[inode]
        number = next(self._numbers)
        self._journal.opened(number, inode, native=False, backing=0, request=request)
        known.copying += 1
        known.pages = known.pages or keep_cache
        self._files[number] = _File(handle, inode, known, False, request=request)
        return OpenedFile(number, keep_cache)

    def opened(self, handle: int, native: bool, backing: int = 0) -> None:
        """How a file was opened for which `native` was offered: natively, by the kernel's number of its backing file; or by copying,
        because the kernel refused that file. Raises Superseded for the latter where others are open natively; then it is closed.

        Nothing to say of others.
        """
        file = self._files[handle]
        if not file.native:
            return
        known = file.counted
        assert known is not None
        if not native and known.native > 1:
            self.close_file(handle)
            raise Superseded(
                f"Inode {file.inode} is open natively, and could not be opened so once more: look it up again."
            )
        self._journal.opened(handle, file.inode, native=native, backing=backing, request=file.request)
        if native:
            file.backing = known.backing = backing
            self._drop_pages(file.inode, known)
        else:
            file.native = False
            known.native -= 1
            known.copying += 1
            known.pages = True

    async def _completed(self, handle: BlobHandle, size: int) -> bool:
        """Whether the blob is sealed, after waiting for that: not where it is known not to come."""
        with suppress(MantaError):  # the read that comes tells what keeps its bytes from coming
            transfer, _ = handle.attach()
            if not transfer.blob.sealed and not transfer.outage(trio.current_time(), transfer.missing()):
                with trio.move_on_after(self._complete_seconds_max):
                    await transfer.ensure(Extent(0, size))
                    await transfer.complete()
            return transfer.blob.sealed
        return False

    def _send_back(self, inode: int, pid: int) -> None:
        """Raises Superseded, but where this open was sent back a moment ago."""
        now = trio.current_time()
        if now < self._sent_back.pop((inode, pid), now):
            return
        if len(self._sent_back) >= SENT_BACK_MAX:
            del self._sent_back[next(iter(self._sent_back))]
        self._sent_back[inode, pid] = now + SENT_BACK_SECONDS
        raise Superseded(f"Inode {inode} has files open in another way than this one needs: look its name up again.")

    def _wants_native(self, node: Node) -> bool:
        """Whether its next file is to be opened natively."""
        return (
            self.native
            and isinstance(node, BlobNode)
            and bool(node.size)
            and self._blobs.cached_bytes(node.provenance)[1]
        )

    def _blob_handle(self, node: BlobNode, inode: int, pid: int) -> BlobHandle:
        begin = partial(self._blobs.open, node.provenance)
        opener = Opener(inode, pid)
        onward = None if self._onward is None else partial(self._onward, node.provenance)
        return BlobHandle(
            begin, self._blobs.close, self._blobs.failed, self._telemetry, opener, fill=self._fill, onward=onward
        )

    async def read(self, handle: int, offset: int, size: int) -> bytes | memoryview:
        """See `Handle.read`."""
        file = self._files.get(handle)
        if file is None:
            raise Invalid(f"File handle {handle} is not open.")
        return await (file.handle or await self._reopened(handle, file)).read(offset, size)

    async def _reopened(self, handle: int, file: _File) -> Handle:
        """For a file that an earlier daemon opened. Raises as `_found`."""
        node = self._inodes.node(file.inode) or await self._found(file.inode)
        if self._files.get(handle) is not file:
            raise Invalid(f"File handle {handle} is not open.")
        if file.handle is None:
            match node:
                case TextNode():
                    file.handle = TextHandle(node.content)
                case BlobNode():
                    file.handle = self._blob_handle(node, file.inode, 0)
                case _:
                    raise Invalid("This is not a file.")
        return file.handle

    def close_file(self, handle: int) -> int | None:
        """The kernel's number of the backing file that is not in use any more with this one, if there is one."""
        file = self._files.get(handle)
        if file is None:
            return None
        self._journal.closed(handle)
        del self._files[handle]
        self._requests.pop(file.request, None)
        unused: int | None = None
        if (known := file.counted) is not None:
            if file.native:
                known.native -= 1
                if not known.native:
                    unused, known.backing = known.backing, None
            else:
                known.copying -= 1
        if file.handle is not None:
            file.handle.close()
        if file.hold is not None:
            file.hold.close()
        if (
            known is not None
            and not file.native
            and self.native
            and known.node is not None
            and self._wants_native(known.node)
        ):
            self._drop_pages(file.inode, known)
        return unused

    def _drop_pages(self, inode: int, known: Inode) -> None:
        """What is read natively has its pages with the data file: a second copy is of no use once nobody reads it."""
        if known.pages and not known.copying:
            known.pages = False
            self.drop_pages(inode)

    def close(self) -> None:
        """Closes what the kernel left open, and forgets what it never forgot: it is gone. Not where the next daemon is to go on with it."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._requests.clear()
        self._folders.clear()
        self._inodes.clear()
        self._journal.rewrite()

    # What an earlier daemon left ---------------------------------------------------------------------------------------

    def recover(self, recovered: Recovered) -> None:
        """Takes over what the kernel knows and has open, before it is served. Asks nobody: nodes and reads find their way when they are
        asked for. Files that are open natively keep their blobs in use from here on."""
        self._inodes.recover(recovered.names)
        cached: dict[int, BlobId] = {}
        if any(file.native for file in recovered.files.values()):
            cached = {inode_number(blob_key(blob)): blob for blob in self._blobs.cached()}
        for handle, opened in recovered.files.items():
            known = self._inodes.find(opened.nodeid)
            file = _File(None, opened.nodeid, known, opened.native, opened.backing, opened.request)
            self._files[handle] = file
            if opened.request:
                self._requests[opened.request] = handle
            if known is None:
                continue
            if not opened.native:
                known.copying += 1
                continue
            known.native += 1
            known.backing = opened.backing
            if (blob := cached.get(known.number)) is not None:
                with suppress(MantaError):  # the kernel has the file open, whatever becomes of its name
                    file.hold = self._blobs.hold(blob)

    def _rewrite(self) -> None:
        self._inodes.rewrite()
        for handle, file in self._files.items():
            self._journal.opened(handle, file.inode, native=file.native, backing=file.backing, request=file.request)

    # Attributes ------------------------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        return Totals(*self._blobs.totals())

    async def extended_attributes(self, inode: int) -> dict[str, str]:
        """All of them, by full name."""
        match node := self._inodes.node(inode) or await self._found(inode):
            case Folder():
                found = dict(node.attributes())
            case BlobNode():
                entry = node.provenance.entry
                if entry.blob is None:
                    found = {"state": "hidden"}
                else:
                    cached, sealed = self._blobs.cached_bytes(node.provenance)
                    if sealed:
                        state = "sealed"
                    elif cached == entry.size:
                        state = "complete"
                    else:
                        state = "partial" if cached else "absent"
                    found = {"blob": str(entry.blob), "state": state, "cached_bytes": str(cached)}
            case _:
                found = {}
        return {XATTR_PREFIX + name: value for name, value in found.items()}

    @property
    def open_files(self) -> int:
        return len(self._files)

    @property
    def known_inodes(self) -> int:
        return len(self._inodes)

    @staticmethod
    def _attributes(inode: int, number: int, node: Node, name_valid_s: float) -> Attributes:
        match node:
            case Folder():
                # Found names stay found: what may change in a folder is what it lacks.
                return Attributes(inode, number, "folder", 0, FOREVER_SECONDS, FOREVER_SECONDS)
            case BlobNode():
                return Attributes(inode, number, "file", node.size, FOREVER_SECONDS, FOREVER_SECONDS)
            case TextNode():
                return Attributes(
                    inode, number, "file", len(node.content), node.lifetime_s, min(name_valid_s, node.lifetime_s)
                )
            case LinkNode():
                return Attributes(
                    inode, number, "link", len(os.fsencode(node.target)), FOREVER_SECONDS, FOREVER_SECONDS
                )
