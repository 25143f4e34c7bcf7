"""Fetching while the hub or its CDN is out of reach, and from places that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from manta.errors import Denied, Unavailable
from manta.fetch.sources import Provenance
from manta.fetch.way import REFUSED_SECONDS
from manta.hub.circuit import PATIENCE_S, PROBE_S
from manta.model.ids import BlobId, RepoId, RepoKind
from manta.testing.workers import failed
from manta.wire.messages import Located
from tests.fetch.conftest import CHUNK, File, World

pytestmark = pytest.mark.trio

GONE = failed("unavailable", "hub.test cannot be reached (Connection refused)", unreachable=True)


async def read_seconds(world: World, file: File, start: int = 0, end: int = 10) -> float:
    """How long a reader waits before it is told that the origin is out of reach."""
    began = trio.current_time()
    with pytest.raises(Unavailable, match=r"hub\.test cannot be reached"):
        await world.read_once(file, start, end)
    return trio.current_time() - began


async def test_a_dead_hub_costs_the_first_reader_its_retries_and_the_others_little(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        fault = world.workers.fault("locate", GONE, times=None)
        assert await read_seconds(world, world.publish("a", CHUNK)) < 20
        others = [world.publish(f"b{number}", CHUNK) for number in range(20)]
        for other in others:
            assert await read_seconds(world, other) <= PATIENCE_S
        asked = fault.struck
        await trio.sleep(60)
        assert fault.struck - asked <= 60 / PROBE_S + 1, "probes only, however many files are wanted"
        fault.times = 0
        await trio.sleep(2 * PROBE_S)
        for other in others:
            await world.read_once(other, 0, 10)


async def test_a_reader_from_before_the_outage_gets_its_bytes_when_it_ends(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        first, second = world.publish("a", CHUNK), world.publish("b", CHUNK)
        fault = world.workers.fault("locate", GONE, times=None)
        async with trio.open_nursery() as readers:
            readers.start_soon(world.read_once, first, 0, 10)
            await trio.sleep(4.5)  # its fifth attempt
            assert await read_seconds(world, second) <= PATIENCE_S
            fault.times = 0
        await trio.sleep(REFUSED_SECONDS)
        await world.read_once(second, 0, 10)


async def test_a_reader_that_begins_while_the_hub_comes_back_gets_its_bytes(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.running():
        fault = world.workers.fault("locate", GONE, times=None)
        await read_seconds(world, world.publish("a", CHUNK))
        fault.times = 0
        world.workers.seconds_per_piece = 1.0  # answers again, and slowly: longer than a reader waits for a probe
        await trio.sleep(PROBE_S)
        await world.read_once(world.publish("b", CHUNK), 0, CHUNK)


async def test_a_dead_cdn_is_told_soon_too_and_the_hub_is_not_blamed(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file, other = world.publish("a", 3 * CHUNK), world.publish("b", CHUNK)
        await world.read_once(file, 0, 10)
        await world.quiet_fetches()
        fault = world.workers.fault("fetch", GONE, times=None)
        await read_seconds(world, file, 2 * CHUNK, 2 * CHUNK + 10)
        assert await read_seconds(world, file, CHUNK, CHUNK + 10) <= PATIENCE_S
        # The hub still says where other files are.
        locates = len(world.workers.locates)
        await read_seconds(world, other)
        assert len(world.workers.locates) == locates + 1
        fault.times = 0
        await trio.sleep(2 * PROBE_S)
        await world.read_once(file, CHUNK, 3 * CHUNK)


async def test_a_prefetch_is_told_too(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        world.workers.fault("locate", GONE, times=None)
        await read_seconds(world, world.publish("a", CHUNK))
        file = world.publish("b", CHUNK)
        transfer = world.fetcher.open(file.provenance)
        began = trio.current_time()
        with pytest.raises(Unavailable, match="out of reach"):
            await transfer.complete()
        assert trio.current_time() - began <= PATIENCE_S
        world.fetcher.stop_background(str(file.blob))
        world.fetcher.close(transfer)


async def test_each_place_that_refuses_is_asked_once(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        others = [replace(file.provenance, repo=RepoId(RepoKind.MODEL, f"org/other{number}")) for number in range(3)]
        asked: list[BlobId] = []

        def elsewhere(blob: BlobId) -> list[Provenance]:
            asked.append(blob)
            return others[1:]

        assert world.fetcher._locator is not None
        world.fetcher._locator._elsewhere = elsewhere
        refusal = Located(0, 403, file.url, {"x-error-code": "GatedRepo"})
        fault = world.workers.fault("locate", refusal, times=None)
        transfers = [world.fetcher.open(p) for p in (file.provenance, others[0])]
        with pytest.raises(Denied):
            await world.read(file, transfers[0], 0, 10)
        assert fault.struck == 4
        assert len({order.url for order in world.workers.locates}) == 4
        # One of them lets us in again.
        fault.times = 0
        await trio.sleep(REFUSED_SECONDS)
        await world.read(file, transfers[0], 0, 10)
        for transfer in transfers:
            world.fetcher.close(transfer)
