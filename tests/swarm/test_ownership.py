"""Ownership: the same everywhere, fair, and disturbed by a change of the members no more than it must."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.swarm.ownership import EVEN_MEMBERS_MAX, chunk_key, owned, owner, owners, ranking, score

NODES = [f"{n:016x}" for n in range(8)]
BLOB = "sha256-" + "ab" * 32
CHUNKS = range(4000)

node_sets = st.lists(st.from_regex(r"[0-9a-f]{16}", fullmatch=True), min_size=1, max_size=12, unique=True)


def by_rank(nodes: list[str]) -> dict[int, str | None]:
    return {chunk: owner(nodes, chunk_key(BLOB, chunk)) for chunk in CHUNKS}


def test_a_score_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert score("0123456789abcdef", f"{BLOB}/7") == 0xADEB702D34258D1


@given(node_sets, st.randoms())
def test_the_order_in_which_members_are_known_does_not_count(nodes: list[str], random: Random) -> None:
    mixed = nodes.copy()
    random.shuffle(mixed)
    key = chunk_key(BLOB, 3)
    assert ranking(mixed, key) == ranking(nodes, key)
    assert owner(mixed, key) == ranking(nodes, key)[0]
    assert ranking(nodes, key, 2) == ranking(nodes, key)[:2]


def test_nobody_owns_nothing() -> None:
    assert owner([], "key") is None
    assert ranking([], "key") == []


def test_everybody_owns_about_as_much() -> None:
    shares = Counter(by_rank(NODES).values())
    assert len(shares) == len(NODES)
    assert max(shares.values()) < 1.2 * len(CHUNKS) / len(NODES)
    assert min(shares.values()) > 0.8 * len(CHUNKS) / len(NODES)


def test_who_leaves_takes_only_what_it_owned() -> None:
    before, after = by_rank(NODES), by_rank(NODES[1:])
    assert all(after[chunk] == before[chunk] for chunk in CHUNKS if before[chunk] != NODES[0])
    # Its part goes to all others, not to one.
    heirs = Counter(after[chunk] for chunk in CHUNKS if before[chunk] == NODES[0])
    assert len(heirs) == len(NODES) - 1
    assert max(heirs.values()) < 2 * heirs.total() / len(heirs)


def test_where_one_comes_the_owner_before_is_second() -> None:
    before, after = by_rank(NODES[1:]), by_rank(NODES)
    for chunk in CHUNKS:
        if after[chunk] == NODES[0]:
            assert ranking(NODES, chunk_key(BLOB, chunk), 2)[1] == before[chunk]
        else:
            assert after[chunk] == before[chunk]


@given(node_sets, st.booleans())
def test_what_is_owned_is_what_the_owner_says(nodes: list[str], left_out: bool) -> None:
    me = nodes[0]
    chunks = range(50)
    others = nodes[1:] if left_out else nodes
    assert owned(others, me, BLOB, chunks) == [c for c in chunks if owners(nodes, BLOB, c)[c][0] == me]


def test_all_is_owned_by_somebody_and_once() -> None:
    parts = [set(owned(NODES, node, BLOB, CHUNKS)) for node in NODES]
    assert sum(len(part) for part in parts) == len(CHUNKS)
    assert set().union(*parts) == set(CHUNKS)


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
