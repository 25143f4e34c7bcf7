"""The `warm` benchmark, here and only here; run by `benchmarks.__main__`.

A file that is complete and sealed in the cache, read through the mount, beside the same bytes in a file of the same disk.

Four ways of reading (sequential 4 MiB, random 1 MiB, an mmap scan, safetensors tensor by tensor), each with the page cache hot and dropped,
in rounds. Within a round, each way is measured on the native file and on each mount directly one after the other, in another order each
time; the figure is the median of the ratios of neighbours, so that a disk that slows down does not favour one. Beside it stands the
ratio of the fastest of each: noise only ever slows down, so where the two differ the machine had other things to do. What is
read is copied into memory and not digested: a digest would hide half of any difference. That the bytes are right is shown before, by
one pass of each way with a digest, which also makes the page cache hot.

CPU time is that of all Manta processes, daemon, workers and keeper, while a reader runs. Page cache: after a drop the file is read twice,
in order and through mmap; then cachestat tells how many bytes of page cache the mount's file has of its own and how many the cache's file
has. Passed through, a file has none of its own (mincore on a mapping of it would show those of the cache's file, and count them twice);
copied by the daemon, it has all of its bytes once more. Beside it stands how much more of Cached and Buffers /proc/meminfo shows since the
drop: of the whole machine, so it sees what cachestat is not asked about, and what others read meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import GIGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import BOTH, SESSIONS, Measurement, Mount, Rig, count, drop_page_cache, rig_options, say
from manta.errors import Corrupt, Invalid

SUMMARY = "reads of a file that is cached whole, beside a native file on the same disk"
PROGRAMS = ("ip", "tc", "nsenter", "fusermount3")

SEQUENTIAL_BYTES = 4 * 1024 * 1024
RANDOM_BYTES = 1024 * 1024
SEED = 20240901
NAME = "model.safetensors"

RATIO_MIN = 0.95
CPU_S_PER_GB_MAX = 0.05
"""A daemon that only opens the file: reads do not reach it. Copying costs ten times that at least."""
PAGE_CACHE_MAX = 1.1
"""Of the file's size. Held twice it is 2."""

NATIVE = "native"
HOT, DROPPED = "hot", "dropped"
TURNS = {HOT: 5, DROPPED: 2}
"""Measurements of a way in each round, by the page cache's state. From memory a read takes so little time that one says little; and a
virtual machine's disk may take twice as long for the same the next time."""
WAYS = ("sequential 4 MiB", "random 1 MiB", "mmap scan", "safetensors load")


class Case(NamedTuple):
    way: str
    state: str
    place: str
    """NATIVE or a session."""


class Place(NamedTuple):
    file: Path
    mount: Mount | None


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB", rate=0, fuse=(BOTH, *SESSIONS))
    parser.add_argument("--rounds", type=count, default=5, help="of everything (default: 5)")
    parser.add_argument("--seed", type=int, default=SEED, help="of the order of random reads (default: %(default)s)")


def run(options: argparse.Namespace) -> Report:
    report = Report("warm")
    sessions = SESSIONS if options.fuse == BOTH else (options.fuse,)
    found: dict[Case, list[Measurement]] = {}
    with Rig.set_up(options, {NAME: options.size}) as rig, ExitStack() as mounts:
        _require_memory(rig, sessions)
        native = rig.folder / NAME
        rig.write(NAME, native)
        places = {NATIVE: Place(native, None)}
        for session in sessions:
            mount = mounts.enter_context(rig.mounted(session=session))
            rig.prefetch(mount)
            places[session] = Place(mount.file(NAME), mount)
        bench = _Warm(rig, places, options.seed)
        orders = list(permutations(places))
        bench.check()
        for number in range(options.rounds):
            if number:
                bench.warm_up()
            for state, way in product(TURNS, WAYS):
                for turn in range(TURNS[state]):
                    for place in orders[(number + turn) % len(orders)]:
                        case = Case(way, state, place)
                        measured = bench.measure(case)
                        found.setdefault(case, []).append(measured)
                        report.runs.append({"round": number, **case._asdict(), **measured.document()})
        held = {place: bench.page_cache(place) for place in places}
        report.runs += [{"way": "page cache", "place": place, **told} for place, told in held.items()]
        report.notes.append(_readahead(places))
    report.table = [_row(case, found) for case in sorted(found, key=_order(list(places)))]
    report.table += [
        {"what": f"{_called(place)}: page cache after reads and mmap of all of it", **_shares(told, rig.size(NAME))}
        for place, told in held.items()
    ]
    if "kernel" in sessions:
        report.goals = _goals(found, held["kernel"], rig.size(NAME))
    report.chart = Chart(
        f"reads of {options.size / 2**30:.3g} GiB that are cached, by those of a native file",
        "ratio",
        [(f"{case.way}, {case.state}: {case.place}", _ratio(case, found)) for case in found if case.place != NATIVE],
        [("goal", RATIO_MIN)],
    )
    return report


