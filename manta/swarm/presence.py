"""Which members are asked what they have, and what of their answers is news; here and only here. Pure: driven by `manta.swarm.members`.

Once a round a few members are asked for the bitmaps of all followed blobs: each in its turn, so that with many members the whole swarm is
heard within members / MEMBERS_PER_ROUND rounds. What a member answered is remembered as a hash, and only what differs is told on. It is
forgotten when the member is not up any more: when it comes back, all of it is told again.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Collection, Iterable

from manta.errors import Invalid
from manta.model.extents import CHUNK_SIZE
from manta.swarm.protocol import ANSWER_BYTES_MAX, HAVE_BLOBS_MAX, Have
from manta.wire.peering import BODY_BYTES_MAX

MEMBERS_PER_ROUND = 16

TOLD_MAX = 65_536
"""Bitmaps whose hashes are remembered, about 120 bytes each. What is forgotten is told once more."""

PAUSES_MAX = 64
"""Of one answer: as many as origins' pauses are kept (`manta.fetch.throttle`)."""
PAUSE_SECONDS_MAX = 3600.0
ORIGIN_CHARACTERS_MAX = 300
RATE_MAX = 1e12

_BITMAPS_BYTES_MAX = ANSWER_BYTES_MAX // 2


def bitmap_bytes(size: int) -> int:
    """The length of the bitmap of a blob of `size` bytes."""
    return math.ceil(math.ceil(size / CHUNK_SIZE) / 8)


class Presences:
    """`seed` makes the order in which members are asked this node's own."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self._blobs: dict[str, int] = {}
        self._turns: list[str] = []
        self._told: OrderedDict[str, dict[str, int]] = OrderedDict()
        """Hashes of bitmaps, by node and blob; who answered last is last."""
        self._told_count = 0

    @property
    def following(self) -> bool:
        return bool(self._blobs)

    def follow(self, blobs: Iterable[tuple[str, int]]) -> bool:
        """These (id, size) from now on, the first HAVE_BLOBS_MAX. True where one of them is new.

        A blob whose bitmap would not fit into a message (3.6 TiB and more) is left out.
        """
        taken = {blob: size for blob, size in blobs if size > 0 and bitmap_bytes(size) <= BODY_BYTES_MAX - 1024}
        before = self._blobs
        self._blobs = dict(list(taken.items())[:HAVE_BLOBS_MAX])
        gone = {blob for blob, size in before.items() if self._blobs.get(blob) != size}
        for told in self._told.values() if gone else ():
            for blob in gone & told.keys():
                del told[blob]
                self._told_count -= 1
        return any(before.get(blob) != size for blob, size in self._blobs.items())

    def requests(self) -> list[list[tuple[str, int]]]:
        """What to ask a member, in as many requests as keep the answers within their bound: one, but for blobs of TiB."""
        batches: list[list[tuple[str, int]]] = []
        room = 0
        for blob, size in self._blobs.items():
            need = bitmap_bytes(size)
            if not batches or need > room:
                batches.append([])
                room = _BITMAPS_BYTES_MAX
            batches[-1].append((blob, size))
            room -= need
        return batches

    def whom(self, up: Collection[str]) -> list[str]:
        """The members to ask in this round: all that are up, or the next MEMBERS_PER_ROUND in an order that is shuffled when it ends."""
        for node in [node for node in self._told if node not in up]:
            self._told_count -= len(self._told.pop(node))
        if len(up) <= MEMBERS_PER_ROUND:
            return list(up)
        chosen: dict[str, None] = {}
        while len(chosen) < MEMBERS_PER_ROUND:
            if not self._turns:
                self._turns = sorted(up)
                self._random.shuffle(self._turns)
            if (node := self._turns.pop()) in up:
                chosen[node] = None
        return list(chosen)

    def news(self, node: str, asked: list[tuple[str, int]], have: Have) -> list[tuple[str, bytes]]:
        """The bitmaps of `have` that were not told yet. A blob that `node` does not know has one that is all zero.

        Raises Invalid where the answer is none to `asked`.
        """
        if have.node != node:
            raise Invalid("The answer names another node.")
        bitmaps: dict[str, bytes] = {}
        for blob, size in asked:
            length, chunks = bitmap_bytes(size), math.ceil(size / CHUNK_SIZE)
            bitmap = have.blobs.get(blob, bytes(length))
            if len(bitmap) != length:
                raise Invalid(f"The bitmap of a blob of {chunks} chunks has {len(bitmap)} bytes instead of {length}.")
            if spare := 8 * length - chunks:
                bitmap = bitmap[:-1] + bytes([bitmap[-1] & (0xFF >> spare)])
            bitmaps[blob] = bitmap
        told = self._told.setdefault(node, {})
        self._told.move_to_end(node)
        news = []
        for blob, bitmap in bitmaps.items():
            if self._blobs.get(blob) is None or told.get(blob) == hash(bitmap):
                continue
            self._told_count += blob not in told
            told[blob] = hash(bitmap)
            news.append((blob, bitmap))
        while self._told_count > TOLD_MAX:
            self._told_count -= len(self._told.popitem(last=False)[1])
        return news


def rate_of(have: Have) -> float:
    """What comes to a member from the origin, bytes per second; 0 for what no link carries."""
    return have.origin_rate if 0 <= have.origin_rate <= RATE_MAX else 0.0


def pauses_of(have: Have) -> dict[str, float]:
    """The pauses that a member tells of, without what cannot be one."""
    sane = {
        origin: min(seconds, PAUSE_SECONDS_MAX)
        for origin, seconds in have.pauses.items()
        if seconds > 0 and origin.isprintable() and len(origin) <= ORIGIN_CHARACTERS_MAX
    }
    return dict(list(sane.items())[:PAUSES_MAX])
