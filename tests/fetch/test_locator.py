"""Fetching while the hub or its CDN is out of reach, and from places that are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from manta.errors import Denied, MantaError, Throttled, Unavailable
from manta.fetch.sources import Provenance
from manta.fetch.way import REFUSED_SECONDS
from manta.hub.circuit import PATIENCE_S, PROBE_S
from manta.hub.origin import Location
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


# What another node says ----------------------------------------------------------------------------------------------


def tell(world: World, told: Location | Throttled | None) -> list[Provenance]:
    """Has another node say that of every location; gives what it was asked for."""
    asked: list[Provenance] = []

    async def shared(provenance: Provenance) -> Location | None:
        asked.append(provenance)
        if isinstance(told, Throttled):
            raise told
        return told

    assert world.fetcher._locator is not None
    world.fetcher._locator._shared = shared
    return asked


async def test_a_told_location_spares_the_hub_the_question(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", 3 * CHUNK)
        asked = tell(world, Location("https://cdn.test/told", {"user-agent": "manta"}, told=True))
        world.workers._located["https://cdn.test/told"] = file.url
        await world.read_once(file, 0, 3 * CHUNK)
        assert len(asked) == 1
        assert world.workers.locates == []


@pytest.mark.parametrize(
    "told",
    [
        Location("http://169.254.169.254/latest/meta-data", {}, told=True),
        Location("http://cdn.test/told", {}, told=True),
        Location("file:///etc/passwd", {}, told=True),
        Location("unix:/run/docker.sock", {}, told=True),
        Location("", {}, told=True),
        Location("https://cdn.test/told", {"authorization": "Bearer x"}, told=True),
        Location("https://cdn.test/told", {"Metadata-Flavor": "Google"}, told=True),
        None,
        Throttled("The hub asked for a pause.", 3.0),
    ],
    ids=["metadata", "plain", "file", "socket", "empty", "token", "header", "nothing", "pause"],
)
async def test_what_cannot_be_a_location_of_the_hubs_is_not_used(
    autojump_clock: MockClock, world: World, told: Location | Throttled | None
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        tell(world, told)
        await world.read_once(file, 0, CHUNK)
        assert len(world.workers.locates) == 1
        assert all(fetch.url.startswith("https://cdn.test/1?") for fetch in world.workers.fetches)


@pytest.mark.parametrize("reason", ["denied", "unavailable", "corrupt"])
async def test_a_told_location_that_does_not_serve_is_not_asked_for_again(
    autojump_clock: MockClock, world: World, reason: str
) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        asked = tell(world, Location("https://cdn.test/told", {}, told=True))
        world.workers._located["https://cdn.test/told"] = file.url
        world.workers.fault(
            "fetch",
            failed(reason),  # type: ignore[arg-type]
            where=lambda order: getattr(order, "url", "").endswith("/told"),
            times=None,
        )
        await world.read_once(file, 0, CHUNK)
        assert len(asked) == 1
        assert len(world.workers.locates) == 1


async def test_the_hub_is_asked_once_for_all_members_who_ask(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        found: list[Location] = []

        async def ask() -> None:
            found.append(await world.fetcher.locate(file.provenance))

        async with trio.open_nursery() as members:
            for _ in range(8):
                members.start_soon(ask)
        assert len(set(map(id, found))) == 1
        assert len(found) == 8
        assert len(world.workers.locates) == 1


async def test_a_refused_location_costs_one_question_however_many_ask(autojump_clock: MockClock, world: World) -> None:
    async with world.running():
        file = world.publish("a", CHUNK)
        world.workers.withdraw(file.url)
        refused: list[MantaError] = []

        async def ask() -> None:
            with pytest.raises(MantaError) as error:
                await world.fetcher.locate(file.provenance)
            refused.append(error.value)

        async with trio.open_nursery() as members:
            for _ in range(8):
                members.start_soon(ask)
        assert len(refused) == 8
        assert len(world.workers.locates) == 1


async def test_offline_no_member_is_told_a_location(
    autojump_clock: MockClock, make_world: Callable[..., World]
) -> None:
    world = make_world(offline=True)
    async with world.running():
        with pytest.raises(Unavailable, match="offline"):
            await world.fetcher.locate(world.publish("a", CHUNK).provenance)
