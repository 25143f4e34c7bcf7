"""How many bytes went by, in all and per second of late. Pure: the clock is an argument."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 3.0
"""Long enough to smooth the arrival of single chunks, short enough that a person sees a stall."""

_SLOT_SECONDS = 0.1


class Meter:
    """Counts bytes; `now` must not go backwards. `lump_s` is how many seconds what one `add` counts has taken, where that is long."""

    def __init__(self, lump_s: float = 0.0) -> None:
        self.total = 0
        self._lump_s = lump_s
        self._slots: deque[tuple[float, int]] = deque()  # (start of slot, bytes), at most WINDOW / SLOT of them

    def add(self, count: int, now: float) -> None:
        self.total += count
        if self._slots and now - self._slots[-1][0] < _SLOT_SECONDS:
            start, so_far = self._slots[-1]
            self._slots[-1] = start, so_far + count
        else:
            self._slots.append((now, count))
            self._expire(now)

    def rate(self, now: float) -> float:
        """Bytes per second over the last WINDOW_SECONDS, or since the first byte in it."""
        self._expire(now)
        if not self._slots:
            return 0.0
        return sum(count for _, count in self._slots) / max(now - self._slots[0][0] + self._lump_s, _SLOT_SECONDS)

    def _expire(self, now: float) -> None:
        while self._slots and now - self._slots[0][0] > WINDOW_SECONDS:
            self._slots.popleft()
