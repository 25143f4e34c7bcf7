"""Who owns a chunk: one for all who ask, evenly among few, and little moves when a member comes or goes."""

from __future__ import annotations

from collections import Counter

import pytest

from manta.swarm.ownership import EVEN_MEMBERS_MAX, chunk_key, owned, owners, ranking

BLOB = "sha256-" + "0" * 64


def nodes(count: int) -> list[str]:
    return [f"{number:016x}" for number in range(count)]


def owner_of(among: list[str], chunk: int) -> str:
    return owners(among, BLOB, chunk, 1)[chunk][0]


@pytest.mark.parametrize("count", [1, 2, 7, EVEN_MEMBERS_MAX])
def test_few_own_evenly(count: int) -> None:
    among = nodes(count)
    of = Counter(owner_of(among, chunk) for chunk in range(3 * count))
    assert set(of.values()) == {3}
    assert len(of) == count


@pytest.mark.parametrize("count", [1, 3, 8, EVEN_MEMBERS_MAX, EVEN_MEMBERS_MAX + 1, 200])
def test_each_chunk_has_one_owner_whoever_asks(count: int) -> None:
    among = nodes(count)
    chunks = range(10, 60)
    of = {chunk: [me for me in among if chunk in owned(among, me, BLOB, [chunk])] for chunk in chunks}
    assert of == {chunk: [owner_of(among[::-1], chunk)] for chunk in chunks}
    assert owned([node for node in among if node != among[0]], among[0], BLOB, chunks) == [
        chunk for chunk in chunks if of[chunk] == among[:1]
    ]


@pytest.mark.parametrize("count", [5, 100])
def test_all_come_after_the_owner_by_rank(count: int) -> None:
    among = nodes(count)
    for chunk in range(20):
        for each, found in owners(among, BLOB, chunk).items():
            assert sorted(found) == among
            by_rank = ranking(among, chunk_key(BLOB, each))
            assert found[1:] == [node for node in by_rank if node != found[0]]
            assert owners(among, BLOB, each, 3)[each] == found[:3]


def test_many_own_by_rank_alone_and_only_the_share_of_who_goes_moves() -> None:
    among = nodes(EVEN_MEMBERS_MAX + 10)
    for chunk in range(100):
        before, after = owner_of(among, chunk), owner_of(among[1:], chunk)
        assert after == before or before == among[0]
