"""Faults: how a hub misbehaves on demand. The rules, their actions, and what an action does to a reply. Pure.

A rule says which requests it strikes (origin, method, kind, path, file, repo, range; which of the matching
ones; with what probability) and an action says how. FaultBook holds the rules and is asked once per request;
actions turn a good Reply into a bad one before delivery.py sends it. Sent over the admin API as JSON, tagged
by "fault"; used by server.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from manta.testing.hub.changes import Change
from manta.testing.hub.content import BytesContent, Content, GeneratedContent, JoinedContent
from manta.testing.hub.reply import Pace, Reply, Request, json_reply, parse_range, text_reply
from manta.testing.hub.routes import Kind, Origin, Route

# No fault outlives this many seconds, so that a forgotten one cannot hang a test run.
WAIT_S_MAX = 600

Seconds = Annotated[float, Meta(ge=0, le=WAIT_S_MAX)]
Count = Annotated[int, Meta(ge=0)]
Status = Annotated[int, Meta(ge=200, le=599)]
ErrorBody = Literal["json", "html", "xml", "empty"]

_HTML = "<!DOCTYPE html><html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>\n"


class _Action(msgspec.Struct, forbid_unknown_fields=True, tag_field="fault", frozen=True, kw_only=True):
    pass


class Stall(_Action, tag="stall", frozen=True, kw_only=True):
    """Send `after_bytes` of the body, then nothing for `seconds` (or until the client leaves), then the rest."""

    after_bytes: Count = 0
    seconds: Seconds = 30.0


class Reset(_Action, tag="reset", frozen=True, kw_only=True):
    """Reset the connection (RST) after `after_bytes` of the body, or before any header."""

    after_bytes: Count = 0
    before_headers: bool = False


class Truncate(_Action, tag="truncate", frozen=True, kw_only=True):
    """Announce the whole body, send `after_bytes` of it, close the connection (FIN)."""

    after_bytes: Count = 0


class Drip(_Action, tag="drip", frozen=True, kw_only=True):
    """From `after_bytes` on, send at `bytes_per_second`."""

    bytes_per_second: Annotated[int, Meta(ge=1)]
    after_bytes: Count = 0


class Delay(_Action, tag="delay", frozen=True, kw_only=True):
    """Wait before the headers, beyond the hub's latency."""

    seconds: Seconds


class Refuse(_Action, tag="refuse", frozen=True, kw_only=True):
    """Reset this connection and close the listener, so that new ones are refused for `seconds`."""

    seconds: Seconds = 5.0


class BlackHole(_Action, tag="black-hole", frozen=True, kw_only=True):
    """Reset this connection, and for `seconds` answer no other at the origin: connecting to it hangs."""

    seconds: Seconds = 5.0


class TooMany(_Action, tag="too-many", frozen=True, kw_only=True):
    """429; `form` says which header tells how long to wait (`seconds`)."""

    form: Literal["ratelimit", "retry-after", "http-date", "none"] = "ratelimit"
    seconds: Annotated[int, Meta(ge=0)] = 1


class Fail(_Action, tag="fail", frozen=True, kw_only=True):
    """Answer with `status` and an error page: 408, 500, 403 on a fresh URL, HTML with 200 ..."""

    status: Status = 503
    body: ErrorBody = "json"


class ShortRange(_Action, tag="short-range", frozen=True, kw_only=True):
    """A correct 206 for fewer bytes than were asked: `missing` bytes short, never empty."""

    missing: Annotated[int, Meta(ge=1)] = 1


class IgnoreRange(_Action, tag="ignore-range", frozen=True, kw_only=True):
    """200 with the whole file."""


class WrongRange(_Action, tag="wrong-range", frozen=True, kw_only=True):
    """Move the Content-Range header by `shift` bytes while the body stays; `body` moves the body instead."""

    shift: int = 1
    body: bool = False


class Flip(_Action, tag="flip", frozen=True, kw_only=True):
    """Invert all bits of the byte at `offset` of the file, where a body carries it."""

    offset: Count = 0


class TooLong(_Action, tag="too-long", frozen=True, kw_only=True):
    """`extra` bytes after the true body, counted in Content-Length."""

    extra: Annotated[int, Meta(ge=1, le=1 << 20)] = 1


class Headers(_Action, tag="headers", frozen=True, kw_only=True):
    """Set or remove response headers: a wrong or missing ETag, X-Repo-Commit, X-Linked-Size ..."""

    put: dict[str, str] = {}
    remove: list[str] = []


class ExpiredUrl(_Action, tag="expired-url", frozen=True, kw_only=True):
    """Redirect to a URL that expired `ago_s` seconds ago."""

    ago_s: Count = 60


class RedirectLoop(_Action, tag="redirect-loop", frozen=True, kw_only=True):
    """Redirect to the same URL, for ever."""

    status: Literal[301, 302, 303, 307, 308] = 302


class Redirect(_Action, tag="redirect", frozen=True, kw_only=True):
    """Redirect to the same path and query at another origin, where signed URLs are good too."""

    to: Origin = "other"
    status: Literal[301, 302, 303, 307, 308] = 302


