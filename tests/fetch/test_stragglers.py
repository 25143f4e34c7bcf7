"""Who is hedged: what is silent or slow beside the others; once, few at a time, and at a bounded waste."""

from __future__ import annotations

import pytest

from manta.fetch.stragglers import SILENCE_FACTOR, SILENCE_SECONDS, WASTE_BYTES, WASTE_BYTES_MIN, Course, Stragglers

MIB = 1024 * 1024


def usual(first_byte_s: float = 0.05, seconds: float = 0.5, size: int = 8 * MIB, orders: int = 40) -> Stragglers:
    stragglers = Stragglers()
    for _ in range(orders):
        stragglers.learn(first_byte_s, seconds, size)
    return stragglers


def course(began: float = 0.0, came: int = 0, last: float = 0.0, first: float | None = None) -> Course:
    return Course(began, 8 * MIB, came, first, last)


def hedged(stragglers: Stragglers, courses: list[Course], now: float, most: int = 2) -> list[Course]:
    return list(stragglers.to_hedge(courses, now, most))


def test_what_begins_is_not_silent() -> None:
    one = course(began=10.0)
    assert not usual().silent(one, 10.0 + SILENCE_SECONDS)
    assert usual().silent(one, 10.1 + SILENCE_SECONDS)


def test_a_far_origin_is_given_more_time() -> None:
    stragglers = usual(first_byte_s=1.0, seconds=2.0)
    assert not stragglers.silent(course(), SILENCE_FACTOR)
    assert stragglers.silent(course(), SILENCE_FACTOR + 0.1)


def test_silence_counts_from_the_last_byte() -> None:
    one = course()
    one.progress(MIB, 5.0)
    assert not usual().silent(one, 5.0 + SILENCE_SECONDS)
    assert usual().silent(one, 5.1 + SILENCE_SECONDS)


def test_a_trickle_is_slow() -> None:
    one = course(came=100_000, first=0.1, last=3.0)
    assert usual().slow(one, [one], 3.0)
    assert hedged(usual(), [one], 3.0) == [one]


def test_what_all_do_is_not_slow() -> None:
    """Eight that begin to share the link of one take eight times as long."""
    courses = [course(came=MIB, first=0.1, last=4.0) for _ in range(8)]
    assert hedged(usual(seconds=0.5), courses, 4.0) == []


def test_what_other_nodes_see_too_is_not_slow() -> None:
    """Eight nodes that begin to share the origin's link: this one has a single order, and none to compare it with."""
    stragglers, one = usual(seconds=0.7), course(came=MIB, first=0.1, last=4.0)
    assert stragglers.slow(one, [one], 4.0)
    stragglers.note_elsewhere(4.0 / MIB)
    assert not stragglers.slow(one, [one], 4.0)
    assert stragglers.silent(one, 9.0), "what hangs is seen all the same"
    stragglers.note_elsewhere(0.0)
    assert stragglers.slow(one, [one], 4.0)


def test_without_knowledge_nothing_is_slow() -> None:
    assert not Stragglers().slow(course(came=1, first=0.1, last=9.0), [], 9.0)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_few_are_hedged_at_once_and_each_once(most: int) -> None:
    stragglers, courses = usual(), [course() for _ in range(8)]
    first = hedged(stragglers, courses, 10.0, most)
    assert len(first) == most
    assert hedged(stragglers, courses, 11.0, most) == []
    rest = [c for c in courses if not c.hedged]
    assert not set(map(id, hedged(stragglers, rest, 12.0, most))) & set(map(id, first))


def test_what_is_complete_is_not_hedged() -> None:
    assert hedged(usual(), [course(came=8 * MIB, first=0.1, last=0.2)], 60.0) == []


def test_the_waste_is_bounded_and_grows_with_what_came() -> None:
    stragglers = Stragglers()

    def twice() -> int:
        total = 0
        while found := hedged(stragglers, [course()], 60.0):
            total += sum(c.wanted for c in found)
        return total

    assert twice() == WASTE_BYTES
    for _ in range(64):
        stragglers.learn(0.05, 0.5, 8 * MIB)
    assert twice() == 64 * 8 * MIB // 16


@pytest.mark.parametrize(("among", "most"), [(1, WASTE_BYTES), (2, WASTE_BYTES // 2), (100, WASTE_BYTES_MIN)])
def test_nodes_that_read_together_waste_together_what_one_may(among: int, most: int) -> None:
    stragglers, total = Stragglers(), 0
    stragglers.share(among)
    while found := hedged(stragglers, [course()], 60.0):
        total += sum(c.wanted for c in found)
    assert total == most


def test_among_many_only_what_is_silent_may_be_ordered_by_each_of_them() -> None:
    stragglers = usual(orders=1)
    stragglers.share(100)
    slow, silent = course(came=100_000, first=0.1, last=3.0), course()
    assert stragglers.slow(slow, [slow], 3.0)
    assert hedged(stragglers, [slow, silent], 3.0) == [silent]
    assert hedged(stragglers, [slow, course()], 4.0) == []
