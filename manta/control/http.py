"""One HTTP/1.1 request per connection, answered by a function: what the control API and /metrics are served with. Here and only here.

h11 does the protocol, trio the I/O. Bounded: connections, bodies, and the time a client may take to ask and to take the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

import h11
import trio

from manta.control.protocol import BODY_BYTES_MAX
from manta.errors import Unavailable

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
REFUSALS_MAX = 64
"""Clients beyond CONNECTIONS_MAX that are told so at the same time; those beyond that find their connection closed."""

ASK_SECONDS_MAX = 10.0
"""A client is a program that has its request ready."""

_Result = TypeVar("_Result")


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


class Request:
    """What a client asks. There may be little more than BODY_BYTES_MAX of a body."""

    def __init__(self, stream: trio.SocketStream, method: str, target: str, body: bytes) -> None:
        self.method = method
        self.target = target
        self.body = body
        self._stream = stream

    async def while_there(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        """What `call` says, which is cancelled when the client closes its connection. Raises BrokenResourceError then."""
        answers: list[_Result] = []
        errors: list[Exception] = []
        async with trio.open_nursery() as both:

            async def until_gone() -> None:
                # It has asked and has nothing more to say: whatever comes is its end.
                with suppress(trio.BrokenResourceError):
                    await self._stream.receive_some(1)
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


class HttpServer:
    """Serves what `answer` says. `refuse` says to those beyond CONNECTIONS_MAX that they are. `connected` counts clients."""

    def __init__(self, answer: Callable[[Request], Awaitable[Answer]], refuse: Callable[[Unavailable], Answer]) -> None:
        self._answer = answer
        self._refuse = refuse
        self.connected = 0

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Answers clients until it is cancelled or the listeners are closed."""
        try:
            await trio.serve_listeners(self._converse, listeners)
        except* trio.ClosedResourceError:
            pass

    async def _converse(self, stream: trio.SocketStream) -> None:
        """One connection, one request: clients are commands and scrapers, not browsers."""
        self.connected += 1
        try:
            async with stream:
                if self.connected > CONNECTIONS_MAX + REFUSALS_MAX:
                    return
                connection = h11.Connection(h11.SERVER)
                try:
                    with trio.fail_after(ASK_SECONDS_MAX):
                        request, body = await _read_request(stream, connection)
                except (h11.RemoteProtocolError, trio.BrokenResourceError, trio.TooSlowError):
                    return
                if self.connected > CONNECTIONS_MAX:
                    answer = self._refuse(_crowded())
                else:
                    answer = await self._answer(Request(stream, request.method.decode(), request.target.decode(), body))
                head = h11.Response(
                    status_code=answer.status,
                    headers=[
                        ("content-type", answer.content_type),
                        ("content-length", str(len(answer.body))),
                        ("connection", "close"),
                    ],
                )
                data = connection.send(head) or b""
                data += connection.send(h11.Data(data=answer.body)) or b""
                data += connection.send(h11.EndOfMessage()) or b""
                with trio.move_on_after(ASK_SECONDS_MAX):
                    await stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # the client went away; what it asked for has been done
        except Exception:
            # It ends alone, not with everyone's mounts.
            log.exception("an HTTP connection failed in an unforeseen way")
        finally:
            self.connected -= 1


def _crowded() -> Unavailable:
    return Unavailable(
        f"The daemon answers {CONNECTIONS_MAX} requests at a time, and as many wait for an answer: try again soon."
    )


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
