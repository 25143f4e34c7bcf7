from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import xxhash

from manta.cache.digests import (
    DIGEST_BYTES,
    READ_BYTES,
    BlobDigest,
    RunningDigest,
    chunk_digest,
    extent_digest,
    running_chunk_digest,
)
from manta.errors import Corrupt
from manta.model.extents import Extent
from manta.model.ids import BlobAlgorithm, BlobId
from tests.cache.conftest import blob_id, content

DATA = content(READ_BYTES * 2 + 12345)


@pytest.fixture
def fd(tmp_path: Path) -> int:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def test_the_chunk_digest_is_xxh3_128_in_its_canonical_order() -> None:
    # The published value of the empty input: peers of any make must agree on it.
    assert chunk_digest(b"").hex() == "99aa06d3014798d86001c324468d497f"
    assert chunk_digest(DATA) == xxhash.xxh3_128_digest(DATA)
    assert len(chunk_digest(DATA)) == DIGEST_BYTES


def test_in_pieces_from_memory_and_from_a_file_it_is_the_same(fd: int) -> None:
    running: RunningDigest = running_chunk_digest()
    for at in range(0, len(DATA), 1000):
        running.update(memoryview(DATA)[at : at + 1000])
    assert running.digest() == chunk_digest(DATA) == extent_digest(fd, Extent(0, len(DATA)))
    os.close(fd)


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0), (0, 1), (5, 5), (3, READ_BYTES), (1, 1 + READ_BYTES), (7, len(DATA)), (100, 200)]
)
def test_an_extent_of_a_file(fd: int, start: int, end: int) -> None:
    assert extent_digest(fd, Extent(start, end)) == chunk_digest(DATA[start:end])
    assert extent_digest(fd, Extent(start, end), bytearray(4096)) == chunk_digest(DATA[start:end])
    os.close(fd)


def test_a_file_that_ends_too_early_is_corrupt(fd: int) -> None:
    with pytest.raises(Corrupt, match="ends at byte"):
        extent_digest(fd, Extent(10, len(DATA) + 1))
    os.close(fd)


def test_a_blob_is_known_by_its_sha256() -> None:
    digest = BlobDigest(blob_id(DATA), len(DATA))
    answers = []
    for part in (DATA[:1000], memoryview(DATA)[1000:]):
        digest.update(part)
        answers.append(digest.matches)
    assert answers == [False, True]
    assert digest.hexdigest() == hashlib.sha256(DATA).hexdigest()


def test_a_small_file_is_known_by_gits_sha1() -> None:
    # What `printf 'hello\n' | git hash-object --stdin` prints.
    blob = BlobId(BlobAlgorithm.GIT_SHA1, "ce013625030ba8dba906f756967f9e9ca394464a")
    digest = BlobDigest(blob, 6)
    digest.update(b"hello\n")
    assert digest.matches
    wrong_size = BlobDigest(blob, 7)
    wrong_size.update(b"hello\n")
    assert not wrong_size.matches
