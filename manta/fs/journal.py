"""What the next daemon must know to go on serving this one's kernel: the journal in a memfd, its format here and only here.

Appended to by `manta.fs` (names and open files), `manta.operations.mounts` (mounts and what they have frozen) and the session (what was
negotiated); belongs to the trio thread. Memory and never disk: it holds the tokens of mounts. Whoever keeps the descriptor (the keeper,
systemd) hands it to the next daemon, which reads it with `Journal.open` and appends to it in its turn.

The log is written so that SIGKILL at any instant leaves a readable one: a record first, then, in one aligned store of 8 bytes, the length
that counts. When it has grown to twice what it was when it was last written anew, and LITTER_BYTES more, those who append write their
present state as a new log into free space of the same file, and one store makes it the one that counts.

    page 0      native 64-bit words: magic, version, which of two logs counts, start and length of each, daemons so far, given up
    a log       records: one byte that tells the kind, then its fields in the machine's byte order: it never leaves the machine

A record is appended BEFORE the state that it tells of is changed: appending may have the state written anew.
"""

from __future__ import annotations

import logging
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from manta.errors import Corrupt

log = logging.getLogger(__name__)

_MAGIC = int.from_bytes(b"mantajrn", "little")
VERSION = 1
"""Of the format. A daemon that finds another ends the survival of the mounts in order, and begins anew."""

_PAGE = mmap.PAGESIZE
_FILE_BYTES = 16 * _PAGE
"""At the start: about a thousand names."""

FILE_BYTES_MAX = 256 * 1024 * 1024
"""Bound on the memory of it all. A name takes about 60 bytes: this is for some two million that the kernel remembers."""

LITTER_BYTES = 4 * 1024 * 1024
"""Of a short log: what may be outdated of it. 300,000 lookups and forgets."""

_HANDLES_PER_DAEMON = 1 << 40
"""Handle numbers of one daemon. The next begins beyond them, so that no number that the kernel still has is ever given twice, directories
included, which are not recorded."""

_ACTIVE, _STARTS, _LENGTHS, _DAEMONS, _GIVEN_UP = 2, (3, 5), (4, 6), 7, 8

# Kinds of records.
_SESSION, _MOUNTED, _UNMOUNTED, _NUMBERED, _FROZEN, _SHOWED, _NAMED, _LOOKED_UP, _FORGOT, _OPENED, _CLOSED = range(
    1, 12
)

_TEXT = struct.Struct("=BI")  # length, then so many bytes: one string, or JSON
_TEXTS = struct.Struct("=BHI")  # two lengths, then both strings
_NUMBER = struct.Struct("=BQ")
_NAME = struct.Struct("=BHQQQ")  # length of the name, nodeid, number, parent; then the name
_COUNT = struct.Struct("=BQQ")  # nodeid, lookups
_OPEN = struct.Struct("=BBQQiQ")  # native, handle, nodeid, backing, request


@dataclass(slots=True)
class RecoveredName:
    """A nodeid that the kernel may use: where it was found last, and how many lookups it has to forget."""

    number: int
    parent: int
    name: bytes
    lookups: int


@dataclass(frozen=True, slots=True)
class RecoveredFile:
    """An open file. `request`: the kernel's number of the request that opened it, 0 where it was not told."""

    nodeid: int
    native: bool
    backing: int
    request: int


class Frozen(msgspec.Struct, frozen=True, array_like=True):
    """What a mount shows for a revision of a repo (None: the default one), for its life."""

    repo: str
    revision: str | None
    commit: str
    stale: bool


class Showed(msgspec.Struct, frozen=True, array_like=True):
    """A tree that a mount has had the right to, and holds."""

    repo: str
    commit: str


@dataclass(slots=True)
class RecoveredMount:
    """`content` is what `Journal.mounted` was given last."""

    content: bytes
    frozen: list[Frozen] = field(default_factory=list)
    showed: list[Showed] = field(default_factory=list)


