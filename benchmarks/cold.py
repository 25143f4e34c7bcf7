"""The `cold` benchmark, here and only here; run by `benchmarks.__main__`.

A cold file read once, in order, beside curl on the same link.

Rounds of one plain download by curl to /dev/null and one sequential read of 4 MiB blocks through a fresh mount, in turns which comes first,
so that a machine that slows down does not favour one. The figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from benchmarks.report import GIGABYTE, MEGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import Measurement, Rig, count, rig_options

SUMMARY = "sequential read of a cold file, beside curl on the same link"
PROGRAMS = ("curl", "ip", "tc", "nsenter", "fusermount3")

BLOCK_BYTES = 4 * 1024 * 1024
RATIO_MIN = 0.95
MEMORY_MAX = 300 * MEGABYTE
NAME = "model.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB")
    parser.add_argument("--rounds", type=count, default=3, help="rounds of curl and mount (default: 3)")


def run(options: argparse.Namespace) -> Report:
    report = Report("cold")
    plain: list[Measurement] = []
    mounted: list[Measurement] = []
    peaks: list[int] = []
    with Rig.set_up(options, {NAME: options.size}) as rig:
        for number in range(options.rounds):
            for way in ("curl", "mount") if number % 2 == 0 else ("mount", "curl"):
                if way == "curl":
                    plain.append(rig.download(NAME))
                    report.runs.append({"round": number, "way": way, **plain[-1].document()})
                    continue
                with rig.mounted() as mount:
                    found = rig.read(mount, [["sequential", str(mount.file(NAME)), "--block", str(BLOCK_BYTES)]])
                    rig.check_digest(found, NAME)
                    traffic = rig.traffic(NAME)
                mounted.append(found)
                peaks.append(found.usage["manta"].rss_peak)
                document = {"round": number, "way": way, **found.document(), "sent_repeated": traffic.repeated}
                report.runs.append(document)
    ratios = [ratio(through.rate, direct.rate) for through, direct in zip(mounted, plain, strict=True)]
    report.table = list(_rows(plain, mounted, ratios))
    report.goals = [
        Goal("mount / curl, median of rounds", median(ratios), ">=", RATIO_MIN),
        Goal(
            "bytes of memory of all Manta processes (sum of each one's peak RSS), worst round",
            max(peaks),
            "<=",
            MEMORY_MAX,
        ),
    ]
    report.chart = Chart(
        f"sequential cold read of {options.size / 2**30:.3g} GiB, {options.rate / 1e9:g} Gbit/s link",
        "MB/s",
        [(f"mount, round {at + 1}", found.rate / MEGABYTE) for at, found in enumerate(mounted)],
        [
            ("curl, median", median([found.rate for found in plain]) / MEGABYTE),
            ("goal", RATIO_MIN * median([found.rate for found in plain]) / MEGABYTE),
        ],
    )
    return report


def _rows(plain: list[Measurement], mounted: list[Measurement], ratios: list[float]) -> Iterator[Row]:
    """Medians over the rounds; memory of the worst round."""
    yield {
        "what": "curl",
        "MB/s": median([found.rate for found in plain]) / MEGABYTE,
        "ratio": 1.0,
    }
    yield {
        "what": "mount",
        "MB/s": median([found.rate for found in mounted]) / MEGABYTE,
        "ratio": median(ratios),
        "first byte ms": 1000 * median([found.first_byte_s for found in mounted]),
    }
    for group, name in (("manta", "mount: all Manta processes"), ("hub", "mount: hub"), ("reader", "mount: reader")):
        yield {
            "what": name,
            "CPU-s/GB": median([found.usage[group].cpu_s / (found.size / GIGABYTE) for found in mounted]),
            "peak RSS MB": max(found.usage[group].rss_peak for found in mounted) / MEGABYTE,
            "peak PSS MB": max(found.usage[group].pss_peak for found in mounted) / MEGABYTE,
        }
    last = mounted[-1]
    for process in sorted(last.usage["manta"].processes, key=lambda each: each.pid):
        yield {
            "what": f"  {process.role} (last round)",
            "CPU-s/GB": process.cpu_s / (last.size / GIGABYTE),
            "peak RSS MB": process.rss_peak / MEGABYTE,
        }
