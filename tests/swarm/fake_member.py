"""A member on loopback, inside the test's own loop: well, or in one of the moods of a member that is not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from manta.errors import Denied
from manta.swarm.auth import Answer, Request, Sender, Verifier, sign_answer
from manta.swarm.protocol import MAC, Have, HaveRequest, Hello, Refusal, decode, encode

KEYS = (b"a key of the whole cluster",)
T = TypeVar("T")


def run(work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float = 30.0) -> T:
    """A test's coroutine, to its end, in time."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await work()

    return asyncio.run(bounded())


async def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():
            await asyncio.sleep(0.005)


STARTED = 1.0


@dataclass
class FakeMember:
    """`async with FakeMember(node) as member`. What `mood` may be is in `_answer`; it may change at any time."""

    node: str
    keys: tuple[bytes, ...] = KEYS
    mood: str = "well"
    version: str = "1.0"
    started: float = STARTED
    has: dict[str, bytes] = field(default_factory=dict)
    pauses: dict[str, float] = field(default_factory=dict)
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """To resolve, tree, location and report."""
    tls: ssl.SSLContext | None = None
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """Paths of the requests that came."""
    bodies: list[bytes] = field(default_factory=list)
    _runner: web.AppRunner | None = None
    _seen: bytes = b""
    _seen_mac: str = ""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeMember:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens; again at the same port after `stop`."""
        app = web.Application(client_max_size=1 << 20)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Crashes: what was connected is cut."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            if runner.server is not None:
                for connection in runner.server.connections:
                    if connection.transport is not None:
                        connection.transport.abort()
            await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        body = await request.read()
        self.bodies.append(body)
        signed = _signed(request, body)
        try:
            sender = Verifier(self.node, self.keys).check(request.headers.get("Authorization", ""), signed, time.time())
        except Denied as error:
            refusal = encode(Refusal(reason="unauthorized", message=error.message))
            return web.Response(status=401, body=refusal)
        return await self._answer(request, sender, *self._true_answer(request.path, body))

    def _true_answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        if path == "/v1/hello":
            return 200, encode(Hello(node=self.node, version=self.version, started=self.started))
        if path == "/v1/have":
            asked = decode(body, HaveRequest).blobs
            blobs = {blob: self.has[blob] for blob, _ in asked if blob in self.has}
            return 200, encode(Have(node=self.node, blobs=blobs, pauses=self.pauses))
        unknown = 404, encode(Refusal(reason="absent", message="It is not known here."))
        return self.answers.get(path.removeprefix("/v1/ask/"), unknown)

    async def _answer(self, request: web.Request, sender: Sender, status: int, body: bytes) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        mood = self.mood
        if mood.startswith("have "):
            mood = mood.removeprefix("have ") if request.path == "/v1/have" else "well"
        match mood:
            case "silent":  # takes the request and never answers
                await asyncio.sleep(3600)
            case "cut":
                transport.abort()
            case "cut in the body":
                transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
                transport.close()
                await asyncio.sleep(3600)
            case "no http":
                transport.write(b"\x16\x03\x01 what is this\r\n\r\n" * 20)
                transport.close()
                await asyncio.sleep(3600)
            case "endless headers":
                transport.write(b"HTTP/1.1 200 OK\r\nx-a: ")
                with contextlib.suppress(ConnectionError):
                    while not transport.is_closing():
                        transport.write(b"a" * 65536)
                        await asyncio.sleep(0)
            case "drip":
                return await _stream(request, _drip())
            case "endless":
                return await _stream(request, _endless())
            case "other node":
                body = encode(Hello(node="f" * 16, version="1.0", started=1.0))
            case "bad node id":
                self.node, body = "nobody", encode(Hello(node="nobody", version="1.0", started=1.0))
            case "garbage":
                body = b"\xc1\xff garbage"
            case "nested":
                body = b"\x91" * 100_000 + b"\xc0"
            case "short bitmap":
                body = encode(Have(node=self.node, blobs=dict.fromkeys(self.has, b"")))
            case "other member's answer":
                body = encode(Have(node="f" * 16))
            case "busy":
                return web.Response(status=503, body=b"too many connections")
            case "failing":
                status, body = 500, encode(Refusal(reason="cache_broken", message="The disk is gone."))
            case "redirect":
                other = f"http://127.0.0.1:{self.port}/v1/hello"
                return web.Response(status=302, headers={"Location": other, MAC: self._mac(sender, 302, b"")})
            case "compressed":
                answer = web.Response(status=200, body=body, headers={MAC: self._mac(sender, status, body)})
                answer.enable_compression(web.ContentCoding.gzip)
                return answer
            case "unsigned":
                return web.Response(status=status, body=body)
            case "wrong signature":
                return web.Response(status=status, body=body, headers={MAC: "0" * 64})
            case "altered":
                return web.Response(status=status, body=body + b"\0", headers={MAC: self._mac(sender, status, body)})
            case "replay" if self._seen:
                return web.Response(status=200, body=self._seen, headers={MAC: self._seen_mac})
            case "parting":  # answers, and closes what it had promised to keep
                asyncio.get_running_loop().call_later(0.01, transport.abort)
        mac = self._mac(sender, status, body)
        self._seen, self._seen_mac = body, mac
        return web.Response(status=status, body=body, headers={MAC: mac} if mac else {})

    def _mac(self, sender: Sender, status: int, body: bytes) -> str:
        return sign_answer(Answer(status, body=body), sender, self.node)


def _signed(request: web.Request, body: bytes) -> Request:
    return Request(request.method, request.path_qs, request.headers.get("Range", ""), body)


async def _stream(request: web.Request, pieces: AsyncIterator[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={MAC: "0" * 64})
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):
        async for piece in pieces:
            await response.write(piece)
    return response


async def _drip() -> AsyncIterator[bytes]:
    while True:
        yield b"."
        await asyncio.sleep(0.05)


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(1 << 20)
