"""What goes wrong during a soak, by a seeded script: faults, outages, kills, branch moves. And when: the almanac that excuses errors.

Bad weather and good weather take turns, so that there is time in which no error has an excuse.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from manta.testing.hub import HubError, HubProcess, faults
from manta.testing.hub.faults import Action
from manta.testing.hub.routes import Origin
from tests.mount.node import Node, send
from tests.soak.content import COMMITS, FLIPPED, MOVING

BAD_S = (8.0, 35.0)
GOOD_S = (25.0, 45.0)
"""Longer than AFTERMATH_S, or nothing would ever be without excuse."""

AFTERMATH_S = 20.0
"""How long after bad weather an error may come of it: a reader's patience twice (the kernel asks again), a question that is believed to be
unanswerable for a few seconds, a daemon that starts."""

ACTIONS: list[tuple[Action, dict[str, Any]]] = [
    (faults.Stall(after_bytes=200_000, seconds=20), {"origin": "cdn"}),
    (faults.Stall(seconds=20), {"origin": "cdn"}),
    (faults.Reset(after_bytes=300_000), {"origin": "cdn"}),
    (faults.Reset(before_headers=True), {}),
    (faults.Truncate(after_bytes=100_000), {"origin": "cdn"}),
    (faults.Drip(bytes_per_second=400_000), {"origin": "cdn"}),
    (faults.Delay(seconds=1.5), {}),
    (faults.Delay(seconds=15), {"origin": "hub", "kind": "resolve"}),
    (faults.TooMany(form="ratelimit", seconds=1), {"origin": "cdn"}),
    (faults.TooMany(form="retry-after", seconds=2), {"origin": "hub"}),
    (faults.Fail(status=500), {"origin": "cdn"}),
    (faults.Fail(status=503), {}),
    (faults.Fail(status=403, body="xml"), {"origin": "cdn"}),
    (faults.Fail(status=404, body="html"), {"origin": "cdn"}),
    (faults.Fail(status=200, body="html"), {}),
    (faults.ShortRange(missing=70_000), {"origin": "cdn"}),
    (faults.IgnoreRange(), {"origin": "cdn"}),
    (faults.WrongRange(shift=512), {"origin": "cdn"}),
    (faults.TooLong(extra=10_000), {"origin": "cdn"}),
    (faults.ExpiredUrl(), {"origin": "hub"}),
    (faults.RedirectLoop(), {}),
    (faults.Redirect(to="other"), {"origin": "cdn"}),
    (faults.Headers(remove=["X-Repo-Commit", "X-Linked-Size"]), {"origin": "hub"}),
    (faults.Headers(put={"X-Linked-Size": "5"}), {"origin": "hub", "kind": "resolve"}),
    (faults.Flip(offset=1_000_000), {"origin": "cdn", "repo": FLIPPED}),
    (faults.Flip(offset=16_000_000), {"origin": "cdn", "repo": FLIPPED}),
    (faults.WrongRange(shift=-4096, body=True), {"origin": "cdn", "repo": FLIPPED}),
]


KEEPER_S = 3.0
"""In this time a daemon has another keeper."""

LOST = {"ENOTCONN", "ECONNABORTED"}
"""What readers see of a filesystem that nobody has any more. Where a keeper has it no weather excuses that."""


@dataclass
class Almanac:
    """When it was bad, in time.monotonic(). For all threads."""

    bad: list[tuple[float, float]] = field(default_factory=list)
    """Closed spells."""
    since: float | None = None
    counts: Counter[str] = field(default_factory=Counter)
    kills: list[float] = field(default_factory=list)
    """Of the daemon."""

    def excuses(self, began: float, ended: float) -> bool:
        """Whether something was wrong between `began` and `ended`, or so shortly before that it may have been felt."""
        spells = [*self.bad, *([(self.since, ended)] if self.since is not None else [])]
        return any(start <= ended and began <= end + AFTERMATH_S for start, end in spells)


class Weather:
    """Makes it in turns, and leaves a hub that is well."""

    def __init__(self, hub: HubProcess, node: Node, seed: int) -> None:
        self._hub = hub
        self._node = node
        self._random = random.Random(seed)
        self.almanac = Almanac()

    def run(self, stop: threading.Event) -> None:
        """Good and bad in turn until told to stop."""
        while not stop.wait(self._random.uniform(*GOOD_S)):
            self.storm(self._random.uniform(*BAD_S), stop)

    def storm(self, seconds: float, stop: threading.Event | None = None) -> None:
        """One spell of bad weather."""
        stop = stop or threading.Event()
        began = self.almanac.since = time.monotonic()
        events: dict[Callable[[threading.Event], None], int] = {
            self._fault: 12,
            self._outage: 2,
            self._kill_worker: 3,
            self._kill_daemon: 1,
            self._freeze_worker: 1,
            self._move: 2,
            self._collect: 2,
        }
        if self._node.survives:
            events |= {self._kill_daemon: 2, self._kill_daemon_and_workers: 1, self._kill_keeper: 1, self._restart: 1}
        try:
            while time.monotonic() < began + seconds and not stop.is_set():
                [event] = self._random.choices(list(events), list(events.values()))
                event(stop)
                stop.wait(self._random.uniform(0.3, 3.0))
        finally:
            self._clear_up()
            self.almanac.bad.append((began, time.monotonic()))
            self.almanac.since = None

    def _clear_up(self) -> None:
        self._hub.clear_faults()
        self._hub.set_listening("hub", accept=True)
        self._hub.set_listening("cdn", accept=True)

    def _fault(self, _stop: threading.Event) -> None:
        action, conditions = self._random.choice(ACTIONS)
        probability = self._random.choice([0.05, 0.2, 0.6, 1.0])
        self._hub.add_fault(action, **conditions, probability=probability, seed=self._random.randrange(1 << 30))
        self.almanac.counts[f"fault {type(action).__name__}"] += 1
        if self._random.random() < 0.2:
            self._hub.clear_faults()

    def _outage(self, stop: threading.Event) -> None:
        self.almanac.counts["outage"] += 1
        origin: Origin = "hub" if self._random.random() < 0.5 else "cdn"
        self._hub.set_listening(origin, accept=False)
        stop.wait(self._random.uniform(0.5, 8.0))
        self._hub.set_listening(origin, accept=True)

    def _kill_worker(self, _stop: threading.Event) -> None:
        self._signal_worker(signal.SIGKILL, "worker killed")

    def _freeze_worker(self, _stop: threading.Event) -> None:
        """As a machine that swaps: it is killed as stuck, or lives on."""
        if (pid := self._signal_worker(signal.SIGSTOP, "worker frozen")) is not None:
            time.sleep(self._random.uniform(0.2, 2.0))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _signal_worker(self, number: signal.Signals, name: str) -> int | None:
        workers = self._node.processes_of("manta.worker")
        if not workers:
            return None
        pid = self._random.choice(workers)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self.almanac.counts[name] += 1
        return pid

    def _kill_daemon(self, _stop: threading.Event) -> None:
        for pid in self._node.daemons():
            send(pid, signal.SIGKILL)
            self.almanac.kills.append(time.monotonic())
            self.almanac.counts["daemon killed"] += 1

    def _kill_daemon_and_workers(self, stop: threading.Event) -> None:
        self._kill_daemon(stop)
        for pid in self._node.processes_of("manta.worker"):
            send(pid, signal.SIGKILL)

    def _kill_keeper(self, stop: threading.Event) -> None:
        """Alone, and long enough before anything else that the daemon can have another: who loses both has lost the filesystem."""
        for pid in self._node.keepers():
            send(pid, signal.SIGKILL)
            self.almanac.counts["keeper killed"] += 1
        stop.wait(KEEPER_S)

    def _restart(self, _stop: threading.Event) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = self._node.manta("restart", code=None, timeout_s=60)
            self.almanac.counts["restarted" if done.returncode == 0 else "restart refused"] += 1

    def _move(self, _stop: threading.Event) -> None:
        self.almanac.counts["branch moved"] += 1
        with contextlib.suppress(HubError):
            self._hub.move_branch(self._random.choice(MOVING), self._random.choice(COMMITS))

    def _collect(self, _stop: threading.Event) -> None:
        """Evicts all that is not in use."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = self._node.manta("cache", "gc", "--size", "0", code=None, timeout_s=60)
            self.almanac.counts["cache emptied" if done.returncode == 0 else "cache gc refused"] += 1
