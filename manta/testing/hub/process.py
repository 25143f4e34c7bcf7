"""HubProcess: a hub in a process of its own, driven from synchronous tests and benchmarks.

The process serves until its standard input ends, so it dies with the test that started it however that
ends. It is steered over a unix socket: that works when ports are refused and across network namespaces.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeVar
from urllib.parse import quote

import msgspec

from manta.testing.hub.admin import SettingsUpdate, WaitFor
from manta.testing.hub.changes import Change, MoveBranch
from manta.testing.hub.faults import Action, Rule, RuleState
from manta.testing.hub.repository import RepoType
from manta.testing.hub.routes import Kind, Origin
from manta.testing.hub.spec import HubSpec
from manta.testing.hub.traffic import BlobTraffic, LogEntry, Stats

_T = TypeVar("_T")

# Longer than any admin call may wait, so that its own message arrives instead of a socket timeout.
_ADMIN_TIMEOUT_S = 150.0


class HubError(Exception):
    """The hub's process did not start, or refused an admin call."""


class Ready(msgspec.Struct, frozen=True):
    """The line a hub prints when it listens: base URLs of its origins and its process id."""

    hub: str
    cdn: str
    other: str
    pid: int


class FileFacts(msgspec.Struct, frozen=True):
    """A file as the hub knows it; `sha256` is empty for git files, `blob` is the id used in Stats."""

    blob: str
    oid: str
    sha256: str
    size: int


