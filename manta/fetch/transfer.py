"""One blob that is being read or fetched: what of it is there, who waits for which bytes. Here and only here.

Lives in the daemon's trio thread. It does no I/O and starts nothing: `manta.fetch.fetcher` does, and hears through `asked`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import trio

from manta.cache.store import Blob
from manta.errors import MantaError, Unavailable
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.sources import Sources
from manta.hub.circuit import PATIENCE_S
from manta.model.extents import Extent, ExtentSet
from manta.wire.messages import Reason

HEAD_START_BYTES = 256 * 1024
"""A reader that waits for bytes this close to a chunk's beginning gets them from a fetch of the whole chunk: at 1 Gbit/s the detour costs
2 ms, a second request for the chunk's beginning costs a round trip."""


PART_BYTES_MIN = 1024 * 1024
"""A reader that jumps about gets its bytes by a request of its own, and the chunk's rest comes when no reader waits. Less than this is not
worth the second request: 8 ms at 1 Gbit/s, as long as a near round trip. Measured at 1 Gbit/s, 512 MiB in random MiB by 1 and 2 threads:
0.86-0.93 of the link with whole chunks, 0.93-0.95 with parts."""


LATE_SECONDS = 0.05
"""For so long after a reader's time was over, and unless something has come, who asks next is told the same: the kernel asks for each page
once more by itself when its readahead has failed, and a program would wait twice as long as it was promised."""


@dataclass(eq=False, slots=True)
class _Waiter:
    extent: Extent | None  # None: the whole blob, and its seal
    since: float = field(default_factory=trio.current_time)
    woken: trio.Event = field(default_factory=trio.Event)
    error: MantaError | None = None


