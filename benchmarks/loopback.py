"""The `loopback` benchmark, here and only here; run by `benchmarks.__main__`.

A cold file read once, in order, with no limit but this machine: what each byte costs.

Rounds of, each from a hub with nothing cached, in an order that is turned round every other time: curl to /dev/null, huggingface_hub's
download (without Xet, timed inside and without its imports) and aria2c with 8 connections, which write the file to the same disk; rclone
mount with --vfs-cache-mode off and full, and Manta's mount, which write it there (off: do not) and deliver it to a reader. That reader
takes 4 MiB blocks and does nothing with them; what came through Manta is digested in a second pass that is not timed.

CPU time per GB is the whole of what each way had to do, what it does after the reader's end included: Manta verifies sha256.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import origin, rclone
from benchmarks.report import GIGABYTE, MEGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import REPO, Measurement, Rig, count, drop_page_cache, rig_options, say

SUMMARY = "sequential read of a cold file without a limit, beside curl, hf download, aria2c and rclone mount"
PROGRAMS = ("curl", "aria2c", "rclone", "openssl", "ip", "tc", "nsenter", "fusermount3")

BLOCK_BYTES = 4 * 1024 * 1024
CONNECTIONS = 8
TO_RCLONE_MIN = 2.0
TO_DOWNLOAD_MIN = 1.0
"""At least as fast as the download that everybody uses, while also delivering to a reader."""
NAME = "model.safetensors"

CURL = "curl to /dev/null"
HF = "hf download"
ARIA = f"aria2c, {CONNECTIONS} connections"
RCLONE_OFF = "rclone mount, cache mode off"
RCLONE_FULL = "rclone mount, cache mode full"
MANTA = "manta mount"
WAYS = (CURL, HF, ARIA, RCLONE_OFF, RCLONE_FULL, MANTA)


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="4GiB", rate=0)
    parser.add_argument("--rounds", type=count, default=3, help="of everything (default: 3)")
    parser.add_argument("--tls", action="store_true", help="the hub speaks HTTPS, with a certificate made for this run")


def run(options: argparse.Namespace) -> Report:
    report = Report("loopback")
    found: dict[str, list[Measurement]] = {way: [] for way in WAYS}
    with Rig.set_up(options, {NAME: options.size}, tls=options.tls) as rig:
        measures: dict[str, Callable[[], Measurement]] = {
            CURL: lambda: rig.download(NAME),
            HF: lambda: _hf_download(rig),
            ARIA: lambda: _aria2c(rig),
            RCLONE_OFF: lambda: _rclone(rig, "off"),
            RCLONE_FULL: lambda: _rclone(rig, "full"),
            MANTA: lambda: _manta(rig),
        }
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                say(way)
                found[way].append(measures[way]())
                report.runs.append({"round": number, "way": way, **found[way][-1].document()})
    rates = {way: median([each.rate for each in found[way]]) for way in WAYS}
    report.table = [row for way in WAYS for row in _rows(way, found[way], rates)]
    report.goals = [
        Goal("Manta / rclone mount, the better mode", _compared(found, RCLONE_OFF, RCLONE_FULL), ">=", TO_RCLONE_MIN),
        Goal("Manta / hf download", _compared(found, HF), ">=", TO_DOWNLOAD_MIN),
    ]
    link = "HTTPS" if options.tls else "HTTP"
    report.chart = Chart(
        f"sequential cold read of {options.size / 2**30:.3g} GiB over {link}, no bandwidth limit",
        "MB/s",
        [(way, rates[way] / MEGABYTE) for way in WAYS],
    )
    return report


def _compared(found: dict[str, list[Measurement]], *rivals: str) -> float:
    """Manta's rate by the fastest rival's of the same round, the median of the rounds."""
    best = [max(each.rate for each in beside) for beside in zip(*(found[rival] for rival in rivals), strict=True)]
    return median([ratio(ours.rate, theirs) for ours, theirs in zip(found[MANTA], best, strict=True)])


# The ways, each from nothing cached ------------------------------------------------------------------------------------


def _hf_download(rig: Rig) -> Measurement:
    home = _fresh(rig, "hf-download")
    command = [sys.executable, "-m", "benchmarks.loaders", "download", REPO]
    found = rig.measure([command], environ=rig.hub.environment(home))
    shutil.rmtree(home)
    return found


def _aria2c(rig: Rig) -> Measurement:
    folder = _fresh(rig, "aria2c")
    command = ["aria2c", "--quiet", f"--split={CONNECTIONS}", f"--max-connection-per-server={CONNECTIONS}"]
    command += ["--min-split-size=1M", "--file-allocation=none", f"--dir={folder}", f"--out={NAME}", "--no-conf"]
    if authority := os.environ.get("SSL_CERT_FILE"):
        command.append(f"--ca-certificate={authority}")  # GnuTLS does not look there
    command.append(origin.file_url(rig.endpoint, REPO, NAME))
    found = rig.read(None, [["download", str(folder / NAME), "--", *command]])
    shutil.rmtree(folder)
    return found


def _rclone(rig: Rig, mode: rclone.CacheMode) -> Measurement:
    folder = _fresh(rig, "rclone")
    url = origin.signed_url(origin.file_url(rig.endpoint, REPO, NAME))
    with rclone.mounted(folder, NAME, rig.size(NAME), url, mode) as (file, pid):
        found = rig.read(None, [_unused(file)], {"rclone": pid})
    shutil.rmtree(folder)
    return found


def _manta(rig: Rig) -> Measurement:
    with rig.mounted() as mount:
        found = rig.read(mount, [_unused(mount.file(NAME))])
        again = rig.read(mount, [["sequential", str(mount.file(NAME)), "--block", str(BLOCK_BYTES)]])
        rig.check_digest(again, NAME)
    return found


def _fresh(rig: Rig, name: str) -> Path:
    """An empty folder, the page cache dropped and the hub's counters at zero."""
    folder = rig.folder / name
    folder.mkdir()
    drop_page_cache()
    rig.hub.reset(content=False)
    return folder


def _unused(file: Path) -> list[str]:
    return ["sequential", str(file), "--block", str(BLOCK_BYTES), "--no-digest"]


# The table --------------------------------------------------------------------------------------------------------------


def _rows(way: str, found: list[Measurement], rates: dict[str, float]) -> list[Row]:
    """One row for the way and one for each of its processes; medians over the rounds."""
    rows: list[Row] = [
        {
            "what": way,
            "GB/s": rates[way] / GIGABYTE,
            "/ hf download": ratio(rates[way], rates[HF]),
            "CPU-s/GB": _cpu(found, lambda each: sum(u.cpu_s for name, u in each.usage.items() if name != "hub")),
            "hub CPU-s/GB": _cpu(found, lambda each: each.usage["hub"].cpu_s),
            "rest of machine CPU-s/GB": _cpu(found, lambda each: each.others_cpu_s),
        }
    ]
    if len(found[0].usage) > 2:  # more than the hub and one program: who takes what
        for group in sorted(set(found[0].usage) - {"hub"}):
            shares = [sorted(each.usage[group].processes, key=lambda process: process.pid) for each in found]
            for processes in zip(*shares, strict=False):
                pairs = list(zip(processes, found, strict=True))
                used = median([process.cpu_s / each.size * GIGABYTE for process, each in pairs])
                rows.append({"what": f"  {processes[0].role}", "CPU-s/GB": used})
    return rows


def _cpu(found: list[Measurement], seconds: Callable[[Measurement], float]) -> float:
    return median([seconds(each) / each.size * GIGABYTE for each in found])
