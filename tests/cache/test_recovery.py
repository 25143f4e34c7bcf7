from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.cache import recovery
from manta.cache.recovery import scan, settle_doubtful
from manta.cache.store import Blob, Store
from manta.errors import CacheBroken
from manta.model.extents import Extent
from tests.cache.conftest import BOOT, CHUNK, NEXT_BOOT, blob_id, content, fetch

DATA = content(1000)
BLOB = blob_id(DATA)
ALL = Extent(0, 1000)


def opened(directory: Path, boot_id: bytes = BOOT) -> Store:
    return Store(directory, chunk_size=CHUNK, boot_id=boot_id)


@pytest.fixture
def blob(tmp_path: Path) -> Iterator[Blob]:
    with opened(tmp_path) as store, store.open_blob(BLOB, 1000) as blob:
        yield blob


def damage(blob: Blob, *chunks: int) -> None:
    for chunk in chunks:
        byte = os.pread(blob.fd, 1, chunk * CHUNK)[0]
        os.pwrite(blob.fd, bytes([byte ^ 1]), chunk * CHUNK)


# At start ------------------------------------------------------------------------------------------------------------


def test_the_scan_finds_blobs_totals_and_what_waits_for_its_seal(tmp_path: Path) -> None:
    part, whole, sealed = (content(1000, seed) for seed in (1, 2, 3))
    with opened(tmp_path) as store:
        fetch(store.open_blob(blob_id(part), 1000), part, 0, 15)
        fetch(store.open_blob(blob_id(whole), 1000), whole)
        blob = store.open_blob(blob_id(sealed), 1000)
        fetch(blob, sealed)
        blob.seal()
    with opened(tmp_path, NEXT_BOOT) as store:
        assert store.recovered.unsealed == [blob_id(whole)]
        assert store.recovered.dropped == []
        assert store.cached_bytes == 2104
        assert {(i.id, i.cached, i.sealed) for i in store.listing()} == {
            (blob_id(part), 104, False),
            (blob_id(whole), 1000, False),
            (blob_id(sealed), 1000, True),
        }


def test_stray_files_are_dropped_and_strangers_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as store:
        fetch(store.open_blob(BLOB, 1000), DATA)
        layout = store.layout
        for seed, lose in enumerate((layout.data, layout.map), start=1):
            store.open_blob(blob_id(b"%d" % seed), 1000).close()
            lose(blob_id(b"%d" % seed)).unlink()
    folder = layout.data(BLOB).parent
    strays = [folder / f"{BLOB}.data.gone", folder / f"{BLOB}.map.tmp", layout.map(blob_id(b"1"))]
    strays.append(layout.data(blob_id(b"2")))
    strangers = [folder / "notes.txt", folder / f"{BLOB}.backup", layout.blobs / "README"]
    for path in strays[:2] + strangers:
        path.write_bytes(b"x")
    found = scan(layout)
    assert sorted(found.dropped) == sorted(strays)
    assert [i.id for i in found.blobs] == [BLOB]
    assert all(path.exists() for path in strangers)
    assert not any(path.exists() for path in strays)
    assert str(strangers[0]) in caplog.text
    assert f"Removed 4 stray files from {layout.blobs}" in caplog.text


@pytest.mark.parametrize("kind", ["truncated map", "empty map", "damaged header", "another blob's map", "short data"])
def test_a_blob_with_a_worthless_map_is_dropped_and_the_others_stay(tmp_path: Path, kind: str) -> None:
    other = content(1000, 1)
    with opened(tmp_path) as store:
        fetch(store.open_blob(BLOB, 1000), DATA)
        fetch(store.open_blob(blob_id(other), 1000), other)
        layout = store.layout
    chunk_map = layout.map(BLOB)
    match kind:
        case "truncated map":
            os.truncate(chunk_map, 200)
        case "empty map":
            os.truncate(chunk_map, 0)
        case "damaged header":
            chunk_map.write_bytes(b"\xff" + chunk_map.read_bytes()[1:])
        case "another blob's map":
            chunk_map.write_bytes(layout.map(blob_id(other)).read_bytes())
        case _:
            os.truncate(layout.data(BLOB), 999)
    with opened(tmp_path) as store:
        assert [i.id for i in store.listing()] == [blob_id(other)]
        assert sorted(store.recovered.dropped) == [layout.data(BLOB), chunk_map]
        with store.open_blob(BLOB, 1000) as blob:
            assert blob.missing(ALL) == list(range(16))


def test_a_map_that_cannot_be_read_does_not_stop_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as store:
        fetch(store.open_blob(BLOB, 1000), DATA)

    def fail(path: Path, data_bytes: int) -> None:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(recovery, "read_outline", fail)
    with opened(tmp_path) as store:
        assert store.listing() == []
        monkeypatch.undo()
        with store.open_blob(BLOB, 1000) as blob:  # the disk came to its senses
            assert blob.complete
        assert store.cached_bytes == 1000


def test_a_scan_of_a_vanished_directory_is_a_broken_cache(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as store:
        store.layout.blobs.rmdir()
        with pytest.raises(CacheBroken):
            scan(store.layout)


# After a host crash --------------------------------------------------------------------------------------------------


def test_chunks_that_the_disk_lost_are_fetched_again_and_the_others_are_not(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        blob = store.open_blob(BLOB, 1000)
        fetch(blob, DATA, *range(10))
        damage(blob, 3, 7)
    with opened(tmp_path, NEXT_BOOT) as store, store.open_blob(BLOB, 1000) as blob:
        assert list(blob.doubtful) == list(range(10))
        assert blob.cached_bytes == blob.prefix_end == 0
        assert store.cached_bytes == 10 * CHUNK
        checked: list[int] = []
        assert settle_doubtful(blob, checked.append) == [3, 7]
        assert checked == [CHUNK] * 10
        assert list(blob.doubtful) == []
        assert blob.missing(ALL) == [3, 7, *range(10, 16)]
        assert store.cached_bytes == blob.cached_bytes == 8 * CHUNK
        assert settle_doubtful(blob) == []
    with opened(tmp_path, NEXT_BOOT) as store, store.open_blob(BLOB, 1000) as blob:
        assert list(blob.doubtful) == [], "settled once, not at every start"


def test_a_settling_that_is_stopped_goes_on_later(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        fetch(store.open_blob(BLOB, 1000), DATA)

    class Stopped(Exception):
        pass

    def stop_at_third(_: int) -> None:
        checked.append(_)
        if len(checked) == 3:
            raise Stopped

    checked: list[int] = []
    with opened(tmp_path, NEXT_BOOT) as store, store.open_blob(BLOB, 1000) as blob:
        with pytest.raises(Stopped):
            settle_doubtful(blob, stop_at_third)
        assert list(blob.doubtful) == list(range(3, 16))
        assert settle_doubtful(blob) == []
        assert blob.complete


def test_a_chunk_fetched_while_it_is_settled_is_kept(tmp_path: Path) -> None:
    """The daemon does not wait for the settling where a reader wants the chunk now."""
    with opened(tmp_path) as store:
        blob = store.open_blob(BLOB, 1000)
        fetch(blob, DATA)
        damage(blob, 5)
    with opened(tmp_path, NEXT_BOOT) as store, store.open_blob(BLOB, 1000) as blob:

        def fetch_meanwhile(_: int) -> None:
            if not blob.has(5):
                fetch(blob, DATA, 5)

        assert settle_doubtful(blob, fetch_meanwhile) == []
        assert blob.complete
