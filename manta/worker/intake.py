"""How the bytes of a body come to their sink: how many the kernel gathers first, and when they are told of. Here and only here.

asyncio; used by `manta.worker.origin` and `manta.worker.peer`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from manta.worker.connection import Connection
from manta.worker.sink import PROGRESS_SECONDS_MIN, ChunkSink

TELL_SECONDS = 0.1
"""Bytes in the file are told of after this long however few they are: unseen by a person, and ten wake-ups a second per order."""

UNWATCHED_TICKS = 5
"""Where no reader waits they are told of every half second, for the rates that people see."""

GATHER_BYTES_MAX = 512 * 1024
"""Bytes that the kernel gathers at most before it wakes the worker, see `Intake`: half of what is taken at a time, so that the rest comes
while these are written."""

GATHER_BYTES_MIN = 64 * 1024
"""Fewer are not worth the system calls: the kernel hands up as much at a time by itself."""

GATHER_SECONDS = 0.05
"""Bytes that nobody waits for may lie in the kernel for this long, those that a reader waits for as long as it takes to tell of them."""


class Intake:
    """Passes an order's bytes to its sink, and says how many the kernel gathers before it wakes the worker for them.

    A transfer behind a link shared by eight gets 15 MB/s and a wake-up for each 64 KB of it; without such a limit there are ten times as
    many bytes, and small writes to the cache file cost twice as much as large ones. So SO_RCVLOWAT has the kernel gather what comes
    within GATHER_SECONDS, or PROGRESS_SECONDS_MIN where a reader waits, which hears no sooner of it. Never more than half of what is surely
    still to come: a connection that waits for more than that would wait for ever. (TLS adds to it, and holds at most 16 KiB back.)
    """

    def __init__(self, sink: ChunkSink, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._clock = clock
        self._connection: Connection | None = None
        self._upto = 0  # where the body ends
        self._bytes = 0  # since the last tick
        self._since = 0.0
        self._rate = 0.0  # bytes per second up to the last tick, 0 where there was none or nothing came

    @contextmanager
    def of(self, connection: Connection, upto: int) -> Iterator[None]:
        """For a body that goes up to `upto`. Afterwards its connection is another order's."""
        self._connection, self._upto = connection, upto
        self._bytes, self._since, self._rate = 0, self._clock(), 0.0
        try:
            yield
        finally:
            self._connection = None

    def take(self, piece: bytes | memoryview) -> None:
        """Bytes of the body. Raises OrderFailed where the disk refuses them."""
        self._bytes += len(piece)
        self._sink.write(piece)
        self._gather()

    def watch(self) -> None:
        """A reader waits from now on."""
        self._sink.watched = True
        self._sink.tell()
        self._gather()

    async def keep_moving(self) -> None:
        """A sender that pauses after a burst must not keep a reader from the bytes that came with it, nor bytes in the socket."""
        for tick in itertools.count(1):
            await asyncio.sleep(TELL_SECONDS)
            self.pace()
            if self._sink.watched or tick % UNWATCHED_TICKS == 0:
                self._sink.tell()

    def pace(self) -> None:
        """Looks how fast bytes came since the last time."""
        now = self._clock()
        self._rate = self._bytes / max(now - self._since, TELL_SECONDS)
        self._bytes, self._since = 0, now
        self._gather()

    def _gather(self) -> None:
        if self._connection is None:
            return
        # Before the first tick: since the body began, but that begins with a burst that says little.
        rate = self._rate or self._bytes / max(self._clock() - self._since, TELL_SECONDS / 5)
        lull_s = PROGRESS_SECONDS_MIN if self._sink.watched else GATHER_SECONDS
        count = min(int(rate * lull_s), (self._upto - self._sink.at) // 2, GATHER_BYTES_MAX)
        # A power of two, so that it changes rarely.
        self._connection.gather(1 << (count.bit_length() - 1) if count >= GATHER_BYTES_MIN else 1)
