"""Extents (byte ranges) and the chunk grid of a blob, here and only here. Pure arithmetic, all in bytes."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_SIZE = 8 * 1024 * 1024
"""Bytes in a chunk, the unit of presence, transfer and digest.

One ranged request per chunk: at 1 Gbit/s a chunk takes 67 ms, so even one request at a time loses less than half to a
round trip of 50 ms, and eight in flight hide it. A random 4 KiB read costs at most one chunk, and is answered as soon as its own
bytes are there. 100 GiB are 12,800 chunks: a map of 258 KB. Smaller chunks multiply requests and messages (about 0.1 ms of
CPU each); larger ones make random reads drag more. docs/architecture.md has the measurement.
"""


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes from `start` up to, not including, `end`. May be empty, never negative."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"not an extent: {self.start}..{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def clamp(self, size: int) -> Extent:
        """The part of it that lies below `size`."""
        return Extent(min(self.start, size), min(self.end, size))

    def __str__(self) -> str:
        return f"{self.start}..{self.end}"


@dataclass(frozen=True, slots=True)
class ChunkGrid:
    """The chunks of a blob of `size` bytes: chunk N covers bytes N*chunk_size up to (N+1)*chunk_size or the blob's end."""

    size: int
    chunk_size: int = CHUNK_SIZE

    def __len__(self) -> int:
        return -(-self.size // self.chunk_size)

    def extent(self, chunk: int) -> Extent:
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk} of {len(self)}")
        start = chunk * self.chunk_size
        return Extent(start, min(start + self.chunk_size, self.size))

    def chunks(self, extent: Extent) -> range:
        """The chunks that `extent`, cut at the blob's end, touches."""
        cut = extent.clamp(self.size)
        if not len(cut):
            return range(0)
        return range(cut.start // self.chunk_size, (cut.end - 1) // self.chunk_size + 1)


class ExtentSet:
    """Bytes that are there, as extents that neither touch nor overlap, in order. Meant for the few extents of one chunk."""

    def __init__(self) -> None:
        self._extents: list[Extent] = []

    def add(self, extent: Extent) -> None:
        if not len(extent):
            return
        apart = [e for e in self._extents if e.end < extent.start or e.start > extent.end]
        joined = [e for e in self._extents if not (e.end < extent.start or e.start > extent.end)]
        start = min([extent.start, *(e.start for e in joined)])
        end = max([extent.end, *(e.end for e in joined)])
        self._extents = sorted([*apart, Extent(start, end)])

    def covers(self, extent: Extent) -> bool:
        """Whether every byte of `extent` is there; an empty one always is."""
        return not len(extent) or any(e.start <= extent.start and extent.end <= e.end for e in self._extents)

    def gaps(self, extent: Extent) -> list[Extent]:
        """The parts of `extent` that are not there, in order."""
        gaps, at = [], extent.start
        for e in self._extents:
            if e.end <= at:
                continue
            if e.start >= extent.end:
                break
            if e.start > at:
                gaps.append(Extent(at, e.start))
            at = e.end
        if at < extent.end:
            gaps.append(Extent(at, extent.end))
        return gaps

    def __len__(self) -> int:
        """Bytes that are there."""
        return sum(len(e) for e in self._extents)
