"""The digester: a digest in any number of steps is the whole's; what does not continue it is refused, never guessed."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.wire.messages import Digest
from manta.worker import digester as module
from manta.worker.digester import Digester
from manta.worker.failure import OrderFailed

DATA = random.Random(2).randbytes(1_500_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
BLOB = f"sha256-{SHA256}"


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield number
    os.close(number)


def order(start: int, end: int, blob: str = BLOB, size: int = len(DATA)) -> Digest:
    return Digest(7, blob, start, end, size)


def test_a_digest_in_steps_is_that_of_the_whole(fd: int) -> None:
    digester = Digester()
    for start, end in ((0, 1), (1, 700_000), (700_000, len(DATA) - 1)):
        answer = digester.advance(order(start, end), fd)
        assert (answer.order, answer.end, answer.hex) == (7, end, "")
    assert digester.advance(order(len(DATA) - 1, len(DATA)), fd).hex == SHA256


def test_a_git_blob_has_gits_digest(fd: int) -> None:
    whole = hashlib.sha1(b"blob %d\0" % len(DATA) + DATA, usedforsecurity=False).hexdigest()
    assert Digester().advance(order(0, len(DATA), f"git-{whole}"), fd).hex == whole


def test_an_empty_blob_has_a_digest(fd: int) -> None:
    assert Digester().advance(order(0, 0, size=0), fd).hex == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("start", [50, 150])
def test_a_gap_or_an_overlap_has_to_start_anew(fd: int, start: int) -> None:
    digester = Digester()
    digester.advance(order(0, 100), fd)
    with pytest.raises(OrderFailed, match="anew") as failed:
        digester.advance(order(start, 200), fd)
    assert failed.value.reason == "absent"
    with pytest.raises(OrderFailed):  # and nothing is left of it
        digester.advance(order(100, 200), fd)
    assert digester.advance(order(0, len(DATA)), fd).hex == SHA256


def test_starting_at_zero_forgets_what_was(fd: int) -> None:
    digester = Digester()
    digester.advance(order(0, 100), fd)
    assert digester.advance(order(0, len(DATA)), fd).hex == SHA256


def test_a_finished_digest_leaves_nothing(fd: int) -> None:
    digester = Digester()
    digester.advance(order(0, len(DATA)), fd)
    assert not digester._running


def test_half_done_digests_are_bounded(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUNNING_MAX", 2)
    digester = Digester()
    blobs = [f"sha256-{n:064x}" for n in range(3)]
    for blob in blobs:
        digester.advance(order(0, 100, blob), fd)
    assert len(digester._running) == 2
    with pytest.raises(OrderFailed, match="anew"):
        digester.advance(order(100, 200, blobs[0]), fd)
    assert digester.advance(order(100, 200, blobs[2]), fd).end == 200


def test_a_file_that_is_too_short_is_named(fd: int) -> None:
    os.ftruncate(fd, 1000)
    with pytest.raises(OrderFailed, match="shorter") as failed:
        Digester().advance(order(0, 2000), fd)
    assert failed.value.reason == "cache_broken"


def test_a_disk_that_fails_is_named() -> None:
    number = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)  # reading at 0 is EIO
    try:
        with pytest.raises(OrderFailed, match="disk failed") as failed:
            Digester().advance(order(0, 2000), number)
    finally:
        os.close(number)
    assert failed.value.reason == "cache_broken"
