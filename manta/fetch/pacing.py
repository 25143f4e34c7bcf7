"""How many connections to the origin pay, found by trying. Pure: the clock is an argument. Used by `manta.fetch.fetcher`.

The number grows while the throughput grows with it, and is halved when the origin asks for a pause or transfers fail in numbers. What one
connection carries differs by a factor of twenty between hubs, and what an origin tolerates is not told anywhere.
"""

from __future__ import annotations

CONNECTIONS_FIRST = 8
"""What is begun with, where the bound allows. The Hub's own clients use 8 to 16 (facts/hub.md)."""

EPOCH_SECONDS = 2.0
"""Throughput is compared over this long: thirty chunks at 1 Gbit/s, so that one more or less is noise."""

GAIN_MIN = 1.05
"""A larger number stays when it carried this much more. Noise between two epochs on an idle link is 2 to 3 %."""

SATURATED_SHARE = 0.8
"""Of the looks taken in an epoch, how many must have found every connection in use: otherwise it says nothing about a larger number."""

PROBE_SECONDS = 30.0
"""How long a number that did not pay is not tried again. A link's share changes with its other users."""

LOSSES_MIN = 3
LOSS_SHARE_MAX = 0.1
"""Transfers that fail in an epoch, as a number and as a share of all that ended: what is below both is every network's noise, and fewer
connections would not help."""


class Pacer:
    """`connections` is how many may be in use, 1 to `maximum`. `look` is to be called a few times a second while anything is under way."""

    def __init__(self, maximum: int) -> None:
        if maximum < 1:
            raise ValueError(f"at least 1 connection, not {maximum}")
        self._most = self._maximum = maximum
        self.elsewhere = 0.0
        """Bytes per second that come from the origin to the other nodes."""
        self.connections = min(CONNECTIONS_FIRST, maximum)
        self._paying = self.connections  # the largest number that is known to pay, or was never in doubt
        self._paying_rate = 0.0  # bytes per second with that many
        self._probe_after = float("-inf")
        self._trouble_until = float("-inf")
        self._began: float | None = None
        self._bytes = self._ended = self._lost = self._looks = self._full = 0

    def share(self, among: int) -> None:
        """So many nodes read from the origin together, and pass on to each other what is complete: that is soon where few chunks are under
        way at once, and with many none is before the last. (4 nodes, 100 Mbit/s everywhere, 256 MiB: 34.3 s with 2 each at first and up to
        4, 31.2 s with 1; the link alone takes 22.5 s.) So they begin with few, and what pays is what more comes to all of them
        (`elsewhere`): a node that adds a connection takes from the others where the origin's link is full."""
        self._maximum = max(1, -(-self._most // among))
        if not self._paying_rate:
            self.connections = max(1, min(CONNECTIONS_FIRST, self._most) // among**2)
        self.connections = min(self.connections, self._maximum)
        self._paying = min(self._paying, self.connections)

    def came(self, count: int) -> None:
        """`count` bytes have come."""
        self._bytes += count

    def succeeded(self) -> None:
        """A transfer has ended well."""
        self._ended += 1

    def lost(self, now: float) -> None:
        """A transfer ended by a timeout, a broken connection or a server's error."""
        self._ended += 1
        self._lost += 1
        if self._lost >= LOSSES_MIN and self._lost > LOSS_SHARE_MAX * self._ended:
            self._back_off(now)

    def throttled(self, now: float) -> None:
        """The origin asked for a pause."""
        self._back_off(now)

    def look(self, in_use: int, now: float) -> None:
        """`in_use` connections are in use at `now`."""
        if self._began is None or now - self._began > 2 * EPOCH_SECONDS:  # nobody looked: nothing was under way
            self._begin(now)
        self._looks += 1
        self._full += in_use >= self.connections
        if now - (self._began or now) >= EPOCH_SECONDS:
            self._conclude(now)

    def _conclude(self, now: float) -> None:
        assert self._began is not None
        rate = self._bytes / (now - self._began) + self.elsewhere
        saturated = self._full >= SATURATED_SHARE * self._looks
        self._begin(now)
        if now < self._trouble_until or not saturated:
            return
        if self.connections > self._paying and rate < GAIN_MIN * self._paying_rate:
            self.connections = self._paying
            self._probe_after = now + PROBE_SECONDS
        else:
            self._paying, self._paying_rate = self.connections, rate
            if now >= self._probe_after:
                self.connections = min(self.connections + max(1, self.connections // 4), self._maximum)

    def _back_off(self, now: float) -> None:
        """Once per burst: what was under way when the trouble began will fail too."""
        if now >= self._trouble_until:
            self._trouble_until = now + EPOCH_SECONDS
            self._paying = self.connections = max(1, self.connections // 2)
            self._paying_rate = 0.0
            self._probe_after = float("-inf")
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._began = now
        self._bytes = self._ended = self._lost = self._looks = self._full = 0
