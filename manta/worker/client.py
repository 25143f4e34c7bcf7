"""A worker's connections: to which address, over TLS or a proxy, and kept while they are idle. Here and only here.

asyncio; used by `manta.worker.origin` and `manta.worker.peer`. The daemon bounds the requests under way, and so the connections in use.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from aiohappyeyeballs import AddrInfoType, start_connection
from yarl import URL

from manta import __version__
from manta.worker.connection import Broken, Connection, Head

IDLE_SECONDS_MAX = 30.0
"""An idle connection is kept this long for the next chunk of a file; servers close theirs after 15 s and more."""

IDLE_MAX = 64
"""Idle connections, to all servers together: the CDN's, or those of the peers that were asked last."""

ADDRESSES_MAX = 1024
"""Names whose addresses are known. Peers come and go."""

ADDRESS_SECONDS_MAX = 60.0
"""How long the addresses of a name are used again: eight connections to one CDN open at the same time."""

SECOND_ADDRESS_SECONDS = 0.25
"""When the next address is tried beside one that has not answered yet (RFC 8305's recommendation)."""

_HEADERS = (("User-Agent", f"manta/{__version__}"), ("Accept", "*/*"), ("Accept-Encoding", "identity"))
"""What goes with every request that does not say otherwise."""

_Origin = tuple[str, str, int]


