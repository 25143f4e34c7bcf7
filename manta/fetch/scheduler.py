"""Which chunk to fetch next. Pure: no clock of its own, no I/O; `manta.fetch.fetcher` drives it and a simulation can.

Wants come in four priorities. Each blob has one queue per priority; blobs of equal priority take turns, so that one file cannot starve
another. A blob is skipped while it is on hold (its location is being asked for, or it is pausing after a failure); the whole origin can be
on hold too (429).
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from manta.model.ids import BlobId

BACKGROUND_BESIDE_DEMAND = 2
"""Connections that background work keeps while readers wait. It must not take the link from them, and must not stop either: with slow
readers a file would never be complete."""


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
    """One chunk to fetch, from byte `first` of the blob on where that lies in the chunk: a reader waits for it."""

    blob: BlobId
    chunk: int
    priority: Priority
    first: int


@dataclass(slots=True)
class _Queues:
    """What is wanted of one blob and not under way."""

    wanted: tuple[OrderedDict[int, int], OrderedDict[int, int]] = field(
        default_factory=lambda: (OrderedDict(), OrderedDict())
    )  # DEMAND and READAHEAD: chunk -> first byte
    whole: Priority | None = None  # PREFETCH or FILL: every chunk that is missing
    cursor: int = 0  # where to look for the next missing one
    running: set[int] = field(default_factory=set)
    hold_until: float = 0.0


class Scheduler:
    """`missing(blob, from_chunk)` names the first chunk at or after `from_chunk` that is not in the cache, or None."""

    def __init__(self, connections: int, missing: Callable[[BlobId, int], int | None]) -> None:
        self._connections = connections
        self._missing = missing
        self._blobs: OrderedDict[BlobId, _Queues] = OrderedDict()  # in turn: the next to be served first
        self._running: dict[tuple[BlobId, int], Priority] = {}
        self._origin_hold_until = 0.0

    # What is wanted ------------------------------------------------------------------------------------------------

    def want(self, blob: BlobId, chunk: int, priority: Priority, first: int) -> None:
        """Adds one chunk at DEMAND or READAHEAD; a chunk that is under way or wanted already only rises in priority."""
        queues = self._blobs.setdefault(blob, _Queues())
        if chunk in queues.running:
            return
        demand, ahead = queues.wanted
        if priority is Priority.DEMAND:
            ahead.pop(chunk, None)
            demand.setdefault(chunk, first)
        elif chunk not in demand:
            ahead.setdefault(chunk, first)

    def look_ahead(self, blob: BlobId, chunks: Iterable[tuple[int, int]]) -> None:
        """Replaces the readahead wants of `blob` by `chunks` (chunk, first byte): what an earlier window wanted is stale."""
        queues = self._blobs.setdefault(blob, _Queues())
        queues.wanted[Priority.READAHEAD].clear()
        for chunk, first in chunks:
            self.want(blob, chunk, Priority.READAHEAD, first)

    def want_whole(self, blob: BlobId, priority: Priority) -> None:
        """Every missing chunk of `blob`, at PREFETCH or FILL; the higher of what was asked for stays."""
        queues = self._blobs.setdefault(blob, _Queues())
        queues.whole = priority if queues.whole is None else min(priority, queues.whole)
        queues.cursor = 0

    def forget(self, blob: BlobId) -> None:
        """Nothing of `blob` is wanted any more; what is under way ends by itself."""
        queues = self._blobs.get(blob)
        if queues is not None:
            if queues.running:
                for wanted in queues.wanted:
                    wanted.clear()
                queues.whole = None
            else:
                del self._blobs[blob]

    def unwant_whole(self, blob: BlobId) -> None:
        """Background work on `blob` ends; readers' wants stay."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.whole = None

    # What may go ---------------------------------------------------------------------------------------------------

    def hold(self, blob: BlobId, until: float) -> None:
        """No order for `blob` before `until`; `release` ends it early. Use math.inf for "until released"."""
        self._blobs.setdefault(blob, _Queues()).hold_until = until

    def release(self, blob: BlobId) -> None:
        if (queues := self._blobs.get(blob)) is not None:
            queues.hold_until = 0.0

    def hold_origin(self, until: float) -> None:
        """No order at all before `until`: the origin said so."""
        self._origin_hold_until = max(self._origin_hold_until, until)

    def next(self, now: float) -> Want | None:
        """The next chunk to fetch, now counted as under way; None where nothing may go. `finished` must follow."""
        if now < self._origin_hold_until:
            return None
        demands = sum(1 for p in self._running.values() if p is Priority.DEMAND)
        others = len(self._running) - demands
        background = sum(1 for p in self._running.values() if p >= Priority.PREFETCH)
        for priority in Priority:
            if priority is Priority.DEMAND:
                # Readers get connections of their own beyond those that readahead and background may have taken.
                room = demands < self._connections
            elif priority is Priority.READAHEAD:
                room = others < self._connections
            else:
                room = others < self._connections and background < (
                    BACKGROUND_BESIDE_DEMAND if demands else self._connections
                )
            if not room:
                continue
            for blob, queues in self._blobs.items():
                if now < queues.hold_until:
                    continue
                taken = self._take(blob, queues, priority)
                if taken is not None:
                    self._blobs.move_to_end(blob)
                    queues.running.add(taken.chunk)
                    self._running[blob, taken.chunk] = priority
                    return taken
        return None

    def _take(self, blob: BlobId, queues: _Queues, priority: Priority) -> Want | None:
        if priority <= Priority.READAHEAD:
            wanted = queues.wanted[priority]
            while wanted:
                wanted_chunk, first = wanted.popitem(last=False)
                if self._missing(blob, wanted_chunk) == wanted_chunk and wanted_chunk not in queues.running:
                    return Want(blob, wanted_chunk, priority, first)
            return None
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
        if not (queues.running or queues.whole is not None or any(queues.wanted)):
            del self._blobs[want.blob]

    def again(self, want: Want) -> None:
        """`want` was taken by `next` and came to nothing: it is finished, and still wanted as before."""
        if want.priority <= Priority.READAHEAD:
            queue = self._blobs[want.blob].wanted[want.priority]
            queue[want.chunk] = want.first
            queue.move_to_end(want.chunk, last=False)
        # PREFETCH and FILL need no more: their scan comes to the chunk again, as long as the whole blob is wanted.
        self.finished(want)

    def next_change(self, now: float) -> float | None:
        """When a hold ends that keeps something from going, in the clock of `now`; None where no hold has an end."""
        ends = [q.hold_until for q in self._blobs.values() if now < q.hold_until]
        if now < self._origin_hold_until:
            ends.append(self._origin_hold_until)
        finite = [end for end in ends if end != float("inf")]
        return min(finite, default=None)

    @property
    def under_way(self) -> int:
        return len(self._running)

    def wants(self, blob: BlobId) -> bool:
        """Whether anything of `blob` is wanted or under way."""
        return blob in self._blobs
