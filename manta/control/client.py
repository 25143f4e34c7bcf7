"""The client's side of the control API, and how a daemon is started when none runs, here and only here.

Used by the CLI and by the CSI driver. Synchronous and from the standard library but for msgspec: one connection per request,
a deadline on each, the daemon's `Error` bodies raised as the classes of `manta.errors`.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

import manta
from manta import keeper
from manta.config import Config
from manta.control.protocol import (
    ANSWER_BYTES_MAX,
    Bound,
    CacheListing,
    CacheSelection,
    Error,
    GcRequest,
    Job,
    Mount,
    MountRequest,
    PageLink,
    Peers,
    PrefetchRequest,
    Publication,
    Removal,
    Running,
    Status,
    VerifyRequest,
)
from manta.errors import BY_CODE, Corrupt, Denied, InUse, MantaError, NotRunning, Unavailable

ANSWER_S = 15.0
"""For what the daemon answers from memory. Far more than it needs on a busy machine; less than a person waits for."""

CACHE_S = 120.0
"""For what walks the whole cache directory."""

RESOLVE_S = 300.0
"""For what may ask the hub first (mount, prefetch). The daemon gives up long before, with a better sentence than ours."""

START_S = 30.0
"""For a daemon to start and answer: half a second on an idle machine, most of it imports."""

HELD_S = 5.0
"""How long another daemon may still hold the cache directory before that is an error: one that is just exiting lets go soon."""

END_S = 5.0
"""For a daemon to end after SIGTERM."""

RETRY_S = 0.05
LOG_LINES = 8
LOG_BYTES_MAX = 4 * 1024 * 1024
"""A log larger than this is put aside, replacing the one before, when the next daemon starts."""

_Answer = TypeVar("_Answer")


class WentAway(Unavailable):
    """The daemon ended while it was asked: it was leaving, or it was killed."""


class Client:
    """One daemon's control API. Opens no connection until it is asked something; raises NotRunning when nobody listens."""

    def __init__(self, socket_path: Path, *, launched: bool = False) -> None:
        self.socket_path = socket_path
        self.launched = launched
        """Whether this process started the daemon, which therefore runs with this process's settings."""

    def status(self, *, timeout_s: float = ANSWER_S) -> Status:
        return self._ask("GET", "/v1/status", Status, timeout_s=timeout_s)

    def mount(self, request: MountRequest) -> Mount:
        """A new directory of the daemon's filesystem, to be bound by the caller (see `manta.control.binding`)."""
        return self._ask("POST", "/v1/mounts", Mount, request, timeout_s=RESOLVE_S)

    def bound(self, mount_id: str, directory: str) -> Mount:
        return self._ask("POST", f"/v1/mounts/{mount_id}/bound", Mount, Bound(directory), timeout_s=ANSWER_S)

    def unmount(self, mount_id: str) -> Mount:
        return self._ask("DELETE", f"/v1/mounts/{mount_id}", Mount, timeout_s=ANSWER_S)

    def publications(self, *, timeout_s: float = ANSWER_S) -> list[Publication]:
        return self._ask("GET", "/v1/publications", list[Publication], timeout_s=timeout_s)

    def publish(self, name: str, request: MountRequest, *, timeout_s: float = RESOLVE_S) -> Mount:
        """The mount of that name, to be bound by the caller: made, or the same as before with the right to it asked about anew.

        Raises Conflict where the name is that of another request.
        """
        return self._ask("PUT", f"/v1/publications/{name}", Mount, request, timeout_s=timeout_s)

    def publication(self, name: str, *, timeout_s: float = ANSWER_S) -> Mount:
        """Raises Absent where there is none of that name."""
        return self._ask("GET", f"/v1/publications/{name}", Mount, timeout_s=timeout_s)

    def publication_bound(self, name: str, directory: str, *, timeout_s: float = ANSWER_S) -> Mount:
        return self._ask("POST", f"/v1/publications/{name}/bound", Mount, Bound(directory), timeout_s=timeout_s)

    def unpublish(self, name: str, *, timeout_s: float = ANSWER_S) -> Mount:
        """Raises Absent where there is none of that name."""
        return self._ask("DELETE", f"/v1/publications/{name}", Mount, timeout_s=timeout_s)

    def prefetch(self, request: PrefetchRequest) -> Job:
        return self._ask("POST", "/v1/prefetch", Job, request, timeout_s=RESOLVE_S)

    def job(self, job_id: str) -> Job:
        return self._ask("GET", f"/v1/jobs/{job_id}", Job, timeout_s=ANSWER_S)

    def cancel(self, job_id: str) -> Job:
        """Stops the job; what it has fetched stays."""
        return self._ask("DELETE", f"/v1/jobs/{job_id}", Job, timeout_s=ANSWER_S)

    def cache(self) -> CacheListing:
        return self._ask("GET", "/v1/cache", CacheListing, timeout_s=CACHE_S)

    def verify(self, request: VerifyRequest) -> Job:
        return self._ask("POST", "/v1/cache/verify", Job, request, timeout_s=CACHE_S)

    def pin(self, selection: CacheSelection) -> CacheListing:
        return self._ask("POST", "/v1/cache/pin", CacheListing, selection, timeout_s=CACHE_S)

    def unpin(self, selection: CacheSelection) -> CacheListing:
        return self._ask("POST", "/v1/cache/unpin", CacheListing, selection, timeout_s=CACHE_S)

    def remove(self, selection: CacheSelection) -> Removal:
        return self._ask("POST", "/v1/cache/rm", Removal, selection, timeout_s=CACHE_S)

    def collect(self, request: GcRequest) -> Removal:
        return self._ask("POST", "/v1/cache/gc", Removal, request, timeout_s=CACHE_S)

    def shutdown(self) -> Status:
        """Unmounts everything and lets the daemon exit."""
        return self._ask("POST", "/v1/shutdown", Status, timeout_s=ANSWER_S)

    def restart(self) -> Running:
        """Has the daemon leave its mounts to the next one, which its keeper starts at once. Returns which one it was."""
        return self._ask("POST", "/v1/restart", Running, timeout_s=ANSWER_S)

    def peers(self, *, cluster: bool = False) -> Peers:
        """The swarm as the daemon knows it; with `cluster` it asks the other nodes first, for 2 s at most."""
        return self._ask("GET", f"/v1/peers{'?cluster=1' if cluster else ''}", Peers, timeout_s=ANSWER_S)

    def page(self) -> PageLink:
        """Where a browser finds the status page."""
        return self._ask("GET", "/v1/peers/page", PageLink, timeout_s=ANSWER_S)

    def running(self, *, timeout_s: float = ANSWER_S) -> Running:
        """Which daemon answers, of whatever version it is."""
        return self._ask("GET", "/v1/status", Running, timeout_s=timeout_s)

    def _ask(
        self,
        method: str,
        path: str,
        answer: type[_Answer],
        body: msgspec.Struct | None = None,
        *,
        timeout_s: float,
    ) -> _Answer:
        try:
            status, content = self._exchange(method, path, body, time.monotonic() + timeout_s)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise NotRunning(f"No Manta daemon answers at {self.socket_path}.") from error
        except PermissionError as error:
            raise Denied(f"The Manta daemon at {self.socket_path} belongs to another user.") from error
        except TimeoutError as error:
            raise Unavailable(
                f"The Manta daemon at {self.socket_path} did not answer within {timeout_s:g} s;"
                f" its log is {self.socket_path.with_name('daemon.log')}."
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise WentAway(
                f"The Manta daemon at {self.socket_path} went away before it answered ({error or type(error).__name__});"
                f" its log is {self.socket_path.with_name('daemon.log')}."
            ) from error
        try:
            if status >= 400:
                problem = msgspec.json.decode(content, type=Error)
                raise BY_CODE.get(problem.code, MantaError)(problem.message)
            return msgspec.json.decode(content, type=answer)
        except msgspec.MsgspecError as error:
            raise Corrupt(
                f"The Manta daemon at {self.socket_path} answered {method} {path} with HTTP {status} and a body that"
                f" this version cannot read ({error}): does an older or newer daemon run? Stop it and try again."
            ) from error

    def _exchange(self, method: str, path: str, body: msgspec.Struct | None, deadline: float) -> tuple[int, bytes]:
        connection = _Connection(self.socket_path, _left(deadline))
        try:
            connection.connect()
            wire = connection.sock  # http.client forgets it as soon as the answer's headers say "close"
            wire.settimeout(_left(deadline))
            headers = {"Connection": "close", "Content-Type": "application/json"}
            connection.request(method, path, msgspec.json.encode(body) if body is not None else None, headers)
            wire.settimeout(_left(deadline))
            with connection.getresponse() as response:
                content = bytearray()
                # When all is read, the response may be closed already, and the socket with it (3.13), or not (3.11).
                while response.length != 0 and not response.isclosed():
                    wire.settimeout(_left(deadline))
                    part = response.read1(65536)
                    if not part:
                        break
                    content += part
                    if len(content) > ANSWER_BYTES_MAX:
                        raise http.client.HTTPException(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
                if response.length:  # read1 takes an early end for the end
                    raise http.client.IncompleteRead(bytes(content), response.length)
                return response.status, bytes(content)
        finally:
            connection.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, socket_path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._socket_path = socket_path

    def connect(self) -> None:
        wire = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            wire.settimeout(self.timeout)
            wire.connect(os.fspath(self._socket_path))
        except BaseException:
            wire.close()
            raise
        self.sock = wire


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def connect(config: Config) -> Client:
    """The client of the daemon that runs for this cache directory. Raises NotRunning with what to do."""
    client = Client(config.socket_path)
    try:
        client.status()
    except NotRunning as error:
        raise NotRunning(
            f"No Manta daemon runs for the cache directory {config.cache.dir}:"
            " `manta mount` or `manta prefetch` start one, and --cache-dir picks another directory."
        ) from error
    return client


def ensure_daemon(config: Config, *, deadline_s: float = START_S) -> Client:
    """The client of the daemon of this cache directory, which is started when none runs.

    A daemon that is just exiting (its socket refuses, it answers that it is leaving, it still holds the cache directory) is waited
    for, and two callers at the same time start one daemon. Raises what the daemon said when it could not start.
    """
    deadline = time.monotonic() + deadline_s
    client = Client(config.socket_path)
    held_until = time.monotonic() + min(HELD_S, deadline_s)
    while True:
        try:
            client.status(timeout_s=max(RETRY_S, deadline - time.monotonic()))
            return client
        except NotRunning:
            pass
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_S)
            continue
        config.make_instance_dir()
        if keeper.is_there(str(config.instance_dir)):
            # Its daemon has just ended or is not ready yet: a rival of the next one would take the mounts away from it.
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"The daemon of {config.cache.dir} ended, and its keeper has not brought another up within {deadline_s:g} s;"
                    f" the log {config.log_path} says why. It gives up within a minute: try again then."
                )
            time.sleep(RETRY_S)
            continue
        with _start_lock(config, deadline):
            try:
                client.status(timeout_s=max(RETRY_S, deadline - time.monotonic()))
                return client  # who held the lock before has started it
            except NotRunning:
                pass
            except Unavailable:
                if time.monotonic() >= deadline:
                    raise
                continue
            try:
                _launch(config, deadline)
            except InUse:
                if time.monotonic() >= held_until:
                    raise
            else:
                return Client(config.socket_path, launched=True)
        time.sleep(RETRY_S)


