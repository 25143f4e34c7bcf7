"""Which origins want to be left alone, and until when: the whole node heeds it, not one file. Pure: the clock is an argument."""

from __future__ import annotations

ORIGINS_MAX = 64
"""A hub and its CDNs are a handful; a hub that names a new one with each answer must not fill the memory."""


HEARD_SECONDS_MAX = 300.0
"""How long a pause may be that another node told of: the hub's quotas are of five minutes."""


class Throttles:
    """By origin (`manta.hub.origin.origin_of`); a longer pause counts, a shorter one changes nothing."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._own: dict[str, float] = {}

    def pause(self, origin: str, until: float, *, own: bool = True) -> None:
        """Nothing may be asked of `origin` before `until`. `own`: it asked this node, and not another one that says so."""
        for pauses in (self._until, self._own) if own else (self._until,):
            pauses[origin] = max(until, pauses.get(origin, until))
            while len(pauses) > ORIGINS_MAX:
                del pauses[min(pauses, key=pauses.__getitem__)]

    def until(self, origin: str, now: float) -> float | None:
        """When the pause of `origin` ends; None where it may be asked."""
        until = self._until.get(origin)
        return until if until is not None and now < until else None

    def pauses(self, now: float) -> dict[str, float]:
        """The pauses in force, for people."""
        self._until = {origin: until for origin, until in self._until.items() if now < until}
        return dict(self._until)

    def own_pauses(self, now: float) -> dict[str, float]:
        """Those that this node was asked for, to be told to others. What was heard is not told on: it would end a little later each time,
        and so never."""
        self._own = {origin: until for origin, until in self._own.items() if now < until}
        return dict(self._own)
