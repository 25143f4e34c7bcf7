"""How much the kernel gathers: what comes within a moment, and never more than is still to come."""

from __future__ import annotations

from typing import Any

from manta.worker.intake import Intake
from manta.worker.sink import ChunkSink


class Gathered:
    """A connection that only knows what the kernel was told to gather last."""

    count = 1

    def gather(self, count: int) -> None:
        self.count = count


def test_more_is_gathered_the_faster_it_comes_and_less_where_a_reader_waits(cache_fd: int, data: bytes) -> None:
    now = 0.0
    connection: Any = Gathered()
    size, piece = 2_000_000, memoryview(data)[:100_000]
    intake = Intake(ChunkSink(cache_fd, 0, size, lambda *_: None, watched=False), lambda: now)
    with intake.of(connection, size):
        counts = []
        for _ in range(4):
            intake.take(piece)
            counts.append(connection.count)
            now += 0.001
        # As much as comes in 50 ms. Of the first tick no more than a fifth is believed: 5, 10 and 20 MB/s.
        assert counts == [128 * 1024, 256 * 1024, 512 * 1024, 512 * 1024]
        now = 0.1
        intake.pace()
        assert connection.count == 128 * 1024  # 4 MB/s in the end
        intake.watch()
        assert connection.count == 1  # 4 ms of that are not worth it


def test_no_more_is_gathered_than_is_still_to_come_and_nothing_for_another_order(cache_fd: int, data: bytes) -> None:
    connection: Any = Gathered()
    size, piece = 1_000_000, memoryview(data)[:100_000]
    sink = ChunkSink(cache_fd, 0, size, lambda *_: None, watched=False)
    intake = Intake(sink, lambda: 0.0)
    with intake.of(connection, size):
        for _ in range(10):
            intake.take(piece)
            assert connection.count == 1 or connection.count <= (size - sink.at) / 2
        assert connection.count == 1
    connection.count = 77
    sink.begin(0)
    intake.pace()
    intake.watch()
    assert connection.count == 77