def with_daemon(config: Config, ask: Callable[[Client], _Answer], *, deadline_s: float = START_S) -> _Answer:
    """What `ask` returns. An ephemeral daemon may leave between being found and being asked: then the next is asked; and once more where
    one ends while it is asked."""
    deadline = time.monotonic() + deadline_s
    ended = 0
    while True:
        client = ensure_daemon(config, deadline_s=max(RETRY_S, deadline - time.monotonic()))
        try:
            return ask(client)
        except WentAway:
            ended += 1
            if ended > 1:
                raise
        except NotRunning:
            if time.monotonic() >= deadline:
                raise
        time.sleep(RETRY_S)


@contextmanager
def _start_lock(config: Config, deadline: float) -> Iterator[None]:
    """Holds the right to start this cache directory's daemon. The daemon itself does not inherit it."""
    path = config.instance_dir / "start.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Unavailable(f"Another command has been starting the daemon for too long ({path}).") from None
                time.sleep(RETRY_S)
        yield
    finally:
        os.close(lock)


def _launch(config: Config, deadline: float) -> None:
    """Starts a detached daemon and returns when it says that it is ready. Raises what it says otherwise."""
    ready, theirs = os.pipe()
    try:
        try:
            process = _spawn(config, theirs)
        finally:
            os.close(theirs)
        try:
            line = _read_line(ready, deadline)
        except BaseException:  # Ctrl-C: nobody would ever use what is starting
            _end(process)
            raise
    finally:
        os.close(ready)
    log = config.log_path
    if line is None:
        _end(process)
        raise Unavailable(f"The Manta daemon did not become ready in time; its log {log} ends: {_tail(log)}")
    if not line:
        ended = f"exit status {_end(process, ANSWER_S)}"
        raise Unavailable(f"The Manta daemon ended before it was ready ({ended}); its log {log} ends: {_tail(log)}")
    # The daemon outlives this process. While this process lives, its end is collected here: no zombie in a foreground mount.
    _reap(process)
    try:
        said = json.loads(line)
        ok, code, message = bool(said.get("ok")), said.get("code", "error"), said.get("message", "")
    except (ValueError, AttributeError) as error:
        raise Unavailable(f"The Manta daemon said {line!r} instead of being ready; its log is {log}.") from error
    if not ok:
        raise BY_CODE.get(code, MantaError)(message or f"The Manta daemon could not start; its log is {log}.")


