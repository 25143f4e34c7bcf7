"""What happens on the data path, told once: each method here is one event, which becomes a log record, numbers, and what `manta top` shows.

The daemon builds one `Telemetry`; the filesystem, the fetcher, the sealer and the worker pool call it. It decides nothing, waits for
nothing and raises nothing. Belongs to the trio thread.

A read that has to wait gets an id, such as r3f9a-17 (the first part tells daemons apart whose records share a file), and every record about
it carries that id: its own as `read`, those about an order or a question that serves several reads as `reads`. Who waits for which
chunk is kept here, so that the fetcher need not carry ids around. See docs/observability.md for the records and their levels.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from manta.errors import MantaError
from manta.model.extents import Extent
from manta.model.ids import BlobId
from manta.telemetry.logs import fields
from manta.telemetry.meter import Meter
from manta.telemetry.metrics import NODES_MAX, Metrics
from manta.wire.messages import Failed

reads_log = logging.getLogger("manta.read")
fetch_log = logging.getLogger("manta.fetch")

SLOW_SECONDS = 5.0
"""A read that waited longer than this is told of at info: a reader notices, and at 1 Gbit/s its chunk takes 67 ms."""

NAMED_MAX = 8
"""Reads that one record names. Programs that read a file with fifty threads make fifty of them wait for one chunk."""

SOURCES_MAX = 16
"""Hosts followed: a hub, and the CDN's hosts that it sends to. The one not used for longest goes."""

PEERS_MAX = 1024
"""Nodes whose exchange with this one is followed, about 2 KB each. The one not heard of for longest goes."""

FILES_MAX = 256
"""Files whose rate is followed: more than can have an order under way (fetch.connections, at most 64, and as many for readers)."""


GIVEN_SECONDS = 1.0
"""How often the peer process says what it gave (`manta.wire.peering.Uploaded`)."""


class Opener(NamedTuple):
    """Who opened a file. The kernel names the process at open; the library that brings its requests does not name it at read."""

    inode: int = 0
    pid: int = 0
    """0 where it is not known: a process of another pid namespace."""


class FileRate(NamedTuple):
    """What comes for one file now, and from where: scheme, host and port, "" where nothing did of late."""

    bytes_per_second: float
    origin: str


@dataclass(eq=False, slots=True)
class Source:
    """One host that bytes or answers come from."""

    origin: str
    """Scheme, host and port."""
    meter: Meter = field(default_factory=Meter)
    in_flight: int = 0
    failures: int = 0


@dataclass(eq=False, slots=True)
class PeerSource(Source):
    """Another node: `meter` is what came from it, `given` what went to it. `origin` is its HOST:PORT, "" while it has only taken."""

    node: str = ""
    chunks: int = 0
    """That came from it, whole and right."""
    given: Meter = field(default_factory=lambda: Meter(GIVEN_SECONDS))
    given_chunks: int = 0


class ReadWait:
    """One read that has to wait. `served` or `failed` ends it."""

    def __init__(
        self, telemetry: Telemetry, blob: BlobId, file: str, extent: Extent, chunks: range, opener: Opener
    ) -> None:
        self.id = telemetry._new_id()
        self.blob = blob
        self.chunks = chunks
        under_way = [order.number for order in telemetry._orders.get(blob, ()) if order.chunk in chunks]
        self.orders = len(under_way)
        """Orders for its chunks, those included that were under way when it came."""
        self._telemetry = telemetry
        self._file = file
        self._extent = extent
        self._began = telemetry._clock()
        if reads_log.isEnabledFor(logging.DEBUG):
            said = fields(
                read=self.id, file=file, offset=extent.start, length=len(extent), blob=str(blob), chunks=list(chunks[:NAMED_MAX]),
                inode=opener.inode, opened_by=opener.pid, under_way=under_way[:NAMED_MAX],
            )  # fmt: skip
            reads_log.debug("read waits", extra=said)

    def served(self, count: int) -> None:
        """It is answered, with `count` bytes."""
        telemetry, waited = self._telemetry, self._end()
        telemetry._reads_waited.inc()
        telemetry._wait_ok.observe(waited)
        telemetry.tally.origin_bytes += count
        level = logging.INFO if waited > SLOW_SECONDS else logging.DEBUG
        if reads_log.isEnabledFor(level):
            said = fields(read=self.id, file=self._file, waited_s=waited, bytes=count, orders=self.orders, outcome="ok")
            reads_log.log(level, "read answered", extra=said)

    def failed(self, error: BaseException) -> None:
        """It is answered with an error, or nobody waits for the answer any more."""
        outcome, waited, metrics = _outcome(error), self._end(), self._telemetry.metrics
        metrics.reads.labels(outcome).inc()
        metrics.read_wait.labels("error").observe(waited)
        said = fields(
            read=self.id, file=self._file, offset=self._extent.start, length=len(self._extent), waited_s=waited, bytes=0,
            orders=self.orders, outcome=outcome,
        )  # fmt: skip
        if outcome == "cancelled":
            reads_log.debug("read cancelled", extra=said)
        else:
            reads_log.warning("read failed: %s", _sentence(error), extra=said)

    def _end(self) -> float:
        self._telemetry._forget(self)
        return self._telemetry._clock() - self._began


