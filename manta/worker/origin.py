"""The origin over HTTP, as a worker sees it: where a file's bytes are, and ranges of them into the cache file. Here and only here.

asyncio. Nothing from here goes to a log: answers name the host and what happened, never a signed URL or a token.
"""

from __future__ import annotations

import asyncio
import http
import re
import time
from collections.abc import Callable, Mapping

from yarl import URL

from manta.hub.quota import asked_wait_s
from manta.wire.messages import Fetch, Fetched, Locate, Located, Reason
from manta.worker.client import Client
from manta.worker.connection import Broken, Head
from manta.worker.failure import OrderFailed
from manta.worker.intake import Intake
from manta.worker.sink import ChunkSink

CONNECT_SECONDS_MAX = 10.0
REDIRECTS_MAX = 5
"""The Hub uses one (resolve-cache) or two (a renamed repo before it); more is a loop."""

THROTTLED_SECONDS = 10.0
"""The wait after a 429 that names none: thirty requests per window of the Hub's quota."""

RETRY_AFTER_SECONDS_MAX = 600.0
"""The Hub's quota window is 5 minutes; what asks for more than twice that is not believed."""

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


def _refusal(host: str | None, head: Head) -> OrderFailed:
    """What a status that is not a success means. The words are the standard's: a server's own could say anything."""
    status = head.status
    phrase = http.HTTPStatus(status).phrase if status in _STATUSES else ""
    wait = retry_after_s(head.headers, time.time())
    if wait is None:
        wait = THROTTLED_SECONDS if status == 429 else 0.0
    return OrderFailed(_REASONS.get(status, "unavailable"), f"{host} answered {status} {phrase}".rstrip(), status, wait)


def _redirect(head: Head, url: URL) -> URL | None:
    """Where the answer to a request for `url` sends us, if it does. Raises OrderFailed where that is no address to ask over HTTP."""
    onward = head.headers.get("location")
    if head.status not in {301, 302, 303, 307, 308} or not onward:
        return None
    try:
        there = url.join(URL(onward, encoded=True)).with_fragment(None)
    except ValueError:
        there = URL()
    if there.scheme not in {"http", "https"} or not there.host:
        raise OrderFailed("unavailable", f"{url.host} redirects to what is no address of a web server")
    return there


