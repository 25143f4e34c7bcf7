"""Verifying and repairing: what is damaged is found, never served again, and had again where the hub gives it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from manta.errors import Unavailable
from manta.fetch.sources import Provenance
from manta.hub.origin import Access
from manta.model.extents import Extent
from manta.model.ids import BlobId
from manta.operations.verification import Findings
from manta.testing.workers import failed
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, content
from tests.operations.node import Node, node

BIG = content(10 * CHUNK + 7, seed=1)
BLOB = MemoryHub().lfs("big.bin", BIG).blob
assert BLOB is not None


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.lfs("big.bin", BIG)], None, "main")
    hub.commit(OTHER, SECOND, [hub.lfs("same.bin", BIG)], None, "main")
    return hub


async def verify(n: Node, blob: BlobId | None, *, full: bool = False, repair: Access | None = None) -> Findings:
    assert blob is not None
    looked_at = 0

    def progress(count: int) -> None:
        nonlocal looked_at
        looked_at += count

    info = n.store.find(blob)
    assert info is not None
    found = await n.verification.verify(blob, info.size, progress, full=full, repair=repair)
    if not full:
        assert looked_at == info.cached
    return found


def sealed(n: Node) -> bool:
    assert BLOB is not None
    info = n.store.find(BLOB)
    return info is not None and info.sealed


def on_disk(n: Node) -> bytes:
    assert BLOB is not None
    return n.store.layout.data(BLOB).read_bytes()


@pytest.mark.trio
@pytest.mark.parametrize("full", [False, True])
async def test_nothing_is_found_where_all_is_well(tmp_path: Path, hub: MemoryHub, full: bool) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        assert await verify(n, BLOB, full=full) == Findings()
        assert (sealed(n), n.discarded) == (True, [])


@pytest.mark.trio
@pytest.mark.parametrize("full", [False, True])
async def test_what_is_damaged_is_not_served_again_and_the_rest_stays(
    tmp_path: Path, hub: MemoryHub, full: bool
) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        n.damage(BLOB, 3 * CHUNK + 17)
        n.damage(BLOB, len(BIG) - 1)
        found = await verify(n, BLOB, full=full)
        assert found.damaged == 2
        assert found.sentence == (
            f"org/name/big.bin ({BLOB}): 2 of 11 chunks are damaged: 3, 10 (does not match its digest). They are not served any more;"
            " they are fetched anew when they are read, or by `manta cache verify --repair`."
        )
        assert n.discarded == [BLOB]
        assert (n.cached(BLOB), sealed(n)) == (9 * CHUNK, False)
        sent = hub.workers.bytes_sent
        await n.fetch("org/name")
        assert hub.workers.bytes_sent == sent + CHUNK + 7
        assert (on_disk(n), sealed(n)) == (BIG, True)


@pytest.mark.trio
async def test_a_repaired_blob_is_whole_and_sealed_also_while_it_is_open(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        transfer = n.blobs.open(Provenance(MODEL, FIRST, hub.trees[MODEL, FIRST].files["big.bin"], ACCESS))
        n.damage(BLOB, 0)
        found = await verify(n, BLOB, repair=ACCESS)
        assert (found.damaged, found.repaired) == (1, 1)
        assert found.sentence.endswith("They were fetched anew, and the whole matches the hub's digest.")
        assert (on_disk(n), sealed(n)) == (BIG, True)
        assert transfer.readable(Extent(0, len(BIG)))
        n.blobs.close(transfer)
        assert await verify(n, BLOB, full=True) == Findings()


@pytest.mark.trio
async def test_of_a_partial_blob_only_what_was_damaged_is_fetched(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.catalog.snapshot(MODEL, FIRST, ACCESS)
        transfer = n.blobs.open(Provenance(MODEL, FIRST, hub.trees[MODEL, FIRST].files["big.bin"], ACCESS))
        await transfer.ensure(Extent(2 * CHUNK, 4 * CHUNK))
        await wait_all_tasks_blocked()  # a reader has its bytes before their chunk is recorded
        n.blobs.close(transfer)
        n.damage(BLOB, 3 * CHUNK)
        sent = hub.workers.bytes_sent
        found = await verify(n, BLOB, repair=ACCESS)
        assert (found.damaged, found.repaired) == (1, 1)
        assert hub.workers.bytes_sent == sent + CHUNK
        await wait_all_tasks_blocked()
        assert n.cached(BLOB) == 2 * CHUNK


@pytest.mark.trio
async def test_another_repo_helps_where_one_is_gone(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        await n.fetch("org/other")
        hub.workers.withdraw(hub.location_request(MODEL, FIRST, "big.bin", ACCESS).url)
        n.damage(BLOB, CHUNK)
        assert (await verify(n, BLOB, repair=ACCESS)).repaired == 1
        assert on_disk(n) == BIG


@pytest.mark.trio
async def test_what_cannot_be_had_again_is_said_and_stays_absent(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        n.damage(BLOB, CHUNK)
        hub.workers.fault("fetch", failed("absent", "is gone"), times=None)
        found = await verify(n, BLOB, repair=ACCESS)
        assert (found.damaged, found.repaired) == (1, 0)
        assert (
            "They are not served any more, and could not be fetched anew: org/name/big.bin: is gone." in found.sentence
        )
        assert n.cached(BLOB) == 9 * CHUNK + 7
        n.metadata.forget(MODEL)
        n.damage(BLOB, 2 * CHUNK)
        assert "No stored commit shows this blob" in (await verify(n, BLOB, repair=ACCESS)).sentence


@pytest.mark.trio
async def test_a_whole_that_is_wrong_though_each_chunk_is_as_recorded(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the hub's digest finds it."""
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        n.damage(BLOB, 5)
        assert BLOB is not None
        with n.store.open_blob(BLOB, len(BIG)) as blob:
            from manta.cache import chunkmap
            from manta.cache.digests import chunk_digest

            entry = chunk_digest(os.pread(blob.fd, CHUNK, 0))
            blob._map._write(entry + chunkmap._check(blob._map._seed, 0, entry), blob._map._entry_at(0))
        assert await verify(n, BLOB) == Findings()
        found = await verify(n, BLOB, full=True, repair=ACCESS)
        assert (found.damaged, found.repaired) == (11, 11)
        assert "is part of a file that does not have the hub's digest" in found.sentence
        assert (on_disk(n), sealed(n)) == (BIG, True)


