"""The `metadata` benchmark, here and only here; run by `benchmarks.__main__`.

find, stat and open over a repo of many files, beside the same over a native directory with as many.

find lists everything with its size; stat asks for each name without a listing. "first": a daemon that was just started has asked the hub
for the tree. "again": the kernel knows what it was told before. "dropped": it was made to forget that, the daemon knows the tree.
"restarted": another daemon, which has the tree in its cache. Then files are opened and closed: small ones and large ones, of which nothing
is cached and which are cached whole. None of that may ask the hub for anything but the tree's pages, with one exception: the kernel session
fetches a small file (`fuse.complete_at_open`) when it is opened, so opening small files that are not cached is fetching them, and has
no goal there. The large ones must be larger than that (--size), or this measures the same twice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Chart, Goal, Report, Row, median, quantile, ratio
from benchmarks.rig import REPO, Mount, Rig, count, drop_page_cache, rig_options
from manta.errors import Corrupt

SUMMARY = "find, stat and open over 10,000 files, beside a native directory"
PROGRAMS = ("ip", "tc", "nsenter", "find", "fusermount3")

SHELF_FILES = 100
SMALL_BYTES = 3000
LARGE_FILES = 20
OPENED_FILES = 1000
"""Small files that are opened, and how often the large ones are opened in all."""
OPENED, LARGE = "opened", "large"
"""The folders of those files: a folder is what can be prefetched."""
AGAIN = 5
"""Times that what the kernel has in memory is looked at; the median counts."""
PAGE_ENTRIES = 1000
"""Entries in one page of the hub's tree."""

COLD_SMALL = "small, not cached"

FIND_RATIO_MAX = {"kernel": 2.0, "pyfuse3": 8.0}
"""By session. The kernel session lets the kernel keep listings, so that its find is a loop in the kernel, as the native one is. pyfuse3 has
no way to do that: the daemon is asked for each."""
STAT_RATIO_MAX = 2.0
"""Names and attributes are the kernel's for a day: the daemon is not asked."""
OPENS_MIN = 1000.0


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="96MiB")
    parser.add_argument(
        "--files", type=count, default=10_000, help="in the repo, besides the large ones (default: 10000)"
    )


def run(options: argparse.Namespace) -> Report:
    opened = [f"{OPENED}/part-{at:05}.safetensors" for at in range(min(OPENED_FILES, options.files))]
    shelved = [f"shelf-{at // SHELF_FILES:03}/part-{at:05}.safetensors" for at in range(len(opened), options.files)]
    large = [f"{LARGE}/model-{at:05}.safetensors" for at in range(LARGE_FILES)]
    sizes = {**dict.fromkeys([*opened, *shelved], SMALL_BYTES), **dict.fromkeys(large, options.size)}
    with Rig.set_up(options, sizes) as rig:
        run_ = _Run(rig, list(sizes))
        native = rig.folder / "native"
        run_.lay_out(native)
        drop_page_cache()
        run_.walk("native", "dropped", native, None)
        run_.walk("native", "again", native, None)
        cache = rig.folder / "cache"
        with rig.mounted(cache) as mount:
            session = mount.session
            pages = rig.requests()
            run_.walk("mount", "first", mount.directory, mount)
            run_.walk("mount", "again", mount.directory, mount)
            drop_page_cache()
            run_.walk("mount", "dropped", mount.directory, mount)
            run_.open("large, not cached", mount, large)
            besides = sum(rig.requests().values()) - sum(pages.values())
            run_.open(COLD_SMALL, mount, opened)
            fetched = sum(rig.requests().values()) - sum(pages.values()) - besides
            for folder in (OPENED, LARGE):
                rig.prefetch(mount, f"{REPO}/{folder}")
            run_.open("small, cached", mount, opened)
            run_.open("large, cached", mount, large)
        with rig.mounted(cache) as mount:
            run_.walk("mount", "restarted", mount.directory, mount)
            again = rig.requests().get("tree", 0)
    folders = {name.rpartition("/")[0] for name in sizes}
    run_.conclude(
        pages=pages.get("tree", 0),
        pages_due=math.ceil((len(sizes) + len(folders)) / PAGE_ENTRIES),
        besides=besides if session == "kernel" else besides + fetched,
        again=again,
        session=session,
    )
    if fetched:
        run_.report.notes.append(
            f"the {session} session fetches a small file when it is opened: {fetched} requests to the hub for {len(opened)} files"
        )
    return run_.report


