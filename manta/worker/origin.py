"""The origin over HTTP, as a worker sees it: where a file's bytes are, and ranges of them into the cache file. Here and only here.

aiohttp on asyncio. Nothing from here goes to a log: answers name the host and what happened, never a signed URL or a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import itertools
import os
import re
import socket
import ssl
import time
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from manta import __version__
from manta.hub.quota import asked_wait_s
from manta.wire.messages import Fetch, Fetched, Locate, Located, Reason
from manta.worker.failure import OrderFailed
from manta.worker.sink import ChunkSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CONNECT_SECONDS_MAX = 10.0
REDIRECTS_MAX = 5
"""The Hub uses one (resolve-cache) or two (a renamed repo before it); more is a loop."""

THROTTLED_SECONDS = 10.0
"""The wait after a 429 that names none: thirty requests per window of the Hub's quota."""

RETRY_AFTER_SECONDS_MAX = 600.0
"""The Hub's quota window is 5 minutes; what asks for more than twice that is not believed."""

TELL_SECONDS = 0.1
"""Bytes in the file are told of after this long however few they are: unseen by a person, and ten wake-ups a second per order."""

UNWATCHED_TICKS = 5
"""Where no reader waits they are told of every half second, for the rates that people see."""

GATHER_BYTES = 256 * 1024
"""Bytes per wake-up of a fast transfer that nobody waits for: a quarter of the wake-ups that the kernel would make, see `_Intake`."""

GATHER_SECONDS_MAX = 0.05
"""Bytes are gathered only where GATHER_BYTES come within this: 5 MB/s."""

_HEADERS_KEPT = frozenset(
    {
        "content-encoding",
        "content-length",
        "content-range",
        "content-type",
        "date",
        "etag",
        "location",
        "ratelimit",
        "ratelimit-policy",
        "retry-after",
        "x-error-code",
        "x-error-message",
        "x-linked-etag",
        "x-linked-size",
        "x-repo-commit",
        "x-xet-hash",
    }
)
_READ_BYTES = 1024 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)


def _same_origin(a: URL, b: URL) -> bool:
    return (a.scheme, a.host, a.port) == (b.scheme, b.host, b.port)


def _onward(headers: Mapping[str, str], here: URL, there: URL) -> dict[str, str]:
    """The headers for the next hop: Authorization never leaves the origin it was meant for."""
    if here.scheme == "https" and there.scheme != "https":
        raise OrderFailed("unavailable", f"{here.host} redirects to an address that is not encrypted")
    if _same_origin(here, there):
        return dict(headers)
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """How long a 429 or 503 asks us to wait (`now` is in seconds since the epoch); None where it does not say.

    The Hub's `RateLimit: "resolvers";r=0;t=N` comes first: its window is over after N seconds. Then Retry-After in both its forms.
    """
    asked = asked_wait_s({name.lower(): value for name, value in headers.items()}, now)
    return None if asked is None else min(asked, RETRY_AFTER_SECONDS_MAX)


_STATUSES = frozenset(http.HTTPStatus)
_REASONS: dict[int, Reason] = {
    401: "denied",
    403: "denied",
    404: "absent",
    410: "absent",
    416: "corrupt",
    429: "throttled",
}


def _refusal(response: aiohttp.ClientResponse) -> OrderFailed:
    """What a status that is not a success means. The words are the standard's: a server's own could say anything."""
    status = response.status
    phrase = http.HTTPStatus(status).phrase if status in _STATUSES else ""
    wait = retry_after_s(response.headers, time.time())
    if wait is None:
        wait = THROTTLED_SECONDS if status == 429 else 0.0
    return OrderFailed(
        _REASONS.get(status, "unavailable"), f"{response.url.host} answered {status} {phrase}".rstrip(), status, wait
    )


