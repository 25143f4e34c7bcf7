from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.model.extents import CHUNK_SIZE, ChunkGrid, Extent

sizes = st.integers(0, 1 << 50)
grids = st.builds(ChunkGrid, sizes, st.integers(1, 1 << 30))


@st.composite
def extents(draw: st.DrawFn) -> Extent:
    start = draw(sizes)
    return Extent(start, start + draw(sizes))


@pytest.mark.parametrize(("start", "end"), [(-1, 0), (2, 1), (-2, -1)])
def test_an_extent_is_never_negative(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not an extent"):
        Extent(start, end)


@settings(deadline=None, derandomize=True)
@given(extents(), sizes)
def test_clamp_keeps_what_lies_below_the_size(extent: Extent, size: int) -> None:
    cut = extent.clamp(size)
    assert cut.end <= size
    assert len(cut) == max(0, min(extent.end, size) - extent.start)


def test_extents_read_like_a_range() -> None:
    assert str(Extent(3, 9)) == "3..9"
    assert len(Extent(3, 9)) == 6


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 5000), st.integers(1, 700))
def test_the_chunks_of_a_blob_tile_it(size: int, chunk_size: int) -> None:
    grid = ChunkGrid(size, chunk_size)
    at = 0
    for chunk in range(len(grid)):
        extent = grid.extent(chunk)
        assert extent.start == at
        assert 0 < len(extent) <= chunk_size
        at = extent.end
    assert at == size


@settings(deadline=None, derandomize=True)
@given(grids, extents())
def test_chunks_of_an_extent_are_those_that_share_a_byte_with_it(grid: ChunkGrid, extent: Extent) -> None:
    chunks = grid.chunks(extent)
    cut = extent.clamp(grid.size)
    if not len(cut):
        assert len(chunks) == 0
        return
    assert grid.extent(chunks[0]).start <= cut.start < grid.extent(chunks[0]).end
    assert grid.extent(chunks[-1]).start < cut.end <= grid.extent(chunks[-1]).end


@pytest.mark.parametrize("chunk", [-1, 2, 3])
def test_a_chunk_beyond_the_end_is_an_error(chunk: int) -> None:
    with pytest.raises(IndexError):
        ChunkGrid(20, 10).extent(chunk)


def test_an_empty_blob_has_no_chunks() -> None:
    assert len(ChunkGrid(0)) == 0
    assert ChunkGrid(0).chunks(Extent(0, 10)) == range(0)


def test_the_chunk_size_is_what_the_design_says() -> None:
    assert CHUNK_SIZE == 8 * 1024 * 1024
    assert len(ChunkGrid(100 * 1024**3)) == 12_800
