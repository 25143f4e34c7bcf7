from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cache.chunkmap import HEADER_BYTES, ChunkMap, Header, decode_header, map_bytes, read_outline
from manta.cache.digests import chunk_digest
from manta.errors import CacheBroken, Corrupt, NoSpace
from manta.model.extents import ChunkGrid
from manta.model.ids import BlobAlgorithm, BlobId
from tests.cache.conftest import BOOT, NEXT_BOOT, blob_id

BLOB = blob_id(b"a model")
GRID = ChunkGrid(1000, 64)  # 16 chunks, the last of 40 bytes
LAST = len(GRID) - 1


def digest(chunk: int) -> bytes:
    return chunk_digest(b"chunk %d" % chunk)


@dataclass
class Recorded:
    """A map file that a daemon left behind, and what it had recorded."""

    path: Path
    present: set[int]
    cleared: set[int] = field(default_factory=set)

    def load(self, boot_id: bytes = BOOT) -> ChunkMap | None:
        return ChunkMap.load(self.path, BLOB, GRID, boot_id)

    def must_load(self, boot_id: bytes = BOOT) -> ChunkMap:
        loaded = self.load(boot_id)
        assert loaded is not None
        return loaded

    def check_claims(self, boot_id: bytes = BOOT) -> None:
        """Whatever became of the file: no exception, and no chunk is claimed that was not recorded with that digest."""
        loaded = self.load(boot_id)
        if loaded is None:
            return
        claimed = {c for c in range(len(GRID)) if loaded.has(c)} | set(loaded.doubtful)
        assert claimed <= self.present
        assert all(loaded.digest(c) == digest(c) for c in claimed)
        assert loaded.present_count + loaded.doubtful_count == len(claimed)
        loaded.close()


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Chunks 0-4, 9 and the last are recorded; 5, 6 and 12 were and are no more; the others never were."""
    present, cleared = {0, 1, 2, 3, 4, 9, LAST}, {5, 6, 12}
    chunk_map = ChunkMap.create(tmp_path / "map", BLOB, GRID, BOOT)
    for chunk in sorted(present | cleared):
        chunk_map.record(chunk, digest(chunk))
    for chunk in cleared:
        chunk_map.clear(chunk)
    chunk_map.close()
    return Recorded(tmp_path / "map", present, cleared)


def complete(path: Path, *, sealed: bool) -> Recorded:
    chunk_map = ChunkMap.create(path, BLOB, GRID, BOOT)
    for chunk in range(len(GRID)):
        chunk_map.record(chunk, digest(chunk))
    if sealed:
        chunk_map.mark_sealed(chunk_map.generation)
    chunk_map.close()
    return Recorded(path, set(range(len(GRID))))


# Answers -------------------------------------------------------------------------------------------------------------


def test_a_new_map_has_nothing(tmp_path: Path) -> None:
    chunk_map = ChunkMap.create(tmp_path / "map", BLOB, GRID, BOOT)
    assert chunk_map.missing(range(len(GRID))) == list(range(len(GRID)))
    assert (chunk_map.present_count, chunk_map.prefix, chunk_map.complete, chunk_map.sealed) == (0, 0, False, False)
    assert chunk_map.digest(0) is None
    assert (tmp_path / "map").stat().st_size == map_bytes(GRID)
    assert (tmp_path / "map").stat().st_mode & 0o077 == 0
    chunk_map.close()


def test_what_is_recorded_is_there_at_once_and_after_a_restart(recorded: Recorded) -> None:
    loaded = recorded.must_load()
    assert {c for c in range(len(GRID)) if loaded.has(c)} == recorded.present
    assert loaded.missing(range(3, 11)) == [5, 6, 7, 8, 10]
    assert loaded.missing(range(5)) == []
    assert loaded.missing(range(7, 7)) == []
    assert loaded.prefix == 5
    assert loaded.present_bytes == loaded.kept_bytes == 6 * 64 + 40
    assert loaded.digest(9) == digest(9)
    assert loaded.digest(5) is None
    loaded.close()


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, LAST)), max_size=40))
def test_it_agrees_with_a_set_of_chunks(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int]]
) -> None:
    path = tmp_path_factory.mktemp("maps") / "map"
    chunk_map = ChunkMap.create(path, BLOB, GRID, BOOT)
    model: set[int] = set()
    for record, chunk in steps:
        if record:
            chunk_map.record(chunk, digest(chunk))
            model.add(chunk)
        else:
            generation = chunk_map.generation
            chunk_map.clear(chunk)
            assert (chunk_map.generation > generation) == (chunk in model)
            model.discard(chunk)
    loaded = ChunkMap.load(path, BLOB, GRID, BOOT)
    assert loaded is not None
    for one in (chunk_map, loaded):
        assert one.missing(range(len(GRID))) == sorted(set(range(len(GRID))) - model)
        assert one.present_count == len(model)
        assert one.prefix == next(c for c in range(len(GRID) + 1) if c not in model)
        assert one.present_bytes == sum(len(GRID.extent(c)) for c in model)
        one.close()


def test_a_chunk_recorded_twice_is_there_once(recorded: Recorded) -> None:
    loaded = recorded.must_load()
    loaded.record(9, digest(9))
    loaded.record(9, digest(77))
    assert loaded.present_count == len(recorded.present)
    assert loaded.digest(9) == digest(77)
    loaded.close()


def test_what_cannot_be_recorded(recorded: Recorded) -> None:
    loaded = recorded.must_load()
    for chunk in (-1, len(GRID)):
        with pytest.raises(IndexError):
            loaded.record(chunk, digest(0))
        with pytest.raises(IndexError):
            loaded.clear(chunk)
    with pytest.raises(ValueError, match="16 bytes"):
        loaded.record(7, b"short")
    assert not loaded.has(7)
    loaded.close()


def test_an_empty_blob_is_complete(tmp_path: Path) -> None:
    empty = ChunkMap.create(tmp_path / "map", BLOB, ChunkGrid(0), BOOT)
    assert empty.complete
    assert empty.present_bytes == empty.kept_bytes == 0
    empty.mark_sealed(empty.generation)
    empty.close()
    loaded = ChunkMap.load(tmp_path / "map", BLOB, ChunkGrid(0), NEXT_BOOT)
    assert loaded is not None
    assert loaded.sealed
    assert read_outline(tmp_path / "map", 0)[1] == 0


# Seals ---------------------------------------------------------------------------------------------------------------


def test_a_seal_holds_across_a_host_crash(tmp_path: Path) -> None:
    loaded = complete(tmp_path / "map", sealed=True).must_load(NEXT_BOOT)
    assert loaded.sealed
    assert loaded.complete
    assert not loaded.doubtful


def test_only_a_complete_map_that_lost_nothing_meanwhile_is_sealed(recorded: Recorded, tmp_path: Path) -> None:
    loaded = recorded.must_load()
    with pytest.raises(Corrupt, match="lost a chunk"):
        loaded.mark_sealed(loaded.generation)
    loaded.close()
    whole = complete(tmp_path / "whole", sealed=False).must_load()
    before = whole.generation
    whole.clear(3)
    whole.record(3, digest(3))
    with pytest.raises(Corrupt, match="lost a chunk"):
        whole.mark_sealed(before)
    assert not whole.sealed
    whole.close()


@pytest.mark.parametrize("change", [lambda m: m.clear(3), ChunkMap.reset])
def test_a_change_breaks_the_seal_also_on_the_disk(tmp_path: Path, change: Callable[[ChunkMap], None]) -> None:
    sealed = complete(tmp_path / "map", sealed=True).must_load()
    change(sealed)
    assert not sealed.sealed
    sealed.record(3, digest(3))
    sealed.close()
    assert not decode_header((tmp_path / "map").read_bytes()[:HEADER_BYTES], map_bytes(GRID)).sealed


def test_a_sealed_chunk_written_with_other_bytes_is_corrupt(tmp_path: Path) -> None:
    sealed = complete(tmp_path / "map", sealed=True).must_load()
    sealed.record(3, digest(3))
    with pytest.raises(Corrupt, match="Chunk 3"):
        sealed.record(3, digest(4))
    assert sealed.sealed
    sealed.close()


def test_a_damaged_entry_under_a_seal_costs_the_seal_and_the_chunk(tmp_path: Path) -> None:
    whole = complete(tmp_path / "map", sealed=True)
    damaged = bytearray(whole.path.read_bytes())
    damaged[-30] ^= 1
    whole.path.write_bytes(damaged)
    loaded = whole.must_load(NEXT_BOOT)
    assert loaded.missing(range(len(GRID))) == [LAST - 1]
    assert not loaded.sealed
    loaded.record(LAST - 1, digest(LAST - 1))
    assert not loaded.sealed  # what was fetched for the gap was never verified
    loaded.close()
    assert not whole.must_load().sealed


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["unsealed", "sealed", "other boot"])
def victim(request: pytest.FixtureRequest, recorded: Recorded, tmp_path: Path) -> tuple[Recorded, bytes]:
    case = complete(tmp_path / "sealed", sealed=True) if request.param == "sealed" else recorded
    return case, NEXT_BOOT if request.param == "other boot" else BOOT


def test_no_flipped_bit_makes_an_absent_chunk_present(
    victim: tuple[Recorded, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Every single bit of the file, one after the other."""
    caplog.set_level("ERROR")
    case, boot_id = victim
    good = case.path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            case.path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            case.check_claims(boot_id)


