"""The hub: one link, a quota of requests, times when nobody reaches it. Here and only here."""

from __future__ import annotations

from benchmarks.simulation.weather import Hub


class Origin:
    """What `hub` says to each request, and what it has sent."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.requests = 0
        self.refused = 0
        self.sent = 0.0
        """Bytes, those of transfers that broke off too."""
        self._window = -1
        self._count = 0

    def dark(self, now: float) -> bool:
        begins, ends = self.hub.dark
        return begins <= now < ends

    def pause(self, now: float) -> float:
        """Takes one request at `now`. Returns 0.0 where it is answered, else for how long the hub wants to be left alone."""
        self.requests += 1
        if not self.hub.requests:
            return 0.0
        window = int(now / self.hub.window_s)
        if window != self._window:
            self._window, self._count = window, 0
        self._count += 1
        if self._count <= self.hub.requests:
            return 0.0
        self.refused += 1
        return (window + 1) * self.hub.window_s - now
