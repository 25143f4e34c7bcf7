"""Delivery: sending a Reply's body, at the reply's pace. The only code that writes body bytes to sockets.

Plain connections bypass the transport: sendfile for descriptors and send for memory, on a duplicate of the
connection's socket, one system call per turn of the loop. asyncio's own sendfile does the same, but only
reports how much has left once all of it has; and its write copies what the socket does not take at once.
TLS connections go through the transport. Runs on the server's event loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

from aiohttp import web

from manta.testing.hub.content import FileSpan, Span, Spans
from manta.testing.hub.limits import Bandwidth
from manta.testing.hub.reply import Pace, Reply

# One sendfile call never moves more than this, so that no other request waits longer than about a
# millisecond for its turn.
_CALL_BYTES = 4 << 20

# How often a stalled reply looks whether its client is still there.
_PATIENCE_S = 0.05

# A client that takes no byte for this long is dropped; longer than any stall that tests ask of a client.
_IDLE_S_MAX = 600

# SO_LINGER on with no time: closing sends RST and drops what was not sent.
_LINGER_NONE = struct.pack("ii", 1, 0)


class ClientGoneError(Exception):
    """The client closed the connection, or a fault did, before the body was complete."""


class _Pipe(Protocol):
    """Where body bytes go."""

    async def send(self, span: Span) -> int:
        """Send some of a span's first bytes, at least one; returns how many."""


class _SocketPipe:
    """Straight to the socket of a plain connection, whose transport must have nothing left to write."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()

    async def send(self, span: Span) -> int:
        while True:
            try:
                if isinstance(span, FileSpan):
                    sent = os.sendfile(self._socket.fileno(), span.fd, span.offset, min(span.length, _CALL_BYTES))
                    if sent == 0:
                        raise ClientGoneError("the file ended early")
                    return sent
                return self._socket.send(span[:_CALL_BYTES])
            except BlockingIOError:
                await self._writable()
            except OSError as error:
                raise ClientGoneError(str(error)) from error

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        fd = self._socket.fileno()
        self._loop.add_writer(fd, _resolve, ready)
        try:
            async with asyncio.timeout(_IDLE_S_MAX):
                await ready
        except TimeoutError as idle:
            raise ClientGoneError(f"the client took nothing for {_IDLE_S_MAX} s") from idle
        finally:
            self._loop.remove_writer(fd)


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class _TransportPipe:
    """Through aiohttp's writer: TLS, where the kernel cannot send for us."""

    def __init__(self, response: web.StreamResponse) -> None:
        self._response = response

    async def send(self, span: Span) -> int:
        piece = os.pread(span.fd, min(span.length, 1 << 18), span.offset) if isinstance(span, FileSpan) else span
        try:
            async with asyncio.timeout(_IDLE_S_MAX):
                await self._response.write(bytes(piece[: 1 << 18]))
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise ClientGoneError(str(error)) from error
        return min(len(piece), 1 << 18)


@asynccontextmanager
async def _pipe(request: web.BaseRequest, response: web.StreamResponse) -> AsyncIterator[_Pipe]:
    transport = request.transport
    if transport is None:
        raise ClientGoneError("connection lost")
    if transport.get_extra_info("ssl_object") is not None:
        yield _TransportPipe(response)
        return
    # A duplicate, since the loop guards descriptors that a transport uses.
    connection = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
    connection.setblocking(False)
    try:
        yield _SocketPipe(connection)
    finally:
        connection.close()


def reset(transport: asyncio.BaseTransport | None) -> None:
    """Close a connection with RST; does nothing when it is closed already."""
    if isinstance(transport, asyncio.WriteTransport) and not transport.is_closing():
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
        transport.abort()


