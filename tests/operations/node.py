"""The parts of a daemon that its operations need, over a hub in memory: real store, catalog, fetcher and sealer; no kernel, no process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from manta.cache.metadata import MetadataStore
from manta.cache.pins import Pins
from manta.config import CacheConfig
from manta.control.protocol import Job, Mount, MountRequest
from manta.fs.journal import Journal
from manta.hub.catalog import Catalog
from manta.hub.identity import Identity
from manta.model.ids import BlobId, parse_target
from manta.operations.failures import Failures
from manta.operations.housekeeping import Housekeeping
from manta.operations.jobs import Jobs
from manta.operations.mounts import Mounted, Mounts
from manta.operations.publications import Publications
from manta.operations.room import Room
from manta.operations.verification import Verification
from manta.telemetry.events import Telemetry
from tests.fs.fakes import ACCESS, Blobs, MemoryHub, fetching


class Node:
    """One daemon's operations. `gone`, `ended` and `discarded` are what they told the daemon."""

    def __init__(
        self, hub: MemoryHub, blobs: Blobs, nursery: trio.Nursery, root: Path | None, journal: Journal | None = None
    ) -> None:
        store = blobs.store
        self.hub = hub
        self.blobs = blobs
        self.store = store
        self.telemetry = Telemetry()
        self.metadata = MetadataStore(store.layout.meta)
        self.pins = Pins(store.layout.pins)
        self.identity = Identity(ACCESS, lambda: ACCESS)
        hub.latest = self.identity.latest
        self.catalog = Catalog(hub, self.metadata, nursery, owner=ACCESS, latest=self.identity.latest)
        self.failures = Failures()
        self.gone: list[str] = []
        self.ended = 0
        self._one_ended = trio.Event()
        self.discarded: list[BlobId] = []
        self.mounts = Mounts(
            self.catalog, store, root, lambda mounted: self.gone.append(mounted.id), journal, self.identity
        )
        self.publications = Publications(self.mounts, self.identity, self._keep, blobs.fetcher.forget)
        self.verification = Verification(
            store, self.metadata, hub.workers, blobs.fetcher, self.discarded.append, self.telemetry
        )
        self.jobs = Jobs(nursery, self.catalog, blobs.fetcher, store, self.verification, self._count_ended)
        self.housekeeping = self.housekeeping_with(CacheConfig())

    def housekeeping_with(self, config: CacheConfig) -> Housekeeping:
        return Housekeeping(
            self.store, self.metadata, self.pins, config, self.room_with(config), self.mounts.blobs, self.telemetry
        )

    def room_with(self, config: CacheConfig) -> Room:
        return Room(self.store, self.pins, config, self.mounts.blobs, self.telemetry)

    async def _keep(self, mounted: Mounted) -> None:
        contents = self.mounts.contents(mounted)
        assert contents is not None
        await self.housekeeping.keep(mounted.request.target, contents.blobs)

    def _count_ended(self) -> None:
        self.ended += 1
        self._one_ended.set()
        self._one_ended = trio.Event()

    async def mount(self, request: MountRequest) -> Mounted:
        return await self.mounts.create(request, ACCESS)

    def describe(self, mounted: Mounted) -> Mount:
        return self.mounts.describe(mounted, self.failures)

    async def end_of(self, job: Job) -> Job:
        """The job when it has ended."""
        while self.jobs[job.id].state == "running":
            await self._one_ended.wait()
        return self.jobs[job.id]

    async def fetch(self, target: str) -> Job:
        """Has all of `target` in the cache, sealed."""
        job = await self.end_of(await self.jobs.prefetch(parse_target(target), ACCESS))
        assert job.state == "done", job.problems
        return job

    def damage(self, blob: BlobId | None, at: int) -> None:
        """Flips the byte `at` of a blob in its data file."""
        assert blob is not None
        with self.store.layout.data(blob).open("r+b") as file:
            file.seek(at)
            [byte] = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 0xFF]))

    def cached(self, blob: BlobId | None) -> int:
        """How many bytes of a blob are in the cache."""
        assert blob is not None
        info = self.store.find(blob)
        return info.cached if info is not None else 0


@asynccontextmanager
async def node(
    directory: Path, hub: MemoryHub | None = None, *, root: Path | None = Path("/run/manta/x/root"), seal: bool = True
) -> AsyncIterator[Node]:
    hub = hub or MemoryHub()
    async with fetching(directory, hub, seal=seal) as blobs, trio.open_nursery() as nursery:
        yield Node(hub, blobs, nursery, root)
        nursery.cancel_scope.cancel()
