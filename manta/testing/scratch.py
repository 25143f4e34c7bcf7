"""A run's one folder, and how it and all that hangs on it go away, here and only here: mounts, processes, files.

Everything a run makes lies below its folder, and every process it starts has the folder's path in its environment (`MARKER`), which
daemons and workers inherit. So leftovers are found by that path alone, also those of a run that was killed: the folder's name carries its
owner's pid and start time, and the next run sweeps the folders of dead owners. A mount that does not answer any more is aborted through
/sys/fs/fuse, which frees its readers; nothing here touches a path below a mount before. Used by `manta.testing.cluster` and
`benchmarks.rig`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "TESTING_SCRATCH"
"""Not MANTA_: those are settings, which whoever starts a daemon may leave out of its environment."""
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

END_TIMEOUT_S = 5
"""How long processes may take to end by SIGTERM, and again by SIGKILL."""

END_ROUNDS = 3
"""A keeper starts its daemon anew and a daemon its keeper: what was started while the others were being ended goes in the next round."""

UMOUNT_TIMEOUT_S = 10

_NAME = re.compile(r"manta-scratch-(\d+)-(\d+)-\w+")
_CONNECTIONS = Path("/sys/fs/fuse/connections")


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    """A fresh folder below `base`. At the end, however it comes, nothing of it is left. First sweeps what killed runs left in `base`."""
    base.mkdir(parents=True, exist_ok=True)
    sweep(base)
    prefix = f"manta-scratch-{os.getpid()}-{start_time(os.getpid())}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base)).resolve()
    before = os.environ.get(MARKER)
    os.environ[MARKER] = str(folder)  # for every process that is started from here on
    try:
        yield folder
    finally:
        del os.environ[MARKER]
        if before is not None:
            os.environ[MARKER] = before
        remove(folder)


def sweep(base: Path) -> list[Path]:
    """Removes the folders in `base` whose owners are gone, with their mounts and processes."""
    removed = []
    for folder in base.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and start_time(int(match[1])) != int(match[2]):
            remove(folder)
            removed.append(folder)
    return removed


def remove(folder: Path) -> None:
    """Takes `folder` away with all mounts and processes that belong to it. Signals wait until it is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for device in fuse_devices(folder):
            abort(device)
        for _ in range(END_ROUNDS):
            end(processes(folder))
        detach(folder)
        if not mounts(folder):  # else rmtree would walk into whatever is still mounted
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def detach(folder: Path) -> None:
    """Unmounts all below `folder`, lazily: a dead mount has no daemon to wait for, and a busy one would keep the folder."""
    for point in reversed(mounts(folder)):
        _run("umount", "--lazy", str(point))


def mounts(folder: Path) -> list[Path]:
    """The mount points below `folder`, in the order they were mounted."""
    return [point for point, _, _ in mountinfo() if point.is_relative_to(folder.resolve())]


def fuse_devices(folder: Path) -> set[int]:
    """The FUSE connections of the mounts below `folder`, by the number that /sys/fs/fuse/connections gives them: the minor device."""
    return {
        minor
        for point, minor, kind in mountinfo()
        if point.is_relative_to(folder.resolve()) and (kind == "fuse" or kind.startswith("fuse."))
    }


def abort(device: int) -> None:
    """Ends a FUSE connection: every request that waits on it gets an error, and readers in D state can die."""
    shown = any(_CONNECTIONS.iterdir())
    if not shown:
        _run("mount", "-t", "fusectl", "none", str(_CONNECTIONS))
    with contextlib.suppress(FileNotFoundError):  # it ended by itself
        (_CONNECTIONS / str(device) / "abort").write_text("1")
    if not shown:
        _run("umount", str(_CONNECTIONS))


def _run(*command: str) -> None:
    """Without complaint: each of these may find that there is nothing left to do."""
    subprocess.run(command, timeout=UMOUNT_TIMEOUT_S, capture_output=True, check=False)


def processes(folder: Path) -> list[int]:
    """The processes that have `folder` in their environment, this one never."""
    return processes_with(MARKER, str(folder))


def processes_with(variable: str, value: str) -> list[int]:
    """The processes that have this variable in their environment as it was when they were started; this one never."""
    entry = f"{variable}={value}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        pid = int(environ.parent.name)
        try:
            if pid != os.getpid() and entry in environ.read_bytes().split(b"\0"):
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
    return found


def open_files(pid: int) -> list[str]:
    """What a process's descriptors refer to, as /proc names it; without those that are closed meanwhile, nothing of one that ended."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def command_line(pid: int) -> bytes:
    """A process's arguments, each with a zero byte behind it; empty for one that ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def end(pids: list[int]) -> None:
    """SIGTERM, then SIGKILL to what remains: all of it stopped before, so that none starts another in its stead."""
    for signum in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        if signum != signal.SIGSTOP:
            pids = await_end(pids, END_TIMEOUT_S)


def await_end(pids: list[int], timeout_s: float) -> list[int]:
    """Waits until they have ended, at most `timeout_s`; returns those that have not. A zombie has ended."""
    deadline = time.monotonic() + timeout_s
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def start_time(pid: int) -> int:
    """Ticks from boot to the process's start, which with the pid names it for good; -1 where there is none."""
    fields = _stat(pid)
    return int(fields[19]) if fields else -1


def parent(pid: int) -> int:
    """The pid of the process's parent; 0 where there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _runs(pid: int) -> bool:
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def mountinfo(pid: int | None = None) -> list[tuple[Path, int, str]]:
    """(mount point, minor device, filesystem type) of all mounts, in the order of mounting, as the process `pid` sees them, or this one."""
    rows = []
    for line in Path(f"/proc/{pid or 'self'}/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        # The kernel writes blanks and backslashes in paths as three octal digits.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        rows.append((Path(point), int(words[2].partition(":")[2]), rest.split(" ")[0]))
    return rows
