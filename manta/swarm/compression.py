"""When a chunk is sent compressed, and how it is packed and unpacked: LZ4 frames, here and only here. Pure.

A chunk waits until it is packed before it is sent, so it is there sooner only where ratio < 1 - R / P, with R the rate that the transfer
would have and P that of packing. Text is packed at 0.5 GB/s and to a half: it pays up to 250 MB/s for one transfer, which is a link of
1 Gbit/s alone, or of 10 Gbit/s shared by five. It never pays in CPU time, which is 3 CPU-s/GB for text instead of 1. The mantissas of
weights are noise to LZ4, whatever their type: 1.000. So a few places of the chunk are packed, which tells both apart.
docs/performance.md has the figures. Used by the peer process, which samples and packs, and by workers, which unpack.
"""

from __future__ import annotations

from collections.abc import Iterator

import lz4.frame

from manta.errors import Corrupt

RATIO_MAX = 0.6
"""Bytes packed per byte, of the sample. Text has 0.50, int64 ids 0.51, tokenizers 0.31; above are fp32 that were bf16 (0.69, 3 CPU-s/GB, no
faster at 1 Gbit/s), a quarter of zeros among weights (0.76), and weights."""

SAMPLE_PLACES = 4
SAMPLE_BYTES = 16 * 1024
"""At each place. All together cost 0.001 CPU-s/GB for weights and 0.01 for text."""

LENGTH_MIN = 128 * 1024
"""Less is sent in the time in which it would be packed and unpacked: a round trip counts, not bytes."""

UNPACKED_BYTES = 1024 * 1024
"""Bytes unpacked at a time, and the blocks that are packed by themselves: what a sender may make the other side hold is four times that,
the format's largest block."""


def places(length: int) -> list[tuple[int, int]]:
    """Which bytes (from, to) of a chunk of `length` bytes to sample: its begin and end, and between. None where it is not worth a look."""
    if length < LENGTH_MIN:
        return []
    apart = (length - SAMPLE_BYTES) // (SAMPLE_PLACES - 1)
    return [(at, at + SAMPLE_BYTES) for at in range(0, SAMPLE_PLACES * apart, apart)]


def worth(sample: bytes) -> bool:
    """Whether the chunk that `sample` (its `places`, one after the other) is from should be packed. False for an empty one."""
    return bool(sample) and len(lz4.frame.compress(sample)) < RATIO_MAX * len(sample)


def pack(data: bytes | memoryview) -> bytes:
    """SLOW (17 ms for 8 MiB of text): one frame. No checksum is in it: a chunk has its digest."""
    packed: bytes = lz4.frame.compress(data, block_size=lz4.frame.BLOCKSIZE_MAX1MB, block_linked=False)
    return packed


class Unpacker:
    """One frame that comes piece by piece, of `length` bytes when it is unpacked. Not a byte more is given out, whatever comes."""

    def __init__(self, length: int) -> None:
        self._left = length
        self._frame = lz4.frame.LZ4FrameDecompressor()

    def unpack(self, piece: bytes | memoryview) -> Iterator[bytes]:
        """What `piece` brings, at most UNPACKED_BYTES at a time. Raises Corrupt for what is no frame, goes on behind it or holds more."""
        if self._frame.eof:
            raise Corrupt("more follows the LZ4 frame")
        while True:
            # One more than may come: who sends too much is found when it is there, not when it was all unpacked.
            most = min(UNPACKED_BYTES, self._left + 1)
            try:
                data: bytes = self._frame.decompress(piece, most)
            except RuntimeError:
                raise Corrupt("it is no LZ4 frame") from None
            piece = b""
            self._left -= len(data)
            if self._left < 0:
                raise Corrupt("it unpacks to more bytes than were asked for")
            if data:
                yield data
            if self._frame.eof:
                if self._frame.unused_data:
                    raise Corrupt("more follows the LZ4 frame")
                return
            # The library may hold bytes that had no room, also when it wants more.
            if self._frame.needs_input and len(data) < most:
                return

    def finish(self) -> None:
        """All has come. Raises Corrupt where that is less than the whole."""
        if not self._frame.eof or self._left:
            raise Corrupt("the LZ4 frame is cut short")
