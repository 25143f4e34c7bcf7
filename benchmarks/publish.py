"""The `publish` benchmark, here and only here; run by `benchmarks.__main__`.

How long a pod waits for its volume: NodePublishVolume as a kubelet asks for it, from the request to the answer, through the real driver and
the real daemon in containers of their own (manta.testing.csinode), and a hub that answers everything --latency later. Cached: published
before, read whole and unpublished. Uncached: a repo that the daemon has never heard of. One at a time, and --concurrent at once, each of
another model.

Then --volumes volumes stay, and are unpublished: processes, threads and memory of daemon and driver before, with and after them; how
long an unpublish takes, at once and one at a time, and while the daemon stands still (SIGSTOP), which must make no difference.

The bound of an uncached publish is in round trips. One is measured as what a request to the hub takes from here, connection included.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.report import Chart, Goal, Report, Row, median, quantile
from benchmarks.rig import count, file_size, link_rate, say
from manta.errors import MantaError
from manta.testing import csinode
from manta.testing.csinode import CsiNode
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, Text
from manta.testing.hub.files import FileSpec
from manta.testing.kubelet import Call, Pod, Volume, inline

SUMMARY = "NodePublishVolume of cached and uncached models, alone and many at once; what many volumes cost; unpublish"
PROGRAMS = ("nsenter", "unshare", "mount")

LATENCY_S = 0.05
"""The Hub's API answers in 30 to 100 ms from within its region."""
ALONE = 20
"""Models that are published one after the other."""
CONCURRENT, VOLUMES = 50, 200
HUNG = 5
"""Volumes that are unpublished while the daemon stands still."""
WEIGHTS_BYTES = 1024 * 1024
"""A publish fetches none of them; they are read between the uncached publish and the cached one."""
CACHED_S_MAX = 0.1
UNCACHED_ROUND_TRIPS_MAX = 2
GROWTH_BYTES_MAX = 256 * 1024
"""Of daemon and driver together, for each volume. 200 of them are then less than an empty daemon."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=file_size, default=WEIGHTS_BYTES, help="of a model's weights (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=link_rate, default=0, help="bits per second of all the hub sends, 0: no limit (default: 0)"
    )
    parser.add_argument(
        "--latency", type=float, default=LATENCY_S, help="of the hub, in seconds (default: %(default)s)"
    )
    parser.add_argument("--concurrent", type=count, default=CONCURRENT, help="at once (default: %(default)s)")
    parser.add_argument("--volumes", type=count, default=VOLUMES, help="on the node (default: %(default)s)")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/tmp"), help="which disk the results name; the cache is below /tmp"
    )


def run(options: argparse.Namespace) -> Report:
    if reason := csinode.obstacle():
        raise MantaError(f"There can be no node here: {reason}")
    names = [f"bench/model-{number:03}" for number in range(ALONE + options.concurrent)]
    files: dict[str, FileSpec] = {"config.json": Text("{}"), "model.safetensors": Generated("publish", options.size)}
    with HubProcess(HubSpec(repos=[RepoSpec(id=name, files=files) for name in names])) as hub:
        hub.set_latency(options.latency)
        hub.set_bandwidth(options.rate / 8 or None)
        with CsiNode(hub.endpoint) as node:
            return _Run(node, hub, names[:ALONE], names[ALONE:], options.volumes).all()


@dataclass(slots=True)
class _Footprint:
    """Of the containers of daemon and driver."""

    processes: int
    threads: int
    rss: int

    @classmethod
    def of(cls, node: CsiNode) -> _Footprint:
        found = cls(0, 0, 0)
        for pid in (pid for container in (node.daemon, node.driver) for pid in node.processes(container)):
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                words = dict(line.split(":", 1) for line in lines)
                found.processes += 1
                found.threads += int(words["Threads"])
                found.rss += 1024 * int(words.get("VmRSS", "0 kB").split()[0])
        return found


@dataclass(slots=True)
class _Run:
    node: CsiNode
    hub: HubProcess
    alone: Sequence[str]
    together: Sequence[str]
    volumes: int
    report: Report = field(default_factory=lambda: Report("publish"))
    _pods: int = 0

    def all(self) -> Report:
        round_trip = median([self._round_trip() for _ in range(9)])
        self._record("hub round trip", [round_trip])
        uncached_max = UNCACHED_ROUND_TRIPS_MAX * round_trip + CACHED_S_MAX
        bars: list[tuple[str, float]] = []
        for state, bound in (("uncached", uncached_max), ("cached", CACHED_S_MAX)):
            for how, names in (("alone", self.alone), (f"{len(self.together)} at once", self.together)):
                volumes = [self._volume(name) for name in names]
                seconds = self._publish(volumes, at_once=how != "alone")
                self._record(f"publish {state}, {how}", seconds)
                self.report.goals.append(Goal(f"{state}, {how}: median, s", median(seconds), "<=", bound))
                bars.append((f"{state}, {how}", 1000 * median(seconds)))
                if state == "uncached":
                    self._read(volumes)
                self._unpublish(volumes, at_once=True)
        self._many()
        self.report.chart = Chart("a pod's wait for its volume", "ms", bars, [("goal, cached", 1000 * CACHED_S_MAX)])
        return self.report

    def _many(self) -> None:
        names = [*self.alone, *self.together]
        before = _Footprint.of(self.node)
        volumes = [self._volume(names[at % len(names)]) for at in range(self.volumes)]
        for at in range(0, len(volumes), CONCURRENT):
            self._publish(volumes[at : at + CONCURRENT], at_once=True)
        full = _Footprint.of(self.node)
        hung, alone, together = volumes[:HUNG], volumes[HUNG : 2 * HUNG], volumes[2 * HUNG :]
        with self._standing_still():
            self._record("unpublish, daemon stopped", stopped := self._unpublish(hung, at_once=False))
        self._record("unpublish, alone", self._unpublish(alone, at_once=False))
        self._record(f"unpublish, {len(together)} at once", self._unpublish(together, at_once=True))
        after = _Footprint.of(self.node)
        for what, found in (("before", before), (f"with {self.volumes} volumes", full), ("after", after)):
            row: Row = {
                "what": what,
                "processes": found.processes,
                "threads": found.threads,
                "RSS MiB": found.rss / 2**20,
            }
            self.report.table.append(row)
            self.report.runs.append(
                {"what": what, "processes": found.processes, "threads": found.threads, "rss": found.rss}
            )
        goals = self.report.goals
        goals.append(Goal(f"processes more with {self.volumes} volumes", full.processes - before.processes, "==", 0))
        goals.append(Goal("bytes more for each volume", (full.rss - before.rss) / self.volumes, "<=", GROWTH_BYTES_MAX))
        goals.append(Goal("unpublish while the daemon stands still: longest, s", max(stopped), "<=", 1.0))
        goals.append(Goal("mounts left", len(self.node.kubelet.mounts()), "==", 0))

    def _volume(self, name: str) -> Volume:
        self._pods += 1
        return inline(Pod(f"serve-{self._pods}", "bench"), "model", {"model": name})

    def _publish(self, volumes: Sequence[Volume], *, at_once: bool) -> list[float]:
        kubelet = self.node.kubelet
        return _timed([partial(kubelet.begin_set_up, volume) for volume in volumes], at_once=at_once)

    def _unpublish(self, volumes: Sequence[Volume], *, at_once: bool) -> list[float]:
        kubelet = self.node.kubelet
        seconds = _timed([partial(kubelet.begin_tear_down, volume) for volume in volumes], at_once=at_once)
        for volume in volumes:
            kubelet.settle(volume)
        return seconds

    def _read(self, volumes: Sequence[Volume]) -> None:
        """All of them, whole."""
        paths = [str(self.node.kubelet.target(volume)) for volume in volumes]
        self.node.host.run("sh", "-c", 'for path; do cat "$path"/*; done > /dev/null', "sh", *paths)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        pids = self.node.processes(self.node.daemon)
        _signal(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(pids, signal.SIGCONT)

    def _round_trip(self) -> float:
        at = urlsplit(self.hub.endpoint)
        began = time.monotonic()
        with contextlib.closing(http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)) as connection:
            connection.request("GET", f"/api/models/{self.alone[0]}/revision/main")
            connection.getresponse().read()
        return time.monotonic() - began

    def _record(self, what: str, seconds: Sequence[float]) -> None:
        row: Row = {
            "what": what,
            "calls": len(seconds),
            "median ms": 1000 * median(seconds),
            "p90 ms": 1000 * quantile(seconds, 0.9),
            "max ms": 1000 * max(seconds),
        }
        self.report.table.append(row)
        self.report.runs.append({"what": what, "seconds": list(seconds)})
        say(f"{what}: median {1000 * median(seconds):.1f} ms, longest {1000 * max(seconds):.1f} ms, of {len(seconds)}")


def _timed(begins: Sequence[Callable[[], Call]], *, at_once: bool) -> list[float]:
    """The seconds of each call, in their order. Raises Refused where one fails."""
    if at_once:
        calls: list[Call] = [begin() for begin in begins]
        for call in calls:
            call.result()
        return [call.seconds for call in calls]
    seconds = []
    for begin in begins:
        call = begin()
        call.result()
        seconds.append(call.seconds)
    return seconds


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
