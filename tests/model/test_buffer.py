from __future__ import annotations

import ctypes
import mmap

import pytest

from manta.model.buffer import page_aligned


@pytest.mark.parametrize("length", [1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 1 << 20])
def test_begins_at_a_page_and_is_as_long_as_asked(length: int) -> None:
    view = page_aligned(length)
    assert len(view) == length
    assert not view.readonly
    assert ctypes.addressof(ctypes.c_char.from_buffer(view)) % mmap.PAGESIZE == 0
    assert bytes(view) == bytes(length)
