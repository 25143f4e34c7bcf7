"""A daemon for tests of the CLI and of the control client: the control API over a real unix socket, and nothing behind it.

It keeps mounts like the real one, and answers the rest from what the test put into it. Every request is recorded.
"""

from __future__ import annotations

import os
import re
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import msgspec

from manta.control.protocol import (
    Blob,
    CacheListing,
    Error,
    FileTransfer,
    Job,
    Mount,
    MountRequest,
    PageLink,
    Peers,
    Removal,
    Running,
    Status,
    Swarm,
)
from manta.errors import MantaError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: Any

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def job(state: str = "done", done: int = 1000, **changes: Any) -> Job:
    values = {
        "id": "7",
        "kind": "prefetch",
        "name": f"org/name@{COMMIT}",
        "files_total": 2,
        "files_done": 2 if state == "done" else 0,
        "bytes_total": 1000,
        "rate": 0.0,
        "problems": [],
        "seconds": 2.0,
        **changes,
    }
    return msgspec.convert({**values, "state": state, "bytes_done": done}, Job)


def blob(name: str = "a", **changes: Any) -> Blob:
    values = {
        "id": "sha256-" + "a" * 64,
        "size": 1000,
        "cached": 1000,
        "sealed": True,
        "pinned": False,
        "in_use": False,
        "last_used": 0.0,
        "names": [f"org/name@{COMMIT[:12]}/{name}"],
    }
    return msgspec.convert({**values, **changes}, Blob)


@dataclass
class FakeDaemon:
    """``with FakeDaemon(config.socket_path) as daemon``. Attributes may be changed at any time."""

    socket_path: Path
    direct: bool = True
    """Mounts are where they were asked for, as without root. Otherwise `source_root`/ID is what the caller has to bind."""
    source_root: Path = Path("/nonexistent")
    endpoint: str = "https://huggingface.co"
    offline: bool = False
    errors: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    transfers: list[FileTransfer] = field(default_factory=list)
    swarm: Swarm | None = None
    peers: Peers = field(default_factory=lambda: Peers(enabled=False))
    page: PageLink = field(default_factory=lambda: PageLink("http://127.0.0.1:9402/", 0.0))
    listing: CacheListing = field(default_factory=lambda: CacheListing([], 0, 0))
    removal: Removal = field(default_factory=lambda: Removal([], 0, []))
    jobs: list[Job] = field(default_factory=lambda: [job()])
    """What the job looks like, at its start and at each look; the last stays."""
    refusals: dict[str, list[MantaError]] = field(default_factory=dict)
    """By "METHOD /path": raised, one at each such request, before anything happens."""
    on_request: Callable[[Request], object] = lambda _: None
    version: str = "0.1.0"
    pid: int = field(default_factory=os.getpid)
    next: tuple[str, int] = ("0.2.0", 1)
    """The version and pid that it has after a restart."""
    raw: dict[str, bytes] = field(default_factory=dict)
    """By "METHOD /path": bytes to answer with, head included; b"" closes the connection."""

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.mounts: dict[str, Mount] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self.socket_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        daemon = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    daemon._handle(self)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 128  # as many as the real one's

            def handle_error(self, *_: object) -> None:
                pass  # a client that went away

        self._server = Server(os.fspath(self.socket_path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.socket_path.unlink(missing_ok=True)

    def asked(self, method: str, pattern: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and re.fullmatch(pattern, r.path)]

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(length)
        request = Request(handler.command, handler.path, msgspec.json.decode(body) if body else None)
        with self._lock:
            self.requests.append(request)
        self.on_request(request)
        if str(request) in self.raw:
            handler.wfile.write(self.raw[str(request)])
            return
        code = 200
        answer: msgspec.Struct
        try:
            with self._lock:
                if waiting := self.refusals.get(str(request)):
                    raise waiting.pop(0)
                answer = self._answer(request)
        except MantaError as error:
            code, answer = 409, Error(error.code, error.message)
        content = msgspec.json.encode(answer)
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, request: Request) -> msgspec.Struct:
        method, path, body = request.method, request.path, request.body
        match method, path.strip("/").split("/")[1:]:
            case "GET", ["status"]:
                return self.status()
            case "GET", ["peers" | "peers?cluster=1"]:
                return self.peers
            case "GET", ["peers", "page"]:
                return self.page
            case "POST", ["shutdown"]:
                return self.status()
            case "POST", ["restart"]:
                before = Running(self.version, self.pid)
                self.version, self.pid = self.next
                return before
            case "POST", ["mounts"]:
                return self._mount(msgspec.convert(body, MountRequest))
            case "POST", ["mounts", number, "bound"]:
                return self.mounts[number]
            case "DELETE", ["mounts", number]:
                return self.mounts.pop(number)
            case ("POST", ["prefetch" | "cache", *_]) if path in {"/v1/prefetch", "/v1/cache/verify"}:
                return self.jobs[0]
            case "GET", ["jobs", _]:
                return self.jobs.pop(0) if len(self.jobs) > 1 else self.jobs[0]
            case "DELETE", ["jobs", _]:
                return msgspec.structs.replace(self.jobs[0], state="cancelled")
            case ("GET", ["cache"]) | ("POST", ["cache", "pin" | "unpin"]):
                return self.listing
            case "POST", ["cache", "rm" | "gc"]:
                return self.removal
        raise MantaError(f"the fake daemon knows no {request}")

    def _mount(self, request: MountRequest) -> Mount:
        number = str(len(self.mounts) + 1)
        mounted = Mount(
            id=number,
            target=request.target,
            revision="main" if request.target else "",
            commit=COMMIT if request.target else "",
            view=request.view,
            source=request.directory if self.direct else str(self.source_root),
            directory=request.directory,
            files=2,
            size=2000,
            cached=500,
            stale=False,
            errors=[],
        )
        self.mounts[number] = mounted
        return mounted

    def status(self) -> Status:
        return Status(
            version=self.version,
            pid=self.pid,
            started=0.0,
            cache_dir="/the/cache",
            runtime_dir=str(self.socket_path.parent),
            endpoint=self.endpoint,
            offline=self.offline,
            fuse="fake",
            ephemeral=True,
            mounts=list(self.mounts.values()),
            transfers=self.transfers,
            cache_bytes=2_500_000,
            cache_limit=10_000_000,
            disk_free=50_000_000_000,
            origin_rate=1_500_000.0,
            origin_bytes=3_000_000,
            read_bytes=4_000_000,
            workers=2,
            errors=self.errors,
            problems=self.problems,
            swarm=self.swarm,
        )
