from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from manta.cache.digests import chunk_digest
from manta.cache.recovery import settle_doubtful
from manta.cache.store import SIZE_MAX, Blob, Store
from manta.errors import Absent, CacheBroken, Corrupt, InUse, Invalid, NoSpace
from manta.model.extents import Extent
from tests.cache.conftest import BOOT, CHUNK, NEXT_BOOT, blob_id, content, fetch

DATA = content(1000)  # 16 chunks, the last of 40 bytes
BLOB = blob_id(DATA)
ALL = Extent(0, len(DATA))
OTHER = content(300, seed=1)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Opener = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path, clock: Clock) -> Iterator[Opener]:
    opened: list[Store] = []

    def open_(boot_id: bytes = BOOT, directory: Path = tmp_path / "cache") -> Store:
        opened.append(Store(directory, chunk_size=CHUNK, boot_id=boot_id, clock=clock))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Opener) -> Store:
    return open_store()


def bytes_of(blob: Blob) -> bytes:
    return os.pread(blob.fd, blob.size + 1, 0)


# A blob's life -------------------------------------------------------------------------------------------------------


def test_a_new_blob_is_a_sparse_file_of_which_everything_is_missing(store: Store) -> None:
    with store.open_blob(BLOB, 1 << 20) as blob:
        status = os.fstat(blob.fd)
        assert status.st_size == 1 << 20
        assert status.st_blocks == 0
    with store.open_blob(blob_id(b"x"), 1000) as blob:
        assert blob.missing(ALL) == list(range(16))
        assert blob.missing(Extent(100, 200)) == [1, 2, 3]
        assert blob.missing(Extent(5000, 6000)) == []
        assert (blob.cached_bytes, blob.prefix_end, blob.complete, blob.sealed) == (0, 0, False, False)
        assert blob.path.stat().st_mode & 0o077 == 0
        assert blob.path.parent.stat().st_mode & 0o077 == 0


def test_chunks_arrive_in_any_order(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 1, 15)
        assert blob.has(15)
        assert not blob.has(0)
        assert (blob.cached_bytes, blob.prefix_end) == (CHUNK + 40, 0)
        fetch(blob, DATA, 0)
        assert blob.prefix_end == 2 * CHUNK
        assert blob.missing(ALL) == list(range(2, 15))
        fetch(blob, DATA, *range(2, 15))
        assert (blob.cached_bytes, blob.prefix_end, blob.complete, blob.sealed) == (1000, 1000, True, False)
        blob.seal()
        blob.seal()
        assert blob.sealed
        assert bytes_of(blob) == DATA


def test_what_was_fetched_is_there_for_the_next_daemon(open_store: Opener) -> None:
    with open_store() as first:
        fetch(first.open_blob(BLOB, 1000), DATA, 0, 3, 15)
    with open_store() as second:
        assert second.cached_bytes == 2 * CHUNK + 40
        blob = second.open_blob(BLOB, 1000)
        assert sorted(set(range(16)) - set(blob.missing(ALL))) == [0, 3, 15]
        fetch(blob, DATA)
        blob.seal()
    with open_store(NEXT_BOOT) as third, third.open_blob(BLOB, 1000) as blob:
        assert blob.sealed
        assert bytes_of(blob) == DATA


def test_an_empty_blob_is_complete_at_once(store: Store, open_store: Opener) -> None:
    empty = blob_id(b"")
    with store.open_blob(empty, 0) as blob:
        assert blob.complete
        assert blob.missing(Extent(0, 10)) == []
        assert (blob.cached_bytes, blob.prefix_end) == (0, 0)
        blob.seal()
    store.close()
    with open_store() as again, again.open_blob(empty, 0) as blob:
        assert blob.sealed


def test_everyone_who_opens_a_blob_shares_it_and_the_last_one_closes_it(store: Store) -> None:
    one = store.open_blob(BLOB, 1000)
    two = store.open_blob(BLOB, 1000)
    assert one is two
    one.close()
    fetch(two, DATA, 0)
    with two.hold():
        two.close()
        assert os.pread(two.fd, 10, 0) == DATA[:10]
    with pytest.raises(ValueError, match="is closed"):
        _ = two.fd
    with pytest.raises(ValueError, match="is closed"):
        two.close()
    with pytest.raises(ValueError, match="is closed"):
        two.hold()


