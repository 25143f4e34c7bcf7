"""Which origins want to be left alone, and until when: the whole node heeds it, not one file. Pure: the clock is an argument."""

from __future__ import annotations

ORIGINS_MAX = 64
"""A hub and its CDNs are a handful; a hub that names a new one with each answer must not fill the memory."""


class Throttles:
    """By origin (`manta.hub.origin.origin_of`); a longer pause counts, a shorter one changes nothing."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def pause(self, origin: str, until: float) -> None:
        """Nothing may be asked of `origin` before `until`."""
        self._until[origin] = max(until, self._until.get(origin, until))
        while len(self._until) > ORIGINS_MAX:
            del self._until[min(self._until, key=self._until.__getitem__)]

    def until(self, origin: str, now: float) -> float | None:
        """When the pause of `origin` ends; None where it may be asked."""
        until = self._until.get(origin)
        return until if until is not None and now < until else None

    def pauses(self, now: float) -> dict[str, float]:
        """The pauses in force, for people."""
        self._until = {origin: until for origin, until in self._until.items() if now < until}
        return dict(self._until)
