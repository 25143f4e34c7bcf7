"""Gets wanted chunks into the cache: drives the scheduler, the hub's answers and the workers. Here and only here.

Runs in the daemon's trio thread. Fetches belong to the daemon: a reader only waits, a cancelled reader kills no fetch, and N readers of
one chunk cause one. The decisions are in pure modules: what next (`scheduler`), with how many connections (`pacing`), what is hedged
(`stragglers`), what after a failure (`retry`), where from (`sources`), who must be left alone (`throttle`), and
where there are other nodes, which of them is asked (`gate`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Protocol

import trio

from manta.cache.recovery import settle_doubtful
from manta.cache.store import Blob, Store
from manta.config import FetchConfig
from manta.errors import BY_CODE, Absent, Denied, MantaError, Unavailable
from manta.fetch.flight import Flight
from manta.fetch.gate import SwarmGate
from manta.fetch.locator import Locator
from manta.fetch.pacing import Pacer
from manta.fetch.peer_orders import PeerOrders, Peers
from manta.fetch.quarantine import Quarantine
from manta.fetch.retry import judge
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.sources import Provenance
from manta.fetch.stragglers import Stragglers
from manta.fetch.throttle import HEARD_SECONDS_MAX, Throttles
from manta.fetch.transfer import Transfer
from manta.fetch.way import REFUSED_SECONDS, Way
from manta.fetch.workers import Workers
from manta.hub.circuit import Circuit, Circuits
from manta.hub.origin import Access, Location, Origin
from manta.model.ids import BlobId
from manta.telemetry.events import Telemetry
from manta.telemetry.meter import Meter
from manta.wire.messages import Failed, Fetched

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""How often the orders under way are looked at: a straggler is noticed after a second or more."""

HEDGES_PER_CONNECTION = 0.25
"""Orders that may be hedged at once: an origin that is slow as a whole must not be asked for everything twice."""

PUT_OFF_SECONDS = 1.0
"""How long a chunk that the origin cannot be asked for stays out of sight, where another node may get it meanwhile."""

OnFailure = Callable[[Provenance, MantaError], None]
OnArrival = Callable[[Transfer], None]


class Room(Protocol):
    """Whether there is room in the cache for what would be fetched."""

    refusal: MantaError | None
    """What readers get while there is none and nothing can make any."""

    def least_urgent(self, coming: int) -> Priority | None:
        """The least urgent work that may be ordered while `coming` bytes are ordered and not recorded; None for nothing."""
        ...


