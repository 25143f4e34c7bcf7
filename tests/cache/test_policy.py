from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cache.inventory import BlobInfo
from manta.cache.policy import SLACK, excess, oldest, victims
from manta.model.ids import BlobAlgorithm, BlobId

GIB = 1024**3


def blob(number: int, cached: int = GIB, used: float | None = None, in_use: bool = False) -> BlobInfo:
    blob_id = BlobId(BlobAlgorithm.SHA256, f"{number:064x}")
    return BlobInfo(blob_id, cached, cached, sealed=True, last_used=number if used is None else used, in_use=in_use)


def numbers(blobs: list[BlobInfo]) -> list[int]:
    return [int(b.id.hex, 16) for b in blobs]


TEN = [blob(n) for n in range(10)]


@pytest.mark.parametrize(
    ("cached", "limit", "free", "floor", "expected"),
    [
        (100, 0, 50, 10, 0),
        (100, 100, 50, 10, 0),
        (1000, 160, 50, 50, 1000 - 150),
        (100, 0, 9, 16, 8),
        (1000, 160, 0, 16, 1000 - 150),
        (161, 160, 0, 1600, 1700),
        (100, 0, 0, 0, 0),
    ],
)
def test_excess(cached: int, limit: int, free: int, floor: int, expected: int) -> None:
    assert excess(cached, limit, free, floor) == expected


def test_within_both_bounds_nothing_goes() -> None:
    assert victims(TEN, 10 * GIB, 10 * GIB, GIB, GIB) == []
    assert victims(TEN, 10 * GIB, 0, GIB, GIB) == []


def test_the_least_recently_used_go_first_until_there_is_slack() -> None:
    chosen = victims(TEN[::-1], 10 * GIB, 8 * GIB, 100 * GIB, GIB)
    assert numbers(chosen) == [0, 1, 2]  # two to come down to the limit, the third for the slack
    assert victims(TEN[3:], 7 * GIB, 8 * GIB, 100 * GIB, GIB) == []


def test_a_nearly_full_disk_evicts_without_a_limit() -> None:
    assert numbers(victims(TEN, 10 * GIB, 0, 0, GIB)) == [0, 1]


def test_the_daemon_does_not_evict_again_after_each_chunk() -> None:
    """Hysteresis: fetched into a full cache, one model's worth of chunks costs one pass."""
    chunk, limit = 8 * 1024**2, 8 * GIB
    blobs, cached, passes = list(TEN[:8]), 8 * GIB, 0
    for _ in range(limit // SLACK // chunk):
        cached += chunk
        chosen = victims(blobs, cached, limit, 100 * GIB, GIB)
        passes += bool(chosen)
        blobs = [b for b in blobs if b not in chosen]
        cached -= sum(b.cached for b in chosen)
    assert passes == 1


def test_what_is_in_use_or_pinned_or_empty_never_goes() -> None:
    blobs = [blob(0, in_use=True), blob(1), blob(2, cached=0), blob(3)]
    assert numbers(oldest(blobs, 100 * GIB, pinned={blobs[1].id})) == [3]


def test_blobs_used_at_the_same_time_go_in_a_stable_order() -> None:
    blobs = [blob(n, used=5) for n in (3, 1, 2)]
    assert numbers(oldest(blobs, 2 * GIB)) == [1, 2]


def test_nothing_needed_nothing_chosen() -> None:
    assert oldest(TEN, 0) == []
    assert oldest(TEN, -5) == []


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9), st.booleans(), st.booleans()), max_size=20),
    st.integers(0, 300),
)
def test_it_frees_enough_where_that_is_possible_and_never_one_too_many(
    specs: list[tuple[int, int, bool, bool]], needed: int
) -> None:
    blobs = [blob(n, cached, used, in_use) for n, (cached, used, in_use, _) in enumerate(specs)]
    pinned = {b.id for b, (_, _, _, pin) in zip(blobs, specs, strict=True) if pin}
    chosen = oldest(blobs, needed, pinned)
    may_go = [b for b in blobs if not b.in_use and b.id not in pinned]
    freed = sum(b.cached for b in chosen)
    assert freed >= min(needed, sum(b.cached for b in may_go))
    assert not chosen or freed - chosen[-1].cached < needed
    assert all(b in may_go for b in chosen)
    spared = [b for b in may_go if b not in chosen and b.cached]
    assert not chosen or all(b.last_used >= chosen[-1].last_used for b in spared)
