"""The `load` benchmark, here and only here; run by `benchmarks.__main__`.

safetensors' load_file through the mount, beside downloading first and loading from disk.

What a serving process does at its start, on the same link: either huggingface_hub's snapshot_download and then load_file, or load_file
at once through a cold mount. Then the warm cases: again in another process, and with the page cache dropped, from disk and from Manta's
chunk cache. All loads must yield the same tensors, which a digest over their names and bytes shows.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from benchmarks.report import GIGABYTE, MEGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import REPO, Measurement, Mount, Rig, count, drop_page_cache, rig_options
from manta.errors import Corrupt

SUMMARY = "safetensors load_file through the mount, beside hf download and a load from disk"
PROGRAMS = ("ip", "tc", "nsenter", "fusermount3")

RATIO_MAX = 1.0
"""Loading through a cold mount has to beat its rival, which writes everything to disk before it reads the first tensor."""
NAME = "model.safetensors"

DOWNLOAD = "hf download"
DISK = "load_file from disk, just downloaded"
DISK_COLD = "load_file from disk, page cache dropped"
COLD = "load_file through the mount, cold"
WARM = "load_file through the mount, again"
CACHED = "load_file through the mount, page cache dropped, chunks cached"
STEPS = (DOWNLOAD, DISK, COLD, WARM, DISK_COLD, CACHED)


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB")
    parser.add_argument("--rounds", type=count, default=1, help="of everything (default: 1)")


def run(options: argparse.Namespace) -> Report:
    report = Report("load")
    found: dict[str, list[Measurement]] = {step: [] for step in STEPS}
    repeated = again = 0
    with Rig.set_up(options, {NAME: options.size}) as rig:
        for number in range(options.rounds):

            def record(step: str, measured: Measurement, number: int = number) -> None:
                found[step].append(measured)
                report.runs.append({"round": number, "way": step, **measured.document()})

            home = rig.folder / f"hf-{number}"
            drop_page_cache()
            environ = rig.hub.environment(home)
            record(DOWNLOAD, rig.measure([_loader("download", REPO)], None, environ))
            file = next((home / "hub").glob(f"*/snapshots/*/{NAME}"))
            record(DISK, _load(rig, file))
            drop_page_cache()
            record(DISK_COLD, _load(rig, file))
            cache = rig.folder / f"kept-{number}"
            with rig.mounted(cache) as mount:
                record(COLD, _load(rig, mount.file(NAME), mount))
                record(WARM, _load(rig, mount.file(NAME), mount))
                repeated += rig.traffic(NAME).repeated
            with rig.mounted(cache) as mount:
                record(CACHED, _load(rig, mount.file(NAME), mount))
                again += rig.traffic(NAME).sent
            shutil.rmtree(home)
            shutil.rmtree(cache)
    digests = {digest for step in STEPS for measured in found[step] for digest in measured.digests}
    if len(digests) != 1:
        raise Corrupt(f"the loads did not yield the same tensors: {len(digests)} different digests")
    seconds = {step: median([measured.seconds for measured in found[step]]) for step in STEPS}
    rival = seconds[DOWNLOAD] + seconds[DISK]
    size = found[COLD][0].size
    report.table = [_row(step, seconds[step], size, rival, found[step]) for step in STEPS]
    report.table.insert(2, _row("hf download, then load_file", rival, size, rival, []))
    report.goals = [
        Goal("cold load through the mount / hf download and load", ratio(seconds[COLD], rival), "<=", RATIO_MAX),
        Goal("bytes sent more than once by the hub", repeated, "==", 0),
        Goal("bytes sent by the hub for a file in the chunk cache", again, "==", 0),
    ]
    report.chart = Chart(
        f"loading {size / 2**30:.3g} GiB of tensors, {options.rate / 1e9:g} Gbit/s link",
        "s",
        [(str(row["what"]), float(row["s"] or 0)) for row in report.table],
    )
    return report


def _load(rig: Rig, file: Path, mount: Mount | None = None) -> Measurement:
    return rig.measure([_loader("load", str(file))], mount, os.environ)


def _loader(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.loaders", *arguments]


def _row(what: str, seconds: float, size: int, rival: float, found: list[Measurement]) -> Row:
    row: Row = {
        "what": what,
        "s": seconds,
        "MB/s": size / seconds / MEGABYTE,
        "/ download and load": ratio(seconds, rival),
    }
    manta = [measured.usage["manta"] for measured in found if "manta" in measured.usage]
    if manta:
        row["Manta CPU-s/GB"] = median([usage.cpu_s for usage in manta]) / (size / GIGABYTE)
        row["Manta peak RSS MB"] = max(usage.rss_peak for usage in manta) / MEGABYTE
    return row
