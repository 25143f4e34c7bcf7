"""A node and its containers for tests, as mount propagation sees them, here and only here. Needs root, bash and util-linux.

The node is a mount namespace of its own: a folder, shared, stands for the host's filesystem as kubelet has it. A container is process 1
of its own pid namespace, in its own mount namespace, which shows the rest of this machine and of the node's folder only its volumes, bound
as a container runtime binds them: None (private), HostToContainer (rslave), Bidirectional (rshared). What is mounted in such a volume shows
in the node and in the other containers, or does not, by the kernel's rules and not by ours. Of the folder's plain files and sockets
this process sees all, at the same paths, and no mount.

    with node() as host:
        run = host.directory("run")
        daemon = host.container("daemon", [sys.executable, "-m", "manta", "daemon"], [Volume(run, "Bidirectional")])
        reader = host.container("reader", volumes=[Volume(run, "HostToContainer")])
        reader.run("cat", f"{run}/some/file")
        daemon.kill()  # with its namespaces

Nothing stays behind: all of it lives in the pid namespace of one process, which ends when this one does, however it ends. The kernel
kills the rest, and namespaces without processes take their mounts along. FUSE connections are aborted first, so that nobody hangs on one.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from manta.errors import Denied, MantaError, Unavailable
from manta.testing import scratch

Propagation = Literal["None", "HostToContainer", "Bidirectional"]
"""As a volumeMount of Kubernetes has it."""

COMMAND_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0
"""For the kernel to end everything in a pid namespace."""

_CAP_SYS_ADMIN = 21
_OPTION: Mapping[Propagation, str] = {
    "None": "--make-rprivate",
    "HostToContainer": "--make-rslave",
    "Bidirectional": "--make-rshared",
}

_NODE = """
set -e
{ mount -n -c --bind "$1" "$1" && mount -n -c --make-shared "$1"; } 2>&1
echo ready
exec > /dev/null
exec cat
"""
"""Process 1 of the node: it ends with this process's end of its stdin."""

_CONTAINER = """
set -e
told=$1 folder=$2 staging=$3 volumes=$4
shift 4
set_up() {
    local at=("$@") i
    mount -n -c -t proc proc /proc
    mount -n -c -t tmpfs -o mode=755 staging "$staging"
    for ((i = 0; i < volumes; i++)); do
        mkdir "$staging/$i"
        mount -n -c --rbind "${at[3*i]}" "$staging/$i"
        mount -n -c "${at[3*i+2]}" "$staging/$i"
    done
    # The node's folder goes, and nobody else may see it go.
    mount -n -c --make-rprivate "$folder"
    umount -n -c -l "$folder"
    mount -n -c -t tmpfs -o mode=755 container "$folder"
    for ((i = 0; i < volumes; i++)); do
        mkdir -p "${at[3*i+1]}"
        mount -n -c --move "$staging/$i" "${at[3*i+1]}"
    done
    umount -n -c "$staging"
    echo ready
}
set_up "$@" >&"$told" 2>&1
shift $((3 * volumes))
exec {told}>&-
exec "$@"
"""
"""Process 1 of a container. The volumes are three words each: from, to, propagation."""

_PARENT = """
{ bash -c "$0" "$@" 2>&3 3>&-; } 3>&2 2> /dev/null
exit $?
"""
"""Its parent, in the namespaces that unshare made: the first child is process 1. unshare's own --fork loses the status of who is killed."""


