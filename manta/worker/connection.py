"""One HTTP/1.1 connection of a worker: one request after the other, their bodies given away as they come. Here and only here.

A general client hands a body over in pieces of fresh memory, through a queue and a task that is woken for each: 0.8 CPU-s/GB on a machine
where the same bytes cost 0.4 when they are received into one buffer, a MiB at a time, and written from there. So the heads and whatever
is framed unusually are h11's, and a body whose length is known goes from the socket into `_body_buffer` and, in the same call, to `take`.

asyncio; used by `manta.worker.client` (which opens and keeps connections) and `manta.worker.origin` (which says what is asked for).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import h11

from manta.model.buffer import page_aligned

HEAD_BYTES_MAX = 64 * 1024
"""Bound on the head of an answer. A redirect to a signed URL is at most a few KiB."""

BODY_READ_BYTES = 1024 * 1024
"""Bytes taken from the socket at a time, and so written at a time, where that much has come.

Measured on 1 GiB over loopback, received, digested and written (CPU-s/GB): 64 KiB 1.01, 256 KiB 0.57-0.87, 1 MiB 0.44-0.50, 1 MiB of which
the kernel gathers 512 KiB first 0.37; spliced from socket to file and read back for the digest 0.40-0.44.
"""

# One each for all connections: what is in them is given away before anything else is received. Fresh memory costs more than the copy.
_body_buffer = page_aligned(BODY_READ_BYTES)
_head_buffer = memoryview(bytearray(16 * 1024))

_CLOSED_EARLY = "closed the connection before the body was complete"
_NOT_HTTP = "sent what is not HTTP"


class Broken(Exception):
    """No complete answer came. `what` is a clause that goes behind the host's name; nothing that a server said is in it."""

    def __init__(self, what: str, *, unanswered: bool = False, unreachable: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.unreachable = unreachable
        """There is no connection to be had, which will be so for every request."""
        self.unanswered = unanswered
        """Not a byte of an answer had come. On a connection that had been idle, its end may have crossed with the request."""


@dataclass(frozen=True, slots=True)
class Head:
    """An answer without its body. Names in `headers` are in lower case; of a name that comes twice the first counts."""

    status: int
    headers: Mapping[str, str]
    length: int | None
    """Bytes of the body (to a HEAD: of what a GET would get); None where only its end tells."""


class Connection(asyncio.BufferedProtocol):
    """`request`, then `receive` where the body is wanted, then `finish`. One task at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._http = h11.Connection(h11.CLIENT)  # of the request under way
        self._keep = False  # the server takes another request after this one
        self._answered: asyncio.Future[Head] | None = None  # while a head is awaited
        self._body: _Body | None = None  # while a body is received
        self._heard = False  # something of the answer has come
        self._complete = True  # and all of it
        self._unasked: Broken | None = None
        self._came = 0.0  # when anything came, by the loop's clock
        self._gathered = 1

    # For whoever asks ------------------------------------------------------------------------------------------------

    async def request(self, method: str, target: str, headers: Sequence[tuple[str, str]], silence_s: float) -> Head:
        """Sends a request without a body. Raises Broken, and TimeoutError where no answer comes for `silence_s`."""
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
        try:
            # latin-1: what a server wrote into its Location goes back to it byte by byte.
            fields = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            data = self._http.send(h11.Request(method=method, target=target.encode("latin-1"), headers=fields))
            data = (data or b"") + (self._http.send(h11.EndOfMessage()) or b"")
        except (h11.LocalProtocolError, UnicodeEncodeError):
            raise Broken("cannot be asked: the request would not be HTTP") from None
        transport = self._require(Broken("closed the connection", unanswered=True))
        self._heard = self._complete = False
        self._answered = self._loop.create_future()
        transport.write(data)
        try:
            async with asyncio.timeout(silence_s):
                return await self._answered
        finally:
            self._answered = None

    async def receive(self, head: Head, take: Callable[[memoryview], None], most: int, silence_s: float) -> bool:
        """Gives up to `most` bytes of `head`'s body to `take`, which is done with a piece when it returns. Returns whether there are more.

        Raises Broken where the body is cut short, TimeoutError where nothing comes for `silence_s`, and what `take` raises.
        """
        wanted = most if head.length is None else min(most, head.length)
        body = self._body = _Body(self._loop.create_future(), take, wanted, direct=head.length is not None)
        self._came = self._loop.time()
        self._watch(body, silence_s)
        try:
            if body.direct:
                body.more = head.length != wanted
                come, _ = self._http.trailing_data
                self._keep &= len(come) <= (head.length or 0)  # what is too much would be taken for the next answer
                self._give(body, memoryview(come)[:wanted])
            else:
                self._parse()
            if not body.over.done():
                self._require(Broken(_CLOSED_EARLY)).resume_reading()
            await body.over
            return body.more
        finally:
            if body.watch is not None:
                body.watch.cancel()
            self._body = None
            self.gather(1)

    def gather(self, count: int) -> None:
        """Has the kernel wait for `count` bytes before it wakes this process. No more than are surely still to come: see SO_RCVLOWAT."""
        if count != self._gathered and self._transport is not None:
            with suppress(OSError):  # closed under us: its reader hears of that by itself
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
                self._gathered = count

    def finish(self) -> bool:
        """Whether another request may follow. What has come of a body that nobody wanted is dropped; what has not closes the connection."""
        if not self._complete and self._heard:
            self._parse()
            self._keep &= not self._http.trailing_data[0]
        if self._complete and self._keep and self._transport is not None and self.open:
            self._transport.resume_reading()  # to hear of its end
            return True
        self.close()
        return False

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """At once: what is unsent or unread is dropped."""
        if self._transport is not None:
            self._transport.abort()

    async def begin_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Speaks TLS with `host` from here on, behind whoever was asked to connect to it. Raises OSError."""
        transport = self._require(Broken("closed the connection"))
        within = await self._loop.start_tls(transport, self, context, server_hostname=host)
        assert within is not None
        self._transport = within

    # For asyncio -----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        body = self._body
        return _body_buffer[: body.wanted] if body is not None and body.direct else _head_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._came = self._loop.time()
        body = self._body
        if body is not None and body.direct:
            self._give(body, _body_buffer[:nbytes])
        elif self._answered is None and body is None:
            # Unasked: a server's goodbye to an idle connection, or no web server.
            self._unasked = Broken(_NOT_HTTP, unanswered=True)
            self.close()
        else:
            come = bytes(_head_buffer[:nbytes])
            if not self._heard and come[:5] != b"HTTP/"[:nbytes]:
                self._fail(Broken(_NOT_HTTP))  # h11 waits for the end of a line, or of a head, that may never come
                return
            self._heard = True
            self._http.receive_data(come)
            self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._body is not None and not self._body.direct and exc is None:
            self._http.receive_data(b"")  # which may be how this body ends
            self._parse()
        if self._unasked is not None:
            self._fail(self._unasked)
        elif isinstance(exc, OSError):
            self._fail(Broken(f"broke the connection ({exc.strerror or 'reset'})", unanswered=not self._heard))
        elif self._body is not None:
            self._fail(Broken(_CLOSED_EARLY))
        else:
            self._fail(Broken("closed the connection before it answered", unanswered=not self._heard))

    # What comes ------------------------------------------------------------------------------------------------------

    def _require(self, otherwise: Broken) -> asyncio.Transport:
        """What it runs on. Raises why that is gone, or `otherwise`."""
        if self._transport is None or self._transport.is_closing():
            raise self._unasked or otherwise
        return self._transport

    def _give(self, body: _Body, piece: memoryview) -> None:
        """Bytes of the body, no more than are wanted."""
        if body.over.done():
            return
        try:
            if piece:
                body.wanted -= len(piece)
                body.take(piece)
        except Exception as e:
            self._fail(e)
            return
        if body.direct and body.wanted == 0:
            self._complete = not body.more
            self._end(body)

    def _end(self, body: _Body) -> None:
        if not body.over.done():
            body.over.set_result(None)
        if self._transport is not None:
            self._transport.pause_reading()

    def _parse(self) -> None:
        """What h11 has: heads, and bodies that are no plain run of bytes."""
        try:
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Response):
                    self._take_head(event)
                    return
                if isinstance(event, h11.Data):
                    self._take_data(memoryview(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self._complete = True
                    if self._body is not None:
                        self._end(self._body)
                    return
                elif not isinstance(event, h11.InformationalResponse):
                    return  # no more for now
        except h11.RemoteProtocolError:
            cut = self._transport is None
            self._fail(Broken(_CLOSED_EARLY if cut else _NOT_HTTP))

    def _take_head(self, response: h11.Response) -> None:
        headers: dict[str, str] = {}
        for name, value in response.headers:
            headers.setdefault(name.decode("latin-1"), value.decode("latin-1"))
        framed = "transfer-encoding" in headers or "content-length" not in headers
        self._keep = response.http_version == b"1.1" and "close" not in headers.get("connection", "").lower()
        if self._transport is not None:
            self._transport.pause_reading()  # what follows is the body's, and nobody has asked for that yet
        if self._answered is not None and not self._answered.done():
            length = None if framed else int(headers["content-length"])
            self._answered.set_result(Head(response.status_code, headers, length))

    def _take_data(self, data: memoryview) -> None:
        body = self._body
        if body is None or body.over.done():
            return  # nobody wants it
        if len(data) > body.wanted:
            body.more = True
            data = data[: body.wanted]
        self._give(body, data)
        if body.more:
            self._end(body)

    def _fail(self, error: Exception) -> None:
        waiting = self._body.over if self._body is not None else self._answered
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        self._keep = False
        self.close()

    def _watch(self, body: _Body, silence_s: float) -> None:
        """Ends the body where nothing has come for `silence_s`; looks again when that may be so."""
        left = self._came + silence_s - self._loop.time()
        if left > 0:
            body.watch = self._loop.call_later(left, self._watch, body, silence_s)
        else:
            self._fail(TimeoutError())


@dataclass(slots=True, eq=False)
class _Body:
    """A body while it is received."""

    over: asyncio.Future[None]
    take: Callable[[memoryview], None]
    wanted: int
    """Bytes that `take` is still to get."""
    direct: bool
    """Its length is known, and h11 sees nothing of it."""
    watch: asyncio.TimerHandle | None = None
    more: bool = False
    """It goes on beyond what is wanted."""
