"""The `survive` benchmark, here and only here; run by `benchmarks.__main__`.

Four readers (sequential, random, mmap, safetensors), while daemon, workers and keeper are killed at random moments: what do they notice?

Rounds over a folder of files that nothing is cached of: it is mounted, four readers begin at four different files and each reads all of
them, cold ones first and then those that the others have had fetched; every byte is compared (benchmarks/witnesses.py). The link
limits how fast cold bytes come (--rate), so that most of a round is cold. Then it is unmounted and evicted, and another folder is next; a
folder whose turn comes again is cold again. Another repo stays mounted all the while, so that one daemon, and what follows it, serves all
rounds, kept by one keeper.

What is struck next, and when, is drawn from the seed: cards of a shuffled deck (DECKS), a random time after Manta is back from the last.
Back is when the control socket answers for a daemon with another pid, or the workers or the keeper are there again. Cold: the hub
was sending at that moment. The stall of a kill is the longest read that was under way at some time from the kill until Manta was back; a
read is one call: an open, up to 4 MiB by read, one MiB through a mapping, one tensor of 4 MiB. For comparison there are the reads that no
kill touched: a cold one waits for its share of the link also without a kill.

pyfuse3 cannot outlive its process: with it only workers are struck.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from benchmarks import witnesses
from benchmarks.report import GIGABYTE, Chart, Goal, Report, Row, quantile, ratio
from benchmarks.rig import (
    ANCHOR,
    EXIT_TIMEOUT_S,
    READER_TIMEOUT_S,
    REPO,
    SLOWDOWN_MAX,
    UNLIMITED_RATE,
    Mount,
    Rig,
    count,
    rig_options,
    say,
    start,
)
from benchmarks.sampler import command_line, descendants, role
from manta.control.protocol import GcRequest
from manta.errors import MantaError, Unavailable
from manta.testing import scratch

SUMMARY = "four readers while daemon, workers and keeper are killed at random moments: errors, wrong bytes, stalls"
PROGRAMS = ("ip", "tc", "nsenter", "fusermount3")

FILES = 4
FOLDERS = 3
"""Taken in turns: a folder comes again when two others have been read since it was evicted."""
TENSOR_ROWS = 512
"""Of 8 KiB: a tensor is one read, so it must not take long by itself."""

KILLS = 100
SEED = 20241001
GAP_S = (0.1, 8.0)
"""From being back to the next kill: some come while Manta has hardly begun to fetch again. On average longer than the four seconds that a
daemon must live not to be a crash loop, at which its keeper gives up (keeper.CRASHES_MAX)."""
BACK_TIMEOUT_S = 60
EVICT_TIMEOUT_S = 60
POLL_S = 0.01
NOTES_MAX = 20
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
STATUS_TIMEOUT_S = 2.0

COLD_SHARE_MIN = 0.5

DAEMON, ALL, WORKER, WORKERS = "kill -9 daemon", "kill -9 daemon and workers", "kill -9 a worker", "kill -9 all workers"
KEEPER, RESTART = "kill -9 keeper", "manta restart"
DECKS: dict[str, dict[str, int]] = {
    "kernel": {DAEMON: 12, ALL: 3, WORKER: 2, KEEPER: 1, RESTART: 2},
    "pyfuse3": {WORKER: 3, WORKERS: 1},
}
"""What strikes, and how many cards of it there are, by session."""


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB", rate=500_000_000, fuse=tuple(DECKS))
    parser.add_argument("--kills", type=count, default=KILLS, help=f"of any kind (default: {KILLS})")
    parser.add_argument("--seed", type=int, default=SEED, help="of what is struck when (default: %(default)s)")


@dataclass(slots=True)
class Strike:
    what: str
    round: int
    cold: bool
    at: float
    """time.monotonic(), as all times here."""
    back_s: float = math.nan
    """NaN: it never came back."""
    stall_s: float = 0.0
    stalled: str = ""
    """Which reader's read that was, and after how many others of its round."""


