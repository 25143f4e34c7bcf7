"""What a hub's headers say about its request quota and how long to wait, here and only here. Pure.

The Hub answers every request with ``RateLimit: "resolvers";r=N;t=S`` (N requests left, S seconds to the window's end) and a
``RateLimit-Policy``. Used by `manta.hub.refusal`, `manta.hub.huggingface`, `manta.fetch.locator` and `manta.worker.origin`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

WAIT_S_DEFAULT = 10.0
"""A 429 that names no time. The Hub's windows are 300 s: asking thirty times per window spends no quota worth naming."""

WAIT_S_MAX = 3600.0
"""A longer wait than this is a broken header: no hub's window is longer than an hour."""

_KIND = re.compile(r'"([^"]{1,40})"')
_NUMBER = re.compile(r"(?:^|[;,\s])([a-z])\s*=\s*(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Quota:
    """One of a hub's request quotas, as its last answer had it."""

    kind: str
    """The hub's own word, such as "api" or "resolvers"."""
    remaining: int
    reset_s: int
    """Seconds until the window ends, counted from the answer."""
    limit: int | None = None
    window_s: int | None = None


def parse_quota(headers: Mapping[str, str]) -> Quota | None:
    """The quota that an answer's headers (names in lower case) tell of; None where they do not."""
    text = headers.get("ratelimit", "")
    numbers = dict(_NUMBER.findall(text))
    kind = _KIND.search(text)
    if kind is None or "r" not in numbers or "t" not in numbers:
        return None
    policy = dict(_NUMBER.findall(headers.get("ratelimit-policy", "")))
    return Quota(
        kind[1],
        int(numbers["r"]),
        int(numbers["t"]),
        int(policy["q"]) if "q" in policy else None,
        int(policy["w"]) if "w" in policy else None,
    )


def spent_for_s(headers: Mapping[str, str]) -> float:
    """Seconds until a quota is filled again whose last request this answer was: 0 to WAIT_S_MAX; 0 while there is some left."""
    quota = parse_quota(headers)
    # The window's end is told in whole seconds, rounded down.
    return min(quota.reset_s + 1.0, WAIT_S_MAX) if quota is not None and quota.remaining == 0 else 0.0


def wait_s(headers: Mapping[str, str], now: float) -> float:
    """Seconds to wait after a 429 with these headers at `now` (seconds since the epoch): 0 to WAIT_S_MAX."""
    seconds = asked_wait_s(headers, now)
    return WAIT_S_DEFAULT if seconds is None else seconds


def asked_wait_s(headers: Mapping[str, str], now: float) -> float | None:
    """What the headers ask for: the end of a spent quota's window, else Retry-After. 0 to WAIT_S_MAX; None where they ask for nothing."""
    return spent_for_s(headers) or retry_after_s(headers, now)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """What Retry-After asks for, as seconds from `now`: 0 to WAIT_S_MAX; None where it is missing or malformed."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), WAIT_S_MAX)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    # A date without a zone is GMT by RFC 9110; parsedate gives it naive.
    moment = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return min(max(moment.timestamp() - now, 0.0), WAIT_S_MAX)