class Question:
    """One question to the hub where a file's bytes are. `answered` or `failed` ends it."""

    def __init__(self, telemetry: Telemetry, blob: BlobId, file: str, origin: str) -> None:
        self._telemetry = telemetry
        self._blob = blob
        self._file = file
        self._source = telemetry._source(origin)
        self._began = telemetry._clock()
        if fetch_log.isEnabledFor(logging.DEBUG):
            said = fields(file=file, blob=str(blob), host=origin, **telemetry._reads_of(blob))
            fetch_log.debug("location asked", extra=said)

    def answered(self, origin: str) -> None:
        """The bytes are at `origin` (scheme, host, port)."""
        self._end("ok", logging.DEBUG, "location answered", source=origin)

    def failed(self, error: MantaError) -> None:
        self._source.failures += 1
        self._end(error.code, logging.INFO, "location refused: %s", error.message)

    def _end(self, outcome: str, level: int, message: str, *words: str, **more: object) -> None:
        telemetry, seconds = self._telemetry, self._telemetry._clock() - self._began
        telemetry.metrics.locations.labels(outcome).inc()
        telemetry.metrics.location_seconds.observe(seconds)
        if fetch_log.isEnabledFor(level):
            said = fields(
                file=self._file, blob=str(self._blob), host=self._source.origin, seconds=seconds, **more,
                **telemetry._reads_of(self._blob),
            )  # fmt: skip
            fetch_log.log(level, message, *words, extra=said)