def _spawn(config: Config, ready_fd: int) -> subprocess.Popen[bytes]:
    try:
        if config.log_path.stat().st_size > LOG_BYTES_MAX:
            config.log_path.replace(config.log_path.with_name("daemon.log.1"))
    except FileNotFoundError:
        pass
    command = [sys.executable, "-m", "manta", "daemon", "--ephemeral"]
    for_ready = ("--ready-fd", str(ready_fd))
    if is_kept(config):
        command = keeper.command_line(str(config.instance_dir), command, *for_ready)
    else:
        command += for_ready
    log = os.open(config.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(ready_fd,),
            start_new_session=True,
            # Both outlive this command, whose directory must stay unmountable and removable.
            cwd="/",
            env={**os.environ, **config.environment(), **_python_path()},
        )
    finally:
        os.close(log)


def is_kept(config: Config) -> bool:
    """Whether a daemon of this configuration, started here, is started by a keeper: only root can have a session that outlives it, and one
    whose keeper lives apart is started by somebody else."""
    return os.geteuid() == 0 and config.fuse.session != "pyfuse3" and not config.daemon.keeper


def _python_path() -> dict[str, str]:
    """What makes a process find this package, in another directory, where it was found by a relative path: in a checkout."""
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    package = os.path.dirname(os.path.dirname(os.path.abspath(manta.__file__)))
    if package == os.getcwd():
        path.append(package)
    return {"PYTHONPATH": os.pathsep.join(path)} if path else {}