class _Warm:
    """The measurements of one run."""

    def __init__(self, rig: Rig, places: Mapping[str, Place], seed: int) -> None:
        self._rig = rig
        self._places = places
        self._seed = seed

    def check(self) -> None:
        """Reads every file in every way, with digests. Raises Corrupt where the bytes are not the hub's.

        From a page cache that was dropped: written pages lie in it otherwise than read ones, and would be read at another speed.
        """
        drop_page_cache()
        tensors = set()
        for place in self._places:
            for way in WAYS:
                say(f"{_called(place)}: {way}, compared")
                found = self._read(way, place, digested=True)
                if way == WAYS[3]:
                    tensors.update(found.digests)
                else:
                    self._rig.check_digest(found, NAME, block=RANDOM_BYTES if way == WAYS[1] else 0)
        if len(tensors) != 1:
            raise Corrupt(f"the mounts' tensors are not the native file's: {len(tensors)} different digests")

    def warm_up(self) -> None:
        for place in self._places:
            self._read(WAYS[0], place)

    def measure(self, case: Case) -> Measurement:
        if case.state == DROPPED:
            drop_page_cache()
        say(f"{_called(case.place)}: {case.way}, {case.state}")
        return self._read(case.way, case.place)

    def page_cache(self, place: str) -> dict[str, int]:
        """Bytes of page cache after the file was read from a dropped state: of the files themselves, and of the machine."""
        file, mount = self._places[place]
        drop_page_cache()
        before = _meminfo("Cached") + _meminfo("Buffers")
        for way in (WAYS[0], WAYS[2]):
            self._read(way, place)
        after = _meminfo("Cached") + _meminfo("Buffers")
        files = [str(file), str(mount.data())] if mount is not None else [str(file)]
        told, _ = self._rig.ask(None, ["resident", *files])
        return {"resident": sum(told["resident"]), "machine": after - before}

    def _read(self, way: str, place: str, *, digested: bool = False) -> Measurement:
        file, mount = self._places[place]
        more = [] if digested else ["--no-digest"]
        if way == WAYS[3]:
            command = [sys.executable, "-m", "benchmarks.loaders", "tensors", str(file), *more]
            return self._rig.measure([command], mount, os.environ, settled=False)
        program = {
            WAYS[0]: ["sequential", str(file), "--block", str(SEQUENTIAL_BYTES)],
            WAYS[1]: ["random", str(file), "--block", str(RANDOM_BYTES), "--threads", "1", "--seed", str(self._seed)],
            WAYS[2]: ["mapped", str(file), "--block", str(SEQUENTIAL_BYTES)],
        }[way]
        return self._rig.read(mount, [[*program, *more]], settled=False)


def _require_memory(rig: Rig, sessions: tuple[str, ...]) -> None:
    """Raises Invalid where the files would not stay in the page cache, so that "hot" would mean nothing."""
    needed = rig.size(NAME) * (1 + sum(2 if session == "pyfuse3" else 1 for session in sessions))
    if needed > (available := _meminfo("MemAvailable")):
        raise Invalid(
            f"All copies of the file need {needed / 2**30:.1f} GiB of page cache, and {available / 2**30:.1f} GiB of memory are"
            " available: give a smaller --size, or one session with --fuse."
        )


def _meminfo(name: str) -> int:
    """Bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _readahead(places: Mapping[str, Place]) -> str:
    """What the kernel reads ahead on the disk and on each mount, a sentence."""
    told = []
    for place, (file, _) in places.items():
        device = file.parent.stat().st_dev
        setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        told.append(f"{_called(place)} {setting.read_text().strip() if setting.exists() else 'unknown'}")
    return f"read_ahead_kb: {', '.join(told)}. A file that is passed through is read ahead as the disk says, like the native one."


# The table and the goals -----------------------------------------------------------------------------------------------


def _called(place: str) -> str:
    return place if place == NATIVE else f"manta, {place} session"


def _order(places: Sequence[str]) -> Callable[[Case], tuple[int, int, int]]:
    states = list(TURNS)
    return lambda case: (states.index(case.state), WAYS.index(case.way), places.index(case.place))


def _ratio(case: Case, found: Mapping[Case, list[Measurement]]) -> float:
    """To the rate of the native file measured next to it, the median of all."""
    pairs = zip(found[case], _beside(case, found), strict=True)
    return median([ratio(ours.rate, theirs.rate) for ours, theirs in pairs])


def _beside(case: Case, found: Mapping[Case, list[Measurement]]) -> list[Measurement]:
    """The native file's, each next to one of the case's."""
    return found[case._replace(place=NATIVE)]


def _cpu(case: Case, found: Mapping[Case, list[Measurement]], group: str) -> float:
    return median([ratio(each.usage[group].cpu_s, each.size / GIGABYTE) for each in found[case]])


def _row(case: Case, found: Mapping[Case, list[Measurement]]) -> Row:
    rates = [each.rate / GIGABYTE for each in found[case]]
    row: Row = {
        "what": f"{case.way}, {case.state}: {_called(case.place)}",
        "GB/s": median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "/ native": _ratio(case, found),
        "fastest / native's": ratio(max(rates), max(each.rate for each in _beside(case, found)) / GIGABYTE),
        "reader CPU-s/GB": _cpu(case, found, "reader"),
    }
    if case.place != NATIVE:
        row["Manta CPU-s/GB"] = _cpu(case, found, "manta")
    return row


def _shares(told: Mapping[str, int], size: int) -> Row:
    return {"page cache / file": ratio(told["resident"], size), "meminfo / file": ratio(told["machine"], size)}


def _goals(found: Mapping[Case, list[Measurement]], held: Mapping[str, int], size: int) -> list[Goal]:
    """Of the kernel session: the other one copies, and is there to show what that costs."""
    cases = [Case(way, state, "kernel") for state, way in product(TURNS, WAYS)]
    return [
        *(Goal(f"rate / native: {case.way}, {case.state}", _ratio(case, found), ">=", RATIO_MIN) for case in cases),
        Goal(
            "CPU-s/GB of all Manta processes, the worst of these",
            max(_cpu(case, found, "manta") for case in cases),
            "<=",
            CPU_S_PER_GB_MAX,
        ),
        Goal("page cache / file", ratio(held["resident"], size), "<=", PAGE_CACHE_MAX),
    ]