class Order:
    """One order for bytes of a chunk. `ended` comes last, whatever became of it."""

    def __init__(
        self, telemetry: Telemetry, blob: BlobId, file: str, chunk: int, priority: str, origin: str, node: str
    ) -> None:
        self.chunk = chunk
        self.number = 0
        """0 until a worker has got it."""
        self._telemetry = telemetry
        self._blob = blob
        self._file = file
        self._priority = priority
        self._peer = telemetry._peer(node, origin) if node else None
        self._from_node = telemetry.metrics.received.labels(telemetry._label(node)) if node else None
        self._source = self._peer or telemetry._source(origin)
        self._meter = telemetry._meter_of(blob, origin)
        self._given = telemetry._clock()
        self._came = 0
        self._hedge_in_flight = False
        self._source.in_flight += 1
        telemetry._orders.setdefault(blob, []).append(self)

    def given(self, extents: Iterable[tuple[int, int]], number: int, worker: int) -> None:
        """A worker (its process id) has got it, under this number: these extents of the chunk, in this order."""
        self.number, self._given = number, self._telemetry._clock()
        for read in self._telemetry._waiting(self._blob, self.chunk):
            read.orders += 1
        self._tell(
            logging.DEBUG, "order given", worker=worker, priority=self._priority, host=self._source.origin,
            extents=[f"{start}-{end}" for start, end in extents],
        )  # fmt: skip

    def came(self, count: int) -> None:
        """Bytes are in the cache file."""
        telemetry = self._telemetry
        now = telemetry._clock()
        self._source.meter.add(count, now)
        self._meter.add(count, now)
        if self._from_node is None:
            telemetry._fetched_bytes.inc(count)
        else:
            telemetry._pulled_bytes.inc(count)
            self._from_node.inc(count)
        if not self._came:
            self._tell(logging.DEBUG, "first byte", seconds=now - self._given)
        self._came += count

    def done(self, seconds: float, first_byte_s: float) -> None:
        """All of it came; the times are the worker's, from its request on."""
        metrics = self._telemetry.metrics
        if self._peer is None:
            self._telemetry._fetches_done.inc()
            metrics.fetch.observe(seconds)
            metrics.fetch_first_byte.observe(first_byte_s)
        else:
            self._peer.chunks += 1
            metrics.pulls.labels("ok").inc()
            metrics.pull.observe(seconds)
            metrics.pull_first_byte.observe(first_byte_s)
        self._tell(logging.DEBUG, "order done", seconds=seconds, first_byte_s=first_byte_s, bytes=self._came)

    def recorded(self) -> None:
        """The chunk is complete and in the chunk map."""
        self._tell(logging.DEBUG, "chunk recorded")

    def failed(self, failure: Failed, attempt: int, *, retry: bool, pause_s: float) -> None:
        """It failed for the `attempt`th time in a row; with `retry` it is tried again, there or elsewhere, after a pause."""
        metrics = self._telemetry.metrics
        if self._peer is not None:
            metrics.pulls.labels(failure.reason).inc()
        else:
            metrics.fetches.labels(failure.reason).inc()
            if retry:
                metrics.retries.labels(failure.reason).inc()
        if failure.reason != "cancelled" and self._peer is None:
            self._source.failures += 1
        self._tell(
            logging.INFO, "order failed: %s", failure.message, reason=failure.reason, status=failure.status, bytes=self._came,
            attempt=attempt, verdict=f"again in {pause_s:g} s" if retry else "given up",
        )  # fmt: skip

    def blamed(self) -> None:
        """It failed, and for that the node is to blame that was asked: not where it was busy, did not have it, or was not waited for."""
        self._source.failures += 1

    def hedged(self, number: int, worker: int, after_s: float, silent_s: float, came: int) -> None:
        """What had not come after `after_s` was asked for on another connection too, as order `number`: `came` bytes had, the last of them
        `silent_s` ago."""
        self._hedge_in_flight = True
        self._source.in_flight += 1
        self._tell(
            logging.INFO, "order hedged", by_order=number, worker=worker, after_s=after_s, silent_s=silent_s, bytes=came
        )

    def hedge_ended(self, outcome: str) -> None:
        """`outcome` of the second request: won, lost or failed."""
        if self._hedge_in_flight:
            self._hedge_in_flight = False
            self._source.in_flight -= 1
        self._telemetry.metrics.hedges.labels(outcome).inc()
        self._tell(logging.DEBUG, "hedge ended", outcome=outcome)

    def ended(self) -> None:
        self._source.in_flight -= 1
        orders = self._telemetry._orders[self._blob]
        orders.remove(self)
        if not orders:
            del self._telemetry._orders[self._blob]

    def _tell(self, level: int, message: str, *words: str, **more: object) -> None:
        if fetch_log.isEnabledFor(level):
            said = fields(
                order=self.number, file=self._file, blob=str(self._blob), chunk=self.chunk, **more,
                **self._telemetry._reads_of(self._blob, self.chunk),
            )  # fmt: skip
            fetch_log.log(level, message, *words, extra=said)


