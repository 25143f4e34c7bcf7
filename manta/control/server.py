"""The daemon's side of the control API: HTTP/1.1 on a unix socket, each request one call of the service. Here and only here.

`manta.control.http` does the protocol and keeps the bounds.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from manta.control.http import CONNECTIONS_MAX, Answer, HttpServer, Request
from manta.control.metrics import METRICS
from manta.control.protocol import (
    BODY_BYTES_MAX,
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
from manta.errors import (
    Absent,
    CacheBroken,
    Corrupt,
    Denied,
    InUse,
    Invalid,
    MantaError,
    NoSpace,
    NotRunning,
    Unavailable,
)

log = logging.getLogger(__name__)

_STATUS: dict[type[MantaError], int] = {
    Invalid: 400,
    Denied: 403,
    Absent: 404,
    InUse: 409,
    NoSpace: 507,
    Unavailable: 503,
    NotRunning: 503,
    Corrupt: 500,
    CacheBroken: 500,
}


class Service(Protocol):
    """What the API offers; see `manta.control.protocol` for what each means. Every call raises `manta.errors`."""

    async def status(self) -> Status: ...
    async def mount(self, request: MountRequest) -> Mount: ...
    async def bound(self, mount_id: str, bound: Bound) -> Mount: ...
    async def unmount(self, mount_id: str) -> Mount: ...
    async def publications(self) -> list[Publication]: ...
    async def publish(self, name: str, request: MountRequest) -> Mount: ...
    async def publication(self, name: str) -> Mount: ...
    async def publication_bound(self, name: str, bound: Bound) -> Mount: ...
    async def unpublish(self, name: str) -> Mount: ...
    async def prefetch(self, request: PrefetchRequest) -> Job: ...
    async def job(self, job_id: str) -> Job: ...
    async def cancel_job(self, job_id: str) -> Job: ...
    async def cache(self) -> CacheListing: ...
    async def verify(self, request: VerifyRequest) -> Job: ...
    async def pin(self, selection: CacheSelection) -> CacheListing: ...
    async def unpin(self, selection: CacheSelection) -> CacheListing: ...
    async def remove(self, selection: CacheSelection) -> Removal: ...
    async def collect(self, request: GcRequest) -> Removal: ...
    async def shut_down(self) -> Status: ...
    async def restart(self) -> Running: ...
    async def peers(self) -> Peers: ...
    async def cluster(self) -> Peers: ...
    async def page(self) -> PageLink: ...
    async def metrics(self) -> Answer: ...


_Document = msgspec.Struct | list[Publication]
_Call = Callable[..., Awaitable[_Document]]


class ControlServer:
    """Serves `service` on the socket at `path`."""

    def __init__(self, service: Service, path: Path) -> None:
        self._path = path
        self._metrics = service.metrics
        self._http = HttpServer(self._answer, _refusal)
        # What may wait for the hub or for other nodes ends with its client: Ctrl-C means it. The others are quick, or half of them would be
        # worse than all.
        self._abandoned = {service.mount, service.publish, service.prefetch, service.cluster}
        # method, path (a group is an argument), what the body is, what to call
        routes: list[tuple[str, str, type[msgspec.Struct] | None, _Call]] = [
            ("GET", "/v1/status", None, service.status),
            ("POST", "/v1/mounts", MountRequest, service.mount),
            ("POST", "/v1/mounts/([^/]+)/bound", Bound, service.bound),
            ("DELETE", "/v1/mounts/([^/]+)", None, service.unmount),
            ("GET", "/v1/publications", None, service.publications),
            ("PUT", "/v1/publications/([^/]+)", MountRequest, service.publish),
            ("GET", "/v1/publications/([^/]+)", None, service.publication),
            ("POST", "/v1/publications/([^/]+)/bound", Bound, service.publication_bound),
            ("DELETE", "/v1/publications/([^/]+)", None, service.unpublish),
            ("POST", "/v1/prefetch", PrefetchRequest, service.prefetch),
            ("GET", "/v1/jobs/([^/]+)", None, service.job),
            ("DELETE", "/v1/jobs/([^/]+)", None, service.cancel_job),
            ("GET", "/v1/cache", None, service.cache),
            ("POST", "/v1/cache/verify", VerifyRequest, service.verify),
            ("POST", "/v1/cache/pin", CacheSelection, service.pin),
            ("POST", "/v1/cache/unpin", CacheSelection, service.unpin),
            ("POST", "/v1/cache/rm", CacheSelection, service.remove),
            ("POST", "/v1/cache/gc", GcRequest, service.collect),
            ("POST", "/v1/shutdown", None, service.shut_down),
            ("POST", "/v1/restart", None, service.restart),
            ("GET", "/v1/peers", None, service.peers),
            ("GET", r"/v1/peers\?cluster=1", None, service.cluster),
            ("GET", "/v1/peers/page", None, service.page),
        ]
        self._routes = [(method, re.compile(pattern), body, call) for method, pattern, body, call in routes]

    async def listen(self) -> trio.SocketListener:
        """Binds the socket, in place of one that a dead daemon left. The caller holds the cache directory's lock."""
        self._path.unlink(missing_ok=True)
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        await sock.bind(str(self._path))
        os.chmod(self._path, 0o600)
        sock.listen(CONNECTIONS_MAX)
        return trio.SocketListener(sock)

    @property
    def connected(self) -> int:
        """Clients, so that a daemon does not leave in mid-answer."""
        return self._http.connected

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answers clients until it is cancelled or the listener is closed."""
        await self._http.serve([listener])

    async def _answer(self, request: Request) -> Answer:
        if len(request.body) > BODY_BYTES_MAX:
            return _answer(413, Error("invalid", f"The request is larger than {BODY_BYTES_MAX} bytes."))
        try:
            if (request.method, request.target) == ("GET", METRICS):
                return await self._metrics()
            call = self._find(request.method, request.target, request.body)
            if call.func not in self._abandoned:
                return _answer(200, await call())
            return _answer(200, await request.while_there(call))
        except MantaError as e:
            return _refusal(e)
        except trio.BrokenResourceError:  # the client left
            raise
        except Exception as e:
            log.exception("a control request failed in an unforeseen way")
            return _answer(500, Error("error", f"The daemon failed ({type(e).__name__}); its log has the details."))

    def _find(self, method: str, target: str, body: bytes) -> partial[Awaitable[_Document]]:
        """What is asked for, ready to be called. Raises Absent, Invalid."""
        for known_method, pattern, kind, call in self._routes:
            match = pattern.fullmatch(target)
            if method == known_method and match is not None:
                arguments: list[Any] = list(match.groups())
                if kind is not None:
                    try:
                        arguments.append(msgspec.json.decode(body or b"{}", type=kind))
                    except msgspec.MsgspecError as e:
                        raise Invalid(f"The request is not what {method} {target} takes: {e}.") from e
                return partial(call, *arguments)
        raise Absent(f"The control API has no {method} {target}; the client may be of another version than the daemon.")


def _refusal(error: MantaError) -> Answer:
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    return _answer(status, Error(error.code, error.message))


def _answer(status: int, document: _Document) -> Answer:
    return Answer(status, "application/json", msgspec.json.encode(document))