def obstacle() -> str:
    """Why no node can be made here, a sentence that says what to do; empty where one can."""
    absent = [program for program in ("bash", "mount", "nsenter", "unshare") if shutil.which(program) is None]
    if absent:
        return f"containers for tests need {', '.join(absent)}: apt-get install bash mount util-linux"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1:
            return ""
    return "containers for tests need CAP_SYS_ADMIN: run as root"


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory of the node (`source`, below `Node.folder`) in a container."""

    source: Path
    propagation: Propagation = "None"
    at: Path | None = None
    """Where the container has it, below `Node.folder` too; None: at the same path."""


@dataclass(slots=True)
class Container:
    """Process 1 of a container and what it started. It is there until `kill`, its own end, or the node's."""

    name: str
    process: subprocess.Popen[bytes]
    """Ends when process 1 does, with its status, 128 + N where signal N ended it. Its pid is another one's: see `pid`."""
    pid: int
    """Of process 1, as this process sees it."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` to be run inside; whoever runs it gets its exit status."""
        return _inside(self.pid, argv)

    def run(self, *argv: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Runs a command inside to its end, and returns what it printed on stdout. Raises MantaError where it fails, with `check`."""
        return _run(self.command(argv), env=env, check=check)

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process inside, which ends with the container. Whose pid this has only waits for it: to be waited for, not signalled."""
        return subprocess.Popen(self.command(argv), env=env, stdin=stdin, stdout=stdout, stderr=stderr, cwd="/")

    def signal(self, number: int) -> None:
        """To process 1, as a container runtime does. SIGKILL ends all that is inside."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = COMMAND_TIMEOUT_S) -> int:
        """The exit status of process 1, when all of it has ended. Raises subprocess.TimeoutExpired."""
        return self.process.wait(timeout=timeout_s)

    def kill(self) -> None:
        """SIGKILL, and its namespaces are gone when this returns, with every process in them."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.wait(END_TIMEOUT_S)

    def mounts(self) -> list[Path]:
        """What is mounted as this container sees it, in the order of mounting."""
        return [point for point, _, _ in scratch.mountinfo(self.pid)]


@dataclass(slots=True)
class Node:
    """The host of containers."""

    folder: Path
    """Stands for the host's filesystem. Short: a socket's path has 107 bytes."""
    _staging: Path
    _process: subprocess.Popen[bytes]
    _pid: int
    _containers: list[Container] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Of a process whose mount namespace is the node's."""
        return self._pid

    def directory(self, name: str) -> Path:
        """A directory of the host, made where it is missing."""
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def container(
        self,
        name: str,
        argv: Sequence[str] = ("sleep", "infinity"),
        volumes: Sequence[Volume] = (),
        *,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> Container:
        """Starts a container with `argv` as its process 1. Raises Unavailable where its volumes cannot be bound."""
        bound = sorted(
            volumes, key=lambda volume: volume.at or volume.source
        )  # a volume in another's directory after it
        words = [word for v in bound for word in (str(v.source), str(v.at or v.source), _OPTION[v.propagation])]
        ours, theirs = os.pipe()
        set_up = [
            "bash",
            "-c",
            _PARENT,
            _CONTAINER,
            name,
            str(theirs),
            str(self.folder),
            str(self._staging),
            str(len(bound)),
        ]
        apart = ["unshare", "--mount", "--propagation=unchanged", "--pid", "--"]
        try:
            try:
                process = subprocess.Popen(
                    _inside(self._pid, [*apart, *set_up, *words, *argv]),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=(theirs,),
                    cwd="/",
                )
            finally:
                os.close(theirs)
            told = _told(ours)
        finally:
            os.close(ours)
        if not told.endswith("ready\n"):
            process.kill()
            status = process.wait()
            raise Unavailable(f"The container {name} could not be set up: {told.strip() or f'status {status}'}.")
        # nsenter, what was unshare, and the child that is process 1.
        container = Container(name, process, _only_child(_only_child(process.pid)))
        self._containers.append(container)
        return container

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` to be run as kubelet runs: in the node's mount namespace."""
        return _inside(self._pid, argv)

    def run(self, *argv: str, env: Mapping[str, str] | None = None, check: bool = True) -> str:
        """As `Container.run`, on the node itself."""
        return _run(self.command(argv), env=env, check=check)

    def mounts(self) -> list[Path]:
        """What is mounted below the node's folder, in the order of mounting, without the folder itself."""
        points = [point for point, _, _ in scratch.mountinfo(self._pid)]
        return [point for point in points if point != self.folder and point.is_relative_to(self.folder)]

    def end(self) -> None:
        """Ends everything. Returns when it has ended."""
        processes = [self._pid, *(c.pid for c in self._containers if c.process.poll() is None)]
        for device in {device for pid in processes for device in self._fuse_devices(pid)}:
            scratch.abort(device)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()  # unshare, which takes process 1 with it
            self._process.wait(timeout=END_TIMEOUT_S)
        for container in self._containers:
            container.process.wait(timeout=END_TIMEOUT_S)

    def _fuse_devices(self, pid: int) -> set[int]:
        with contextlib.suppress(OSError):  # it has just ended
            return {
                minor
                for point, minor, kind in scratch.mountinfo(pid)
                if point.is_relative_to(self.folder) and kind.partition(".")[0] == "fuse"
            }
        return set()


@contextmanager
def node() -> Iterator[Node]:
    """A node without containers, gone at the end with all that was started on it. Raises Denied where none can be made."""
    if reason := obstacle():
        raise Denied(reason)
    with scratch.scratch(Path(tempfile.gettempdir())) as place:
        folder, staging = place / "host", place / "staging"
        folder.mkdir()
        staging.mkdir()
        apart = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
        process = subprocess.Popen(
            [*apart, "bash", "-c", _NODE, "node", str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/"
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdout:
            told = _told(process.stdout.fileno())
        if told != "ready\n":
            process.stdin.close()
            process.kill()
            process.wait()
            raise Unavailable(f"The node's folder {folder} could not be shared: {told.strip() or 'unshare failed'}.")
        made = Node(folder, staging, process, _only_child(process.pid))
        try:
            yield made
        finally:
            made.end()


def _told(fd: int) -> str:
    """What comes until "ready" or the end: the processes that wait for process 1 have the other end too, and keep it."""
    told = b""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not told.endswith(b"ready\n") and select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(fd, 65536)
        if not part:
            break
        told += part
    return told.decode(errors="replace")


def _inside(pid: int, argv: Sequence[str]) -> list[str]:
    return ["nsenter", f"--target={pid}", "--mount", "--pid", "--", *argv]


def _run(command: Sequence[str], *, env: Mapping[str, str] | None, check: bool) -> str:
    done = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
        cwd="/",
    )
    if check and done.returncode:
        raise MantaError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _only_child(pid: int) -> int:
    """Of a process that forks once. Raises Unavailable where it ended instead."""
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            break
        if children:
            return int(children[0])
        time.sleep(0.01)
    raise Unavailable(f"The process {pid}, which was to start a container's first process, ended without it.")
