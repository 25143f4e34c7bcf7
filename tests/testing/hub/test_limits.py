"""Limits: quotas per window and the bandwidth cap, on a clock of our own."""

import pytest

from manta.testing.hub.limits import HUB_QUOTAS, Bandwidth, QuotaLedger, QuotaLimits, Quotas


def test_quota_runs_out_and_comes_back_with_the_next_window() -> None:
    ledger = QuotaLedger(Quotas(resolvers=QuotaLimits(anonymous=2)))
    states = [ledger.take("resolvers", "anonymous", "10.0.0.1", now) for now in (600, 601, 899)]
    assert [state.exhausted for state in states] == [False, False, True]
    assert [state.remaining for state in states] == [1, 0, 0]
    assert states[1].headers() == {
        "RateLimit": '"resolvers";r=0;t=299',
        "RateLimit-Policy": '"fixed window";"resolvers";q=2;w=300',
    }
    assert not ledger.take("resolvers", "anonymous", "10.0.0.1", 900).exhausted


def test_callers_and_allowances_are_counted_apart() -> None:
    ledger = QuotaLedger(Quotas(resolvers=QuotaLimits(anonymous=1), api=QuotaLimits(anonymous=1)))
    assert not ledger.take("resolvers", "anonymous", "a", 0).exhausted
    assert not ledger.take("resolvers", "anonymous", "b", 0).exhausted
    assert not ledger.take("api", "anonymous", "a", 0).exhausted
    assert ledger.take("api", "anonymous", "a", 0).exhausted
    assert not ledger.take("api", "user", "reader", 0).exhausted


def test_the_hubs_own_quotas() -> None:
    ledger = QuotaLedger(HUB_QUOTAS)
    assert ledger.take("resolvers", "anonymous", "a", 0).limit == 3000
    assert ledger.take("api", "pro", "a", 0).limit == 2500


@pytest.mark.parametrize("rate", [50_000.0, 1e6, 125e6, 2e9])
def test_bytes_leave_at_the_capped_rate(rate: float) -> None:
    bandwidth = Bandwidth(rate)
    now, sent = 100.0, 0
    while now < 110.0:
        count = bandwidth.slice_bytes
        now += bandwidth.reserve(count, now)
        sent += count
    assert sent / 10.0 == pytest.approx(rate, rel=0.02)


def test_an_idle_hub_saves_up_no_burst() -> None:
    bandwidth = Bandwidth(1000.0)
    bandwidth.reserve(1000, 0.0)
    assert bandwidth.reserve(1000, 500.0) == pytest.approx(1.0, abs=0.03)


def test_a_cap_can_be_lifted() -> None:
    bandwidth = Bandwidth(1.0)
    assert bandwidth.reserve(1000, 0.0) > 900
    bandwidth.rate = None
    assert bandwidth.reserve(1000, 0.0) == 0.0
