"""The `ttfb` benchmark, here and only here; run by `benchmarks.__main__`.

The time to the first bytes of a cold file, beside a plain client of the same hub.

Each sample is a file nobody has touched yet: 4 KiB at a random offset, from before open() to the bytes. In turns with it a plain client
does what anyone must, one resolve and one ranged request. The hub waits before each answer (--latency). Both start when the hub is idle.
One file more is read first by both and does not count: it pays for what a process imports at its first request.
"""

from __future__ import annotations

import argparse
import random

from benchmarks import origin
from benchmarks.report import Chart, Goal, Report, Row, median, quantile, ratio
from benchmarks.rig import REPO, Rig, count, rig_options
from manta.errors import Corrupt

SUMMARY = "4 KiB at a random offset of a cold file, beside one resolve and one range request"
PROGRAMS = ("ip", "tc", "nsenter", "fusermount3")

LENGTH = 4096
RATIO_MAX = 1.3
SEED = 20240102
WARM_UP = "warm-up.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="64MiB")
    parser.add_argument("--samples", type=count, default=24, help="cold files, each read once (default: 24)")
    parser.add_argument(
        "--latency", type=float, default=0.05, metavar="SECONDS", help="of every answer of the hub (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of the offsets (default: %(default)s)")


def run(options: argparse.Namespace) -> Report:
    report = Report("ttfb")
    dice = random.Random(options.seed)
    names = [f"model-{number:05}.safetensors" for number in range(options.samples)]
    through: list[float] = []
    direct: list[origin.Fetch] = []
    with (
        Rig.set_up(options, dict.fromkeys([WARM_UP, *names], options.size), latency_s=options.latency) as rig,
        rig.mounted() as mount,
        rig.prober(LENGTH) as probe,
    ):
        for name in [WARM_UP, *names]:
            offset = dice.randrange(options.size - LENGTH + 1)
            rig.await_quiet()
            plain = origin.fetch(origin.file_url(rig.endpoint, REPO, name), offset, LENGTH)
            rig.await_quiet()
            found = probe(mount.file(name), offset)
            if found.digest != plain.digest:
                raise Corrupt(f"{name} at {offset}: the mount's {LENGTH} bytes are not those of the hub")
            if name == WARM_UP:
                continue
            through.append(found.seconds)
            direct.append(plain)
            report.runs.append(
                {
                    "file": name,
                    "offset": offset,
                    "mount_s": found.seconds,
                    "open_s": found.open_s,
                    "resolve_s": plain.resolve_s,
                    "range_s": plain.range_s,
                }
            )
    plain_s = [fetch.seconds for fetch in direct]
    report.table = [
        _row("plain: resolve", [fetch.resolve_s for fetch in direct]),
        _row("plain: range request", [fetch.range_s for fetch in direct]),
        _row("plain: both", plain_s),
        _row("mount: open to bytes", through),
    ]
    report.goals = [Goal("mount / plain, medians", ratio(median(through), median(plain_s)), "<=", RATIO_MAX)]
    report.chart = Chart(
        f"4 KiB of a cold file, {1000 * options.latency:g} ms of hub latency, {options.samples} files",
        "ms, median",
        [(str(row["what"]), float(row["median ms"] or 0)) for row in report.table],
        [("goal", 1000 * RATIO_MAX * median(plain_s))],
    )
    return report


def _row(what: str, seconds: list[float]) -> Row:
    figures = {"median": median(seconds), "p90": quantile(seconds, 0.9), "max": max(seconds)}
    return {"what": what, **{f"{name} ms": 1000 * value for name, value in figures.items()}}
