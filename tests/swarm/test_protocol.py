"""What nodes say to each other: whatever was said is read as it was meant, and whatever else comes is refused and nothing worse."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.errors import Invalid
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobAlgorithm, BlobId
from manta.swarm.protocol import (
    Body,
    ChunkRequest,
    Have,
    HaveRequest,
    Hello,
    LocationRequest,
    Pull,
    Refusal,
    Report,
    Resolved,
    ResolveRequest,
    SharedLocation,
    TreeRequest,
    chunk_target,
    decode,
    encode,
    parse_chunk_target,
)

KINDS: list[type[Body]] = [
    Hello, HaveRequest, Have, Pull, ResolveRequest, Resolved, TreeRequest, LocationRequest, SharedLocation, Report, Refusal,
]  # fmt: skip
BLOB = BlobId(BlobAlgorithm.SHA256, "ab" * 32)

blobs = st.builds(BlobId, st.just(BlobAlgorithm.SHA256), st.from_regex(r"[0-9a-f]{64}", fullmatch=True)) | st.builds(
    BlobId, st.just(BlobAlgorithm.GIT_SHA1), st.from_regex(r"[0-9a-f]{40}", fullmatch=True)
)
texts = st.text(st.characters(codec="utf-8"), max_size=200)
pulls = st.none() | st.builds(Pull, kind=texts, repo=texts, commit=texts, path=texts, urgent=st.booleans())
sizes = st.integers(1, 16 * 1024**4)


@st.composite
def requests(draw: st.DrawFn) -> ChunkRequest:
    size = draw(sizes)
    chunk = draw(st.integers(0, (size - 1) // CHUNK_SIZE))
    length = min(CHUNK_SIZE, size - chunk * CHUNK_SIZE)
    whole = draw(st.booleans())
    start = 0 if whole else draw(st.integers(0, length - 1))
    end = length if whole else draw(st.integers(start + 1, length))
    return ChunkRequest(draw(blobs), size, chunk, start, end, whole, draw(pulls))


@given(requests())
def test_a_request_for_a_chunk_is_read_as_it_was_written(request: ChunkRequest) -> None:
    target = chunk_target(request.blob, request.size, request.chunk, request.pull)
    assert target.isascii()
    assert target.isprintable()
    range_ = "" if request.whole else f"bytes={request.start}-{request.end - 1}"
    assert parse_chunk_target(target, range_) == request


@given(texts | st.from_regex(r"/v1/blobs/[a-z0-9.%/-]{0,90}/\d{0,12}\?(size|pull|x)=[0-9a-zA-Z_=%&+-]*"), texts)
def test_whatever_else_comes_is_refused(target: str, range_: str) -> None:
    for each in ("", range_):
        try:
            request = parse_chunk_target(target, each)
        except Invalid:
            continue
        assert 0 <= request.start < request.end <= CHUNK_SIZE
        assert request.chunk * CHUNK_SIZE + request.end <= request.size


@given(requests(), st.data())
def test_a_request_that_was_changed_is_refused_or_another_one(request: ChunkRequest, data: st.DataObject) -> None:
    target = chunk_target(request.blob, request.size, request.chunk, request.pull)
    at = data.draw(st.integers(0, len(target)))
    cut = data.draw(st.integers(0, 3))
    changed = target[:at] + data.draw(st.text(max_size=3)) + target[at + cut :]
    try:
        found = parse_chunk_target(changed, "")
    except Invalid:
        return
    assert found.chunk * CHUNK_SIZE + found.end <= found.size


@pytest.mark.parametrize(
    "name",
    [
        "..", "%2e%2e", "sha256-../../etc/passwd", "sha256-", "git-" + "a" * 64, "sha256-" + "A" * 64, "md5-" + "a" * 32,
        "sha256-" + "a" * 64 + "/..", "sha256-" + "a" * 64 + "\n", "sha256-" + "\u0661" * 64,
    ],
)  # fmt: skip
def test_what_names_no_blob_is_refused(name: str) -> None:
    with pytest.raises(Invalid):
        parse_chunk_target(f"/v1/blobs/{name}/0?size=100", "")


@pytest.mark.parametrize(
    "range_",
    [
        "bytes=0-100", "bytes=100-100", "bytes=5-4", "bytes=-5", "bytes=5-", "bytes=0-1,3-4", "bytes = 0-1", "bytes=0-1 ",
        "octets=0-1", "bytes=\u0660-\u0661", "bytes=0-99999999999999999999", "x",
    ],
)  # fmt: skip
def test_a_range_that_is_none_of_the_chunks_is_refused(range_: str) -> None:
    with pytest.raises(Invalid):
        parse_chunk_target(chunk_target(BLOB, 100, 0), range_)


@pytest.mark.parametrize(
    "query",
    [
        "size=100&size=100&x=1", "size=", "size=-1", "size=0", "size=1e3", "size=\u0661", "", "pull=", "size=100&pull=",
        "size=100&pull=!!!!", "size=100&pull=gA", "size=100&" + "&".join("x=1" for _ in range(100)),
        "size=100&pull=" + base64.urlsafe_b64encode(b"\x91" * 3000).decode(), "size=100&pull=" + "A" * 9000,
    ],
)  # fmt: skip
def test_a_query_that_is_none_is_refused(query: str) -> None:
    with pytest.raises(Invalid):
        parse_chunk_target(f"/v1/blobs/{BLOB}/0?{query}", "")


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_bodies_that_are_none_are_refused(data: bytes, kind: type[Body]) -> None:
    try:
        body = decode(data, kind)
    except Invalid:
        return
    assert decode(encode(body), kind) == body


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=50),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["blobs", "node", "reason"]), inner)
        ),
        max_leaves=10,
    ),
    st.sampled_from(KINDS),
)
def test_bodies_of_other_types_are_refused(value: object, kind: type[Body]) -> None:
    test_bodies_that_are_none_are_refused.hypothesis.inner_test(msgspec.msgpack.encode(value), kind)  # type: ignore[attr-defined]


def test_bodies_that_are_deep_are_refused() -> None:
    for kind in KINDS:
        with pytest.raises(Invalid):
            decode(b"\x91" * 60_000, kind)


def test_a_field_of_a_newer_node_is_left_out() -> None:
    data = msgspec.msgpack.encode({"node": "a" * 16, "version": "9", "started": 1.0, "newer": [1, 2]})
    assert decode(data, Hello) == Hello(node="a" * 16, version="9", started=1.0)


def test_a_location_shows_nothing() -> None:
    assert "secret" not in repr(SharedLocation(url="https://secret", headers={"x": "secret"}))
