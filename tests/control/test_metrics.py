"""/metrics at its own address: TCP and a unix socket, and nothing else there; addresses that cannot be had."""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from manta.config import ListenAddress
from manta.control import http
from manta.control.http import Answer
from manta.control.metrics import MetricsServer, listen
from manta.errors import Unavailable

pytestmark = pytest.mark.trio
SHOWN = Answer(200, "text/plain; version=0.0.4", b"manta_mounts 1.0\n")


async def shown() -> Answer:
    return SHOWN


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def serving(address: ListenAddress) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(MetricsServer(shown).serve, await listen(address))
        yield
        nursery.cancel_scope.cancel()


async def say(address: ListenAddress, request: bytes) -> bytes:
    """What the server answers until it closes."""
    if address.path:
        stream = await trio.open_unix_socket(address.path)
    else:
        stream = await trio.open_tcp_stream(address.host, address.port)
    async with stream:
        await stream.send_all(request)
        return b"".join([part async for part in stream])


GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_scraper_gets_them_and_nothing_else() -> None:
    address = ListenAddress("127.0.0.1", free_port())
    async with serving(address):
        answer = await say(address, GET % b"/metrics")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"content-type: text/plain; version=0.0.4\r\n" in answer
        assert answer.endswith(b"\r\n\r\nmanta_mounts 1.0\n")
        assert (await say(address, GET % b"/metrics?name%5B%5D=x")).startswith(b"HTTP/1.1 200 ")
        for path in (b"/", b"/v1/status", b"/metricsx"):
            assert (await say(address, GET % path)).startswith(b"HTTP/1.1 404 ")
        post = b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        assert (await say(address, post)).startswith(b"HTTP/1.1 405 ")
        assert await say(address, b"nonsense\r\n\r\n") == b""


async def test_scrapers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 2)
    monkeypatch.setattr(http, "REFUSALS_MAX", 1)
    address = ListenAddress("127.0.0.1", free_port())
    async with serving(address):
        held = [await trio.open_tcp_stream("127.0.0.1", address.port) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        refused = await say(address, GET % b"/metrics")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"2 requests at a time" in refused
        held.append(await trio.open_tcp_stream("127.0.0.1", address.port))
        await trio.testing.wait_all_tasks_blocked()
        assert await say(address, GET % b"/metrics") == b""
        for stream in held:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await say(address, GET % b"/metrics")).startswith(b"HTTP/1.1 200 ")


async def test_a_unix_socket_takes_the_place_of_a_dead_one_and_of_nothing_else(tmp_path: Path) -> None:
    address = ListenAddress("", 0, str(tmp_path / "m.sock"))
    (dead,) = await listen(address)
    await dead.aclose()  # its file stays, as after a crash
    async with serving(address):
        assert (await say(address, GET % b"/metrics")).startswith(b"HTTP/1.1 200 ")
        assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o666
        with pytest.raises(Unavailable, match="another program listens there"):
            await listen(address)
    assert not os.path.exists(address.path)
    plain = tmp_path / "file"
    plain.write_text("mine")
    with pytest.raises(Unavailable, match="no socket"):
        await listen(ListenAddress("", 0, str(plain)))
    assert plain.read_text() == "mine"


async def test_an_address_that_cannot_be_had_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(Unavailable, match=r"daemon\.metrics"):
        await listen(ListenAddress("127.0.0.1", taken.getsockname()[1]))
    with pytest.raises(Unavailable, match="cannot be served at"):
        await listen(ListenAddress("192.0.2.1", 9401))  # nobody's address: TEST-NET-1


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
async def test_an_address_beyond_this_machine_is_warned_of(
    host: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "manta")
    for listener in await listen(ListenAddress(host, free_port())):
        await listener.aclose()
    assert ("served to the network" in caplog.text) is warns