class Telemetry:
    """`clock` counts seconds from anywhere."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.metrics = Metrics()
        self.tally = self.metrics.tally
        """For the filesystem, which counts at every read."""
        self._clock = clock
        self._daemon = secrets.token_hex(2)
        self._numbers = itertools.count(1)
        self._waits: dict[BlobId, set[ReadWait]] = {}
        self._orders: dict[BlobId, list[Order]] = {}  # under way
        self._sources: OrderedDict[str, Source] = OrderedDict()
        self._peers: OrderedDict[str, PeerSource] = OrderedDict()  # by node
        self._labels: set[str] = set()
        self._files: OrderedDict[BlobId, tuple[Meter, str]] = OrderedDict()
        # Looked up once: a label costs more than what is counted under it.
        self._fetched_bytes = self.metrics.fetched_bytes.labels("origin")
        self._pulled_bytes = self.metrics.fetched_bytes.labels("peer")
        self._chunks_missed = self.metrics.cache_chunks.labels("miss")
        self._reads_waited = self.metrics.reads.labels("waited")
        self._wait_ok = self.metrics.read_wait.labels("ok")
        self._fetches_done = self.metrics.fetches.labels("ok")

    # Reads -----------------------------------------------------------------------------------------------------------

    def read_waits(
        self, blob: BlobId, file: str, extent: Extent, chunks: range, missing: int, opener: Opener
    ) -> ReadWait:
        """A read of `extent`, which touches `chunks` of which `missing` are not there, has to wait."""
        wait = ReadWait(self, blob, file, extent, chunks, opener)
        self._waits.setdefault(blob, set()).add(wait)
        self._chunks_missed.inc(missing)
        self.tally.chunks_found += len(chunks) - missing
        return wait

    def read_failed(self, file: str, error: BaseException) -> None:
        """A read failed that did not wait for a fetch: the cache's disk."""
        outcome = _outcome(error)
        self.metrics.reads.labels(outcome).inc()
        if outcome != "cancelled":
            reads_log.warning("read failed: %s", _sentence(error), extra=fields(file=file, outcome=outcome))

    def waiting(self, blob: BlobId | None = None) -> int:
        """Reads that wait right now, for `blob` or at all."""
        if blob is None:
            return sum(map(len, self._waits.values()))
        return len(self._waits.get(blob, ()))

    def waiting_by_blob(self) -> dict[BlobId, int]:
        """How many reads wait for bytes of each blob that any waits for."""
        return {blob: len(waits) for blob, waits in self._waits.items()}

    # Fetches ---------------------------------------------------------------------------------------------------------

    def question(self, blob: BlobId, file: str, origin: str) -> Question:
        """The hub at `origin` is asked where the bytes of `blob` are."""
        return Question(self, blob, file, origin)

    def order(self, blob: BlobId, file: str, chunk: int, priority: str, origin: str, node: str = "") -> Order:
        """An order for bytes of `chunk` at `origin` (scheme, host, port) is about to be given; or at another node, where `node` is its id
        and `origin` its HOST:PORT."""
        return Order(self, blob, file, chunk, priority, origin, node)

    def given(self, node: str, count: int, chunks: int) -> None:
        """Another node got so many bytes of us, with which so many chunks were done."""
        peer = self._peer(node)
        peer.given.add(count, self._clock())
        peer.given_chunks += chunks
        self.metrics.given.labels(self._label(node)).inc(count)
        self.metrics.given_chunks.inc(chunks)

    def refused(self, reason: str, count: int) -> None:
        """Other nodes' requests were refused: busy (no upload slot) or auth."""
        self.metrics.refusals.labels(reason).inc(count)

    def throttled(self, origin: str, seconds: float, request: str) -> None:
        """`origin` asked for a pause when asked for a `request` (location or bytes)."""
        self.metrics.throttles.labels(request).inc()
        self.metrics.throttle_seconds.inc(seconds)
        fetch_log.warning("the origin asks for a pause", extra=fields(host=origin, seconds=seconds, request=request))

    def gave_up(self, error: MantaError) -> None:
        """It became a sentence in `manta status`."""
        self.metrics.errors.labels(error.code).inc()

    def seal_ended(self, outcome: str) -> None:
        """A complete blob was compared with the hub's digest: sealed, mismatch or failed."""
        self.metrics.seals.labels(outcome).inc()

    def worker_ended(self, role: str, pid: int) -> None:
        """A worker process is gone, and its end has not been collected yet."""
        self.metrics.worker_ended(role, pid)

    # Care of the cache -----------------------------------------------------------------------------------------------

    def evicted(self, blobs: int, size: int, reason: str) -> None:
        """`reason`: limit, floor or request."""
        self.metrics.evicted_blobs.labels(reason).inc(blobs)
        self.metrics.evicted_bytes.labels(reason).inc(size)

    def verified(self, outcome: str) -> None:
        """A blob was compared with its digests on request: sound, damaged, or repaired."""
        self.metrics.verified.labels(outcome).inc()

    # For `manta top` -------------------------------------------------------------------------------------------------

    def sources(self) -> list[tuple[Source, float]]:
        """The hosts, the latest used first, and the bytes per second that come from each; then the nodes that gave something, likewise."""
        now = self._clock()
        givers = [peer for peer in reversed(self._peers.values()) if peer.meter.total or peer.in_flight]
        return [
            (source, source.meter.rate(now)) for source in (*reversed(self._sources.values()), *givers[:SOURCES_MAX])
        ]

    def peers(self) -> list[tuple[PeerSource, float, float]]:
        """The nodes with which there was something to do, and the bytes per second from each and to each."""
        now = self._clock()
        return [(peer, peer.meter.rate(now), peer.given.rate(now)) for peer in self._peers.values()]

    def file_rate(self, blob: BlobId) -> FileRate:
        meter, origin = self._files.get(blob, (None, ""))
        return FileRate(meter.rate(self._clock()) if meter is not None else 0.0, origin)

    # What is followed ------------------------------------------------------------------------------------------------

    def _new_id(self) -> str:
        return f"r{self._daemon}-{next(self._numbers)}"

    def _forget(self, wait: ReadWait) -> None:
        waits = self._waits[wait.blob]
        waits.discard(wait)
        if not waits:
            del self._waits[wait.blob]

    def _waiting(self, blob: BlobId, chunk: int | None = None) -> list[ReadWait]:
        return [wait for wait in self._waits.get(blob, ()) if chunk is None or chunk in wait.chunks]

    def _reads_of(self, blob: BlobId, chunk: int | None = None) -> dict[str, object]:
        """The fields that name the reads that wait for `chunk` (None: for anything of `blob`); none where none waits."""
        ids = sorted(wait.id for wait in self._waiting(blob, chunk))
        more: dict[str, object] = {"reads_more": len(ids) - NAMED_MAX} if len(ids) > NAMED_MAX else {}
        return {"reads": ids[:NAMED_MAX], **more} if ids else {}

    def _source(self, origin: str) -> Source:
        source = self._sources.get(origin)
        if source is None:
            source = self._sources[origin] = Source(origin)
            idle = [name for name, other in self._sources.items() if not other.in_flight and other is not source]
            if len(self._sources) > SOURCES_MAX and idle:
                del self._sources[idle[0]]
        self._sources.move_to_end(origin)
        return source

    def _peer(self, node: str, origin: str = "") -> PeerSource:
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = PeerSource(origin, node=node)
            idle = (name for name, other in self._peers.items() if not other.in_flight and other is not peer)
            if len(self._peers) > PEERS_MAX and (longest := next(idle, None)) is not None:
                del self._peers[longest]
        peer.origin = origin or peer.origin
        self._peers.move_to_end(node)
        return peer

    def _label(self, node: str) -> str:
        """The label of a node: its own for the first NODES_MAX that there is something to count of, for the daemon's life."""
        if node not in self._labels:
            if len(self._labels) >= NODES_MAX:
                return "other"
            self._labels.add(node)
        return node

    def _meter_of(self, blob: BlobId, origin: str) -> Meter:
        meter, _ = self._files.get(blob, (None, ""))
        self._files[blob] = meter or Meter(), origin
        self._files.move_to_end(blob)
        if len(self._files) > FILES_MAX:
            self._files.popitem(last=False)
        return self._files[blob][0]


def _outcome(error: BaseException) -> str:
    """The label of what ended a read: an error's code; `cancelled` where nobody waits for it any more."""
    if isinstance(error, MantaError):
        return error.code
    return "error" if isinstance(error, Exception) else "cancelled"


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, MantaError) else f"unforeseen {type(error).__name__}"