class OriginClient:
    """One HTTP session with its connection pool. Must be made inside the loop that uses it."""

    def __init__(self) -> None:
        self._sinks: dict[int, ChunkSink] = {}  # by order: what is under way
        self._session = aiohttp.ClientSession(
            # The daemon bounds the requests in flight. Idle connections are kept for the next chunk of a file.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, ttl_dns_cache=60),
            # `connect` bounds the name lookup and TLS too.
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS_MAX),
            # One session serves orders with different tokens: what a server wants remembered of one must not go with another.
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": f"manta/{__version__}", "Accept-Encoding": "identity"},
            auto_decompress=False,
            read_bufsize=_READ_BYTES,
            trust_env=True,  # HTTPS_PROXY and its kin, as every other client of the Hub; netrc is off in `service`
        )

    async def close(self) -> None:
        await self._session.close()

    async def locate(self, order: Locate) -> Located:
        """Raises OrderFailed when the origin cannot be asked in time; any status it answers is an answer."""
        url, headers = URL(order.url, encoded=True), order.headers
        try:
            async with asyncio.timeout(order.deadline_s):
                for _hop in range(REDIRECTS_MAX):
                    async with self._session.head(url, headers=headers, allow_redirects=False) as response:
                        kept = {k.lower(): v for k, v in response.headers.items() if k.lower() in _HEADERS_KEPT}
                        onward = response.headers.get("Location")
                        if response.status in {301, 302, 303, 307, 308} and onward:
                            there = url.join(URL(onward, encoded=True))
                            if _same_origin(url, there):
                                url = there
                                continue
                            kept["location"] = str(there)
                        return Located(order.order, response.status, str(url), kept)
        except TimeoutError as e:
            what = f"{url.host} did not answer within {order.deadline_s:.0f} s"
            raise OrderFailed("unavailable", what, unreachable=True) from e
        except aiohttp.ClientError as e:
            raise _connection_failure(url, e) from e
        raise OrderFailed("unavailable", f"{url.host} redirects in a loop")

    async def fetch(self, order: Fetch, fd: int, progress: Callable[[int, int], None]) -> Fetched:
        """Raises OrderFailed; what has been written and told by `progress` stays."""
        began = time.monotonic()
        sink = ChunkSink(fd, order.start, order.end, progress, watched=order.watched)
        intake = _Intake()
        ticker = asyncio.create_task(_keep_moving(sink, intake))
        self._sinks[order.order] = sink
        url = URL(order.url, encoded=True)
        try:
            for start, end in order.extents:
                sink.begin(start)
                await self._fetch_extent(order, url, start, end, sink, intake)
            digest = sink.finish() if order.last else b""
        except aiohttp.ConnectionTimeoutError as e:
            what = f"{url.host} took no connection for {CONNECT_SECONDS_MAX:g} s"
            raise OrderFailed("unavailable", what, unreachable=True) from e
        except TimeoutError as e:
            raise OrderFailed("unavailable", f"{url.host} sent nothing for {order.stall_s:g} s") from e
        except aiohttp.ClientError as e:
            raise _connection_failure(url, e) from e
        finally:
            ticker.cancel()
            del self._sinks[order.order]
            sink.tell()
        first = sink.first_written if sink.first_written is not None else began
        return Fetched(order.order, digest, time.monotonic() - began, first - began)

    def watch(self, order: int) -> None:
        """A reader waits for the bytes of `order`; nothing where it has ended."""
        if (sink := self._sinks.get(order)) is not None:
            sink.watched = True
            sink.tell()

    async def _fetch_extent(
        self, order: Fetch, url: URL, start: int, end: int, sink: ChunkSink, intake: _Intake
    ) -> None:
        headers = dict(order.headers) | {"Range": f"bytes={start}-{end - 1}"}
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS_MAX, sock_read=order.stall_s)
        # Until the first byte the daemon hears nothing of this order. All redirects together have one deadline, so that a slow
        # origin ends here and the worker is not taken for stuck.
        async with asyncio.timeout(CONNECT_SECONDS_MAX + order.stall_s) as until_answered:
            for _hop in range(REDIRECTS_MAX):
                async with self._session.get(url, headers=headers, allow_redirects=False, timeout=timeout) as response:
                    onward = response.headers.get("Location")
                    if response.status in {301, 302, 303, 307, 308} and onward:
                        there = url.join(URL(onward, encoded=True))
                        headers = _onward(headers, url, there)
                        url = there
                        continue
                    upto = self._check(response, start, end, order.blob_size)
                    until_answered.reschedule(None)
                    with intake.of(response):
                        await self._drain(response, start, upto, end, sink, intake)
                    return
        raise OrderFailed("unavailable", f"{url.host} redirects in a loop")

    @staticmethod
    def _check(response: aiohttp.ClientResponse, start: int, end: int, blob_size: int) -> int:
        """That the answer is the asked bytes of the right file, as far as its head can tell. Returns how far it says it goes."""
        host = response.url.host
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise OrderFailed("unavailable", f"{host} sent a compressed body to a request for plain bytes")
        if response.status == 206:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None:
                raise OrderFailed("unavailable", f"{host} answered 206 without a Content-Range")
            if found[3] not in {"*", str(blob_size)}:
                raise OrderFailed("corrupt", f"{host} has {found[3]} bytes in this file, the hub says {blob_size}")
            upto = int(found[2]) + 1
            if int(found[1]) != start or not start < upto <= end:
                raise OrderFailed("corrupt", f"{host} answered bytes {found[1]}-{found[2]} to {start}-{end - 1}")
            if response.content_length not in {None, upto - start}:
                # Before a reader is served a byte of a body that is known to be another.
                raise OrderFailed(
                    "corrupt", f"{host} sent {response.content_length} bytes as bytes {found[1]}-{found[2]}"
                )
            return upto
        if response.status == 200:
            if start != 0:
                raise OrderFailed("unavailable", f"{host} ignores Range: it sent the file from its first byte")
            length = response.headers.get("Content-Length")
            if length is not None and length != str(blob_size):
                raise OrderFailed("unavailable", f"{host} sent {length[:20]} bytes for a file of {blob_size}")
            if length is None and response.content_type == "text/html":
                raise OrderFailed("unavailable", f"{host} sent a web page instead of the file")
            return end
        raise _refusal(response)

    @staticmethod
    async def _drain(
        response: aiohttp.ClientResponse, start: int, upto: int, end: int, sink: ChunkSink, intake: _Intake
    ) -> None:
        """Takes the body, which goes up to `upto` by its own word; `end` is what was asked for."""
        at = start
        while data := await response.content.readany():
            if at + len(data) > upto:
                if response.status == 206:
                    raise OrderFailed("corrupt", f"{response.url.host} sent more bytes than asked for")
                data = data[: end - at]  # a 200: the whole file, of which this chunk is the beginning
            sink.write(data)
            at += len(data)
            intake.expect(end - at, gather=not sink.watched)
            if at == end and response.status == 200:
                response.close()  # the rest of the file is not wanted
                return
        if at != end:
            raise OrderFailed(
                "unavailable", f"{response.url.host} ended the body after {at - start} of {end - start} bytes"
            )


