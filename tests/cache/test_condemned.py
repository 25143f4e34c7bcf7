"""Damaged chunks that the disk does not let go: they never come back, whatever it refuses."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from manta.cache.condemned import Condemned
from manta.cache.layout import Layout
from manta.cache.store import Blob, Store
from manta.errors import CacheBroken
from manta.model.extents import Extent
from tests.cache.conftest import BOOT, CHUNK, blob_id, content, fetch

DATA = content(1000)  # 16 chunks
BLOB = blob_id(DATA)
ALL = Extent(0, len(DATA))


def opened(directory: Path) -> Store:
    return Store(directory / "cache", chunk_size=CHUNK, boot_id=BOOT, journal=directory / "journal")


def refused(*_: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("change", [lambda b: b.clear(3), lambda b: b.discard("wrong")], ids=["clear", "discard"])
@pytest.mark.parametrize("sealed", [False, True], ids=["unsealed", "sealed"])
def test_a_chunk_that_the_disk_does_not_forget_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Blob], None], sealed: bool
) -> None:
    store = opened(tmp_path)
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        if sealed:
            blob.seal()
    with store.open_blob(BLOB, 1000) as blob:
        monkeypatch.setattr("manta.cache.chunkmap.pwrite_all", refused)
        with pytest.raises(CacheBroken):
            change(blob)
        assert not blob.has(3)
    monkeypatch.undo()
    store.close()
    with opened(tmp_path) as after, after.open_blob(BLOB, 1000) as blob:
        assert blob.missing(ALL) == list(range(16)), "the map is gone, and all that it said"


@pytest.mark.parametrize("restart", [False, True])
def test_not_even_where_the_map_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, restart: bool
) -> None:
    store = opened(tmp_path)
    blob = store.open_blob(BLOB, 1000)
    fetch(blob, DATA)
    blob.seal()
    monkeypatch.setattr("manta.cache.chunkmap.pwrite_all", refused)
    monkeypatch.setattr("manta.cache.condemned.remove_map", refused)
    monkeypatch.setattr("manta.cache.chunkmap.remove_map", refused)
    with pytest.raises(CacheBroken):
        blob.clear(3)
    blob.close()
    assert "refuses to forget" in caplog.text
    with pytest.raises(CacheBroken, match="damaged chunks"):
        store.open_blob(BLOB, 1000)
    if restart:
        store.close()
        store = opened(tmp_path)
        assert store.find(BLOB) is None
        with pytest.raises(CacheBroken, match="damaged chunks"):
            store.open_blob(BLOB, 1000)
    monkeypatch.undo()
    store.look_after()
    with store.open_blob(BLOB, 1000) as blob:
        assert blob.missing(ALL) == list(range(16))
    store.close()


def test_a_journal_that_cannot_be_read_is_said_and_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "journal"
    for damaged in (b"{", b'["sha256-nonsense"]', b"\xff"):
        journal.write_bytes(damaged)
        assert len(Condemned(Layout(tmp_path), journal)) == 0
    assert caplog.text.count("cannot be read") == 3