def test_no_flipped_bit_in_the_header_is_believed(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
    good = recorded.path.read_bytes()
    for at in range(HEADER_BYTES):
        recorded.path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        assert recorded.load() is None


def test_a_map_of_any_other_length_is_worthless(recorded: Recorded, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")
    good = recorded.path.read_bytes()
    for length in range(len(good)):
        recorded.path.write_bytes(good[:length])
        assert recorded.load() is None
    recorded.path.write_bytes(good + b"\0")
    assert recorded.load() is None
    recorded.path.write_bytes(bytes(len(good)))
    assert recorded.load() is None


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, map_bytes(GRID) - 1), st.binary(min_size=1, max_size=64)), max_size=5),
    st.booleans(),
)
def test_no_overwritten_part_makes_an_absent_chunk_present(
    tmp_path_factory: pytest.TempPathFactory, smears: list[tuple[int, bytes]], sealed: bool
) -> None:
    case = complete(tmp_path_factory.mktemp("maps") / "map", sealed=sealed)
    data = bytearray(case.path.read_bytes())
    for at, smear in smears:
        data[at : at + len(smear)] = smear
    case.path.write_bytes(data[: map_bytes(GRID)])
    case.check_claims()


def test_an_entry_in_the_place_of_another_is_damage(recorded: Recorded) -> None:
    data = bytearray(recorded.path.read_bytes())
    entries = HEADER_BYTES + 2
    data[entries : entries + 20], data[entries + 20 : entries + 40] = (
        data[entries + 20 : entries + 40],
        data[entries : entries + 20],
    )
    recorded.path.write_bytes(data)
    assert recorded.must_load().missing(range(5)) == [0, 1]


@pytest.mark.parametrize(
    ("blob", "grid"),
    [
        (blob_id(b"another"), GRID),
        (BlobId(BlobAlgorithm.GIT_SHA1, BLOB.hex[:40]), GRID),
        (BLOB, ChunkGrid(1000, 128)),
        (BLOB, ChunkGrid(1001, 64)),
        (BLOB, ChunkGrid(0, 64)),
    ],
)
def test_the_map_of_anything_else_is_worthless_and_that_is_logged(
    recorded: Recorded, blob: BlobId, grid: ChunkGrid, caplog: pytest.LogCaptureFixture
) -> None:
    assert ChunkMap.load(recorded.path, blob, grid, BOOT) is None
    assert f"The chunk map {recorded.path} is worthless" in caplog.text


def test_the_map_of_another_version_is_worthless(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("manta.cache.chunkmap.VERSION", 2)
    newer = Header(BLOB, GRID, BOOT, sealed=False).encode()
    monkeypatch.undo()
    recorded.path.write_bytes(newer + recorded.path.read_bytes()[HEADER_BYTES:])
    assert recorded.load() is None
    assert "version 2, not 1" in caplog.text


def test_no_map_is_no_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ChunkMap.load(tmp_path / "absent", BLOB, GRID, BOOT) is None
    assert not caplog.records


def test_a_new_map_is_a_new_file(recorded: Recorded) -> None:
    """A peer server that still maps the old one must keep its length."""
    with recorded.path.open("rb") as mapped:
        ChunkMap.create(recorded.path, BLOB, ChunkGrid(1, 64), BOOT).close()
        assert os.fstat(mapped.fileno()).st_size == map_bytes(GRID)


# Host crash ----------------------------------------------------------------------------------------------------------


def test_after_a_host_crash_nothing_is_present_until_it_is_settled(recorded: Recorded) -> None:
    loaded = recorded.must_load(NEXT_BOOT)
    assert loaded.present_count == loaded.prefix == 0
    assert set(loaded.doubtful) == recorded.present
    assert loaded.kept_bytes == 6 * 64 + 40
    assert loaded.present_bytes == 0
    assert loaded.settle(0, digest(0), True)
    assert loaded.settle(1, digest(1), False)
    assert not loaded.settle(2, digest(99), True), "another digest than the one that was compared"
    assert not loaded.settle(7, digest(7), True), "never recorded"
    assert (loaded.has(0), loaded.has(1), loaded.has(2)) == (True, False, False)
    assert set(loaded.doubtful) == recorded.present - {0, 1}
    loaded.close()
    assert set(recorded.must_load(NEXT_BOOT).doubtful) == recorded.present - {1}, "still in doubt at the next start"


def test_once_all_is_settled_or_fetched_again_the_map_is_trusted(recorded: Recorded) -> None:
    loaded = recorded.must_load(NEXT_BOOT)
    for chunk in loaded.doubtful[1:]:
        assert loaded.settle(chunk, digest(chunk), True)
    loaded.record(7, digest(7))
    loaded.record(loaded.doubtful[0], digest(0))
    loaded.close()
    again = recorded.must_load(NEXT_BOOT)
    assert {c for c in range(len(GRID)) if again.has(c)} == recorded.present | {7}


@settings(deadline=None, derandomize=True)
@given(st.sets(st.integers(0, LAST)), st.sets(st.integers(0, LAST)), st.sets(st.integers(0, LAST)))
def test_whatever_a_host_crash_lost_only_recorded_entries_are_left_to_settle(
    tmp_path_factory: pytest.TempPathFactory, bits: set[int], entries: set[int], late_bits: set[int]
) -> None:
    """The disk wrote pages of the map in any order: bits without entries, entries without bits, bits that were cleared."""
    case = complete(tmp_path_factory.mktemp("maps") / "map", sealed=False)
    data = bytearray(case.path.read_bytes())
    for chunk in bits | late_bits:
        data[HEADER_BYTES + chunk // 8] &= ~(1 << chunk % 8)
    for chunk in entries:
        at = HEADER_BYTES + 2 + chunk * 20
        data[at : at + 20] = bytes(20)
    for chunk in late_bits:
        data[HEADER_BYTES + chunk // 8] |= 1 << chunk % 8
    case.path.write_bytes(data)
    loaded = case.must_load(NEXT_BOOT)
    assert set(loaded.doubtful) == case.present - (bits - late_bits) - entries
    assert loaded.present_count == 0


# Killed daemons and full disks ---------------------------------------------------------------------------------------

RECORDER = """
import os, random, sys
from pathlib import Path
from manta.cache.chunkmap import ChunkMap
from manta.cache.digests import chunk_digest
from tests.cache.test_chunkmap import BLOB, KILLED_GRID
from tests.cache.conftest import BOOT
directory, seed = Path(sys.argv[1]), int(sys.argv[2])
data = os.open(directory / "data", os.O_RDWR)
chunk_map = ChunkMap.load(directory / "map", BLOB, KILLED_GRID, BOOT) or ChunkMap.create(directory / "map", BLOB, KILLED_GRID, BOOT)
dice = random.Random(seed)
while True:
    chunk = dice.randrange(len(KILLED_GRID))
    if chunk_map.has(chunk):
        chunk_map.clear(chunk)
        os.write(1, b"-%d\\n" % chunk)
    part = dice.randbytes(len(KILLED_GRID.extent(chunk)))
    os.pwrite(data, part, KILLED_GRID.extent(chunk).start)
    chunk_map.record(chunk, chunk_digest(part))
    os.write(1, b"+%d\\n" % chunk)
"""
KILLED_GRID = ChunkGrid(3000 * 64 + 5, 64)


@pytest.mark.parametrize("seed", range(4))
def test_a_daemon_killed_while_it_records_leaves_a_true_map(tmp_path: Path, seed: int) -> None:
    """What it acknowledged is there, and what is there has the bytes that its digest says: killed, gone on, killed again."""
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", KILLED_GRID.size)
    dice, present = random.Random(seed), set[int]()
    for life in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", RECORDER, tmp_path, f"{seed * 10 + life}"], stdout=subprocess.PIPE
        ) as daemon:
            assert daemon.stdout is not None
            lines = [daemon.stdout.readline() for _ in range(dice.randrange(1, 4000))]
            daemon.send_signal(signal.SIGKILL)
            lines += daemon.stdout.readlines()
        for line in lines:
            if line.startswith(b"+"):
                present.add(int(line))
            else:
                present.discard(-int(line))
        loaded = ChunkMap.load(tmp_path / "map", BLOB, KILLED_GRID, BOOT)
        assert loaded is not None
        found = {c for c in range(len(KILLED_GRID)) if loaded.has(c)}
        assert len(found ^ present) <= 1, "one step may be done and not acknowledged"
        data = (tmp_path / "data").read_bytes()
        for chunk in found:
            extent = KILLED_GRID.extent(chunk)
            assert loaded.digest(chunk) == chunk_digest(data[extent.start : extent.end])
        present = found
        loaded.close()


def test_a_full_disk_leaves_no_map_behind(small_disk: Path) -> None:
    with pytest.raises(NoSpace, match="Creating a chunk map"):
        ChunkMap.create(small_disk / "map", BLOB, ChunkGrid(1 << 40, 1 << 20), BOOT)
    assert list(small_disk.iterdir()) == []


def test_chunks_are_recorded_on_a_full_disk(small_disk: Path) -> None:
    """Room for the entries is taken when the map is made: bytes that found room are not fetched twice."""
    chunk_map = ChunkMap.create(small_disk / "map", BLOB, ChunkGrid(5000 * 64, 64), BOOT)
    with (small_disk / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space"):
        ballast.write(bytes(2 << 20))
    for chunk in range(5000):
        chunk_map.record(chunk, digest(chunk))
    assert chunk_map.complete
    chunk_map.close()


def test_a_disk_that_refuses_a_write_leaves_the_chunk_absent(recorded: Recorded) -> None:
    loaded = recorded.must_load()
    loaded.path.unlink()
    with pytest.raises(CacheBroken, match="Recording a chunk"):
        loaded.record(7, digest(7))
    assert not loaded.has(7)
    with pytest.raises(CacheBroken):
        loaded.clear(0)
    with pytest.raises(CacheBroken):
        loaded.reset()
    assert loaded.present_count == 0, "cleared in memory whatever the disk says"
    with pytest.raises(CacheBroken):
        complete(recorded.path.with_name("gone") / "map", sealed=False)


def test_the_outline_is_what_the_map_says_of_itself(recorded: Recorded) -> None:
    header, cached = read_outline(recorded.path, GRID.size)
    assert (header.blob, header.grid, header.boot_id, header.sealed) == (BLOB, GRID, BOOT, False)
    assert cached == 6 * 64 + 40
    with pytest.raises(Corrupt, match="999 bytes instead of 1000"):
        read_outline(recorded.path, 999)
