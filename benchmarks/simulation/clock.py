"""What happens when: the simulation's clock and its queue of events, here and only here."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """`now` is in seconds since the start. Events of one moment happen in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        """That have happened."""
        self._queue: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = itertools.count()

    def at(self, when: float, do: Callable[..., None], *arguments: object) -> None:
        """What is in the past happens at once."""
        heapq.heappush(self._queue, (max(when, self.now), next(self._serial), do, arguments))

    def after(self, seconds: float, do: Callable[..., None], *arguments: object) -> None:
        self.at(self.now + seconds, do, *arguments)

    @property
    def next(self) -> float:
        """When the next event is due; infinity where there is none."""
        return self._queue[0][0] if self._queue else float("inf")

    def step(self) -> None:
        """The next event happens."""
        self.now, _, do, arguments = heapq.heappop(self._queue)
        self.events += 1
        do(*arguments)
