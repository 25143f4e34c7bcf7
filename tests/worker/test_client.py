"""The worker's connections: kept, replaced, over TLS, through proxies; against small servers of each kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from yarl import URL

from manta.worker import client as module
from manta.worker.client import Client
from manta.worker.connection import Broken, Head

T = TypeVar("T")
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@dataclass
class Server:
    """A server on loopback that answers each request with the next of `answers`, and closes after one that is None."""

    answers: list[bytes | None] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    """Of the requests that came, in lower case."""
    connections: int = 0
    port: int = 0

    def url(self, path: str = "/x", scheme: str = "http", host: str = "127.0.0.1") -> URL:
        return URL(f"{scheme}://{host}:{self.port}{path}", encoded=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
                answer = self.answers.pop(0) if self.answers else ANSWER
                if answer is None:
                    break
                writer.write(answer)


@contextlib.asynccontextmanager
async def serving(server: Server, tls: tuple[Path, Path] | None = None) -> AsyncIterator[Server]:
    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    tasks: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(server.serve(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Babbler(Server):
    """What is no web server."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            writer.write(b"220 smtp.example ESMTP\r\n")
            await reader.read()


class Proxy(Server):
    """A proxy that connects wherever it is asked to, if its next answer is none but the usual."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)

        with contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            self.heads.append(head)
            if self.answers:
                writer.write(self.answers.pop(0) or b"")
                return
            host, _, port = head.split()[1].rpartition(":")
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            with contextlib.closing(far_writer):
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


async def get(client: Client, url: URL, headers: dict[str, str] | None = None) -> tuple[Head, bytes]:
    body = bytearray()
    async with client.exchange("GET", url, headers or {}, connect_s=5, silence_s=5) as (connection, head):
        if head.length:
            await connection.receive(head, body.extend, head.length, 5)
    return head, bytes(body)


def run(work: Callable[[Client], Awaitable[T]]) -> T:
    async def bounded() -> T:
        client = Client()
        try:
            async with asyncio.timeout(20):
                return await work(client)
        finally:
            client.close()
            await asyncio.sleep(0.01)  # what is closed is gone when the loop is

    return asyncio.run(bounded())


def lines(head: str, name: str) -> list[str]:
    return [line for line in head.split("\r\n") if line.startswith(f"{name}:")]


# Requests ------------------------------------------------------------------------------------------------------------


def test_what_a_request_says_of_itself_counts_and_comes_once() -> None:
    async def work(client: Client) -> None:
        async with serving(Server()) as server:
            _, body = await get(client, server.url("/a%20b?c=%2F"), {"user-agent": "other", "X-Y": "z"})
            assert body == b"hello"
            (head,) = server.heads
            assert head.startswith("get /a%20b?c=%2f http/1.1\r\n")
            assert lines(head, "user-agent") == ["user-agent: other"]
            assert lines(head, "host") == [f"host: 127.0.0.1:{server.port}"]
            assert lines(head, "accept-encoding") == ["accept-encoding: identity"]
            assert lines(head, "x-y") == ["x-y: z"]

    run(work)


# Connections ---------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_its_origin() -> None:
    async def work(client: Client) -> None:
        async with serving(Server()) as one, serving(Server()) as other:
            for _ in range(3):
                await get(client, one.url())
            await get(client, other.url())
            assert (one.connections, other.connections) == (1, 1)

    run(work)


def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS_MAX", 0.0)

    async def work(client: Client) -> None:
        async with serving(Server()) as server:
            await get(client, server.url())
            await asyncio.sleep(0.05)
            await get(client, server.url())
            assert server.connections == 2

    run(work)


@pytest.mark.parametrize("answers", [[ANSWER, None, ANSWER], [ANSWER + b"HTTP/1.1 408 Request Timeout\r\n", ANSWER]])
def test_one_that_was_closed_while_it_was_idle_is_replaced(answers: list[bytes | None]) -> None:
    """Also where that crosses with the next request: the server takes the request and closes."""

    async def work(client: Client) -> None:
        async with serving(Server(answers=answers)) as server:
            await get(client, server.url())
            assert (await get(client, server.url()))[1] == b"hello"
            assert server.connections == 2

    run(work)


def test_a_new_connection_that_is_closed_without_an_answer_is_a_failure() -> None:
    async def work(client: Client) -> None:
        async with serving(Server(answers=[None])) as server:
            with pytest.raises(Broken, match="closed the connection"):
                await get(client, server.url())
            assert server.connections == 1

    run(work)


def test_one_whose_exchange_was_given_up_serves_no_other() -> None:
    async def work(client: Client) -> None:
        async with serving(Server()) as server:
            with pytest.raises(KeyError):
                async with client.exchange("GET", server.url(), {}, connect_s=5, silence_s=5):
                    raise KeyError
            await get(client, server.url())
            assert server.connections == 2

    run(work)


def test_a_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = asyncio.BaseEventLoop.getaddrinfo

    async def counted(loop: Any, host: str, *rest: Any, **more: Any) -> Any:
        asked.append(host)
        return await real(loop, host, *rest, **more)

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", counted)

    async def work(client: Client) -> None:
        async with serving(Server(answers=[ANSWER, None, ANSWER])) as server:
            await get(client, server.url(host="localhost"))
            await get(client, server.url(host="localhost"))
            assert server.connections == 2

    run(work)
    assert asked.count("localhost") == 1


# TLS -----------------------------------------------------------------------------------------------------------------


def test_over_tls(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def work(client: Client) -> None:
        async with serving(Server(), certificate) as server:
            for host in ("localhost", "127.0.0.1"):
                for _ in range(2):
                    assert (await get(client, server.url("/x", "https", host)))[1] == b"hello"
            assert server.connections == 2

    run(work)


def test_a_certificate_that_is_not_trusted_is_named(certificate: tuple[Path, Path]) -> None:
    async def work(client: Client) -> None:
        async with serving(Server(), certificate) as server:
            with pytest.raises(Broken, match=r"certificate .*refused \(self-signed"):
                await get(client, server.url("/x", "https"))

    run(work)


def test_a_server_without_tls_is_named() -> None:
    async def work(client: Client) -> None:
        async with serving(Babbler()) as server:
            with pytest.raises(Broken, match="handshake"):
                await get(client, server.url("/x", "https"))

    run(work)


# Proxies -------------------------------------------------------------------------------------------------------------


def test_http_goes_through_the_environments_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving(Server()) as proxy:
            monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
            client = Client()
            await get(client, URL("http://hub.invalid/x?y=z", encoded=True))
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            await get(client, proxy.url("/direct"))
            client.close()
        through, direct = proxy.heads
        assert through.startswith("get http://hub.invalid/x?y=z http/1.1\r\n")
        assert lines(through, "host") == ["host: hub.invalid"]
        secret = base64.b64encode(b"me:secret").decode().lower()
        assert lines(through, "proxy-authorization") == [f"proxy-authorization: basic {secret}"]
        assert direct.startswith("get /direct http/1.1\r\n")
        assert "authorization" not in direct

    asyncio.run(work())


def test_https_goes_through_a_tunnel(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    async def work() -> None:
        async with serving(Proxy()) as proxy, serving(Server(), certificate) as server:
            monkeypatch.setenv("https_proxy", f"127.0.0.1:{proxy.port}")
            client = Client()
            for _ in range(2):
                assert (await get(client, server.url("/x", "https", "localhost"), {"Authorization": "t"}))[
                    1
                ] == b"hello"
            client.close()
            await asyncio.sleep(0.01)
        (tunnel,) = proxy.heads
        assert tunnel.startswith(f"connect localhost:{server.port} http/1.1\r\n")
        assert "authorization" not in tunnel
        assert len(server.heads) == 2

    asyncio.run(work())


def test_a_proxy_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving(Proxy(answers=[b"HTTP/1.1 407 P\r\nContent-Length: 0\r\n\r\n"])) as proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
            client = Client()
            with pytest.raises(Broken, match=r"the proxy 127\.0\.0\.1 answered 407"):
                await get(client, URL("https://hub.invalid/x"))
            client.close()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(Broken, match=r"the proxy 127\.0\.0\.1 cannot be reached"):
            await get(Client(), URL("http://hub.invalid/x"))
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        with pytest.raises(Broken, match="HTTP_PROXY is no http:// address"):
            await get(Client(), URL("http://hub.invalid/x"))

    asyncio.run(work())
