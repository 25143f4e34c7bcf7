"""Every metric of the daemon: name, unit, help, labels, here and only here. Served as /metrics by `manta.daemon`.

Names and units follow https://prometheus.io/docs/practices/naming/. Labels have values from fixed lists, but for the kinds of a hub's
quotas, which `manta.hub.huggingface` bounds at eight, the ids of NODES_MAX other nodes, and the pods and repos of VOLUMES_MAX volumes,
whose series go with them: no file, host or process id is ever a label.
What happens is counted by `manta.telemetry.events`; what is (`State`) is asked for when somebody looks. Belongs to the trio thread.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeVar, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import generate_latest as _rendered

from manta import __version__
from manta.errors import (
    Absent,
    CacheBroken,
    Corrupt,
    Denied,
    InUse,
    Invalid,
    MantaError,
    NoSpace,
    Throttled,
    Unavailable,
)
from manta.telemetry.processes import usage
from manta.wire.messages import Reason
from manta.wire.peering import MemberState

CONTENT_TYPE = CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody looks at

ERRORS = tuple(
    kind.code
    for kind in (Absent, Denied, Unavailable, Throttled, Corrupt, NoSpace, CacheBroken, InUse, Invalid, MantaError)
)
ROLES = ("fetch", "digest", "peer")
REASONS: tuple[str, ...] = get_args(Reason)
ORIGIN_REASONS = tuple(reason for reason in REASONS if reason != "busy")
MEMBER_STATES: tuple[str, ...] = get_args(MemberState)

NODES_MAX = 64
"""Nodes that have a label of their own: two series each. The others are counted together, as "other"."""

VOLUMES_MAX = 512
"""Volumes of pods that have series of their own: four each. `manta_volumes` counts them all."""

_LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Seconds: from a near hub's round trip to the reader's deadline (60 s)."""

_Labelled = TypeVar("_Labelled", Counter, Gauge, Histogram)


@dataclass(slots=True)
class Tally:
    """What is counted at every read, as plain numbers: a tenth of the cost of a metric's own. `Metrics.rendered` takes them over."""

    hits: int = 0
    """Reads answered without waiting for a fetch."""
    chunks_found: int = 0
    """Chunks that reads touched and that were there."""
    page_cache_bytes: int = 0
    disk_bytes: int = 0
    origin_bytes: int = 0
    """Of reads that waited for a fetch."""

    @property
    def bytes(self) -> int:
        """Bytes given to readers."""
        return self.page_cache_bytes + self.disk_bytes + self.origin_bytes


class QuotaLeft(NamedTuple):
    """One of the hub's request quotas as its last answer had it."""

    kind: str
    remaining: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class SwarmState:
    """`members` has the state of each; `origin_multiple` is None where nothing has come."""

    members: Sequence[MemberState]
    slots: int
    busy: int
    origin_multiple: float | None


class Volume(NamedTuple):
    """What a pod has mounted of a repo. Sizes in bytes, `rate` in bytes per second."""

    namespace: str
    pod: str
    repo: str
    """"" for the whole hub."""
    size: int = 0
    cached: int = 0
    rate: float = 0.0
    waiting: int = 0
    """Reads that wait for bytes of it."""


@dataclass(frozen=True, slots=True)
class State:
    """What is so right now. `workers` are (role, process id); `disk_free` is None where the disk does not say."""

    cache_bytes: int
    cache_limit: int
    disk_free: int | None
    connections_allowed: int
    connections_in_use: int
    open_files: int
    known_inodes: int
    mounts: int
    transfers: int
    reads_waiting: int
    hub_throttles: int
    quotas: Sequence[QuotaLeft]
    workers: Sequence[tuple[str, int]]
    swarm: SwarmState | None = None
    """None without one."""
    volumes: Sequence[Volume] = ()
    """At most VOLUMES_MAX, with no pod and repo twice."""
    volumes_total: int = 0


