"""Work that the daemon does on its own after being asked once: prefetching and verifying, here and only here. trio thread."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import trio

from manta.cache.inventory import BlobInfo
from manta.cache.store import Store
from manta.control.protocol import Job, JobState
from manta.errors import Absent, Corrupt, InUse, MantaError
from manta.fetch.fetcher import Fetcher
from manta.fetch.sources import Provenance
from manta.hub.catalog import Catalog
from manta.hub.origin import Access
from manta.model.ids import BlobId, Target
from manta.model.snapshot import FileEntry
from manta.operations.verification import Verification
from manta.telemetry.meter import Meter

log = logging.getLogger(__name__)

KEPT_SECONDS = 600.0
KEPT_MAX = 256
"""Ended jobs that are kept; the oldest go first."""

RUNNING_MAX = 64
PROBLEMS_MAX = 100
FILES_AT_ONCE = 8
"""Files of one prefetch under way: enough that small files do not wait for each other's round trips."""


@dataclass(eq=False)
class _Job:
    id: str
    kind: Literal["prefetch", "verify"]
    name: str
    scope: trio.CancelScope
    began: float
    state: JobState = "running"
    files_total: int = 0
    files_done: int = 0
    bytes_total: int = 0
    bytes_before: Callable[[], int] = lambda: 0
    damaged: int = 0
    repaired: int = 0
    problems: list[str] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    seen: int = 0
    ended: float | None = None

    def problem(self, e: MantaError) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(e.message)


