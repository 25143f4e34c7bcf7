"""Slots: never more than there are, never all of them for one, none lost; and who has had a chunk lately."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.swarm import slots
from manta.swarm.slots import Recipients, Slots


@given(st.integers(1, 9), st.lists(st.tuples(st.booleans(), st.sampled_from("abc")), max_size=80))
def test_no_more_than_there_are(limit: int, steps: list[tuple[bool, str]]) -> None:
    subject, held = Slots(limit), Counter[str]()
    for take, node in steps:
        if take and subject.acquire(node):
            held[node] += 1
        elif not take and held[node]:
            subject.release(node)
            held[node] -= 1
        assert subject.busy == held.total() <= limit
        assert max(held.values(), default=0) <= max(1, limit // 2)
    for node, count in held.items():
        for _ in range(count):
            subject.release(node)
    assert subject.busy == 0
    assert subject.acquire("d")


def test_one_asker_leaves_room_for_others() -> None:
    subject = Slots(8)
    assert [subject.acquire("greedy") for _ in range(5)] == [True] * 4 + [False]
    assert [subject.acquire(node) for node in "abcde"] == [True] * 4 + [False]
    subject.release("greedy")
    assert subject.acquire("e")


def test_a_node_of_one_slot_serves() -> None:
    subject = Slots(1)
    assert subject.acquire("a")
    assert not subject.acquire("b")
    subject.release("a")
    assert subject.acquire("b")


def test_no_slots_is_no_number() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Slots(0)


def test_who_got_it_last_is_named_first_and_not_the_asker() -> None:
    subject = Recipients()
    for node in ("a", "b", "c", "a"):
        subject.given("blob", 0, node)
    assert subject.holders("blob", 0, "c") == ["a", "b"]
    assert subject.holders("blob", 0, "x") == ["a", "c", "b"]
    assert subject.holders("blob", 1, "x") == subject.holders("other", 0, "x") == []


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "RECENT_CHUNKS_MAX", 3)
    monkeypatch.setattr(slots, "RECENT_HOLDERS_MAX", 2)
    subject = Recipients()
    for chunk in range(5):
        for node in "abc":
            subject.given("blob", chunk, node)
    assert [subject.holders("blob", chunk, "x") for chunk in range(5)] == [[], []] + [["c", "b"]] * 3