class Mutate(_Action, tag="mutate", frozen=True, kw_only=True):
    """Change the hub's content just before or just after this request is answered."""

    then: Change
    when: Literal["before", "after"] = "after"


Action = (
    Stall
    | Reset
    | Truncate
    | Drip
    | Delay
    | Refuse
    | BlackHole
    | TooMany
    | Fail
    | ShortRange
    | IgnoreRange
    | WrongRange
    | Flip
    | TooLong
    | Headers
    | ExpiredUrl
    | RedirectLoop
    | Redirect
    | Mutate
)


class Rule(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Which requests a fault strikes. Conditions left out match everything; the admin API is never struck.

    kind: the endpoint (see routes.Kind). path: glob on the unquoted URL path. path_regex: searched in it.
    repo, file: globs on the repo id and on the path in the repo, for CDN requests too. range: "any" Range
    header, "none", or [start, stop): a request for any byte of it (bytes=-N never counts). authorized: with or without Authorization.
    skip: leave the first matching requests alone. times: strike that many, then never again (null: all).
    probability: of striking a matching request, drawn from `seed`.
    """

    action: Action
    origin: Origin | None = None
    method: str | None = None
    kind: Kind | None = None
    path: str | None = None
    path_regex: str | None = None
    repo: str | None = None
    file: str | None = None
    range: Literal["any", "none"] | tuple[int, int] | None = None
    authorized: bool | None = None
    skip: Count = 0
    times: Count | None = None
    probability: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """What rules look at: a request, its route, and what the route means on this hub."""

    request: Request
    route: Route
    path: str  # unquoted
    repo: str
    files: Sequence[str]


def matches(rule: Rule, subject: Subject) -> bool:
    """Whether a rule's conditions hold, its counts and probability aside."""
    request = subject.request
    if rule.origin not in (None, request.origin) or rule.kind not in (None, subject.route.kind):
        return False
    if rule.method is not None and rule.method.upper() != request.method:
        return False
    if rule.path is not None and not fnmatchcase(subject.path, rule.path):
        return False
    if rule.path_regex is not None and re.search(rule.path_regex, subject.path) is None:
        return False
    if rule.repo is not None and not fnmatchcase(subject.repo, rule.repo):
        return False
    if rule.file is not None and not any(fnmatchcase(file, rule.file) for file in subject.files):
        return False
    if rule.authorized is not None and rule.authorized != ("authorization" in request.headers):
        return False
    return _range_matches(rule.range, request.headers.get("range"))


def _range_matches(wanted: Literal["any", "none"] | tuple[int, int] | None, header: str | None) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return (header is not None) == (wanted == "any")
    # Without a size, an open range reaches to the end of the largest file.
    asked = parse_range(header or "", 1 << 62)
    if not isinstance(asked, tuple):
        return True
    return asked[0] < wanted[1] and wanted[0] < asked[1]


class _Armed:
    """A rule and what it has seen."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.seen = 0
        self.struck = 0
        self._random = random.Random(rule.seed)

    def strikes(self, subject: Subject) -> bool:
        rule = self.rule
        if (rule.times is not None and self.struck >= rule.times) or not matches(rule, subject):
            return False
        self.seen += 1
        if self.seen <= rule.skip or self._random.random() >= rule.probability:
            return False
        self.struck += 1
        return True


class RuleState(msgspec.Struct, frozen=True):
    """A rule as the admin API lists it: its id, how many requests matched and how many it struck."""

    id: int
    rule: Rule
    seen: int
    struck: int


class FaultBook:
    """The rules in force."""

    def __init__(self) -> None:
        self._armed: dict[int, _Armed] = {}
        self._last_id = 0

    def add(self, rule: Rule) -> int:
        """Put a rule in force; returns its id. Raises ValueError for a path_regex that does not compile."""
        if rule.path_regex is not None:
            try:
                re.compile(rule.path_regex)
            except re.error as broken:
                raise ValueError(f"path_regex {rule.path_regex!r}: {broken}") from broken
        self._last_id += 1
        self._armed[self._last_id] = _Armed(rule)
        return self._last_id

    def remove(self, id_: int) -> None:
        """Lift one rule; raises LookupError when there is none with that id."""
        if self._armed.pop(id_, None) is None:
            raise LookupError(f"no fault rule {id_}")

    def clear(self) -> None:
        """Lift all rules."""
        self._armed.clear()

    def states(self) -> list[RuleState]:
        """All rules in force, in the order in which they are asked."""
        return [RuleState(id_, armed.rule, armed.seen, armed.struck) for id_, armed in self._armed.items()]

    def strike(self, subject: Subject) -> list[Action]:
        """The actions that befall this request, in the order of their rules; counts it."""
        return [armed.rule.action for armed in self._armed.values() if armed.strikes(subject)]


@dataclass(frozen=True, slots=True)
class Scene:
    """What actions need to know of the hub: the request, how to build URLs, and the time."""

    request: Request
    base_url: Callable[[Request, Origin], str]
    expired_url: Callable[[int], str | None]  # seconds ago -> URL; None where nothing is signed
    now: float


def spoil(reply: Reply, action: Action, scene: Scene) -> Reply:
    """The reply that `action` makes of a reply. Actions that do not touch replies leave it alone."""
    pace = reply.pace
    match action:
        case Stall():
            return replace(
                reply, pace=replace(pace, stall_at=min(action.after_bytes, reply.length), stall_s=action.seconds)
            )
        case Reset():
            at = min(action.after_bytes, reply.length)
            return replace(reply, pace=replace(pace, reset_at=at, reset_before_headers=action.before_headers))
        case Refuse() | BlackHole():
            return replace(reply, pace=replace(pace, reset_at=0, reset_before_headers=True))
        case Truncate():
            return replace(reply, pace=replace(pace, cut_at=min(action.after_bytes, reply.length)))
        case Drip():
            return replace(reply, pace=replace(pace, drip_at=action.after_bytes, drip_rate=action.bytes_per_second))
        case Delay():
            return replace(reply, pace=replace(pace, delay_s=pace.delay_s + action.seconds))
        case TooMany():
            return _too_many(action, scene.now, pace)
        case Fail():
            return replace(_error_page(action.status, action.body), pace=pace)
        case Headers():
            gone = {name.lower() for name in (*action.remove, *action.put)}
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in gone}
            return replace(reply, headers={**kept, **action.put})
        case ExpiredUrl():
            url = scene.expired_url(action.ago_s)
            return reply if url is None else replace(reply, headers={**reply.headers, "Location": url})
        case RedirectLoop():
            return _redirected(reply, action.status, _here(scene.request))
        case Redirect():
            url = scene.base_url(scene.request, action.to) + _here(scene.request)
            return _redirected(reply, action.status, url)
        case Mutate():
            return reply
        case _:
            return _spoil_body(reply, action)


def _spoil_body(reply: Reply, action: ShortRange | IgnoreRange | WrongRange | Flip | TooLong) -> Reply:
    """Faults of the body's bytes; replies without a blob in them (errors, redirects) are left alone."""
    if not reply.blob:
        return reply
    match action:
        case ShortRange():
            stop = max(reply.start + 1, reply.stop - action.missing)
            if reply.status != 206 or stop >= reply.stop:
                return reply
            return _with_range(replace(reply, stop=stop), reply.start, stop)
        case IgnoreRange():
            headers = {name: value for name, value in reply.headers.items() if name != "Content-Range"}
            return replace(reply, status=200, headers=headers, start=0, stop=reply.content.size)
        case WrongRange():
            if reply.status != 206:
                return reply
            if not action.body:
                return _with_range(reply, reply.start + action.shift, reply.stop + action.shift)
            start = max(0, min(reply.start + action.shift, reply.content.size - reply.length))
            return replace(reply, start=start, stop=start + reply.length)
        case Flip():
            if not reply.start <= action.offset < reply.stop:
                return reply
            return replace(reply, content=_flipped(reply.content, action.offset))
        case TooLong():
            content, size = reply.content, reply.content.size
            extra = GeneratedContent("too long", action.extra)
            parts = [(content, 0, reply.stop), (extra, 0, extra.size), (content, reply.stop, size)]
            return replace(reply, content=JoinedContent(parts), stop=reply.stop + action.extra)


def _flipped(content: Content, offset: int) -> Content:
    flipped = BytesContent(bytes(byte ^ 0xFF for byte in content.read(offset, offset + 1)))
    return JoinedContent([(content, 0, offset), (flipped, 0, 1), (content, offset + 1, content.size)])


def _with_range(reply: Reply, start: int, stop: int) -> Reply:
    header = f"bytes {start}-{stop - 1}/{reply.content.size}"
    return replace(reply, headers={**reply.headers, "Content-Range": header})


def _too_many(action: TooMany, now: float, pace: Pace) -> Reply:
    headers: dict[str, str] = {}
    match action.form:
        case "ratelimit":
            headers["RateLimit"] = f'"resolvers";r=0;t={action.seconds}'
            headers["RateLimit-Policy"] = '"fixed window";"resolvers";q=3000;w=300'
        case "retry-after":
            headers["Retry-After"] = str(action.seconds)
        case "http-date":
            headers["Retry-After"] = formatdate(now + action.seconds, usegmt=True)
        case "none":
            pass
    return replace(json_reply({"error": "You have reached your rate limit."}, 429, headers), pace=pace)


def _error_page(status: int, body: ErrorBody) -> Reply:
    match body:
        case "json":
            return json_reply({"error": f"Injected fault {status}"}, status)
        case "html":
            return text_reply(status, _HTML.format(f"Injected fault {status}"), "text/html; charset=utf-8")
        case "xml":
            text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>InjectedFault{status}</Code></Error>'
            return text_reply(status, text, "application/xml")
        case "empty":
            return Reply(status)


def _here(request: Request) -> str:
    return request.raw_path + (f"?{request.raw_query}" if request.raw_query else "")


def _redirected(reply: Reply, status: int, location: str) -> Reply:
    text = text_reply(status, f"Redirecting to {location}", "text/plain", {"Location": location})
    return replace(text, pace=reply.pace)