class Jobs:
    """Give it the daemon's nursery. A job that ended is kept for KEPT_SECONDS, so that who asked can see how it ended."""

    def __init__(
        self,
        nursery: trio.Nursery,
        catalog: Catalog,
        fetcher: Fetcher,
        store: Store,
        verification: Verification,
        ended: Callable[[], None],
    ) -> None:
        self._nursery = nursery
        self._catalog = catalog
        self._fetcher = fetcher
        self._store = store
        self._verification = verification
        self._ended = ended
        self._jobs: dict[str, _Job] = {}
        self._prefetching: Counter[BlobId] = Counter()
        self._numbers = itertools.count(1)

    @property
    def running(self) -> int:
        return sum(1 for job in self._jobs.values() if job.state == "running")

    def __getitem__(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise Absent(
                f"There is no job {job_id!r}; it may have ended more than {KEPT_SECONDS / 60:.0f} minutes ago."
            )
        return self._describe(self._jobs[job_id])

    def cancel(self, job_id: str) -> Job:
        """What has been fetched stays."""
        self[job_id]
        self._jobs[job_id].scope.cancel()
        return self._describe(self._jobs[job_id])

    async def prefetch(self, target: Target, access: Access) -> Job:
        """Fetches every file of the target. Raises what the hub says about the target itself."""
        resolution = await self._catalog.resolve(target.repo, target.revision, access)
        snapshot = await self._catalog.snapshot(target.repo, resolution.commit, access)
        if (denial := self._catalog.denial(snapshot, access)) is not None:
            raise denial
        entries = list(snapshot.below(target.subfolder))
        if target.subfolder and not entries:
            raise Absent(f"{target.repo}@{resolution.commit[:12]} has no folder {target.subfolder!r}.")
        job = self._start("prefetch", f"{target.repo}@{resolution.commit}")
        job.files_total = len(entries)
        job.bytes_total = sum(entry.size for entry in entries)
        sizes = {entry.blob: entry.size for entry in entries if entry.blob is not None}
        twice, once = job.bytes_total - sum(sizes.values()), dict.fromkeys(sizes, 1)
        job.bytes_before = lambda: twice + self._store.cached_of(once)

        async def fetch(entry: FileEntry) -> None:
            if entry.size == 0:
                return
            transfer = self._fetcher.open(Provenance(target.repo, resolution.commit, entry, access))
            blob = transfer.blob.id
            self._prefetching[blob] += 1
            try:
                await transfer.complete()
            finally:
                self._prefetching[blob] -= 1
                if not self._prefetching[blob]:
                    del self._prefetching[blob]
                    # Cancelled or failed, unless another job wants it: what came stays, no more is to come.
                    self._fetcher.stop_background(str(blob))
                self._fetcher.close(transfer)

        self._nursery.start_soon(self._work, job, [partial(fetch, entry) for entry in entries])
        return self._describe(job)

    def verify(self, blobs: list[BlobId], *, full: bool = False, repair: Access | None = None) -> Job:
        """See `Verification.verify`. A blob that was damaged is a problem of the job, also where it was repaired."""
        job = self._start("verify", "cache")
        infos = [info for info in map(self._store.find, blobs) if info is not None]
        job.files_total, job.bytes_total = len(infos), sum(info.cached for info in infos)
        done = dict.fromkeys((info.id for info in infos), 0)
        job.bytes_before = lambda: sum(done.values())

        async def verify(info: BlobInfo) -> None:
            def progress(count: int) -> None:
                done[info.id] = min(done[info.id] + count, info.cached)

            found = await self._verification.verify(info.id, info.size, progress, full=full, repair=repair)
            job.damaged += found.damaged
            job.repaired += found.repaired
            if found.sentence:
                raise Corrupt(found.sentence)

        self._nursery.start_soon(self._work, job, [partial(verify, info) for info in infos])
        return self._describe(job)

    def _start(self, kind: Literal["prefetch", "verify"], name: str) -> _Job:
        if self.running >= RUNNING_MAX:
            raise InUse(f"{RUNNING_MAX} jobs are running already. Wait for one to end.")
        now = trio.current_time()
        ended = sorted((j.ended, j.id) for j in self._jobs.values() if j.ended is not None)
        for number, (at, old) in enumerate(reversed(ended)):
            if number >= KEPT_MAX or now - at > KEPT_SECONDS:
                del self._jobs[old]
        job = _Job(str(next(self._numbers)), kind, name, trio.CancelScope(), now)
        self._jobs[job.id] = job
        return job

    async def _work(self, job: _Job, parts: Sequence[Callable[[], Awaitable[None]]]) -> None:
        """Does the parts, a few at a time; a part that fails does not stop the others."""
        limiter = trio.CapacityLimiter(FILES_AT_ONCE)

        async def do(part: Callable[[], Awaitable[None]]) -> None:
            try:
                await part()
            except MantaError as e:
                job.problem(e)
            except Exception as e:  # it ends this part, and not the daemon with everyone's mounts
                log.exception("a part of the %s of %s failed in an unforeseen way", job.kind, job.name)
                job.problem(MantaError(f"The daemon failed ({type(e).__name__}); its log has the details."))
            finally:
                limiter.release_on_behalf_of(part)
            job.files_done += 1

        log.info("%s of %s begins: %d files, %d bytes", job.kind, job.name, job.files_total, job.bytes_total)
        try:
            with job.scope:
                async with trio.open_nursery() as nursery:
                    for part in parts:
                        await limiter.acquire_on_behalf_of(part)
                        nursery.start_soon(do, part)
        finally:
            if job.scope.cancelled_caught:
                job.state = "cancelled"
            else:
                job.state = "failed" if job.problems else "done"
            job.ended = trio.current_time()
            done = job.bytes_before()
            job.bytes_before = lambda: done  # as it was then; and the trees that it was counted from may go
            log.info("%s of %s: %s", job.kind, job.name, job.state)
            self._ended()

    @staticmethod
    def _describe(job: _Job) -> Job:
        now, done = trio.current_time(), job.bytes_before()
        if done > job.seen:
            # The first look finds what an earlier fetch left: that is no rate.
            if job.seen or job.files_done:
                job.meter.add(done - job.seen, now)
            job.seen = done
        return Job(
            id=job.id,
            kind=job.kind,
            state=job.state,
            name=job.name,
            files_total=job.files_total,
            files_done=job.files_done,
            bytes_total=job.bytes_total,
            bytes_done=done,
            rate=job.meter.rate(now) if job.state == "running" else 0.0,
            problems=list(job.problems),
            seconds=(now if job.ended is None else job.ended) - job.began,
            damaged=job.damaged,
            repaired=job.repaired,
        )