class RevisionFacts(msgspec.Struct, frozen=True):
    """The commit a revision stands for, and its files by path."""

    commit: str
    files: dict[str, FileFacts]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("hub", timeout=_ADMIN_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class HubProcess:
    """A running hub; use as a context manager.

    `host` and `port` are where it binds (port 0: any; the CDN and "other" take the two ports after a given
    one). `prefix` is put before the command: ["ip", "netns", "exec", "hub-net"]. `tls` is a pair of paths
    (certificate, key). `index` is a file that remembers digests of big files between runs. Raises HubError
    when the hub is not ready after `start_timeout_s`, which must cover hashing what has no known digest.
    """

    def __init__(
        self,
        spec: HubSpec,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        prefix: Sequence[str] = (),
        tls: tuple[Path, Path] | None = None,
        index: Path | None = None,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._spec = spec
        self._start_timeout_s = start_timeout_s
        self._command = [*prefix, sys.executable, "-m", "manta.testing.hub", "--spec", "-", "--until-eof"]
        self._command += ["--host", host, "--port", str(port)]
        if tls is not None:
            self._command += ["--tls-cert", str(tls[0]), "--tls-key", str(tls[1])]
        if index is not None:
            self._command += ["--index", str(index)]
        self._folder = Path()  # of a running hub: where its admin socket is
        self._errors: IO[bytes] | None = None  # what a running hub wrote to standard error; has no name
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = Ready("", "", "", 0)

    # -- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start the process and wait until it listens; a failed start leaves nothing behind."""
        self._folder = Path(tempfile.mkdtemp(prefix="manta-hub-"))
        command = [*self._command, "--admin-socket", str(self._folder / "admin")]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the hub
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(self._spec) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended early: its message is reported below
        readable, _, _ = select.select([process.stdout], [], [], self._start_timeout_s)
        line = process.stdout.readline() if readable else b""
        if not line:
            process.kill()
            process.wait()
            message = self.stderr().strip() or "timed out"
            self.close()
            raise HubError(f"the hub did not start: {message}")
        self._ready = msgspec.json.decode(line, type=Ready)

    def close(self) -> None:
        """End the process and wait for it; safe to call again."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def stderr(self) -> str:
        """What the running hub has written to standard error."""
        if self._errors is None:
            return ""
        descriptor = self._errors.fileno()  # read without moving the offset at which the hub writes
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    @property
    def endpoint(self) -> str:
        """Base URL of the hub: the value for HF_ENDPOINT."""
        return self._ready.hub

    @property
    def cdn_endpoint(self) -> str:
        """Base URL of the CDN."""
        return self._ready.cdn

    @property
    def other_endpoint(self) -> str:
        """Base URL of the third origin."""
        return self._ready.other

    @property
    def pid(self) -> int:
        """The hub's process id, to read its CPU time from /proc."""
        return self._ready.pid

    def environment(self, home: Path, *, token: str = "", xet: bool = False) -> dict[str, str]:
        """Environment for a client process: this hub, a Hugging Face home of its own, no telemetry."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if token:
            kept["HF_TOKEN"] = token
        if not xet:
            kept["HF_HUB_DISABLE_XET"] = "1"
        return kept

    # -- watching -----------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """All counters since the start or the last reset."""
        return self._call("GET", "stats", Stats)

    def blob_traffic(self, repo: str, file: str, revision: str = "main") -> BlobTraffic:
        """What was sent of one file; all zero when it was never asked for."""
        facts = self.files(repo, revision).files[file]
        nothing = BlobTraffic(facts.size, [], 0, 0, 0, 0, 0, complete=True)
        return self.stats().blobs.get(facts.blob, nothing)

    def coverage(self, blob: str) -> list[tuple[int, int, int]]:
        """(start, stop, times sent) of every stretch of a blob that was sent."""
        return self._call("GET", f"coverage?blob={quote(blob)}", list[tuple[int, int, int]])

    def log(self, after: int = 0) -> list[LogEntry]:
        """The newest requests, oldest first; only those numbered above `after`."""
        return self._call("GET", f"log?after={after}", list[LogEntry])

    def files(self, repo: str, revision: str = "main", *, repo_type: RepoType = "model") -> RevisionFacts:
        """The true commit, digests and sizes of a revision, whatever the hub tells its clients."""
        query = f"repo={quote(repo)}&revision={quote(revision, safe='')}&type={repo_type}"
        return self._call("GET", f"files?{query}", RevisionFacts)

    def wait_for(
        self,
        count: int = 1,
        *,
        origin: Origin | None = None,
        kind: Kind | None = None,
        repo: str | None = None,
        file: str | None = None,
        finished: bool = False,
        after: int = 0,
        timeout_s: float = 30.0,
    ) -> list[LogEntry]:
        """Wait until `count` matching requests have begun (or finished); returns them, or raises HubError."""
        wanted = WaitFor(
            count=count,
            origin=origin,
            kind=kind,
            repo=repo,
            file=file,
            finished=finished,
            after=after,
            timeout_s=timeout_s,
        )
        return self._call("POST", "wait", list[LogEntry], wanted)

    # -- steering -----------------------------------------------------------------------------------------

    def add_fault(self, action: Action, **conditions: Any) -> int:
        """Put a fault in force: an action of faults.py and the conditions of faults.Rule. Returns its id."""
        rule = Rule(action=action, **conditions)
        return self._call("POST", "faults", dict[str, int], rule)["id"]

    def faults(self) -> list[RuleState]:
        """The rules in force, and how often each has matched and struck."""
        return self._call("GET", "faults", list[RuleState])

    def remove_fault(self, id_: int) -> None:
        """Lift one fault."""
        self._do("DELETE", f"faults/{id_}")

    def clear_faults(self) -> None:
        """Lift all faults."""
        self._do("DELETE", "faults")

    def set_latency(self, seconds: float | Mapping[Origin, float]) -> None:
        """Delay the first byte of every answer, of all origins or of those given."""
        latency = seconds if isinstance(seconds, int | float) else dict(seconds)
        self.update(SettingsUpdate(latency_s=latency))

    def set_bandwidth(self, bytes_per_second: float | None) -> None:
        """Cap all body bytes together, or lift the cap."""
        self.update(SettingsUpdate(bandwidth=bytes_per_second))

    def update(self, update: SettingsUpdate) -> None:
        """Change settings: quotas, lifetime of signed URLs and so on."""
        self._do("PUT", "settings", update)

    def apply(self, change: Change) -> None:
        """Change the hub's content: move a branch, gate a repo, revoke a token ... (changes.py)."""
        self._do("POST", "changes", change)

    def move_branch(self, repo: str, to: str, branch: str = "main") -> None:
        """Point a branch at another commit: a revision, a sha or a name that the spec gave."""
        self.apply(MoveBranch(repo=repo, to=to, branch=branch))

    def set_listening(self, origin: Origin, *, accept: bool) -> None:
        """Refuse connections at an origin (resetting those open), or accept them again."""
        self._do("PUT", "listening", {"origin": origin, "open": accept})

    def reset(self, *, content: bool = True) -> None:
        """Back to the start: no faults, no traffic, first settings and, unless told, first content."""
        self._do("POST", "reset", {"content": content})

    def _do(self, method: Literal["POST", "PUT", "DELETE"], path: str, value: object = None) -> None:
        self._call(method, path, dict[str, Any], value)

    def _call(self, method: str, path: str, type_: type[_T], value: object = None) -> _T:
        if self._process is None:
            raise HubError("the hub is not running")
        connection = _UnixConnection(str(self._folder / "admin"))
        try:
            body = None if value is None else msgspec.json.encode(value)
            connection.request(method, f"/_hub/{path}", body)
            response = connection.getresponse()
            answer = response.read()
        except OSError as gone:
            raise HubError(f"the hub does not answer ({gone}); it said: {self.stderr().strip()}") from gone
        finally:
            connection.close()
        if response.status != HTTPStatus.OK:
            raise HubError(f"{method} {path}: {json.loads(answer)['error']}")
        return msgspec.json.decode(answer, type=type_)
