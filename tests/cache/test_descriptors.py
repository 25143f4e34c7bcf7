"""Descriptors of cache files: bounded, reopened as the same file or not at all, good for as long as they are used."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
from pathlib import Path

import pytest

from manta.cache import descriptors
from manta.cache.descriptors import IDLE_MAX, IDLE_MIN, RESERVED, CacheFile, Descriptors


def made(path: Path, kept: Descriptors, data: bytes = b"data") -> CacheFile:
    path.write_bytes(data)
    return CacheFile(kept, path, os.open(path, os.O_RDWR))


def read(file: CacheFile) -> bytes:
    with file.used() as fd:
        return os.pread(fd, 100, 0)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_those_used_last_stay_open_and_the_others_come_back(tmp_path: Path) -> None:
    kept = Descriptors(2)
    files = [made(tmp_path / str(number), kept, b"%d" % number) for number in range(5)]
    assert len(kept) == 2
    assert [read(file) for file in files] == [b"%d" % number for number in range(5)]
    assert len(kept) == 2
    before = len(os.listdir("/proc/self/fd"))
    for file in files:
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_what_is_in_use_is_not_shut(tmp_path: Path) -> None:
    kept = Descriptors(0)
    file = made(tmp_path / "file", kept)
    fd = file.take()
    for number in range(3):
        assert read(made(tmp_path / str(number), kept)) == b"data"
    assert os.pread(fd, 4, 0) == b"data"
    file.close()
    assert os.pread(fd, 4, 0) == b"data"
    with pytest.raises(ValueError, match="is closed"):
        file.take()
    file.give_back()
    assert not is_open(fd)


def test_another_file_in_its_place_is_not_taken(tmp_path: Path) -> None:
    file = made(tmp_path / "file", Descriptors(0))
    (tmp_path / "other").write_bytes(b"evil")
    (tmp_path / "other").rename(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        file.take()
    (tmp_path / "file").unlink()
    with pytest.raises(FileNotFoundError):
        file.take()


def test_one_that_was_abandoned_is_read_while_it_is_open(tmp_path: Path) -> None:
    file = made(tmp_path / "file", Descriptors(1))
    file.abandon()
    assert not file.ours
    assert read(file) == b"data"
    file.rest()
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        file.take()


def test_one_that_is_open_for_reading_becomes_writable_under_the_same_number(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"data")
    file = CacheFile(Descriptors(1), path, os.open(path, os.O_RDONLY), writable=False)
    with file.used() as reading, file.used(writing=True) as writing:
        assert reading == writing
        os.pwrite(writing, b"D", 0)
        assert os.pread(reading, 4, 0) == b"Data"


def test_threads_never_see_another_files_bytes(tmp_path: Path) -> None:
    """A descriptor's number is used again as soon as it is closed: nobody may hold one that was."""
    kept = Descriptors(3)
    files = [made(tmp_path / str(number), kept, b"%d" % number) for number in range(12)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(2000):
            number = dice.randrange(len(files))
            if read(files[number]) != b"%d" % number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(kept) == 3


@pytest.mark.parametrize(
    ("hard", "idle"),
    [
        (resource.RLIM_INFINITY, IDLE_MAX),
        (524_288, IDLE_MAX),
        (RESERVED + 100, 100),
        (256, IDLE_MIN),
    ],
)
def test_the_limit_is_raised_and_kept_within(
    hard: int, idle: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (128, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert descriptors.allowance() == idle
    assert raised == [(hard, hard)]
    assert ("raise the limit" in caplog.text) == (hard == 256)
