"""One HTTP/1.1 connection against scripted answers, however they are cut into pieces."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.worker import connection as module
from manta.worker.connection import Broken, Connection, Head

T = TypeVar("T")
BODY = bytes(range(256)) * 20
GET = ("GET", "/x", [("Host", "hub")])
OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"
ENDLESS = OK + b"\r\n" + BODY


class Wire(asyncio.Transport):
    """A connection's transport without a network: gives it bytes in pieces, as long as it reads."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        super().__init__()
        self.connection = Connection()
        self.pieces = list(pieces)
        self.sent: list[bytes] = []
        self.reading = True
        self.closed = False
        self.connection.connection_made(self)

    def deliver(self, *, then: Exception | None = None, end: bool = True) -> None:
        """All there is, and (`end`) the end of the connection, where it would be seen."""
        while self.pieces and self.reading and not self.closed:
            buffer = self.connection.get_buffer(-1)
            piece, rest = self.pieces[0][: len(buffer)], self.pieces[0][len(buffer) :]
            self.pieces[:1] = [rest] if rest else []
            buffer[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))
        if end and self.reading and not self.closed:
            self.closed = True
            self.connection.connection_lost(then)

    def write(self, data: Any) -> None:
        self.sent.append(bytes(data))

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self

    def setsockopt(self, *_: object) -> None:
        """Of the socket that there is none of."""


async def ask(wire: Wire, method: str = "GET", *, end: bool = True) -> Head:
    asking = asyncio.create_task(wire.connection.request(method, "/x", [("Host", "hub")], 5))
    await asyncio.sleep(0)
    wire.deliver(end=end)
    return await asking


async def receive(wire: Wire, head: Head, most: int, *, end: bool = True) -> tuple[bytes, bool]:
    came = bytearray()
    receiving = asyncio.create_task(wire.connection.receive(head, came.extend, most, 5))
    await asyncio.sleep(0)
    wire.deliver(end=end)
    more = await receiving
    return bytes(came), more


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work()

    return asyncio.run(bounded())


def pieces_of(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places) if a < b]


# What comes ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_body_is_whole_however_it_is_framed_and_cut(data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from([PLAIN, CHUNKED, ENDLESS]))
    pieces = pieces_of(answer, data.draw(st.lists(st.integers(1, len(answer)), max_size=6)))
    most = data.draw(st.sampled_from([1, 100, len(BODY) - 1, len(BODY), len(BODY) + 1]))

    async def work() -> None:
        wire = Wire(pieces)
        head = await ask(wire, end=False)
        assert head.status == 200
        assert head.length == (len(BODY) if answer is PLAIN else None)
        assert await receive(wire, head, most) == (BODY[:most], most < len(BODY))

    run(work)


@given(st.data())
def test_an_answer_that_is_cut_short_is_never_taken_for_whole(data: st.DataObject) -> None:
    answer = data.draw(st.sampled_from([PLAIN, CHUNKED]))
    cut = answer[: data.draw(st.integers(0, len(answer) - 1))]

    async def work() -> None:
        wire = Wire([cut] if cut else [])
        with pytest.raises(Broken):
            await receive(wire, await ask(wire), len(BODY))
        assert not wire.connection.finish()

    run(work)


def test_the_next_request_goes_over_the_same_connection() -> None:
    async def work() -> None:
        wire = Wire([PLAIN])
        head = await ask(wire, end=False)
        assert await receive(wire, head, len(BODY), end=False) == (BODY, False)
        assert wire.connection.finish()
        wire.pieces = [OK + b"Content-Length: 2\r\n\r\nhi"]
        head = await ask(wire, end=False)
        assert await receive(wire, head, 9, end=False) == (b"hi", False)
        assert len(wire.sent) == 2
        assert wire.sent[0].startswith(b"GET /x HTTP/1.1\r\nHost: hub\r\n")

    run(work)


@pytest.mark.parametrize(
    ("method", "answer", "follows"),
    [
        ("HEAD", OK + b"Content-Length: 50\r\n\r\n", True),
        ("GET", b"HTTP/1.1 304 N\r\n\r\n", True),
        ("GET", b"HTTP/1.1 302 F\r\nLocation: /y\r\nContent-Length: 3\r\n\r\nsee", True),
        ("GET", b"HTTP/1.1 302 F\r\nLocation: /y\r\nContent-Length: 3\r\n\r\nse", False),  # not to be waited for
        ("GET", b"HTTP/1.1 302 F\r\nLocation: /y\r\nConnection: Close\r\nContent-Length: 0\r\n\r\n", False),
        ("GET", b"HTTP/1.1 302 F\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n", False),  # nobody asked for that
        ("GET", b"HTTP/1.0 302 F\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n", False),
        ("GET", b"HTTP/1.1 103 E\r\nLink: x\r\n\r\nHTTP/1.1 404 N\r\nContent-Length: 0\r\n\r\n", True),
    ],
)
def test_after_an_answer_whose_body_nobody_wants(method: str, answer: bytes, follows: bool) -> None:
    async def work() -> None:
        wire = Wire([answer])
        head = await ask(wire, method, end=False)
        assert head.status >= 200
        assert wire.connection.finish() is follows
        assert wire.closed is not follows

    run(work)


