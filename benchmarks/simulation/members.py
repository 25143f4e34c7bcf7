"""What a node knows of the others, found out as its peer process does: who answers, and who has what. Here and only here."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.simulation.node import Node

POLL_SECONDS = 1.0
POLLED_MAX = 16
"""Members that are asked what they have, each time."""

SUSPECT_SECONDS = 1.0
"""A member that does not answer for so long is suspect: not asked, but it keeps what it owns."""

MISSES = 3
"""In a row, and it is no member any more, until it answers."""

PROBE_SECONDS_MAX = 30.0
"""How seldom a lost member is asked again in the end; after SUSPECT_SECONDS at first, then half as often each time."""


class Members:
    """Of `node`, for the length of one life of it. `chance` chooses whom to ask."""

    def __init__(self, node: Node, chance: random.Random) -> None:
        self._node = node
        self._chance = chance
        self._choice = node.choice
        self._polling = False
        self._missing: set[str] = set()  # those that did not answer the last time
        self._rates: dict[str, float] = {}  # what comes from the origin to each, bytes per second

    def reaches(self, other: Node) -> bool:
        return other.up and not self._node.swarm.apart(self._node.place, other.place)

    def follow(self) -> None:
        """What is of interest has changed: they are asked at once, and once a second from then on."""
        self._choice.follow(map(str, self._node.opened), self._node.swarm.clock.now)
        self._ask()
        if not self._polling:
            self._polling = True
            self._node.swarm.clock.after(POLL_SECONDS, self._poll)

    def _poll(self) -> None:
        node = self._node
        if node.members is not self:
            return
        for blob in [blob for blob in node.opened if node.cache.complete(blob)]:
            del node.opened[blob]
        self._choice.follow(map(str, node.opened), node.swarm.clock.now)
        self._polling = bool(node.opened)
        if self._polling:
            self._ask()
            node.stir()
            node.swarm.clock.after(POLL_SECONDS, self._poll)

    def _ask(self) -> None:
        node, swarm, choice = self._node, self._node.swarm, self._choice
        others = len(swarm.nodes) - 1
        places = range(others) if others <= POLLED_MAX else self._chance.sample(range(others), POLLED_MAX)
        for place in places:
            other = swarm.nodes[place + (place >= node.place)]
            if other.name in choice.hidden or other.name in self._missing:
                continue
            if not self.reaches(other):
                self._missing.add(other.name)
                silent = other.silent or swarm.apart(node.place, other.place)
                swarm.clock.after(SUSPECT_SECONDS if silent else 0.0, self._miss, other, 1)
                continue
            for blob in node.opened:
                choice.presence(other.name, str(blob), other.cache.bitmap(blob))
            node.pausing_until = max(node.pausing_until, other.pausing_until)
            self._rates[other.name] = other.origin_meter.rate(swarm.clock.now)
        node.pacer.elsewhere = sum(self._rates.values())

    def _miss(self, other: Node, misses: int) -> None:
        """`other` has not answered `misses` times."""
        node, choice = self._node, self._choice
        if node.members is not self:
            return
        if self.reaches(other):
            self._missing.discard(other.name)
            choice.suspect(other.name, False)
            choice.show(other.name)
            self.share()
            node.stir()
            return
        if misses < MISSES:
            choice.suspect(other.name, True)
        else:
            choice.hide(other.name)
            self._rates.pop(other.name, None)
            self.share()
        if not node.cache.all:
            pause_s = min(SUSPECT_SECONDS * 2 ** max(0, misses - MISSES), PROBE_SECONDS_MAX)
            node.swarm.clock.after(pause_s, self._miss, other, misses + 1)

    def share(self) -> None:
        """The origin's connections are for all."""
        self._node.pacer.share(1 + self._choice.others)
