"""Which chunk to fetch next. Pure: no clock of its own, no I/O; `manta.fetch.fetcher` drives it and a simulation does.

Wants come in four priorities. Blobs of equal priority take turns, and so do the groups that they belong to (a group is one mounted
snapshot): neither a file nor a mount with a thousand files can starve another. A blob is skipped while it is on hold (its location is
being asked for, or its origin wants a pause). A blob of which nothing is wanted or under way leaves no trace here, whatever had been
asked of it.

One stalled transfer holds nobody else up: an order from which nothing comes is *silent* and does not count against the connections, and
every blob may have one order for a reader beyond them.

Where there are other nodes a `Gate` says which chunks can come from one of them now. Those do not count against the connections either,
and what nobody has time for stays wanted, while others go.
"""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

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

DEMAND_ORDERS_MAX = 3
"""Orders for readers, as a multiple of the connections: one part that moves, one for the blobs that have none, one of silent ones."""

OTHER_ORDERS_MAX = 2
"""Orders for readahead and background work, as a multiple of the connections: as many silent ones as others."""


BLOCKED_MAX = 32
BLOCKED_BLOBS_MAX = 16
"""Chunks of a blob, and blobs, that are passed over in one look because nobody has time for them now. The next look begins behind them."""


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

    @property
    def key(self) -> tuple[BlobId, int]:
        return self.blob, self.chunk


class Gate(Protocol):
    """What other nodes can give. Each answer holds for this moment; `connection` says whether the origin could be asked."""

    def admits(self, blob: BlobId, chunk: int, priority: Priority, *, connection: bool) -> bool:
        """Whether the chunk may be ordered, from wherever."""
        ...

    def next_missing(self, blob: BlobId, free: Callable[[int], bool], *, connection: bool) -> int | None:
        """The chunk that is to come next where all of `blob` is wanted: one that is missing, `free` and admitted."""
        ...


_Part = tuple[int, int]
"""`first` and `upto` of a want."""

_Window = OrderedDict[int, _Part]
"""What one reader will want soon, by chunk."""

_FAILED = object()
"""The owner of readahead that is to be fetched again: whose window it was is forgotten by then."""


@dataclass(slots=True)
class _Queues:
    """What is wanted of one blob and not under way."""

    group: Hashable
    demand: _Window = field(default_factory=OrderedDict)
    ahead: OrderedDict[Hashable, _Window] = field(default_factory=OrderedDict)  # by reader, the next in turn first
    rest: OrderedDict[int, None] = field(default_factory=OrderedDict)  # chunks of which a reader has had a part: FILL
    resting: set[int] = field(default_factory=set)  # those of them that are under way
    whole: Priority | None = None  # PREFETCH or FILL: every chunk that is missing
    cursor: int = 0  # where to look for the next missing one
    running: set[int] = field(default_factory=set)
    pausing: dict[int, Want] = field(default_factory=dict)  # not to be ordered for a while after a failure
    raised: dict[int, _Part] = field(default_factory=dict)
    """Chunks under way or pausing that a reader waits for: if the order comes to nothing, they are wanted at DEMAND."""

    def has(self, priority: Priority) -> bool:
        """Whether something may be wanted at `priority`."""
        match priority:
            case Priority.DEMAND:
                return bool(self.demand)
            case Priority.READAHEAD:
                return bool(self.ahead)
            case Priority.PREFETCH:
                return self.whole is Priority.PREFETCH
            case Priority.FILL:
                return self.whole is Priority.FILL or bool(self.rest)

    def free(self, chunk: int) -> bool:
        """Whether `chunk` may be ordered."""
        return chunk not in self.running and chunk not in self.pausing

    @property
    def idle(self) -> bool:
        return not (self.running or self.pausing or any(map(self.has, Priority)))


class _Rotation:
    """Blobs in turn: group after group, and blob after blob within a group. Iteration goes from the next in turn to the last."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, OrderedDict[BlobId, None]] = OrderedDict()

    def __iter__(self) -> Iterator[BlobId]:
        return itertools.chain.from_iterable(self._groups.values())

    def add(self, group: Hashable, blob: BlobId) -> None:
        self._groups.setdefault(group, OrderedDict()).setdefault(blob)

    def discard(self, group: Hashable, blob: BlobId) -> None:
        if (blobs := self._groups.get(group)) is not None:
            blobs.pop(blob, None)
            if not blobs:
                del self._groups[group]

    def served(self, group: Hashable, blob: BlobId) -> None:
        """It was `blob`'s turn."""
        self._groups[group].move_to_end(blob)
        self._groups.move_to_end(group)


