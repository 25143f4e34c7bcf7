"""Care of the cache: what is listed, pinned, removed and evicted, and what never is."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from manta.config import CacheConfig
from manta.control.protocol import MountRequest
from manta.errors import Absent, Invalid
from manta.fetch.scheduler import Priority
from manta.fetch.sources import Provenance
from manta.model.ids import BlobId
from manta.operations.housekeeping import NAMES_MAX
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, blob_of, content
from tests.operations.node import Node, node
from tests.telemetry.scrape import samples

A, B, C = (content(size * CHUNK, seed=size) for size in (1, 2, 3))


A_ID, B_ID, C_ID = blob_of(A), blob_of(B), blob_of(C)


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.lfs("a.bin", A), hub.lfs("sub/b.bin", B)], None, "main")
    hub.commit(OTHER, SECOND, [hub.lfs("c.bin", C), hub.lfs("copy of a.bin", A)], None, "main", "v1")
    return hub


async def filled(n: Node, *, order: tuple[BlobId, ...] = (A_ID, B_ID, C_ID)) -> None:
    """All blobs in the cache, last used in `order`."""
    await n.fetch("org/name")
    await n.fetch("org/other")
    for age, blob in enumerate(order):
        n.store._inventory.update(blob, last_used=1000.0 + age)


def left(n: Node) -> set[BlobId]:
    return {info.id for info in n.store.listing()}


# What there is -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_listing_tells_what_there_is_and_where_it_is_shown(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        await n.housekeeping.pin([str(B_ID)])
        listing = await n.housekeeping_with(CacheConfig(size=12345)).listing()
        assert (listing.cache_bytes, listing.cache_limit) == (6 * CHUNK, 12345)
        found = {blob.id: blob for blob in listing.blobs}
        assert [(found[str(i)].size, found[str(i)].cached) for i in (A_ID, B_ID, C_ID)] == [
            (k * CHUNK, k * CHUNK) for k in (1, 2, 3)
        ]
        assert found[str(A_ID)].names == [f"org/name@{FIRST[:12]}/a.bin", f"org/other@{SECOND[:12]}/copy of a.bin"]
        assert [blob.id for blob in listing.blobs if blob.pinned] == [str(B_ID)]
        assert all(blob.sealed and not blob.in_use for blob in listing.blobs)
        assert [blob.names for blob in listing.blobs] == sorted(blob.names for blob in listing.blobs)
        only = await n.housekeeping.listing([A_ID])
        assert [blob.id for blob in only.blobs] == [str(A_ID)]


@pytest.mark.trio
async def test_a_blob_has_few_names(tmp_path: Path) -> None:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.lfs(f"{k}", A) for k in range(NAMES_MAX + 5)], "main")
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        [blob] = (await n.housekeeping.listing()).blobs
        assert len(blob.names) == NAMES_MAX


@pytest.mark.trio
async def test_what_is_open_or_mounted_is_in_use(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        await n.mount(MountRequest("org/other", "/other"))
        transfer = n.blobs.open(Provenance(MODEL, FIRST, hub.trees[MODEL, FIRST].files["sub/b.bin"], ACCESS))
        assert {blob.id: blob.in_use for blob in (await n.housekeeping.listing()).blobs} == {
            str(A_ID): True,  # the mount of the other repo shows it too
            str(B_ID): True,
            str(C_ID): True,
        }
        n.blobs.close(transfer)
        assert [blob.id for blob in (await n.housekeeping.listing()).blobs if not blob.in_use] == [str(B_ID)]


@pytest.mark.trio
async def test_names_select_blobs(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        for names, blobs in (
            ([str(A_ID)], {A_ID}),
            (["org/name"], {A_ID, B_ID}),
            (["hf://org/name"], {A_ID, B_ID}),
            (["org/name@main/sub"], {B_ID}),
            ([f"org/name@{FIRST}"], {A_ID, B_ID}),
            (["org/other@main", str(B_ID)], {A_ID, B_ID, C_ID}),
            # As `manta cache ls` shows them.
            ([f"org/name@{FIRST[:12]}"], {A_ID, B_ID}),
            ([f"org/name@{FIRST[:12]}/sub/b.bin"], {B_ID}),
            (["org/name/a.bin"], {A_ID}),
            ([str(C_ID)[:19]], {C_ID}),
            ([], set()),
        ):
            assert await n.housekeeping.select(names) == blobs, names


@pytest.mark.trio
@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        ("nonsense", Invalid, "not a blob id"),
        (str(blob_of(b"gone")), Absent, "is not in the cache; `manta cache ls` lists what is"),
        ("org/missing", Absent, "mount it or prefetch it first"),
        ("org/name@v9", Absent, "org/name@v9 is not in the cache"),
        (f"org/name@{SECOND}", Absent, "is not in the cache"),
        ("org/name/nowhere", Absent, "has no folder or file 'nowhere'"),
        (f"org/name@{SECOND[:12]}", Absent, "is not in the cache"),
        ("sha256-0000000", Invalid, "is not a sha256 blob id"),
        ("a/b/../c", Invalid, "cannot exist"),
    ],
)
async def test_what_is_not_there_is_said(
    tmp_path: Path, hub: MemoryHub, name: str, kind: type[Exception], sentence: str
) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        with pytest.raises(kind, match=sentence):
            await n.housekeeping.select([str(A_ID), name])
        assert left(n) == {A_ID, B_ID, C_ID}


# Pins ----------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_pins_come_and_go_by_their_names(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        pinned = await n.housekeeping.pin(["org/name", str(C_ID)])
        assert {blob.id for blob in pinned.blobs} == {str(A_ID), str(B_ID), str(C_ID)}
        assert all(blob.pinned for blob in pinned.blobs)
        unpinned = await n.housekeeping.unpin(["org/name"])
        assert {blob.id for blob in unpinned.blobs} == {str(A_ID), str(B_ID)}
        assert not any(blob.pinned for blob in unpinned.blobs)
        assert C_ID in n.pins
        await n.housekeeping.unpin([])
        assert C_ID not in n.pins


@pytest.mark.trio
async def test_a_wrong_name_pins_and_unpins_nothing(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        with pytest.raises(Invalid, match="Say what to pin"):
            await n.housekeeping.pin([])
        with pytest.raises(Absent):
            await n.housekeeping.pin(["org/name", "org/missing"])
        assert dict(n.pins.pins) == {}
        with pytest.raises(Absent, match=r"'org/name' is not pinned\. .* there are none"):
            await n.housekeeping.unpin(["org/name"])
        await n.housekeeping.pin(["org/name"])
        with pytest.raises(Absent, match=r"'org/nam' is not pinned\. .*: org/name\."):
            await n.housekeeping.unpin(["org/name", "org/nam"])
        assert A_ID in n.pins


@pytest.mark.trio
async def test_unpinning_ends_the_state_in_which_everything_counts_as_pinned(tmp_path: Path, hub: MemoryHub) -> None:
    (tmp_path / "pins.json").write_text("damaged")
    (tmp_path / "version").write_text("1\n")
    async with node(tmp_path, hub) as n:
        await filled(n)
        damaged = n.pins.problem
        assert damaged is not None
        assert all(blob.pinned for blob in (await n.housekeeping.listing()).blobs)
        assert (await n.housekeeping.collect(0, dry_run=False)).removed == []
        await n.housekeeping.unpin([])
        assert n.pins.problem is None
        assert not any(blob.pinned for blob in (await n.housekeeping.listing()).blobs)


# Removing ------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_is_asked_for_is_removed_and_told(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        removal = await n.housekeeping.remove(["org/name"])
        assert {blob.id for blob in removal.removed} == {str(A_ID), str(B_ID)}
        assert (removal.freed, removal.kept) == (3 * CHUNK, [])
        assert left(n) == {C_ID}
        assert n.store.cached_bytes == 3 * CHUNK
        with pytest.raises(Invalid, match="manta cache gc --size 0"):
            await n.housekeeping.remove([])


@pytest.mark.trio
async def test_what_is_pinned_mounted_or_open_is_kept_with_the_reason(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        await n.housekeeping.pin([str(A_ID)])
        mounted = await n.mount(MountRequest("org/name", "/name"))
        transfer = n.blobs.open(Provenance(OTHER, SECOND, hub.trees[OTHER, SECOND].files["c.bin"], ACCESS))
        removal = await n.housekeeping.remove(["org/name", "org/other"])
        assert (removal.removed, removal.freed) == ([], 0)
        assert sorted(removal.kept) == sorted(
            [
                f"org/name@{FIRST[:12]}/a.bin is pinned: `manta cache unpin` it first.",
                f"org/name@{FIRST[:12]}/sub/b.bin is part of a mount: unmount it first.",
                f"{C_ID} is open. Close the programs that read it, or unmount it, and try again.",
            ]
        )
        n.blobs.close(transfer)
        n.mounts.remove(mounted.id)
        await n.housekeeping.unpin([])
        await n.housekeeping.remove(["org/name", "org/other"])
        assert left(n) == set()


# Eviction ------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_least_recently_used_goes_first(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n, order=(B_ID, C_ID, A_ID))
        removal = await n.housekeeping.collect(4 * CHUNK, dry_run=False)
        assert [blob.id for blob in removal.removed] == [str(B_ID)]
        assert (removal.freed, left(n)) == (2 * CHUNK, {A_ID, C_ID})
        assert (await n.housekeeping.collect(0, dry_run=False)).freed == 4 * CHUNK
        assert left(n) == set()
        numbers = samples(n.telemetry.metrics)
        assert numbers["manta_cache_evicted_blobs_total{reason=request}"] == 3
        assert numbers["manta_cache_evicted_bytes_total{reason=request}"] == 6 * CHUNK


@pytest.mark.trio
@pytest.mark.parametrize(
    ("reason", "bounds"),
    [
        ("limit", CacheConfig(size=5 * CHUNK, free_space_floor=0)),
        ("floor", CacheConfig(free_space_floor=1024**5)),  # counts as half of the disk
    ],
)
async def test_what_goes_by_itself_is_counted_by_the_bound_that_asked_for_it(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, reason: str, bounds: CacheConfig
) -> None:
    async with node(tmp_path, hub) as n, trio.open_nursery() as nursery:
        await filled(n)
        free, size = (1000 * CHUNK, 3000 * CHUNK) if reason == "floor" else (1000 * CHUNK, 1000 * CHUNK)
        monkeypatch.setattr(n.store, "disk_space", lambda: (free, size))
        room = n.room_with(bounds)
        assert room.least_urgent(0) is not Priority.FILL
        nursery.start_soon(room.run, n.blobs.fetcher)
        with trio.fail_after(30):
            while A_ID in left(n):
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
        assert samples(n.telemetry.metrics)[f"manta_cache_evicted_blobs_total{{reason={reason}}}"] >= 1


@pytest.mark.trio
async def test_a_dry_run_removes_nothing(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        dry = await n.housekeeping.collect(0, dry_run=True)
        assert (len(dry.removed), dry.freed, dry.kept) == (3, 6 * CHUNK, [])
        assert left(n) == {A_ID, B_ID, C_ID}
        wet = await n.housekeeping.collect(0, dry_run=False)
        assert wet.freed == dry.freed


@pytest.mark.trio
async def test_what_is_mounted_pinned_or_open_is_never_evicted(tmp_path: Path, hub: MemoryHub) -> None:
    hub.commit(MODEL, SECOND, [hub.lfs("sub/b.bin", B)], "only-b")
    async with node(tmp_path, hub) as n:
        await filled(n)
        await n.housekeeping.pin([str(A_ID)])
        await n.mount(MountRequest("org/name@only-b", "/b"))
        transfer = n.blobs.open(Provenance(OTHER, SECOND, hub.trees[OTHER, SECOND].files["c.bin"], ACCESS))
        assert (await n.housekeeping.collect(0, dry_run=False)).removed == []
        n.blobs.close(transfer)
        assert [b.id for b in (await n.housekeeping.collect(0, dry_run=False)).removed] == [str(C_ID)]
        assert left(n) == {A_ID, B_ID}


@pytest.mark.trio
async def test_without_a_size_the_cache_comes_within_its_bounds(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await filled(n)
        within = n.housekeeping_with(CacheConfig(size=7 * CHUNK, free_space_floor=0))
        assert (await within.collect(-1, dry_run=False)).removed == []
        beyond = n.housekeeping_with(CacheConfig(size=5 * CHUNK, free_space_floor=0))
        assert [b.id for b in (await beyond.collect(-1, dry_run=False)).removed] == [str(A_ID), str(B_ID)]
