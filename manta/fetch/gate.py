"""Which missing chunks can be ordered now, and from whom: what the scheduler asks where there are other nodes. Here and only here.

Pure but for the clock it is given: `manta.swarm.choice` knows the members, `Origin` (below) the way to the origin. Used by
`manta.fetch.scheduler` (which chunk next) and `manta.fetch.fetcher` (where from), in the daemon's trio thread.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from manta.fetch.scheduler import BLOCKED_MAX, Priority
from manta.model.ids import BlobId
from manta.swarm.choice import Choice, FromOrigin, NotNow, Peer, Source
from manta.swarm.ownership import score

ORDERS_MAX = 64
"""Blobs whose order of background work is kept."""


class Origin(Protocol):
    """What the fetcher knows of the way to the origin."""

    def reachable(self, blob: BlobId, now: float) -> bool:
        """Whether the origin of the blob's bytes could be asked now, as far as is known."""
        ...

    def ready(self, blob: BlobId) -> bool:
        """Whether an order may go there: False while it is being asked where the bytes are."""
        ...

    def alone(self, blob: BlobId) -> bool:
        """Whether the blob may come from the origin only: what other nodes gave of it was wrong."""
        ...

    def missing(self, blob: BlobId) -> list[int]:
        """The chunks that are not in the cache."""
        ...

    def lacks(self, blob: BlobId, chunk: int) -> bool:
        """Whether the chunk is not in the cache."""
        ...

    def generation(self, blob: BlobId) -> int:
        """Another number whenever chunks that were in the cache are not any more."""
        ...


@dataclass(slots=True)
class _Plan:
    """In which order all of a blob comes: what this node owns first, so that nodes that start together each get another part from the
    origin; then the rest, each node beginning elsewhere."""

    epoch: tuple[int, int]
    """Of the members, and of the blob: what it was made from."""
    own: list[int]
    others: list[int]


class SwarmGate:
    """A `scheduler.Gate`. `take` is what the fetcher calls for a chunk that was taken; `clock` is the scheduler's."""

    def __init__(self, choice: Choice, origin: Origin, clock: Callable[[], float], rate: int = 0) -> None:
        """`rate` is how many bytes per second may come from other nodes; 0 is no limit."""
        self._choice = choice
        self._origin = origin
        self._clock = clock
        self._rate = rate
        self._credit = 0.0
        self._credited = float("-inf")
        self._plans: OrderedDict[BlobId, _Plan] = OrderedDict()
        self.behalf: Counter[tuple[BlobId, int]] = Counter()
        """Chunks that other members want us to fetch, and how often: they must not be sent on to a third."""
        self.blocked: Priority | None = None
        """The most urgent of what was held back, though only time may change that, since this was last set to None: ask again soon."""

    def closed(self, blob: BlobId) -> None:
        """Nothing of the blob is wanted any more; when it is next, its cache file may be another."""
        self._plans.pop(blob, None)

    def source(self, blob: BlobId, chunk: int, priority: Priority) -> Source:
        """Where the chunk is to come from, if it goes now."""
        if self._origin.alone(blob):
            return FromOrigin()
        now = self._clock()
        chosen = self._choice.choose(
            str(blob),
            chunk,
            now,
            urgent=priority is Priority.DEMAND,
            origin=self._origin.reachable(blob, now),
            behalf=(blob, chunk) in self.behalf,
        )
        if isinstance(chosen, Peer) and not self._may_spend(now):
            return NotNow()
        return chosen

    # scheduler.Gate --------------------------------------------------------------------------------------------------

    def admits(self, blob: BlobId, chunk: int, priority: Priority, *, connection: bool) -> bool:
        match self.source(blob, chunk, priority):
            case Peer():
                return True
            case FromOrigin():
                if not (connection and self._origin.ready(blob)):
                    return False  # what ends that has the fetcher look again
                # A reader hears why it cannot be asked; what nobody waits for can wait until it can.
                if priority is Priority.DEMAND or self._origin.reachable(blob, self._clock()):
                    return True
        self.blocked = priority if self.blocked is None else min(priority, self.blocked)
        return False

    def next_missing(self, blob: BlobId, free: Callable[[int], bool], *, connection: bool) -> int | None:
        full = self._choice.full  # what is on the way ends first: no need to find out who has the others
        if full and not connection:
            return None
        plan = self._plan(blob)
        for chunks in (plan.own,) if full else (plan.own, plan.others):
            if (found := self._first(blob, chunks, free, connection)) is not None:
                return found
        return None

    def _first(self, blob: BlobId, chunks: list[int], free: Callable[[int], bool], connection: bool) -> int | None:
        looked = passed = 0
        for at, chunk in enumerate(chunks):
            if not self._origin.lacks(blob, chunk):
                passed += 1
            elif free(chunk):
                if self.admits(blob, chunk, Priority.FILL, connection=connection):
                    return chunk
                looked += 1
                if looked >= BLOCKED_MAX and not connection:
                    break  # they wait for one, in their order
                if looked >= BLOCKED_MAX:
                    # The next look begins behind these: they must not hide one that somebody has.
                    chunks[:] = chunks[at + 1 :] + chunks[: at + 1]
                    break
        if passed:
            chunks[:] = [chunk for chunk in chunks if self._origin.lacks(blob, chunk)]
        return None

    def _plan(self, blob: BlobId) -> _Plan:
        plan = self._plans.get(blob)
        epoch = self._choice.epoch, self._origin.generation(blob)
        if plan is None or plan.epoch != epoch or not (plan.own or plan.others):
            missing = self._origin.missing(blob)
            own = self._choice.owned(str(blob), missing)
            mine = set(own)
            rest = [chunk for chunk in missing if chunk not in mine]
            at = score(self._choice.me, str(blob)) % len(rest) if rest else 0
            plan = self._plans[blob] = _Plan(epoch, own, rest[at:] + rest[:at])
        self._plans.move_to_end(blob)
        if len(self._plans) > ORDERS_MAX:
            self._plans.popitem(last=False)
        return plan

    # The rate --------------------------------------------------------------------------------------------------------

    def spend(self, count: int) -> None:
        """So many bytes are ordered from another node; less than 0: they did not come."""
        self._credit -= count

    def _may_spend(self, now: float) -> bool:
        """Whether the rate lets another chunk come. It may be ahead by one chunk, and saves up a tenth of a second."""
        if not self._rate:
            return True
        elapsed = min(now - self._credited, 60.0)
        self._credit = min(self._credit + elapsed * self._rate, self._rate / 10)
        self._credited = now
        return self._credit >= 0
