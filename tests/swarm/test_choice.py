"""Whom to ask for a chunk: holders, owners, the origin; what each answer teaches, and that the counts balance."""

from __future__ import annotations

import random

import pytest

from manta.swarm.choice import (
    AVOID_SECONDS,
    AVOID_SECONDS_MAX,
    BUSY_SECONDS,
    BUSY_SECONDS_MAX,
    CHUNKS_MAX,
    CROWDED_SECONDS,
    GONE_MAX,
    LACKING_SECONDS,
    LIAR_SECONDS,
    NOT_NOW,
    ORIGIN,
    PER_MEMBER,
    RECOVERY_SECONDS,
    SETTLE_SECONDS,
    UNABLE_SECONDS,
    WITHHELD_SECONDS,
    Choice,
    Peer,
)
from manta.swarm.ownership import owners

ME = "me"
NODES = ["a", "b", "c"]
BLOB = "sha256:x"


def with_members(*nodes: str, downloads: int = 16) -> Choice:
    choice = Choice(ME, downloads)
    choice.set_members(nodes or NODES)
    return choice


def ranked_as(*first: str) -> int:
    """A chunk whose ranking begins so."""
    for chunk in range(10_000):
        if owners([*NODES, ME], BLOB, chunk)[chunk][: len(first)] == list(first):
            return chunk
    raise AssertionError(first)


