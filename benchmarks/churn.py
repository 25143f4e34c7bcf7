"""The `churn` benchmark, here and only here; run by `benchmarks.__main__`.

Cold nodes read the same model at once, while a random one is killed by SIGKILL every few seconds and comes back: do all get the right
bytes?

Who is struck, when and how is drawn from the seed; how, from a shuffled deck (DECK). "daemon": the daemon with its workers and its peer
process; its keeper starts the next one, and readers on its mount wait and read on. "node": everything, as if the machine were gone; after
some seconds it is started with its cache, mounts anew, and its reader begins again. "node, emptied": the same, and its cache is gone. A
reader may get an error only where its node was killed with its mount; every byte is compared. After --kills strikes those who still read
do so in peace.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from dataclasses import dataclass

from benchmarks.fleet import fleet_options, nodes_of, origin_rate, patience_s, seconds_at, set_up, ways
from benchmarks.report import GIGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import REPO, count, say
from manta.errors import Corrupt, MantaError, Unavailable
from manta.testing.cluster import Cluster, Node, each
from manta.testing.reading import Reading

SUMMARY = "eight nodes read the same model while a random one is killed every few seconds: right bytes, origin copies"
PROGRAMS = ("ip", "tc", "nsenter")

KILLS = 12
SEED = 20250301
EVERY_S = 3.0
"""Between strikes, on average; from half of it to one and a half."""
DOWN_S = (0.5, 4.0)
POLL_S = 0.05
ERRORS_MAX = 20

DAEMON, NODE, EMPTIED = "daemon", "node", "node, emptied"
DECK = {DAEMON: 3, NODE: 2, EMPTIED: 1}
"""What strikes, and how many cards of it there are."""


def add_options(parser: argparse.ArgumentParser) -> None:
    fleet_options(parser, size="512MiB", nodes=8)
    parser.add_argument("--kills", type=count, default=KILLS, help=f"how many strikes (default: {KILLS})")
    parser.add_argument("--every", type=float, default=EVERY_S, help=f"seconds between strikes (default: {EVERY_S:g})")
    parser.add_argument("--seed", type=int, default=SEED, help="of who is struck, when and how (default: %(default)s)")


def run(options: argparse.Namespace) -> Report:
    report = Report("churn")
    with set_up(options, options.nodes) as cluster:
        for way in ways(options):
            with nodes_of(cluster, options, options.nodes, way) as nodes:
                churn = _Churn(cluster, options, nodes)
                churn.run()
                cluster.await_quiet()
                copies = ratio(cluster.origin_bytes(REPO), cluster.size(REPO))
            _tell(report, way, churn, copies, options)
    report.chart = Chart(
        f"copies from the origin, {options.nodes} nodes, a kill every {options.every:g} s",
        "copies",
        [(str(row["swarm"]), float(row["origin copies"] or 0.0)) for row in report.table],
    )
    return report


def _tell(report: Report, way: str, churn: _Churn, copies: float, options: argparse.Namespace) -> None:
    finished = [member.finished_s for member in churn.members if member.finished_s > 0]
    struck = Counter(what for _, _, what in churn.strikes)
    row: Row = {
        "swarm": f"swarm {way}",
        "finished": len(finished),
        "errors": len(churn.errors),
        "wrong": churn.wrong,
        **{f"kills of {what}": struck[what] for what in DECK},
        "readings begun again": churn.restarted,
        "GB compared": churn.compared / GIGABYTE,
        "origin copies": copies,
        "slowest s": max(finished, default=None),
        "median s": median(finished) if finished else None,
    }
    size = churn.size
    bound_s = max(seconds_at(size, origin_rate(options)), seconds_at(size, options.rate))
    report.table.append({**row, "bound s without kills": bound_s})
    report.runs.append(
        {
            "swarm": way,
            "origin_copies": copies,
            "finished_s": finished,
            "strikes": [{"at_s": round(at, 2), "node": number, "what": what} for at, number, what in churn.strikes],
            "errors": churn.errors[:ERRORS_MAX],
        }
    )
    report.notes += [f"swarm {way}: {error}" for error in churn.errors[:ERRORS_MAX]]
    report.goals += [
        Goal(f"readers that finished with right bytes, swarm {way}", len(finished), "==", options.nodes),
        Goal(f"errors of readers whose mount was not killed, swarm {way}", len(churn.errors), "==", 0),
        Goal(f"readings with wrong bytes, swarm {way}", churn.wrong, "==", 0),
    ]


@dataclass(slots=True)
class _Member:
    number: int
    node: Node
    reading: Reading | None = None
    finished_s: float = 0.0
    """When its reader had all, from the begin; 0 as long as it has not."""
    back_at: float = 0.0
    """On the monotonic clock: when it is to be started; 0 while it runs."""
    empty: bool = False


class _Churn:
    def __init__(self, cluster: Cluster, options: argparse.Namespace, nodes: list[Node]) -> None:
        self._cluster = cluster
        self._options = options
        self._random = random.Random(options.seed)
        self._deck: list[str] = []
        self.size = cluster.size(REPO)
        self.members = [_Member(number, node) for number, node in enumerate(nodes, 1)]
        self.strikes: list[tuple[float, int, str]] = []
        """Seconds from the begin, the node's number, what."""
        self.errors: list[str] = []
        self.wrong = 0
        self.restarted = 0
        self.compared = 0
        self._began = 0.0

    def run(self) -> None:
        """Until all have finished. Raises Unavailable where that takes far too long."""
        directories = each([member.node for member in self.members], lambda node: node.mount(REPO))
        try:
            for member, directory in zip(self.members, directories, strict=True):
                member.reading = self._cluster.reading(member.node, REPO, directory)
            self._began = time.monotonic()
            for member in self.members:
                if member.reading is not None:
                    member.reading.go()
            self._churn()
        finally:
            for member in self.members:
                if member.reading is not None:
                    member.reading.close()

    def _churn(self) -> None:
        # A node whose cache is emptied may need all of it once more, from the origin where there is no swarm.
        patience = patience_s(self._options, self.size, len(self.members) + self._options.kills)
        deadline = self._began + patience + self._options.kills * 2 * self._options.every
        next_at = self._began + self._pause_s()
        while any(not member.finished_s for member in self.members):
            now = time.monotonic()
            if now > deadline:
                raise Unavailable(f"Readers had not finished {deadline - self._began:.0f} s after they began.")
            for member in self.members:
                if member.back_at and now >= member.back_at:
                    self._bring_back(member)
                if member.reading is not None and member.reading.ended():
                    self._hear(member)
            if len(self.strikes) < self._options.kills and now >= next_at:
                self._strike()
                next_at = time.monotonic() + self._pause_s()
            time.sleep(POLL_S)
        for member in self.members:  # so that all end in order
            if member.back_at:
                self._bring_back(member)
            member.node.await_ready()

    def _pause_s(self) -> float:
        every: float = self._options.every
        return every * self._random.uniform(0.5, 1.5)

    def _strike(self) -> None:
        running = [member for member in self.members if not member.back_at]
        if not running:
            return
        if not self._deck:
            self._deck = [what for what, cards in DECK.items() for _ in range(cards)]
            self._random.shuffle(self._deck)
        what, member = self._deck.pop(), self._random.choice(running)
        at = time.monotonic() - self._began
        self.strikes.append((at, member.number, what))
        say(f"{at:.1f} s: node {member.number}: kill -9 {what}")
        if what == DAEMON:
            member.node.strike()
            return
        if member.reading is not None and member.reading.ended():
            self._hear(member)
        member.node.kill()
        if member.reading is not None:
            member.reading.close()
            member.reading = None
        member.empty = what == EMPTIED
        member.back_at = time.monotonic() + self._random.uniform(*DOWN_S)

    def _bring_back(self, member: _Member) -> None:
        member.back_at = 0.0
        if member.empty:
            member.node.empty()
        member.node.start()
        if not member.finished_s:
            self.restarted += 1
            self._begin(member)

    def _begin(self, member: _Member) -> None:
        member.node.await_ready()
        member.reading = self._cluster.reading(member.node, REPO, member.node.mount(REPO))
        member.reading.go()

    def _hear(self, member: _Member) -> None:
        """What a reader found that has ended. After an error it begins again: all are to finish."""
        reading, member.reading = member.reading, None
        assert reading is not None
        try:
            with reading:
                found = reading.result(1.0)
            self.compared += found.bytes
            self._cluster.check(REPO, found, member.node)
        except Corrupt as error:
            self.wrong += 1
            self.errors.append(str(error))
        except MantaError as error:
            self.errors.append(f"node {member.number}: {str(error).splitlines()[0]}")
        else:
            member.finished_s = time.monotonic() - self._began
            return
        if len(self.errors) > ERRORS_MAX:
            raise Unavailable(f"Readers got {len(self.errors)} errors, the last: {self.errors[-1]}")
        self._begin(member)
