"""The FUSE kernel protocol: what comes from /dev/fuse and what goes back, as bytes and as values, here and only here.

Pure: no descriptor, no clock. Layouts and numbers are those of the kernel's include/uapi/linux/fuse.h, version 7.45 (facts/fuse.md). What
comes is checked as if it could be anything: whatever is too short, or says another length than it has, raises Malformed.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass

MAJOR = 7
MINOR = 45
"""The version of the header that this module was written from; a kernel with less gets its own."""
MINOR_MIN = 27
"""Linux 4.18. Older kernels have shorter structures."""

REQUEST_BYTES_MAX = 16 * 1024
"""A buffer for any request: the kernel wants 8 KiB for a session that takes no writes; more lets it forget more inodes at once."""

READ_PAGES_MAX = 256
"""Pages (of 4 KiB) of one read: 1 MiB, the kernel's own limit (fs.fuse.max_pages_limit) unless an administrator has raised that."""

_WRITE_BYTES = 4096
"""The least the protocol allows; nothing is ever written."""


RESENT = 1 << 63
"""In the number of a request that was sent before, to a daemon that is gone. Part of the number in the answer."""


class Malformed(Exception):
    """This is no request of the protocol. There is nobody to tell, since it names none to answer."""


class Opcode(enum.IntEnum):
    """What the kernel asks. Those that only a writable filesystem gets are not here."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    SYNCFS = 50
    STATX = 52


WRITING = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51})
"""SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR, REMOVEXATTR, CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE,
TMPFILE: answered with EROFS. The mount is read-only, so the kernel refuses nearly all of them itself."""


class Init(enum.IntFlag):
    """What kernel and session agree on at the start; the upper half goes as `flags2`."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    EXT = 1 << 30
    """There are `flags2`."""
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


NOTHING = Init(0)
WANTED = (
    Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.PARALLEL_DIROPS
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.EXT
    | Init.DIRECT_IO_ALLOW_MMAP
    | Init.PASSTHROUGH
    | Init.HAS_RESEND
)


class Open(enum.IntFlag):
    """What the kernel may do with an open file or directory."""

    DIRECT_IO = 1
    KEEP_CACHE = 2
    CACHE_DIR = 8
    PASSTHROUGH = 128


# What comes ------------------------------------------------------------------------------------------------------------

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_U64 = struct.Struct("<Q")
_PAIR = struct.Struct("<QQ")
_COUNT = struct.Struct("<II")
_OPEN_IN = struct.Struct("<II")
_READ_IN = struct.Struct("<QQII")  # what follows (lock owner, open flags) is of no use to us
_GETXATTR_IN = struct.Struct("<II")
_INIT_IN = struct.Struct("<IIII")
_FLAGS2 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `unique` is its name in the answer, `body` what follows the header."""

    opcode: int
    unique: int
    nodeid: int
    pid: int
    body: bytes


@dataclass(frozen=True, slots=True)
class InitRequest:
    """What the kernel offers. `flags` with both halves."""

    major: int
    minor: int
    max_readahead: int
    flags: int


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Of an open file or directory. `size` in bytes; for a directory `offset` is a position that an entry had."""

    handle: int
    offset: int
    size: int


def parse(message: bytes) -> Request:
    """Raises Malformed."""
    if len(message) < _IN_HEADER.size:
        raise Malformed(f"a request of {len(message)} bytes")
    length, opcode, unique, nodeid, _uid, _gid, pid, _extensions, _padding = _IN_HEADER.unpack_from(message)
    if length != len(message):
        raise Malformed(f"a request of {len(message)} bytes that says it has {length}")
    return Request(opcode, unique, nodeid, pid, message[_IN_HEADER.size :])


def parse_init(body: bytes) -> InitRequest:
    major, minor, max_readahead, flags = _unpack(_INIT_IN, body)
    if flags & Init.EXT and len(body) >= _INIT_IN.size + _FLAGS2.size:
        flags |= _FLAGS2.unpack_from(body, _INIT_IN.size)[0] << 32
    return InitRequest(major, minor, max_readahead, flags)


def parse_name(body: bytes) -> bytes:
    """Of LOOKUP: a name without "/", ended by NUL."""
    name, end, _ = body.partition(b"\0")
    if not end or not name or b"/" in name:
        raise Malformed(f"the name {name[:64]!r}")
    return name


def parse_open(body: bytes) -> int:
    """The flags of open(2)."""
    flags: int = _unpack(_OPEN_IN, body)[0]
    return flags


