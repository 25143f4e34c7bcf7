"""What to do about an order that failed: try again, when, and what to change first. Pure. Used by `manta.fetch.fetcher`."""

from __future__ import annotations

from dataclasses import dataclass

from manta.wire.messages import Failed

ATTEMPTS_MAX = 11
"""With the pauses below about 8 s of trying: what a restarting proxy or a load balancer needs, and less than a reader's patience."""

PAUSE_SECONDS = 0.25
PAUSE_SECONDS_MAX = 1.0
"""Shorter than anybody waits for an origin that is back."""

REFUSALS_MAX = 3
"""A 403 on a signed URL is not always expiry (facts: resolve again, bounded); more in a row is a real refusal. So with wrong bytes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`retry` with `pause_s` before it for this chunk, and `origin_pause_s` for every request to the origin; or give up."""

    retry: bool
    pause_s: float = 0.0
    origin_pause_s: float = 0.0
    relocate: bool = False
    """The location is no good any more: ask the hub again."""


def judge(failure: Failed, attempts: int) -> Verdict:
    """`attempts` is how often this chunk has failed for this reason in a row without getting further (>= 1).

    The first failure is tried again at once: most are one connection's, and the next one is well.
    """
    pause = min(PAUSE_SECONDS * 2 ** (attempts - 2), PAUSE_SECONDS_MAX) if attempts > 1 else 0.0
    match failure.reason:
        case "cancelled" | "busy":
            return Verdict(retry=True)
        case "throttled":
            # The wait is the origin's own word, and waiting costs it nothing: it does not count towards giving up. Readers have
            # their own deadline.
            return Verdict(retry=True, origin_pause_s=max(failure.retry_after_s, PAUSE_SECONDS))
        case "denied" | "absent" | "corrupt":
            # Another location may be right where this one is wrong, and another connection may reach another server.
            return Verdict(retry=attempts < REFUSALS_MAX, pause_s=pause, relocate=True)
        case "unavailable":
            # A 503 may say how long (Retry-After): then the whole origin is in trouble.
            return Verdict(retry=attempts < ATTEMPTS_MAX, pause_s=pause, origin_pause_s=failure.retry_after_s)
        case "no_space" | "cache_broken":
            return Verdict(retry=False)