class _Run:
    """The measurements of one run, over files that are called `names`."""

    def __init__(self, rig: Rig, names: Sequence[str]) -> None:
        self.report = Report("metadata")
        self._rig = rig
        self._names = names
        self._sizes: Mapping[str, int] = {name: fact.size for name, fact in rig.facts.items()}
        self._seconds: dict[tuple[str, str, str], float] = {}
        self._opens: dict[str, float] = {}

    def lay_out(self, directory: Path) -> None:
        """The same names and sizes in a directory of the disk, without bytes."""
        for name in self._names:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.truncate(self._sizes[name])

    def walk(self, where: str, state: str, directory: Path, mount: Mount | None) -> None:
        """find, then stat by name. "dropped" is so for both; "again" is looked at a few times."""
        for program in (["find", str(directory)], ["stat", str(directory), "--names", self._listed(self._names)]):
            if state == "dropped":
                drop_page_cache()
            found = []
            cpu_s = 0.0
            for _ in range(AGAIN if state == "again" else 1):
                result, cpu_s = self._rig.ask(mount, program)
                if (result["entries"], result["total"]) != (len(self._names), sum(self._sizes.values())):
                    raise Corrupt(
                        f"{program[0]} saw {result['entries']} files of {result['total']} bytes on {directory}"
                    )
                found.append(result["ended"] - result["began"])
            seconds = self._seconds[where, state, program[0]] = median(found)
            self.report.runs.append(
                {"way": f"{where}: {program[0]}", "state": state, "seconds": found, "manta_cpu_s": cpu_s}
            )
            self.report.table.append(
                {
                    "what": f"{where}: {program[0]}, {state}",
                    "ms": 1000 * seconds,
                    "us per file": 1e6 * seconds / len(self._names),
                    "/ native": ratio(seconds, self._native(state, program[0])) if mount is not None else 1.0,
                }
            )

    def open(self, what: str, mount: Mount, names: Sequence[str]) -> None:
        """Opens and closes each file, OPENED_FILES times in all."""
        times = max(1, OPENED_FILES // len(names))
        result, cpu_s = self._rig.ask(
            mount, ["open", str(mount.directory), "--names", self._listed(names), "--times", str(times)]
        )
        taken, seconds = result["open_s"], result["ended"] - result["began"]
        self._opens[what] = len(taken) / seconds
        self.report.runs.append({"way": f"open: {what}", "seconds": seconds, "open_s": taken, "manta_cpu_s": cpu_s})
        row: Row = {
            "what": f"open and close: {what}",
            "per second": self._opens[what],
            "open p50 ms": 1000 * quantile(taken, 0.5),
            "open p99 ms": 1000 * quantile(taken, 0.99),
        }
        self.report.table.append(row)

    def conclude(self, *, pages: int, pages_due: int, besides: int, again: int, session: str) -> None:
        def compared(state: str, program: str) -> float:
            return ratio(self._seconds["mount", state, program], self._native("again", program))

        self.report.goals = [
            Goal("find again / native", compared("again", "find"), "<=", FIND_RATIO_MAX[session]),
            Goal("stat again / native", compared("again", "stat"), "<=", STAT_RATIO_MAX),
            *(
                Goal(f"opens per second: {what}", rate, ">=", OPENS_MIN)
                for what, rate in self._opens.items()
                if session != "kernel" or what != COLD_SMALL
            ),
            Goal("requests for the tree, beyond its pages", pages - pages_due, "==", 0),
            Goal("requests to the hub for find, stat, and open of what is not cached", besides, "==", 0),
            Goal("requests for the tree by a daemon that was restarted", again, "==", 0),
        ]
        self.report.chart = Chart(
            f"find and stat over {len(self._names):,} files",
            "ms",
            [(f"{where}: {program}, {state}", 1000 * s) for (where, state, program), s in self._seconds.items()],
        )

    def _native(self, state: str, program: str) -> float:
        """What the native directory took in the same state; in the kernel's memory it has only these two."""
        return self._seconds["native", "again" if state == "again" else "dropped", program]

    def _listed(self, names: Sequence[str]) -> str:
        path = self._rig.folder / f"names-{len(names)}"
        path.write_text("\n".join(names))
        return str(path)
