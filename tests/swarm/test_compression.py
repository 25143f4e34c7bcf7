"""What is sent packed, and that who unpacks is never made to hold more than was asked for."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from collections.abc import Callable

import lz4.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.errors import Corrupt
from manta.swarm.compression import LENGTH_MIN, SAMPLE_BYTES, UNPACKED_BYTES, Unpacker, pack, places, worth

LENGTH = 512 * 1024
TEXT = "".join(f'"token {n % 977}": {n},\n' for n in range(60_000)).encode()[:LENGTH]


def sample(data: bytes) -> bytes:
    return b"".join(data[start:end] for start, end in places(len(data)))


def normal(count: int, scale: float = 0.02) -> list[float]:
    source = random.Random(7)
    return [source.gauss(0, scale) for _ in range(count)]


def fp32() -> bytes:
    return struct.pack(f"<{LENGTH // 4}f", *normal(LENGTH // 4))


def bf16() -> bytes:
    raw = struct.pack(f"<{LENGTH // 2}f", *normal(LENGTH // 2))
    return b"".join(raw[at + 2 : at + 4] for at in range(0, len(raw), 4))


def fp16() -> bytes:
    return struct.pack(f"<{LENGTH // 2}e", *normal(LENGTH // 2))


def int8() -> bytes:
    return bytes(max(-128, min(127, round(x))) & 255 for x in normal(LENGTH, 32))


def int4() -> bytes:
    nibbles = [max(0, min(15, round(x) + 8)) for x in normal(2 * LENGTH, 2.5)]
    return bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))


@pytest.mark.parametrize("weights", [fp32, bf16, fp16, int8, int4])
def test_weights_are_sent_as_they_are(weights: Callable[[], bytes]) -> None:
    assert not worth(sample(weights()))


@pytest.mark.parametrize("data", [TEXT, bytes(LENGTH)])
def test_text_and_zeros_are_packed(data: bytes) -> None:
    assert worth(sample(data))
    assert len(pack(data)) < len(data) / 2


def test_weights_with_a_text_in_front_are_weights() -> None:
    """A safetensors file begins with JSON."""
    assert not worth(sample(TEXT[:20_000] + fp32()[20_000:]))


def test_what_is_small_is_not_looked_at() -> None:
    assert places(LENGTH_MIN - 1) == []
    assert not worth(b"")


@given(st.integers(LENGTH_MIN, 8 * 1024 * 1024))
def test_the_places_are_apart_and_within_the_chunk(length: int) -> None:
    found = places(length)
    assert found[0][0] == 0
    assert length - 4 < found[-1][1] <= length
    assert all(end - start == SAMPLE_BYTES for start, end in found)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(found))


# Unpacking -----------------------------------------------------------------------------------------------------------


def unpacked(frame: bytes, length: int, step: int = 1 << 30) -> bytes:
    unpacker, came = Unpacker(length), bytearray()
    for at in range(0, len(frame), step):
        for piece in unpacker.unpack(frame[at : at + step]):
            assert len(piece) <= UNPACKED_BYTES
            came += piece
            assert len(came) <= length
    unpacker.finish()
    return bytes(came)


@given(
    st.binary(max_size=2000).map(lambda seed: (seed or b"\0") * 50),
    st.integers(1, 70_000),
    st.sampled_from([lz4.frame.BLOCKSIZE_MAX64KB, lz4.frame.BLOCKSIZE_MAX4MB]),
    st.booleans(),
)
def test_it_is_unpacked_as_it_was_however_it_is_cut(data: bytes, step: int, block: int, linked: bool) -> None:
    assert unpacked(pack(data), len(data), step) == data
    frame = lz4.frame.compress(data, block_size=block, block_linked=linked, content_checksum=True)
    assert unpacked(frame, len(data), step) == data


def test_more_than_is_unpacked_at_a_time_comes_whole() -> None:
    data = TEXT * 7 + bytes(3 * UNPACKED_BYTES)
    assert unpacked(pack(data), len(data)) == data


@pytest.mark.parametrize("step", [1 << 30, 1000])
def test_a_bomb_is_refused_and_nothing_of_it_beyond_the_length_is_given_out(step: int) -> None:
    with pytest.raises(Corrupt, match="more bytes than were asked for"):
        unpacked(pack(bytes(64 * 1024 * 1024)), LENGTH, step)


@pytest.mark.parametrize("over", [1, UNPACKED_BYTES])
def test_a_byte_too_many_is_refused(over: int) -> None:
    with pytest.raises(Corrupt):
        unpacked(pack(bytes(LENGTH + over)), LENGTH)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"no frame at all",
        pack(TEXT)[:-1],
        pack(TEXT)[:1000],
        pack(TEXT) + b"x",
        pack(TEXT) + pack(TEXT),
        pack(TEXT[:-1]),
        pack(b""),
    ],
    ids=["nothing", "garbage", "no end", "cut", "trailing", "two", "a byte less", "empty"],
)
@pytest.mark.parametrize("step", [1 << 30, 999])
def test_what_is_not_the_one_frame_is_refused(frame: bytes, step: int) -> None:
    with pytest.raises(Corrupt):
        unpacked(frame, len(TEXT), step)


@given(st.data())
def test_a_damaged_frame_is_refused_or_gives_no_more_than_its_length(data: st.DataObject) -> None:
    frame = bytearray(pack(TEXT[:50_000]))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Corrupt):
        assert len(unpacked(bytes(frame), 50_000)) == 50_000
