"""The filesystem: what each request of a kernel means, without any kernel. Here and only here; `manta.fuse` adapts it.

Read-only. Runs in the daemon's trio thread. Errors are `manta.errors`; no errno here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from manta.errors import Absent, Invalid, MantaError
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.fs.handles import BlobHandle, Handle, TextHandle
from manta.fs.inodes import InodeTable
from manta.fs.nodes import FOREVER_SECONDS, BlobNode, Folder, LinkNode, Node, TextNode
from manta.telemetry.events import Opener, Telemetry

XATTR_PREFIX = "user.manta."

MTIME_NS = 946_684_800 * 10**9
"""2000-01-01: every file's times. A blob is one inode in many commits, so it has no date of its own; tar and zip take this one."""

BLOCK_BYTES = 4096
PREFERRED_READ_BYTES = 1024 * 1024
NAME_BYTES_MAX = 255


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

    def totals(self) -> tuple[int, int]:
        """Bytes and files of all mounts together, for statfs."""
        ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat shows. `valid_s` is how long the kernel may keep it, `name_valid_s` how long the name that led to it."""

    inode: int
    kind: Literal["folder", "file", "link"]
    size: int
    valid_s: float
    name_valid_s: float

    @property
    def number(self) -> int:
        return self.inode


class NativeFile:
    def __init__(self, transfer):
        self.transfer = transfer

    def descriptor(self):
        return self.transfer.blob.descriptor()


@dataclass
class OpenedFolder:
    handle: int
    cacheable: bool


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a listing. `following` is the position after it."""

    name: bytes
    attributes: Attributes
    following: int
    _node: Node


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """`handle` names the open file. `keep_cache`: pages the kernel has are still right; otherwise it must not cache any."""

    handle: int
    keep_cache: bool
    native: NativeFile | None = None


@dataclass(frozen=True, slots=True)
class Totals:
    """What statfs shows: bytes and files of all mounts; nothing is free in a read-only filesystem."""

    size: int
    files: int