class _Intake:
    """How many bytes the kernel gathers before it wakes the worker.

    A transfer behind a link shared by eight gets 15 MB/s and a wake-up for each 64 KB of it: 1.7 CPU-s/GB in a worker, most of it the event
    loop's. SO_RCVLOWAT has the kernel gather GATHER_BYTES first. Only over plain TCP (TLS and its buffers come between otherwise), only
    while bytes come fast, and never more than what is surely still to come: a connection that waits for more than that would wait for ever.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._gathering = False
        self._fast = False

    @contextlib.contextmanager
    def of(self, response: aiohttp.ClientResponse) -> Iterator[None]:
        """For the body of `response`. Afterwards its connection is as it was: it may serve other orders."""
        connection = response.connection
        transport = connection.transport if connection is not None else None
        if transport is not None and transport.get_extra_info("ssl_object") is None:
            self._socket = transport.get_extra_info("socket")
        try:
            yield
        finally:
            self._gather(yes=False)
            self._socket = None

    def expect(self, remaining: int, *, gather: bool) -> None:
        """`remaining` bytes of the body are still to come; `gather` where nobody waits for each of them."""
        self._gather(yes=gather and self._fast and remaining > 2 * GATHER_BYTES)

    def pace(self, bytes_per_second: float) -> None:
        """How fast bytes came of late. Slow ones are taken one by one, so that none lies unread for long."""
        self._fast = bytes_per_second * GATHER_SECONDS_MAX > GATHER_BYTES
        if not self._fast:
            self._gather(yes=False)

    def _gather(self, *, yes: bool) -> None:
        if yes is not self._gathering and self._socket is not None:
            with contextlib.suppress(OSError):  # closed under us: its reader hears of that by itself
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, GATHER_BYTES if yes else 1)
                self._gathering = yes


async def _keep_moving(sink: ChunkSink, intake: _Intake) -> None:
    """A sender that pauses after a burst must not keep a reader from the bytes that came with it, nor bytes in the socket."""
    at = sink.at
    for tick in itertools.count(1):
        await asyncio.sleep(TELL_SECONDS)
        intake.pace((sink.at - at if sink.at >= at else 0) / TELL_SECONDS)
        at = sink.at
        if sink.watched or tick % UNWATCHED_TICKS == 0:
            sink.tell()


def _connection_failure(url: URL, e: aiohttp.ClientError) -> OrderFailed:
    """A clause for what went wrong below HTTP; never the exception's own text where that could hold the URL."""
    match e:
        case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientConnectorSSLError():
            what = f"has a TLS certificate or handshake that was refused ({_tls_reason(e)})"
        case aiohttp.ClientConnectorDNSError():
            what = "cannot be found (name lookup failed)"
        case aiohttp.ClientConnectorError():
            # Not its strerror: asyncio puts the address there.
            what = f"cannot be reached ({os.strerror(e.os_error.errno) if e.os_error.errno else 'no connection'})"
        case aiohttp.ServerTimeoutError():
            what = "did not answer in time"
        case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
            what = "closed the connection before the body was complete"
        case aiohttp.ClientOSError():
            what = f"broke the connection ({e.strerror or 'reset'})"
        case _:
            what = f"sent what is not HTTP ({type(e).__name__})"
    secured = isinstance(e, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError)
    unreachable = isinstance(e, aiohttp.ClientConnectorError) and not secured
    return OrderFailed("unavailable", f"{url.host} {what}", unreachable=unreachable)


def _tls_reason(e: aiohttp.ClientConnectorError | aiohttp.ClientConnectorCertificateError) -> str:
    cause = e.certificate_error if isinstance(e, aiohttp.ClientConnectorCertificateError) else e.os_error
    return getattr(cause, "verify_message", "") or (cause.reason if isinstance(cause, ssl.SSLError) else "") or "TLS"
