"""One node of the simulation: reader, scheduler, gate and choice, put together as the daemon does. Here and only here.

The decisions are Manta's own code. What stands here is the rest: how long an answer takes, what a lost one looks like, when it looks again.
"""

from __future__ import annotations

import random

from benchmarks.simulation.holdings import Holdings
from benchmarks.simulation.members import Members
from benchmarks.simulation.order import Counts, Order, Swarm
from benchmarks.simulation.roster import SharedChoice
from benchmarks.simulation.uploads import Uploads
from manta.fetch.fetcher import LOOK_SECONDS
from manta.fetch.gate import SwarmGate
from manta.fetch.pacing import Pacer
from manta.fetch.peer_flight import PATIENCE_SECONDS, SILENT_SECONDS, STALL_SECONDS, URGENT_SECONDS
from manta.fetch.peer_orders import BLOCKED_SECONDS, BLOCKED_SECONDS_MAX
from manta.fetch.readahead import Readahead
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.stragglers import Stragglers
from manta.fs.handles import ONWARD_SHARE
from manta.model.extents import CHUNK_SIZE, ChunkGrid, Extent
from manta.model.ids import BlobId
from manta.swarm.choice import FromOrigin, Peer
from manta.swarm.protocol import HOLD_SECONDS
from manta.telemetry.meter import Meter

DARK_SECONDS = 1.0
"""How long it takes to find that the origin cannot be reached, and how long it is not asked again then."""


