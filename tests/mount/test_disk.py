"""The cache's disk fills up, fails, turns read-only, goes away: real filesystems in a file, the real daemon, and readers that compare every
byte. Whatever the disk does, a reader gets the right bytes or an error that `manta status` explains, and all is well when the disk is."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL, SHARDED
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE, true_digest
from tests.mount.node import Node, run, wait_until

MIB = 1024 * 1024
CHUNK = 8 * MIB

_FS_IOC_SHUTDOWN = (
    0x8004587D  # _IOR('X', 125, __u32): the filesystem answers EIO from now on, as after an error of its journal
)
_SHUTDOWN_NO_FLUSH = 2

READ = """
import hashlib, os, sys
path, at, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
digest = hashlib.sha256()
try:
    fd = os.open(path, os.O_RDONLY)
    while at < end:
        data = os.pread(fd, min(1 << 20, end - at), at)
        digest.update(data)
        at += len(data)
except OSError as e:
    sys.exit(f"{e.errno} at {at}")
print(digest.hexdigest())
"""
"""Says where and with which errno it failed."""


def read(directory: Path, at: int = 0, end: int = BIG_SIZE) -> str:
    """Reads a part of the big file: "" where every byte is right, else what went wrong."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(directory / BIG_FILE), str(at), str(end)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip()
    return "" if done.stdout.strip() == true_digest(at, end) else "wrong bytes"


def errno_of(failure: str) -> int:
    return int(failure.split(maxsplit=1)[0])