class Filesystem:
    """`fill`: complete in the background what was read from. `telemetry` hears of reads."""

    def __init__(self, root: Folder, blobs: BlobSource, telemetry: Telemetry, *, fill: bool = True) -> None:
        self._inodes = InodeTable(root)
        self._blobs = blobs
        self._telemetry = telemetry
        self._fill = fill
        self._numbers = itertools.count(1)
        self._files: dict[int, Handle] = {}
        self._folders: dict[int, tuple[Folder, Sequence[tuple[str, Node]]]] = {}

    # Names -----------------------------------------------------------------------------------------------------------

    async def look_up(self, parent: int, name: bytes) -> Attributes:
        """One more lookup to `forget`. Raises Absent; `absence_valid_s` tells how long that holds."""
        folder = self._folder(parent)
        node = await folder.child(os.fsdecode(name))
        return self._attributes(self._inodes.look_up(node), node, folder.lifetime_s)

    def absence_valid_s(self, parent: int) -> float:
        """How long the kernel may remember that a name is absent in `parent`; not at all where `parent` itself is not known."""
        try:
            return self._folder(parent).lifetime_s
        except (Absent, Invalid):
            return 0.0

    def forget(self, inode: int, lookups: int) -> None:
        self._inodes.forget(inode, lookups)

    async def attributes(self, inode: int) -> Attributes:
        return self._attributes(inode, self._node(inode), FOREVER_SECONDS)

    async def read_link(self, inode: int) -> bytes:
        node = self._node(inode)
        if not isinstance(node, LinkNode):
            raise Invalid("This is not a symbolic link.")
        return os.fsencode(node.target)

    # Folders ---------------------------------------------------------------------------------------------------------

    async def open_folder(self, inode: int) -> int:
        """A handle on the listing as it is now."""
        folder = self._folder(inode)
        number = next(self._numbers)
        self._folders[number] = folder, await folder.children()
        return OpenedFolder(number, folder.lifetime_s == FOREVER_SECONDS)

    async def list_folder(self, handle: int, inode: int, start: int) -> Iterator[Listed]:
        """The entries from position `start` on, each made when it is asked for; `told` is due for each that the kernel takes."""
        return self._listed(*self._listing(handle), start)

    def _listed(self, folder: Folder, entries: Sequence[tuple[str, Node]], start: int) -> Iterator[Listed]:
        for position in range(start, len(entries)):
            name, node = entries[position]
            attributes = self._attributes(self._inodes.number(node), node, folder.lifetime_s)
            yield Listed(os.fsencode(name), attributes, position + 1, node)

    def told(self, listed: Listed) -> None:
        """The kernel has learned of an entry: one more lookup to `forget`."""
        self._inodes.told(listed._node, listed.attributes.inode)

    def close_folder(self, handle: int) -> None:
        self._folders.pop(handle, None)

    # Files -----------------------------------------------------------------------------------------------------------

    async def open_file(self, inode: int, pid: int = 0) -> OpenedFile:
        """`pid`: which process opens it, 0 where it is not known. Asks the hub nothing.

        Raises Denied for what the hub hides from us, NoSpace and CacheBroken when the cache disk fails.
        """
        match node := self._node(inode):
            case TextNode():
                handle: Handle = TextHandle(node.content)
                keep_cache = node.lifetime_s == FOREVER_SECONDS
            case BlobNode() if node.size == 0 and node.provenance.entry.blob is not None:
                handle, keep_cache = TextHandle(b""), True
            case BlobNode():
                begin = partial(self._blobs.open, node.provenance)
                opened = BlobHandle(
                    begin, self._blobs.close, self._blobs.failed, self._telemetry, Opener(inode, pid), fill=self._fill
                )
                if node.provenance.entry.blob is None or self._blobs.cached_bytes(node.provenance)[0]:
                    # What is hidden is refused here, and what is cached is kept from eviction from here on. Otherwise opening alone
                    # leaves no trace in the cache: programs open far more files than they read.
                    opened.attach()
                handle, keep_cache = opened, True
            case _:
                raise Invalid("This is not a file.")
        number = next(self._numbers)
        self._files[number] = handle
        native = None
        if self.native and isinstance(handle, BlobHandle) and handle._attached and handle._attached[0].blob.sealed:
            native = NativeFile(handle._attached[0])
        return OpenedFile(number, keep_cache, native)

    native = False

    def opened(self, handle, *, native, backing):
        pass

    def numbers_of(self, blob):
        from manta.fs.inodes import inode_number
        from manta.fs.nodes import blob_key

        return [inode_number(blob_key(blob))]

    async def read(self, handle: int, offset: int, size: int, inode: int = 0) -> bytes | memoryview:
        """See `Handle.read`."""
        opened = self._files.get(handle)
        if opened is None:
            raise Invalid(f"File handle {handle} is not open.")
        return await opened.read(offset, size)

    def close_file(self, handle: int) -> None:
        if (opened := self._files.pop(handle, None)) is not None:
            opened.close()

    def close(self) -> None:
        """Closes what the kernel left open, and forgets what it never forgot: it is gone."""
        for handle in list(self._files):
            self.close_file(handle)
        self._folders.clear()
        self._inodes.clear()

    # Attributes ------------------------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        return Totals(*self._blobs.totals())

    async def extended_attributes(self, inode: int) -> dict[str, str]:
        """All of them, by full name."""
        match node := self._node(inode):
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

    def _node(self, inode: int) -> Node:
        try:
            return self._inodes[inode]
        except KeyError:
            raise Absent(f"Inode {inode} is not known.") from None

    def _folder(self, inode: int) -> Folder:
        node = self._node(inode)
        if not isinstance(node, Folder):
            raise Invalid("This is not a directory.")
        return node

    def _listing(self, handle: int) -> tuple[Folder, Sequence[tuple[str, Node]]]:
        if handle not in self._folders:
            raise Invalid(f"Directory handle {handle} is not open.")
        return self._folders[handle]

    @staticmethod
    def _attributes(inode: int, node: Node, name_valid_s: float) -> Attributes:
        match node:
            case Folder():
                # Found names stay found: what may change in a folder is what it lacks.
                return Attributes(inode, "folder", 0, FOREVER_SECONDS, FOREVER_SECONDS)
            case BlobNode():
                return Attributes(inode, "file", node.size, FOREVER_SECONDS, FOREVER_SECONDS)
            case TextNode():
                return Attributes(inode, "file", len(node.content), node.lifetime_s, min(name_valid_s, node.lifetime_s))
            case LinkNode():
                return Attributes(inode, "link", len(os.fsencode(node.target)), FOREVER_SECONDS, FOREVER_SECONDS)
