"""Whether an origin can be reached, as the outcomes of requests tell it, here and only here. Pure: times are the caller's;
only the log hears when it opens and closes.

Where nothing has come of any request for OPEN_AFTER_S, the circuit opens: whoever asks from then on is told the known reason within
PATIENCE_S instead of waiting for deadlines of its own, and only now and then is a request let through, as a probe. The first answer of
any kind, a refusal too, closes it. Requests that were under way when it opened keep their own retries: an outage of seconds costs a reader
that was there before nothing but the time.
One circuit per scheme, host and port, shared by all who ask there: `manta.hub.catalog` (metadata) and `manta.fetch.fetcher` (locations,
bytes). Used in the daemon's trio thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

log = logging.getLogger(__name__)

OPEN_AFTER_S = 2.0
"""For how long nothing may come before the origin counts as out of reach. A proxy that restarts, or a balancer that sheds a connection, is
back within that; a connection that was not taken for that long has lost two SYNs (at 0 and 1 s)."""

PROBE_S = 1.0
"""Between two probes. Not one at a time: a probe may wait for its deadline, and must not keep the next one from finding the origin back."""

PATIENCE_S = 2.0
"""How long someone who asks while the circuit is open waits: for the next probe, and then for an answer that may cross an ocean. So who
asks when the origin is back is never refused for an outage that is over."""

LAG_S = 1.0
"""How late an answer may be noted: of bytes that no reader waits for, workers tell twice a second."""

CIRCUITS_MAX = 64
"""Origins remembered: the hub and its few CDN hosts. A mirror may sign URLs of any number of hosts."""


class Circuit:
    """That of `origin`. `reason` is why it is open: a sentence; "" while it is closed."""

    def __init__(self, origin: str) -> None:
        self.reason = ""
        self.opened = float("inf")
        """When it opened."""
        self._origin = origin
        self._answered = float("-inf")
        self._failing_since: float | None = None
        self._next_probe = float("-inf")

    @property
    def open(self) -> bool:
        return bool(self.reason)

    def silent_since(self, other: Circuit) -> bool:
        """Whether nothing was heard from this origin since `other`, which is open, went out of reach: what ails that may ail this."""
        return other._failing_since is not None and self._answered < other._failing_since + LAG_S

    def admits(self, now: float) -> bool:
        """Whether a request may go now. While the circuit is open that is a probe, and the next goes PROBE_S later.

        `answered` or `failed` should follow; where neither does, because the request was cancelled, nothing is lost but the time.
        """
        if not self.open:
            return True
        if now < self._next_probe:
            return False
        self._next_probe = now + PROBE_S
        return True

    def wait_s(self, now: float) -> float:
        """How long until `admits` may say yes; 0 where it would now."""
        return max(0.0, self._next_probe - now) if self.open else 0.0

    def answered(self, now: float) -> None:
        """The origin answered, whatever it said."""
        if self.open:
            log.info("%s answers again", self._origin)
        self.reason = ""
        self._answered = now
        self._failing_since = None

    def failed(self, began: float, now: float, reason: str) -> None:
        """Nothing came of a request that began at `began`: no connection, or no answer.

        A request that began before the latest answer says nothing: the origin is there, that one request was stuck.
        """
        if began <= self._answered:
            return
        self._failing_since = began if self._failing_since is None else min(began, self._failing_since)
        if now - self._failing_since < OPEN_AFTER_S:
            return
        if not self.open:
            log.warning("%s is out of reach: %s", self._origin, reason)
            self._next_probe = now + PROBE_S
            self.opened = now
        self.reason = reason


class Circuits:
    """The circuits by origin (``scheme://host:port``, see `manta.hub.origin.origin_of`); at most CIRCUITS_MAX, unused ones go first."""

    def __init__(self) -> None:
        self._circuits: OrderedDict[str, Circuit] = OrderedDict()

    def of(self, origin: str) -> Circuit:
        circuit = self._circuits.setdefault(origin, Circuit(origin))
        self._circuits.move_to_end(origin)
        if len(self._circuits) > CIRCUITS_MAX:
            self._circuits.popitem(last=False)
        return circuit

    def outage(self, origin: str, hub: str, since: float) -> str:
        """Why `origin`, where `hub` has sent us for bytes, is out of reach, as was known or likely at `since`; "" where nothing said so.

        A node that loses its network loses both, and finds out about the hub first.
        """
        there, home = self.of(origin), self.of(hub)
        if there.open:
            return there.reason if there.opened <= since else ""
        return home.reason if home.open and home.opened <= since and there.silent_since(home) else ""

    def reasons(self) -> list[str]:
        """A sentence for each origin that is out of reach."""
        return [f"{origin} is out of reach: {c.reason}" for origin, c in self._circuits.items() if c.open]