@contextmanager
def disk(node: Node, size: int, *, on: Path | None = None) -> Iterator[Path]:
    """An ext4 of `size` bytes, mounted where the cache will be. Its image is sparse, in the folder `on`."""
    if missing := [tool for tool in ("mkfs.ext4", "dumpe2fs", "losetup", "fallocate") if shutil.which(tool) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    image = (on or node.path) / "disk.img"
    with image.open("wb") as file:
        file.truncate(size)
    # Without a journal: 64 MiB have better uses, and an error of the disk stays one of the data.
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)], check=True)
    node.cache.mkdir()
    mounted = subprocess.run(
        ["mount", "-o", "loop,errors=continue", str(image), str(node.cache)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no loop device can be mounted here: {mounted.stderr.strip()}")
    try:
        yield node.cache
    finally:
        try:
            node.unmount_all()
        finally:
            # Lazily where a test took it away; the loop device frees itself with its last user.
            subprocess.run(["umount", str(node.cache)], check=False, capture_output=True)
            assert not loops(image), "the loop device is still in use"


def loops(image: Path) -> str:
    return str(subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True, check=True).stdout)


def problem_of(node: Node, words: str) -> str:
    """The sentence of `manta status` with `words`, which comes soon."""
    found: list[str] = []

    def look() -> bool:
        status = node.status()
        found[:] = [sentence for sentence in status["problems"] + status["errors"] if words in sentence]
        return bool(found)

    wait_until(look)
    return found[0]


def nothing_wrong(node: Node) -> None:
    """`manta status` names no problem of the cache any more, soon."""
    wait_until(lambda: not node.status()["problems"])


def until_whole(directory: Path) -> None:
    """The whole file can be read, soon: what keeps the disk from it has ended."""
    wait_until(lambda: read(directory) == "", timeout_s=30)


def on_disk(cache: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in (cache / "blobs").rglob("*.data"))


# Full ----------------------------------------------------------------------------------------------------------------


@pytest.mark.above_fuse
def test_the_floor_is_kept_readers_are_told_and_room_ends_it(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_CACHE_FREE_SPACE_FLOOR"] = "12MiB"
    with disk(node, 128 * MIB) as cache:
        ballast = cache / "ballast"
        directory, other = node.mount(BIG), node.mount(MODEL)
        run('cat "$1/config.json" "$1/model.safetensors" > /dev/null', other)
        subprocess.run(["fallocate", "-l", "60M", str(ballast)], check=True)
        failure = read(directory)
        assert errno_of(failure) == 28, failure
        free = os.statvfs(cache).f_bavail * os.statvfs(cache).f_frsize
        assert free >= 12 * MIB - CHUNK
        sentence = problem_of(node, "cache.free_space_floor")
        assert "mounted" in sentence
        assert "reads of what is not cached fail" in sentence
        warnings = [
            line for line in node.log().splitlines() if "WARNING operations.room" in line and "free_space_floor" in line
        ]
        assert len(warnings) <= 2, "once where background work stops and once where readers are refused"
        # What is cached stays readable, by others and of the file itself.
        assert "hidden_size" in run('cat "$1/config.json"', other)
        assert read(directory, 0, MIB) == ""
        failed = node.manta("prefetch", BIG, code=None, timeout_s=30)
        assert failed.returncode == 1
        assert "cache.free_space_floor" in failed.stderr
        ballast.unlink()
        until_whole(directory)
        nothing_wrong(node)


@pytest.mark.above_fuse
def test_the_limit_is_kept_while_bytes_come_fast(hub: HubProcess, node: Node) -> None:
    """More than fits is read, from two repos, one after the other; the cache's files never take more than the limit and a chunk."""
    node.environment |= {"MANTA_CACHE_SIZE": "66MiB", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    first = node.mount(SHARDED)
    run('cat "$1"/* > /dev/null', first)
    keep = node.mount(MODEL)
    run('cat "$1/config.json"', keep)
    node.manta("umount", str(first))
    directory = node.mount(BIG)
    reading = subprocess.Popen(["sha256sum", str(directory / BIG_FILE)], stdout=subprocess.PIPE, text=True)
    most = 0
    while reading.poll() is None:
        most = max(most, on_disk(node.cache))
        time.sleep(0.01)
    assert reading.communicate()[0].split()[0] == hub.files(BIG).files[BIG_FILE].sha256
    assert most <= 66 * MIB + CHUNK
    names = [name for blob in node.json("cache", "ls")["blobs"] for name in blob["names"]]
    assert any(MODEL in name for name in names)


@pytest.mark.above_fuse
def test_a_mount_that_is_larger_than_the_limit_is_told_so(hub: HubProcess, node: Node) -> None:
    node.environment |= {"MANTA_CACHE_SIZE": "40MiB", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    directory = node.mount(BIG)
    failure = read(directory)
    assert errno_of(failure) == 28, failure
    assert on_disk(node.cache) <= 40 * MIB + CHUNK
    sentence = problem_of(node, "cache.size")
    assert "its limit is 41.9 MB (cache.size), and nothing cached may go" in sentence
    assert read(directory, 0, 8 * MIB) == ""


@pytest.mark.above_fuse
def test_a_disk_that_others_fill_is_a_clear_error_and_heals(hub: HubProcess, node: Node) -> None:
    """Without a floor: to the last byte."""
    node.environment["MANTA_CACHE_FREE_SPACE_FLOOR"] = "0"
    with disk(node, 96 * MIB) as cache:
        directory = node.mount(BIG)
        subprocess.run(["fallocate", "-l", "60M", str(cache / "ballast")], check=True)
        failure = read(directory)
        assert errno_of(failure) == 28, failure
        problem_of(node, "free")
        (cache / "ballast").unlink()
        until_whole(directory)


# Read-only, gone, broken ---------------------------------------------------------------------------------------------


@pytest.mark.above_fuse
def test_a_read_only_cache_is_refused_at_the_start(hub: HubProcess, node: Node) -> None:
    with disk(node, 64 * MIB) as cache:
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        refused = node.manta("mount", BIG, str(node.directory()), code=None)
        assert refused.returncode != 0
        assert "Read-only file system. Remount its filesystem writable" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_a_cache_that_turns_read_only_reads_on_and_goes_on_when_it_is_writable(hub: HubProcess, node: Node) -> None:
    node.environment |= {"MANTA_FETCH_FILL": "false", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    with disk(node, 128 * MIB) as cache:
        directory, other = node.mount(BIG), node.mount(MODEL)
        assert read(directory, 0, 2 * CHUNK) == ""
        run('cat "$1/config.json"', other)
        wait_until(lambda: not node.status()["transfers"])
        # Writers would keep it from turning read-only: the daemon holds its lock file open, so as the kernel does it, by force.
        subprocess.run(["mount", "--bind", str(cache / "blobs"), str(cache / "blobs")], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(cache / "blobs")], check=True)
            assert read(directory, 0, 2 * CHUNK) == ""
            assert "hidden_size" in run('cat "$1/config.json"', other)
            failure = read(directory, 7 * CHUNK)
            assert errno_of(failure) == 5, failure
            sentence = problem_of(node, "Read-only file system")
            assert "Remount its filesystem writable" in sentence
        finally:
            subprocess.run(["umount", "--lazy", str(cache / "blobs")], check=True)
        until_whole(directory)


def test_a_cache_that_is_unmounted_and_comes_back(hub: HubProcess, node: Node) -> None:
    node.environment |= {"MANTA_FETCH_FILL": "false", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    with disk(node, 128 * MIB) as cache:
        directory, other = node.mount(BIG), node.mount(MODEL)
        assert read(directory, 0, 2 * CHUNK) == ""
        holder = (directory / BIG_FILE).open("rb")  # a file that is open reads on
        try:
            subprocess.run(["umount", "--lazy", str(cache)], check=True)
            assert read(directory, 0, 2 * CHUNK) == ""
            assert "Input/output error" in run('cat "$1/model.safetensors" > /dev/null', other, code=1)
            problem_of(node, "removed or unmounted")
            assert list(cache.iterdir()) == [], "nothing is written where it was mounted"
            subprocess.run(["mount", "-o", "loop", str(node.path / "disk.img"), str(cache)], check=True)
            nothing_wrong(node)
            until_whole(directory)
            run('cat "$1/model.safetensors" > /dev/null', other)
        finally:
            holder.close()


def test_a_cache_that_is_deleted_is_made_anew(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    assert read(directory) == ""
    # `rm -rf`, which does not mind that the daemon, which is verifying and filling, makes a file meanwhile.
    run('until rm -rf "$1"; do sleep 0.1; done', node.cache)
    wait_until((node.cache / "version").exists)
    run('cat "$1/config.json"', directory)
    sent = hub.blob_traffic(BIG, BIG_FILE).sent
    until_whole(directory)
    run('dd if="$1/$2" of=/dev/null iflag=direct bs=1M status=none', directory, BIG_FILE)
    assert hub.blob_traffic(BIG, BIG_FILE).sent >= sent
    node.manta("cache", "verify")


def test_a_filesystem_that_breaks_under_the_daemon(hub: HubProcess, node: Node) -> None:
    """It answers EIO to everything. Mounted again it has lost what was not synced, and the next daemon believes nothing of that."""
    node.environment |= {"MANTA_FETCH_FILL": "false", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    with disk(node, 128 * MIB) as cache:
        directory = node.mount(BIG)
        assert read(directory, 0, 3 * CHUNK) == ""
        fd = os.open(cache, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, _SHUTDOWN_NO_FLUSH.to_bytes(4, "little"))
        finally:
            os.close(fd)
        failure = read(directory, 7 * CHUNK)
        assert errno_of(failure) == 5, failure
        problem_of(node, "Input/output error")
        node.unmount_all()
        subprocess.run(["umount", str(cache)], check=True)
        image = node.path / "disk.img"
        subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(cache)], check=True)
        assert read(node.mount(BIG)) == ""


def refuse_new_blocks(image: Path, tmpfs: Path) -> None:
    """What is free in the ext4 of `image` is taken from it: a write there fails when the kernel gets to it, long after the program's."""
    listing = subprocess.run(["dumpe2fs", str(image)], capture_output=True, text=True, check=True).stdout
    block = int(re.search(r"Block size:\s+(\d+)", listing)[1])  # type: ignore[index]
    for ranges in re.findall(r"Free blocks: (.+)", listing):
        for first, _, last in (extent.partition("-") for extent in ranges.split(", ")):
            length = (int(last or first) - int(first) + 1) * block
            subprocess.run(
                ["fallocate", "-p", "-o", str(int(first) * block), "-l", str(length), str(image)], check=True
            )
    used = os.statvfs(tmpfs)
    resize(tmpfs, (used.f_blocks - used.f_bfree) * used.f_frsize)


def resize(tmpfs: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(tmpfs)], check=True)


def test_data_that_the_disk_did_not_take_is_not_read_from_it(hub: HubProcess, node: Node) -> None:
    """The write succeeds, the disk fails later: what was cached and is not on the disk is thrown away, and fetched again."""
    node.environment |= {"MANTA_FETCH_FILL": "false", "MANTA_CACHE_FREE_SPACE_FLOOR": "0"}
    small = node.path / "small"
    small.mkdir()
    run('mount -t tmpfs -o size=400m manta-test "$1"', small)
    try:
        with disk(node, 256 * MIB, on=small) as cache:
            directory = node.mount(BIG)
            assert read(directory, 0, 4096) == ""
            wait_until(lambda: not node.status()["transfers"])
            subprocess.run(["sync", "-f", str(cache)], check=True)
            refuse_new_blocks(small / "disk.img", small)
            assert read(directory, 5 * CHUNK) == ""
            subprocess.run(["sync", "-f", str(cache)], check=False)
            wait_until(lambda: "did not take it" in node.log())
            resize(small, 400 * MIB)
            run("echo 3 > /proc/sys/vm/drop_caches")
            until_whole(directory)
            wait_until(lambda: sealed(node))
            node.manta("cache", "verify", "--full")
    finally:
        run('umount "$1"', small)


# Damage at rest ------------------------------------------------------------------------------------------------------


def blob_path(hub: HubProcess, node: Node, suffix: str) -> Path:
    digest = hub.files(BIG).files[BIG_FILE].sha256
    return node.cache / "blobs" / digest[:2] / f"sha256-{digest}{suffix}"


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def remove(path: Path) -> None:
    path.unlink()


def sealed(node: Node) -> bool:
    return all(blob["sealed"] for blob in node.json("cache", "ls")["blobs"])


DAMAGES: list[Callable[[Path, Path], object]] = [
    lambda data, _: remove(data),
    lambda _, chunk_map: os.truncate(chunk_map, 100),
    lambda _, chunk_map: flip(chunk_map, 20),
    lambda _, chunk_map: flip(chunk_map, 8),  # another version
    lambda _, chunk_map: flip(chunk_map, 130),  # an entry
    lambda _, chunk_map: remove(chunk_map),
    lambda data, _: os.truncate(data, 1000),
    lambda data, _: os.truncate(data, data.stat().st_size + 1),
]


def test_whatever_is_damaged_at_rest_costs_a_refetch(hub: HubProcess, node: Node) -> None:
    digests = 'cd "$1" && sha256sum * && cd "$2" && sha256sum *.*'
    before = run(digests, node.mount(SHARDED), node.mount(MODEL))
    wait_until(lambda: sealed(node))
    node.unmount_all()
    blobs = sorted((node.cache / "blobs").rglob("*.data"))
    assert len(blobs) >= len(DAMAGES)
    for data, damage in zip(blobs, DAMAGES, strict=False):
        damage(data, data.with_suffix(".map"))
    for path in (node.cache / "meta").rglob("*.*"):
        os.truncate(path, path.stat().st_size // 2)
    assert run(digests, node.mount(SHARDED), node.mount(MODEL)) == before
    wait_until(lambda: sealed(node))


def test_verify_repairs_what_is_mounted_and_open(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    assert read(directory) == ""
    wait_until(lambda: sealed(node))
    with (directory / BIG_FILE).open("rb"):
        for at in (5, 20 * MIB, BIG_SIZE - 1):
            flip(blob_path(hub, node, ".data"), at)
        found = node.manta("cache", "verify", "--repair", code=1)
        assert "3 of 8 chunks are damaged: 0, 2, 7" in found.stderr
        assert "3 damaged chunks, 3 of them fetched anew" in found.stderr
        assert read(directory) == ""
        assert "all match the hub's digests" in node.manta("cache", "verify", "--full").stdout
    assert hub.blob_traffic(BIG, BIG_FILE).sent <= BIG_SIZE + 3 * CHUNK
    node.unmount_all()
    # Offline there is nothing to repair with: it is said, and not served.
    flip(blob_path(hub, node, ".data"), 20 * MIB)
    node.environment["MANTA_HUB_OFFLINE"] = "true"
    directory = node.mount(BIG)
    found = node.manta("cache", "verify", "--repair", code=1)
    assert "could not be fetched anew" in found.stderr
    assert "offline" in found.stderr
    assert errno_of(read(directory, 20 * MIB, 21 * MIB)) == 5
    assert read(directory, 0, 16 * MIB) == ""