def bits(*chunks: int) -> bytes:
    have = bytearray(max(chunks, default=0) // 8 + 1)
    for chunk in chunks:
        have[chunk >> 3] |= 1 << (chunk & 7)
    return bytes(have)


def settled(choice: Choice) -> None:
    choice.follow([BLOB], 0.0)
    for node in choice.members:
        choice.presence(node, BLOB, b"")


def fill(choice: Choice, node: str, count: int) -> None:
    for _ in range(count):
        choice.begin(node)


# Where from --------------------------------------------------------------------------------------------------------------


def test_without_members_there_is_the_origin() -> None:
    assert Choice(ME, 4).choose(BLOB, 0, 0.0) is ORIGIN
    assert Choice(ME, 4).choose(BLOB, 0, 0.0, origin=False) is ORIGIN  # who asks there hears why not


def test_while_it_is_joining_nothing_goes_anywhere() -> None:
    choice = Choice(ME, 4)
    choice.joining_until = 3.0
    assert choice.choose(BLOB, 0, 2.9) is NOT_NOW
    assert choice.choose(BLOB, 0, 3.0) is ORIGIN


def test_a_member_that_has_it_comes_before_its_owner() -> None:
    choice, chunk = with_members(), ranked_as("a", "b")
    settled(choice)
    choice.presence("c", BLOB, bits(chunk))
    assert choice.choose(BLOB, chunk, 0.0) == Peer("c", pull=False)


def test_the_owner_then_the_second_then_the_origin() -> None:
    choice, chunk = with_members(), ranked_as("a", "b", "c", ME)
    settled(choice)
    for node in ("a", "b"):
        assert choice.choose(BLOB, chunk, 0.0) == Peer(node, pull=True)
        choice.begin(node)
        choice.unable(node, BLOB, chunk, 0.0)
    assert choice.choose(BLOB, chunk, 0.0) is ORIGIN
    assert choice.choose(BLOB, chunk, UNABLE_SECONDS) == Peer("a", pull=True)


def test_its_own_chunk_comes_from_the_origin_once_it_is_known_who_has_it() -> None:
    choice, chunk = with_members(), ranked_as(ME, "a")
    choice.follow([BLOB], 5.0)
    assert choice.choose(BLOB, chunk, 5.0) is NOT_NOW
    for node in NODES:
        choice.presence(node, BLOB, b"")
    assert choice.choose(BLOB, chunk, 5.0) is ORIGIN


def test_who_does_not_say_what_it_has_is_not_waited_for_and_the_owner_before_is_asked() -> None:
    choice, chunk = with_members(), ranked_as(ME, "a")
    choice.follow([BLOB], 0.0)
    assert choice.choose(BLOB, chunk, SETTLE_SECONDS) == Peer("a", pull=False)
    choice.begin("a")
    choice.lacks("a", BLOB, chunk, SETTLE_SECONDS)
    assert choice.choose(BLOB, chunk, SETTLE_SECONDS) is ORIGIN


def test_on_behalf_of_another_nobody_is_asked_to_fetch_it() -> None:
    for origin in (True, False):
        for chunk in range(50):
            choice = with_members()
            settled(choice)
            chosen = choice.choose(BLOB, chunk, 0.0, urgent=True, origin=origin, behalf=True)
            assert not (isinstance(chosen, Peer) and chosen.pull)
    choice.presence("b", BLOB, bits(3))
    assert choice.choose(BLOB, 3, 0.0, behalf=True) == Peer("b", pull=False)


def test_where_the_origin_is_out_of_reach_every_member_may_reach_it_and_at_last_the_reason_is_told() -> None:
    for first in ((ME, "a"), ("a", ME), ("a", "b", ME), ("a", "b", "c", ME)):
        choice, chunk = with_members(), ranked_as(*first)
        settled(choice)
        asked = set()
        while isinstance(chosen := choice.choose(BLOB, chunk, 0.0, urgent=True, origin=False), Peer):
            assert chosen.pull
            asked.add(chosen.node)
            choice.begin(chosen.node)
            choice.unable(chosen.node, BLOB, chunk, 0.0)
        assert chosen is ORIGIN
        assert asked == set(NODES)


def test_with_the_origin_away_members_are_not_asked_for_everything_again_and_again() -> None:
    """What nobody has, of a large blob, in the background: a few questions a minute, not one for each chunk."""
    choice, now, asked = with_members(), 0.0, 0
    settled(choice)
    while now < 60:
        for chunk in range(200):
            if isinstance(chosen := choice.choose(BLOB, chunk, now, origin=False), Peer):
                asked += 1
                choice.begin(chosen.node)
                choice.unable(chosen.node, BLOB, chunk, now)
        now += 0.5
    assert asked < 30
    assert isinstance(choice.choose(BLOB, 300, now, origin=False, urgent=True), Peer)  # a reader still hears
    assert isinstance(choice.choose(BLOB, 301, now + 60, origin=False), Peer)


def test_where_the_origin_is_away_a_holder_that_failed_once_is_waited_for() -> None:
    choice, now = with_members(), 0.0
    settled(choice)
    choice.presence("a", BLOB, bits(0))
    for _ in range(3):
        choice.begin("a")
        choice.failed("a", now)
        assert choice.choose(BLOB, 0, now, origin=False, urgent=True) is NOT_NOW
        while choice.choose(BLOB, 0, now, origin=False, urgent=True) is NOT_NOW:
            now += 0.5
        assert choice.choose(BLOB, 0, now, origin=False, urgent=True) == Peer("a", pull=False)
    choice.begin("a")
    choice.failed("a", now)
    assert choice.choose(BLOB, 0, now, origin=False, urgent=True) is not NOT_NOW


def test_who_would_be_done_first_is_asked() -> None:
    choice, chunk = with_members(), 0
    settled(choice)
    for node, seconds in (("a", 1.0), ("b", 0.1), ("c", 1.0)):
        choice.presence(node, BLOB, bits(chunk, 1))
        choice.begin(node)
        choice.got(node, BLOB, 1, 10_000_000, seconds)
    assert choice.choose(BLOB, chunk, 0.0) == Peer("b", pull=False)
    choice.begin("b")
    choice.got("b", BLOB, 1, 1000, 1.0)  # a small file says nothing of a link
    assert choice.choose(BLOB, chunk, 0.0) == Peer("b", pull=False)


# Bounds ------------------------------------------------------------------------------------------------------------------


def test_a_demand_does_not_wait_for_what_was_asked_in_advance() -> None:
    choice, chunk = with_members(downloads=PER_MEMBER), 0
    settled(choice)
    choice.presence("a", BLOB, bits(chunk))
    fill(choice, "a", PER_MEMBER)
    assert choice.choose(BLOB, chunk, 0.0) is NOT_NOW
    assert choice.choose(BLOB, chunk, 0.0, urgent=True) == Peer("a", pull=False)


def test_a_busy_member_is_left_alone_and_names_others() -> None:
    choice, chunk = with_members(), ranked_as("a", "b")
    settled(choice)
    choice.presence("a", BLOB, bits(chunk))
    choice.begin("a")
    choice.busy("a", BLOB, chunk, ["c", "stranger", ME], 0.0)
    assert choice.choose(BLOB, chunk, 0.0) == Peer("c", pull=False)
    choice.begin("c")
    choice.lacks("c", BLOB, chunk, 0.0)
    assert choice.choose(BLOB, chunk, 0.0) is NOT_NOW
    assert choice.choose(BLOB, chunk, BUSY_SECONDS) == Peer("a", pull=False)


@pytest.mark.parametrize("retry_s", [0.0, 1e-9, 1e12, float("inf")])
def test_a_member_is_busy_neither_for_no_time_nor_for_ever(retry_s: float) -> None:
    choice, chunk = with_members(), 0
    settled(choice)
    choice.presence("a", BLOB, bits(chunk))
    choice.begin("a")
    choice.busy("a", BLOB, chunk, [], 0.0, retry_s)
    assert choice.choose(BLOB, chunk, 0.01) is NOT_NOW
    assert choice.choose(BLOB, chunk, BUSY_SECONDS_MAX) == Peer("a", pull=False)


def test_a_reader_does_not_wait_for_ever_for_members_that_have_it_and_no_time() -> None:
    choice, chunk, now = with_members(), 0, 0.0
    settled(choice)
    choice.presence("a", BLOB, bits(chunk))
    choice.begin("a")
    while now < CROWDED_SECONDS:
        if choice.choose(BLOB, chunk, now, urgent=True) == Peer("a", pull=False):
            choice.busy("a", BLOB, chunk, [], now)
            choice.begin("a")
        assert choice.choose(BLOB, chunk, now, urgent=True) is NOT_NOW
        now += 0.25
    choice.busy("a", BLOB, chunk, [], now)
    assert choice.choose(BLOB, chunk, now) is NOT_NOW  # nobody waits for it
    assert choice.choose(BLOB, chunk, now, urgent=True, origin=False) is NOT_NOW
    assert choice.choose(BLOB, chunk, now, urgent=True) is ORIGIN
    assert choice.choose(BLOB, chunk, now + 100, urgent=True) == Peer("a", pull=False)
    choice.begin("a")
    choice.busy("a", BLOB, chunk, [], now + 100)
    assert choice.choose(BLOB, chunk, now + 100, urgent=True) is NOT_NOW  # another reader's wait begins anew


def test_who_withholds_a_blob_is_asked_for_others() -> None:
    choice = with_members("a")
    settled(choice)
    choice.presence("a", BLOB, b"\xff\xff")
    choice.begin("a")
    choice.withholds("a", BLOB, 0, 0.0)
    assert choice.usable("a", 0.0)
    assert all(choice.choose(BLOB, chunk, 0.0) is ORIGIN for chunk in range(16))
    assert choice.choose(BLOB, 1, WITHHELD_SECONDS) == Peer("a", pull=False)
    assert choice.in_flight == 0


def test_what_is_kept_is_bounded() -> None:
    choice = with_members()
    for chunk in range(CHUNKS_MAX + 50):
        choice.choose(BLOB, chunk, 0.0)
        choice.begin("a")
        choice.lacks("a", BLOB, chunk, 0.0)
    assert len(choice._hints) == len(choice._rankings) == CHUNKS_MAX
    choice.set_members(str(number) for number in range(GONE_MAX + 50))
    choice.set_members([])
    assert len(choice._gone) == GONE_MAX
    choice.presence("a", "not followed", b"\xff")
    choice.follow([BLOB], 0.0)
    choice.presence("stranger", BLOB, b"\xff")
    assert not choice._have


# What is learned ---------------------------------------------------------------------------------------------------------


def test_a_member_that_fails_is_avoided_at_once_and_tried_again_ever_later() -> None:
    choice, now = with_members("a"), 0.0
    for failures in range(1, 2000):
        choice.begin("a")
        choice.failed("a", now)
        pause_s = min(AVOID_SECONDS * 2.0 ** min(failures - 1, 20), AVOID_SECONDS_MAX)
        assert not choice.usable("a", now)
        assert choice.avoided(now) == ["a"]
        now += pause_s
        assert choice.usable("a", now)
    choice.begin("a")
    choice.got("a", BLOB, 0, 1, 1.0)
    choice.begin("a")
    choice.failed("a", now)
    assert choice.usable("a", now + AVOID_SECONDS)


def test_orders_that_fail_together_are_one_failure() -> None:
    choice = with_members("a")
    fill(choice, "a", 8)
    for _ in range(8):
        choice.failed("a", 0.0)
    assert choice.usable("a", AVOID_SECONDS)


def test_a_liar_stays_one_whatever_its_other_orders_come_to() -> None:
    choice = with_members("a")
    fill(choice, "a", 3)
    choice.failed("a", 0.0)
    choice.lied("a", 0.0)
    choice.failed("a", 1.0)
    choice.got("a", BLOB, 0, 1, 1.0)
    assert not choice.usable("a", LIAR_SECONDS - 1)
    assert choice.usable("a", LIAR_SECONDS)


def test_a_liar_that_leaves_and_comes_back_is_still_one() -> None:
    choice = with_members("a", "b")
    choice.begin("a")
    choice.set_members(["b"])
    choice.lied("a", 0.0)
    choice.end("a")
    choice.set_members(["a", "b"])
    assert not choice.usable("a", 1.0)


def test_a_lie_in_a_bitmap_is_corrected() -> None:
    choice, chunk = with_members(), 9
    settled(choice)
    choice.presence("a", BLOB, bits(chunk, 10))
    choice.begin("a")
    choice.lacks("a", BLOB, chunk, 0.0)
    assert choice.holders(BLOB, chunk) == []
    assert choice.holders(BLOB, 10) == ["a"]
    choice.presence("a", BLOB, bits(chunk))
    assert choice.choose(BLOB, chunk, 0.0) != Peer("a", pull=False)
    assert choice.choose(BLOB, chunk, LACKING_SECONDS) == Peer("a", pull=False)


def test_silent_and_suspect_members_are_not_asked_and_count_for_nothing() -> None:
    choice = with_members("a")
    settled(choice)
    choice.presence("a", BLOB, bits(0))
    for mark in (choice.set_silent, choice.set_suspect):
        assert choice.held(BLOB, 0, 0.0)
        assert not choice.held(BLOB, 0, 0.0, besides="a")
        assert choice.anybody_has(BLOB, 0.0)
        assert choice.anybody(0.0)
        mark(["a"])
        assert choice.choose(BLOB, 0, 0.0, urgent=True) is ORIGIN
        assert choice.choose(BLOB, 0, 0.0) is NOT_NOW  # it may be back soon
        assert choice.choose(BLOB, 0, 0.0, origin=False) is NOT_NOW
        assert not choice.held(BLOB, 0, 0.0)
        assert not choice.anybody_has(BLOB, 0.0)
        assert not choice.anybody(0.0)
        mark([])


def test_what_nobody_waits_for_waits_for_its_owner_a_moment_and_no_longer() -> None:
    choice = with_members("a")
    settled(choice)
    chunk = next(c for c in range(64) if choice.choose(BLOB, c, 0.0) == Peer("a", pull=True))
    choice.set_suspect(["a"])
    assert choice.choose(BLOB, chunk, 0.0) is NOT_NOW
    assert choice.choose(BLOB, chunk, RECOVERY_SECONDS - 0.1) is NOT_NOW
    assert choice.choose(BLOB, chunk, 0.0, urgent=True) is ORIGIN
    for second in range(int(RECOVERY_SECONDS), 20):
        assert choice.choose(BLOB, chunk, float(second)) is ORIGIN
    choice.set_suspect([])
    assert choice.choose(BLOB, chunk, 20.0) == Peer("a", pull=True)


def test_owners_change_only_with_the_members() -> None:
    choice = with_members()
    before = choice.epoch
    choice.set_members([*NODES, ME])
    assert choice.epoch == before
    choice.set_members(NODES[:2])
    assert choice.epoch != before
    assert all(choice.choose(BLOB, chunk, 0.0) != Peer("c", pull=True) for chunk in range(50))


@pytest.mark.parametrize("seed", range(50))
def test_what_is_in_flight_balances_whatever_happens(seed: int) -> None:
    """Also of a member that leaves while it is asked and comes back."""
    rng, now, blob = random.Random(seed), 0.0, BLOB
    choice, under_way = with_members(), list[tuple[str, int]]()
    choice.follow([blob], 0.0)
    for _ in range(600):
        now += rng.random() / 4
        act, chunk = rng.randrange(11), rng.randrange(20)
        if act < 4:
            chosen = choice.choose(blob, chunk, now, urgent=rng.random() < 0.3, origin=rng.random() < 0.7)
            if isinstance(chosen, Peer):
                assert choice.usable(chosen.node, now)
                choice.begin(chosen.node)
                under_way.append((chosen.node, chunk))
        elif act < 6:
            choice.set_members(rng.sample(NODES, rng.randrange(4)))
        elif act == 6:
            choice.presence(rng.choice(NODES), blob, rng.randbytes(3))
        elif under_way:
            node, chunk = under_way.pop(rng.randrange(len(under_way)))
            match rng.randrange(8):
                case 0:
                    choice.got(node, blob, chunk, 1_000_000, 0.1)
                case 1:
                    choice.busy(node, blob, chunk, rng.sample(NODES, 2), now, rng.random())
                case 2:
                    choice.lacks(node, blob, chunk, now)
                case 3:
                    choice.unable(node, blob, chunk, now)
                case 4:
                    choice.failed(node, now)
                case 5:
                    choice.lied(node, now)
                    choice.failed(node, now)
                case 6:
                    choice.end(node)
                case 7:
                    choice.withholds(node, blob, chunk, now)
        assert choice.in_flight == len(under_way)
        for node, member in (choice._members | choice._gone).items():
            assert member.in_flight == sum(1 for asked, _ in under_way if asked == node)


def test_the_owner_of_what_nobody_waits_for_gets_a_moment_to_recover() -> None:
    choice, chunk = with_members(), ranked_as("a", "b")
    settled(choice)
    choice.set_suspect(["a"])
    assert choice.choose(BLOB, chunk, 0.0, urgent=True) == Peer("b", pull=True)
    now = 0.0
    while now < RECOVERY_SECONDS:
        assert choice.choose(BLOB, chunk, now) is NOT_NOW
        now += 0.5
    assert choice.choose(BLOB, chunk, now) == Peer("b", pull=True)


def test_what_is_fetched_on_our_behalf_keeps_nothing_from_coming_that_is_there() -> None:
    """And in background few are asked for that: who starts with us fetches what it owns by itself."""
    choice = with_members(downloads=2)
    settled(choice)
    asked = []
    for chunk in range(40):
        source = choice.choose(BLOB, chunk, 0.0)
        if isinstance(source, Peer):
            assert source.pull
            choice.begin(source.node, pull=True)
            asked.append(source.node)
    assert sorted(asked) == NODES  # PULLS_PER_MEMBER each
    choice.presence("a", BLOB, bits(50))
    assert choice.choose(BLOB, 50, 0.0) == Peer("a", pull=False)
    before = choice.full
    for _ in range(2):
        choice.begin("a")
    assert (before, choice.full) == (False, True)
    assert choice.choose(BLOB, 50, 0.0) is NOT_NOW
    assert choice.choose(BLOB, 50, 0.0, urgent=True) == Peer("a", pull=False)
    for node in asked:
        choice.unable(node, BLOB, 0, 0.0, pull=True)
    assert choice.in_flight == 2
