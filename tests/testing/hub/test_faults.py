"""Faults as pure rules: which requests they strike, and what they make of a reply."""

from typing import Any
from urllib.parse import unquote

import msgspec
import pytest

from manta.testing.hub import faults
from manta.testing.hub.content import GeneratedContent
from manta.testing.hub.faults import Action, FaultBook, Rule, Scene, Subject, matches, spoil
from manta.testing.hub.reply import Reply, Request, content_reply, json_reply
from manta.testing.hub.routes import Origin, parse_route

CONTENT = GeneratedContent("x", 100)
STALL = faults.Stall()


def _subject(
    path: str = "/org/name/resolve/main/model.safetensors",
    *,
    origin: Origin = "hub",
    method: str = "GET",
    files: tuple[str, ...] = ("model.safetensors",),
    **headers: str,
) -> Subject:
    request = Request(origin, method, path, headers=headers)
    return Subject(request, parse_route(origin, path), unquote(path), "org/name", files)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, True),
        ({"origin": "hub"}, True),
        ({"origin": "cdn"}, False),
        ({"method": "get"}, True),
        ({"method": "HEAD"}, False),
        ({"kind": "resolve"}, True),
        ({"kind": "tree"}, False),
        ({"path": "/org/*/model.*"}, True),
        ({"path": "/other/*"}, False),
        ({"path_regex": r"resolve/ma.n/"}, True),
        ({"path_regex": r"^resolve"}, False),
        ({"repo": "org/*"}, True),
        ({"repo": "x/*"}, False),
        ({"file": "*.safetensors"}, True),
        ({"file": "*.json"}, False),
        ({"range": "any"}, True),
        ({"range": "none"}, False),
        ({"range": (15, 16)}, True),
        ({"range": (10, 11)}, True),
        ({"range": (20, 30)}, False),
        ({"range": (0, 10)}, False),
        ({"authorized": False}, True),
        ({"authorized": True}, False),
        ({"origin": "hub", "file": "*.json"}, False),
    ],
)
def test_conditions(conditions: dict[str, Any], expected: bool) -> None:
    assert matches(Rule(action=STALL, **conditions), _subject(range="bytes=10-19")) is expected


def test_a_request_without_a_range_overlaps_every_range() -> None:
    assert matches(Rule(action=STALL, range=(5, 6)), _subject())
    assert matches(Rule(action=STALL, range="none"), _subject())


def _strikes(book: FaultBook, count: int) -> list[bool]:
    return [bool(book.strike(_subject())) for _ in range(count)]


def test_skip_and_times_choose_the_nth_request() -> None:
    book = FaultBook()
    id_ = book.add(Rule(action=STALL, skip=2, times=1))
    assert _strikes(book, 5) == [False, False, True, False, False]
    (state,) = book.states()
    assert (state.id, state.seen, state.struck) == (id_, 3, 1)


def test_requests_that_do_not_match_do_not_count() -> None:
    book = FaultBook()
    book.add(Rule(action=STALL, file="*.json", skip=1))
    assert _strikes(book, 3) == [False] * 3
    assert book.states()[0].seen == 0


def test_probability_is_seeded() -> None:
    def run(seed: int) -> list[bool]:
        book = FaultBook()
        book.add(Rule(action=STALL, probability=0.3, seed=seed))
        return _strikes(book, 1000)

    assert run(1) == run(1) != run(2)
    assert 230 < sum(run(1)) < 370


def test_rules_add_up_and_can_be_lifted() -> None:
    book = FaultBook()
    first = book.add(Rule(action=STALL))
    book.add(Rule(action=faults.Reset()))
    assert book.strike(_subject()) == [STALL, faults.Reset()]
    book.remove(first)
    assert book.strike(_subject()) == [faults.Reset()]
    with pytest.raises(LookupError):
        book.remove(first)
    book.clear()
    assert book.strike(_subject()) == []


def test_a_broken_regex_is_refused() -> None:
    with pytest.raises(ValueError, match="path_regex"):
        FaultBook().add(Rule(action=STALL, path_regex="("))


REQUEST = Request("cdn", "GET", "/repos/x", raw_query="Expires=1", headers={"range": "bytes=10-19"}, host="h:1")
SCENE = Scene(REQUEST, lambda _, origin: f"http://{origin}", lambda ago: f"http://cdn/expired/{ago}", now=0.0)
PART = content_reply(REQUEST, CONTENT, {"ETag": '"e"'}, blob="id")
REDIRECT = json_reply({}, 302, {"Location": "http://cdn/fresh"})


def _spoil(action: Action, reply: Reply = PART) -> Reply:
    return spoil(reply, action, SCENE)


def _body(reply: Reply) -> bytes:
    return reply.content.read(reply.start, reply.stop)


