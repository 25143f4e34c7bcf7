"""Where others come in: listening sockets, TLS, and the bound on connections, here and only here. One asyncio loop.

Used by `manta.swarm.server`. Who has not shown yet that it is a member is put out first when there are too many; then which member has been
silent longest. One that is being answered stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from manta.errors import Invalid, Unavailable
from manta.swarm.limits import Limits

BACKLOG = 256
HEAD_FIELDS_MAX = 32
FIELD_BYTES_MAX = 4096
LINE_BYTES_MAX = 8 * 1024
ACCEPT_PAUSE_SECONDS = 0.5
"""After the kernel had no descriptor or no memory for a connection."""
UNACKNOWLEDGED_MS = 30_000
"""What a reader's kernel has not acknowledged for so long ends the connection: a host that vanished says nothing."""

SHUTDOWN_SECONDS = 1.0
"""For answers whose connection was just closed under them."""

_REFUSALS_OF_ACCEPT = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(eq=False, slots=True)
class Connection:
    """One that was accepted."""

    socket: socket.socket
    since: float
    """When it was last answered, or accepted."""
    known: bool = False
    """A request on it was a member's."""
    answering: bool = False
    transport: asyncio.Transport | None = None
    handler: web.RequestHandler | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class _Http(web.Server):
    """aiohttp's server, which tells when a connection is lost."""

    def __init__(self, answer: Answer, lost: Callable[[web.RequestHandler], None], **options: Any) -> None:
        super().__init__(answer, **options)
        self._lost = lost

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._lost(handler)


class Door:
    """`answer` gets each request, one at a time on a connection."""

    def __init__(self, answer: Answer, limits: Limits) -> None:
        self._limits = limits
        self._connections: set[Connection] = set()
        self._by_handler: dict[web.RequestHandler, Connection] = {}
        self._http = _Http(
            answer,
            self._lost,
            handler_cancellation=True,
            keepalive_timeout=limits.idle_s,
            access_log=None,
            logger=_silent,
            max_line_size=LINE_BYTES_MAX,
            max_headers=HEAD_FIELDS_MAX,
            max_field_size=FIELD_BYTES_MAX,
            lingering_time=0,  # who sends more than was asked for is not listened to
            auto_decompress=False,  # a signature is of what was sent; and a small body must not become a large one
        )

    def __len__(self) -> int:
        """Connections."""
        return len(self._connections)

    @contextlib.contextmanager
    def answering(self, request: web.BaseRequest) -> Iterator[Connection]:
        """Around the answer to `request`: its connection."""
        connection = self._by_handler.get(request.protocol)
        if connection is None:
            raise ConnectionResetError("the connection was closed")
        connection.answering = True
        try:
            yield connection
        finally:
            connection.answering = False
            connection.since = asyncio.get_running_loop().time()

    async def serve(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None) -> None:
        """Until it is cancelled; then the sockets and all connections are closed."""
        try:
            async with asyncio.TaskGroup() as group:
                for each in sockets:
                    group.create_task(self._accept(each, tls))
        finally:
            for each in sockets:
                each.close()
            for connection in list(self._connections):
                self._put_out(connection)
            await self._http.shutdown(SHUTDOWN_SECONDS)

    async def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Else one that was gone again before we looked.
                if error.errno in _REFUSALS_OF_ACCEPT:
                    await asyncio.sleep(ACCEPT_PAUSE_SECONDS)
                continue
            if len(self._connections) >= self._limits.connections and not self._make_room():
                accepted.close()
                continue
            connection = Connection(accepted, loop.time())
            self._connections.add(connection)
            connection.task = asyncio.create_task(self._welcome(connection, tls))

    async def _welcome(self, connection: Connection, tls: ssl.SSLContext | None) -> None:
        """Shakes hands, after which the connection is aiohttp's."""

        def handler() -> web.RequestHandler:
            connection.handler = self._http()
            self._by_handler[connection.handler] = connection
            return connection.handler

        loop = asyncio.get_running_loop()
        accepted = connection.socket
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            connection.transport, _ = await loop.connect_accepted_socket(
                handler, accepted, ssl=tls, ssl_handshake_timeout=self._limits.handshake_s if tls is not None else None
            )
        except (OSError, asyncio.CancelledError):  # no TLS, or a handshake that took too long
            accepted.close()
            self._forget(connection)
        else:
            if connection.transport.is_closing():
                self._forget(connection)

    def _make_room(self) -> bool:
        """Puts out a connection of which nothing is lost. False where all are members that are being answered."""
        idle = [each for each in self._connections if not (each.known and each.answering)]
        if not idle:
            return False
        self._put_out(min(idle, key=lambda each: (each.known, each.since)))
        return True

    def _put_out(self, connection: Connection) -> None:
        self._forget(connection)
        if connection.transport is not None:
            connection.transport.abort()
        elif connection.task is not None:
            connection.task.cancel()

    def _lost(self, handler: web.RequestHandler) -> None:
        if (connection := self._by_handler.get(handler)) is not None:
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if connection.handler is not None:
            self._by_handler.pop(connection.handler, None)


def _silent_logger() -> logging.Logger:
    """For aiohttp, which would tell of every request that is none: anybody could fill the daemon's log."""
    logger = logging.getLogger("manta.swarm.aiohttp")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    return logger


_silent = _silent_logger()


async def bind(host: str, port: int, *, beyond_loopback: bool) -> list[socket.socket]:
    """Sockets that listen at all addresses of `host`. `port` 0: one that is free.

    Raises Invalid where one of them is not loopback and `beyond_loopback` is False; Unavailable where they cannot be had now.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise Unavailable(
            f"Other nodes cannot be served at {where}: the name has no address ({error.strerror}). It is tried again;"
            " another address goes into swarm.listen."
        ) from error
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if not beyond_loopback and not all(is_loopback(str(address[0])) for _, address in addresses):
        raise Invalid(
            f"Other nodes are not served at {where}: without a key anybody in the network could read this cache."
            " Give all nodes the same key (swarm.key_file, MANTA_SWARM_KEY), or listen at 127.0.0.1."
        )
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            sockets.append(_listener(family, (address[0], port, *address[2:]), alone=len(addresses) == 1))
            port = port or sockets[0].getsockname()[1]
    except OSError as error:
        for each in sockets:
            each.close()
        raise Unavailable(
            f"Other nodes cannot be served at {where} ({error.strerror}). It is tried again; another address goes into"
            " swarm.listen."
        ) from error
    return sockets


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _listener(family: int, address: tuple[Any, ...], *, alone: bool) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "::" alone is for IPv4 too; beside an IPv4 socket of the same port it must not be.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


class Certificate:
    """This node's certificate and its key, read again when the files change: certificates are replaced under running daemons."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises Unavailable where they cannot be used."""
        self._certificate = certificate
        self._key = key
        self._read: tuple[int, ...] = ()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.refresh()

    def refresh(self) -> None:
        """For the connections from now on. Raises Unavailable; then the certificate before stays in use."""
        try:
            state = tuple(os.stat(path).st_mtime_ns for path in (self._certificate, self._key))
            if state != self._read:
                # Tried out first: a context that refuses a pair has lost the one it had.
                for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
                    context.load_cert_chain(self._certificate, self._key)
                self._read = state
        except (OSError, ValueError) as error:
            raise Unavailable(
                f"The certificate {self._certificate} with the key {self._key} cannot be used ({error})."
                " It is tried again; other files go into swarm.tls_certificate and swarm.tls_key."
            ) from error
