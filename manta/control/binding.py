"""Mountpoints of this machine: what is mounted where, bind mounts and their end, here and only here.

Used by the CLI and by the CSI driver, in the caller's process: the daemon only makes the directory that is bound. What the kernel
has mounted is read from mountinfo, never by a path call on the mountpoint: a FUSE mount whose daemon is gone or stuck would
take the caller with it. The one question that needs such a call (`probe`) is asked by a child process that can be left behind.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from manta.errors import Absent, Denied, InUse, Invalid, MantaError

MOUNTINFO = Path("/proc/self/mountinfo")

PROBE_S = 10.0
"""How long a mount may take to answer statvfs. The daemon answers from memory; a busy machine needs tens of milliseconds."""

# linux/mount.h
_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_REMOUNT = 32
_MS_BIND = 4096
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo."""

    id: int
    parent: int
    device: str
    """MAJOR:MINOR of the superblock: the same for all binds of one FUSE mount."""
    root: str
    """The directory of that filesystem that is visible here."""
    directory: str
    options: frozenset[str]
    fstype: str
    source: str

    @property
    def is_manta(self) -> bool:
        """A mount that a Manta daemon made: type fuse.manta, or plain fuse with our name as its source."""
        return self.fstype == "fuse.manta" or (self.fstype.startswith("fuse") and self.source.startswith("manta"))


def mounts(text: str | None = None) -> list[MountEntry]:
    """What is mounted in this mount namespace, in the order of mounting. `text` is the content of a mountinfo file."""
    if text is None:
        text = os.fsdecode(MOUNTINFO.read_bytes())
    return [_parse(line) for line in text.splitlines() if line]


def _parse(line: str) -> MountEntry:
    # 36 35 98:0 /root /directory rw,noatime shared:1 - type source super-options
    before, _, after = line.partition(" - ")
    number, parent, device, root, directory, options, *_ = before.split(" ")
    fstype, source, *_ = [*after.split(" "), ""]
    return MountEntry(
        int(number),
        int(parent),
        device,
        _unescape(root),
        _unescape(directory),
        frozenset(options.split(",")),
        fstype,
        _unescape(source),
    )


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as octal escapes."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def mounted_at(directory: str, entries: Iterable[MountEntry] | None = None) -> MountEntry | None:
    """The topmost mount on exactly this directory (absolute, see `locate`)."""
    found = None
    for entry in mounts() if entries is None else entries:
        if entry.directory == directory:
            found = entry
    return found


def locate(directory: str | Path) -> str:
    """The absolute path of `directory` as mountinfo writes it, without touching a mount that may be there.

    Only the parents are resolved while the directory itself is a mountpoint; a symlink to one is followed.
    """
    path = os.path.abspath(directory)
    here = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) if path != "/" else path
    return here if mounted_at(here) else os.path.realpath(here)


class Answer(enum.Enum):
    """What a mount said to `probe`."""

    ALIVE = "alive"
    DEAD = "dead"
    """Its daemon is gone: "Transport endpoint is not connected"."""
    SILENT = "silent"
    """No answer in time: its daemon is stuck, or waits for a successor."""


def probe(directory: str, *, timeout_s: float = PROBE_S) -> Answer:
    """Asks the filesystem at `directory` for its statvfs, in a child process that can be abandoned."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, directory],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        code = child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        # The kernel may not let it go before the request is answered; whoever waits for it must not be this thread.
        threading.Thread(target=child.wait, daemon=True, name=f"reap-{child.pid}").start()
        return Answer.SILENT
    return Answer.DEAD if code in {errno.ENOTCONN, errno.ECONNABORTED} else Answer.ALIVE


_PROBE = """
import os, sys
try:
    os.statvfs(sys.argv[1])
    os.stat(sys.argv[1])
except OSError as error:
    sys.exit(error.errno)
