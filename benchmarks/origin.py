"""The hub asked by a plain client, here and only here: what its answers cost anyone, to hold Manta's figures against. Used by `ttfb`."""

from __future__ import annotations

import hashlib
import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from manta.errors import Unavailable

TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Fetch:
    """A resolve and one ranged request, each on a connection of its own, as a client pays that comes for one file."""

    resolve_s: float
    range_s: float
    digest: str
    """sha256 of the bytes that came."""

    @property
    def seconds(self) -> float:
        return self.resolve_s + self.range_s


def file_url(endpoint: str, repo: str, path: str) -> str:
    return f"{endpoint}/{repo}/resolve/main/{quote(path)}"


def fetch(url: str, offset: int, length: int) -> Fetch:
    """`length` bytes from `offset` of the file at `url`. Raises Unavailable where the hub answers anything but a redirect and a 206."""
    began = time.monotonic()
    signed = signed_url(url)
    located = time.monotonic()
    with _answer(signed, {"Range": f"bytes={offset}-{offset + length - 1}"}) as answer:
        data = answer.read()
        if answer.status != 206 or len(data) != length:
            raise Unavailable(f"{url} answered {answer.status} with {len(data)} bytes where {length} were asked for")
    ended = time.monotonic()
    return Fetch(located - began, ended - located, hashlib.sha256(data).hexdigest())


def signed_url(url: str) -> str:
    """Where the bytes of the file at `url` are. Raises Unavailable where the hub answers anything but a redirect."""
    with _answer(url, {}) as resolved:
        location = resolved.getheader("Location")
        if resolved.status not in {302, 307} or not location:
            raise Unavailable(f"{url} answered {resolved.status} and no redirect")
    return urljoin(url, location)


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts._replace(scheme="", netloc="").geturl(), headers=headers)
        yield connection.getresponse()
    finally:
        connection.close()