def parse_read(body: bytes) -> ReadRequest:
    """Of READ, READDIR and READDIRPLUS."""
    handle, offset, size, _ = _unpack(_READ_IN, body)
    return ReadRequest(handle, offset, size)


def parse_handle(body: bytes) -> int:
    """Of RELEASE and RELEASEDIR: which file it was."""
    handle: int = _unpack(_U64, body)[0]
    return handle


def parse_interrupt(body: bytes) -> int:
    """The `unique` of the request that nobody waits for any more."""
    unique: int = _unpack(_U64, body)[0]
    return unique


def parse_getxattr(body: bytes) -> tuple[int, bytes]:
    """How many bytes the caller has room for (0: it asks how many there are), and the name."""
    size, _ = _unpack(_GETXATTR_IN, body)
    return size, parse_name(body[_GETXATTR_IN.size :])


def parse_listxattr(body: bytes) -> int:
    """As the size of `parse_getxattr`."""
    size: int = _unpack(_GETXATTR_IN, body)[0]
    return size


def parse_forgets(request: Request) -> list[tuple[int, int]]:
    """Of FORGET and BATCH_FORGET: nodeids, and how many lookups of each are forgotten."""
    if request.opcode == Opcode.FORGET:
        return [(request.nodeid, _unpack(_U64, request.body)[0])]
    count, _ = _unpack(_COUNT, request.body)
    pairs = request.body[_COUNT.size :]
    if len(pairs) < count * _PAIR.size:
        raise Malformed(f"{count} inodes to forget in {len(pairs)} bytes")
    return list(_PAIR.iter_unpack(pairs[: count * _PAIR.size]))


def _unpack(layout: struct.Struct, body: bytes) -> tuple[int, ...]:
    if len(body) < layout.size:
        raise Malformed(f"{len(body)} bytes where {layout.size} belong")
    return layout.unpack_from(body)


# What goes back --------------------------------------------------------------------------------------------------------

_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_OUT = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QIi")
_INIT_OUT = struct.Struct("<IIIIHHIIHHII24x")
_STATFS = struct.Struct("<5QIIII24x")
_GETXATTR_OUT = struct.Struct("<II")
_DIRENT = struct.Struct("<QQII")
_STATX = struct.Struct("<QII16xIIQIIIHHQQQQqIiqIiqIiqIiIIII112x")

_STATX_BASIC = 0x7FF
"""STATX_BASIC_STATS: all that stat(2) tells."""


def header(unique: int, length: int) -> bytes:
    """The header of an answer with `length` bytes after it."""
    return _OUT_HEADER.pack(_OUT_HEADER.size + length, 0, unique)


def answer(unique: int, body: bytes = b"") -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, unique) + body


def failure(unique: int, number: int) -> bytes:
    """An errno instead of an answer."""
    return _OUT_HEADER.pack(_OUT_HEADER.size, -number, unique)


def unknown(opcode: int) -> int:
    """The errno for what is not answered: a writable filesystem's requests, and those that this protocol version does not know."""
    return errno.EROFS if opcode in WRITING else errno.ENOSYS


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What kernel and session have agreed on, for as long as the filesystem is mounted. `flags` with both halves."""

    minor: int
    flags: int
    max_readahead: int

    def has(self, feature: Init) -> bool:
        return bool(self.flags & feature)


def negotiate(offered: InitRequest, without: Init = NOTHING) -> Negotiated:
    """`without`: what is not to be used although the kernel offers it. Raises Malformed for a kernel that is too old."""
    if offered.major < MAJOR or (offered.major == MAJOR and offered.minor < MINOR_MIN):
        raise Malformed(
            f"version {offered.major}.{offered.minor} of the protocol; {MAJOR}.{MINOR_MIN} is the oldest known"
        )
    return Negotiated(min(offered.minor, MINOR), offered.flags & WANTED & ~without, offered.max_readahead)


def init_out(agreed: Negotiated, max_background: int) -> bytes:
    """`max_background`: how many requests the kernel may have under way on its own account, at most 65535."""
    return _INIT_OUT.pack(
        MAJOR,
        agreed.minor,
        agreed.max_readahead,
        agreed.flags & 0xFFFFFFFF,
        max_background,
        max_background * 3 // 4,
        _WRITE_BYTES,
        1,  # times are exact to the nanosecond
        READ_PAGES_MAX,
        0,
        agreed.flags >> 32,
        1 if agreed.has(Init.PASSTHROUGH) else 0,  # backing files are on a filesystem that is not stacked itself
    )


@dataclass(frozen=True, slots=True)
class Inode:
    """What stat shows. `number` is what people see; `mode` has the file type; times are nanoseconds since the epoch."""

    number: int
    mode: int
    size: int
    time_ns: int
    uid: int
    gid: int
    block_bytes: int


def _attr(inode: Inode) -> bytes:
    seconds, nanoseconds = divmod(inode.time_ns, 10**9)
    return _ATTR.pack(
        inode.number,
        inode.size,
        -(-inode.size // 512),
        seconds,
        seconds,
        seconds,
        nanoseconds,
        nanoseconds,
        nanoseconds,
        inode.mode,
        1,
        inode.uid,
        inode.gid,
        0,
        inode.block_bytes,
        0,
    )


def _split(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9)


def entry_out(nodeid: int, inode: Inode, name_valid_s: float, valid_s: float) -> bytes:
    """A name leads to `nodeid`; for how long the kernel may believe that, and the attributes."""
    (name_s, name_ns), (attr_s, attr_ns) = _split(name_valid_s), _split(valid_s)
    return _ENTRY.pack(nodeid, 0, name_s, attr_s, name_ns, attr_ns) + _attr(inode)


def absent_out(valid_s: float) -> bytes:
    """A name leads nowhere, for so long."""
    seconds, nanoseconds = _split(valid_s)
    return _ENTRY.pack(0, 0, seconds, 0, nanoseconds, 0) + bytes(_ATTR.size)


def attr_out(inode: Inode, valid_s: float) -> bytes:
    return _ATTR_OUT.pack(*_split(valid_s), 0) + _attr(inode)


def statx_out(inode: Inode, valid_s: float) -> bytes:
    time = (*divmod(inode.time_ns, 10**9), 0)
    return _STATX.pack(
        *_split(valid_s),
        0,
        _STATX_BASIC,
        inode.block_bytes,
        0,
        1,
        inode.uid,
        inode.gid,
        inode.mode,
        0,
        inode.number,
        inode.size,
        -(-inode.size // 512),
        0,
        *time,
        0,
        0,
        0,  # when it was made is not known
        *time,
        *time,
        0,
        0,
        0,
        0,
    )


def open_out(handle: int, flags: Open, backing: int = 0) -> bytes:
    """`backing`: the id of the backing file, with Open.PASSTHROUGH."""
    return _OPEN_OUT.pack(handle, flags, backing)


def statfs_out(size: int, files: int, block_bytes: int, name_bytes: int) -> bytes:
    """Nothing is free."""
    return _STATFS.pack(-(-size // block_bytes), 0, 0, files, 0, block_bytes, name_bytes, block_bytes, 0)


def xattr_size_out(size: int) -> bytes:
    return _GETXATTR_OUT.pack(size, 0)


class Listing:
    """Entries of a directory, as many as there is room for. `plus`: with their attributes, so that no lookup is needed."""

    def __init__(self, room: int, *, plus: bool) -> None:
        self._room = room
        self._plus = plus
        self.content = bytearray()

    def add(self, name: bytes, nodeid: int, inode: Inode, following: int, name_valid_s: float, valid_s: float) -> bool:
        """False where it has no room. `following` is the position after it."""
        padding = -(_DIRENT.size + len(name)) % 8
        length = _DIRENT.size + len(name) + padding + (_ENTRY.size + _ATTR.size if self._plus else 0)
        if len(self.content) + length > self._room:
            return False
        if self._plus:
            self.content += entry_out(nodeid, inode, name_valid_s, valid_s)
        self.content += _DIRENT.pack(inode.number, following, len(name), inode.mode >> 12)
        self.content += name + bytes(padding)
        return True


# What the kernel is told unasked ---------------------------------------------------------------------------------------

_NOTIFY_INVAL_INODE = 2
_NOTIFY_INVAL_ENTRY = 3
_NOTIFY_RESEND = 7
_INVAL_INODE = struct.Struct("<Qqq")
_INVAL_ENTRY = struct.Struct("<QII")


def _notification(code: int, body: bytes = b"") -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, 0) + body


def invalidate_inode(nodeid: int) -> bytes:
    """All pages and attributes of it are out of date."""
    return _notification(_NOTIFY_INVAL_INODE, _INVAL_INODE.pack(nodeid, 0, 0))


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """The name is to be looked up anew."""
    return _notification(_NOTIFY_INVAL_ENTRY, _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0")


def resend() -> bytes:
    """What was taken and not answered is to be sent again. Linux 6.9, with Init.HAS_RESEND."""
    return _notification(_NOTIFY_RESEND)
