"""Who is a member, from what was heard: single stories, and a seeded simulation of thousands."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from manta.swarm import roster as module
from manta.swarm.roster import (
    ADDRESSES_MAX,
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    GREET_SECONDS,
    GREETS_AT_ONCE,
    GREETS_PER_SECOND,
    Roster,
    backoff_s,
    pages,
)
from manta.wire.messages import MESSAGE_BYTES_MAX, encode
from manta.wire.peering import BODY_BYTES_MAX, Member, Members

ME = "0" * 16
A, B = "a" * 16, "b" * 16
ONE, TWO = "10.0.0.1:9402", "10.0.0.2:9402"


def with_members(*named: tuple[str, str]) -> Roster:
    """A roster at time 0 in which these (address, node) are up."""
    roster = Roster(ME)
    roster.found(frozenset(address for address, _ in named), 0.0)
    for address, node in named:
        roster.welcomed(address, node, "1.0", 0.001, 0.0)
    return roster


def shown(roster: Roster) -> list[tuple[str, str, str]]:
    return [(member.node, member.address, member.state) for member in roster.members()]


def test_an_address_is_shown_before_it_has_answered_and_belongs_to_who_answers() -> None:
    roster = Roster(ME, epoch=1000.0)
    roster.found(frozenset({ONE}), 5.0)
    assert roster.members() == [Member("", ONE, "suspect", 1005.0, 0.0, "", f"{ONE} was not asked yet.", False)]
    assert roster.greet(5.0) == [ONE]
    roster.welcomed(ONE, A, "1.0", 0.002, 6.0)
    assert roster.members() == [Member(A, ONE, "up", 1006.0, 0.002, "1.0", "")]
    assert roster.up() == {A: ONE}
    assert roster.address_of(A) == ONE
    assert roster.is_member(A)


def test_our_own_address_is_left_out_and_greeted_rarely() -> None:
    roster = with_members((ONE, ME), (TWO, B))
    assert shown(roster) == [(B, TWO, "up")]
    assert roster.address_of(ME) is None
    assert not roster.is_member(ME)
    greeted = [address for second in range(30) for address in roster.greet(float(second))]
    assert ONE not in greeted
    assert TWO in greeted


def test_it_is_suspect_at_once_then_down_and_up_again_with_the_first_answer() -> None:
    roster = with_members((ONE, A))
    for now, state in ((1.0, "suspect"), (2.0, "suspect"), (4.0, "down"), (8.0, "down")):
        roster.failed(ONE, "It fell silent.", now)
        assert shown(roster) == [(A, ONE, state)]
        assert roster.up() == {}
    assert roster.members()[0].since == 4.0
    assert roster.members()[0].problem == "It fell silent."
    roster.welcomed(ONE, A, "1.0", 0.001, 20.0)
    assert shown(roster) == [(A, ONE, "up")]
    roster.failed(ONE, "It fell silent.", 21.0)
    assert shown(roster) == [(A, ONE, "suspect")]


def test_a_failure_is_followed_by_another_try_with_a_growing_pause() -> None:
    waits = [backoff_s(ME, ONE, attempt) for attempt in range(1, 40)]
    assert waits == [backoff_s(ME, ONE, attempt) for attempt in range(1, 40)]
    assert all(BACKOFF_SECONDS_MIN <= wait <= BACKOFF_SECONDS_MAX for wait in waits)
    assert waits[0] <= 1.25
    assert waits[10] >= 22.5
    assert backoff_s(ME, ONE, 3) != backoff_s(A, ONE, 3), "not all nodes come back at the same instant"
    roster = with_members((ONE, A))
    roster.failed(ONE, "It fell silent.", 100.0)
    assert roster.greet(100.9) == []
    assert roster.greet(101.3) == [ONE]


def test_whoever_was_asked_is_told_from_who_was_not() -> None:
    roster = Roster(ME)
    roster.found(frozenset({ONE, TWO}), 0.0)
    assert [member.asked for member in roster.members()] == [False, False]
    roster.refused(ONE, "Its key is another.", 1.0)
    roster.failed(TWO, "It fell silent.", 1.0)
    assert [member.asked for member in roster.members()] == [True, True]


def test_an_address_that_never_answered_is_down_soon() -> None:
    """Nodes that start together find each other within a second, and one that starts knows by then who is not there."""
    roster = Roster(ME)
    roster.found(frozenset({ONE}), 0.0)
    now, tries = 0.0, list[float]()
    while now < 10.0:
        if roster.greet(now):
            tries.append(now)
            roster.failed(ONE, "It does not answer.", now)
        now += 0.01
    assert tries[2] < 1.0
    assert roster.members()[0].since == tries[2]
    assert shown(roster) == [("", ONE, "down")]
    assert tries[3] - tries[2] > 2.9


def test_a_node_whose_address_changed_has_the_new_one() -> None:
    roster = with_members((ONE, A))
    roster.found(frozenset({TWO}), 10.0)
    roster.welcomed(TWO, A, "1.0", 0.001, 10.1)
    assert shown(roster) == [(A, TWO, "up")], "the one that discovery names"
    roster.failed(ONE, "It is gone.", 10.2)
    assert shown(roster) == [(A, TWO, "up")]


def test_of_two_addresses_of_a_node_one_is_used_as_long_as_it_is_well() -> None:
    roster = with_members((ONE, A), (TWO, A))
    assert shown(roster) == [(A, ONE, "up")]
    roster.failed(ONE, "It fell silent.", 1.0)
    assert shown(roster) == [(A, TWO, "up")]
    roster.welcomed(ONE, A, "1.0", 0.001, 2.0)
    assert shown(roster) == [(A, TWO, "up")], "it does not go back and forth"


def test_an_address_that_belongs_to_another_node_now() -> None:
    roster = with_members((ONE, A))
    roster.refused(ONE, "It is another.", 5.0)
    assert roster.greet(5.0) == [ONE], "who is there is asked at once"
    roster.welcomed(ONE, B, "1.0", 0.001, 5.1)
    assert shown(roster) == [(B, ONE, "up")]
    assert roster.address_of(A) is None
    roster.answered(ONE, A, 0.001, 5.2)
    assert shown(roster) == [(B, ONE, "up")], "a late answer of the node before"


def test_what_discovery_does_not_name_any_more_stays_while_it_answers() -> None:
    roster = with_members((ONE, A), (TWO, B))
    roster.found(frozenset({TWO}), 1.0)
    assert roster.greet(1.0) == [ONE], "does it?"
    roster.welcomed(ONE, A, "1.0", 0.001, 1.1)
    assert shown(roster) == [(A, ONE, "up"), (B, TWO, "up")]
    roster.failed(ONE, "It is gone.", 7.0)
    assert shown(roster) == [(B, TWO, "up")]
    roster.failed(TWO, "It fell silent.", 8.0)
    roster.found(frozenset(), 9.0)
    assert shown(roster) == []
    roster.welcomed(TWO, B, "1.0", 0.001, 9.1)
    roster.failed(TWO, "", 9.2)
    roster.refused(TWO, "", 9.3)
    assert shown(roster) == [], "who is not known is nobody"


def test_one_that_says_hello_and_nothing_else_is_left_alone_for_longer_and_longer() -> None:
    roster = with_members((ONE, A))
    now, tries = 0.0, []
    while now < 300.0:
        now += 0.25
        if roster.greet(now) == [ONE]:
            tries.append(now)
            roster.welcomed(ONE, A, "1.0", 0.001, now)
            roster.refused(ONE, "It lies.", now + 0.1)
            assert shown(roster) == [(A, ONE, "refused")]
            assert not roster.is_member(A)
    assert 10 <= len(tries) <= 25
    assert tries[-1] - tries[-2] > 20


def test_with_other_keys_the_refused_are_asked_at_once() -> None:
    roster = with_members((ONE, A))
    for now in (1.0, 2.0, 3.0, 4.0):
        roster.refused(ONE, "Its key is another.", now)
    assert roster.greet(5.0) == []
    roster.look_at_refused(5.0)
    assert roster.greet(5.0) == [ONE]


def test_doubt_brings_a_greeting_forward() -> None:
    roster = with_members((ONE, A))
    assert roster.greet(1.0) == []
    roster.look(ONE, 1.0)
    roster.look(TWO, 1.0)
    assert roster.greet(1.0) == [ONE]
    assert roster.greet(1.1) == []


def test_only_what_can_be_seen_counts_as_a_change() -> None:
    roster = with_members((ONE, A))
    before = roster.revision
    roster.welcomed(ONE, A, "1.0", 0.5, 1.0)
    roster.answered(ONE, A, 0.7, 2.0)
    assert roster.revision == before
    assert roster.members()[0].rtt_s == 0.7
    roster.welcomed(ONE, A, "1.1", 0.5, 3.0)
    assert roster.revision > before
    assert roster.members()[0].since == 0.0, "it was up all the time"


def test_what_others_say_is_made_fit_for_a_terminal() -> None:
    roster = with_members((ONE, A))
    roster.welcomed(ONE, A, "1.0\x1b[31m" + "x" * 500, 0.1, 1.0)
    roster.failed(ONE, "It \n said \x07 \udcff" + "y" * 500, 1.0)
    member = roster.members()[0]
    assert member.version.isprintable()
    assert len(member.version) == module.VERSION_CHARACTERS_MAX
    assert member.problem.isprintable()
    assert len(member.problem) == module.PROBLEM_CHARACTERS_MAX


def test_it_keeps_no_more_addresses_than_its_bound() -> None:
    roster = Roster(ME)
    assert roster.found(frozenset(f"10.0.{n // 250}.{n % 250}:1" for n in range(ADDRESSES_MAX + 7)), 0.0) == 7
    assert len(roster.members()) == ADDRESSES_MAX


@pytest.mark.parametrize("count", [0, 1, 256, 257, 3000])
@pytest.mark.parametrize("problem", ["", "é" * 200])
def test_pages_fit_into_messages(count: int, problem: str) -> None:
    members = [
        Member(f"{n:016x}", f"[fe80::{n:x}]:9402", "suspect", 1e9 + n, 0.1, "v" * 32, problem) for n in range(count)
    ]
    told = list(pages(members, BODY_BYTES_MAX, 256))
    assert [member for _, page in told for member in page] == members
    assert [first for first, _ in told] == [sum(len(page) for _, page in told[:at]) for at in range(len(told))]
    assert told[0][0] == 0
    for first, page in told:
        assert len(page) <= 256
        assert len(encode(Members(0, page, first, count))) <= MESSAGE_BYTES_MAX


# Thousands -----------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """Nodes that come, go, crash, move and fall silent, and how a greeting goes with each."""

    seed: int
    nodes: dict[str, str] = field(default_factory=dict)
    """Address to node, of those that answer."""
    named: set[str] = field(default_factory=set)
    at: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def start(self, count: int) -> None:
        for _ in range(count):
            self.at += 1
            address = f"10.{self.at >> 16}.{self.at >> 8 & 255}.{self.at & 255}:9402"
            self.nodes[address] = f"{self.at:016x}"
            self.named.add(address)

    def churn(self) -> None:
        """A few things happen."""
        for _ in range(self.random.randrange(4)):
            address = self.random.choice(sorted(self.nodes))
            match self.random.randrange(5):
                case 0:  # a crash
                    del self.nodes[address]
                case 1:  # a node that leaves in order
                    del self.nodes[address]
                    self.named.discard(address)
                case 2:  # another node gets the address
                    self.at += 1
                    self.nodes[address] = f"{self.at:016x}"
                case 3:  # the node gets another address
                    node = self.nodes.pop(address)
                    self.named.discard(address)
                    self.at += 1
                    moved = f"10.200.{self.at >> 8 & 255}.{self.at & 255}:9402"
                    self.nodes[moved] = node
                    self.named.add(moved)
                case _:
                    self.start(1)


@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_members_that_come_and_go(seed: int) -> None:
    """With work that is bounded per second, and in the end exactly those are up that are."""
    world, roster = World(seed), Roster(ME)
    world.start(2000)
    roster.found(frozenset(world.named), 0.0)
    due: deque[tuple[float, str]] = deque()
    now, greeted, by_second = 0.0, 0, list[int]()
    while now < 420.0:
        if due and due[0][0] <= now:
            _, address = due.popleft()
            node = world.nodes.get(address)
            if node is None:
                roster.failed(address, "It does not answer.", now)
            elif world.random.random() < 0.01 and now < 300.0:
                roster.refused(address, "It was wrong.", now)
            else:
                roster.welcomed(address, node, "1.0", 0.001, now)
            continue
        chosen = roster.greet(now)
        assert len(chosen) <= GREETS_AT_ONCE
        greeted += len(chosen)
        due.extend((now + 0.5, address) for address in chosen)
        wait = max(roster.wait_s(now), 0.001)
        now += min(wait, 0.5, max(due[0][0] - now, 0.001) if due else 0.5)
        if int(now) > len(by_second):
            by_second.append(greeted)
            greeted = 0
            if now < 300.0:
                world.churn()
                roster.found(frozenset(world.named), now)
            members = roster.members()
            nodes = [member.node for member in members if member.node]
            assert len(nodes) == len(set(nodes)), "a node is one member"
            assert len({member.address for member in members}) == len(members)
    assert max(by_second) <= GREETS_PER_SECOND + GREETS_AT_ONCE
    assert set(roster.up()) == set(world.nodes.values())
    assert {member.address for member in roster.members() if member.state != "up"} == world.named - set(world.nodes)
    assert len(roster._line) < 3 * len(world.nodes)


def test_few_members_are_greeted_every_five_seconds() -> None:
    roster = with_members(*((f"10.0.0.{n}:1", f"{n:016x}") for n in range(1, 41)))
    last = dict.fromkeys(roster.up().values(), 0.0)
    now = 0.0
    while now < 60.0:
        now += 0.05
        for address in roster.greet(now):
            assert GREET_SECONDS * 0.85 <= now - last[address] <= GREET_SECONDS * 1.3
            last[address] = now
            roster.welcomed(address, _node(roster, address), "1.0", 0.001, now)
    assert min(last.values()) > 50.0


def _node(roster: Roster, address: str) -> str:
    return next(node for node, at in roster.up().items() if at == address)


def test_a_node_that_asks_us_is_greeted_at_its_host_before_its_pause_is_over() -> None:
    roster = Roster(ME)
    roster.found(frozenset({ONE, TWO}), 0.0)
    now = 0.0
    for _ in range(8):  # long pauses by now
        for address in roster.greet(now):
            roster.failed(address, "It takes no connection.", now)
        now += 40.0
    for address in roster.greet(now):
        roster.failed(address, "It takes no connection.", now)
    assert roster.greet(now + 0.1) == []
    roster.heard(A, ONE.rpartition(":")[0], now + 0.2)
    assert roster.greet(now + 0.2) == [ONE]
    roster.welcomed(ONE, A, "1.0", 0.002, now + 0.3)
    roster.heard(A, ONE.rpartition(":")[0], now + 0.4)
    assert roster.greet(now + 0.4) == []
