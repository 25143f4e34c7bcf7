"""What is mounted where, as the driver asks it, and the calls that change it at a volume's target, here and only here.

All of it blocks and runs in threads (`manta_csi.threads`). No path call is made on a target that has a mount: a FUSE mount whose daemon
is gone or stuck would take the caller with it. Only `Attempt`, which binds, has the kernel look a name up in the daemon's filesystem.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from manta.control.binding import MOUNTINFO, MountEntry, bind, mounts, unbind
from manta.errors import Absent, InUse, Invalid, MantaError, Unavailable

log = logging.getLogger(__name__)

STACKED_MAX = 64
"""Mounts on one target, one over the other, that are taken away. A driver that was killed at the wrong moment leaves two."""

_ESCAPES = {" ": "\\040", "\t": "\\011", "\n": "\\012", "\\": "\\134"}


def _escaped(path: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in path)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of a filesystem, whatever path shows it."""

    device: str
    root: str


class MountTable:
    """mountinfo at one moment. A node has thousands of lines, of which we want one or two: the others are not parsed."""

    def __init__(self, text: str) -> None:
        self._lines = [(line, line.split(" ", 5)[4]) for line in text.splitlines() if line.count(" ") > 5]

    @classmethod
    def read(cls) -> MountTable:
        return cls(os.fsdecode(MOUNTINFO.read_bytes()))

    def at(self, directory: str) -> MountEntry | None:
        """The topmost mount on exactly this directory."""
        wanted = _escaped(directory)
        for line, field in reversed(self._lines):
            if field == wanted:
                return mounts(line)[0]
        return None

    def holding(self, path: str) -> str | None:
        """The line of the mount that `path` lies in. None for a relative one."""
        wanted = _escaped(path)
        best: tuple[int, str] | None = None
        for line, field in self._lines:
            if (wanted == field or wanted.startswith(field.rstrip("/") + "/")) and (
                best is None or len(field) >= best[0]
            ):
                best = len(field), line
        return None if best is None else best[1]

    def place(self, path: str) -> Place | None:
        """Which directory of which filesystem `path` shows. None for a relative one."""
        if (line := self.holding(path)) is None:
            return None
        entry = mounts(line)[0]
        below = path[len(entry.directory.rstrip("/")) :]
        return Place(entry.device, (entry.root.rstrip("/") + below).rstrip("/") or "/")

    def ours_below(self, directory: str) -> dict[str, MountEntry]:
        """Manta's mounts below a directory, by their directory."""
        above = _escaped(directory).rstrip("/") + "/"
        lines = [line for line, field in self._lines if field.startswith(above) and "fuse" in line]
        return {entry.directory: entry for line in lines for entry in mounts(line) if entry.is_manta}


def place_of(entry: MountEntry) -> Place:
    return Place(entry.device, entry.root)


class Attempt:
    """One showing of a volume at its target, called in a thread: afterwards the topmost mount there shows `source`, which is the daemon's
    filesystem of today and not one that has died. Where its time is over it may still hang in the kernel, and binds when nobody wants it
    any more: then it takes its mount away again."""

    def __init__(self, source: str, target: str) -> None:
        self.source = source
        self.target = target
        self._given_up = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        try:
            self._show()
        finally:
            self.ended.set()

    def _show(self) -> None:
        table = MountTable.read()
        there = table.at(self.target)
        if there is not None:
            if place_of(there) == table.place(self.source):
                return
            log.warning("%s showed a filesystem that is no more: it is mounted anew", self.target)
            clear_target(self.target, known=True)
        make_target(self.target)
        if self._given_up.is_set():
            return
        try:
            bind(self.source, self.target)
        except Absent as error:
            raise Unavailable(
                f"{self.source} of the Manta daemon cannot be seen by the CSI driver: its container needs the daemon's mount directory"
                " at the same path, with mountPropagation HostToContainer."
            ) from error
        except Invalid as error:
            # A dead or aborted connection (ENOTCONN), most of all: the next daemon has another.
            raise Unavailable(
                f"{error.message} The next attempt may find the daemon's filesystem alive again."
            ) from error
        if self._given_up.is_set():
            _detach(self.target)

    def give_up(self) -> None:
        self._given_up.set()


def make_target(target: str) -> None:
    """Makes the directory, on which nothing is mounted, and its parents where they are missing. Fine where it is there.

    Raises Invalid where something else has the name, or a symlink leads elsewhere.
    """
    try:
        os.makedirs(os.path.dirname(target), mode=0o750, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(target, 0o750)
        if os.path.realpath(target) != target or not Path(target).is_dir():
            raise Invalid(
                f"The target {target} is no directory, or lies behind a symlink: it must be a plain path of the kubelet's."
            )
    except OSError as error:
        raise Unavailable(f"The target {target} could not be made: {error.strerror}.") from error


def clear_target(target: str, *, known: bool) -> None:
    """Takes away what is mounted on the target, now, whoever still reads it, and removes the directory. Fine where there is nothing.

    `known` is a target of a volume that we have published: otherwise only mounts of Manta are taken away, and what else is there stays.
    Raises InUse where another filesystem is mounted on it, MantaError where the directory is not empty.
    """
    for _ in range(STACKED_MAX):
        entry = MountTable.read().at(target)
        if entry is None:
            break
        if not (known or entry.is_manta):
            raise InUse(
                f"The target {target} shows another filesystem ({entry.fstype}), which Manta did not mount: unmount it."
            )
        _detach(target)
    try:
        os.rmdir(target)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse(f"The target {target} is still mounted upon.") from error
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise Unavailable(f"The target {target} could not be removed: {error.strerror}.") from error
        if known:
            raise MantaError(
                f"The target {target} is not an empty directory after the unmount: somebody wrote into the directory below the mount."
                " Empty it, and the pod can end."
            ) from error


def _detach(target: str) -> None:
    with suppress(Absent):
        unbind(target, lazy=True)


def is_gone(target: str) -> bool:
    """Whether no directory is there. Only for a target that nothing is mounted on."""
    try:
        os.lstat(target)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def is_shared(directory: str) -> bool:
    """Whether mounts below this directory are seen outside of our mount namespace: the mount that holds it has a peer group."""
    line = MountTable.read().holding(directory)
    return line is not None and any(field.startswith("shared:") for field in line.partition(" - ")[0].split(" ")[6:])
