"""How far to read ahead of one open file, from the reads it gets. Pure: no clock, no I/O. Used by `manta.fs.handles`.

A handle may serve several readers at once (threads on one descriptor, four tensors of one file), and the kernel splits and reorders
what one reader asks for. So up to STREAMS_MAX positions are followed; a read that continues none of them starts a new one and reads
nothing ahead: random reads drag no windows.
"""

from __future__ import annotations

from dataclasses import dataclass

from manta.model.extents import ChunkGrid, Extent

STREAMS_MAX = 4
"""Readers followed per handle; safetensors loaders use one to four threads per file."""

SLACK_BYTES = 4 * 1024 * 1024
"""How far from where a stream stands a read may begin and still continue it: the kernel's own readahead window, whose requests arrive in
any order."""

WINDOW_CHUNKS_MAX = 16
"""128 MiB: what a 10 Gbit/s link carries in 0.1 s, one round trip to a far hub and the time to notice."""


@dataclass(slots=True)
class _Stream:
    at: int  # where the next read is expected
    window: int = 0  # chunks to have under way beyond `at`; 0 until the stream has proved itself
    base: int = 0  # `at` when the window was last doubled


class Readahead:
    """The readahead state of one open file."""

    def __init__(self, grid: ChunkGrid) -> None:
        self._grid = grid
        self._streams: list[_Stream] = []  # the latest used last

    def observe(self, read: Extent) -> range:
        """Takes one read into account; returns the chunks to fetch beyond it, nearest first.

        The window starts at one chunk with the second read in order, doubles each time a window has been read, up to WINDOW_CHUNKS_MAX,
        and is gone with the first read elsewhere (which starts its own stream).
        """
        stream = next((s for s in reversed(self._streams) if abs(read.start - s.at) <= SLACK_BYTES), None)
        if stream is None:
            stream = _Stream(read.end, 0, read.end)
            if read.start == 0:
                stream.window = 1  # a file that is read from its first byte is nearly always read on
        else:
            self._streams.remove(stream)
            grown = stream.window * self._grid.chunk_size
            if stream.window == 0:
                stream.window, stream.base = 1, read.end
            elif read.end - stream.base >= grown:
                stream.window, stream.base = min(stream.window * 2, WINDOW_CHUNKS_MAX), read.end
            stream.at = max(stream.at, read.end)
        self._streams.append(stream)
        del self._streams[:-STREAMS_MAX]
        if stream.window == 0:
            return range(0)
        beyond = Extent(stream.at, stream.at + stream.window * self._grid.chunk_size)
        return self._grid.chunks(beyond)