@dataclass(slots=True)
class Recovered:
    """What a daemon left."""

    session: bytes | None = None
    """What `Journal.session` was given; None: no session had begun."""
    mounts: dict[str, RecoveredMount] = field(default_factory=dict)
    mounts_so_far: int = 0
    names: dict[int, RecoveredName] = field(default_factory=dict)
    """By nodeid: those with lookups or open files, and the folders that lead to them."""
    files: dict[int, RecoveredFile] = field(default_factory=dict)
    """By handle."""


_frozen_decoder = msgspec.json.Decoder(tuple[str, Frozen])
_showed_decoder = msgspec.json.Decoder(tuple[str, Showed])


class _Full(Exception):
    """There is no room for a record within the bounds."""


class Journal:
    """Use `create` or `open`. No method raises: where the journal cannot go on, `lost` says why, and nothing more is recorded."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        """The memfd, for the keeper. Ours until `close`."""
        self.lost: str | None = None
        """Why the mounts will not outlive this daemon: a sentence, None while they will."""
        self._rewriters: list[Callable[[], None]] = []
        self._ceiling = FILE_BYTES_MAX
        """Up to where the log may grow: into the old one never."""
        self._rewriting = False
        self._session = b""
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        # A map of its own, because one of which there is a view cannot be resized. The view stores a word in one instruction (memcpy of 8
        # bytes), which is what a kill at any instant needs; struct does not promise that.
        self._head_map = mmap.mmap(fd, _PAGE)
        self._head = memoryview(self._head_map).cast("Q")
        active = self._head[_ACTIVE]
        self._start = self._head[_STARTS[active]]
        self._at = self._start + self._head[_LENGTHS[active]]
        self._length_word = _LENGTHS[active]
        self._due = 2 * (self._at - self._start) + LITTER_BYTES
        self._set_limit()

    @classmethod
    def create(cls) -> Self:
        """A journal of which nothing is known yet. Raises OSError where the system refuses a memfd."""
        fd = os.memfd_create("manta-journal", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, _FILE_BYTES)
            words = [VERSION, 0, _PAGE, 0, _PAGE, 0, 0, 0]
            os.pwrite(fd, struct.pack("=8Q", *words), 8)
            os.pwrite(fd, struct.pack("=Q", _MAGIC), 0)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, fd: int) -> tuple[Self, Recovered]:
        """The journal that another daemon wrote, and what is in it. `fd` is ours from now on, unless this raises.

        Raises Corrupt, with a sentence that says how the mounts end, for what no daemon of this version wrote to its end.
        """
        recovered = _read(fd)
        journal = cls(fd)
        journal._session = recovered.session or b""
        journal._head[_DAEMONS] += 1
        return journal, recovered

    @property
    def first_handle(self) -> int:
        """The number from which on this daemon may number handles."""
        return self._head[_DAEMONS] * _HANDLES_PER_DAEMON + 1

    def rewritten_by(self, rewrite: Callable[[], None]) -> None:
        """`rewrite` appends all that is true now of what its owner tells of. Called from within any append."""
        self._rewriters.append(rewrite)

    def rewrite(self) -> None:
        """Writes what is true now as a new log, for an owner whose state has ended as a whole."""
        if self.lost is None:
            self._guarded(self._compact)

    def close(self) -> None:
        """Gives the memory back, unless a keeper has the descriptor too."""
        self._head.release()
        self._head_map.close()
        self._map.close()
        os.close(self.fd)

    # Records -----------------------------------------------------------------------------------------------------------

    def session(self, negotiated: bytes) -> None:
        """What the session needs to go on with the kernel's connection."""
        self._session = negotiated
        self._append(_TEXT.pack(_SESSION, len(negotiated)) + negotiated)

    def mounted(self, mount_id: str, content: bytes) -> None:
        """A mount, or what has changed of it. `content` may hold its token."""
        name = mount_id.encode()
        self._append(_TEXTS.pack(_MOUNTED, len(name), len(content)) + name + content)

    def unmounted(self, mount_id: str) -> None:
        name = mount_id.encode()
        self._append(_TEXT.pack(_UNMOUNTED, len(name)) + name)

    def numbered(self, mounts: int) -> None:
        """So many mounts were made so far: a number is not given twice."""
        self._append(_NUMBER.pack(_NUMBERED, mounts))

    def frozen(self, mount_id: str, frozen: Frozen) -> None:
        content = msgspec.json.encode((mount_id, frozen))
        self._append(_TEXT.pack(_FROZEN, len(content)) + content)

    def showed(self, mount_id: str, showed: Showed) -> None:
        content = msgspec.json.encode((mount_id, showed))
        self._append(_TEXT.pack(_SHOWED, len(content)) + content)

    # What follows comes with every lookup, so it is written in place. About 0.5 µs each.

    def named(self, nodeid: int, number: int, parent: int, name: bytes) -> None:
        """The kernel has looked up `nodeid`, for the first time or at another place than before."""
        size = _NAME.size + len(name)
        if self._at + size > self._limit and not self._make_room(size):
            return
        at = self._at
        _NAME.pack_into(self._map, at, _NAMED, len(name), nodeid, number, parent)
        end = at + size
        self._map[at + _NAME.size : end] = name
        self._at = end
        self._head[self._length_word] = end - self._start

    def looked_up(self, nodeid: int, lookups: int = 1) -> None:
        """The kernel has looked it up once more, where it was last."""
        self._counted(_LOOKED_UP, nodeid, lookups)

    def forgot(self, nodeid: int, lookups: int) -> None:
        self._counted(_FORGOT, nodeid, lookups)

    def opened(self, handle: int, nodeid: int, *, native: bool, backing: int, request: int) -> None:
        """`backing` is the kernel's number of the backing file where the file is native. Said twice of one handle, the later counts."""
        size = _OPEN.size
        if self._at + size > self._limit and not self._make_room(size):
            return
        at = self._at
        _OPEN.pack_into(self._map, at, _OPENED, native, handle, nodeid, backing, request)
        self._at = end = at + size
        self._head[self._length_word] = end - self._start

    def closed(self, handle: int) -> None:
        self._append(_NUMBER.pack(_CLOSED, handle))

    def _counted(self, kind: int, nodeid: int, lookups: int) -> None:
        size = _COUNT.size
        if self._at + size > self._limit and not self._make_room(size):
            return
        at = self._at
        _COUNT.pack_into(self._map, at, kind, nodeid, lookups)
        self._at = end = at + size
        self._head[self._length_word] = end - self._start

    def _append(self, record: bytes) -> None:
        size = len(record)
        if self._at + size > self._limit and not self._make_room(size):
            return
        at = self._at
        self._map[at : at + size] = record
        self._at = end = at + size
        self._head[self._length_word] = end - self._start

    # Room --------------------------------------------------------------------------------------------------------------

    def _set_limit(self) -> None:
        """Up to where records may be appended without a second look."""
        due = self._ceiling if self._rewriting else self._start + self._due
        self._limit = min(len(self._map), due)

    def _make_room(self, size: int) -> bool:
        """Room for `size` bytes at `_at`. False where there is none any more; within a rewriting it raises _Full instead."""
        if self._rewriting:
            self._grow(size)
            return True
        if self.lost is not None:
            return False

        def make() -> None:
            if self._at + size > self._start + self._due:
                self._compact()
            self._grow(size)

        return self._guarded(make)

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except (_Full, OSError) as e:
            bound = f"it would take more than {FILE_BYTES_MAX >> 20} MiB" if isinstance(e, _Full) else str(e)
            self.lost = (
                f"The journal of names and open files could not go on ({bound}): the mounts will not outlive this daemon."
                " Restart it when no reader minds."
            )
            log.error("%s", self.lost)
            self._head[_GIVEN_UP] = 1
            self._limit = 0
            return False
        return True

    def _grow(self, size: int) -> None:
        """Raises _Full, OSError."""
        needed = self._at + size
        if needed > self._ceiling:
            raise _Full
        if needed > len(self._map):
            self._map.resize(min(max(2 * len(self._map), _paged(needed)), FILE_BYTES_MAX))
        self._due = max(self._due, needed - self._start)
        self._set_limit()

    def _compact(self) -> None:
        """Writes the present state as a new log before the old one or after it, has it count, and frees the old one's memory.

        Raises _Full, OSError.
        """
        old_start, old_end, old_word = self._start, self._at, self._length_word
        slot = 1 - self._head[_ACTIVE]
        # What is true now cannot take more than the log that led to it.
        before = old_start - _PAGE >= old_end - old_start + _PAGE
        self._start = self._at = _PAGE if before else _paged(old_end)
        self._length_word = _LENGTHS[slot]
        self._head[_STARTS[slot]], self._head[_LENGTHS[slot]] = self._start, 0
        self._rewriting, self._ceiling = True, old_start if before else FILE_BYTES_MAX
        try:
            self._set_limit()
            if self._session:
                self.session(self._session)
            for rewrite in self._rewriters:
                rewrite()
        except BaseException:
            self._start, self._at, self._length_word = old_start, old_end, old_word
            raise
        finally:
            self._rewriting, self._ceiling = False, FILE_BYTES_MAX
        self._head[_ACTIVE] = slot
        self._due = 2 * (self._at - self._start) + LITTER_BYTES
        if before:
            self._map.resize(_paged(self._at + 1))
        else:
            self._map.madvise(mmap.MADV_REMOVE, _PAGE, self._start - _PAGE)
        self._set_limit()


