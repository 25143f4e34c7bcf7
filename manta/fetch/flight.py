"""One order under way, and the second one that hedges it. Here and only here. In the daemon's trio thread.

Made by `manta.fetch.fetcher` for each chunk it orders; the decision to hedge is `manta.fetch.stragglers`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from manta.errors import MantaError
from manta.fetch.scheduler import Priority, Want
from manta.fetch.stragglers import Course
from manta.fetch.transfer import Transfer
from manta.fetch.workers import OrderControl, Workers
from manta.hub.origin import Location
from manta.model.extents import Extent
from manta.telemetry.events import Telemetry
from manta.wire.messages import Failed, Fetch, Fetched

OnBytes = Callable[[int], None]


class Flight:
    """`run` it once. `came` hears of each batch of bytes, whichever of the two orders it came by."""

    def __init__(
        self,
        workers: Workers,
        transfer: Transfer,
        want: Want,
        location: Location,
        stall_s: float,
        came: OnBytes,
        telemetry: Telemetry,
    ) -> None:
        self.transfer = transfer
        self.want = want
        self.location = location
        self._workers = workers
        self._stall_s = stall_s
        self._came = came
        self.size = len(transfer.blob.grid.extent(want.chunk))
        """Bytes of the chunk."""
        self._extents, self.last = transfer.extents_for(want)
        """With `last` the chunk is complete when this has ended well."""
        self.course = Course(trio.current_time(), sum(map(len, self._extents)))
        self.told = telemetry.order(
            transfer.blob.id, transfer.name, want.chunk, want.priority.name.lower(), location.origin
        )
        """What is logged and counted of it. Whoever runs it says how it ended."""
        self._wanted = want.priority is Priority.DEMAND or transfer.awaited(want.chunk)
        self._controls: list[OrderControl] = []  # of the orders that have not been answered
        self._hedged = False
        self._won: Fetched | None = None
        self._failed: Failed | MantaError | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self) -> Fetched | Failed:
        """Ends when all that was ordered has been answered: nobody writes to the chunk any more. Raises why no worker could be had."""
        async with trio.open_nursery() as self._nursery:
            given = partial(self.told.given, [(e.start, e.end) for e in self._extents])
            self._nursery.start_soon(self._attempt, self._extents, self._control(given))
        self._nursery = None
        if self._won is None:
            assert self._failed is not None
            if isinstance(self._failed, MantaError):
                raise self._failed
            return self._failed
        if self._hedged and self.last:
            # Two have written to the chunk, so that the digest of neither tells what is there: an order for nothing reads it back.
            answer = await self._order([], OrderControl(wanted=False))
            return (
                Fetched(answer.order, answer.digest, self._won.seconds, self._won.first_byte_s)
                if isinstance(answer, Fetched)
                else answer
            )
        return self._won

    def hedge(self) -> None:
        """Orders what has not come once more, on another connection. What comes first counts."""
        gaps = self.transfer.gaps(self.want.chunk, self._extents)
        if self._nursery is not None and not self._hedged and gaps:
            self._hedged = True
            now, course = trio.current_time(), self.course
            silent_s = now - (course.last or course.began)
            given = partial(self.told.hedged, after_s=now - course.began, silent_s=silent_s, came=course.came)
            self._nursery.start_soon(self._hedge, gaps, self._control(given))

    def watch(self) -> None:
        """A reader waits for its bytes."""
        self._wanted = True
        for control in self._controls:
            control.watch()

    def look(self) -> None:
        """To be called now and then: a worker may have been too busy to hear that its order is not needed any more."""
        if self._won is not None:
            for control in self._controls:
                control.cancel()

    def _control(self, given: Callable[[int, int], None]) -> OrderControl:
        control = OrderControl(wanted=self._wanted, given=given)
        self._controls.append(control)
        return control

    async def _hedge(self, gaps: list[Extent], control: OrderControl) -> None:
        answer = await self._attempt(gaps, control)
        self.told.hedge_ended("failed" if self._won is None else "won" if self._won is answer else "lost")

    async def _attempt(self, extents: list[Extent], control: OrderControl) -> Fetched | Failed | MantaError:
        try:
            answer: Fetched | Failed | MantaError = await self._order(extents, control)
        except MantaError as e:
            answer = e
        finally:
            self._controls.remove(control)
        if isinstance(answer, Fetched):
            self._won = self._won or answer
            self.look()
        elif self._failed is None or isinstance(self._failed, MantaError):
            self._failed = answer
        return answer

    async def _order(self, extents: list[Extent], control: OrderControl) -> Fetched | Failed:
        location, chunk, blob = self.location, self.want.chunk, self.transfer.blob
        of_chunk = blob.grid.extent(chunk)

        def make(number: int) -> Fetch:
            return Fetch(
                number,
                location.url,
                dict(location.headers),
                of_chunk.start,
                of_chunk.end,
                [(e.start, e.end) for e in extents],
                blob.size,
                self._stall_s,
                self.last,
                control.wanted,
            )

        def progress(at: int, upto: int) -> None:
            self.course.progress(upto - at, trio.current_time())
            self._came(upto - at)
            self.told.came(upto - at)
            self.transfer.arrived(chunk, at, upto)

        with blob.descriptor(writing=True) as fd:
            return await self._workers.fetch(make, fd, progress, control)
