"""The sink: bytes at their offsets, progress that never tells too much, the digest whatever the order was, and full disks."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.cache.digests import chunk_digest
from manta.model.extents import Extent, ExtentSet
from manta.worker.failure import OrderFailed
from manta.worker.sink import PROGRESS_BYTES_MIN, PROGRESS_SECONDS_MIN, ChunkSink

SIZE = 1_000_000
DATA = random.Random(1).randbytes(SIZE)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    """Checks each report against the file as it is at that moment."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reports: list[tuple[int, int]] = []
        self.extents = ExtentSet()

    def __call__(self, at: int, upto: int) -> None:
        assert at < upto
        assert os.pread(self.fd, upto - at, at) == DATA[at:upto]
        self.reports.append((at, upto))
        self.extents.add(Extent(at, upto))


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(number, SIZE)
    yield number
    os.close(number)


def test_the_first_bytes_of_every_extent_are_told_at_once(fd: int) -> None:
    told = Told(fd)
    sink = ChunkSink(fd, 0, SIZE, told, Clock())
    for start in (500_000, 0):
        sink.begin(start)
        sink.write(DATA[start : start + 10])
        assert told.reports[-1] == (start, start + 10)


def test_progress_is_thinned_by_size_and_by_time(fd: int) -> None:
    told, clock = Told(fd), Clock()
    sink = ChunkSink(fd, 0, SIZE, told, clock)
    sink.begin(0)
    for at in range(0, 600_000, 10_000):
        sink.write(DATA[at : at + 10_000])  # no time passes
    assert told.reports == [(0, 10_000)]
    clock.now += PROGRESS_SECONDS_MIN
    sink.write(DATA[600_000:600_001])
    assert told.reports[1:] == [(10_000, 600_001)]
    clock.now += PROGRESS_SECONDS_MIN
    sink.write(DATA[600_001 : 600_001 + PROGRESS_BYTES_MIN - 1])
    assert len(told.reports) == 2
    sink.tell()
    assert told.reports[2:] == [(600_001, 600_000 + PROGRESS_BYTES_MIN)]
    sink.tell()
    assert len(told.reports) == 3


@given(st.data())
def test_any_cut_into_extents_and_pieces_ends_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, SIZE - 1))
    end = data.draw(st.integers(start + 1, min(SIZE, start + 300_000)))
    cuts = sorted({start, end, *data.draw(st.lists(st.integers(start, end), max_size=3))})
    extents = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    fd = os.memfd_create("data", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SIZE)
        told, clock = Told(fd), Clock()
        sink = ChunkSink(fd, start, end, told, clock)
        for first, last in extents:
            sink.begin(first)
            at = first
            while at < last:
                step = data.draw(st.integers(1, 200_000))
                sink.write(memoryview(DATA)[at : min(last, at + step)])
                at += step
                clock.now += data.draw(st.sampled_from([0.0, 0.001, 1.0]))
        assert sink.finish() == chunk_digest(DATA[start:end])
        assert told.extents.covers(Extent(start, end))
        assert len(told.extents) == end - start
    finally:
        os.close(fd)


def test_what_an_earlier_order_left_is_digested_too(fd: int) -> None:
    os.pwrite(fd, DATA[:400], 0)
    sink = ChunkSink(fd, 0, 1000, Told(fd))
    sink.begin(400)
    sink.write(DATA[400:1000])
    assert sink.finish() == chunk_digest(DATA[:1000])


def test_a_chunk_that_is_there_already_needs_no_bytes(fd: int) -> None:
    os.pwrite(fd, DATA[:1000], 0)
    assert ChunkSink(fd, 0, 1000, Told(fd)).finish() == chunk_digest(DATA[:1000])


def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        told: list[tuple[int, int]] = []
        sink = ChunkSink(full.fileno(), 0, 10, lambda *report: told.append(report))
        sink.begin(0)
        with pytest.raises(OrderFailed, match="full") as failed:
            sink.write(b"0123456789")
        sink.tell()
    assert failed.value.reason == "no_space"
    assert told == []


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (tmp_path / "file").open("rb") as read_only:
        sink = ChunkSink(read_only.fileno(), 0, 10, lambda *_: None)
        with pytest.raises(OrderFailed, match="disk failed") as failed:
            sink.write(b"0123456789")
    assert failed.value.reason == "cache_broken"


def test_a_file_that_was_cut_is_named(fd: int) -> None:
    os.ftruncate(fd, 500)
    with pytest.raises(OrderFailed) as failed:
        ChunkSink(fd, 0, 1000, lambda *_: None).finish()
    assert failed.value.reason == "cache_broken"


def test_where_no_reader_waits_only_tell_reports_until_one_does(fd: int) -> None:
    told = Told(fd)
    sink = ChunkSink(fd, 0, SIZE, told, Clock(), watched=False)
    sink.begin(0)
    sink.write(DATA[:500_000])
    assert told.reports == []
    sink.tell()
    assert told.reports == [(0, 500_000)]
    sink.watched = True
    sink.write(DATA[500_000:])
    assert told.reports[-1] == (500_000, SIZE)
    assert sink.finish() == chunk_digest(DATA)