class Node:
    def __init__(self, swarm: Swarm, place: int, seed: int) -> None:
        self.swarm, self.place = swarm, place
        self.name = swarm.roster.names[place]
        self.cache = Holdings(swarm.files)
        self.counts = Counts()
        self.up, self.silent = True, False
        """`silent`: it is down, and nobody is told."""
        self._chance = random.Random(f"{seed}/{place}")
        self._begin_life()

    def _begin_life(self) -> None:
        """What a process knows when it starts: nothing but its cache."""
        swarm, policy = self.swarm, self.swarm.policy
        self.uploads = Uploads(self)
        self.choice = SharedChoice(self.name, policy.downloads, swarm.roster)
        self.gate = SwarmGate(self.choice, self, lambda: swarm.clock.now)
        self.pacer = pacer = Pacer(policy.connections)
        self.members = Members(self, self._chance)
        if policy.swarm:
            self.members.share()
        gate = self.gate if policy.swarm else None
        self.scheduler = Scheduler(lambda: pacer.connections, self.cache.next_missing, gate=gate)
        self._to_read = list(swarm.files)
        self.opened: dict[BlobId, None] = {}
        """Files of which anything is wanted, by readers here or members."""
        self._filling: set[BlobId] = set()
        self._stragglers = Stragglers()
        self.origin_meter = Meter()
        self._readahead: Readahead | None = None
        self._at = 0  # the chunk of the first file of `_to_read` that the reader waits for
        self._orders: dict[Order, None] = {}  # in their order: a set's is another in each run
        self._from_origin = 0  # of them
        self.pausing_until = float("-inf")
        self._mute: dict[str, int] = {}  # members that say nothing, and how many orders they have
        self._look_at, self._looked_at = float("inf"), float("-inf")
        self._pause_s = BLOCKED_SECONDS

    # gate.Origin: what the fetcher knows of the way to the origin, and of the cache ------------------------------------

    def reachable(self, _blob: BlobId, now: float) -> bool:
        return now >= self.pausing_until

    def ready(self, _blob: BlobId) -> bool:
        return True

    def alone(self, _blob: BlobId) -> bool:
        return False

    def missing(self, blob: BlobId) -> list[int]:
        return self.cache.missing(blob)

    def lacks(self, blob: BlobId, chunk: int) -> bool:
        return not self.cache.has(blob, chunk)

    def generation(self, _blob: BlobId) -> int:
        return self.cache.generation

    # Its life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The reader begins, and the node where it was down."""
        self.up, self.silent = True, False
        if not self.counts.crashes:
            self.counts.began_at = self.swarm.clock.now
        self._read_on()
        self._watch(self.pacer)
        self.stir()

    def crash(self, *, keeps_cache: bool, silently: bool) -> None:
        """It ends at once, and knows nothing when it starts again."""
        if not self.up:
            return
        self.up, self.silent = False, silently
        self.counts.crashes += 1
        uploads = self.uploads.open
        for order in list(self._orders):
            self._end(order)
        self._begin_life()
        for order in uploads:
            order.taker.unanswered(order)
        if not keeps_cache:
            self.cache.lose_all()
            self.counts.done_at = None

    def _open(self, blob: BlobId) -> None:
        """Something of `blob` is wanted: who has what of it is of interest."""
        if blob not in self.opened and not self.cache.complete(blob):
            self.opened[blob] = None
            if self.swarm.policy.swarm:
                self.members.follow()

    def _read_on(self) -> None:
        """The reader takes what is there, file after file and each in order, and waits for the next chunk."""
        swarm = self.swarm
        while self._to_read:
            blob = self._to_read[0]
            chunks = swarm.files[blob]
            if self._readahead is None:
                self._readahead, self._at = Readahead(ChunkGrid(chunks * CHUNK_SIZE)), 0
                self._fill(blob)
            while self._at < chunks:
                at = self._at
                if ONWARD_SHARE * (at + 1) > chunks and swarm.policy.swarm and self._to_read[1:]:
                    self._fill(self._to_read[1])  # the next part of a model is begun early in one
                ahead = self._readahead.observe(Extent(at * CHUNK_SIZE, (at + 1) * CHUNK_SIZE))
                missing = [(chunk, chunk * CHUNK_SIZE) for chunk in ahead if not self.cache.has(blob, chunk)]
                self.scheduler.look_ahead(blob, "reader", missing)
                if not self.cache.has(blob, at):
                    self.scheduler.demand(blob, at, at * CHUNK_SIZE)
                    self._hurry(blob, at)
                    return
                self._at += 1
            self._to_read.pop(0)
            self._readahead = None
        if self.counts.done_at is None:
            self.counts.done_at = swarm.clock.now
            swarm.completed(self)

    def _fill(self, blob: BlobId) -> None:
        """All of `blob` is wanted in background."""
        self._open(blob)
        if self.swarm.policy.fill and blob not in self._filling:
            self._filling.add(blob)
            if not self.cache.complete(blob):
                self.scheduler.want_whole(blob, Priority.FILL)

    def _hurry(self, blob: BlobId, chunk: int) -> None:
        """A member that fetches the chunk on our behalf hears that a reader waits, when it is asked again."""
        for order in self._orders:
            if order.want.key == (blob, chunk) and order.giver is not None and order.pull:
                self.swarm.clock.after(HOLD_SECONDS / 2, order.giver.uploads.hurry, order)

    def fetch_for(self, order: Order) -> None:
        """A member waits for a chunk that it wants us to get."""
        want = order.want
        self._open(want.blob)
        self.gate.behalf[want.key] += 1
        if order.taker.reads_now(want):
            self.scheduler.demand(want.blob, want.chunk, want.chunk * CHUNK_SIZE)
        else:
            self.scheduler.want_rest(want.blob, want.chunk)
        self.stir()

    def fetches_for_nobody(self, key: tuple[BlobId, int]) -> None:
        """No member waits for the chunk any more."""
        self.gate.behalf.pop(key, None)

    # What to order ---------------------------------------------------------------------------------------------------

    def stir(self, when: float = 0.0) -> None:
        """Looks what to order, not before `when`."""
        when = max(when, self.swarm.clock.now, self._looked_at + self.swarm.look_s)
        if when < self._look_at:
            self._look_at = when
            self.swarm.clock.at(when, self._look, self.choice)

    def _look(self, choice: SharedChoice) -> None:
        now = self.swarm.clock.now
        if choice is not self.choice or now < self._look_at:
            return
        self._look_at, self._looked_at = float("inf"), now
        if not self.up:
            return
        self.counts.looks += 1
        while (want := self.scheduler.next(now)) is not None:
            self._send(want)
        blocked, self.gate.blocked = self.gate.blocked, None
        if blocked is not None and blocked < Priority.PREFETCH:
            self.stir(now + BLOCKED_SECONDS)
        elif blocked is not None:
            self.stir(now + self._pause_s)
            self._pause_s = min(2 * self._pause_s, BLOCKED_SECONDS_MAX)
        if (change := self.scheduler.next_change(now)) is not None:
            self.stir(change)

    def _send(self, want: Want) -> None:
        now = self.swarm.clock.now
        source = self.gate.source(want.blob, want.chunk, want.priority) if self.swarm.policy.swarm else FromOrigin()
        match source:
            case Peer(name, pull):
                self._pause_s = BLOCKED_SECONDS
                self.scheduler.beside(want)
                self.choice.begin(name, pull=pull)
                order = Order(want, self, self.swarm.nodes[self.swarm.roster.places[name]], pull, now)
                self._orders[order] = None
                self._ask(order)
            case FromOrigin() if self.reachable(want.blob, now):
                order = Order(want, self, None, False, now)
                self._orders[order] = None
                self._from_origin += 1
                self._ask_origin(order)
            case FromOrigin():
                self._unable_for(want, self.pausing_until - now)
                self.scheduler.again(want, self.pausing_until)
            case _:
                self.scheduler.again(want, now + BLOCKED_SECONDS)

    def _watch(self, pacer: Pacer) -> None:
        """Looks at what is under way, as the fetcher does: whether more connections pay, and what a reader had better get elsewhere.
        `pacer` tells whether it is still the same process."""
        if pacer is not self.pacer or self.cache.all:
            return
        now = self.swarm.clock.now
        for order in list(self._orders):
            if order.flow is not None:
                self._note(order, self.swarm.links.left(now, order.flow))
        if self._from_origin:
            before = pacer.connections
            pacer.look(self._from_origin, now)
            if pacer.connections > before:
                self.stir()
        given = {order.course: order for order in self._orders if order.giver is not None}
        for course, order in given.items():
            if self.reads_now(order.want) and self._stragglers.slow(course, given, now):
                self._lost(order)
        self.swarm.clock.after(LOOK_SECONDS, self._watch, pacer)

    def reads_now(self, want: Want) -> bool:
        """Whether a reader waits for it."""
        return want.priority is Priority.DEMAND or (bool(self._to_read) and want.key == (self._to_read[0], self._at))

    def _note(self, order: Order, left: float) -> None:
        """Takes account of what has come."""
        came = int(self.swarm.size_of(order.want) - left) - order.course.came
        if came:
            order.course.progress(came, self.swarm.clock.now)
            if order.giver is None:
                self.pacer.came(came)
                self.origin_meter.add(came, self.swarm.clock.now)

    # From the origin -------------------------------------------------------------------------------------------------

    def _ask_origin(self, order: Order) -> None:
        swarm = self.swarm
        if swarm.origin.dark(swarm.clock.now):
            swarm.clock.after(DARK_SECONDS, self._paused, order, DARK_SECONDS)
        elif pause_s := swarm.origin.pause(swarm.clock.now):
            self.pacer.throttled(swarm.clock.now)
            swarm.clock.after(swarm.origin.hub.latency_s, self._paused, order, pause_s)
        else:
            swarm.clock.after(swarm.origin.hub.latency_s, self._origin_answers, order)

    def _origin_answers(self, order: Order) -> None:
        if not order.over:
            swarm = self.swarm
            order.first = swarm.clock.now
            size, cap = swarm.size_of(order.want), swarm.origin.hub.per_connection
            order.flow = swarm.carry(len(swarm.nodes), self.place, size, cap, self._came, order)

    def _paused(self, order: Order, pause_s: float) -> None:
        """The origin wants to be left alone, or cannot be reached."""
        if order.over:
            return
        now = self.swarm.clock.now
        self.pausing_until = max(self.pausing_until, now + pause_s)
        self._end(order)
        self._unable_for(order.want, pause_s)
        # Members may have it, or reach the origin: the gate says so.
        self.scheduler.again(order.want)
        self.stir()

    def _unable_for(self, want: Want, pause_s: float) -> None:
        self.fetches_for_nobody(want.key)
        self.uploads.cannot(want.key, pause_s)

    def _came(self, order: Order) -> None:
        now, size = self.swarm.clock.now, self.swarm.size_of(order.want)
        order.flow = None
        self.counts.from_origin += size
        self.swarm.origin.sent += size
        self._note(order, 0.0)
        self.pacer.succeeded()
        self.scheduler.learn(order.first - order.began, now - order.began)
        self._end(order)
        self._record(order)

    # From members ----------------------------------------------------------------------------------------------------

    def _ask(self, order: Order) -> None:
        assert order.giver is not None
        self.counts.asked += 1
        if not self.members.reaches(order.giver):
            self.unanswered(order)
            return
        self.swarm.clock.after(self.swarm.weather.latency_s, order.giver.uploads.ask, order)
        if order.pull:
            self.swarm.clock.after(PATIENCE_SECONDS, self._impatient, order)

    def received(self, order: Order) -> None:
        """All of it has come."""
        assert order.giver is not None
        now, size = self.swarm.clock.now, self.swarm.size_of(order.want)
        self.counts.from_peers += size
        self._note(order, 0.0)
        self._end(order)
        self._stragglers.learn(order.first - order.began, now - order.began, size)
        self.choice.got(
            order.giver.name, str(order.want.blob), order.want.chunk, size, now - order.first, pull=order.pull
        )
        self._record(order)

    def refused(self, order: Order, holders: list[str]) -> None:
        """There is no slot."""
        if self._comes_to_nothing(order):
            self.counts.busy += 1
            self.choice.busy(
                self._giver(order),
                str(order.want.blob),
                order.want.chunk,
                holders,
                self.swarm.clock.now,
                pull=order.pull,
            )

    def lacking(self, order: Order) -> None:
        """The member does not have it."""
        if self._comes_to_nothing(order):
            self.counts.lacked += 1
            self.choice.lacks(
                self._giver(order), str(order.want.blob), order.want.chunk, self.swarm.clock.now, pull=order.pull
            )

    def denied(self, order: Order, pause_s: float) -> None:
        """The member could not get it: the origin wants to be left alone for so long, by us too."""
        if self._comes_to_nothing(order):
            now = self.swarm.clock.now
            self.pausing_until = max(self.pausing_until, now + pause_s)
            self.choice.unable(self._giver(order), str(order.want.blob), order.want.chunk, now, pull=order.pull)

    def _impatient(self, order: Order) -> None:
        """The member fetches on our behalf, and has not got it."""
        if order.flow is None:
            self.denied(order, 0.0)

    def unanswered(self, order: Order) -> None:
        """Nobody is there, or nobody any more: a reset says so at once, silence after a while."""
        if order.over:
            return
        giver, clock = order.giver, self.swarm.clock
        assert giver is not None
        if order.flow is not None:
            self.swarm.links.set_cap(clock.now, order.flow, 0.0)
        if giver.silent or self.swarm.apart(self.place, giver.place):
            clock.after(SILENT_SECONDS, self._falls_silent, order)
            clock.after(URGENT_SECONDS if self.reads_now(order.want) else STALL_SECONDS, self._lost, order)
        else:
            clock.after(2 * self.swarm.weather.latency_s, self._lost, order)

    def _falls_silent(self, order: Order) -> None:
        if not order.over:
            name = self._giver(order)
            self._mute[name] = self._mute.get(name, 0) + 1
            self.choice.set_silent(self._mute)

    def _lost(self, order: Order) -> None:
        if self._comes_to_nothing(order):
            self.counts.failed += 1
            name = self._giver(order)
            if name in self._mute:
                self._mute[name] -= 1
                if self._mute[name] <= 0:
                    del self._mute[name]
                self.choice.set_silent(self._mute)
            self.choice.failed(name, self.swarm.clock.now, pull=order.pull)

    def _giver(self, order: Order) -> str:
        assert order.giver is not None
        return order.giver.name

    # What became of it -----------------------------------------------------------------------------------------------

    def _comes_to_nothing(self, order: Order) -> bool:
        """The chunk is still wanted. False where the order had ended before."""
        if order.over:
            return False
        self._end(order)
        self.scheduler.again(order.want)
        self.stir()
        return True

    def _record(self, order: Order) -> None:
        want = order.want
        self.cache.put(want.blob, want.chunk)
        self.scheduler.finished(want)
        self.fetches_for_nobody(want.key)
        self.uploads.arrived(want.key)
        if self._to_read and want.key == (self._to_read[0], self._at):
            self._at += 1  # its window is as it was when the reader began to wait
            self._read_on()
        self.stir()

    def _end(self, order: Order) -> None:
        """Nothing more comes of `order`; what came of one that broke off is of no use."""
        order.over = True
        self._orders.pop(order, None)
        came = 0.0
        if order.flow is not None:
            came = self.swarm.size_of(order.want) - self.swarm.drop(order.flow)
            order.flow = None
            self.counts.wasted += came
        if order.giver is None:
            self._from_origin -= 1
            self.counts.from_origin += came
            self.swarm.origin.sent += came
        else:
            order.giver.counts.to_peers += came
            order.giver.uploads.give_back(order)