class Scheduler:
    """`connections()` is how many may be in use now (at least 1). `missing(blob, from_chunk)` names the first chunk at or after
    `from_chunk` that is not in the cache, or None. `group(blob)` names the group that it takes turns in. `gate` None: there is only the
    origin."""

    def __init__(
        self,
        connections: Callable[[], int],
        missing: Callable[[BlobId, int], int | None],
        group: Callable[[BlobId], Hashable] = lambda _blob: None,
        gate: Gate | None = None,
    ) -> None:
        self._gate = gate
        self._connections = connections
        self._missing = missing
        self._group = group
        self._blobs: dict[BlobId, _Queues] = {}
        self._ready = {priority: _Rotation() for priority in Priority}  # of blobs not on hold; may name some in vain
        self._running: dict[tuple[BlobId, int], Priority] = {}
        self._silent: frozenset[tuple[BlobId, int]] = frozenset()
        self._beside: set[tuple[BlobId, int]] = set()  # of what is under way: what comes from other nodes
        self._holds: dict[BlobId, float] = {}  # until when
        self._hold_ends: list[tuple[float, int, BlobId]] = []  # a heap; what is not in `_holds` with that end is over
        self._pausing: list[tuple[float, int, Want]] = []  # a heap of chunks that failed
        self._serial = itertools.count()
        self._demand_seen = float("-inf")
        self._idle_share = 1 - 1 / BACKGROUND_BESIDE_DEMAND

    # What is wanted ------------------------------------------------------------------------------------------------

    def demand(self, blob: BlobId, chunk: int, first: int, upto: int = 0) -> None:
        """A reader waits for `chunk`, see `Want`. One that is under way already is wanted again should that come to nothing."""
        queues = self._queues(blob)
        part = first, upto
        if not queues.free(chunk):
            queues.raised.setdefault(chunk, part)
            return
        if queues.demand.setdefault(chunk, part) != part:
            queues.demand[chunk] = queues.demand[chunk][0], 0  # two readers of two parts: all of it is soonest for both
        self._enlist(blob, queues)

    def want_rest(self, blob: BlobId, chunk: int) -> None:
        """A reader has had its part of `chunk`: the rest comes at FILL, before what nobody has asked for."""
        queues = self._queues(blob)
        queues.rest[chunk] = None
        self._enlist(blob, queues)

    def look_ahead(self, blob: BlobId, owner: Hashable, chunks: Iterable[tuple[int, int]]) -> None:
        """Replaces the window of one reader (`owner`) by `chunks` (chunk, first byte): what it wanted soon before is stale."""
        window: _Window = OrderedDict((chunk, (first, 0)) for chunk, first in chunks)
        if window:
            queues = self._queues(blob)
            queues.ahead[owner] = window
            self._enlist(blob, queues)
        elif (known := self._blobs.get(blob)) is not None:
            known.ahead.pop(owner, None)
            self._drop_if_idle(blob)

    def want_whole(self, blob: BlobId, priority: Priority) -> None:
        """Every missing chunk of `blob`, at PREFETCH or FILL; the higher of what was asked for stays."""
        queues = self._queues(blob)
        queues.whole = priority if queues.whole is None else min(priority, queues.whole)
        queues.cursor = 0
        self._enlist(blob, queues)

    def forget(self, blob: BlobId) -> None:
        """Nothing of `blob` is wanted any more; what is under way ends by itself."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.demand.clear()
            queues.ahead.clear()
            queues.raised.clear()
            queues.pausing.clear()
            self.unwant_whole(blob)

    def forget_chunk(self, blob: BlobId, chunk: int) -> None:
        """No reader wants `chunk` any more; what is under way ends by itself."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.demand.pop(chunk, None)
            queues.rest.pop(chunk, None)
            for window in queues.ahead.values():
                window.pop(chunk, None)
            for owner in [owner for owner, window in queues.ahead.items() if not window]:
                del queues.ahead[owner]
            self._drop_if_idle(blob)

    def demanded(self, blob: BlobId) -> list[int]:
        """The chunks of `blob` that readers wait for and that are not under way."""
        queues = self._blobs.get(blob)
        return [] if queues is None else list(queues.demand)

    def unwant_whole(self, blob: BlobId) -> None:
        """Background work on `blob` ends; readers' wants stay."""
        if (queues := self._blobs.get(blob)) is not None:
            queues.rest.clear()
            queues.resting.clear()
            queues.whole = None
            for chunk, want in list(queues.pausing.items()):
                if want.priority >= Priority.PREFETCH and chunk not in queues.raised:
                    del queues.pausing[chunk]
            self._drop_if_idle(blob)

    def _queues(self, blob: BlobId) -> _Queues:
        queues = self._blobs.get(blob)
        if queues is None:
            queues = self._blobs[blob] = _Queues(self._group(blob))
        return queues

    def _enlist(self, blob: BlobId, queues: _Queues) -> None:
        """Something may be wanted of `blob`: it takes turns."""
        if blob not in self._holds:
            for priority in Priority:
                if queues.has(priority):
                    self._ready[priority].add(queues.group, blob)

    # What may go ---------------------------------------------------------------------------------------------------

    def hold(self, blob: BlobId, until: float) -> None:
        """No order for `blob` before `until`; `release` ends it early. Use math.inf for "until released". The longest hold counts."""
        if until <= self._holds.get(blob, float("-inf")):
            return
        self._holds[blob] = until
        if until != float("inf"):
            heapq.heappush(self._hold_ends, (until, next(self._serial), blob))
        if (queues := self._blobs.get(blob)) is not None:
            self._strike_off(blob, queues)

    def release(self, blob: BlobId) -> None:
        if self._holds.pop(blob, None) is not None and (queues := self._blobs.get(blob)) is not None:
            self._enlist(blob, queues)

    def set_silent(self, orders: Collection[tuple[BlobId, int]]) -> None:
        """The orders under way, by `Want.key`, from which nothing has come for a while: others go beside them."""
        self._silent = frozenset(orders)

    def next(self, now: float, least: Priority | None = Priority.FILL) -> Want | None:
        """The next chunk to fetch, now counted as under way; None where nothing may go. `finished` or `again` must follow.

        Nothing less urgent than `least` goes; None: nothing at all. What may not go stays wanted.
        """
        self._end_waits(now)
        if least is None:
            return None
        limit = self._connections()
        asked = {key: p for key, p in self._running.items() if key not in self._beside}
        demands = sum(1 for p in asked.values() if p is Priority.DEMAND)
        if demands:
            self._demand_seen = now
        live = [p for key, p in asked.items() if key not in self._silent]
        live_demands = live.count(Priority.DEMAND)
        # Readers get connections of their own beyond those that readahead and background may have taken.
        room = demands < DEMAND_ORDERS_MAX * limit and live_demands < 2 * limit
        if (taken := self._take_turn(Priority.DEMAND, room, only_first=live_demands >= limit)) is not None:
            return taken
        if least < Priority.READAHEAD:
            return None
        room = len(live) - live_demands < limit and len(asked) - demands < OTHER_ORDERS_MAX * limit
        if (taken := self._take_turn(Priority.READAHEAD, room)) is not None:
            return taken
        quiet = now - self._demand_seen >= QUIET_SECONDS
        background = sum(1 for p in live if p >= Priority.PREFETCH)
        room = room and background < (limit if quiet else min(self._beside_demand, limit))
        for priority in (Priority.PREFETCH, Priority.FILL):
            if priority <= least and (taken := self._take_turn(priority, room)) is not None:
                return taken
        return None

    def _end_waits(self, now: float) -> None:
        """Ends the holds and the pauses whose time has come."""
        while self._hold_ends and self._hold_ends[0][0] <= now:
            until, _, blob = heapq.heappop(self._hold_ends)
            if self._holds.get(blob) == until:
                self.release(blob)
        while self._pausing and self._pausing[0][0] <= now:
            want = heapq.heappop(self._pausing)[2]
            queues = self._blobs.get(want.blob)
            if queues is not None and queues.pausing.get(want.chunk) is want:
                del queues.pausing[want.chunk]
                self._requeue(want)

    def _take_turn(self, priority: Priority, room: bool, *, only_first: bool = False) -> Want | None:
        """The want of the blob whose turn it is. `room`: the origin may be asked; with `only_first` for a blob that has no order for a
        reader there."""
        rotation, barren, taken, blocked = self._ready[priority], list[BlobId](), None, list[BlobId]()
        for blob in rotation if room or self._gate is not None else ():
            queues = self._blobs[blob]
            connection = room and not (only_first and self._asked_for_reader(blob, queues))
            if not connection and self._gate is None:
                continue
            if (taken := self._take(blob, queues, priority, connection)) is not None:
                rotation.served(queues.group, blob)
                self._begin(queues, taken)
                break
            if self._gate is None or not queues.has(priority):
                barren.append(blob)
                continue
            blocked.append(blob)
            if len(blocked) >= BLOCKED_BLOBS_MAX:
                break
        if len(blocked) >= BLOCKED_BLOBS_MAX:
            for blob in blocked:
                rotation.served(self._blobs[blob].group, blob)  # they must not hide one that may go
        for blob in barren:
            rotation.discard(self._blobs[blob].group, blob)
            self._drop_if_idle(blob)
        return taken

    def _asked_for_reader(self, blob: BlobId, queues: _Queues) -> bool:
        """Whether the origin is asked for something of `blob` that a reader waits for."""
        keys = ((blob, chunk) for chunk in queues.running)
        return any(self._running[key] is Priority.DEMAND and key not in self._beside for key in keys)

    def beside(self, want: Want) -> None:
        """`want`, which is under way, comes from another node."""
        self._beside.add(want.key)

    def learn(self, first_byte_s: float, seconds: float) -> None:
        """An order took `seconds`, of which `first_byte_s` passed before anything came."""
        if seconds > 0:
            share = min(first_byte_s / seconds, _IDLE_SHARE_MAX)
            self._idle_share += _LEARNING * (share - self._idle_share)

    @property
    def _beside_demand(self) -> int:
        """Connections for background work while readers wait: as many as it takes that one is always busy."""
        return round(1 / (1 - self._idle_share))

    def _begin(self, queues: _Queues, taken: Want) -> None:
        """Counts `taken` as under way. Background work may come to a chunk before the reader's turn: the reader's want is kept."""
        self._running[taken.key] = taken.priority
        queues.running.add(taken.chunk)
        queues.rest.pop(taken.chunk, None)
        if (part := queues.demand.pop(taken.chunk, None)) is not None:
            queues.raised[taken.chunk] = part

    def _take(self, blob: BlobId, queues: _Queues, priority: Priority, connection: bool) -> Want | None:
        """Takes out of the queues what is wanted first, is still missing and may go."""
        match priority:
            case Priority.DEMAND:
                chunk = self._first_of(blob, queues.demand, lambda _: True, priority, connection)
                return None if chunk is None else Want(blob, chunk, priority, *queues.demand.pop(chunk))
            case Priority.READAHEAD:
                return self._take_ahead(blob, queues, connection)
            case Priority.FILL:
                chunk = self._first_of(blob, queues.rest, queues.free, priority, connection)
                if chunk is not None:
                    del queues.rest[chunk]
                    queues.resting.add(chunk)
                    return Want(blob, chunk, priority, 0)
        return self._take_missing(blob, queues, priority, connection)

    def _first_of(
        self,
        blob: BlobId,
        window: OrderedDict[int, _Part] | OrderedDict[int, None],
        wanted: Callable[[int], bool],
        priority: Priority,
        connection: bool,
    ) -> int | None:
        """The first chunk of `window` that may go. Those before it that are not missing or `wanted` any more are dropped."""
        blocked = list[int]()
        for chunk in list(window):
            if self._missing(blob, chunk) != chunk or not wanted(chunk):
                del window[chunk]
            elif self._gate is None or self._gate.admits(blob, chunk, priority, connection=connection):
                return chunk
            else:
                blocked.append(chunk)
                if len(blocked) >= BLOCKED_MAX:
                    for passed in blocked:
                        window.move_to_end(passed)  # they must not hide one that may go
                    break
        return None

    def _take_ahead(self, blob: BlobId, queues: _Queues, connection: bool) -> Want | None:
        def wanted(chunk: int) -> bool:
            return queues.free(chunk) and chunk not in queues.demand

        for owner, window in list(queues.ahead.items()):
            chunk = self._first_of(blob, window, wanted, Priority.READAHEAD, connection)
            part = None if chunk is None else window.pop(chunk)
            if not window:
                del queues.ahead[owner]
            if chunk is not None and part is not None:
                if window:
                    queues.ahead.move_to_end(owner)  # the readers of one file take turns too
                return Want(blob, chunk, Priority.READAHEAD, *part)
        return None

    def _take_missing(self, blob: BlobId, queues: _Queues, priority: Priority, connection: bool) -> Want | None:
        if queues.whole is not priority:
            return None
        if self._gate is not None:
            if self._missing(blob, 0) is None:
                queues.whole = None  # complete
                return None
            elsewhere = self._gate.next_missing(blob, queues.free, connection=connection)
            return None if elsewhere is None else Want(blob, elsewhere, priority, 0)
        chunk = self._next_idle(blob, queues, queues.cursor)
        if chunk is None and queues.cursor > 0:
            chunk = self._next_idle(blob, queues, 0)  # what failed behind the cursor
        if chunk is None:
            if not (queues.running or queues.pausing):
                queues.whole = None  # complete
            return None
        queues.cursor = chunk + 1
        return Want(blob, chunk, priority, 0)

    def _next_idle(self, blob: BlobId, queues: _Queues, chunk: int) -> int | None:
        """The first missing chunk at or after `chunk` that is not under way."""
        found = self._missing(blob, chunk)
        while found is not None and not queues.free(found):
            found = self._missing(blob, found + 1)
        return found

    # What became of it -----------------------------------------------------------------------------------------------

    def finished(self, want: Want) -> None:
        """The order for `want` has ended, well or not; a chunk still missing must be wanted again by the caller."""
        self._running.pop(want.key, None)
        self._beside.discard(want.key)
        self._blobs[want.blob].running.discard(want.chunk)
        self._settle(want)

    def again(self, want: Want, after: float = 0.0) -> None:
        """`want` was taken by `next` and came to nothing: it is finished, and still wanted as before, or as it is since.

        Not before `after`, in the clock of `next`: until then nobody fetches the chunk, and the others of its blob go on.
        """
        self._running.pop(want.key, None)
        self._beside.discard(want.key)
        queues = self._blobs[want.blob]
        queues.running.discard(want.chunk)
        if after:
            queues.pausing[want.chunk] = want
            heapq.heappush(self._pausing, (after, next(self._serial), want))
        else:
            self._requeue(want)

    def _requeue(self, want: Want) -> None:
        queues = self._blobs[want.blob]
        raised = queues.raised.get(want.chunk)
        priority, part = want.priority, (want.first, want.upto)
        if raised is not None and priority is not Priority.DEMAND:
            priority, part = Priority.DEMAND, raised
        if priority is Priority.DEMAND:
            queues.demand[want.chunk] = part
            queues.demand.move_to_end(want.chunk, last=False)
        elif priority is Priority.READAHEAD:
            queues.ahead.setdefault(_FAILED, OrderedDict())[want.chunk] = part
            queues.ahead.move_to_end(_FAILED, last=False)
        elif want.chunk in queues.resting:
            queues.rest[want.chunk] = None
        else:
            # The scan comes to it again, as long as the whole blob is wanted.
            queues.cursor = min(queues.cursor, want.chunk)
        self._settle(want)

    def _settle(self, want: Want) -> None:
        queues = self._blobs[want.blob]
        queues.resting.discard(want.chunk)
        queues.raised.pop(want.chunk, None)
        self._enlist(want.blob, queues)
        self._drop_if_idle(want.blob)

    def next_change(self, now: float) -> float | None:
        """When a hold or a pause ends, after which something may go, in the clock of `now`; None where none has an end."""
        while self._hold_ends and self._holds.get(self._hold_ends[0][2]) != self._hold_ends[0][0]:
            heapq.heappop(self._hold_ends)  # released, or prolonged
        ends = [heap[0][0] for heap in (self._hold_ends, self._pausing) if heap and now < heap[0][0]]
        return min(ends, default=None)

    @property
    def under_way(self) -> int:
        """Orders under way."""
        return len(self._running)

    def wants(self, blob: BlobId) -> bool:
        """Whether anything of `blob` is under way, or wanted and missing."""
        queues = self._blobs.get(blob)
        if queues is not None and not (queues.running or queues.pausing):
            # What was wanted may have come otherwise.
            for window in (queues.demand, *queues.ahead.values()):
                for chunk in [c for c in window if self._missing(blob, c) != c]:
                    del window[chunk]
            for chunk in [c for c in queues.rest if self._missing(blob, c) != c]:
                del queues.rest[chunk]
            for owner in [o for o, ahead in queues.ahead.items() if not ahead]:
                del queues.ahead[owner]
            if queues.whole is not None and self._missing(blob, 0) is None:
                queues.whole = None
            self._drop_if_idle(blob)
        return blob in self._blobs

    def _drop_if_idle(self, blob: BlobId) -> None:
        queues = self._blobs.get(blob)
        if queues is not None and queues.idle:
            self._strike_off(blob, queues)
            del self._blobs[blob]

    def _strike_off(self, blob: BlobId, queues: _Queues) -> None:
        for rotation in self._ready.values():
            rotation.discard(queues.group, blob)