@dataclass(slots=True)
class Reads:
    """What one reader's log says, in the order of its reads, of which none overlaps the next."""

    began: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, log: Path) -> Reads:
        reads = cls()
        content = log.read_bytes() if log.exists() else b""
        whole = len(content) - len(content) % witnesses.RECORD.size  # one that was killed leaves a part of a record
        for began, took in witnesses.RECORD.iter_unpack(content[:whole]):
            reads.began.append(began)
            reads.took.append(took)
        return reads

    def during(self, start: float, end: float) -> range:
        """Those that were under way at some time in [start, end]."""
        first = bisect_left(self.began, start)
        if first and self.began[first - 1] + self.took[first - 1] > start:
            first -= 1
        return range(first, bisect_left(self.began, end))


class _Wedged(Exception):
    """Nothing can go on: a reader that waits for good, or a daemon that does not come back. That is a result, not a run that failed."""


def run(options: argparse.Namespace) -> Report:
    folders = [f"round-{number}" for number in range(FOLDERS)]
    names = [f"model-{number + 1:05}-of-{FILES:05}.safetensors" for number in range(FILES)]
    sizes = {f"{folder}/{name}": options.size // FILES for folder in folders for name in names}
    trial = _Trial(options)
    # Leaving by an exception, the rig takes everything away without asking a daemon that may not answer.
    with suppress(_Wedged), Rig.set_up(options, sizes, rows_max=TENSOR_ROWS) as rig:
        with rig.mounted(target=ANCHOR) as mount:
            number = 0
            while len(trial.strikes) < options.kills:
                try:
                    trial.round(rig, mount, number, folders[number % FOLDERS])
                except MantaError as error:
                    trial.notes.append(f"round {number} was the last: {error}{rig.logs()}")
                    raise _Wedged from error
                number += 1
        if scratch.await_end(rig.keepers(), EXIT_TIMEOUT_S):
            raise Unavailable(f"a keeper still runs {EXIT_TIMEOUT_S} s after the last umount: {rig.keepers()}")
    return trial.report()


class _Trial:
    """The rounds of one run, and what they showed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.strikes: list[Strike] = []
        self._options = options
        self._random = random.Random(options.seed)
        self._deck: list[str] = []
        self._seen = {kind: witnesses.Testimony() for kind in witnesses.KINDS}
        self._calm: list[float] = []
        """How long each read took that no strike touched."""
        self.notes: list[str] = []

    def round(self, rig: Rig, mount: Mount, number: int, folder: str) -> None:
        """Raises MantaError where there can be no other."""
        files = {
            name.partition("/")[2]: witnesses.Expected(spec, rig.facts[name].sha256)
            for name, spec in rig.specs.items()
            if name.startswith(f"{folder}/")
        }
        listed = rig.folder / f"{folder}.json"
        listed.write_bytes(msgspec.json.encode(files))
        logs = {kind: rig.folder / f"{folder}-{kind}.log" for kind in witnesses.KINDS}
        with rig.bound(f"{REPO}/{folder}", mount.cache, self._options.fuse) as directory:
            processes = {kind: self._witness(kind, number, directory, listed, log) for kind, log in logs.items()}
            began = len(self.strikes)
            try:
                self._await_reads(list(logs.values()))
                self._strike_while(rig, mount, number, list(processes.values()))
            finally:
                rig.stop(list(processes.values()))
                for kind, process in processes.items():
                    self._hear(kind, process)
                self._attribute(self.strikes[began:], {kind: Reads.of(log) for kind, log in logs.items()})
        _evict(mount)

    def _witness(self, kind: str, number: int, directory: Path, listed: Path, log: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.witnesses", kind, str(directory), "--files", str(listed)]
        command += ["--log", str(log), "--seed", str(self._options.seed + number)]
        return start(command, os.environ)

    def _await_reads(self, logs: Sequence[Path]) -> None:
        """Until all readers have started: a kill before would strike nobody."""
        deadline = time.monotonic() + READER_TIMEOUT_S
        while not all(log.exists() for log in logs):
            if time.monotonic() > deadline:
                raise Unavailable(f"readers did not start in {READER_TIMEOUT_S} s")
            time.sleep(POLL_S)

    def _strike_while(self, rig: Rig, mount: Mount, number: int, processes: Sequence[subprocess.Popen[str]]) -> None:
        """Until the readers have ended: strikes, as long as there were not enough."""
        rate = (self._options.rate or UNLIMITED_RATE) / 8
        deadline = time.monotonic() + READER_TIMEOUT_S + SLOWDOWN_MAX * self._options.size / rate
        next_at = time.monotonic() + self._random.uniform(*GAP_S)
        while any(process.poll() is None for process in processes):
            if len(self.strikes) < self._options.kills and time.monotonic() >= next_at:
                deadline += self._strike(rig, mount, number)
                next_at = time.monotonic() + self._random.uniform(*GAP_S)
            if time.monotonic() > deadline:
                raise Unavailable("readers were still waiting long after they should have ended")
            time.sleep(POLL_S)

    def _strike(self, rig: Rig, mount: Mount, number: int) -> float:
        """Seconds until Manta was back. Raises Unavailable where it was not in time."""
        if not self._deck:
            self._deck = [what for what, cards in DECKS[self._options.fuse].items() for _ in range(cards)]
            self._random.shuffle(self._deck)
        what = self._deck.pop()
        target = _Target(rig, mount)
        traffic = rig.hub.stats().origins.get("cdn")
        cold = traffic is not None and traffic.in_flight > 0
        strike = Strike(what, number, cold, time.monotonic())
        self.strikes.append(strike)
        is_back = target.strike(what, self._random)
        while not is_back():
            if time.monotonic() > strike.at + BACK_TIMEOUT_S:
                raise Unavailable(f"not back {BACK_TIMEOUT_S} s after {what}")
            time.sleep(POLL_S)
        strike.back_s = time.monotonic() - strike.at
        say(f"{len(self.strikes)}: {what}, {'cold' if cold else 'warm'}: back after {strike.back_s:.2f} s")
        return strike.back_s

    def _hear(self, kind: str, process: subprocess.Popen[str]) -> None:
        seen = self._seen[kind]
        output = errors = ""
        with suppress(subprocess.TimeoutExpired):  # not even SIGKILL and an aborted mount ended it: an error as well
            output, errors = process.communicate(timeout=EXIT_TIMEOUT_S)
        if process.returncode != 0:
            seen.errors += 1
            told = [f"ended with {process.returncode}: {errors.strip()[-400:]}"]
        else:
            heard = msgspec.json.decode(output, type=witnesses.Testimony)
            for name in ("bytes", "reads", "errors", "wrong"):
                setattr(seen, name, getattr(seen, name) + getattr(heard, name))
            told = heard.complaints
        self.notes += [f"{kind} reader: {what}" for what in told]

    def _attribute(self, strikes: Sequence[Strike], readers: Mapping[str, Reads]) -> None:
        """To each strike the longest read that it may have held up; the other reads are calm."""
        for kind, reads in readers.items():
            touched = set()
            for strike in strikes:
                back = strike.at + (BACK_TIMEOUT_S if math.isnan(strike.back_s) else strike.back_s)
                for at in reads.during(strike.at, back):
                    touched.add(at)
                    if reads.took[at] > strike.stall_s:
                        strike.stall_s, strike.stalled = reads.took[at], f"{kind} {at}"
            self._calm += [took for at, took in enumerate(reads.took) if at not in touched]

    # -- what it showed ---------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        report = Report("survive", notes=self.notes[:NOTES_MAX])
        report.runs = [asdict(strike) | {"back_s": _known(strike.back_s)} for strike in self.strikes]
        report.runs += [{"reader": kind, **msgspec.to_builtins(seen)} for kind, seen in self._seen.items()]
        kinds = [what for what in DECKS[self._options.fuse] if any(strike.what == what for strike in self.strikes)]
        groups = {
            "all kills": self.strikes,
            "  of cold loads": [strike for strike in self.strikes if strike.cold],
            "  of warm loads": [strike for strike in self.strikes if not strike.cold],
            **{what: [strike for strike in self.strikes if strike.what == what] for what in kinds},
        }
        report.table = [_row(what, strikes) for what, strikes in groups.items()]
        report.table.append({"what": "reads that no kill touched", **_spread("stall s", self._calm)})
        report.table += [
            {
                "what": f"{kind} reader",
                "GB compared": seen.bytes / GIGABYTE,
                "reads": seen.reads,
                "errors": seen.errors,
                "wrong": seen.wrong,
            }
            for kind, seen in self._seen.items()
        ]
        cold = sum(strike.cold for strike in self.strikes)
        report.goals = [
            Goal("errors that readers got", sum(seen.errors for seen in self._seen.values()), "==", 0),
            Goal("reads with wrong bytes", sum(seen.wrong for seen in self._seen.values()), "==", 0),
            Goal(
                "kills after which Manta was back",
                sum(not math.isnan(strike.back_s) for strike in self.strikes),
                "==",
                self._options.kills,
            ),
            Goal(
                "share of the kills that came during cold loads", ratio(cold, len(self.strikes)), ">=", COLD_SHARE_MIN
            ),
        ]
        stalls = [strike.stall_s for strike in self.strikes]
        report.chart = Chart(
            f"the longest read around each of {len(self.strikes)} kills",
            "s",
            [(name, quantile(stalls, share)) for name, share in QUANTILES.items()],
        )
        return report


class _Target:
    """Manta's processes as they are now."""

    def __init__(self, rig: Rig, mount: Mount) -> None:
        self._rig = rig
        self._mount = mount
        self._daemon = mount.client.status().pid

    def strike(self, what: str, rng: random.Random) -> Callable[[], bool]:
        """Kills; returns what tells whether Manta is back."""
        workers = self._workers()
        if what == RESTART:
            self._rig.manta("restart", "--cache-dir", str(self._mount.cache))
            return self._has_another_daemon
        if what == KEEPER:
            before = set(self._rig.keepers())
            _kill(before)
            return lambda: bool(set(self._rig.keepers()) - before)
        if what in (WORKER, WORKERS):
            struck = {rng.choice(sorted(workers))} if what == WORKER else workers
            _kill(struck)
            return lambda: len(self._workers() - struck) >= len(workers)
        _kill({self._daemon} | (workers if what == ALL else set()))
        return self._has_another_daemon

    def _workers(self) -> set[int]:
        return {pid for pid in descendants([self._daemon]) if role(command_line(pid)).startswith("manta.worker")}

    def _has_another_daemon(self) -> bool:
        with suppress(MantaError):
            return self._mount.client.status(timeout_s=STATUS_TIMEOUT_S).pid != self._daemon
        return False


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _evict(mount: Mount) -> None:
    """Until nothing is cached. What is mounted cannot go, so nobody has read the anchor."""
    deadline = time.monotonic() + EVICT_TIMEOUT_S
    while mount.client.collect(GcRequest(size=0)) and mount.client.status().cache_bytes > 0:
        if time.monotonic() > deadline:
            raise Unavailable(f"the cache still had an unmounted folder's files after {EVICT_TIMEOUT_S} s")
        time.sleep(0.1)


def _row(what: str, strikes: Sequence[Strike]) -> Row:
    back = [strike.back_s for strike in strikes if not math.isnan(strike.back_s)]
    return {
        "what": what,
        "kills": len(strikes),
        "back s p50": _known(quantile(back, 0.5)),
        "back s max": max(back, default=None),
        **_spread("stall s", [strike.stall_s for strike in strikes]),
    }


def _spread(name: str, seconds: Sequence[float]) -> Row:
    return {f"{name} {quantile_}": _known(quantile(seconds, share)) for quantile_, share in QUANTILES.items()}


def _known(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds
