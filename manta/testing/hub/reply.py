"""Request and Reply: HTTP as the hub's rules see it, without a server. Defined here and only here.

answers.py turns a Request into a Reply, faults.py turns a Reply into a worse one, delivery.py sends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from manta.testing.hub.content import BytesContent, Content
from manta.testing.hub.routes import Origin

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
EMPTY = BytesContent(b"")


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `raw_path` and `raw_query` are still quoted; header names are lower case; `query` holds every value."""

    origin: Origin
    method: str
    raw_path: str
    raw_query: str = ""
    query: Mapping[str, list[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    scheme: str = "http"
    host: str = "127.0.0.1"  # name or address the client used, with its port where it sent one
    client: str = ""  # the client's address
    body: bytes = b""

    def first(self, name: str, default: str = "") -> str:
        """The first value of a query parameter."""
        return self.query.get(name, [default])[0]


@dataclass(frozen=True, slots=True)
class Pace:
    """How the body leaves; offsets and counts are in bytes of this body, -1 means never.

    reset_at: reset the connection there, before
    any header when `reset_before_headers`. cut_at: close it there. stall_at: wait `stall_s` there.
    drip_at: from there on send at `drip_rate` bytes per second. delay_s: wait before the headers.
    """

    delay_s: float = 0.0
    reset_before_headers: bool = False
    reset_at: int = -1
    cut_at: int = -1
    stall_at: int = -1
    stall_s: float = 0.0
    drip_at: int = -1
    drip_rate: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A status, headers and the range [start, stop) of a content.

    `blob` is the id under which body bytes are counted, empty for API answers and error pages; `size` is
    that blob's true size, whatever a fault made of the content.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Content = EMPTY
    start: int = 0
    stop: int = 0
    blob: str = ""
    size: int = 0
    pace: Pace = Pace()

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.stop - self.start


def text_reply(status: int, text: str, content_type: str, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply whose body is a short text."""
    content = BytesContent(text.encode())
    return Reply(status, {"Content-Type": content_type, **(headers or {})}, content, 0, content.size)


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A reply whose body is `value` as JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text_reply(status, text, "application/json; charset=utf-8", headers)


def xml_error(status: int, code: str, message: str) -> Reply:
    """An error as the CDN's storage words it."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return text_reply(status, text, "application/xml")


@dataclass(frozen=True, slots=True)
class Unsatisfiable:
    """A Range header that names no byte of the content."""


def parse_range(header: str, size: int) -> tuple[int, int] | Unsatisfiable | None:
    """The range [start, stop) a Range header asks of `size` bytes; None to send everything.

    Several ranges at once, other units and malformed headers are ignored, as the CDN ignores them.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        wanted = min(int(last), size)
        return (size - wanted, size) if wanted else Unsatisfiable()
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return Unsatisfiable()
    return (int(first), min(int(last) + 1, size) if last else size)


def content_reply(request: Request, content: Content, headers: Mapping[str, str], *, blob: str) -> Reply:
    """Serve a content: 200, 206 for a range, or 416; honours If-Range against the given ETag."""
    wanted = parse_range(request.headers.get("range", ""), content.size)
    if_range = request.headers.get("if-range")
    if if_range is not None and if_range != headers.get("ETag"):
        wanted = None
    headers = {"Accept-Ranges": "bytes", **headers}
    match wanted:
        case None:
            return Reply(200, headers, content, 0, content.size, blob, content.size)
        case Unsatisfiable():
            return Reply(416, {**headers, "Content-Range": f"bytes */{content.size}"})
        case (start, stop):
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
            return Reply(206, headers, content, start, stop, blob, content.size)