class OriginClient:
    """Carries out orders, any number at once. Must be made inside the loop that uses it."""

    def __init__(self) -> None:
        self._intakes: dict[int, Intake] = {}  # by order: what is under way
        self._client = Client()

    def close(self) -> None:
        self._client.close()

    async def locate(self, order: Locate) -> Located:
        """Raises OrderFailed when the origin cannot be asked in time; any status it answers is an answer."""
        url = URL(order.url, encoded=True)
        try:
            async with asyncio.timeout(order.deadline_s):
                for _hop in range(REDIRECTS_MAX):
                    async with self._client.exchange(
                        "HEAD", url, order.headers, connect_s=CONNECT_SECONDS_MAX, silence_s=order.deadline_s
                    ) as (_, head):
                        kept = {name: value for name, value in head.headers.items() if name in _HEADERS_KEPT}
                    there = _redirect(head, url)
                    if there is not None and _same_origin(url, there):
                        url = there
                        continue
                    if there is not None:
                        kept["location"] = str(there)
                    return Located(order.order, head.status, str(url), kept)
        except TimeoutError as e:
            what = f"{url.host} did not answer within {order.deadline_s:.0f} s"
            raise OrderFailed("unavailable", what, unreachable=True) from e
        except Broken as e:
            raise OrderFailed("unavailable", f"{url.host} {e.what}", unreachable=e.unreachable) from e
        raise OrderFailed("unavailable", f"{url.host} redirects in a loop")

    async def fetch(self, order: Fetch, fd: int, progress: Callable[[int, int], None]) -> Fetched:
        """Raises OrderFailed; what has been written and told by `progress` stays."""
        began = time.monotonic()
        sink = ChunkSink(fd, order.start, order.end, progress, watched=order.watched)
        intake = Intake(sink)
        ticker = asyncio.create_task(intake.keep_moving())
        self._intakes[order.order] = intake
        url = URL(order.url, encoded=True)
        try:
            for start, end in order.extents:
                sink.begin(start)
                await self._fetch_extent(order, url, start, end, sink, intake)
            digest = sink.finish() if order.last else b""
        except TimeoutError as e:
            raise OrderFailed("unavailable", f"{url.host} sent nothing for {order.stall_s:g} s") from e
        except Broken as e:
            raise OrderFailed("unavailable", f"{url.host} {e.what}", unreachable=e.unreachable) from e
        finally:
            ticker.cancel()
            del self._intakes[order.order]
            sink.tell()
        first = sink.first_written if sink.first_written is not None else began
        return Fetched(order.order, digest, time.monotonic() - began, first - began)

    def watch(self, order: int) -> None:
        """A reader waits for the bytes of `order`; nothing where it has ended."""
        if (intake := self._intakes.get(order)) is not None:
            intake.watch()

    async def _fetch_extent(
        self, order: Fetch, url: URL, start: int, end: int, sink: ChunkSink, intake: Intake
    ) -> None:
        headers = dict(order.headers) | {"Range": f"bytes={start}-{end - 1}"}
        # Until the first byte the daemon hears nothing of this order. All redirects together have one deadline, so that a slow
        # origin ends here and the worker is not taken for stuck.
        async with asyncio.timeout(CONNECT_SECONDS_MAX + order.stall_s) as until_answered:
            for _hop in range(REDIRECTS_MAX):
                async with self._client.exchange(
                    "GET", url, headers, connect_s=CONNECT_SECONDS_MAX, silence_s=order.stall_s
                ) as (connection, head):
                    there = _redirect(head, url)
                    if there is None:
                        upto = _check(url.host, head, start, end, order.blob_size)
                        until_answered.reschedule(None)
                        with intake.of(connection, upto):
                            more = await connection.receive(head, intake.take, upto - start, order.stall_s)
                        if more and head.status == 206:
                            raise OrderFailed("corrupt", f"{url.host} sent more bytes than asked for")
                        if sink.at != end:
                            raise OrderFailed(
                                "unavailable",
                                f"{url.host} ended the body after {sink.at - start} of {end - start} bytes",
                            )
                        return
                headers = _onward(headers, url, there)
                url = there
        raise OrderFailed("unavailable", f"{url.host} redirects in a loop")


def _check(host: str | None, head: Head, start: int, end: int, blob_size: int) -> int:
    """That the answer is the asked bytes of the right file, as far as its head can tell. Returns up to where they go."""
    if head.headers.get("content-encoding", "identity") != "identity":
        raise OrderFailed("unavailable", f"{host} sent a compressed body to a request for plain bytes")
    if head.status == 206:
        found = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
        if found is None:
            raise OrderFailed("unavailable", f"{host} answered 206 without a Content-Range")
        if found[3] not in {"*", str(blob_size)}:
            raise OrderFailed("corrupt", f"{host} has {found[3]} bytes in this file, the hub says {blob_size}")
        upto = int(found[2]) + 1
        if int(found[1]) != start or not start < upto <= end:
            raise OrderFailed("corrupt", f"{host} answered bytes {found[1]}-{found[2]} to {start}-{end - 1}")
        if head.length not in {None, upto - start}:
            # Before a reader is served a byte of a body that is known to be another.
            raise OrderFailed("corrupt", f"{host} sent {head.length} bytes as bytes {found[1]}-{found[2]}")
        return upto
    if head.status == 200:
        if start != 0:
            raise OrderFailed("unavailable", f"{host} ignores Range: it sent the file from its first byte")
        if head.length is not None and head.length != blob_size:
            raise OrderFailed("unavailable", f"{host} sent {head.length} bytes for a file of {blob_size}")
        if head.length is None and head.headers.get("content-type", "").startswith("text/html"):
            raise OrderFailed("unavailable", f"{host} sent a web page instead of the file")
        return end
    raise _refusal(host, head)
