"""benchmarks.simulation.roster: a choice whose tables are shared decides as the daemon's does."""

from __future__ import annotations

import random

import pytest

from benchmarks.simulation.roster import Roster, SharedChoice
from manta.swarm.choice import Choice, Peer

BLOB = "sha256-" + "0" * 64
CHUNKS = 40


@pytest.mark.parametrize("seed", range(12))
def test_the_same_calls_have_the_same_answers(seed: int) -> None:
    chance = random.Random(seed)
    names = [f"{chance.getrandbits(64):016x}" for _ in range(chance.choice([2, 5, 20]))]
    me = names[0]
    shared, plain = SharedChoice(me, 4, Roster(names)), Choice(me, 4)
    members = set(names[1:])
    plain.set_members(members)
    both = (shared, plain)
    for choice in both:
        choice.follow([BLOB], 0.0)
    under_way: list[tuple[str, int]] = []
    now = 0.0
    for _ in range(600):
        now += chance.random() * 0.3
        node, chunk, what = chance.choice(names[1:]), chance.randrange(CHUNKS), chance.randrange(8)
        if what == 0:
            members ^= {node}
            plain.set_members(members)
            (shared.show if node in members else shared.hide)(node)
        elif what == 1:
            have = bytes(chance.getrandbits(8) & chance.getrandbits(8) for _ in range(CHUNKS // 8))
            for choice in both:
                choice.presence(node, BLOB, have)
        elif what <= 5 or not under_way:
            asked = [choice.choose(BLOB, chunk, now, urgent=what == 2) for choice in both]
            assert asked[0] == asked[1]
            if isinstance(asked[0], Peer):
                under_way.append((asked[0].node, chunk))
                for choice in both:
                    choice.begin(asked[0].node)
        else:
            node, chunk = under_way.pop(chance.randrange(len(under_way)))
            outcome = chance.randrange(5)
            for choice in both:
                match outcome:
                    case 0:
                        choice.got(node, BLOB, chunk, 8 << 20, 0.5)
                    case 1:
                        choice.busy(node, BLOB, chunk, names[:3], now)
                    case 2:
                        choice.lacks(node, BLOB, chunk, now)
                    case 3:
                        choice.unable(node, BLOB, chunk, now)
                    case 4:
                        choice.failed(node, now)
        assert shared.in_flight == plain.in_flight
        assert shared.owned(BLOB, range(CHUNKS)) == plain.owned(BLOB, range(CHUNKS))
        assert shared.avoided(now) == [name for name in names if name in plain.avoided(now)]
