"""/metrics at an address of its own, for a Prometheus server: nothing else is answered there. Here and only here.

The control socket answers it too, always; this is for scrapers, which may not have that socket. Off unless `daemon.metrics` names an
address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable

import trio

from manta.config import ListenAddress
from manta.control.http import CONNECTIONS_MAX, Answer, HttpServer, Request
from manta.errors import Unavailable

log = logging.getLogger(__name__)

METRICS = "/metrics"


class MetricsServer:
    """Answers ``GET /metrics`` with what `metrics` returns."""

    def __init__(self, metrics: Callable[[], Awaitable[Answer]]) -> None:
        self._metrics = metrics
        self._http = HttpServer(self._answer, _refusal)

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Until it is cancelled; no socket file stays."""
        paths = [each.socket.getsockname() for each in listeners if each.socket.family == socket.AF_UNIX]
        try:
            await self._http.serve(listeners)
        finally:
            for path in paths:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    async def _answer(self, request: Request) -> Answer:
        if request.target.partition("?")[0] != METRICS:
            return Answer(404, "text/plain", b"Only /metrics is here.\n")
        if request.method != "GET":
            return Answer(405, "text/plain", b"Only GET is answered.\n")
        return await self._metrics()


def _refusal(error: Unavailable) -> Answer:
    return Answer(503, "text/plain", f"{error.message}\n".encode())


async def listen(address: ListenAddress) -> list[trio.SocketListener]:
    """Raises Unavailable with what to do. A socket file that nobody listens at any more is replaced."""
    try:
        if address.path:
            return [await _listen_at_path(address.path)]
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=CONNECTIONS_MAX)
    except OSError as e:
        raise Unavailable(
            f"Metrics cannot be served at {address} ({e.strerror or e}): choose another address (daemon.metrics,"
            " MANTA_DAEMON_METRICS). Everything else works."
        ) from e
    for listener in listeners:
        host, port, *_ = listener.socket.getsockname()
        if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            log.warning("metrics are served to the network at %s port %d, because daemon.metrics says so", host, port)
    return listeners


async def _listen_at_path(path: str) -> trio.SocketListener:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(None, "something that is no socket is there")
        with contextlib.suppress(ConnectionRefusedError):
            async with await trio.open_unix_socket(path):
                raise FileExistsError(None, "another program listens there")
        os.unlink(path)
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        await sock.bind(path)
        os.chmod(path, 0o666)  # a scraper has a user of its own; the directory says who may come here
        sock.listen(CONNECTIONS_MAX)
    except OSError:
        sock.close()
        raise
    return trio.SocketListener(sock)
