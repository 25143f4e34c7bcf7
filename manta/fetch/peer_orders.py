"""Orders for chunks that go to other nodes, and what becomes of them. Here and only here. In the daemon's trio thread.

Beside `manta.fetch.fetcher`, which asks the origin and owns the loop. Which member is asked for which chunk is `manta.fetch.gate`'s to say;
whatever comes of it, the chunk is wanted again or is there, and what was learned of the member is told to `manta.swarm.choice`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import trio

from manta.errors import BY_CODE, MantaError, Unavailable
from manta.fetch.gate import SwarmGate
from manta.fetch.ledger import Ledger
from manta.fetch.peer_flight import URGENT_SECONDS, Contact, PeerFlight
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.sources import Provenance
from manta.fetch.stragglers import Stragglers
from manta.fetch.transfer import Transfer
from manta.fetch.workers import Workers
from manta.hub.origin import Location
from manta.model.ids import BlobId
from manta.swarm.choice import Choice, FromOrigin, NotNow, Peer
from manta.telemetry.events import Telemetry
from manta.wire.messages import Failed, Fetched

BLOCKED_SECONDS = 0.05
"""How soon is looked again at chunks that nobody had time for: an upload slot gets free after tens of milliseconds."""

BLOCKED_SECONDS_MAX = 1.0
"""And where no reader is near them and nothing came of looking: twice as long each time, up to this."""


class Peers(Protocol):
    """The other nodes."""

    choice: Choice
    ledger: Ledger

    def contact(self, node: str) -> Contact | None:
        """How a member is reached; None where it is none any more."""
        ...

    def touch(self, blob: BlobId, size: int) -> None:
        """The blob is being fetched: who has which of its chunks is of interest."""
        ...

    async def location(self, provenance: Provenance) -> Location | None:
        """Where the bytes are, as the member says who asks the hub for all; None where this node is to ask. Raises Throttled where the hub
        asked that member for a pause."""
        ...

    def wrong(self, node: str, transfer: Transfer, chunk: int) -> None:
        """`node` gave other bytes than it announced, or than the origin has."""
        ...


class Driver(Protocol):
    """What is needed of the fetcher."""

    def start(self, carry_out: Callable[[], Awaitable[None]]) -> None: ...

    def came_from_peer(self, transfer: Transfer) -> None: ...

    def peer_order_ended(self, transfer: Transfer) -> None: ...

    def give_up(self, transfer: Transfer, failure: MantaError, chunk: int) -> None: ...

    def heed_pause(self, origin: str, seconds: float) -> None: ...


class PeerOrders:
    """`flights` are the orders under way."""

    def __init__(
        self,
        peers: Peers,
        gate: SwarmGate,
        workers: Workers,
        scheduler: Scheduler,
        driver: Driver,
        telemetry: Telemetry,
    ) -> None:
        self.flights: set[PeerFlight] = set()
        self._peers = peers
        self._gate = gate
        self._workers = workers
        self._scheduler = scheduler
        self._driver = driver
        self._telemetry = telemetry
        self._stragglers = Stragglers()
        self._rates: dict[str, float] = {}
        self._pause_s = BLOCKED_SECONDS

    # What is asked ---------------------------------------------------------------------------------------------------

    def look_again(self, now: float) -> float:
        """When to look again at what was held back because nobody had time for it; infinity where nothing was since this was asked last."""
        blocked, self._gate.blocked = self._gate.blocked, None
        if blocked is None:
            return math.inf
        pause_s = BLOCKED_SECONDS
        if blocked >= Priority.PREFETCH:
            pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, BLOCKED_SECONDS_MAX)
        return now + pause_s

    def may_help(self, transfer: Transfer, *, refused: bool) -> bool:
        """Whether any of it may come from members, now that the hub does not tell us where it is. `refused`: it would tell them no more."""
        choice, now = self._peers.choice, trio.current_time()
        if any(flight.transfer is transfer for flight in self.flights):
            return True
        return choice.anybody_has(str(transfer.blob.id), now) or (not refused and choice.anybody(now))

    def may_give(self, transfer: Transfer, chunks: list[int]) -> bool:
        """Whether one is believed to have any of `chunks`, or is asked to fetch it before any other has failed to."""
        blob, now, choice = str(transfer.blob.id), trio.current_time(), self._peers.choice
        coming = {flight.want.chunk for flight in self.flights if flight.transfer is transfer}
        return any(
            choice.held(blob, chunk, now) or (chunk in coming and not choice.in_vain(blob, chunk, now))
            for chunk in chunks
        )

    def leave_to_origin(self, blob: BlobId, chunk: int) -> bool:
        """Whether a reader's chunk would have to come from the origin."""
        return isinstance(self._gate.source(blob, chunk, Priority.DEMAND), FromOrigin)

    def note_rate(self, node: str, rate: float) -> list[float]:
        """So many bytes per second come from the origin to a member; what comes to each of them."""
        members = set(self._peers.choice.members)
        self._rates = {known: r for known, r in self._rates.items() if known in members}
        self._rates[node] = rate
        return list(self._rates.values())

    @property
    def members(self) -> int:
        """How many other nodes there are."""
        return sum(1 for _ in self._peers.choice.members)

    # What is told ----------------------------------------------------------------------------------------------------

    def touch(self, transfer: Transfer) -> None:
        """It is being fetched: who has which of its chunks is of interest."""
        self._peers.touch(transfer.blob.id, transfer.blob.size)

    def closed(self, blob: BlobId) -> None:
        """Nothing of it is wanted any more."""
        self._gate.closed(blob)

    def note_origin(self, transfer: Transfer, count: int) -> None:
        """So many bytes of it came from the origin."""
        self._note(transfer, count, peer=False)

    def _note(self, transfer: Transfer, count: int, *, peer: bool) -> None:
        if count:
            blob = transfer.blob
            self._peers.ledger.came(str(blob.id), blob.size, transfer.name, count, peer=peer)

    @contextmanager
    def on_behalf(self, blob: BlobId, chunk: int) -> Iterator[None]:
        """Meanwhile the chunk is not asked of a member who would have to fetch it: another one waits for us to do that."""
        key = blob, chunk
        self._gate.behalf[key] += 1
        try:
            yield
        finally:
            self._gate.behalf[key] -= 1
            if not self._gate.behalf[key]:
                del self._gate.behalf[key]

    # Orders ----------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Which members are silent, and which orders to take elsewhere."""
        flights = {flight.course: flight for flight in self.flights}
        self._peers.choice.set_silent({flight.node for flight in self.flights if flight.silent(now)})
        for course, flight in flights.items():
            self.touch(flight.transfer)
            stuck = now - flight.heard > URGENT_SECONDS
            # A member that gives to many is slow to each. That is no reason to read the origin: somebody else must have it.
            elsewhere = self._peers.choice.held(str(flight.want.blob), flight.want.chunk, now, besides=flight.node)
            if flight.wanted and (stuck or (elsewhere and self._stragglers.slow(course, flights, now))):
                flight.give_up()

    def send(self, transfer: Transfer, want: Want) -> bool:
        """Orders it from another node, where that is the place to ask; or from nobody, where nobody has time. False: it is the origin's."""
        source = self._gate.source(want.blob, want.chunk, want.priority)
        contact = self._peers.contact(source.node) if isinstance(source, Peer) else None
        if isinstance(source, NotNow) or (isinstance(source, Peer) and contact is None):
            self._scheduler.again(want, trio.current_time() + BLOCKED_SECONDS)
            return True
        if not isinstance(source, Peer) or contact is None:
            return False
        self._pause_s = BLOCKED_SECONDS
        flight = PeerFlight(self._workers, transfer, want, contact, source.pull, self._telemetry)
        self.flights.add(flight)
        self._peers.choice.begin(source.node, pull=source.pull)
        self._gate.spend(flight.course.wanted)
        self._scheduler.beside(want)
        self._driver.start(partial(self._carry_out, flight))
        return True

    async def _carry_out(self, flight: PeerFlight) -> None:
        transfer, want = flight.transfer, flight.want
        transfer.watchers[want.chunk] = flight.watch
        answer: Fetched | Failed | None = None
        try:
            answer = await flight.run()
            if isinstance(answer, Fetched):
                transfer.blob.record(want.chunk, answer.digest)
        except MantaError as e:  # the disk refused the chunk map, or no worker could be had
            self._peers.choice.end(flight.node, pull=flight.pull)
            self._scheduler.finished(want)
            self._driver.give_up(transfer, e, want.chunk)
        else:
            if isinstance(answer, Failed):
                self._after_failure(flight, answer)
            else:
                self._after_success(flight, answer)
        finally:
            self._note(transfer, flight.course.came, peer=True)
            flight.told.ended()
            self._gate.spend(flight.course.came - flight.course.wanted)  # a refusal costs nothing
            del transfer.watchers[want.chunk]
            self.flights.discard(flight)
        self._driver.peer_order_ended(transfer)

    def _after_success(self, flight: PeerFlight, answer: Fetched) -> None:
        transfer, want = flight.transfer, flight.want
        self._peers.choice.got(
            flight.node,
            str(want.blob),
            want.chunk,
            flight.course.wanted,
            answer.seconds - answer.first_byte_s,
            pull=flight.pull,
        )
        self._stragglers.learn(answer.first_byte_s, answer.seconds, flight.course.wanted)
        self._scheduler.finished(want)
        if not transfer.blob.sealed:
            transfer.from_peers[want.chunk] = flight.node, answer.digest
        flight.told.done(answer.seconds, answer.first_byte_s)
        flight.told.recorded()
        transfer.recorded(want.chunk)
        self._driver.came_from_peer(transfer)

    def _after_failure(self, flight: PeerFlight, failure: Failed) -> None:
        """It is asked for elsewhere, or of the same one later: who is asked next is the gate's to say."""
        transfer, want, now = flight.transfer, flight.want, trio.current_time()
        blob, choice = str(want.blob), self._peers.choice
        local = failure.reason in {"no_space", "cache_broken"} and not failure.behind
        flight.told.failed(failure, 1, retry=not local, pause_s=0.0)
        if local:
            choice.end(flight.node, pull=flight.pull)
            self._scheduler.finished(want)
            error = BY_CODE.get(failure.reason, Unavailable)
            self._driver.give_up(
                transfer, error(f"{transfer.name}: {failure.message}. {_ADVICE[failure.reason]}"), want.chunk
            )
            return
        if failure.behind:
            choice.unable(flight.node, blob, want.chunk, now, pull=flight.pull)
            transfer.trouble = failure.message
            if failure.reason == "throttled" and failure.origin:
                self._driver.heed_pause(failure.origin, failure.retry_after_s)
        elif failure.reason == "busy":
            choice.busy(flight.node, blob, want.chunk, failure.holders, now, failure.retry_after_s, pull=flight.pull)
        elif failure.reason == "absent":
            choice.lacks(flight.node, blob, want.chunk, now, pull=flight.pull)
        elif failure.reason == "denied" and failure.status == 403:
            choice.withholds(flight.node, blob, want.chunk, now, pull=flight.pull)
        elif failure.reason == "cancelled" and not flight.given_up:
            choice.end(flight.node, pull=flight.pull)
        else:
            choice.failed(flight.node, now, pull=flight.pull)
            flight.told.blamed()
            transfer.trouble = failure.message
            if failure.reason == "corrupt":
                if flight.whole:
                    choice.lied(flight.node, now)
                    self._peers.wrong(flight.node, transfer, want.chunk)
                transfer.distrust(want.chunk)
        self._scheduler.again(want)

    def verified(self, transfer: Transfer) -> None:
        """The blob has matched its digest. Who gave a chunk that was another before all was fetched anew gave a wrong one."""
        for chunk, (node, digest) in transfer.from_peers.items():
            if transfer.blob.digest(chunk) != digest:
                self._peers.choice.lied(node, trio.current_time())
                self._peers.wrong(node, transfer, chunk)
        transfer.from_peers.clear()


_ADVICE = {
    "no_space": "Free space on the cache disk, set cache.size, or run `manta cache gc`.",
    "cache_broken": "Check the cache disk (dmesg); choose another with --cache-dir.",
}