def test_no_descriptor_is_left_open(store: Store) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with store.open_blob(BLOB, 1000) as blob:
            fetch(blob, DATA)
            blob.seal()
    store.remove(BLOB)
    with pytest.raises(Corrupt), store.open_blob(BLOB, 1000) as blob:
        store.open_blob(BLOB, 999)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_size_that_contradicts_the_cache(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 0)
        with pytest.raises(Corrupt, match="999 bytes; the cache has it with 1000"):
            store.open_blob(BLOB, 999)
    with store.open_blob(BLOB, 999) as blob:  # nobody had verified the other size
        assert blob.cached_bytes == store.cached_bytes == 0
        assert os.fstat(blob.fd).st_size == 999
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        blob.seal()
    with pytest.raises(Corrupt, match="manta cache rm"):
        store.open_blob(BLOB, 999)
    info = store.find(BLOB)
    assert info is not None
    assert not info.in_use
    assert info.sealed


# Discarding ----------------------------------------------------------------------------------------------------------


def test_a_discarded_blob_is_fetched_again_under_its_open_descriptor(store: Store, open_store: Opener) -> None:
    wrong = content(1000, seed=1)
    blob = store.open_blob(BLOB, 1000)
    fetch(blob, wrong)
    reader, before = os.dup(blob.fd), blob.generation
    blob.discard("the digest does not match")
    assert blob.generation > before
    assert blob.missing(ALL) == list(range(16))
    assert (blob.cached_bytes, blob.prefix_end, store.cached_bytes) == (0, 0, 0)
    # Who is between has() and its read gets what was there, not zeros that nobody ever sent.
    assert os.pread(reader, 1000, 0) == wrong
    fetch(blob, DATA)
    assert os.pread(reader, 1000, 0) == DATA
    os.close(reader)
    blob.seal()
    store.close()
    with open_store(NEXT_BOOT) as again, again.open_blob(BLOB, 1000) as blob:
        assert blob.sealed


def test_a_discarded_seal_does_not_come_back(store: Store, open_store: Opener) -> None:
    blob = store.open_blob(BLOB, 1000)
    fetch(blob, DATA)
    blob.seal()
    blob.discard("a bit rotted")
    assert not blob.sealed
    info = store.find(BLOB)
    assert info is not None
    assert (info.sealed, info.cached) == (False, 0)
    fetch(blob, DATA)
    store.close()
    with open_store(NEXT_BOOT) as again, again.open_blob(BLOB, 1000) as blob:
        assert not blob.sealed
        assert len(blob.doubtful) == 16


def test_a_seal_of_what_was_discarded_meanwhile_is_refused(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        before = blob.generation
        blob.clear(3)
        fetch(blob, DATA, 3)
        with pytest.raises(Corrupt, match="lost a chunk"):
            blob.seal(before)
        blob.seal()
        assert blob.sealed


def test_an_incomplete_blob_is_not_sealed(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, *range(15))
        with pytest.raises(Corrupt):
            blob.seal()
        assert not blob.sealed


# What the store knows ------------------------------------------------------------------------------------------------


def test_listing_and_totals_follow_open_and_closed_blobs(store: Store, clock: Clock, open_store: Opener) -> None:
    other = blob_id(b"other")
    assert store.listing() == []
    assert store.find(BLOB) is None
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 0, 15)
        clock.now = 2000.0
        with store.open_blob(other, 100):
            pass
        infos = {i.id: (i.size, i.cached, i.sealed, i.last_used, i.in_use) for i in store.listing()}
        assert infos == {BLOB: (1000, 104, False, 1000.0, True), other: (100, 0, False, 2000.0, False)}
        assert store.cached_bytes == 104
        fetch(blob, DATA)
        blob.seal()
        clock.now = 3000.0
    expected = {BLOB: (1000, 1000, True, 3000.0, False), other: (100, 0, False, 2000.0, False)}
    assert {i.id: (i.size, i.cached, i.sealed, i.last_used, i.in_use) for i in store.listing()} == expected
    store.close()
    again = open_store()
    assert {i.id: (i.size, i.cached, i.sealed, i.last_used, i.in_use) for i in again.listing()} == expected
    assert again.cached_bytes == 1000


