"""What the fetcher's tests share: a world of a store, fake workers, a hub of a few files, the fetcher and the sealer, in trio."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from manta.cache.digests import chunk_digest
from manta.cache.store import Store
from manta.config import FetchConfig
from manta.errors import MantaError
from manta.fetch.fetcher import Fetcher
from manta.fetch.peer_orders import Peers
from manta.fetch.sealer import Sealer
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.hub import location
from manta.hub.origin import Access, Location, Origin, OriginRequest
from manta.model.extents import Extent
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry
from manta.telemetry.events import Telemetry
from manta.testing.workers import SECRET, FakeWorkers

CHUNK = 512 * 1024
"""Bytes in a chunk: enough that a reader in its middle is far from its beginning."""

ENDPOINT = "https://hub.test"
COMMIT = Commit("c" * 40)
TOKEN = "hf_tokenofthetest"
BOOT, NEXT_BOOT = b"boot-before-cras", b"boot-after-crash"

_random_bytes = random.Random(4).randbytes(8 * CHUNK + 3)


class HubAddresses:
    """The part of an origin that the fetcher uses: what to ask and what the answer means. `noted` are the headers of the last answer."""

    def __init__(self) -> None:
        self.noted: dict[str, str] = {}

    endpoint = ENDPOINT

    def location_request(self, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
        return location.location_request(ENDPOINT, repo, commit, path, access)

    def parse_location(
        self,
        repo: RepoId,
        commit: Commit,
        entry: FileEntry,
        access: Access,
        *,
        status: int,
        url: str,
        headers: Mapping[str, str],
        now: float,
    ) -> Location:
        return location.parse_location(
            ENDPOINT, repo, commit, entry, access, status=status, url=url, headers=headers, now=now
        )

    def note_headers(self, headers: Mapping[str, str]) -> None:
        self.noted = dict(headers)


@dataclass(frozen=True)
class File:
    """A file of the hub, and its true bytes."""

    provenance: Provenance
    data: bytes

    @property
    def blob(self) -> BlobId:
        assert self.provenance.entry.blob is not None
        return self.provenance.entry.blob

    @property
    def url(self) -> str:
        p = self.provenance
        return location.location_request(ENDPOINT, p.repo, p.commit, p.entry.path, p.access).url


class World:
    """Everything the fetcher needs. Use `running`."""

    def __init__(
        self,
        directory: Path,
        *,
        boot_id: bytes = BOOT,
        offline: bool = False,
        peers: Peers | None = None,
        peer_rate: int = 0,
        **config: float | int,
    ) -> None:
        self.store = Store(directory, chunk_size=CHUNK, boot_id=boot_id)
        self.workers = FakeWorkers()
        self.failures: list[tuple[Provenance, MantaError]] = []
        self.config = replace(FetchConfig(), **config)  # type: ignore[arg-type]
        self.discarded: list[Transfer] = []
        self.telemetry = Telemetry()
        self.sealer = Sealer(self.workers, self.fail, self.discarded.append, self.telemetry)
        self.hub = HubAddresses()
        origin = None if offline else cast(Origin, self.hub)
        self.fetcher = Fetcher(
            self.store,
            self.workers,
            origin,
            self.config,
            self.fail,
            self.sealer.grown,
            telemetry=self.telemetry,
            peers=peers,
            peer_rate=peer_rate,
        )
        self.nursery: trio.Nursery

    def fail(self, provenance: Provenance, error: MantaError) -> None:
        self.failures.append((provenance, error))

    @asynccontextmanager
    async def running(self, *, seal: bool = True, leave: bool = False) -> AsyncIterator[World]:
        """Runs until the body ends; then nothing may be left of it, unless `leave`."""
        try:
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                await nursery.start(self.fetcher.run)
                if seal:
                    nursery.start_soon(self.sealer.run, self.fetcher)
                yield self
                if not leave:
                    await self.quiet()
                    self.assert_nothing_left()
                nursery.cancel_scope.cancel()
            assert self.workers.violations == []
            for _, error in self.failures:
                assert_fit_to_read(error)
        finally:
            self.store.close()

    def publish(self, name: str, size: int, *, repo: str = "org/one", data: bytes | None = None) -> File:
        """Puts a file on the hub."""
        if data is None:
            start = random.Random(f"{repo}/{name}").randrange(CHUNK)
            data = (_random_bytes[start:] + _random_bytes[:start])[:size]
            assert len(data) == size
        blob = BlobId(BlobAlgorithm.SHA256, hashlib.sha256(data).hexdigest())
        entry = FileEntry(name, size, blob, "0" * 40)
        file = File(Provenance(RepoId(RepoKind.MODEL, repo), COMMIT, entry, Access(TOKEN)), data)
        self.workers.publish(file.url, data)
        return file

    async def read(self, file: File, transfer: Transfer, start: int, end: int) -> None:
        """Does what a handle does, and checks the bytes."""
        try:
            await transfer.ensure(Extent(start, end))
        except MantaError as e:
            assert_fit_to_read(e)
            raise
        assert os.pread(transfer.blob.fd, end - start, start) == file.data[start:end]

    async def read_once(self, file: File, start: int, end: int) -> None:
        """Opens, reads and closes."""
        transfer = self.fetcher.open(file.provenance)
        try:
            await self.read(file, transfer, start, end)
        finally:
            self.fetcher.close(transfer)

    async def quiet(self) -> None:
        """Returns when nothing is going on any more."""
        polls = 0
        while polls < 1000 and (self.workers.under_way or self.sealer._following or self.fetcher._transfers):
            polls += 1
            if polls > 50 and self.clock is not None:
                self.clock.autojump_threshold = 0.01  # what we wait for is a thread, which the clock does not see
            await trio.sleep(1)

    async def quiet_fetches(self) -> None:
        """Returns when no order is under way."""
        while self.workers.under_way:
            await trio.sleep(0.1)

    clock: MockClock | None = None

    def assert_nothing_left(self) -> None:
        assert self.workers.under_way == 0
        assert not self.fetcher._transfers
        assert not self.fetcher._scheduler._blobs
        assert not self.fetcher._scheduler._running
        assert not self.sealer._following
        assert not self.store._open
        assert not self.fetcher._flights
        assert not self.fetcher.peer_orders


def assert_fit_to_read(error: MantaError) -> None:
    """A sentence, without secrets."""
    assert SECRET not in error.message
    assert TOKEN not in error.message
    assert "signature" not in error.message.lower()
    assert error.message.rstrip().endswith((".", "!"))


def prefill(
    directory: Path, file: File, chunks: list[int], *, boot_id: bytes = BOOT, damaged: tuple[int, ...] = ()
) -> None:
    """What an earlier daemon left of `file` in the cache; `damaged` chunks do not have the bytes that their digests say."""
    with Store(directory, chunk_size=CHUNK, boot_id=boot_id) as store:
        blob = store.open_blob(file.blob, len(file.data))
        for chunk in chunks:
            extent = blob.grid.extent(chunk)
            part = file.data[extent.start : extent.end]
            os.pwrite(blob.fd, part[::-1] if chunk in damaged else part, extent.start)
            blob.record(chunk, chunk_digest(part))
        blob.close()


@pytest.fixture
def make_world(tmp_path: Path, autojump_clock: MockClock) -> Callable[..., World]:
    """`make_world(**config)`: a world on a clock that jumps over every wait. Its tests name `autojump_clock`, or they wait in earnest."""

    def make(**options: float | int | bytes | bool) -> World:
        world = World(tmp_path / "cache", **options)  # type: ignore[arg-type]
        world.clock = autojump_clock
        return world

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
