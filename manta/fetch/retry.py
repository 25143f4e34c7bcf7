"""What to do about an order that failed: try again, when, and what to change first. Pure. Used by `manta.fetch.fetcher`."""

from __future__ import annotations

from dataclasses import dataclass

from manta.wire.messages import Failed

ATTEMPTS_MAX = 6
"""With the pauses below about 8 s of trying: what a restarting proxy or a load balancer needs, and less than a reader's patience."""

PAUSE_SECONDS = 0.25
PAUSE_SECONDS_MAX = 4.0

DENIALS_MAX = 3
"""A 403 on a signed URL is not always expiry (facts: resolve again, bounded); more in a row is a real refusal."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`retry` with `pause_s` before it for this chunk; `origin_pause_s` for every request to the origin (429); or give up."""

    retry: bool
    pause_s: float = 0.0
    origin_pause_s: float = 0.0
    relocate: bool = False
    """The location is no good any more: ask the hub again."""


def judge(failure: Failed, attempts: int) -> Verdict:
    """`attempts` is how often this chunk has failed for this reason in a row without getting further (>= 1)."""
    pause = min(PAUSE_SECONDS * 2 ** (attempts - 1), PAUSE_SECONDS_MAX)
    more = attempts < ATTEMPTS_MAX
    match failure.reason:
        case "cancelled":
            return Verdict(retry=True)
        case "throttled":
            # The wait is the origin's own word, and waiting costs it nothing: it does not count towards giving up. Readers have
            # their own deadline.
            return Verdict(retry=True, origin_pause_s=max(failure.retry_after_s, PAUSE_SECONDS))
        case "denied" | "absent":
            return Verdict(retry=attempts < DENIALS_MAX, pause_s=0.0 if attempts == 1 else pause, relocate=True)
        case "corrupt":
            # Another connection may reach another server; another location may be right where this one is wrong.
            return Verdict(retry=attempts < DENIALS_MAX, pause_s=pause, relocate=True)
        case "unavailable":
            return Verdict(retry=more, pause_s=pause)
        case "no_space" | "cache_broken":
            return Verdict(retry=False)