def test_removing(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        with pytest.raises(InUse, match="is open"):
            store.remove(BLOB)
    assert store.remove(BLOB) == 1000
    assert store.cached_bytes == 0
    assert store.find(BLOB) is None
    assert [p for p in store.layout.blobs.rglob("*") if p.is_file()] == []
    with pytest.raises(Absent):
        store.remove(BLOB)
    with store.open_blob(BLOB, 1000) as blob:
        assert blob.cached_bytes == 0


def test_free_space_is_that_of_the_disk(small_disk: Path, open_store: Opener) -> None:
    free, size = open_store(directory=small_disk / "cache").disk_space()
    assert 0 < free < size == 1 << 20


def test_threads_may_verify_seal_and_remove_beside_the_trio_thread(store: Store) -> None:
    """Totals stay exact while several threads change several blobs, one of them shared."""
    datas = [content(1000, seed) for seed in range(1, 5)]
    failures: list[BaseException] = []
    shared = store.open_blob(BLOB, 1000)

    def work(data: bytes) -> None:
        try:
            for turn in range(10):
                with store.open_blob(blob_id(data), 1000) as blob:
                    fetch(blob, data)
                    fetch(shared, DATA, turn)
                    shared.clear((turn + 3) % 10)
                    blob.seal()
                if turn < 9:
                    store.remove(blob_id(data))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(data,)) for data in datas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.cached_bytes == 4000 + shared.cached_bytes == sum(i.cached for i in store.listing())
    shared.close()


