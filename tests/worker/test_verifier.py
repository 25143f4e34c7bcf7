"""The verifier: what is not as it was is named with the reason, and readers' page cache is left as it was."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import pytest

from manta.cache.digests import chunk_digest, extent_digest
from manta.model.extents import Extent
from manta.wire.messages import Verify
from manta.worker import verifier as module
from manta.worker.verifier import verify

CHUNK = 256 * 1024
DATA = random.Random(3).randbytes(4 * CHUNK + 1000)


def order() -> Verify:
    starts = range(0, len(DATA), CHUNK)
    return Verify(
        7, [(at, min(at + CHUNK, len(DATA)), chunk_digest(DATA[at : at + CHUNK])) for at in starts]
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def verified(path: Path) -> list[tuple[int, str]]:
    with path.open("rb") as file:
        answer = verify(order(), file.fileno())
    assert answer.order == 7
    return answer.damaged


def test_what_is_as_it_was_is_not_named(path: Path) -> None:
    assert verified(path) == []


def test_damage_is_named_by_where_the_chunk_starts(path: Path) -> None:
    data = bytearray(DATA)
    data[CHUNK] ^= 1
    data[-1] ^= 128
    path.write_bytes(data)
    assert verified(path) == [(CHUNK, "does not match its digest"), (4 * CHUNK, "does not match its digest")]


def test_a_file_that_is_too_short_is_damage(path: Path) -> None:
    os.truncate(path, 3 * CHUNK + 5)
    assert [at for at, how in verified(path) if "too short" in how] == [3 * CHUNK, 4 * CHUNK]


def test_what_cannot_be_read_is_damage_and_the_rest_is_verified(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = extent_digest

    def digest(fd: int, extent: Extent, buffer: bytearray) -> bytes:
        if extent.start == CHUNK:
            raise OSError(5, "Input/output error")
        return honest(fd, extent, buffer)

    monkeypatch.setattr(module, "extent_digest", digest)
    assert verified(path) == [(CHUNK, "cannot be read from the cache disk (Input/output error)")]


def cached_pages(path: Path) -> int:
    asked, pages = module._Range(0, len(DATA)), module._Pages()
    with path.open("rb") as file:
        if ctypes.CDLL(None).syscall(module._SYS_CACHESTAT, file.fileno(), ctypes.byref(asked), ctypes.byref(pages), 0):
            pytest.skip("this kernel has no cachestat (Linux 6.5 has)")
    return int(pages.cached)


def test_the_page_cache_is_left_as_it_was(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        all_pages = cached_pages(path)
        verified(path)
        assert cached_pages(path) == all_pages, "what was there stays"
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if before := cached_pages(path):
        pytest.skip(f"{before} pages cannot be dropped here (a tmpfs?)")
    assert verified(path) == []
    assert cached_pages(path) < all_pages / 4, "what was brought in is taken out, but for a little readahead"