def _read_line(fd: int, deadline: float) -> str | None:
    """The line that comes; "" when the other side closed without one, None when the deadline passed."""
    content = b""
    while b"\n" not in content:
        readable, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return None
        part = os.read(fd, 65536)
        if not part:
            break
        content += part
    return content.partition(b"\n")[0].decode(errors="replace")


def _end(process: subprocess.Popen[bytes], patience_s: float = 0.0) -> int:
    """Waits for the end of a daemon that is of no use, helping after `patience_s`, so that it is not writing while we clean up.

    `process` may be its keeper: told twice to end it kills the daemon, which would outlive it if the keeper itself were killed first.
    """
    steps = (
        (None, patience_s),
        (process.terminate, END_S),
        (process.terminate, 2 * keeper.HURRY_S),
        (process.kill, END_S),
    )
    for helping, patience in steps:
        if helping is not None:
            helping()
        try:
            return process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
    raise Unavailable(f"The Manta daemon (pid {process.pid}) cannot be ended: it is stuck in the kernel.")


def _reap(process: subprocess.Popen[bytes]) -> None:
    threading.Thread(target=process.wait, daemon=True, name=f"reap-{process.pid}").start()


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            lines = file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        lines = []
    return "\n  ".join(["", *lines]) if lines else "(empty)"