class Metrics:
    """One registry of one's own: two daemons in one test process do not meet."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._taken = Tally()
        self._hub_throttles_taken = 0
        self._worker_cpu: dict[int, float] = {}  # by process id: what has been counted of it
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry, buckets=_LATENCY_BUCKETS)

        self.build = gauge("manta_build_info", "Always 1; the labels tell what runs.", ["version", "python", "fuse"])

        # Reads
        self.reads = _ready(
            counter(
                "manta_reads",
                "Reads of files that came to the daemon, by outcome: hit (nothing to wait for), waited, cancelled, or the error's code."
                " Those that the kernel's page cache answers never come to it.",
                ["outcome"],
            ),
            ("hit", "waited", "cancelled", *ERRORS),
        )
        self.read_wait = _ready(
            histogram("manta_read_wait_seconds", "How long reads waited that had to, by outcome.", ["outcome"]),
            ("ok", "error"),
        )
        self.reads_waiting = gauge("manta_reads_waiting", "Reads that wait for bytes right now.")
        self.read_bytes = _ready(
            counter(
                "manta_read_bytes",
                "Bytes given to readers, by where the daemon had them from: page_cache (memory), disk (the cache's disk), origin (the read"
                " waited for them to be fetched, from the origin or from another node).",
                ["source"],
            ),
            ("page_cache", "disk", "origin"),
        )
        self.cache_chunks = _ready(
            counter(
                "manta_cache_chunk_requests",
                "Chunks that reads touched, once per read: hit where all of it was in the cache, miss where the read had to wait.",
                ["result"],
            ),
            ("hit", "miss"),
        )

        # Fetches
        self.fetched_bytes = _ready(
            counter(
                "manta_fetched_bytes",
                "Bytes that came over the network, by source: origin, or peer (other nodes; not yet compared with their digest).",
                ["source"],
            ),
            ("origin", "peer"),
        )
        self.fetch_first_byte = histogram(
            "manta_fetch_first_byte_seconds", "From a request to the origin for a chunk's bytes to the first of them."
        )
        self.fetch = histogram(
            "manta_fetch_duration_seconds", "From a request to the origin for a chunk's bytes to the last of them."
        )
        self.fetches = _ready(
            counter(
                "manta_fetches",
                "Orders for a chunk's bytes from the origin that ended, by outcome: ok, or why they failed.",
                ["outcome"],
            ),
            ("ok", *ORIGIN_REASONS),
        )
        self.locations = _ready(
            counter(
                "manta_location_requests", "Questions to the hub where a file's bytes are, by outcome.", ["outcome"]
            ),
            ("ok", *ERRORS),
        )
        self.location_seconds = histogram(
            "manta_location_duration_seconds",
            "From such a question to its answer, the wait for a free worker included.",
        )
        self.retries = _ready(
            counter(
                "manta_retries", "Orders to the origin that failed and are tried again, by why they failed.", ["reason"]
            ),
            ORIGIN_REASONS,
        )
        self.hedges = _ready(
            counter(
                "manta_hedges",
                "Second requests for a straggling range, by outcome: won (it was first), lost, failed.",
                ["outcome"],
            ),
            ("won", "lost", "failed"),
        )
        self.errors = _ready(
            counter(
                "manta_errors",
                "Fetches and verifications given up, by code. Each is a sentence in `manta status`; reads that failed are in manta_reads.",
                ["reason"],
            ),
            ERRORS,
        )
        self.throttles = _ready(
            counter(
                "manta_throttles", "Answers that asked for a pause (HTTP 429), by what was asked for.", ["request"]
            ),
            ("metadata", "location", "bytes"),
        )
        self.throttle_seconds = counter(
            "manta_throttle_seconds", "Seconds of pause that they asked for, for locations and bytes together."
        )
        self.connections_allowed = gauge("manta_connections_allowed", "Requests to the origin that may be in flight.")
        self.connections_in_use = gauge("manta_connections_in_use", "Requests for bytes that are in flight.")
        self.transfers = gauge("manta_transfers_in_flight", "Files of which something is still to be fetched.")
        self.quota = gauge(
            "manta_hub_quota_remaining", "Requests left in the hub's window, as its last answer said.", ["kind"]
        )
        self.quota_limit = gauge("manta_hub_quota_limit", "Requests per window of the hub, where it says.", ["kind"])

        # The swarm
        self.pulls = _ready(
            counter(
                "manta_pulls",
                "Chunks asked of other nodes, by outcome: ok (compared with its digest), busy (the node has no upload slot), corrupt (a"
                " wrong chunk), or why else they did not come.",
                ["outcome"],
            ),
            ("ok", *REASONS),
        )
        self.pull_first_byte = histogram(
            "manta_pull_first_byte_seconds", "From asking another node for a chunk to its first byte."
        )
        self.pull = histogram(
            "manta_pull_duration_seconds", "From asking another node for a chunk to having all of it, compared."
        )
        self.received = _ready(
            counter(
                "manta_peer_received_bytes",
                "Bytes that came from other nodes, by node: the first 64 by their id, the rest as other.",
                ["node"],
            ),
            ("other",),
        )
        self.given = _ready(
            counter("manta_peer_given_bytes", "Bytes given to other nodes, by node, likewise.", ["node"]), ("other",)
        )
        self.given_chunks = counter("manta_peer_given_chunks", "Chunks given to other nodes.")
        self.refusals = _ready(
            counter(
                "manta_peer_refusals",
                "Requests of other nodes that were refused, by reason: busy (no upload slot), auth (key, clock, replay).",
                ["reason"],
            ),
            ("busy", "auth"),
        )
        self.members = _ready(
            gauge("manta_peer_members", "Other nodes of the swarm, by state.", ["state"]), MEMBER_STATES
        )
        self.upload_slots = gauge("manta_peer_upload_slots", "Chunks that may be given at a time; 0 without a swarm.")
        self.upload_slots_busy = gauge("manta_peer_upload_slots_in_use", "Chunks that are being given.")
        self.origin_multiple = gauge(
            "manta_origin_multiple_ratio",
            "Bytes from the origin for each byte that this node has got since its start, from anywhere: 1 alone, 1/N of N nodes that start"
            " at once. NaN while nothing has come, and without a swarm.",
        )

        # Cache
        self.cache_bytes = gauge("manta_cache_bytes", "Bytes in the cache.")
        self.cache_limit = gauge(
            "manta_cache_limit_bytes", "Bytes that may be in the cache (cache.size); 0 is no limit."
        )
        self.disk_free = gauge("manta_cache_disk_free_bytes", "Bytes left on the cache's disk.")
        evictions = ("limit", "floor", "request")
        self.evicted_blobs = _ready(
            counter(
                "manta_cache_evicted_blobs",
                "Blobs taken out of the cache, by reason: limit (cache.size), floor (cache.free_space_floor), request (a person's).",
                ["reason"],
            ),
            evictions,
        )
        self.evicted_bytes = _ready(
            counter("manta_cache_evicted_bytes", "Bytes taken out of the cache, by reason.", ["reason"]), evictions
        )
        self.seals = _ready(
            counter(
                "manta_seals",
                "Complete blobs compared with the hub's digest, by outcome: sealed, mismatch, or failed (not verified, left for later).",
                ["outcome"],
            ),
            ("sealed", "mismatch", "failed"),
        )
        self.verified = _ready(
            counter("manta_verified_blobs", "Blobs looked at by `manta cache verify`, by outcome.", ["outcome"]),
            ("sound", "damaged", "repaired"),
        )

        # Volumes of pods
        labels = ["namespace", "pod", "repo"]
        self.volumes = gauge("manta_volumes", "Volumes of pods.")
        self.volume_size = gauge(
            "manta_volume_bytes", "Bytes that a pod's volume shows; of the first 512 volumes.", labels
        )
        self.volume_cached = gauge("manta_volume_cached_bytes", "Those of them that are in the cache.", labels)
        self.volume_rate = gauge("manta_volume_bytes_per_second", "Bytes that come for it now.", labels)
        self.volume_waiting = gauge("manta_volume_reads_waiting", "Reads that wait for bytes of it now.", labels)

        # The filesystem and the processes
        self.mounts = gauge("manta_mounts", "Mounts.")
        self.open_files = gauge("manta_open_files", "File handles that the kernel has open.")
        self.known_inodes = gauge("manta_known_inodes", "Inodes that the kernel may name.")
        self.worker_restarts = _ready(
            counter("manta_worker_restarts", "Worker processes that ended and were replaced, by role.", ["role"]), ROLES
        )
        self.workers = gauge("manta_workers", "Worker processes, by role.", ["role"])
        self.worker_cpu = _ready(
            counter("manta_worker_cpu_seconds", "CPU time of worker processes, those that ended included.", ["role"]),
            ROLES,
        )
        self.worker_memory = gauge(
            "manta_worker_resident_memory_bytes", "Memory of worker processes, by role.", ["role"]
        )
        ProcessCollector(registry=self._registry)  # process_*: the daemon's own CPU, memory, descriptors, start

    def announce(self, fuse: str) -> None:
        """What runs: `fuse` is the name of the session."""
        self.build.labels(__version__, platform.python_version(), fuse).set(1)

    def worker_ended(self, role: str, pid: int) -> None:
        """Before its end is collected: afterwards nobody knows its CPU time."""
        self.worker_restarts.labels(role).inc()
        self._count_cpu(role, pid)
        self._worker_cpu.pop(pid, None)

    def rendered(self, state: State) -> bytes:
        """All of them in Prometheus' text format (CONTENT_TYPE), with `state` as it is now. Takes about 3 ms."""
        self._take_tally()
        self._take_state(state)
        return _rendered(self._registry)

    def _take_tally(self) -> None:
        now, before = self.tally, self._taken
        self.reads.labels("hit").inc(now.hits - before.hits)
        self.cache_chunks.labels("hit").inc(now.chunks_found - before.chunks_found)
        self.read_bytes.labels("page_cache").inc(now.page_cache_bytes - before.page_cache_bytes)
        self.read_bytes.labels("disk").inc(now.disk_bytes - before.disk_bytes)
        self.read_bytes.labels("origin").inc(now.origin_bytes - before.origin_bytes)
        self._taken = replace(now)

    def _take_state(self, state: State) -> None:
        self.cache_bytes.set(state.cache_bytes)
        self.cache_limit.set(state.cache_limit)
        self.disk_free.set(float("nan") if state.disk_free is None else state.disk_free)
        self.connections_allowed.set(state.connections_allowed)
        self.connections_in_use.set(state.connections_in_use)
        self.open_files.set(state.open_files)
        self.known_inodes.set(state.known_inodes)
        self.mounts.set(state.mounts)
        self.transfers.set(state.transfers)
        self.reads_waiting.set(state.reads_waiting)
        swarm = state.swarm
        for name in MEMBER_STATES:
            self.members.labels(name).set(0 if swarm is None else sum(member == name for member in swarm.members))
        self.upload_slots.set(0 if swarm is None else swarm.slots)
        self.upload_slots_busy.set(0 if swarm is None else swarm.busy)
        multiple = None if swarm is None else swarm.origin_multiple
        self.origin_multiple.set(float("nan") if multiple is None else multiple)
        self.throttles.labels("metadata").inc(state.hub_throttles - self._hub_throttles_taken)
        self._hub_throttles_taken = state.hub_throttles
        for quota in state.quotas:
            self.quota.labels(quota.kind).set(quota.remaining)
            if quota.limit is not None:
                self.quota_limit.labels(quota.kind).set(quota.limit)
        for role in ROLES:
            pids = [pid for of, pid in state.workers if of == role]
            self.workers.labels(role).set(len(pids))
            self.worker_memory.labels(role).set(sum(self._count_cpu(role, pid) for pid in pids))

        self._take_volumes(state)

    def _take_volumes(self, state: State) -> None:
        self.volumes.set(state.volumes_total)
        for metric in (self.volume_size, self.volume_cached, self.volume_rate, self.volume_waiting):
            metric.clear()
        for volume in state.volumes:
            labels = volume.namespace, volume.pod, volume.repo
            self.volume_size.labels(*labels).set(volume.size)
            self.volume_cached.labels(*labels).set(volume.cached)
            self.volume_rate.labels(*labels).set(volume.rate)
            self.volume_waiting.labels(*labels).set(volume.waiting)

    def _count_cpu(self, role: str, pid: int) -> int:
        """Counts what the worker has used since it was last looked at; returns the memory it has."""
        found = usage(pid)
        if found is None:
            return 0
        self.worker_cpu.labels(role).inc(max(0.0, found.cpu_s - self._worker_cpu.get(pid, 0.0)))
        self._worker_cpu[pid] = found.cpu_s
        return found.resident_bytes


def _ready(metric: _Labelled, values: Sequence[str]) -> _Labelled:
    """Has it show each label value from the start, with 0: a rate over what appears out of nowhere misses the first."""
    for value in values:
        metric.labels(value)
    return metric