class Fetcher:
    """`origin` None: offline, nothing can be fetched. `failed` hears of each fetch that was given up, `grown` of each chunk that came.
    `room` None: the cache has no bounds. `elsewhere` names where else mounts show a blob: asked when the places where it was opened are
    refused. `telemetry` hears of everything; None: nobody looks. `peers` None: there are no other nodes. `peer_rate` is how many bytes per
    second may come from them, 0 for no limit.
    """

    def __init__(
        self,
        store: Store,
        workers: Workers,
        origin: Origin | None,
        config: FetchConfig,
        failed: OnFailure,
        grown: OnArrival,
        circuits: Circuits | None = None,
        room: Room | None = None,
        elsewhere: Callable[[BlobId], Iterable[Provenance]] = lambda _: (),
        telemetry: Telemetry | None = None,
        peers: Peers | None = None,
        peer_rate: int = 0,
    ) -> None:
        self._room = room
        self._telemetry = telemetry or Telemetry()
        self._store = store
        self._workers = workers
        self._config = config
        self._failed = failed
        self._grown = grown
        self._transfers: dict[str, Transfer] = {}
        self._pacer = Pacer(config.connections)
        self._stragglers = Stragglers()
        self._throttles = Throttles()
        self._circuits = circuits or Circuits()
        self._locator = (
            Locator(
                workers,
                origin,
                config.stall_s,
                self._throttles,
                self._circuits,
                elsewhere,
                self._telemetry,
                None if peers is None else peers.location,
            )
            if origin is not None
            else None
        )
        self._way = Way(
            self._transfers, self._throttles, self._circuits, None if self._locator is None else self._locator.origin
        )
        gate = None if peers is None else SwarmGate(peers.choice, self._way, trio.current_time, peer_rate)
        self._scheduler = Scheduler(lambda: self._pacer.connections, self._next_missing, self._group, gate)
        self._neighbours: PeerOrders | None = None
        if peers is not None and gate is not None:
            self._neighbours = PeerOrders(peers, gate, workers, self._scheduler, self, self._telemetry)
        self._flights: set[Flight] = set()
        self._flying = trio.Event()  # replaced when nothing is under way
        self._located = trio.Event()  # replaced when the hub has said where something is, or not
        self._stirred = trio.Event()
        self._nursery: trio.Nursery
        self.origin_meter = Meter()
        self.quarantine = Quarantine()

    # For readers -----------------------------------------------------------------------------------------------------

    def open(self, provenance: Provenance) -> Transfer:
        """The transfer of what `provenance` shows; `close` must follow. Raises Denied for a hidden blob, NoSpace, CacheBroken."""
        entry = provenance.entry
        if entry.blob is None:
            raise Denied(
                f"{provenance} cannot be read: {provenance.repo} is gated and this token has no access. Ask for access on its page at"
                " the hub, log in with `hf auth login` or set HF_TOKEN, and mount it again."
            )
        key = str(entry.blob)
        transfer = self._transfers.get(key)
        if transfer is None:
            blob = self._store.open_blob(entry.blob, entry.size)
            transfer = Transfer(blob, self._scheduler, self._on_asked, self._config.read_timeout_s)
            transfer.outage = partial(self._outage, transfer)
            self._transfers[key] = transfer
            transfer.quarantined = self.quarantine.holds(blob.id)
            transfer.broken = self.quarantine.verdict(blob.id, trio.current_time())
            if blob.doubtful:
                transfer.users += 1
                transfer.settling = True
                self._scheduler.hold(blob.id, math.inf)
                self._nursery.start_soon(self._settle, transfer)
        transfer.sources.add(provenance)
        transfer.users += 1
        if transfer.blob.complete and not transfer.blob.sealed:
            self._grown(transfer)  # it could not be verified so far: an earlier daemon was stopped, or a worker died
        return transfer

    def close(self, transfer: Transfer) -> None:
        """What is wanted of it in the background goes on."""
        transfer.users -= 1
        self._let_go(transfer)

    def _let_go(self, transfer: Transfer) -> None:
        blob = transfer.blob
        if transfer.users == 0 and not transfer.locating and not self._scheduler.wants(blob.id):
            self._transfers.pop(str(blob.id), None)
            if self._neighbours is not None:
                self._neighbours.closed(blob.id)
            blob.close()

    @property
    def active(self) -> Iterator[Transfer]:
        """The transfers of which anything is still to come."""
        return (t for t in self._transfers.values() if not t.blob.complete and self._scheduler.wants(t.blob.id))

    @property
    def connections_allowed(self) -> int:
        """Requests to the origin that may be in flight; readers that wait may have as many more."""
        return self._pacer.connections

    @property
    def connections_in_use(self) -> int:
        """Chunks that are being fetched from the origin."""
        return len(self._flights)

    @property
    def peer_orders(self) -> int:
        """Chunks that are coming from other nodes."""
        return 0 if self._neighbours is None else len(self._neighbours.flights)

    def pauses(self) -> dict[str, float]:
        """The origins that want to be left alone, and for how many seconds from now."""
        now = trio.current_time()
        return {origin: until - now for origin, until in self._throttles.pauses(now).items()}

    def own_pauses(self) -> dict[str, float]:
        """Those of them that this node was asked for itself: what other nodes are told."""
        now = trio.current_time()
        return {origin: until - now for origin, until in self._throttles.own_pauses(now).items()}

    def transfer(self, blob_id: str) -> Transfer | None:
        """The transfer of a blob that is in use, if it is."""
        return self._transfers.get(blob_id)

    def forget(self, access: Access) -> None:
        """A mount ended, or its token is another now: no location is used that was had by the one from before."""
        for transfer in self._transfers.values():
            transfer.sources.forget(access)

    def stop_background(self, blob_id: str) -> None:
        """Nobody cares for the whole of this blob any more; readers still get what they read."""
        if (transfer := self._transfers.get(blob_id)) is not None:
            self._scheduler.unwant_whole(transfer.blob.id)
            self._let_go(transfer)

    # The driver ------------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sends orders as long as it is not cancelled; `open` works from `started` on."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._watch)
            task_status.started()
            while True:
                self._stirred = trio.Event()
                now = trio.current_time()
                while (want := self._scheduler.next(now, self._least_urgent())) is not None:
                    self._send(want, now)
                change = self._scheduler.next_change(now)
                until = math.inf if change is None else change
                if self._neighbours is not None:
                    until = min(until, self._neighbours.look_again(now))
                with trio.move_on_at(until):
                    await self._stirred.wait()

    async def _watch(self) -> None:
        """Looks at the orders under way: which are silent, which to hedge, whether more connections pay."""
        while True:
            await self._flying.wait()
            await trio.sleep(LOOK_SECONDS)
            now = trio.current_time()
            flights = {flight.course: flight for flight in self._flights}
            self._scheduler.set_silent({f.want.key for c, f in flights.items() if self._stragglers.silent(c, now)})
            hedges = max(1, int(self._pacer.connections * HEDGES_PER_CONNECTION))
            for course in self._stragglers.to_hedge(list(flights), now, hedges):
                flights[course].hedge()
            for flight in self._flights:
                flight.look()
            self._pacer.look(len(flights), now)
            if self._neighbours is not None:
                self._neighbours.look(now)
                for flight in self._flights:
                    self._neighbours.touch(flight.transfer)
            self._stirred.set()

    @property
    def coming(self) -> int:
        """Bytes of the chunks that are under way: what the cache grows by without further orders, at most."""
        return sum(flight.size for flight in self._flights) + (
            0 if self._neighbours is None else sum(flight.size for flight in self._neighbours.flights)
        )

    def _least_urgent(self) -> Priority | None:
        return Priority.FILL if self._room is None else self._room.least_urgent(self.coming)

    def room_changed(self) -> None:
        """What had to wait for room may go, or is to be refused."""
        self._stirred.set()

    def refuse_prefetches(self, error: MantaError) -> None:
        """There is no room for whole blobs, and none is to be expected: those who wait for one are told."""
        for transfer in self._transfers.values():
            transfer.unverified(error)

    def _send(self, want: Want, now: float) -> None:
        transfer = self._transfers[str(want.blob)]
        location = transfer.sources.location
        if self._room is not None and self._room.refusal is not None:
            self._scheduler.finished(want)
            self._give_up(transfer, self._room.refusal, want.chunk)
            self._let_go(transfer)
        elif self._neighbours is not None and self._neighbours.send(transfer, want):
            if self._neighbours.flights:
                self._flying.set()
        elif self._locator is None:
            self._scheduler.finished(want)
            self._give_up(transfer, self._offline(transfer), want.chunk)
            self._let_go(transfer)
        elif (error := self._way.refusal(want.blob, now)) is not None:
            self._scheduler.finished(want)
            self._give_up(transfer, error, want.chunk)
            self._let_go(transfer)
        elif location is None or location.stale(time.time()):
            self._put_off(want, math.inf)
            if not transfer.locating:
                transfer.locating = True
                self._nursery.start_soon(self._locate, transfer)
        elif (until := self._throttles.until(location.origin, now)) is not None:
            self._put_off(want, until)
            transfer.pause(until)
        elif not (circuit := self._circuits.of(location.origin)).admits(now):
            self._put_off(want, now + circuit.wait_s(now))
        else:
            came = partial(self._came, circuit)
            flight = Flight(self._workers, transfer, want, location, self._config.stall_s, came, self._telemetry)
            self._flights.add(flight)
            self._flying.set()
            self._nursery.start_soon(self._carry_out, flight)

    def _put_off(self, want: Want, until: float) -> None:
        """Nothing of its blob goes before `until`; where there are other nodes, nothing that the gate would have come from the origin."""
        if self._neighbours is None:
            self._scheduler.again(want)
            self._scheduler.hold(want.blob, until)
        else:
            self._scheduler.again(want, min(until, trio.current_time() + PUT_OFF_SECONDS) if until < math.inf else 0.0)

    def _group(self, blob_id: object) -> Hashable:
        """Blobs of one snapshot take their turns together, so that a mount of many files has no more than one of a few."""
        provenance = self._transfers[str(blob_id)].sources.best
        return provenance.repo, provenance.commit

    def _outage(self, transfer: Transfer, since: float, chunks: list[int]) -> str:
        """Why the origin that the blob's bytes would come from is out of reach, if that was known at `since`; else "". Also "" where
        another node has, or is giving us, any of `chunks`."""
        location = transfer.sources.location
        if self._locator is None or transfer.settling:
            return ""
        if self._neighbours is not None and self._neighbours.may_give(transfer, chunks):
            return ""
        hub = self._locator.origin
        asked = hub if location is None or location.stale(time.time()) else location.origin
        return self._circuits.outage(asked, hub, since)

    def _came(self, circuit: Circuit, count: int) -> None:
        now = trio.current_time()
        circuit.answered(now)
        self.origin_meter.add(count, now)
        self._pacer.came(count)

    def _offline(self, transfer: Transfer) -> Unavailable:
        elsewhere = "" if self._neighbours is None else " nor at another node"
        return Unavailable(
            f"{transfer.name} is not in the cache{elsewhere}, and Manta is offline (--offline, MANTA_HUB_OFFLINE or HF_HUB_OFFLINE"
            " is set). Unset it, or prefetch while online."
        )

    def _on_asked(self, transfer: Transfer) -> None:
        if self._neighbours is not None:
            self._neighbours.touch(transfer)
        elif self._locator is None and not transfer.settling:
            self._give_up(transfer, self._offline(transfer), None)
            return
        self._stirred.set()

    def _next_missing(self, blob_id: object, chunk: int) -> int | None:
        blob: Blob = self._transfers[str(blob_id)].blob
        if blob.complete:
            return None
        for candidate in range(max(chunk, blob.prefix_end // blob.grid.chunk_size), len(blob.grid)):
            if not blob.has(candidate):
                return candidate
        return None

    async def _settle(self, transfer: Transfer) -> None:
        """Compares what a host crash put in doubt with its digests; everything wanted of the blob is on hold meanwhile."""

        def progress(_count: int) -> None:
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(transfer.wake)

        try:
            bad = await trio.to_thread.run_sync(settle_doubtful, transfer.blob, progress)
            log.info("%s: %d chunks were damaged when the host crashed and are fetched anew", transfer.name, len(bad))
        except MantaError as e:
            self._give_up(transfer, e, None)
        transfer.settling = False
        self._scheduler.release(transfer.blob.id)
        transfer.wake()
        if self._locator is None and self._scheduler.wants(transfer.blob.id):
            self._on_asked(transfer)  # what is damaged cannot be had
        self._grown(transfer)
        self._stirred.set()
        self.close(transfer)

    # One location ----------------------------------------------------------------------------------------------------

    async def _locate(self, transfer: Transfer) -> None:
        """Asks the hub where the blob's bytes are; everything wanted of the blob is on hold meanwhile."""
        assert self._locator is not None
        try:
            transfer.sources.location = await self._locator.ask(
                transfer, lambda: self._scheduler.wants(transfer.blob.id), shared=not transfer.sources.misled
            )
            self._way.located(transfer.blob.id)
        except MantaError as e:
            self._give_up_origin(transfer, e)
        finally:
            self._end_locating(transfer)
            self._let_go(transfer)

    def _end_locating(self, transfer: Transfer) -> None:
        transfer.locating = False
        self._located.set()
        self._located = trio.Event()
        self._scheduler.release(transfer.blob.id)
        self._stirred.set()

    def _give_up_origin(self, transfer: Transfer, error: MantaError) -> None:
        """The hub does not say where the blob is: those are told who would need it, which with other nodes are not all."""
        blob, now, refused = transfer.blob.id, trio.current_time(), isinstance(error, Denied | Absent)
        if self._neighbours is None or not self._neighbours.may_help(transfer, refused=refused):
            if refused:
                transfer.refuse(error, now + REFUSED_SECONDS)
            self._give_up(transfer, error, None)
            return
        self._way.refuse(blob, now, error)
        transfer.trouble = error.message
        for chunk in self._scheduler.demanded(blob):
            if self._neighbours.leave_to_origin(blob, chunk):
                self._scheduler.forget_chunk(blob, chunk)
                self._give_up(transfer, error, chunk)

    # One order -------------------------------------------------------------------------------------------------------

    async def supply(self, provenance: Provenance, chunk: int, *, urgent: bool) -> None:
        """Gets `chunk` from the origin on behalf of another node; returns when it is in the cache. Raises what `Transfer.supply` does."""
        assert self._neighbours is not None
        transfer = self.open(provenance)
        try:
            with self._neighbours.on_behalf(transfer.blob.id, chunk):
                await transfer.supply(chunk, urgent=urgent)
        finally:
            self.close(transfer)

    def comes_from(self, blob: BlobId, chunk: int) -> str:
        """The node that this one is asking for the chunk right now; "" where there is none."""
        flights = () if self._neighbours is None else self._neighbours.flights
        return next((f.node for f in flights if f.want.key == (blob, chunk)), "")

    async def locate(self, provenance: Provenance) -> Location:
        """Where the bytes are, for other nodes: asked of the hub where it is not known, once for all who ask. Raises what the hub says."""
        if self._locator is None:
            raise Unavailable("This node is offline, and asks the hub nothing.")
        transfer = self.open(provenance)
        try:
            asked_already = transfer.locating
            while transfer.locating:
                await self._located.wait()
            location = transfer.sources.location
            if asked_already and location is None:
                raise Unavailable(f"The hub did not say where {provenance} is.")
            # Where it came of another's right it is not to be passed on, whatever it leads to.
            by = transfer.sources.located_by
            ours = by is not None and by.access == provenance.access
            if location is None or not ours or location.told or location.stale(time.time()):
                transfer.locating = True
                try:
                    location = await self._locator.ask(transfer, lambda: True, shared=False)
                    transfer.sources.location = location
                    self._way.located(transfer.blob.id)
                finally:
                    self._end_locating(transfer)
            return location
        finally:
            self.close(transfer)

    def members_changed(self) -> None:
        """Chunks have other owners, and perhaps other holders."""
        if self._neighbours is not None:
            self._pacer.share(1 + self._neighbours.members)
            self._stragglers.share(1 + self._neighbours.members)
        self._stirred.set()

    def origin_rate(self) -> float:
        """Bytes per second that come from the origin now."""
        return self.origin_meter.rate(trio.current_time())

    def note_elsewhere(self, node: str, rate: float) -> None:
        """So many bytes per second come from the origin to another node."""
        if self._neighbours is not None:
            rates = self._neighbours.note_rate(node, rate)
            self._pacer.elsewhere = sum(rates)
            reading = [each for each in rates if each > 0]
            self._stragglers.note_elsewhere(self._pacer.connections / median(reading) if reading else 0.0)

    def presence_changed(self) -> None:
        """Another node has, or has not, what it had not or had before."""
        self._stirred.set()

    def heed_pause(self, origin: str, seconds: float) -> None:
        """Another node was asked by `origin` for a pause: it is the same quota, or will be."""
        if seconds > 0:
            until = trio.current_time() + min(seconds, HEARD_SECONDS_MAX)
            self._throttles.pause(origin, until, own=False)

    async def _carry_out(self, flight: Flight) -> None:
        transfer, want = flight.transfer, flight.want
        transfer.watchers[want.chunk] = flight.watch
        try:
            answer = await flight.run()
            if isinstance(answer, Fetched) and flight.last:
                transfer.blob.record(want.chunk, answer.digest)
        except MantaError as e:  # the disk refused the chunk map, or no worker could be had
            self._scheduler.finished(want)
            self._give_up(transfer, e, want.chunk)
        else:
            if isinstance(answer, Failed):
                self._after_failure(flight, answer)
            else:
                self._after_success(flight, answer)
        finally:
            if self._neighbours is not None:
                self._neighbours.note_origin(transfer, flight.course.came)
            flight.told.ended()
            del transfer.watchers[want.chunk]
            self._flights.discard(flight)
            self._landed()
        self._stirred.set()
        self._let_go(transfer)

    def _landed(self) -> None:
        """An order has ended."""
        if not (self._flights or self.peer_orders):
            self._flying = trio.Event()

    # For the orders to other nodes -----------------------------------------------------------------------------------

    def start(self, carry_out: Callable[[], Awaitable[None]]) -> None:
        """Runs an order beside the others."""
        self._nursery.start_soon(carry_out)

    def came_from_peer(self, transfer: Transfer) -> None:
        """A chunk came and is in the chunk map."""
        self._grown(transfer)

    def peer_order_ended(self, transfer: Transfer) -> None:
        self._landed()
        self._stirred.set()
        self._let_go(transfer)

    def give_up(self, transfer: Transfer, failure: MantaError, chunk: int) -> None:
        """What kept a chunk from coming would keep it from coming from anywhere: this node's disk, or no worker."""
        self._give_up(transfer, failure, chunk)

    def verified(self, transfer: Transfer) -> None:
        """The blob has matched its digest."""
        if self._neighbours is not None:
            self._neighbours.verified(transfer)

    def _after_success(self, flight: Flight, answer: Fetched) -> None:
        transfer, want = flight.transfer, flight.want
        self._pacer.succeeded()
        self._stragglers.learn(answer.first_byte_s, answer.seconds, flight.course.wanted)
        self._scheduler.finished(want)
        flight.told.done(answer.seconds, answer.first_byte_s)
        if flight.last:
            self._scheduler.learn(answer.first_byte_s, answer.seconds)
            flight.told.recorded()
            transfer.recorded(want.chunk)
            self._grown(transfer)
        else:
            self._scheduler.want_rest(want.blob, want.chunk)
            transfer.stir()  # who waits for another part of the chunk asks for it now

    def _after_failure(self, flight: Flight, failure: Failed) -> None:
        transfer, want, now = flight.transfer, flight.want, trio.current_time()
        counts = transfer.attempts.setdefault(want.chunk, Counter())
        if failure.reason == "unavailable" and flight.course.came:
            counts[failure.reason] = 0  # it got further: a link that breaks often is not one that leads nowhere
        counts[failure.reason] += 1
        attempts = counts[failure.reason]
        transfer.trouble = failure.message
        verdict = judge(failure, attempts)
        pause_s = max(verdict.pause_s, verdict.origin_pause_s)
        flight.told.failed(failure, attempts, retry=verdict.retry, pause_s=pause_s)
        circuit = self._circuits.of(flight.location.origin)
        if failure.unreachable:
            circuit.failed(flight.course.began, now, f"{failure.message}. {_ADVICE['unavailable']}")
        elif failure.status:
            circuit.answered(now)
        if failure.reason == "unavailable":
            self._pacer.lost(now)
        if failure.reason == "corrupt":
            transfer.distrust(want.chunk)
        if (
            verdict.relocate or (flight.location.told and failure.reason == "unavailable")
        ) and transfer.sources.location is flight.location:
            transfer.sources.location = None
            transfer.sources.misled = flight.location.told or transfer.sources.misled
        if not verdict.retry:
            self._scheduler.finished(want)
            kind = BY_CODE.get(failure.reason, Unavailable)
            error = kind(f"{transfer.name}: {failure.message}. {_ADVICE[failure.reason]}")
            self._give_up(transfer, error, want.chunk, flight.course.began)
            return
        self._scheduler.again(want, now + verdict.pause_s if verdict.pause_s else 0.0)
        if verdict.origin_pause_s:
            self._throttle(flight.location, now, verdict.origin_pause_s)

    def _throttle(self, location: Location, now: float, pause_s: float) -> None:
        """Every file at that origin waits: `_send` looks before each order."""
        self._pacer.throttled(now)
        self._throttles.pause(location.origin, now + pause_s)
        self._telemetry.throttled(location.origin, pause_s, "bytes")

    def _give_up(self, transfer: Transfer, error: MantaError, chunk: int | None, began: float = math.inf) -> None:
        """Tells the readers. Background work on the blob ends too: it would fail the same way; the next read starts it again."""
        if chunk is None:
            transfer.attempts.clear()
            self._scheduler.forget(transfer.blob.id)
        else:
            transfer.attempts.pop(chunk, None)
            self._scheduler.unwant_whole(transfer.blob.id)
        transfer.fail(error, chunk, began)
        self._failed(transfer.sources.best, error)


_ADVICE: dict[str, str] = {
    "absent": "The file is gone from the hub; mount a revision that exists.",
    "denied": "Check the token with `manta doctor`, and the access to the repo on its page at the hub.",
    "throttled": "The hub limits requests; they go on by themselves.",
    "unavailable": "Try again; `manta doctor` checks the way to the hub.",
    "corrupt": "What came was not what the hub announced; a proxy in between may alter it. Try again.",
    "no_space": "Free space on the cache disk, set cache.size, or run `manta cache gc`.",
    "cache_broken": "Check the cache disk (dmesg); choose another with --cache-dir.",
    "cancelled": "Try again.",
}
