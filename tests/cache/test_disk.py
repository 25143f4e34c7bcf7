from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from manta.cache.disk import disk_error, disk_errors, pwrite_all, replace_file
from manta.errors import CacheBroken, NoSpace

PATH = Path("/cache/blobs/ab/x.data")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_quota_is_no_space(number: int) -> None:
    error = disk_error(OSError(number, os.strerror(number)), PATH, "recording a chunk")
    assert isinstance(error, NoSpace)
    assert error.message.startswith(f"Recording a chunk in {PATH} failed: the disk is full.")
    assert "manta cache gc" in error.message


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOENT, errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_everything_else_is_a_broken_cache_with_the_path_and_what_to_do(number: int) -> None:
    error = disk_error(OSError(number, os.strerror(number)), PATH, "opening a blob")
    assert isinstance(error, CacheBroken)
    assert str(PATH) in error.message
    assert os.strerror(number) in error.message
    assert error.message.endswith(".")


def test_the_original_error_stays_attached() -> None:
    with pytest.raises(CacheBroken) as caught, disk_errors(PATH, "opening a blob"):
        os.open(PATH, os.O_RDONLY)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_replacing_a_file_leaves_the_new_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.with_name("file.tmp").write_bytes(b"left over from a crash, and longer than what comes")
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new(small_disk: Path) -> None:
    path = small_disk / "file"
    replace_file(path, b"old")
    with pytest.raises(OSError, match="No space"):
        replace_file(path, bytes(2 << 20))
    assert path.read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["file"]


def test_a_short_write_is_continued(small_disk: Path) -> None:
    fd = os.open(small_disk / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="No space"):
            pwrite_all(fd, bytes(2 << 20), 0)
        os.ftruncate(fd, 0)
        pwrite_all(fd, b"abc" * 1000, 5)
        assert os.pread(fd, 4000, 5) == b"abc" * 1000
    finally:
        os.close(fd)
