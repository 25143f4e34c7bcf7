from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cache.inventory import BlobInfo
from manta.cache.policy import RESERVE_BYTES, SLACK, Admission, Bounds, Usage, admission, excess, oldest
from manta.model.ids import BlobAlgorithm, BlobId

GIB = 1024**3


def blob(number: int, cached: int = GIB, used: float | None = None, in_use: bool = False) -> BlobInfo:
    blob_id = BlobId(BlobAlgorithm.SHA256, f"{number:064x}")
    return BlobInfo(blob_id, cached, cached, sealed=True, last_used=number if used is None else used, in_use=in_use)


def numbers(blobs: list[BlobInfo]) -> list[int]:
    return [int(b.id.hex, 16) for b in blobs]


TEN = [blob(n) for n in range(10)]


def usage(cached: int, free: int = 900 * GIB, coming: int = 0) -> Usage:
    return Usage(cached, coming, free, 1000 * GIB)


@pytest.mark.parametrize(
    ("usage", "bounds", "expected"),
    [
        (usage(500 * GIB), Bounds(0, GIB), Admission.ALL),
        (usage(500 * GIB, free=GIB + RESERVE_BYTES + 1), Bounds(0, GIB), Admission.ALL),
        (usage(500 * GIB, free=GIB + RESERVE_BYTES), Bounds(0, GIB), Admission.READERS),
        (usage(500 * GIB, free=GIB + 1), Bounds(0, GIB), Admission.READERS),
        (usage(500 * GIB, free=GIB), Bounds(0, GIB), Admission.NOTHING),
        (usage(500 * GIB, free=0), Bounds(0, 0), Admission.NOTHING),
        (usage(10 * GIB - RESERVE_BYTES - 1), Bounds(10 * GIB, GIB), Admission.ALL),
        (usage(10 * GIB - RESERVE_BYTES), Bounds(10 * GIB, GIB), Admission.READERS),
        (usage(10 * GIB), Bounds(10 * GIB, GIB), Admission.NOTHING),
        (usage(11 * GIB), Bounds(10 * GIB, GIB), Admission.NOTHING),
        # What was ordered takes its room before it is there.
        (usage(5 * GIB, coming=5 * GIB), Bounds(10 * GIB, GIB), Admission.NOTHING),
        # A small limit and a small disk have a small reserve.
        (usage(31), Bounds(33, 0), Admission.ALL),
        (Usage(0, 0, 600, 1000), Bounds(0, GIB), Admission.ALL),
        (Usage(0, 0, 500, 1000), Bounds(0, GIB), Admission.NOTHING),
    ],
)
def test_what_may_be_fetched(usage: Usage, bounds: Bounds, expected: Admission) -> None:
    assert admission(usage, bounds) is expected
    assert (excess(usage, bounds) == 0) is (expected is Admission.ALL)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 2000), st.integers(0, 300), st.integers(0, 2000), st.integers(1, 2000), st.integers(0, 2000), st.integers(0, 2000)
)  # fmt: skip
def test_after_an_eviction_everything_may_be_fetched_until_the_slack_is_used_up(
    cached: int, coming: int, free: int, size: int, limit: int, floor: int
) -> None:
    scale = 1 << 20
    before = Usage(cached * scale, coming * scale, min(free, size) * scale, size * scale)
    bounds = Bounds(limit * scale, floor * scale)
    needed = excess(before, bounds)
    after = Usage(before.cached - needed, before.coming, before.disk_free + needed, before.disk_size)
    assert admission(after, bounds) is Admission.ALL
    assert excess(after, bounds) == 0
    if needed:
        assert bounds.room(after) >= 2 * bounds.reserve(before.disk_size)


def test_the_least_recently_used_go_first() -> None:
    assert numbers(oldest(TEN[::-1], 2 * GIB + 1)) == [0, 1, 2]


def test_the_daemon_does_not_evict_again_after_each_chunk() -> None:
    """Hysteresis: fetched into a full cache, one model's worth of chunks costs one pass."""
    chunk, bounds = 8 * 1024**2, Bounds(8 * GIB, GIB)
    blobs, cached, passes = list(TEN[:8]), 8 * GIB, 0
    for _ in range(bounds.limit // SLACK // chunk):
        cached += chunk
        chosen = oldest(blobs, excess(usage(cached), bounds))
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