def test_of_a_header_that_comes_twice_the_first_counts() -> None:
    async def work() -> None:
        head = await ask(Wire([OK + b"ETag: a\r\netag: b\r\nContent-Length: 0\r\n\r\n"]))
        assert head.headers["etag"] == "a"

    run(work)


# What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"220 smtp\r\n",
        b"HTTP/1.1 2OO OK\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
        OK + b"X: " + b"y" * module.HEAD_BYTES_MAX + b"\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    ],
)
def test_what_is_no_http_is_named(answer: bytes) -> None:
    async def work() -> None:
        wire = Wire([answer])
        with pytest.raises(Broken, match="not HTTP"):
            await receive(wire, await ask(wire, end=False), 10, end=False)

    run(work)


def test_what_would_be_no_http_is_not_sent() -> None:
    async def work() -> None:
        wire = Wire([])
        for target, value in (("/x", "a\r\nb: c"), ("/x y", "a"), ("/\u20ac", "a")):
            with pytest.raises(Broken, match="would not be HTTP"):
                await wire.connection.request("GET", target, [("Host", "hub"), ("X", value)], 5)
        assert wire.sent == []

    run(work)


@pytest.mark.parametrize(("pieces", "unanswered"), [([], True), ([b"HTTP/1.1 2"], False)])
@pytest.mark.parametrize("why", [None, ConnectionResetError(104, "Connection reset by peer")])
def test_it_tells_whether_an_answer_had_begun(pieces: list[bytes], unanswered: bool, why: Exception | None) -> None:
    async def work() -> None:
        wire = Wire(pieces)
        asking = asyncio.create_task(wire.connection.request(*GET, 5))
        await asyncio.sleep(0)
        wire.deliver(then=why)
        with pytest.raises(Broken) as broken:
            await asking
        assert broken.value.unanswered is unanswered
        assert ("reset by peer" in broken.value.what) is (why is not None)
        with pytest.raises(Broken):
            await wire.connection.request(*GET, 5)

    run(work)


def test_a_goodbye_that_nobody_asked_for_is_no_answer() -> None:
    async def work() -> None:
        wire = Wire([PLAIN])
        await receive(wire, await ask(wire, end=False), len(BODY), end=False)
        assert wire.connection.finish()
        wire.pieces = [b"HTTP/1.1 408 Request Timeout\r\n\r\n"]
        wire.deliver(end=False)
        assert not wire.connection.open
        with pytest.raises(Broken) as broken:
            await wire.connection.request(*GET, 5)
        assert broken.value.unanswered

    run(work)


def test_silence_ends_a_request_and_a_body() -> None:
    async def work() -> None:
        with pytest.raises(TimeoutError):
            await Wire([]).connection.request(*GET, 0.01)
        wire = Wire([PLAIN[:-1]])
        head = await ask(wire, end=False)
        receiving = asyncio.create_task(wire.connection.receive(head, lambda _: None, len(BODY), 0.01))
        await asyncio.sleep(0)
        wire.deliver(end=False)
        with pytest.raises(TimeoutError):
            await receiving
        assert wire.closed

    run(work)


def test_who_cannot_take_a_piece_gets_no_other() -> None:
    async def work() -> None:
        wire = Wire([PLAIN[:-100], PLAIN[-100:]])
        head = await ask(wire, end=False)
        taken: list[int] = []

        def full(piece: memoryview) -> None:
            taken.append(len(piece))
            raise OSError(28, "full")

        receiving = asyncio.create_task(wire.connection.receive(head, full, len(BODY), 5))
        await asyncio.sleep(0)
        wire.deliver(end=False)
        with pytest.raises(OSError, match="full"):
            await receiving
        assert len(taken) == 1
        assert wire.closed

    run(work)


def test_nothing_is_taken_after_a_cancellation() -> None:
    async def work() -> None:
        wire = Wire([PLAIN[:-100]])
        head = await ask(wire, end=False)
        came = bytearray()
        receiving = asyncio.create_task(wire.connection.receive(head, came.extend, len(BODY), 5))
        await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait([receiving])
        before = len(came)
        wire.reading, wire.pieces = True, [PLAIN[-100:]]
        wire.deliver(end=False)
        assert len(came) == before
        assert wire.closed

    run(work)


# Over a socket -------------------------------------------------------------------------------------------------------


def test_the_kernel_gathers_as_told_and_not_after_the_body() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        _, connection = await asyncio.get_running_loop().create_connection(Connection, sock=ours)
        asking = asyncio.create_task(connection.request(*GET, 5))
        await asyncio.sleep(0)
        theirs.send(PLAIN[:100])
        head = await asking
        lows: list[int] = []

        def take(_: memoryview) -> None:
            connection.gather(2000)
            lows.append(ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))

        receiving = asyncio.create_task(connection.receive(head, take, len(BODY), 5))
        theirs.send(PLAIN[100:])
        assert await receiving is False
        assert set(lows) == {2000}
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        connection.close()
        theirs.close()
        await asyncio.sleep(0)

    run(work)
