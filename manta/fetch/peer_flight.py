"""One order under way for a chunk from another node. Here and only here. In the daemon's trio thread.

Beside `manta.fetch.flight`, which asks the origin. The difference: nothing of it may be read before the whole chunk has matched its digest,
so it is never hedged (two would write over each other's unverified bytes), and a member that falls silent is given up for another.
"""

from __future__ import annotations

import trio

from manta.fetch.scheduler import Priority, Want
from manta.fetch.stragglers import Course
from manta.fetch.transfer import Transfer
from manta.fetch.workers import OrderControl, Workers
from manta.swarm.protocol import Pull as PullThrough
from manta.swarm.protocol import encode
from manta.telemetry.events import Telemetry
from manta.wire.messages import Failed, Fetched, Pull

SILENT_SECONDS = 0.8
"""Nothing from a member for this long, neither bytes nor word that it is fetching: no more is asked of it meanwhile. It says something
twice a second (`protocol.HOLD_SECONDS`)."""

STALL_SECONDS = 3.0
"""And after this it has failed. Where a reader waits, and somebody else can be asked, after URGENT_SECONDS already."""

URGENT_SECONDS = 1.2

PATIENCE_SECONDS = 45.0
"""How long a member may fetch on our behalf: it tries the origin several times by itself. Less than a reader's patience, and long enough
for a chunk where 16 nodes share 100 Mbit/s to the origin: with 20 s they read it 1.12 times instead of once (simulated)."""


class Contact:
    """How a member is reached: what an order needs besides the chunk."""

    def __init__(
        self, node: str, address: str, me: str, keys: list[bytes], tls_authorities: str, tls_name: str, lz4: bool
    ) -> None:
        self.node = node
        self.address = address
        self.me = me
        self.keys = keys
        self.tls_authorities = tls_authorities
        self.tls_name = tls_name
        self.lz4 = lz4


class PeerFlight:
    """`run` it once. `pull`: the member may fetch it from the origin, where its bytes are at that place."""

    def __init__(
        self,
        workers: Workers,
        transfer: Transfer,
        want: Want,
        contact: Contact,
        pull: bool,
        telemetry: Telemetry,
    ) -> None:
        self.transfer = transfer
        self.want = want
        self.node = contact.node
        self._contact = contact
        self.pull = pull
        self._workers = workers
        self.size = len(transfer.blob.grid.extent(want.chunk))
        """Bytes of the chunk."""
        of_chunk = transfer.blob.grid.extent(want.chunk)
        self._extents = transfer.gaps(want.chunk, [of_chunk])
        self.whole = self._extents == [of_chunk]
        """All of the chunk comes from there. Otherwise bytes that were here before may be what is wrong."""
        self.course = Course(trio.current_time(), sum(map(len, self._extents)))
        self.heard = self.course.began
        """When anything came of it last: bytes, or word that it is being fetched."""
        self.told = telemetry.order(
            transfer.blob.id, transfer.name, want.chunk, want.priority.name.lower(), contact.address, contact.node
        )
        wanted = want.priority is Priority.DEMAND or transfer.awaited(want.chunk)
        self._control = OrderControl(wanted=wanted, given=self._given)
        self.given_up = False
        """It was cancelled because nothing came, or too slowly."""

    async def run(self) -> Fetched | Failed:
        """Raises why no worker could be had."""
        of_chunk, blob, contact = self.transfer.blob.grid.extent(self.want.chunk), self.transfer.blob, self._contact
        place = self.transfer.sources.best

        def make(number: int) -> Pull:
            asked = PullThrough(
                kind=place.repo.kind.value,
                repo=place.repo.name,
                commit=place.commit,
                path=place.entry.path,
                urgent=self._control.wanted,
            )
            return Pull(
                number,
                contact.address,
                contact.node,
                contact.me,
                str(blob.id),
                blob.size,
                self.want.chunk,
                of_chunk.start,
                of_chunk.end,
                [(e.start, e.end) for e in self._extents],
                STALL_SECONDS,
                PATIENCE_SECONDS,
                contact.keys,
                encode(asked) if self.pull else b"",
                contact.tls_authorities,
                contact.tls_name,
                contact.lz4,
            )

        def progress(at: int, upto: int) -> None:
            self.heard = trio.current_time()
            if upto > at:
                self.course.progress(upto - at, self.heard)
                self.transfer.coming(upto - at)
                self.told.came(upto - at)

        with blob.descriptor(writing=True) as fd:
            return await self._workers.pull(make, fd, progress, self._control)

    def _given(self, number: int, worker: int) -> None:
        self.told.given([(e.start, e.end) for e in self._extents], number, worker)

    @property
    def wanted(self) -> bool:
        """Whether a reader waits for it."""
        return self._control.wanted

    def watch(self) -> None:
        """A reader waits for its bytes: a member that fetches them on our behalf is told."""
        self._control.watch()

    def silent(self, now: float) -> bool:
        return now - self.heard > SILENT_SECONDS

    def give_up(self) -> None:
        """Somebody else is to be asked."""
        self.given_up = True
        self._control.cancel()