@pytest.mark.trio
async def test_a_damaged_entry_of_the_map_is_damage(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        assert BLOB is not None
        with n.store.open_blob(BLOB, len(BIG)) as blob:
            blob._map._write(b"x", blob._map._entry_at(4))
            found = await verify(n, BLOB)
            assert "4 (has a damaged entry in its chunk map)" in found.sentence
            assert not blob.has(4)


@pytest.mark.trio
async def test_a_worker_that_does_not_answer_damages_nothing(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        for kind, full in (("verify", False), ("digest", True)):
            hub.workers.fault(kind, failed("unavailable", "its worker process ended"))  # type: ignore[arg-type]
            with pytest.raises(Unavailable, match="could not be verified: its worker process ended"):
                await verify(n, BLOB, full=full)
        assert sealed(n)


@pytest.mark.trio
async def test_what_was_fetched_anew_meanwhile_is_no_damage(tmp_path: Path, hub: MemoryHub) -> None:
    held = hub.workers.fault("verify", hold=True)
    async with node(tmp_path, hub) as n:
        import trio

        await n.fetch("org/name")
        assert BLOB is not None
        n.damage(BLOB, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(verify, n, BLOB)
            await held.reached.wait()
            with n.store.open_blob(BLOB, len(BIG)) as blob:
                blob.clear(0)
            held.release()
        assert n.cached(BLOB) == 9 * CHUNK + 7
        assert n.discarded == []
