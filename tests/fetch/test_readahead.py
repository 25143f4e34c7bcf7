"""Readahead: grows with a stream, is gone with a jump, follows a few streams, never names a chunk beyond the end."""

from __future__ import annotations

import random

import pytest

from manta.fetch.readahead import SLACK_BYTES, STREAMS_MAX, WINDOW_CHUNKS_MAX, Readahead
from manta.model.extents import ChunkGrid, Extent

CHUNK = 8 * 1024 * 1024
READ = 1024 * 1024
GRID = ChunkGrid(100 * CHUNK + 5, CHUNK)
FAR = 40 * CHUNK


def observe(readahead: Readahead, at: int, length: int = READ) -> range:
    return readahead.observe(Extent(at, at + length))


def test_a_file_that_is_read_from_its_beginning_is_read_on_at_once() -> None:
    assert observe(Readahead(GRID), 0) == range(2)


def test_a_read_anywhere_else_reads_nothing_ahead() -> None:
    assert observe(Readahead(GRID), FAR) == range(0)


def test_the_second_read_in_order_opens_a_window_of_one_chunk() -> None:
    readahead = Readahead(GRID)
    observe(readahead, FAR)
    assert observe(readahead, FAR + READ) == range(40, 42)


def test_the_window_doubles_with_what_was_read_up_to_its_bound() -> None:
    readahead = Readahead(GRID)
    sizes = [len(observe(readahead, at)) for at in range(0, 50 * CHUNK, READ)]
    windows = [max(sizes[n : n + 8]) for n in range(0, len(sizes), 8)]
    assert windows[0] <= 2 + 1
    assert windows[-1] == WINDOW_CHUNKS_MAX + 1  # and the rest of the chunk that is being read
    assert max(sizes) <= WINDOW_CHUNKS_MAX + 1


def test_random_reads_drag_no_windows() -> None:
    readahead, chance = Readahead(GRID), random.Random(1)
    places = chance.sample(range(1, 99, 2), 40)  # never within the slack of each other
    assert all(not observe(readahead, place * CHUNK, 4096) for place in places)


def test_a_jump_ends_the_window_and_a_return_continues_it() -> None:
    readahead = Readahead(GRID)
    for at in range(0, 4 * CHUNK, READ):
        before = observe(readahead, at)
    assert not observe(readahead, FAR)
    assert len(observe(readahead, 4 * CHUNK)) >= len(before)


def test_requests_of_one_reader_may_come_in_any_order() -> None:
    readahead, chance = Readahead(GRID), random.Random(2)
    observe(readahead, 0)
    for window in range(0, 8 * CHUNK, SLACK_BYTES):
        places = list(range(window, window + SLACK_BYTES, READ))
        chance.shuffle(places)
        assert all(observe(readahead, place) for place in places)


def test_as_many_streams_as_there_are_threads_keep_their_windows() -> None:
    readahead = Readahead(GRID)
    starts = [n * 20 * CHUNK for n in range(STREAMS_MAX)]
    for step in range(20):
        windows = [observe(readahead, start + step * READ) for start in starts]
    assert all(windows)
    assert [window.start for window in windows] == [(start + 20 * READ) // CHUNK for start in starts]


def test_one_stream_more_pushes_out_the_one_that_was_used_longest_ago() -> None:
    readahead = Readahead(GRID)
    starts = [n * 15 * CHUNK for n in range(STREAMS_MAX + 1)]
    for start in starts:
        observe(readahead, start)
    assert not observe(readahead, starts[0] + READ)
    assert observe(readahead, starts[-1] + READ)


@pytest.mark.parametrize("at", [99 * CHUNK, 100 * CHUNK, 100 * CHUNK + 4])
def test_nothing_beyond_the_end_is_named(at: int) -> None:
    readahead = Readahead(GRID)
    for _ in range(10):
        window = readahead.observe(Extent(at, GRID.size))
    assert all(0 <= chunk < len(GRID) for chunk in window)


def test_a_file_smaller_than_a_chunk_reads_nothing_more_after_its_end() -> None:
    grid = ChunkGrid(1000, CHUNK)
    assert Readahead(grid).observe(Extent(0, 1000)) == range(0)