class Client:
    """HTTP/1.1 to any number of origins. Must be made inside the loop that uses it.

    `authorities` is a PEM file of those that a server's certificate must come from, "" for the system's; `name` what must be in it, "" for
    the host that is asked. Raises OSError where the file cannot be read. Proxies are the environment's, as for other clients, or none
    where it is `direct`.
    """

    def __init__(self, authorities: str = "", name: str = "", *, direct: bool = False) -> None:
        # SSL_CERT_FILE and SSL_CERT_DIR are OpenSSL's own.
        self._tls = ssl.create_default_context(cafile=authorities or None)
        self._tls.set_alpn_protocols(["http/1.1"])
        self._name = name
        self._proxies = {} if direct else urllib.request.getproxies()
        self._idle: dict[_Origin, list[tuple[Connection, asyncio.TimerHandle]]] = {}
        self._addresses: dict[tuple[str, int], tuple[float, Sequence[AddrInfoType]]] = {}

    def close(self) -> None:
        """Closes what is idle; what is in use belongs to its user."""
        for kept in self._idle.values():
            for connection, expiry in kept:
                expiry.cancel()
                connection.close()
        self._idle.clear()

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | Callable[[], Mapping[str, str]],
        *,
        connect_s: float,
        silence_s: float,
    ) -> AsyncIterator[tuple[Connection, Head]]:
        """An answer's head and the connection that its body comes on. Redirects are answers.

        Raises Broken, and TimeoutError where the answer does not come for `silence_s`. A connection that the server closed while it was
        idle is no failure: another is opened. `headers` that are good for one request only are made anew for that.
        """
        proxy = self._proxy_of(url)
        target = url.raw_path_qs
        if proxy is not None and url.scheme == "http":
            target = str(url.with_user(None).with_fragment(None))

        async def request(connection: Connection) -> Head:
            given = headers() if callable(headers) else headers
            own = {name.lower() for name in given}
            fields = [(name, value) for name, value in _HEADERS if name.lower() not in own]
            fields += [("Host", url.host_port_subcomponent or ""), *given.items()]
            if proxy is not None and url.scheme == "http":
                fields += _proxy_authorization(proxy)
            return await connection.request(method, target, fields, silence_s)

        connection = self._take_idle(url)
        reused = connection is not None
        if connection is None:
            connection = await self._connect(url, proxy, connect_s, silence_s)
        try:
            try:
                head = await request(connection)
            except Broken as e:
                if not (reused and e.unanswered):
                    raise
                connection = await self._connect(url, proxy, connect_s, silence_s)
                head = await request(connection)
            yield connection, head
        except BaseException:
            connection.close()
            raise
        if connection.finish():
            self._keep(url, connection)

    # Idle ones ---------------------------------------------------------------------------------------------------------

    def _take_idle(self, url: URL) -> Connection | None:
        kept = self._idle.get(_origin(url), [])
        found = None
        while kept and found is None:
            connection, expiry = kept.pop()  # the one used last: its window is the widest
            expiry.cancel()
            found = connection if connection.open else None
        if not kept:
            self._idle.pop(_origin(url), None)
        return found

    def _keep(self, url: URL, connection: Connection) -> None:
        if sum(map(len, self._idle.values())) >= IDLE_MAX:
            oldest = min(self._idle, key=lambda origin: self._idle[origin][0][1].when())
            self._idle[oldest][0][1].cancel()
            self._expire(oldest)
        kept = self._idle.setdefault(_origin(url), [])
        loop = asyncio.get_running_loop()
        kept.append((connection, loop.call_later(IDLE_SECONDS_MAX, self._expire, _origin(url))))

    def _expire(self, origin: _Origin) -> None:
        connection, _ = self._idle[origin].pop(0)  # the oldest
        if not self._idle[origin]:
            del self._idle[origin]
        connection.close()

    # New ones ----------------------------------------------------------------------------------------------------------

    async def _connect(self, url: URL, proxy: URL | None, connect_s: float, silence_s: float) -> Connection:
        """A connection for requests to `url`, within `connect_s`, the name's lookup and TLS included. Raises Broken."""
        host, tls = url.raw_host or "", url.scheme == "https"
        try:
            async with asyncio.timeout(connect_s):
                if proxy is None:
                    return await self._open(host, url.port or 0, tls=tls)
                try:
                    connection = await self._open(proxy.raw_host or "", proxy.port or 0, tls=False)
                except Broken as e:
                    what = f"cannot be reached: the proxy {proxy.host} {e.what}"
                    raise Broken(what, unreachable=e.unreachable) from e
                if tls:
                    await self._tunnel(connection, host, url.port or 0, proxy, silence_s)
                return connection
        except TimeoutError:
            raise Broken(f"took no connection for {connect_s:g} s", unreachable=True) from None

    async def _open(self, host: str, port: int, *, tls: bool) -> Connection:
        try:
            addresses = await self._look_up(host, port)
        except OSError as e:
            raise Broken("cannot be found (name lookup failed)", unreachable=True) from e
        try:
            connected = await start_connection(addresses, happy_eyeballs_delay=SECOND_ADDRESS_SECONDS)
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection,
                sock=connected,
                ssl=self._tls if tls else None,
                server_hostname=(self._name or host) if tls else None,
            )
        except OSError as e:
            raise _refused(e) from e
        return connection

    async def _look_up(self, host: str, port: int) -> Sequence[AddrInfoType]:
        """Addresses, from the last minute where it was asked already. An address that is written as one needs no thread."""
        known_until, known = self._addresses.get((host, port), (0.0, []))
        if time.monotonic() < known_until:
            return known
        found: Sequence[AddrInfoType]
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if len(self._addresses) >= ADDRESSES_MAX:
            self._addresses.clear()
        self._addresses[host, port] = time.monotonic() + ADDRESS_SECONDS_MAX, found
        return found

    async def _tunnel(self, connection: Connection, host: str, port: int, proxy: URL, silence_s: float) -> None:
        """Makes the proxy's connection one to `host`, with TLS in it."""
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            answer = await connection.request(
                "CONNECT", name, [("Host", name), *_proxy_authorization(proxy)], silence_s
            )
            if answer.status != 200:
                raise Broken(f"cannot be reached: the proxy {proxy.host} answered {answer.status}")
            await connection.begin_tls(self._tls, self._name or host)
        except OSError as e:
            connection.close()
            raise _refused(e) from e
        except BaseException:
            connection.close()
            raise

    def _proxy_of(self, url: URL) -> URL | None:
        """The proxy that the environment has for it. Raises Broken where that is of a kind that is not spoken here."""
        found = self._proxies.get(url.scheme)
        if not found or urllib.request.proxy_bypass(url.host or ""):
            return None
        proxy = URL(found if "//" in found else f"//{found}")
        if proxy.scheme not in {"", "http"} or not proxy.host:
            raise Broken(f"cannot be reached: the environment's {url.scheme.upper()}_PROXY is no http:// address")
        return proxy.with_scheme("http") if not proxy.scheme else proxy


def _origin(url: URL) -> _Origin:
    return url.scheme, url.raw_host or "", url.port or 0


def _proxy_authorization(proxy: URL) -> list[tuple[str, str]]:
    if proxy.user is None:
        return []
    secret = base64.b64encode(f"{proxy.user}:{proxy.password or ''}".encode()).decode()
    return [("Proxy-Authorization", f"Basic {secret}")]


def _refused(e: OSError) -> Broken:
    """What went wrong below HTTP."""
    if isinstance(e, ssl.SSLError):
        reason = getattr(e, "verify_message", "") or e.reason or "TLS"
        return Broken(f"has a TLS certificate or handshake that was refused ({reason})")
    # Not its strerror: asyncio puts the address there.
    return Broken(f"cannot be reached ({os.strerror(e.errno) if e.errno else 'no connection'})", unreachable=True)