class BlobsLife(RuleBasedStateMachine):
    """A blob against a set of chunks, through closes, killed daemons and host crashes."""

    directory: Path

    @initialize()
    def start(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.boot = 1
        self.present: set[int] = set()
        self.sealed = False
        self.open()

    def open(self) -> None:
        self.store = Store(self.directory, chunk_size=CHUNK, boot_id=self.boot.to_bytes(16, "big"))
        self.blob = self.store.open_blob(BLOB, 1000)

    @rule(chunk=st.integers(0, 15))
    def fetch(self, chunk: int) -> None:
        fetch(self.blob, DATA, chunk)
        self.present.add(chunk)

    @rule()
    def fetch_everything(self) -> None:
        fetch(self.blob, DATA)
        self.present = set(range(16))

    @rule(chunk=st.integers(0, 15))
    def clear(self, chunk: int) -> None:
        self.blob.clear(chunk)
        self.present.discard(chunk)
        self.sealed = False

    @rule()
    def discard(self) -> None:
        self.blob.discard("test")
        self.present = set()
        self.sealed = False

    @precondition(lambda self: len(self.present) == 16)
    @rule()
    def seal(self) -> None:
        self.blob.seal()
        self.sealed = True

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.open()

    @rule(lost=st.sets(st.integers(0, 15)))
    def host_crash(self, lost: set[int]) -> None:
        if not self.sealed:
            for chunk in lost:
                os.pwrite(self.blob.fd, bytes(5), chunk * CHUNK)
            self.present -= lost
        self.store.close()
        self.boot += 1
        self.open()
        settle_doubtful(self.blob)

    @invariant()
    def it_is_what_was_recorded(self) -> None:
        if not hasattr(self, "blob"):
            return
        assert {c for c in range(16) if self.blob.has(c)} == self.present
        assert self.blob.sealed == self.sealed
        assert self.blob.complete == (len(self.present) == 16)
        assert (
            self.blob.cached_bytes
            == self.store.cached_bytes
            == sum(len(self.blob.grid.extent(c)) for c in self.present)
        )
        assert self.blob.missing(Extent(0, self.blob.prefix_end)) == []
        for chunk in self.present:
            extent = self.blob.grid.extent(chunk)
            assert os.pread(self.blob.fd, len(extent), extent.start) == DATA[extent.start : extent.end]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def test_a_blob_through_restarts_and_crashes(tmp_path: Path) -> None:
    class Here(BlobsLife):
        directory = tmp_path / "cache"

    run = Here.TestCase
    run.settings = settings(deadline=None, derandomize=True, max_examples=40, stateful_step_count=20)
    run().runTest()


# One daemon, and disks that fail -------------------------------------------------------------------------------------

DAEMON = """
import sys
from pathlib import Path
from manta.cache.store import Store
from tests.cache.conftest import CHUNK, fetch
from tests.cache.test_store import BLOB, DATA
blob = Store(Path(sys.argv[1]), chunk_size=CHUNK).open_blob(BLOB, 1000)
fetch(blob, DATA, 0, 1)
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_daemons_on_one_directory_are_refused_and_the_next_goes_on_after_a_kill(
    tmp_path: Path, open_store: Opener
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, tmp_path / "cache"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        with pytest.raises(InUse, match=f"pid {daemon.pid}"):
            open_store()
        daemon.kill()
    with Store(tmp_path / "cache", chunk_size=CHUNK) as store, store.open_blob(BLOB, 1000) as blob:
        assert blob.prefix_end == 2 * CHUNK
        assert os.pread(blob.fd, 2 * CHUNK, 0) == DATA[: 2 * CHUNK]


def test_the_same_directory_twice_in_one_process(store: Store, open_store: Opener) -> None:
    with pytest.raises(InUse, match=f"pid {os.getpid()}"):
        open_store()
    store.close()
    store.close()
    open_store()


def test_a_refused_directory_stays_usable_for_others(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Invalid):
        Store(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_full_disk_is_no_space_and_what_is_cached_stays_usable(small_disk: Path, open_store: Opener) -> None:
    store = open_store(directory=small_disk / "cache")
    blob = store.open_blob(BLOB, 1000)
    fetch(blob, DATA, *range(8))
    with (small_disk / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space"):
        ballast.write(bytes(2 << 20))
    other = blob_id(b"other")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(NoSpace, match="manta cache gc"):
        store.open_blob(other, 100 << 20)
    assert set(os.listdir("/proc/self/fd")) == before
    assert store.find(other) is None
    assert list(store.layout.blobs.rglob(f"{other}*")) == []
    assert blob.prefix_end == 8 * CHUNK
    assert os.pread(blob.fd, 8 * CHUNK, 0) == DATA[: 8 * CHUNK]
    (small_disk / "ballast").unlink()
    fetch(blob, DATA)
    blob.seal()
    store.open_blob(other, 100 << 10).close()


def test_a_disk_that_turns_read_only_still_reads_and_goes_on_when_it_is_well(
    small_disk: Path, open_store: Opener
) -> None:
    store = open_store(directory=small_disk / "cache")
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 0, 1)
    blobs = store.layout.blobs
    subprocess.run(["mount", "--bind", blobs, blobs], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", blobs], check=True)
        with pytest.raises(CacheBroken, match="Read-only file system"):
            store.open_blob(blob_id(b"other"), 1000)
        with pytest.raises(CacheBroken, match="Read-only file system"):
            store.remove(BLOB)
        blob = store.open_blob(BLOB, 1000)
        assert os.pread(blob.fd, 2 * CHUNK, 0) == DATA[: 2 * CHUNK]
        with pytest.raises(CacheBroken, match="Remount its filesystem writable"), blob.descriptor(writing=True):
            pass
        with pytest.raises(CacheBroken):
            blob.record(2, b"0" * 16)
        assert not blob.has(2)
        subprocess.run(["mount", "-o", "remount,bind,rw", blobs], check=True)
        number = blob.fd
        with blob.descriptor(writing=True) as fd:
            assert fd == blob.fd == number
        fetch(blob, DATA)
        blob.seal()
        blob.close()
    finally:
        subprocess.run(["umount", "--lazy", blobs], check=True)


def test_a_read_only_directory_is_refused_at_the_start(small_disk: Path, open_store: Opener) -> None:
    open_store(directory=small_disk / "cache").close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CacheBroken, match=r"Read-only file system\. Remount its filesystem writable") as refused:
        open_store(directory=small_disk / "cache")
    assert str(small_disk / "cache") in refused.value.message


# A directory that goes and comes back -----------------------------------------------------------------------------------


def test_a_removed_directory_is_made_anew_and_what_was_open_reads_on(open_store: Opener) -> None:
    store = open_store()
    reading, sealed = store.open_blob(BLOB, 1000), store.open_blob(blob_id(OTHER), len(OTHER))
    fetch(reading, DATA, 0, 1)
    fetch(sealed, OTHER)
    sealed.seal()
    assert not store.look_after()
    shutil.rmtree(store.directory)
    assert store.look_after()
    assert (store.listing(), store.cached_bytes) == ([], 0)
    assert bytes_of(sealed) == OTHER
    again = store.open_blob(BLOB, 1000)
    assert again is not reading
    assert again.missing(ALL) == list(range(16))
    # What the old one still gets goes into files without a name, and never into the new one's.
    fetch(reading, DATA, 2)
    sealed.clear(0)
    assert again.missing(ALL) == list(range(16))
    assert store.cached_bytes == 0
    reading.close()
    fetch(again, DATA)
    again.seal()
    again.close()
    sealed.close()
    assert [(info.id, info.in_use) for info in store.listing()] == [(BLOB, False)]
    with pytest.raises(InUse):
        open_store()
    store.close()
    with open_store() as after, after.open_blob(BLOB, 1000) as blob:
        assert blob.sealed


def test_an_old_map_never_writes_into_the_new_directory(open_store: Opener) -> None:
    """One that had not been opened for writing would be looked for by its name."""
    store = open_store()
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 0)
    old = store.open_blob(BLOB, 1000)
    shutil.rmtree(store.directory)
    assert store.look_after()
    with store.open_blob(BLOB, 1000) as new:
        with pytest.raises(CacheBroken, match="open it again"):
            fetch(old, DATA, 1)
        assert new.missing(ALL) == list(range(16))
    old.close()


def test_nothing_is_written_where_the_cache_was_mounted(small_disk: Path, open_store: Opener) -> None:
    store = open_store(directory=small_disk)
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        elsewhere = small_disk.with_name("elsewhere")
        elsewhere.mkdir()
        subprocess.run(["mount", "--move", small_disk, elsewhere], check=True)
        try:
            with pytest.raises(CacheBroken, match="removed or unmounted"):
                store.look_after()
            with pytest.raises(CacheBroken):
                store.open_blob(blob_id(OTHER), 1000)
            assert list(small_disk.iterdir()) == []
            assert bytes_of(blob) == DATA
        finally:
            subprocess.run(["mount", "--move", elsewhere, small_disk], check=True)
        assert not store.look_after()
        blob.seal()


def test_a_vanished_directory_is_a_broken_cache_and_open_blobs_still_read(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        shutil.rmtree(store.directory)
        with pytest.raises(CacheBroken, match="removed or unmounted"):
            store.open_blob(blob_id(b"other"), 1000)
        with pytest.raises(CacheBroken):
            store.disk_space()
        assert bytes_of(blob) == DATA


def test_a_vanished_data_file_is_an_empty_blob(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        blob.seal()
    blob.path.unlink()
    with store.open_blob(BLOB, 1000) as blob:
        assert blob.missing(ALL) == list(range(16))
        assert not blob.sealed
        fetch(blob, DATA)
        assert bytes_of(blob) == DATA
    assert store.cached_bytes == 1000


def test_data_that_the_disk_did_not_take_is_never_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fdatasync the kernel holds pages for clean that the disk never got."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(CacheBroken, match="Sealing a blob"):
            blob.seal()
        assert not blob.sealed
        assert blob.missing(ALL) == list(range(16))
        monkeypatch.undo()
        fetch(blob, DATA)
        blob.seal()


def test_work_that_outlives_the_store_changes_nothing(store: Store, open_store: Opener) -> None:
    blob = store.open_blob(BLOB, 1000)
    fetch(blob, DATA)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        blob.seal()
    with pytest.raises(ValueError, match="closed"):
        blob.clear(0)
    with pytest.raises(ValueError, match="closed"):
        blob.discard("late")
    with pytest.raises(ValueError, match="closed"):
        blob.record(0, b"late" * 4)
    with open_store() as again, again.open_blob(BLOB, 1000) as blob:
        assert blob.complete
        assert not blob.sealed


@pytest.mark.parametrize("size", [-1, SIZE_MAX + 1])
def test_an_impossible_size_is_refused_and_leaves_nothing(store: Store, size: int) -> None:
    with pytest.raises(Corrupt, match="no file can have that"):
        store.open_blob(BLOB, size)
    assert store.listing() == []
    assert [p for p in store.layout.blobs.rglob("*") if p.is_file()] == []


def test_descriptors_run_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(CacheBroken, match="limit on open files"):
        store.open_blob(BLOB, 1000)
    monkeypatch.undo()
    store.open_blob(BLOB, 1000).close()


def test_a_worthless_map_empties_the_blob_and_frees_its_space(store: Store, open_store: Opener) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
    data = bytearray(store.layout.map(BLOB).read_bytes())
    data[40] ^= 4
    store.layout.map(BLOB).write_bytes(data)
    with store.open_blob(BLOB, 1000) as blob:
        assert blob.missing(ALL) == list(range(16))
        assert os.fstat(blob.fd).st_blocks == 0
        assert store.cached_bytes == 0


def test_a_chunk_recorded_with_another_digest_under_a_seal_is_corrupt(store: Store) -> None:
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA)
        blob.seal()
        blob.record(0, chunk_digest(DATA[:CHUNK]))
        with pytest.raises(Corrupt):
            blob.record(0, chunk_digest(b"other bytes"))


def test_looking_after_a_blob_is_not_using_it(store: Store, clock: Clock) -> None:
    blob = store.open_blob(blob_id(b"x" * 10), 10)
    blob.close()
    info = store.find(blob.id)
    assert info is not None
    clock.now += 100
    store.open_blob(blob.id, 10, use=False).close()
    assert store.find(blob.id) == info
    looked_after = store.open_blob(blob.id, 10, use=False)
    store.open_blob(blob.id, 10).close()
    looked_after.close()
    used = store.find(blob.id)
    assert used is not None
    assert used.last_used == clock.now


# What the disk does not take ---------------------------------------------------------------------------------------------


def test_what_was_closed_unsealed_is_synced_soon_and_thrown_away_where_the_disk_did_not_take_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in (DATA, OTHER):
        with store.open_blob(blob_id(data), len(data)) as blob:
            fetch(blob, data, 0)
    honest, doomed = os.fdatasync, os.stat(store.layout.data(BLOB)).st_ino

    def sync(fd: int) -> None:
        if os.fstat(fd).st_ino == doomed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        honest(fd)

    monkeypatch.setattr(os, "fdatasync", sync)
    before = len(os.listdir("/proc/self/fd"))
    store.look_after()
    assert len(os.listdir("/proc/self/fd")) == before - 2
    with store.open_blob(BLOB, 1000) as blob, store.open_blob(blob_id(OTHER), len(OTHER)) as other:
        assert not blob.has(0)
        assert other.has(0)
        assert os.fstat(blob.fd).st_ino != doomed, "a new file: the disk may have spoiled the old one"
        fetch(blob, DATA)
        blob.seal()


def test_a_removed_blob_frees_its_space_at_once(store: Store) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with store.open_blob(BLOB, 1000) as blob:
        fetch(blob, DATA, 0)
    store.remove(BLOB)
    assert len(os.listdir("/proc/self/fd")) == before
