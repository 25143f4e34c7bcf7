"""A node for tests: one cache, one runtime directory, the real `manta` commands, and nothing left behind. Here and only here.

The test process never touches a mount itself: whatever reads one is a child with a timeout, and what is wedged is detached and aborted.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from manta.control.binding import mounts, unbind
from manta.errors import MantaError

TIMEOUT_S = 60.0

SESSIONS = ("kernel", "pyfuse3")
"""The FUSE sessions that there are. The first is what most people use."""

SESSION = "MANTA_FUSE_SESSION"
"""The variable that says by which FUSE session a node's daemon serves. conftest puts it into this process's environment for each module of
tests, and a node takes it from there."""


def needs_fuse() -> str:
    """Why this machine cannot run the mount suite; empty where it can."""
    if os.geteuid() != 0:
        return "mounting needs root here"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as e:
        return f"/dev/fuse cannot be opened: {e.strerror}"
    return ""


class Node:
    """``with Node(hub.endpoint) as node: directory = node.mount("org/name")``."""

    def __init__(self, endpoint: str, environment: Mapping[str, str] | None = None) -> None:
        # Short: the control socket's path has 107 bytes.
        self._scratch = tempfile.TemporaryDirectory(prefix="manta-test-", ignore_cleanup_errors=True)
        self.path = Path(self._scratch.name)
        self.cache = self.path / "cache"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.path / "home"),
            "HF_HOME": str(self.path / "home/hf"),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "MANTA_CACHE_DIR": str(self.cache),
            "MANTA_DAEMON_RUNTIME_DIR": str(self.path / "run"),
            "MANTA_CONFIG": "/dev/null",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            **({SESSION: os.environ[SESSION]} if SESSION in os.environ else {}),
            **(environment or {}),
        }
        self._directories = itertools.count(1)

    @property
    def session(self) -> str:
        """The FUSE session that its daemon was told to use; "" for whatever it prefers."""
        return self.environment.get(SESSION, "")

    @property
    def survives(self) -> bool:
        """Whether what is open outlives a daemon that is killed: a keeper has the filesystem, and starts the next one."""
        return self.session == "kernel"

    def __enter__(self) -> Self:
        (self.path / "home").mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._unmount()
            # Nobody is to wait for its last second: `test_lifecycle` shows that it leaves by itself.
            for pid in self.daemons():
                send(pid, signal.SIGTERM)
            self._wait_for_all()
        finally:
            left = [e.directory for e in mounts() if e.directory.startswith(f"{self.path}/")]
            alive = self.processes()
            try:
                self.kill_all()
            finally:
                for directory in reversed(left):
                    unbind(directory, lazy=True)
                self._scratch.cleanup()
        # Said after the cleaning, so that a test that leaves something fails and the machine is clean all the same.
        assert not left, f"left mounted: {left}"
        assert not alive, f"left running: {alive}"

    # Commands --------------------------------------------------------------------------------------------------------

    def manta(
        self, *arguments: str, code: int | None = 0, timeout_s: float = TIMEOUT_S, token: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Runs ``manta ARGUMENTS`` and checks its exit code (None: any)."""
        done = subprocess.run(
            [sys.executable, "-m", "manta", *arguments],
            env=self.environment | ({"HF_TOKEN": token} if token else {}),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if code is not None:
            assert done.returncode == code, (
                f"manta {arguments} ended with {done.returncode}: {done.stdout}{done.stderr}{self.log()}"
            )
        return done

    def mount(self, *arguments: str, token: str = "") -> Path:
        """Mounts at a fresh directory and returns it."""
        directory = self.directory()
        self.manta("mount", *arguments, str(directory), token=token)
        return directory

    def directory(self) -> Path:
        """A fresh empty directory to mount on."""
        directory = self.path / f"mnt{next(self._directories)}"
        directory.mkdir()
        return directory

    def json(self, *arguments: str) -> Any:
        return json.loads(self.manta(*arguments, "--json").stdout)

    def status(self) -> Any:
        return self.json("status")

    def unmount_all(self) -> None:
        """Unmounts what is mounted and waits for the daemon to leave, as it does by itself."""
        self._unmount()
        self._wait_for_all()

    def _unmount(self) -> None:
        for entry in reversed(mounts()):
            if entry.directory.startswith(f"{self.path}/mnt"):
                try:
                    unbind(entry.directory)
                except MantaError:
                    unbind(entry.directory, lazy=True)

    def _wait_for_all(self) -> None:
        for pid in self.processes():
            wait_for_end(pid)

    # Processes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def unattended(self) -> Iterator[None]:
        """Keepers stand still meanwhile: nobody starts a daemon."""
        keepers = self.keepers()
        for pid in keepers:
            send(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in keepers:
                send(pid, signal.SIGCONT)

    def kill_all(self) -> None:
        """Kills every process there is. A keeper starts a daemon anew, and a daemon its keeper: so all stand still first."""
        while alive := self.processes():
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in alive:
                    send(pid, number)
            for pid in alive:
                wait_for_end(pid)

    def processes(self) -> list[int]:
        """The daemon, its workers and its keeper, told by their environment, which names our runtime directory."""
        mark = f"MANTA_DAEMON_RUNTIME_DIR={self.path}/run".encode()
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid():
                try:
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        found.append(int(process.name))
                except OSError:
                    continue
        return found

    def processes_of(self, word: str) -> list[int]:
        """Those of them that have `word` as an argument: "manta.worker"."""
        return self._running(lambda arguments: word.encode() in arguments)

    def _running(self, is_it: Callable[[list[bytes]], bool]) -> list[int]:
        found = []
        for pid in self.processes():
            with suppress(OSError):
                if is_it(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")):
                    found.append(pid)
        return found

    def daemon(self) -> int:
        return int(self.status()["pid"])

    def daemons(self) -> list[int]:
        """Told by their arguments, without asking them."""
        return self._running(lambda arguments: b"daemon" in arguments and not _is_keeper(arguments))

    def keepers(self) -> list[int]:
        """One, or none where the session has no use for it."""
        return self._running(_is_keeper)

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.daemon()}/task/{self.daemon()}/children").read_text()
        return [int(pid) for pid in children.split()]

    def log(self, *, whole: bool = False) -> str:
        """The daemon's log; its end, for the message of a test that failed, unless `whole`."""
        texts = (
            path.read_text(errors="replace") for path in sorted((self.path / "run").glob("*/daemon.log*"), reverse=True)
        )
        return "".join(text if whole else text[-4000:] for text in texts)


def _is_keeper(arguments: list[bytes]) -> bool:
    return any(argument.endswith(b"/manta/keeper.py") for argument in arguments)


def send(pid: int, number: signal.Signals) -> None:
    """Signals a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for_end(pid: int, timeout_s: float = 15.0) -> None:
    """Waits for the end of a process that may not be our child. Raises TimeoutError."""
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], timeout_s)
    finally:
        os.close(fd)
    if not ready:
        raise TimeoutError(f"process {pid} did not end within {timeout_s} s")


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Polls for what another process does, for which there is nothing to wait on. Raises TimeoutError."""
    import time

    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come true in time")
        time.sleep(0.05)


@contextmanager
def background(*command: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child that runs beside the test, with its output in pipes; it is killed at the end, however that comes."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def run(script: str, *arguments: object, timeout_s: float = TIMEOUT_S, code: int | None = 0) -> str:
    """Runs a shell script in a child, with `arguments` as $1, $2 ...; returns what it printed."""
    done = subprocess.run(
        ["bash", "-c", script, "test", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
        cwd="/",
    )
    if code is not None:
        assert done.returncode == code, f"{script!r} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def python(script: str, *arguments: object, timeout_s: float = TIMEOUT_S, env: Mapping[str, str] | None = None) -> Any:
    """Runs a Python script in a child, with `arguments` as sys.argv[1:]; returns what it printed last, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=env,
        cwd="/",
    )
    assert done.returncode == 0, f"{script!r} ended with {done.returncode}: {done.stdout}{done.stderr}"
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else None
