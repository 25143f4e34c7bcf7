"""Replies: ranges as the CDN reads them."""

import pytest

from manta.testing.hub.content import BytesContent
from manta.testing.hub.reply import Request, Unsatisfiable, content_reply, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", None),
        ("bytes=0-0", (0, 1)),
        ("bytes=0-9", (0, 10)),
        ("bytes=3-", (3, 10)),
        ("bytes=3-100", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-400", (0, 10)),
        ("bytes=10-", Unsatisfiable()),
        ("bytes=-0", Unsatisfiable()),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,4-5", None),
        ("items=0-1", None),
        ("bytes=a-b", None),
    ],
)
def test_ranges_of_ten_bytes(header: str, expected: tuple[int, int] | Unsatisfiable | None) -> None:
    assert parse_range(header, 10) == expected


def test_no_range_of_an_empty_file_can_be_had() -> None:
    assert parse_range("bytes=0-0", 0) == Unsatisfiable()
    assert parse_range("bytes=-1", 0) == Unsatisfiable()


@pytest.mark.parametrize(("if_range", "status"), [(None, 206), ('"tag"', 206), ('"older"', 200)])
def test_if_range(if_range: str | None, status: int) -> None:
    headers = {"range": "bytes=2-3"} | ({"if-range": if_range} if if_range else {})
    request = Request("cdn", "GET", "/x", headers=headers)
    reply = content_reply(request, BytesContent(b"0123456789"), {"ETag": '"tag"'}, blob="id")
    assert reply.status == status
    assert reply.length == (2 if status == 206 else 10)