"""


def bind(source: str, directory: str) -> None:
    """Shows `source` at `directory`, read-only, without set-uid programs and devices. Leaves nothing behind on failure."""
    _mount(source, directory, _MS_BIND)
    try:
        # A bind takes its flags only from a second call: the first one ignores them.
        _mount("none", directory, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    except MantaError:
        _umount(directory, _MNT_DETACH)
        raise


def unbind(directory: str, *, lazy: bool = False) -> None:
    """Ends the topmost mount at `directory`; lazily: it disappears now, and open files stay readable until they are closed.

    Raises InUse when something holds it open, Absent when nothing is mounted there, Denied without the privilege.
    """
    try:
        _umount(directory, _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0))
    except Denied:
        entry = mounted_at(directory)
        if os.geteuid() == 0 or entry is None or not entry.fstype.startswith("fuse"):
            raise
        _fusermount(directory, lazy=lazy)


def _fusermount(directory: str, *, lazy: bool) -> None:
    """Users may unmount their own FUSE mounts, through the set-uid program that mounted them."""
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", directory]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False, cwd="/")
    except FileNotFoundError as error:
        raise Denied(f"{directory} cannot be unmounted without root: fusermount3 is not installed (fuse3).") from error
    except subprocess.TimeoutExpired as error:
        raise InUse(f"{directory} could not be unmounted: fusermount3 did not end. Try --lazy.") from error
    if done.returncode:
        said = done.stderr.strip()
        kind = InUse if "busy" in said.lower() else Denied
        raise kind(f"{directory} could not be unmounted: {said or 'fusermount3 failed'}.")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy."""

    pid: int
    command: str
    how: str
    """open, working directory, mapped or root directory."""


def holders(directory: str, *, limit: int = 8) -> list[Holder]:
    """Processes that use files below `directory`, as far as /proc shows them to this user.

    Reads only the links in /proc, which the kernel answers from memory: no call reaches the mount.
    """
    found: list[Holder] = []
    for process in sorted((p for p in Path("/proc").iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        how = _holds(process, directory)
        if how:
            try:
                command = (process / "comm").read_text(errors="replace").strip()
            except OSError:
                continue
            found.append(Holder(int(process.name), command, how))
            if len(found) == limit:
                break
    return found


def _holds(process: Path, directory: str) -> str:
    def below(target: str) -> bool:
        return target == directory or target.startswith(f"{directory}/")

    for link, how in (("cwd", "working directory"), ("root", "root directory")):
        try:
            if below(os.readlink(process / link)):
                return how
        except OSError:
            pass
    try:
        for descriptor in os.listdir(process / "fd"):
            try:
                if below(os.readlink(process / "fd" / descriptor)):
                    return "open"
            except OSError:
                continue
        with open(process / "maps", encoding=sys.getfilesystemencoding(), errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and below(_OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[5])):
                    return "mapped"
    except OSError:
        pass  # gone meanwhile, or another user's
    return ""


def _mount(source: str, directory: str, flags: int) -> None:
    # None for type and data: a bind has neither.
    if _libc().mount(os.fsencode(source), os.fsencode(directory), None, flags, None):
        number = ctypes.get_errno()
        if number == errno.ENOENT:
            raise Absent(f"{source} could not be bound to {directory}: one of them does not exist here.")
        _raise(number, f"{source} could not be bound to {directory}")


def _umount(directory: str, flags: int) -> None:
    if _libc().umount2(os.fsencode(directory), flags):
        number = ctypes.get_errno()
        if number in {errno.EINVAL, errno.ENOENT}:
            raise Absent(f"{directory} could not be unmounted: nothing is mounted there.")
        _raise(number, f"{directory} could not be unmounted")


def _raise(number: int, what: str) -> NoReturn:
    why = os.strerror(number)
    if number in {errno.EPERM, errno.EACCES}:
        raise Denied(f"{what}: {why}. Mounting needs root (CAP_SYS_ADMIN).")
    if number == errno.EBUSY:
        raise InUse(f"{what}: something still uses it.")
    raise Invalid(f"{what}: {why}.")


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
    libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
    return libc
