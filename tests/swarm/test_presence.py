"""Whom to ask what, and what of the answers is news."""

from __future__ import annotations

import math

import pytest

from manta.errors import Invalid
from manta.model.extents import CHUNK_SIZE
from manta.swarm import presence as module
from manta.swarm.presence import MEMBERS_PER_ROUND, Presences, bitmap_bytes, pauses_of
from manta.swarm.protocol import ANSWER_BYTES_MAX, HAVE_BLOBS_MAX, Have

ME, A, B = "0" * 16, "a" * 16, "b" * 16
BLOB, OTHER = ("blob-1", 20 * CHUNK_SIZE), ("blob-2", CHUNK_SIZE + 1)


def nodes(count: int) -> dict[str, str]:
    return {f"{n:016x}": f"10.0.0.{n}:1" for n in range(1, count + 1)}


def test_all_are_asked_where_they_are_few() -> None:
    presences = Presences(ME)
    up = nodes(MEMBERS_PER_ROUND)
    assert presences.whom(up) == list(up)


@pytest.mark.parametrize("count", [17, 40, 1000])
def test_all_are_asked_in_turn_where_they_are_many(count: int) -> None:
    presences = Presences(ME)
    up = nodes(count)
    rounds = [presences.whom(up) for _ in range(math.ceil(count / MEMBERS_PER_ROUND))]
    assert all(len(set(chosen)) == MEMBERS_PER_ROUND for chosen in rounds)
    assert {node for chosen in rounds for node in chosen} == set(up)
    assert Presences("1" * 16).whom(up) != rounds[0], "each node has its own order"


def test_who_is_not_up_any_more_is_not_asked() -> None:
    presences = Presences(ME)
    presences.whom(nodes(100))
    up = {node: address for node, address in nodes(100).items() if int(node, 16) > 60}
    for _ in range(20):
        assert set(presences.whom(up)) <= set(up)


def test_only_what_changed_is_told() -> None:
    presences = Presences(ME)
    presences.follow([BLOB, OTHER])
    first = Have(node=A, blobs={"blob-1": b"\x01\0\0", "blob-9": b"\xff"})
    assert presences.news(A, [BLOB, OTHER], first) == [("blob-1", b"\x01\0\0"), ("blob-2", b"\0")]
    assert presences.news(A, [BLOB, OTHER], first) == []
    assert presences.news(B, [BLOB], Have(node=B)) == [("blob-1", b"\0\0\0")]
    more = Have(node=A, blobs={"blob-1": b"\x03\0\0"})
    assert presences.news(A, [BLOB, OTHER], more) == [("blob-1", b"\x03\0\0")]
    assert presences.news(A, [BLOB, OTHER], Have(node=A)) == [("blob-1", b"\0\0\0")], "evicted there"


def test_a_member_that_comes_back_is_told_of_anew() -> None:
    presences = Presences(ME)
    presences.follow([BLOB])
    have = Have(node=A, blobs={"blob-1": b"\x01\0\0"})
    presences.news(A, [BLOB], have)
    presences.whom({B: "10.0.0.2:1"})
    assert presences.news(A, [BLOB], have) == [("blob-1", b"\x01\0\0")]


def test_a_blob_that_is_followed_again_is_told_of_anew() -> None:
    presences = Presences(ME)
    have = Have(node=A, blobs={"blob-1": b"\x01\0\0"})
    assert presences.follow([BLOB])
    presences.news(A, [BLOB], have)
    assert not presences.follow([])
    assert not presences.following
    assert presences.news(A, [BLOB], have) == [], "an answer to what is not followed any more"
    assert presences.follow([BLOB])
    assert not presences.follow([BLOB])
    assert presences.news(A, [BLOB], have) == [("blob-1", b"\x01\0\0")]


def test_bits_beyond_the_last_chunk_are_nobody_s() -> None:
    presences = Presences(ME)
    presences.follow([BLOB])
    told = presences.news(A, [BLOB], Have(node=A, blobs={"blob-1": b"\xff\xff\xff"}))
    assert told == [("blob-1", b"\xff\xff\x0f")]


@pytest.mark.parametrize(
    "have",
    [
        Have(node=B),
        Have(node=A, blobs={"blob-1": b""}),
        Have(node=A, blobs={"blob-1": b"\1\1"}),
        Have(node=A, blobs={"blob-1": bytes(1 << 20)}),
    ],
)
def test_an_answer_that_is_none_is_refused_whole(have: Have) -> None:
    presences = Presences(ME)
    presences.follow([BLOB])
    with pytest.raises(Invalid):
        presences.news(A, [BLOB], have)
    assert presences.news(A, [BLOB], Have(node=A)) == [("blob-1", b"\0\0\0")]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLD_MAX", 10)
    presences = Presences(ME)
    blobs = [(f"blob-{n}", CHUNK_SIZE) for n in range(4)]
    presences.follow(blobs)
    for node in nodes(10):
        assert len(presences.news(node, blobs, Have(node=node))) == 4
    last = f"{10:016x}"
    assert presences.news(last, blobs, Have(node=last)) == []
    first = f"{1:016x}"
    assert len(presences.news(first, blobs, Have(node=first))) == 4, "told once more"


def test_questions_are_bounded_by_their_answers() -> None:
    presences = Presences(ME)
    presences.follow([BLOB, OTHER])
    assert presences.requests() == [[BLOB, OTHER]]
    huge = [(f"blob-{n}", 3 * 1024**4) for n in range(HAVE_BLOBS_MAX + 5)]
    presences.follow([*huge, ("too-large", 8 * 1024**4), ("empty", 0)])
    asked = presences.requests()
    assert [blob for batch in asked for blob in batch] == huge[:HAVE_BLOBS_MAX]
    assert all(sum(bitmap_bytes(size) for _, size in batch) <= ANSWER_BYTES_MAX // 2 for batch in asked)


def test_pauses_are_taken_as_far_as_they_make_sense() -> None:
    told = {"https://hub": 5.0, "https://cdn": 1e300, "x\n": 1.0, "long" * 100: 1.0, "past": -1.0, "nan": math.nan}
    assert pauses_of(Have(node=A, pauses=told)) == {"https://hub": 5.0, "https://cdn": module.PAUSE_SECONDS_MAX}
    assert len(pauses_of(Have(node=A, pauses={f"h{n}": 1.0 for n in range(500)}))) == module.PAUSES_MAX
