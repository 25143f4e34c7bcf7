"""Which chunk to fetch next. Pure: no clock of its own, no I/O; `manta.fetch.fetcher` drives it and a simulation can.

Wants come in four priorities. Each blob has one queue per priority; blobs of equal priority take turns, so that one file cannot starve
another. A blob is skipped while it is on hold (its location is being asked for, or it is pausing after a failure); the whole origin can be
on hold too (429). A blob of which nothing is wanted or under way leaves no trace here, whatever had been asked of it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from manta.model.ids import BlobId

BACKGROUND_BESIDE_DEMAND = 2
"""Connections that background work keeps while readers wait, until something has been learned of the origin.

It must not take the link from them, and must not stop either: with slow readers a file would never be complete.
What is learned is the share of an order that passes before its first byte: one connection uses the rest. With 1 connection beside
random reads at 1 Gbit/s the reader has 0.94 of the link and with 2 it has 0.86; with 50 ms of latency 0.61 and 0.85 (2 GiB and 512 MiB).
"""

_LEARNING = 0.2  # weight of the newest order
_IDLE_SHARE_MAX = 0.9

QUIET_SECONDS = 0.5
"""How long after the last reader's wait background work takes all connections: a reader that jumps about waits again in milliseconds, and
would share the link with eight transfers that began in between."""


class Priority(enum.IntEnum):
    """Lower goes first."""

    DEMAND = 0
    """A reader waits for it."""
    READAHEAD = 1
    """A reader will want it soon."""
    PREFETCH = 2
    """A person asked for the whole file."""
    FILL = 3
    """The file was read from: complete it while nothing else is to do."""


@dataclass(frozen=True, slots=True)
class Want:
    """One chunk to fetch, from byte `first` of the blob on where that lies in the chunk: a reader waits for it.

    `upto` 0: all of it. Otherwise the reader wants no more than the bytes up to there now, and the rest of the chunk can come later.
    """

    blob: BlobId
    chunk: int
    priority: Priority
    first: int
    upto: int = 0


_Part = tuple[int, int]
"""`first` and `upto` of a want."""


@dataclass(slots=True)
class _Queues:
    """What is wanted of one blob and not under way."""

    wanted: tuple[OrderedDict[int, _Part], OrderedDict[int, _Part]] = field(
        default_factory=lambda: (OrderedDict(), OrderedDict())
    )  # DEMAND and READAHEAD, by chunk
    rest: OrderedDict[int, None] = field(default_factory=OrderedDict)  # chunks of which a reader has had a part: FILL
    resting: set[int] = field(default_factory=set)  # those of them that are under way
    whole: Priority | None = None  # PREFETCH or FILL: every chunk that is missing
    cursor: int = 0  # where to look for the next missing one
    running: set[int] = field(default_factory=set)
    raised: dict[int, _Part] = field(default_factory=dict)
    """Chunks under way that a reader waits for: if the order comes to nothing, they are wanted at DEMAND."""

    @property
    def idle(self) -> bool:
        return not (self.running or self.whole is not None or self.rest or any(self.wanted))


class Scheduler:
    """`missing(blob, from_chunk)` names the first chunk at or after `from_chunk` that is not in the cache, or None."""

    def __init__(self, connections: int, missing: Callable[[BlobId, int], int | None]) -> None:
        self._connections = connections
        self._missing = missing
        self._blobs: OrderedDict[BlobId, _Queues] = OrderedDict()  # in turn: the next to be served first
        self._running: dict[tuple[BlobId, int], Priority] = {}
        self._holds: dict[BlobId, float] = {}  # until when; those over are dropped by `next`
        self._origin_hold_until = 0.0
        self._demand_seen = float("-inf")
        self._idle_share = 1 - 1 / BACKGROUND_BESIDE_DEMAND

    # What is wanted ------------------------------------------------------------------------------------------------

    def want(self, blob: BlobId, chunk: int, priority: Priority, first: int, upto: int = 0) -> None:
        """Adds one chunk at DEMAND or READAHEAD, see `Want`; one that is under way or wanted already only rises in priority."""
        queues = self._blobs.setdefault(blob, _Queues())
        part = first, upto
        if chunk in queues.running:
            if priority is Priority.DEMAND:
                queues.raised.setdefault(chunk, part)
            return
        demand, ahead = queues.wanted
        if priority is Priority.DEMAND:
            ahead.pop(chunk, None)
            if demand.setdefault(chunk, part) != part:
                demand[chunk] = demand[chunk][0], 0  # two readers of two parts: all of it is soonest for both
        elif chunk not in demand:
            ahead.setdefault(chunk, part)

    def want_rest(self, blob: BlobId, chunk: int) -> None:
        """A reader has had its part of `chunk`: the rest comes at FILL, before what nobody has asked for."""
        self._blobs.setdefault(blob, _Queues()).rest[chunk] = None

    def look_ahead(self, blob: BlobId, chunks: Iterable[tuple[int, int]]) -> None:
        """Replaces the readahead wants of `blob` by `chunks` (chunk, first byte): what an earlier window wanted is stale."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.wanted[Priority.READAHEAD].clear()
        for chunk, first in chunks:
            self.want(blob, chunk, Priority.READAHEAD, first)
        self._drop_if_idle(blob)

    def want_whole(self, blob: BlobId, priority: Priority) -> None:
        """Every missing chunk of `blob`, at PREFETCH or FILL; the higher of what was asked for stays."""
        queues = self._blobs.setdefault(blob, _Queues())
        queues.whole = priority if queues.whole is None else min(priority, queues.whole)
        queues.cursor = 0

    def forget(self, blob: BlobId) -> None:
        """Nothing of `blob` is wanted any more; what is under way ends by itself."""
        if (queues := self._blobs.get(blob)) is not None:
            for wanted in queues.wanted:
                wanted.clear()
            queues.raised.clear()
            queues.rest.clear()
            queues.resting.clear()
            queues.whole = None
            self._drop_if_idle(blob)

    def unwant_whole(self, blob: BlobId) -> None:
        """Background work on `blob` ends; readers' wants stay."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.rest.clear()
            queues.resting.clear()
            queues.whole = None
            self._drop_if_idle(blob)

    # What may go ---------------------------------------------------------------------------------------------------

    def hold(self, blob: BlobId, until: float) -> None:
        """No order for `blob` before `until`; `release` ends it early. Use math.inf for "until released". The longest hold counts."""
        self._holds[blob] = max(until, self._holds.get(blob, 0.0))

    def release(self, blob: BlobId) -> None:
        self._holds.pop(blob, None)

    def hold_origin(self, until: float) -> None:
        """No order at all before `until`: the origin said so."""
        self._origin_hold_until = max(self._origin_hold_until, until)

    def next(self, now: float) -> Want | None:
        """The next chunk to fetch, now counted as under way; None where nothing may go. `finished` must follow."""
        for blob in [blob for blob, until in self._holds.items() if until <= now]:
            del self._holds[blob]
        if now < self._origin_hold_until:
            return None
        demands = sum(1 for p in self._running.values() if p is Priority.DEMAND)
        if demands:
            self._demand_seen = now
        quiet = now - self._demand_seen >= QUIET_SECONDS
        others = len(self._running) - demands
        background = sum(1 for p in self._running.values() if p >= Priority.PREFETCH)
        for priority in Priority:
            if priority is Priority.DEMAND:
                # Readers get connections of their own beyond those that readahead and background may have taken.
                room = demands < self._connections
            elif priority is Priority.READAHEAD:
                room = others < self._connections
            else:
                room = others < self._connections and background < (self._connections if quiet else self._beside_demand)
            if not room:
                continue
            for blob, queues in list(self._blobs.items()):
                if blob in self._holds:
                    continue
                taken = self._take(blob, queues, priority)
                if taken is not None:
                    self._blobs.move_to_end(blob)
                    self._begin(queues, taken)
                    return taken
                self._drop_if_idle(blob)
        return None

    def learn(self, first_byte_s: float, seconds: float) -> None:
        """An order took `seconds`, of which `first_byte_s` passed before anything came."""
        if seconds > 0:
            share = min(first_byte_s / seconds, _IDLE_SHARE_MAX)
            self._idle_share += _LEARNING * (share - self._idle_share)

    @property
    def _beside_demand(self) -> int:
        """Connections for background work while readers wait: as many as it takes that one is always busy."""
        return min(round(1 / (1 - self._idle_share)), self._connections)

    def _begin(self, queues: _Queues, taken: Want) -> None:
        """Counts `taken` as under way. Background work may come to a chunk before the reader's turn: the reader's want is kept."""
        self._running[taken.blob, taken.chunk] = taken.priority
        queues.running.add(taken.chunk)
        demand, ahead = queues.wanted
        ahead.pop(taken.chunk, None)
        queues.rest.pop(taken.chunk, None)
        if (part := demand.pop(taken.chunk, None)) is not None:
            queues.raised[taken.chunk] = part

    def _take(self, blob: BlobId, queues: _Queues, priority: Priority) -> Want | None:
        if priority <= Priority.READAHEAD:
            wanted = queues.wanted[priority]
            while wanted:
                wanted_chunk, part = wanted.popitem(last=False)
                if self._missing(blob, wanted_chunk) == wanted_chunk:
                    return Want(blob, wanted_chunk, priority, *part)
            return None
        while priority is Priority.FILL and queues.rest:
            rest, _ = queues.rest.popitem(last=False)
            if self._missing(blob, rest) == rest and rest not in queues.running:
                queues.resting.add(rest)
                return Want(blob, rest, priority, 0)
        if queues.whole is not priority:
            return None
        chunk = self._next_idle(blob, queues, queues.cursor)
        if chunk is None and queues.cursor > 0:
            chunk = self._next_idle(blob, queues, 0)  # what failed behind the cursor
        if chunk is None:
            if not queues.running:
                queues.whole = None  # complete
            return None
        queues.cursor = chunk + 1
        return Want(blob, chunk, priority, 0)

    def _next_idle(self, blob: BlobId, queues: _Queues, chunk: int) -> int | None:
        """The first missing chunk at or after `chunk` that is not under way."""
        found = self._missing(blob, chunk)
        while found is not None and found in queues.running:
            found = self._missing(blob, found + 1)
        return found

    def finished(self, want: Want) -> None:
        """The order for `want` has ended, well or not; a chunk still missing must be wanted again by the caller."""
        self._running.pop((want.blob, want.chunk), None)
        queues = self._blobs[want.blob]
        queues.running.discard(want.chunk)
        queues.resting.discard(want.chunk)
        queues.raised.pop(want.chunk, None)
        self._drop_if_idle(want.blob)

    def again(self, want: Want) -> None:
        """`want` was taken by `next` and came to nothing: it is finished, and still wanted as before, or as it is since."""
        queues = self._blobs[want.blob]
        raised = queues.raised.get(want.chunk)
        priority, part = want.priority, (want.first, want.upto)
        if raised is not None and priority is not Priority.DEMAND:
            priority, part = Priority.DEMAND, raised
        if priority <= Priority.READAHEAD:
            queue = queues.wanted[priority]
            queue[want.chunk] = part
            queue.move_to_end(want.chunk, last=False)
        elif want.chunk in queues.resting:
            queues.rest[want.chunk] = None
        # PREFETCH and FILL need no more: their scan comes to the chunk again, as long as the whole blob is wanted.
        self.finished(want)

    def next_change(self, now: float) -> float | None:
        """When a hold ends that keeps something from going, in the clock of `now`; None where no hold has an end."""
        ends = [until for blob, until in self._holds.items() if now < until and blob in self._blobs]
        if now < self._origin_hold_until:
            ends.append(self._origin_hold_until)
        finite = [end for end in ends if end != float("inf")]
        return min(finite, default=None)

    @property
    def under_way(self) -> int:
        return len(self._running)

    def wants(self, blob: BlobId) -> bool:
        """Whether anything of `blob` is under way, or wanted and missing."""
        queues = self._blobs.get(blob)
        if queues is not None and not queues.running:
            # What was wanted may have come otherwise.
            for wanted in queues.wanted:
                for chunk in [c for c in wanted if self._missing(blob, c) != c]:
                    del wanted[chunk]
            for chunk in [c for c in queues.rest if self._missing(blob, c) != c]:
                del queues.rest[chunk]
            if queues.whole is not None and self._missing(blob, 0) is None:
                queues.whole = None
            self._drop_if_idle(blob)
        return blob in self._blobs

    def _drop_if_idle(self, blob: BlobId) -> None:
        queues = self._blobs.get(blob)
        if queues is not None and queues.idle:
            del self._blobs[blob]
