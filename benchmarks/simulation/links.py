"""Bytes on their way: flows that share the links of their two ends, here and only here.

A flow crosses its source's uplink and its target's downlink, and nothing between them is a bottleneck, as behind a switch. Rates are
max-min fair: no flow can have more without another, that has no more than it, having less. That is what TCP's flows of one
round trip time come to, roughly; slow start, losses and queues are not here.

All rates are worked out anew whenever a flow begins or ends, at most once in `step` seconds. With step 0 that is exact; with thousands of
nodes a step of a hundredth of a chunk's time costs less than one in a hundred of the rate (tests/simulation/test_links.py). Until the
next step a new flow carries nothing and what an ended one leaves is not used.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

ROUNDS_MAX = 24
"""Rounds of `fair_rates` after which the few flows that are left get what is safe: some links keep a little unused."""

LEVEL_SHARE = 1e-3
"""Shares that differ by less are one level: equal links never come out equal to the last bit."""


def fair_rates(source: Integers, target: Integers, caps: Floats, up: Floats, down: Floats) -> Floats:
    """The max-min fair rates of flows from `source` to `target` (indices into `up` and `down`), none above its cap.

    In rounds: each link offers its flows an equal share of what it has left, a flow gets no more than the least of its two offers and its
    cap. Where no flow of a link is offered less by its other end, the link is that flow's bottleneck: its flows are settled.
    """
    flows = len(source)
    rates = np.zeros(flows)
    if not flows:
        return rates
    links = np.concatenate((up, down)).astype(float)
    left = links.copy()
    first, second = source, target + len(up)
    open_ = np.arange(flows)
    for _ in range(ROUNDS_MAX):
        ours, theirs = first[open_], second[open_]
        counts = np.bincount(ours, minlength=len(links)) + np.bincount(theirs, minlength=len(links))
        shares = np.maximum(left, 0.0) / np.maximum(counts, 1)
        by_first, by_second = shares[ours], shares[theirs]
        offers = np.minimum(np.minimum(by_first, by_second), caps[open_])
        full_first = offers >= by_first * (1 - LEVEL_SHARE)
        full_second = offers >= by_second * (1 - LEVEL_SHARE)
        content = np.bincount(ours, weights=full_first, minlength=len(links))
        content += np.bincount(theirs, weights=full_second, minlength=len(links))
        tight = content >= counts
        settled = tight[ours] | tight[theirs] | (caps[open_] <= offers)
        given = offers[settled]
        rates[open_[settled]] = given
        left -= np.bincount(ours[settled], weights=given, minlength=len(links))
        left -= np.bincount(theirs[settled], weights=given, minlength=len(links))
        open_ = open_[~settled]
        if not len(open_):
            return rates
    ours, theirs = first[open_], second[open_]
    counts = np.bincount(ours, minlength=len(links)) + np.bincount(theirs, minlength=len(links))
    shares = np.maximum(left, 0.0) / np.maximum(counts, 1)
    rates[open_] = np.minimum(np.minimum(shares[ours], shares[theirs]), caps[open_])
    return rates


class Links:
    """`up` and `down` are bytes per second of each end. Numbers of flows are used again after their end."""

    def __init__(self, up: Floats, down: Floats, step: float = 0.0) -> None:
        self.up, self.down = np.array(up, float), np.array(down, float)
        self.step = step
        self._source = np.zeros(64, np.int64)
        self._target = np.zeros(64, np.int64)
        self._left = np.zeros(64)
        self._rate = np.zeros(64)
        self._cap = np.zeros(64)
        self._live: Flags = np.zeros(64, bool)
        self._free = list(range(63, -1, -1))
        self._uses = [
            0
        ] * 64  # how often each number was given up: what was said of an earlier flow is not said of this one
        self._ending: list[
            tuple[float, int, int]
        ] = []  # flows that end before the next step, and their uses; the last one first
        self._at = 0.0  # when `_left` was true
        self._worked_out = float("-inf")
        self._changed: float | None = None  # since when rates are not true

    def start(self, now: float, source: int, target: int, size: float, cap: float = float("inf")) -> int:
        """`size` bytes are to flow. Returns the flow's number."""
        if not self._free:
            self._grow()
        flow = self._free.pop()
        self._source[flow], self._target[flow], self._cap[flow] = source, target, cap
        self._left[flow], self._rate[flow], self._live[flow] = size, 0.0, True
        self._change(now)
        return flow

    def stop(self, now: float, flow: int) -> float:
        """The flow ends here. Returns the bytes that are missing."""
        left = self.left(now, flow)
        self._end(now, flow)
        return left

    def left(self, now: float, flow: int) -> float:
        """The bytes of it that are missing."""
        return max(0.0, float(self._left[flow] - self._rate[flow] * (now - self._at)))

    def set_cap(self, now: float, flow: int, cap: float) -> None:
        """0 holds it where it is."""
        self._cap[flow] = cap
        self._change(now)

    def due(self) -> float:
        """When `proceed` is to be called next; infinity where nothing flows."""
        ends = self._ending[-1][0] if self._ending else float("inf")
        if self._changed is None:
            return ends
        return min(ends, max(self._changed, self._worked_out + self.step))

    def proceed(self, now: float) -> list[int]:
        """Returns the flows that have ended by `now`, in their order."""
        ended = []
        while self._ending and self._ending[-1][0] <= now:
            _, flow, uses = self._ending.pop()
            if self._uses[flow] == uses:
                ended.append(flow)
                self._end(now, flow)
        if self._changed is not None and now >= max(self._changed, self._worked_out + self.step):
            self._work_out(now)
        return ended

    def _change(self, now: float) -> None:
        if self._changed is None:
            self._changed = now

    def _end(self, now: float, flow: int) -> None:
        self._live[flow] = False
        self._rate[flow] = 0.0
        self._uses[flow] += 1
        self._free.append(flow)
        self._change(now)

    def _work_out(self, now: float) -> None:
        live = np.flatnonzero(self._live)
        self._left[live] = np.maximum(self._left[live] - self._rate[live] * (now - self._at), 0.0)
        self._at = self._worked_out = now
        self._changed = None
        rates = fair_rates(self._source[live], self._target[live], self._cap[live], self.up, self.down)
        self._rate[live] = rates
        moving = rates > 0
        flows = live[moving]
        ends = now + self._left[flows] / rates[moving]
        if not len(ends):
            self._ending = []
            return
        soon = ends <= max(now + self.step, float(ends.min()))
        order = np.argsort(-ends[soon], kind="stable")
        numbers = flows[soon][order].tolist()
        self._ending = [(e, f, self._uses[f]) for e, f in zip(ends[soon][order].tolist(), numbers, strict=True)]

    def _grow(self) -> None:
        size = len(self._live)
        for name in ("_source", "_target", "_left", "_rate", "_cap", "_live"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate((old, np.zeros_like(old))))
        self._uses += [0] * size
        self._free = list(range(2 * size - 1, size - 1, -1))