async def patient_sleep(request: web.BaseRequest, seconds: float) -> None:
    """Sleep, but not longer than the client stays; raises ClientGoneError when it leaves."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _PATIENCE_S))
        if request.transport is None or request.transport.is_closing():
            raise ClientGoneError("the client left while the hub waited")


class Send(NamedTuple):
    """Send the body's bytes [start, stop), at `rate` bytes per second (0: as fast as they go)."""

    start: int
    stop: int
    rate: int = 0


class Wait(NamedTuple):
    """Send nothing for a while."""

    seconds: float


class End(NamedTuple):
    """Close the connection, with RST or with FIN."""

    reset: bool


Step = Send | Wait | End


def plan(pace: Pace, length: int) -> list[Step]:
    """The steps in which a body of `length` bytes leaves at a pace."""
    ends = [at for at in (pace.reset_at, pace.cut_at) if at >= 0]
    stop = min([length, *ends])
    drip_at = pace.drip_at if 0 <= pace.drip_at < stop else stop
    stall_at = pace.stall_at if 0 <= pace.stall_at <= stop else -1
    steps: list[Step] = []
    marks = sorted({0, drip_at, stop, *([stall_at] if stall_at >= 0 else [])})
    for mark, following in zip(marks, [*marks[1:], stop], strict=True):
        if mark == stall_at:
            steps.append(Wait(pace.stall_s))
        if mark < following:
            steps.append(Send(mark, following, pace.drip_rate if mark >= drip_at else 0))
    if ends:
        steps.append(End(reset=pace.reset_at == min(ends)))
    return steps


async def send_body(
    request: web.BaseRequest,
    response: web.StreamResponse,
    reply: Reply,
    spans: Spans,
    bandwidth: Bandwidth,
    sent: Callable[[int, int], None],
) -> None:
    """Send the body of a reply whose headers have been prepared.

    `sent(start, stop)` is told of the content's bytes that went to the socket. Raises ClientGoneError when
    the client, or a fault in the reply's pace, ends the connection early.
    """
    transport = request.transport
    if transport is None:
        raise ClientGoneError("connection lost")
    while transport.get_write_buffer_size():  # the headers go first; they almost always have gone already
        await patient_sleep(request, 0.001)
    async with _pipe(request, response) as pipe:
        for step in plan(reply.pace, reply.length):
            match step:
                case Wait(seconds):
                    await patient_sleep(request, seconds)
                case Send(start, stop, rate):
                    at = reply.start + start
                    for span in spans(at, reply.start + stop):
                        async for count in _paced(pipe, span, bandwidth, rate):
                            sent(at, at + count)
                            at += count
                case End(rst):
                    if rst:
                        reset(transport)
                    else:
                        transport.close()
                    raise ClientGoneError("cut by a fault")


async def _paced(pipe: _Pipe, span: Span, bandwidth: Bandwidth, rate: int) -> AsyncIterator[int]:
    """Send one span in slices no faster than the cap and `rate` allow; yields the size of each slice sent."""
    for piece in _slices(span, lambda: max(1, min(bandwidth.slice_bytes, rate // 20 if rate else 1 << 62))):
        length = piece.length if isinstance(piece, FileSpan) else len(piece)
        wait = max(bandwidth.reserve(length, time.monotonic()), length / rate if rate else 0.0)
        if wait:
            await asyncio.sleep(wait)
        left = piece
        while (count := await pipe.send(left)) < length:
            yield count
            length -= count
            left = _after(left, count)
        yield count


def _after(span: Span, count: int) -> Span:
    if isinstance(span, FileSpan):
        return FileSpan(span.fd, span.offset + count, span.length - count)
    return span[count:]


def _slices(span: Span, size: Callable[[], int]) -> Iterator[Span]:
    """Cut a span into slices of `size()` bytes, asked anew for each since the cap may change."""
    at, length = 0, span.length if isinstance(span, FileSpan) else len(span)
    while at < length:
        count = min(size(), length - at)
        if isinstance(span, FileSpan):
            yield FileSpan(span.fd, span.offset + at, count)
        else:
            yield span[at : at + count]
        at += count
