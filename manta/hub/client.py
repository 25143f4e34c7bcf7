"""The HTTP client that huggingface_hub is given, here and only here: deadlines, retries, bounds, and where a token may go.

huggingface_hub keeps one synchronous client per process. By default it waits without end, its tree listing sleeps up to 300 s on a 429 in
the calling thread, follows a page link to any host with the token, and tells a missing repo from a bad token only for https URLs. So
`Client` does all of that itself, within the bounds of the `Exchange` its thread is in: the library never sees an error status nor a
connection error, only `Refused` and `Broken`, which it lets pass.

Importing this module imports the HTTP library. Used by `manta.hub.huggingface` only, in its threads.
"""

from __future__ import annotations

import importlib
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin, urlsplit

from huggingface_hub import errors, get_session, set_client_factory

from manta.errors import Invalid
from manta.hub import quota
from manta.hub.origin import origin_of
from manta.hub.refusal import TRANSIENT_STATUSES

if TYPE_CHECKING:
    import httpx2 as httpx
else:
    # huggingface_hub moved from httpx to httpx2 between 1.0 and 2.4, and both may be installed: take the one its own errors come from.
    _base = next(c for c in errors.HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    httpx = importlib.import_module(_base.__module__.partition(".")[0])

RETRY_WAITS_S = (0.2, 0.6, 1.8)
"""Pauses before the second and later attempts, each times 0.5 to 1.5 at random so that nodes that start together spread out.

A balancer that sheds load or a hub that restarts answers within a second or two; someone who waits for a mount learns after about 3 s that
nothing listens there.
"""

CONNECT_S_MAX = 8.0
"""A lost SYN is sent again after 1, 3 and 7 s; after that another attempt is as good. Leaves room for two within the default deadline."""

BODY_BYTES_MAX = 64 * 1024 * 1024
"""Bound on one answer. A page of 1000 tree entries is about 0.4 MB, the description of a repo with 100,000 files about 6 MB."""

REFUSAL_BYTES_MAX = 64 * 1024
"""How much of a refusal's body is read, in search of the hub's own words."""

Kind = Literal[
    "name",
    "unconnected",
    "refused",
    "tls",
    "timeout",
    "proxy",
    "connection",
    "protocol",
    "redirect",
    "size",
    "abandoned",
]


_PASSING: frozenset[Kind] = frozenset({"name", "unconnected", "refused", "timeout", "connection", "protocol"})
"""What may be over at the next attempt."""


class Refused(Exception):
    """The hub answered with an HTTP status of 400 or more."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.headers = headers
        self.body = body


class Broken(Exception):
    """No usable answer came. `detail` is a word for a person: never a URL's query, never a header."""

    def __init__(self, kind: Kind, detail: str = "") -> None:
        super().__init__(f"{kind} {detail}".strip())
        self.kind: Kind = kind
        self.detail = detail


@dataclass(slots=True)
class Exchange:
    """The bounds of what one thread asks of the hub. Only `over` is touched by another thread."""

    endpoint: str
    deadline: float
    """By time.monotonic()."""
    on_headers: Callable[[Mapping[str, str]], None]
    """Called with the headers (names in lower case) of each answer."""
    over: threading.Event = field(default_factory=threading.Event)
    """Set when nobody waits for it any more."""

    def remaining_s(self) -> float:
        """Seconds left. Raises Broken where there are none, or where nobody waits."""
        if self.over.is_set():
            raise Broken("abandoned")
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise Broken("timeout")
        return seconds


_exchange: ContextVar[Exchange | None] = ContextVar("manta_exchange", default=None)
_install_lock = threading.Lock()


@contextmanager
def exchange(bounds: Exchange) -> Iterator[None]:
    """Whatever huggingface_hub sends inside, in this thread, stays within `bounds`. Raises Broken where no client can be had."""
    try:
        with _install_lock:
            # Looked at each time: another library of this process may set its own.
            if not isinstance(get_session(), Client):
                set_client_factory(Client)
                get_session()
    except OSError as error:
        # The certificates that SSL_CERT_FILE or SSL_CERT_DIR name are read here.
        raise Broken("tls", f"its certificates cannot be read: {error.strerror or type(error).__name__}") from error
    token = _exchange.set(bounds)
    try:
        yield
    finally:
        _exchange.reset(token)


class Client(httpx.Client):
    """See the module. Outside of an `exchange` it is a plain client with a timeout, for whatever else of this process asks a hub."""

    def __init__(self) -> None:
        super().__init__(
            # A hub's cookie would travel from one user's answer to the next user's question.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            event_hooks={"request": [_before], "response": [_after]},
            follow_redirects=True,
            timeout=30.0,
        )

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        bounds = _exchange.get()
        if bounds is None:
            return super().send(request, **options)
        failure: Refused | Broken
        for attempt in range(len(RETRY_WAITS_S) + 1):
            try:
                return super().send(request, **options)
            except Refused as error:
                failure, wait = error, _wait_after(error, attempt)
            except httpx.HTTPError as error:
                failure = _broken(error)
                wait = _backoff(attempt) if failure.kind in _PASSING else None
            if wait is None or wait >= bounds.deadline - time.monotonic():
                raise failure
            bounds.over.wait(wait)
        raise AssertionError("the last attempt has no wait")


def _backoff(attempt: int) -> float | None:
    return RETRY_WAITS_S[attempt] * random.uniform(0.5, 1.5) if attempt < len(RETRY_WAITS_S) else None


def _wait_after(refused: Refused, attempt: int) -> float | None:
    """How long until the same request may succeed; None where it will not, or was tried enough."""
    wait = _backoff(attempt)
    if wait is None:
        return None
    if refused.status == 429:
        return quota.wait_s(refused.headers, time.time())
    if refused.status in TRANSIENT_STATUSES:
        return max(wait, quota.retry_after_s(refused.headers, time.time()) or 0.0)
    return None


def _before(request: httpx.Request) -> None:
    """Before each request, redirects and further pages included."""
    bounds = _exchange.get()
    if bounds is None:
        return
    seconds = bounds.remaining_s()
    if origin_of(str(request.url)) != origin_of(bounds.endpoint):
        raise Broken("redirect", origin_of(str(request.url)))
    request.extensions["timeout"] = {
        "connect": min(seconds, CONNECT_S_MAX),
        "read": seconds,
        "write": seconds,
        "pool": seconds,
    }


def _after(response: httpx.Response) -> None:
    """After the headers of each answer, before its body."""
    bounds = _exchange.get()
    if bounds is None:
        return
    headers = dict(response.headers)
    bounds.on_headers(headers)
    if not isinstance(response.stream, httpx.SyncByteStream):
        raise TypeError("a synchronous client got an asynchronous answer")
    response.stream = _BoundedStream(response.stream, bounds)
    if response.status_code >= 400:
        raise Refused(response.status_code, headers, _beginning(response))
    _keep_pages_home(response, bounds.endpoint)


def _beginning(response: httpx.Response) -> bytes:
    body = b""
    try:
        for piece in response.iter_bytes():
            body += piece
            if len(body) >= REFUSAL_BYTES_MAX:
                break
    except (httpx.HTTPError, Broken):
        pass  # The status says it already.
    return body[:REFUSAL_BYTES_MAX]


def _keep_pages_home(response: httpx.Response, endpoint: str) -> None:
    """A mirror may pass on the hub's own absolute link to the next page; that page is asked of the mirror, which has the token."""
    link = response.links.get("next", {}).get("url")
    if link is None:
        return
    absolute = urljoin(str(response.url), link)
    try:
        foreign = origin_of(absolute) != origin_of(endpoint)
    except Invalid:
        raise Broken("protocol", "a malformed link to the next page") from None
    if foreign:
        parts = urlsplit(absolute)
        absolute = f"{endpoint}{parts.path}{'?' if parts.query else ''}{parts.query}"
    response.headers["link"] = f'<{absolute}>; rel="next"'


class _BoundedStream(httpx.SyncByteStream):
    """A body that ends with Broken at the deadline, however slowly it drips, and at BODY_BYTES_MAX, however long it is."""

    def __init__(self, stream: httpx.SyncByteStream, bounds: Exchange) -> None:
        self._stream = stream
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for piece in self._stream:
            size += len(piece)
            if size > BODY_BYTES_MAX:
                raise Broken("size", f"more than {BODY_BYTES_MAX // 2**20} MiB")
            self._bounds.remaining_s()
            yield piece

    def close(self) -> None:
        self._stream.close()


def _broken(error: httpx.HTTPError) -> Broken:
    """What a library's exception is about; its own text is only taken where it can hold no URL."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            # Only some of them have these.
            return Broken("tls", getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or "")
        if isinstance(cause, socket.gaierror):
            return Broken("name")
        if isinstance(cause, ConnectionRefusedError):
            return Broken("refused")
    if isinstance(error, httpx.ConnectTimeout):
        return Broken("unconnected")
    if isinstance(error, httpx.TimeoutException):
        return Broken("timeout")
    if isinstance(error, httpx.ProxyError):
        return Broken("proxy")
    if isinstance(error, httpx.TooManyRedirects):
        return Broken("redirect")
    if isinstance(error, httpx.NetworkError):
        return Broken("connection")
    return Broken("protocol", type(error).__name__)
