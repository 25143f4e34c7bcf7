"""Traffic: what the hub was asked and what it sent. The request log, byte counters and coverage of blobs.

Only body bytes handed to a socket count, at their place in the blob. Written by server.py and delivery.py on
the event loop, read by the admin API. "Sent more than once" is exact: kept as the edges of what was sent.
"""

from __future__ import annotations

from collections import deque

import msgspec

from manta.testing.hub.routes import Kind, Origin

# Edges kept per blob. A million distinct range edges is more than any client makes of one file; beyond it
# coverage is no longer recorded and the blob's counters say so.
EDGES_MAX = 1 << 20
VIOLATIONS_MAX = 1000


class LogEntry(msgspec.Struct, kw_only=True):
    """One request. `started` in Unix seconds, `duration_s` -1 while it runs; `sent` body bytes so far."""

    number: int
    started: float
    origin: Origin
    method: str
    path: str
    kind: Kind
    repo: str
    file: str
    range: str
    client: str
    user_agent: str
    authorized: bool
    status: int = 0
    sent: int = 0
    duration_s: float = -1.0
    faults: list[str] = []
    aborted: bool = False  # the client left, or a fault cut the answer


class Coverage:
    """How often each byte of a blob was sent: a step function, held as its jumps."""

    def __init__(self) -> None:
        self._jumps: dict[int, int] = {}
        self.complete = True

    def add(self, start: int, stop: int) -> None:
        """Record one sending of [start, stop)."""
        if start >= stop or not self.complete:
            return
        for edge, jump in ((start, 1), (stop, -1)):
            level = self._jumps.get(edge, 0) + jump
            if level:
                self._jumps[edge] = level
            else:
                del self._jumps[edge]
        self.complete = len(self._jumps) <= EDGES_MAX

    def intervals(self) -> list[tuple[int, int, int]]:
        """(start, stop, times) of every stretch that was sent, in order."""
        rows = []
        level, at = 0, 0
        for edge in sorted(self._jumps):
            if level:
                rows.append((at, edge, level))
            level, at = level + self._jumps[edge], edge
        return rows


class BlobTraffic(msgspec.Struct, frozen=True):
    """What was sent of one blob, in bytes.

    unique: sent at least once. repeated: sent beyond the first time. most: times the most-sent byte left.
    complete: false when the blob's ranges had too many edges to keep, which makes the last three too low.
    """

    size: int
    files: list[str]
    requests: int
    sent: int
    unique: int
    repeated: int
    most: int
    complete: bool


class OriginTraffic(msgspec.Struct):
    """Requests to one origin, those still running, and body bytes of all its answers."""

    requests: int = 0
    in_flight: int = 0
    sent: int = 0


class Stats(msgspec.Struct, frozen=True):
    """Everything counted since the start or the last reset. `cpu_s` and `peak_rss` are the process's own."""

    origins: dict[Origin, OriginTraffic]
    kinds: dict[Kind, int]
    statuses: dict[int, int]
    blobs: dict[str, BlobTraffic]
    violations: list[str]
    cpu_s: float
    peak_rss: int


class _BlobRecord:
    def __init__(self, size: int) -> None:
        self.size = size
        self.files: set[str] = set()
        self.requests = 0
        self.sent = 0
        self.coverage = Coverage()

    def summary(self) -> BlobTraffic:
        intervals = self.coverage.intervals()
        return BlobTraffic(
            size=self.size,
            files=sorted(self.files),
            requests=self.requests,
            sent=self.sent,
            unique=sum(stop - start for start, stop, _ in intervals),
            repeated=sum((stop - start) * (times - 1) for start, stop, times in intervals),
            most=max((times for _, _, times in intervals), default=0),
            complete=self.coverage.complete,
        )


class Ledger:
    """Keeps the log (the newest `log_max` requests) and the counters."""

    def __init__(self, log_max: int = 10_000) -> None:
        self.log: deque[LogEntry] = deque(maxlen=log_max)
        self.number = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything but the numbering; requests in flight keep their entries and finish unseen."""
        self.log.clear()
        self.origins: dict[Origin, OriginTraffic] = {}
        self.kinds: dict[Kind, int] = {}
        self.statuses: dict[int, int] = {}
        self.violations: list[str] = []
        self._blobs: dict[str, _BlobRecord] = {}

    def next_number(self) -> int:
        """The number of the request that is about to begin; never given twice."""
        self.number += 1
        return self.number

    def begin(self, entry: LogEntry) -> None:
        """A request has arrived."""
        self.log.append(entry)
        origin = self.origins.setdefault(entry.origin, OriginTraffic())
        origin.requests += 1
        origin.in_flight += 1
        self.kinds[entry.kind] = self.kinds.get(entry.kind, 0) + 1
        if entry.authorized and entry.origin != "hub" and len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(f"request {entry.number}: Authorization reached {entry.origin}: {entry.path}")

    def sending(self, blob: str, size: int, file: str) -> None:
        """A request is about to send bytes of a blob."""
        record = self._blobs.setdefault(blob, _BlobRecord(size))
        record.requests += 1
        if file:
            record.files.add(file)

    def sent(self, entry: LogEntry, blob: str, start: int, stop: int) -> None:
        """Bytes [start, stop) have been handed to the socket."""
        entry.sent += stop - start
        self.origins.setdefault(entry.origin, OriginTraffic()).sent += stop - start
        record = self._blobs.get(blob)
        if record is not None:
            record.sent += stop - start
            # A body with injected bytes can run past the blob's end.
            record.coverage.add(start, min(stop, record.size))

    def end(self, entry: LogEntry, duration_s: float) -> None:
        """A request is over."""
        entry.duration_s = duration_s
        origin = self.origins.setdefault(entry.origin, OriginTraffic())
        origin.in_flight = max(0, origin.in_flight - 1)
        self.statuses[entry.status] = self.statuses.get(entry.status, 0) + 1

    def coverage(self, blob: str) -> list[tuple[int, int, int]]:
        """(start, stop, times sent) of every stretch of a blob that was sent."""
        record = self._blobs.get(blob)
        return [] if record is None else record.coverage.intervals()

    def stats(self, *, cpu_s: float, peak_rss: int) -> Stats:
        """All counters as values."""
        return Stats(
            origins=self.origins,
            kinds=self.kinds,
            statuses=self.statuses,
            blobs={blob: record.summary() for blob, record in self._blobs.items()},
            violations=self.violations,
            cpu_s=cpu_s,
            peak_rss=peak_rss,
        )
