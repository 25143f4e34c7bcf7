"""The journal: what is read back is what was told, after a kill at any instant, within its bounds, and whatever bytes are in it."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from manta.errors import Corrupt
from manta.fs import journal as journal_module
from manta.fs.journal import (
    Frozen,
    Journal,
    NoJournal,
    Recovered,
    RecoveredFile,
    RecoveredMount,
    RecoveredName,
    Showed,
)

PAGE = mmap.PAGESIZE


@contextmanager
def journal() -> Iterator[Journal]:
    with closing(Journal.create()) as created:
        yield created


def reopened(fd: int) -> Recovered:
    """What the next daemon would read now."""
    again, recovered = Journal.open(os.dup(fd))
    again.close()
    return recovered


def told_everything(j: Journal) -> None:
    j.session(b"\x00negotiated\xff")
    j.numbered(7)
    j.frozen("7-hub", Frozen("models/org/name", None, "1" * 40, False))
    j.frozen("7-hub", Frozen("models/org/name", "v1", "2" * 40, True))
    j.showed("7-hub", Showed("models/org/name", "1" * 40))
    j.showed("7-hub", Showed("models/org/name", "1" * 40))
    j.mounted("7-hub", b'{"token": "hf_x"}')
    j.mounted("6-gone", b"")
    j.unmounted("6-gone")
    j.named(10, 10, 1, b"folder")
    j.named(11, 11, 10, b"\xff name")
    j.named(12, 11, 10, b"\xff name")
    j.named(13, 13, 1, b"")
    j.looked_up(11)
    j.looked_up(11, 5)
    j.forgot(11, 2)
    j.forgot(10, 1)
    j.forgot(13, 100)
    j.forgot(99, 1)
    j.opened(1 << 40, 12, native=True, backing=3, request=77)
    j.opened(5, 11, native=False, backing=0, request=0)
    j.opened(6, 11, native=False, backing=0, request=0)
    j.closed(6)
    j.closed(1234)


EVERYTHING = Recovered(
    session=b"\x00negotiated\xff",
    mounts={
        "7-hub": RecoveredMount(
            b'{"token": "hf_x"}',
            [
                Frozen("models/org/name", None, "1" * 40, False),
                Frozen("models/org/name", "v1", "2" * 40, True),
            ],
            [Showed("models/org/name", "1" * 40)],
        )
    },
    mounts_so_far=7,
    names={
        10: RecoveredName(10, 1, b"folder", 0),
        11: RecoveredName(11, 10, b"\xff name", 5),
        12: RecoveredName(11, 10, b"\xff name", 1),
    },
    files={1 << 40: RecoveredFile(12, True, 3, 77), 5: RecoveredFile(11, False, 0, 0)},
)


def test_what_was_told_is_read_back() -> None:
    with journal() as j:
        assert reopened(j.fd) == Recovered()
        told_everything(j)
        assert reopened(j.fd) == EVERYTHING
        assert j.lost is None


def test_a_journal_that_was_taken_over_goes_on() -> None:
    with journal() as first:
        told_everything(first)
        second, _ = Journal.open(os.dup(first.fd))
        with closing(second):
            second.looked_up(11)
            second.forgot(12, 1)
            second.closed(1 << 40)
            recovered = reopened(second.fd)
            assert recovered.names[11].lookups == 6
            assert list(recovered.names) == [10, 11]
            assert list(recovered.files) == [5]


def test_no_two_daemons_number_handles_alike() -> None:
    with journal() as j:
        assert j.first_handle == 1
        second, _ = Journal.open(os.dup(j.fd))
        with closing(second):
            assert second.first_handle == (1 << 40) + 1
            third, _ = Journal.open(os.dup(j.fd))
            with closing(third):
                assert third.first_handle == (2 << 40) + 1


def test_the_latest_place_of_a_name_counts_and_all_of_its_lookups() -> None:
    with journal() as j:
        j.named(10, 10, 1, b"a")
        j.named(11, 11, 10, b"x")
        j.named(11, 11, 1, b"y")
        j.forgot(10, 1)
        assert reopened(j.fd).names == {11: RecoveredName(11, 1, b"y", 2)}


def test_a_log_whose_record_was_not_committed_ends_before_it() -> None:
    """SIGKILL between the record and the length that counts."""
    with journal() as j:
        told_everything(j)
        before = j._head[4]
        j.named(50, 50, 1, b"late")
        j._head[4] = before
        assert reopened(j.fd) == EVERYTHING


# Room ------------------------------------------------------------------------------------------------------------------


class Keeper:
    """Names with their lookups, as an owner of a journal keeps them."""

    def __init__(self, j: Journal) -> None:
        self.j = j
        self.names: dict[int, int] = {}
        j.rewritten_by(self.rewrite)

    def look_up(self, nodeid: int) -> None:
        if nodeid in self.names:
            self.j.looked_up(nodeid)
        else:
            self.j.named(nodeid, nodeid, 1, b"name %d" % nodeid)
        self.names[nodeid] = self.names.get(nodeid, 0) + 1

    def forget(self, nodeid: int, count: int) -> None:
        self.j.forgot(nodeid, count)
        self.names[nodeid] -= count
        if not self.names[nodeid]:
            del self.names[nodeid]

    def rewrite(self) -> None:
        for nodeid, lookups in self.names.items():
            self.j.named(nodeid, nodeid, 1, b"name %d" % nodeid)
            self.j.looked_up(nodeid, lookups - 1)


def memory(fd: int) -> int:
    """Bytes that the memfd takes."""
    return os.fstat(fd).st_blocks * 512


@pytest.mark.parametrize("seed", range(4))
def test_a_log_is_written_anew_when_most_of_it_is_outdated(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LITTER_BYTES", 2000)
    rng = random.Random(seed)
    with journal() as j:
        j.session(b"negotiated")
        keeper = Keeper(j)
        starts = set()
        for step in range(20_000):
            # Waves of names that come and go.
            grows = rng.random() < (0.7 if step // 4000 % 2 == 0 else 0.4)
            if grows or not keeper.names:
                keeper.look_up(rng.randrange(10, 3000))
            else:
                nodeid = rng.choice(list(keeper.names)) if step % 50 == 0 else next(iter(keeper.names))
                keeper.forget(nodeid, rng.randint(1, keeper.names[nodeid]))
            starts.add(j._start)
            if step % 500 == 0:
                recovered = reopened(j.fd)
                assert {nodeid: name.lookups for nodeid, name in recovered.names.items()} == keeper.names
                assert recovered.session == b"negotiated"
        assert len(starts) > 1  # before the old log and after it
        assert j.lost is None
        j.rewrite()
        assert memory(j.fd) <= 60 * len(keeper.names) + 3 * PAGE
        assert {n: name.lookups for n, name in reopened(j.fd).names.items()} == keeper.names


def test_a_kill_while_the_log_is_written_anew_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with journal() as j:
        told_everything(j)

        class Killed(BaseException):
            pass

        def rewrite() -> None:
            j.named(77, 77, 1, b"half of it")
            assert reopened(j.fd) == EVERYTHING
            raise Killed

        j.rewritten_by(rewrite)
        with pytest.raises(Killed):
            j.rewrite()
        assert reopened(j.fd) == EVERYTHING


def test_a_journal_without_room_says_so_once_and_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "FILE_BYTES_MAX", 32 * PAGE)
    with journal() as j:
        keeper = Keeper(j)
        for nodeid in range(10, 10_000):
            keeper.look_up(nodeid)
        assert j.lost is not None
        assert "will not outlive this daemon" in j.lost
        told_everything(j)
        j.rewrite()
        assert len(caplog.records) == 1
        assert memory(j.fd) <= 32 * PAGE
        with pytest.raises(Corrupt, match="was given up"):
            Journal.open(j.fd)


def test_a_system_that_gives_no_memory_ends_the_journal_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with journal() as j:

        class Refusing:
            def __init__(self, whole: mmap.mmap) -> None:
                self.whole = whole

            def __len__(self) -> int:
                return len(self.whole)

            def resize(self, size: int) -> None:
                raise OSError(12, "Cannot allocate memory")

            def close(self) -> None:
                self.whole.close()

        monkeypatch.setattr(j, "_map", Refusing(j._map))
        j._limit = 0
        j.mounted("1", bytes(100 * PAGE))
        assert j.lost is not None
        assert "Cannot allocate memory" in j.lost


def test_no_journal_takes_all_and_has_nothing() -> None:
    j = NoJournal()
    told_everything(j)
    j.rewritten_by(lambda: None)
    j.rewrite()
    assert (j.lost, j.fd, j.first_handle) == (None, -1, 1)
    j.close()


# Whatever bytes --------------------------------------------------------------------------------------------------------


@contextmanager
def memfd(content: bytes | bytearray) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        yield fd
    finally:
        os.close(fd)


def written() -> bytes:
    with journal() as j:
        told_everything(j)
        return os.pread(j.fd, 1 << 20, 0)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 1])
def test_what_is_no_journal_is_corrupt(size: int) -> None:
    with memfd(bytes(size)) as fd, pytest.raises(Corrupt, match=r"journal that the daemon before left.*Mount again"):
        Journal.open(fd)


def test_what_is_no_memory_is_corrupt() -> None:
    reading, writing = os.pipe()
    with open(reading), open(writing, "w"), pytest.raises(Corrupt):
        Journal.open(reading)
    with pytest.raises(Corrupt, match="cannot be read"):
        Journal.open(reading)


def test_another_version_is_named() -> None:
    data = bytearray(written())
    data[8] = 99
    with memfd(data) as fd, pytest.raises(Corrupt, match="has format 99, this daemon knows 1"):
        Journal.open(fd)


@pytest.mark.parametrize("word", range(9))
@pytest.mark.parametrize("value", [1, 2, 3, 4095, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_words_is_read_or_refused(word: int, value: int) -> None:
    data = bytearray(written())
    data[8 * word : 8 * word + 8] = value.to_bytes(8, "little")
    with memfd(data) as fd:
        try:
            opened, _ = Journal.open(os.dup(fd))
        except Corrupt:
            return
        opened.close()


@pytest.mark.parametrize("seed", range(300))
def test_any_bytes_are_read_or_refused(seed: int) -> None:
    """Flipped bytes, runs of noise, cut and lengthened logs."""
    rng = random.Random(seed)
    data = bytearray(written())
    length = int.from_bytes(data[32:40], "little")
    for _ in range(rng.randint(1, 4)):
        at = PAGE + rng.randrange(length)
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                noise = rng.randbytes(rng.randint(1, 64))
                data[at : at + len(noise)] = noise
            case 2:
                data[32:40] = rng.randrange(length + 1).to_bytes(8, "little")
            case _:
                data[32:40] = (length + rng.randrange(2 * PAGE)).to_bytes(8, "little")
    with memfd(data) as fd:
        try:
            opened, recovered = Journal.open(os.dup(fd))
        except Corrupt:
            return
        with closing(opened):
            opened.looked_up(1)
            assert all(name.lookups >= 0 for name in recovered.names.values())


@pytest.mark.parametrize("seed", range(50))
def test_noise_is_refused(seed: int) -> None:
    data = bytearray(written())
    data[PAGE:] = random.Random(seed).randbytes(len(data) - PAGE)
    data[32:40] = (len(data) - PAGE).to_bytes(8, "little")
    with memfd(data) as fd, pytest.raises(Corrupt):
        Journal.open(fd)
