"""The upload rate: what was sent is paid for by waiting, by all uploads together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manta.swarm.uploads import BURST_SECONDS, SLICE_BYTES, Allowance


def test_no_rate_is_no_limit() -> None:
    allowance = Allowance(0)
    assert allowance.slice_bytes == SLICE_BYTES
    assert [allowance.spend(10**12, 0.0) for _ in range(3)] == [0.0] * 3


@given(
    st.integers(100_000, 10**10),
    st.lists(st.tuples(st.integers(1, SLICE_BYTES), st.floats(0, 2)), min_size=1, max_size=60),
)
def test_over_any_time_no_more_than_the_rate_goes(rate: int, sent: list[tuple[int, float]]) -> None:
    """One that waits as it is told, and is idle now and then."""
    allowance, now, count = Allowance(rate), 0.0, 0
    for size, idle in sent:
        now += allowance.spend(min(size, allowance.slice_bytes), now)
        count += min(size, allowance.slice_bytes)
        assert count <= rate * (now + BURST_SECONDS) * 1.001
        now += idle


@pytest.mark.parametrize("rate", [100_000, 10_000_000, 10**9])
def test_those_that_always_have_something_get_the_rate_together(rate: int) -> None:
    allowance, count, seconds = Allowance(rate), 0, 10.0
    goes_on = [0.0] * 8
    while (now := min(goes_on)) < seconds:
        count += allowance.slice_bytes
        goes_on[goes_on.index(now)] = now + allowance.spend(allowance.slice_bytes, now)
    assert abs(count - rate * seconds) <= rate * BURST_SECONDS + 8 * allowance.slice_bytes
