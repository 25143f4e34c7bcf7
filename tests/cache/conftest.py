"""What the tests of the cache share: blobs with known bytes, and a disk of one megabyte."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.cache.digests import chunk_digest
from manta.cache.store import Blob
from manta.model.ids import BlobAlgorithm, BlobId

CHUNK = 64
"""Bytes in a chunk where a test does not need more."""

BOOT, NEXT_BOOT = b"boot-before-cras", b"boot-after-crash"


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def blob_id(data: bytes) -> BlobId:
    return BlobId(BlobAlgorithm.SHA256, hashlib.sha256(data).hexdigest())


def fetch(blob: Blob, data: bytes, *chunks: int) -> None:
    """Does what a worker and the daemon do for `chunks` (none: all) of the blob with the content `data`."""
    for chunk in chunks or range(len(blob.grid)):
        extent = blob.grid.extent(chunk)
        part = data[extent.start : extent.end]
        os.pwrite(blob.fd, part, extent.start)
        blob.record(chunk, chunk_digest(part))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one MiB, unmounted afterwards whatever happened."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "small-disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "manta-test", disk], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
