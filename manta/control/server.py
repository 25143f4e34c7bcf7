"""The daemon's side of the control API: HTTP/1.1 on a unix socket, each request one call of the service. Here and only here.

h11 does the protocol, trio the I/O. Bounded: connections, bodies, and the time a client may take to ask.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import h11
import msgspec
import trio

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
    PrefetchRequest,
    Removal,
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

CONNECTIONS_MAX = 64
REFUSALS_MAX = 64
"""Clients beyond CONNECTIONS_MAX that are told so at the same time; those beyond that find their connection closed."""

ASK_SECONDS_MAX = 10.0
"""A client is a local program that has its request ready."""

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


_Call = Callable[..., Awaitable[msgspec.Struct]]


class ControlServer:
    """Serves `service` on the socket at `path`. `connected` counts clients, so that a daemon does not leave in mid-answer."""

    def __init__(self, service: Service, path: Path) -> None:
        self._path = path
        self.connected = 0
        # What may wait for the hub ends with its client: Ctrl-C means it. The others are quick, or half of them would be worse than all.
        self._abandoned = {service.mount, service.prefetch}
        # method, path (a group is an argument), what the body is, what to call
        routes: list[tuple[str, str, type[msgspec.Struct] | None, _Call]] = [
            ("GET", "/v1/status", None, service.status),
            ("POST", "/v1/mounts", MountRequest, service.mount),
            ("POST", "/v1/mounts/([^/]+)/bound", Bound, service.bound),
            ("DELETE", "/v1/mounts/([^/]+)", None, service.unmount),
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

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answers clients until it is cancelled or the listener is closed."""
        try:
            await trio.serve_listeners(self._converse, [listener])
        except* trio.ClosedResourceError:
            pass

    async def _converse(self, stream: trio.SocketStream) -> None:
        """One connection, one request: clients are commands, not browsers."""
        self.connected += 1
        try:
            async with stream:
                if self.connected > CONNECTIONS_MAX + REFUSALS_MAX:
                    return
                connection = h11.Connection(h11.SERVER)
                try:
                    status, answer = await self._answer(stream, connection)
                except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError):
                    return
                head = h11.Response(
                    status_code=status,
                    headers=[
                        ("content-type", "application/json"),
                        ("content-length", str(len(answer))),
                        ("connection", "close"),
                    ],
                )
                data = connection.send(head) or b""
                data += connection.send(h11.Data(data=answer)) or b""
                data += connection.send(h11.EndOfMessage()) or b""
                with trio.move_on_after(ASK_SECONDS_MAX):
                    await stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # the client went away; what it asked for has been done
        except Exception:
            log.exception(
                "a control connection failed in an unforeseen way"
            )  # it ends alone, not with everyone's mounts
        finally:
            self.connected -= 1

    async def _answer(self, stream: trio.SocketStream, connection: h11.Connection) -> tuple[int, bytes]:
        """Status and body. Raises what `_read_request` does, TooSlowError and BrokenResourceError for a client that does not ask."""
        with trio.fail_after(ASK_SECONDS_MAX):
            request, body = await _read_request(stream, connection)
        if len(body) > BODY_BYTES_MAX:
            return 413, _encode(Error("invalid", f"The request is larger than {BODY_BYTES_MAX} bytes."))
        try:
            if self.connected > CONNECTIONS_MAX:
                raise Unavailable(
                    f"The daemon answers {CONNECTIONS_MAX} commands at a time, and as many wait for an answer: try again soon."
                )
            call = self._find(request.method.decode(), request.target.decode(), body)
            if call.func not in self._abandoned:
                return 200, _encode(await call())
            return 200, _encode(await _while_there(stream, call))
        except MantaError as e:
            number = next((_STATUS[kind] for kind in type(e).__mro__ if kind in _STATUS), 500)
            return number, _encode(Error(e.code, e.message))
        except Exception as e:
            log.exception("a control request failed in an unforeseen way")
            return 500, _encode(Error("error", f"The daemon failed ({type(e).__name__}); its log has the details."))

    def _find(self, method: str, target: str, body: bytes) -> partial[Awaitable[msgspec.Struct]]:
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


async def _while_there(stream: trio.SocketStream, call: Callable[[], Awaitable[msgspec.Struct]]) -> msgspec.Struct:
    """What `call` says, which is cancelled when the client closes its connection. Raises BrokenResourceError then."""
    answers: list[msgspec.Struct] = []
    errors: list[Exception] = []
    async with trio.open_nursery() as both:

        async def until_gone() -> None:
            # It has asked and has nothing more to say: whatever comes is its end.
            with suppress(trio.BrokenResourceError):
                await stream.receive_some(1)
            both.cancel_scope.cancel()

        both.start_soon(until_gone)
        try:
            answers.append(await call())
        except Exception as e:  # out of the nursery, which would wrap it
            errors.append(e)
        both.cancel_scope.cancel()
    for error in errors:
        raise error
    for answer in answers:
        return answer
    log.info("a client left before its answer: what it asked for was not done")
    raise trio.BrokenResourceError


def _encode(answer: msgspec.Struct) -> bytes:
    return msgspec.json.encode(answer)


async def _read_request(stream: trio.SocketStream, connection: h11.Connection) -> tuple[h11.Request, bytes]:
    """Reads little more than BODY_BYTES_MAX of a body. Raises h11.RemoteProtocolError for what is no request, and for HEAD, whose answer
    could say nothing."""
    request: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(65536))
        elif isinstance(event, h11.Request) and event.method != b"HEAD":
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > BODY_BYTES_MAX and request is not None:
                return request, bytes(body)
        elif isinstance(event, h11.EndOfMessage) and request is not None:
            return request, bytes(body)
        else:
            raise h11.RemoteProtocolError("no request")
