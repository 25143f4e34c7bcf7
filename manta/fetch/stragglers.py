"""Which orders are so much slower than the others that their bytes are asked for a second time. Pure: the clock is an argument.

One connection of many can hang: a lost packet at the wrong moment, a front end that restarts, a disk behind one of a CDN's servers. The
others show how long an order takes now; one that takes far longer is *hedged*: what has not come is ordered once more, on another
connection, and the first to be done counts. Used by `manta.fetch.fetcher`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

RECENT_MAX = 32
"""Orders that tell what is usual."""

SILENCE_SECONDS = 1.5
"""Nothing for this long is unusual for any origin that is near or far; also while nothing is known. Where no reader waits, a worker tells
of bytes every half second, so it must be more than that."""

SILENCE_FACTOR = 4.0
"""And nothing for this many usual waits for a first byte."""

SLOW_SECONDS = 2.0
SLOW_FACTOR = 4.0
"""An order that would need this many times what is usual for the rest, and this much longer, is slow. Eight connections on one full link
take turns unevenly: one may have a fifth of its share for a second."""

WASTE_SHARE = 1 / 16
WASTE_BYTES = 32 * 1024 * 1024
"""Bytes that may be asked for twice: a share of all that came, and four chunks at any time. An origin that is slow as a whole must not be
asked for everything twice. Nodes that read from it together have this much together."""

WASTE_BYTES_MIN = 8 * 1024 * 1024
"""But each node one chunk, for an order of which nothing comes: one connection of one node can hang as well."""


@dataclass(eq=False, slots=True)
class Course:
    """How an order is coming along. Seconds are on the clock of the caller."""

    began: float
    wanted: int
    """Bytes."""
    came: int = 0
    first: float | None = None
    """When the first bytes came."""
    last: float = 0.0
    """When bytes came last, or when it began."""
    hedged: bool = False

    def progress(self, count: int, now: float) -> None:
        if self.first is None:
            self.first = now
        self.came += count
        self.last = now


@dataclass(slots=True)
class Stragglers:
    """What is usual, and who falls behind."""

    _first_bytes: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))  # seconds
    _paces: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))  # seconds per byte after the first
    _came: int = 0
    _twice: int = 0
    _among: int = 1
    _pace_elsewhere: float = 0.0  # seconds per byte

    def share(self, among: int) -> None:
        """So many nodes, this one with them, read from the origin together."""
        self._among = max(among, 1)

    def note_elsewhere(self, pace: float) -> None:
        """An order of another node takes this many seconds per byte now; 0 where that is not known. Nodes that share the origin's link slow
        each other down, and a node alone with its few orders sees nothing but that they do. (8 nodes, 100 Mbit/s everywhere, 512 MiB: 11
        orders hedged, 9 % of the bytes read twice, and none of the orders stuck.)"""
        self._pace_elsewhere = pace

    def learn(self, first_byte_s: float, seconds: float, size: int) -> None:
        """An order of `size` bytes took `seconds`, of which `first_byte_s` passed before anything came."""
        self._came += size
        if size > 0:
            self._first_bytes.append(first_byte_s)
            self._paces.append(max(seconds - first_byte_s, 0.0) / size)

    def silent(self, course: Course, now: float) -> bool:
        """Whether nothing has come of it for longer than is usual."""
        usual = median(self._first_bytes) if self._first_bytes else 0.0
        return now - (course.last or course.began) > max(SILENCE_SECONDS, SILENCE_FACTOR * usual)

    def slow(self, course: Course, others: Iterable[Course], now: float) -> bool:
        """Whether it comes, and so slowly that a second order would be done before it.

        Usual is what orders took lately, or what `others` take now, here or elsewhere, where that is longer: eight that share a link are
        slower than one.
        """
        if course.first is None or not self._paces or course.came >= course.wanted:
            return False
        rest, elapsed = course.wanted - course.came, now - course.first
        paces = [(now - o.first) / o.came for o in others if o is not course and o.first is not None and o.came]
        pace = max(median(self._paces), median(paces) if paces else 0.0, self._pace_elsewhere)
        usual = median(self._first_bytes) + pace * rest
        needs = elapsed / max(course.came, 1) * rest
        return elapsed > SLOW_SECONDS and needs > SLOW_FACTOR * usual + SLOW_SECONDS

    def to_hedge(self, courses: list[Course], now: float, most: int) -> Iterator[Course]:
        """Those to order a second time now, at most `most` under way at once. Each that is taken from the iterator counts as hedged."""
        under_way = sum(1 for course in courses if course.hedged)
        together = (WASTE_BYTES + WASTE_SHARE * self._came) / self._among
        for course in courses:
            if under_way >= most:
                return
            rest = course.wanted - course.came
            if course.hedged or rest <= 0:
                continue
            silent = self.silent(course, now)
            if self._twice + rest > (max(together, WASTE_BYTES_MIN) if silent else together):
                continue
            if silent or self.slow(course, courses, now):
                course.hedged = True
                under_way += 1
                self._twice += rest
                yield course
