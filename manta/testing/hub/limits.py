"""Limits the hub puts on its clients: request quotas, a bandwidth cap, latency. Pure: clocks are arguments.

Quotas follow the Hub's: a fixed window of five minutes, per user or address, apart for downloads
("resolvers") and the API. Bandwidth is one token bucket for the whole server. Used by server.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

Allowance = Literal["resolvers", "api"]
Caller = Literal["anonymous", "user", "pro"]

WINDOW_S = 300

# While capped, the bucket may run this far ahead of its rate: long enough for a slice per loop turn, short
# enough that a measurement of a second is not off by more than a percent or two.
_BURST_S = 0.02


class QuotaLimits(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Requests per five minutes, per kind of caller; the defaults are too high for any test to meet."""

    anonymous: int = 1_000_000
    user: int = 1_000_000
    pro: int = 1_000_000


class Quotas(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The limits of both allowances."""

    resolvers: QuotaLimits = QuotaLimits()
    api: QuotaLimits = QuotaLimits()


# What the real Hub granted in 2026.
HUB_QUOTAS = Quotas(
    resolvers=QuotaLimits(anonymous=3000, user=5000, pro=12000),
    api=QuotaLimits(anonymous=500, user=1000, pro=2500),
)


class QuotaState(NamedTuple):
    """Where a caller stands after a request."""

    allowance: Allowance
    limit: int
    remaining: int
    reset_s: int
    exhausted: bool

    def headers(self) -> dict[str, str]:
        """The two headers every answer of the Hub carries."""
        return {
            "RateLimit": f'"{self.allowance}";r={self.remaining};t={self.reset_s}',
            "RateLimit-Policy": f'"fixed window";"{self.allowance}";q={self.limit};w={WINDOW_S}',
        }


class QuotaLedger:
    """Counts requests per caller and window."""

    def __init__(self, quotas: Quotas | None = None) -> None:
        self.quotas = quotas or Quotas()
        self._window = -1
        self._used: dict[tuple[str, Allowance], int] = {}

    def take(self, allowance: Allowance, caller: Caller, who: str, now: float) -> QuotaState:
        """Count one request of `who` at `now` (seconds); a refused one costs nothing."""
        window = int(now // WINDOW_S)
        if window != self._window:  # one window for all callers bounds the table
            self._window = window
            self._used.clear()
        limits = self.quotas.resolvers if allowance == "resolvers" else self.quotas.api
        limit: int = getattr(limits, caller)
        used = self._used.get((who, allowance), 0)
        exhausted = used >= limit
        if not exhausted:
            used += 1
            self._used[who, allowance] = used
        reset_s = max(1, int((window + 1) * WINDOW_S - now))
        return QuotaState(allowance, limit, max(0, limit - used), reset_s, exhausted)

    def clear(self) -> None:
        """Give every caller a fresh window."""
        self._used.clear()


class Bandwidth:
    """A token bucket over all body bytes; `rate` in bytes per second may change at any time, None is no cap."""

    def __init__(self, rate: float | None = None) -> None:
        self.rate = rate
        self._free_at = 0.0  # when the bytes promised so far will have left

    @property
    def slice_bytes(self) -> int:
        """How much to send at once: all there is without a cap, else what leaves in about 5 ms."""
        return 1 << 22 if self.rate is None else max(1 << 10, min(1 << 18, int(self.rate / 200)))

    def reserve(self, count: int, now: float) -> float:
        """Claim `count` bytes at `now`; returns the seconds to wait before sending them."""
        if self.rate is None:
            return 0.0
        self._free_at = max(self._free_at, now - _BURST_S) + count / self.rate
        return max(0.0, self._free_at - now)