class NoJournal(Journal):
    """For a session whose mounts end with the daemon: records nothing."""

    def __init__(self) -> None:
        self.fd = -1
        self.lost = None

    @property
    def first_handle(self) -> int:
        return 1

    def rewritten_by(self, rewrite: Callable[[], None]) -> None:
        pass

    def rewrite(self) -> None:
        pass

    def close(self) -> None:
        pass

    def session(self, negotiated: bytes) -> None:
        pass

    def named(self, nodeid: int, number: int, parent: int, name: bytes) -> None:
        pass

    def opened(self, handle: int, nodeid: int, *, native: bool, backing: int, request: int) -> None:
        pass

    def _counted(self, kind: int, nodeid: int, lookups: int) -> None:
        pass

    def _append(self, record: bytes) -> None:
        pass


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


# Reading -------------------------------------------------------------------------------------------------------------------


def _corrupt(why: str) -> Corrupt:
    return Corrupt(f"The journal that the daemon before left {why}: its mounts cannot be taken over. Mount again.")


def _read(fd: int) -> Recovered:
    """Raises Corrupt. Takes time and memory in proportion to the file, whatever is in it."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not _PAGE <= status.st_size <= FILE_BYTES_MAX:
            raise _corrupt("has a size that none can have")
        with mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ) as data:
            words = struct.unpack_from("=9Q", data)
            if words[0] != _MAGIC:
                raise _corrupt("is none")
            if words[1] != VERSION:
                raise _corrupt(f"has format {words[1]}, this daemon knows {VERSION}")
            if words[_GIVEN_UP]:
                raise _corrupt("was given up by it")
            if words[_ACTIVE] > 1:
                raise _corrupt("has a damaged header")
            start, length = words[_STARTS[words[_ACTIVE]]], words[_LENGTHS[words[_ACTIVE]]]
            if start < _PAGE or start + length > status.st_size or words[_DAEMONS] >= (1 << 63) // _HANDLES_PER_DAEMON:
                raise _corrupt("has a damaged header")
            return _replayed(data, start, start + length)
    except (OSError, ValueError) as e:
        raise _corrupt(f"cannot be read ({e})") from e


def _replayed(data: mmap.mmap, at: int, end: int) -> Recovered:
    """Raises Corrupt."""
    found = Recovered()
    names, files = found.names, found.files
    frozen: dict[str, dict[tuple[str, str | None], Frozen]] = {}
    showed: dict[str, dict[Showed, None]] = {}
    begin = at
    try:
        while at < end:
            kind = data[at]
            record = at
            if kind in (_LOOKED_UP, _FORGOT):
                _, nodeid, lookups = _COUNT.unpack_from(data, at)
                at += _COUNT.size
                if (known := names.get(nodeid)) is not None:
                    known.lookups = known.lookups + lookups if kind == _LOOKED_UP else max(known.lookups - lookups, 0)
            elif kind == _NAMED:
                _, length, nodeid, number, parent = _NAME.unpack_from(data, at)
                at += _NAME.size
                name = data[at : at + length]
                at += length
                if (known := names.get(nodeid)) is not None:
                    known.number, known.parent, known.name, known.lookups = number, parent, name, known.lookups + 1
                else:
                    names[nodeid] = RecoveredName(number, parent, name, 1)
            elif kind == _OPENED:
                _, native, handle, nodeid, backing, request = _OPEN.unpack_from(data, at)
                at += _OPEN.size
                files[handle] = RecoveredFile(nodeid, bool(native), backing, request)
            elif kind in (_CLOSED, _NUMBERED):
                _, number = _NUMBER.unpack_from(data, at)
                at += _NUMBER.size
                if kind == _CLOSED:
                    files.pop(number, None)
                else:
                    found.mounts_so_far = max(found.mounts_so_far, number)
            elif kind == _MOUNTED:
                _, length, more = _TEXTS.unpack_from(data, at)
                at += _TEXTS.size
                mount_id, content = data[at : at + length].decode(), data[at + length : at + length + more]
                at += length + more
                found.mounts[mount_id] = RecoveredMount(content)
            elif kind in (_SESSION, _UNMOUNTED, _FROZEN, _SHOWED):
                _, length = _TEXT.unpack_from(data, at)
                at += _TEXT.size
                text = data[at : at + length]
                at += length
                if kind == _SESSION:
                    found.session = text
                elif kind == _UNMOUNTED:
                    mount_id = text.decode()
                    for of_mounts in (found.mounts, frozen, showed):
                        of_mounts.pop(mount_id, None)
                elif kind == _FROZEN:
                    mount_id, commit = _frozen_decoder.decode(text)
                    frozen.setdefault(mount_id, {})[commit.repo, commit.revision] = commit
                else:
                    mount_id, tree = _showed_decoder.decode(text)
                    showed.setdefault(mount_id, {})[tree] = None
            else:
                raise _corrupt(f"has a record of kind {kind} at {at - begin}")
            if at > end:
                raise _corrupt(f"has a record that is cut short at {record - begin}")
    except (struct.error, UnicodeDecodeError, msgspec.DecodeError) as e:
        raise _corrupt(f"has a damaged record at {record - begin} ({e})") from e
    for mount_id, mount in found.mounts.items():
        mount.frozen = list(frozen.get(mount_id, {}).values())
        mount.showed = list(showed.get(mount_id, {}))
    _drop_unused(found)
    return found


def _drop_unused(found: Recovered) -> None:
    """Leaves the names that the kernel knows, and the folders that lead to them."""
    used: set[int] = set()
    pending = [nodeid for nodeid, name in found.names.items() if name.lookups]
    pending += [file.nodeid for file in found.files.values()]
    while pending:
        nodeid = pending.pop()
        if nodeid not in used and nodeid in found.names:
            used.add(nodeid)
            pending.append(found.names[nodeid].parent)
    for nodeid in [nodeid for nodeid in found.names if nodeid not in used]:
        del found.names[nodeid]