def test_short_range() -> None:
    reply = _spoil(faults.ShortRange(missing=3))
    assert reply.headers["Content-Range"] == "bytes 10-16/100"
    assert _body(reply) == CONTENT.read(10, 17)
    assert _spoil(faults.ShortRange(missing=300)).length == 1


def test_ignore_range() -> None:
    reply = _spoil(faults.IgnoreRange())
    assert reply.status == 200
    assert "Content-Range" not in reply.headers
    assert _body(reply) == CONTENT.read()


def test_wrong_range() -> None:
    header = _spoil(faults.WrongRange(shift=5))
    assert header.headers["Content-Range"] == "bytes 15-24/100"
    assert _body(header) == CONTENT.read(10, 20)
    body = _spoil(faults.WrongRange(shift=5, body=True))
    assert body.headers["Content-Range"] == "bytes 10-19/100"
    assert _body(body) == CONTENT.read(15, 25)


def test_flip_changes_one_byte_and_only_where_it_is() -> None:
    flipped = _body(_spoil(faults.Flip(offset=13)))
    good = CONTENT.read(10, 20)
    assert flipped != good
    assert flipped[3] == good[3] ^ 0xFF
    assert flipped[:3] + flipped[4:] == good[:3] + good[4:]
    assert _spoil(faults.Flip(offset=20)) is PART


def test_too_long() -> None:
    reply = _spoil(faults.TooLong(extra=4))
    assert reply.length == 14
    assert reply.size == 100
    assert _body(reply)[:10] == CONTENT.read(10, 20)
    assert reply.headers["Content-Range"] == "bytes 10-19/100"


def test_headers_are_set_and_removed_whatever_their_case() -> None:
    reply = _spoil(faults.Headers(put={"etag": '"wrong"'}, remove=["CONTENT-range"]))
    assert "Content-Range" not in reply.headers
    assert [value for name, value in reply.headers.items() if name.lower() == "etag"] == ['"wrong"']


@pytest.mark.parametrize(
    ("form", "header", "value"),
    [
        ("ratelimit", "RateLimit", '"resolvers";r=0;t=7'),
        ("retry-after", "Retry-After", "7"),
        ("http-date", "Retry-After", "Thu, 01 Jan 1970 00:00:07 GMT"),
    ],
)
def test_too_many(form: Any, header: str, value: str) -> None:
    reply = _spoil(faults.TooMany(form=form, seconds=7))
    assert reply.status == 429
    assert reply.headers[header] == value


def test_too_many_without_advice() -> None:
    assert set(_spoil(faults.TooMany(form="none")).headers) == {"Content-Type"}


@pytest.mark.parametrize(("body", "start"), [("json", b"{"), ("html", b"<!DOCTYPE"), ("xml", b"<?xml"), ("empty", b"")])
def test_error_pages(body: Any, start: bytes) -> None:
    reply = _spoil(faults.Fail(status=200, body=body))
    assert reply.status == 200
    assert _body(reply).startswith(start)
    assert reply.blob == ""


def test_redirects() -> None:
    loop = _spoil(faults.RedirectLoop())
    assert (loop.status, loop.headers["Location"]) == (302, "/repos/x?Expires=1")
    away = _spoil(faults.Redirect(to="other", status=307))
    assert (away.status, away.headers["Location"]) == (307, "http://other/repos/x?Expires=1")
    assert _spoil(faults.ExpiredUrl(ago_s=9), REDIRECT).headers["Location"] == "http://cdn/expired/9"


def test_faults_of_the_pace() -> None:
    reply = PART
    for action in (faults.Stall(after_bytes=3, seconds=1), faults.Reset(after_bytes=500), faults.Delay(seconds=2)):
        reply = _spoil(action, reply)
    assert (reply.pace.stall_at, reply.pace.reset_at, reply.pace.delay_s) == (3, 10, 2)
    assert _spoil(faults.Truncate(after_bytes=1)).pace.cut_at == 1
    assert _spoil(faults.Drip(bytes_per_second=5)).pace.drip_rate == 5
    assert _spoil(faults.Refuse()).pace.reset_before_headers
    assert _spoil(faults.BlackHole()).pace.reset_before_headers


@pytest.mark.parametrize(
    "action", [faults.ShortRange(), faults.IgnoreRange(), faults.WrongRange(), faults.Flip(), faults.TooLong()]
)
def test_body_faults_leave_redirects_and_errors_alone(action: Action) -> None:
    assert _spoil(action, REDIRECT) is REDIRECT


@pytest.mark.parametrize(
    "text",
    [
        '{"action": {"fault": "stall", "seconds": 601}}',
        '{"action": {"fault": "nonsense"}}',
        '{"action": {"fault": "reset"}, "origin": "moon"}',
        '{"action": {"fault": "reset"}, "typo": 1}',
        '{"action": {"fault": "fail", "status": 99}}',
        '{"action": {"fault": "reset"}, "probability": 2}',
    ],
)
def test_rules_are_checked_when_they_arrive(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Rule)