class Transfer:
    """Made by `Fetcher.open`, shared by everybody who uses the blob; each calls `close` once."""

    def __init__(self, blob: Blob, scheduler: Scheduler, asked: Callable[[Transfer], None], patience_s: float) -> None:
        self.blob = blob
        self.sources = Sources()
        self.users = 0
        self.quarantined = False
        """It had the wrong digest: nothing of it is served before all of it has come anew and matched."""
        self.misled = False
        """Bytes of it may have been served that were thrown away since: the kernel's page cache has them."""
        self.broken: MantaError | None = None
        """Set when fetching it anew is pointless; missing bytes are then answered with this."""
        self.sealed = trio.Event()
        self.digested = 0
        """Bytes from its start that the digest worker has digested."""
        self.generation = blob.generation
        """The blob's generation when that digest was begun."""
        self.settling = False
        """What a host crash put in doubt is being compared with its digests."""
        self.locating = False
        self.attempts: dict[int, Counter[Reason]] = {}
        """How often each chunk has failed in a row, by reason: three broken connections must not count against a URL that expires then."""
        self.came = 0
        """Bytes that have come for it, whatever became of them: tells slow from stuck."""
        self.watchers: dict[int, Callable[[], None]] = {}
        """By chunk under way: whom to tell that a reader waits for it."""
        self.trouble = ""
        """What went wrong last, as a clause or a sentence, until something comes: the reason of a reader whose patience ends."""
        self.outage: Callable[[float, list[int]], str] = lambda _since, _chunks: ""
        """Why these chunks cannot be had from anywhere, if that was known at a time: who began to wait after it does not wait long."""
        self.from_peers: dict[int, tuple[str, bytes]] = {}
        """By chunk: the node that gave it, and the digest that it had. Until the blob is verified."""
        self.paused_until = -math.inf
        """The origin asked for a pause until then (trio's clock): that nothing comes is no reason to give up."""
        self._refusal: tuple[MantaError, float] | None = None  # the hub's, and until when it is not asked again
        self._late: tuple[MantaError, float, int] | None = None
        """What a reader got whose time was over, until when others get it, and `came` then."""
        self._arrived: dict[int, ExtentSet] = {}  # bytes of chunks that are not complete
        self._waiters: set[_Waiter] = set()
        self._scheduler = scheduler
        self._asked = asked
        self._patience_s = patience_s
        if blob.sealed:
            self.sealed.set()

    # For readers -----------------------------------------------------------------------------------------------------

    def readable(self, extent: Extent) -> bool:
        """Whether all bytes of `extent` (within the blob) are in the cache file and may be served."""
        if self.quarantined:
            return False
        grid = self.blob.grid
        for chunk in self.blob.missing(extent):
            arrived, of_chunk = self._arrived.get(chunk), grid.extent(chunk)
            part = Extent(max(extent.start, of_chunk.start), min(extent.end, of_chunk.end))
            if arrived is None or not arrived.covers(part):
                return False
        return True

    async def ensure(self, extent: Extent, *, onward: bool = True) -> None:
        """Returns once `extent` (within the blob) is in the cache file, to be read before the next checkpoint.

        `onward`: the reader will read on, so the rest of each chunk is wanted as urgently.
        Raises what became of the fetch, or Unavailable when nothing came in time. Cancelling it cancels no fetch.
        """
        if self.readable(extent):
            return
        if self._late is not None:
            error, until, came = self._late
            if trio.current_time() < until and self.came == came:
                raise error
        waiter = _Waiter(extent)
        self._waiters.add(waiter)
        try:
            began = trio.current_time()
            while (left := began + self._patience_s - trio.current_time()) > 0:
                with trio.move_on_after(min(PATIENCE_S, left)):
                    await self._wait(waiter, extent, onward)
                    return
                if reason := self.outage(began, self.blob.missing(extent)):
                    raise Unavailable(f"{self.name} cannot be fetched while its origin is out of reach: {reason}")
            if self.quarantined:
                why = "it had the wrong digest, so nothing is given out before all has come anew and been verified"
            else:
                why = self.trouble or "the origin or the network is too slow or stuck"
            late = Unavailable(
                f"{self.name}: what was read did not come within {self._patience_s:g} s: {why.rstrip('.')}."
                " Try again, or look at `manta status`."
            )
            self._late = late, trio.current_time() + LATE_SECONDS, self.came
            raise late
        finally:
            self._waiters.discard(waiter)

    async def _wait(self, waiter: _Waiter, extent: Extent, onward: bool) -> None:
        while True:
            if self.broken is not None:
                raise self.broken
            if self._refusal is not None and trio.current_time() < self._refusal[1]:
                raise self._refusal[0]
            for chunk in self.blob.missing(extent):
                of_chunk = self.blob.grid.extent(chunk)
                first = max(extent.start, of_chunk.start)
                upto = 0 if onward else min(extent.end, of_chunk.end)
                self._scheduler.demand(self.blob.id, chunk, first, upto)
                if (watch := self.watchers.get(chunk)) is not None:
                    watch()
            if self.quarantined:
                self._scheduler.want_whole(self.blob.id, Priority.PREFETCH)
            self._asked(self)
            await waiter.woken.wait()
            if self.readable(extent):
                return
            if waiter.error is not None:
                raise waiter.error
            waiter.woken = trio.Event()

    async def supply(self, chunk: int, *, urgent: bool) -> None:
        """Returns once all of `chunk` is in the chunk map: for another node, whose reader waits for it or (not `urgent`) does not yet.

        Raises what became of the fetch, or Unavailable when nothing came in time.
        """
        of_chunk = self.blob.grid.extent(chunk)
        if urgent:
            await self.ensure(of_chunk)
        with trio.move_on_after(self._patience_s):
            while not self.blob.has(chunk):
                if self.broken is not None:
                    raise self.broken
                waiter = _Waiter(of_chunk)
                self._waiters.add(waiter)
                try:
                    self._scheduler.want_rest(self.blob.id, chunk)
                    self._asked(self)
                    # Asked for again now and then: the failure of another chunk ends all background work on the blob.
                    with trio.move_on_after(PATIENCE_S):
                        await waiter.woken.wait()
                finally:
                    self._waiters.discard(waiter)
                if waiter.error is not None:
                    raise waiter.error
            return
        why = self.trouble or "the origin or the network is too slow or stuck"
        raise Unavailable(f"{self.name}: chunk {chunk} did not come within {self._patience_s:g} s: {why.rstrip('.')}.")

    def look_ahead(self, owner: Hashable, chunks: range, beyond: Extent) -> None:
        """Has `chunks` fetched soon, instead of those before: the reader `owner`, who now reads `beyond`, will want them."""
        missing = [c for c in chunks if not self.blob.has(c)]
        self._scheduler.look_ahead(
            self.blob.id, owner, [(c, max(beyond.end, self.blob.grid.extent(c).start)) for c in missing]
        )
        if missing:
            self._asked(self)

    def leave(self, owner: Hashable) -> None:
        """The reader `owner` will want nothing any more."""
        self._scheduler.look_ahead(self.blob.id, owner, ())

    def want_whole(self, priority: Priority) -> None:
        """Has every missing chunk fetched, at PREFETCH or FILL."""
        if not self.blob.complete and self.broken is None:
            self._scheduler.want_whole(self.blob.id, priority)
            self._asked(self)

    async def complete(self) -> None:
        """Fetches all of it (PREFETCH) and returns when it is sealed. Raises what became of the fetch.

        It has no deadline of its own: it gives up when nothing has come for the reader's patience, unless the origin asked for that.
        Verifying what has come ends by the digest worker's deadlines.
        """
        while not self.sealed.is_set():
            if self.broken is not None:
                raise self.broken
            waiter = _Waiter(None)
            self._waiters.add(waiter)
            before, asked = self.came, trio.current_time()
            try:
                self.want_whole(Priority.PREFETCH)
                with trio.move_on_after(
                    PATIENCE_S if self.outage(asked, self.missing()) else self._patience_s
                ) as patience:
                    await waiter.woken.wait()
            finally:
                self._waiters.discard(waiter)
            if waiter.error is not None:
                raise waiter.error
            excused = self.blob.complete or self.settling or trio.current_time() < self.paused_until + self._patience_s
            if patience.cancelled_caught and not excused and self.came == before:
                if reason := self.outage(asked, self.missing()):
                    raise Unavailable(f"{self.name} cannot be fetched while its origin is out of reach: {reason}")
                if trio.current_time() - asked < self._patience_s:
                    continue  # it was out of reach, and is not any more
                raise Unavailable(
                    f"{self.name}: nothing came for {self._patience_s:g} s{f': {self.trouble}' if self.trouble else ''}."
                    " Try again; what is here stays."
                )

    def missing(self) -> list[int]:
        """The chunks that are not in the cache."""
        return self.blob.missing(Extent(0, self.blob.size))

    @property
    def name(self) -> str:
        """For people: one path by which it was asked for."""
        return str(self.sources.best)

    # For the fetcher -------------------------------------------------------------------------------------------------

    def extents_for(self, want: Want) -> tuple[list[Extent], bool]:
        """What to fetch of a chunk, in order, and whether the chunk is complete with it; not what has arrived.

        From `want.first` on, up to `want.upto` where that says so; then what lies before it.
        """
        of_chunk = self.blob.grid.extent(want.chunk)
        first = want.first if of_chunk.start + HEAD_START_BYTES < want.first < of_chunk.end else of_chunk.start
        arrived = self._arrived.setdefault(want.chunk, ExtentSet())
        whole = [*arrived.gaps(Extent(first, of_chunk.end)), *arrived.gaps(Extent(of_chunk.start, first))]
        upto = max(want.upto, first + PART_BYTES_MIN)
        if want.upto and upto + PART_BYTES_MIN <= of_chunk.end:
            part = arrived.gaps(Extent(first, upto))
            return part or whole, not part or part == whole
        return whole, True

    def gaps(self, chunk: int, extents: Iterable[Extent]) -> list[Extent]:
        """What of `extents` (of `chunk`) has not arrived, in their order."""
        arrived = self._arrived.get(chunk)
        return [gap for extent in extents for gap in ((extent,) if arrived is None else arrived.gaps(extent))]

    def awaited(self, chunk: int) -> bool:
        """Whether a reader waits for bytes of the chunk."""
        return any(w.extent is not None and chunk in self.blob.grid.chunks(w.extent) for w in self._waiters)

    def arrived(self, chunk: int, at: int, upto: int) -> None:
        """Bytes of an order under way are in the cache file."""
        self._arrived.setdefault(chunk, ExtentSet()).add(Extent(at, upto))
        self.came += upto - at
        self.trouble = ""
        self.wake()

    def coming(self, count: int) -> None:
        """So many bytes came from another node, which are not to be read yet."""
        self.came += count

    def recorded(self, chunk: int) -> None:
        """The chunk is complete and in the chunk map."""
        self._arrived.pop(chunk, None)
        self.attempts.pop(chunk, None)
        self.trouble = ""
        self.wake()

    def distrust(self, chunk: int) -> None:
        """What arrived of the chunk may be wrong: fetch all of it again."""
        self.misled = bool(self._arrived.pop(chunk, None)) or self.misled

    def wake(self) -> None:
        """Wakes the waiters whose bytes are there."""
        for waiter in self._waiters:
            if not waiter.woken.is_set() and (
                self.blob.complete if waiter.extent is None else self.readable(waiter.extent)
            ):
                waiter.woken.set()

    def fail(self, error: MantaError, chunk: int | None = None, began: float = math.inf) -> None:
        """Gives `error` to those who wait for `chunk` (None: for anything). Who came after `began`, when the last attempt was made, asks
        for another."""
        for waiter in self._waiters:
            if chunk is None or waiter.extent is None or chunk in self.blob.grid.chunks(waiter.extent):
                waiter.error = error if waiter.since <= began else None
                waiter.woken.set()

    def pause(self, until: float) -> None:
        """The origin asked for a pause until then (trio's clock)."""
        self.paused_until = until
        self.trouble = f"the origin asked for a pause of {max(until - trio.current_time(), 0):.0f} s"

    def refuse(self, error: MantaError, until: float) -> None:
        """The hub refuses the blob: readers get `error` at once until then (trio's clock), without the hub being asked again."""
        self._refusal = error, until

    def unverified(self, error: MantaError) -> None:
        """Gives `error` to those who wait for the seal; the others have their bytes."""
        for waiter in self._waiters:
            if waiter.extent is None or self.quarantined:
                waiter.error = error
                waiter.woken.set()

    def stir(self) -> None:
        """Has every waiter look again and ask again: the blob was sealed, or chunks it counted on are gone."""
        for waiter in self._waiters:
            waiter.woken.set()
