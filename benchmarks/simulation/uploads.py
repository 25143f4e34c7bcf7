"""What a node gives to others: its peer process in the simulation, here and only here. The slots and the recipients are Manta's own."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from manta.model.ids import BlobId
from manta.swarm.protocol import HOLD_SECONDS
from manta.swarm.slots import Recipients, Slots

if TYPE_CHECKING:
    from benchmarks.simulation.node import Node
    from benchmarks.simulation.order import Order


class Uploads:
    """Of `node`, for the length of one life of it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._swarm = node.swarm
        self._slots, self._recipients = Slots(node.swarm.policy.slots), Recipients()
        self._flowing: dict[Order, None] = {}
        self._waiting: defaultdict[tuple[BlobId, int], dict[Order, float]] = defaultdict(
            dict
        )  # by chunk, and since when
        self._free_at = 0.0  # when the peer process has answered all that came so far

    def ask(self, order: Order) -> None:
        """The request has come; it is answered in its turn."""
        if not self._here(order):
            return
        clock = self._swarm.clock
        self._free_at = max(self._free_at, clock.now) + self._swarm.weather.request_s
        clock.at(self._free_at, self._answer, order)

    def _here(self, order: Order) -> bool:
        """Whether the node is still the one that was asked; if not, the asker notices."""
        if order.over:
            return False
        if self._node.uploads is not self or not self._node.up:
            order.taker.unanswered(order)
            return False
        return True

    def _answer(self, order: Order) -> None:
        if not self._here(order):
            return
        node, want, clock = self._node, order.want, self._swarm.clock
        if node.cache.has(want.blob, want.chunk):
            if self._slots.acquire(order.taker.name):
                node.counts.slots_most = max(node.counts.slots_most, self._slots.busy)
                self._flowing[order] = None
                order.first = clock.now
                size = self._swarm.size_of(want)
                order.flow = self._swarm.carry(node.place, order.taker.place, size, float("inf"), self._given, order)
            else:
                holders = self._recipients.holders(str(want.blob), want.chunk, order.taker.name)
                clock.after(self._swarm.weather.latency_s, order.taker.refused, order, holders)
        elif order.pull:
            self._waiting[want.key][order] = clock.now
            node.fetch_for(order)
        else:
            clock.after(self._swarm.weather.latency_s, order.taker.lacking, order)

    def _given(self, order: Order) -> None:
        size = self._swarm.size_of(order.want)
        order.flow = None
        self._node.counts.to_peers += size
        self.give_back(order)
        self._recipients.given(str(order.want.blob), order.want.chunk, order.taker.name)
        order.taker.received(order)

    def hurry(self, order: Order) -> None:
        """A reader waits for `order` now."""
        if order in self._waiting.get(order.want.key, ()):
            self._node.fetch_for(order)

    def give_back(self, order: Order) -> None:
        """`order` needs no slot, and nobody waits for it."""
        if order in self._flowing:
            del self._flowing[order]
            self._slots.release(order.taker.name)
        if (
            (waiting := self._waiting.get(order.want.key)) is not None
            and waiting.pop(order, None) is not None
            and not waiting
        ):
            del self._waiting[order.want.key]
            self._node.fetches_for_nobody(order.want.key)

    def arrived(self, key: tuple[BlobId, int]) -> None:
        """The node has that chunk now: those who wait for it are answered. Each has asked again twice a second."""
        waiting = self._waiting.pop(key, {})
        now, cost = self._swarm.clock.now, self._swarm.weather.request_s
        for order, since in waiting.items():
            again = int((now - since) / HOLD_SECONDS)
            order.taker.counts.held += again
            self._free_at = max(self._free_at, now) + cost * (1 + min(again, 1))
            self._swarm.clock.at(self._free_at, self._answer, order)

    def cannot(self, key: tuple[BlobId, int], pause_s: float) -> None:
        """The origin did not give that chunk: those who wait for it are told."""
        for order in self._waiting.pop(key, {}):
            self._swarm.clock.after(self._swarm.weather.latency_s, order.taker.denied, order, pause_s)

    @property
    def open(self) -> list[Order]:
        """What flows or is waited for."""
        return [*self._flowing, *(order for orders in self._waiting.values() for order in orders)]
