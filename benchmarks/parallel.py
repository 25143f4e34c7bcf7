"""The `parallel` benchmark, here and only here; run by `benchmarks.__main__`.

One cold file read by threads in random order and by processes through mmap, beside curl on the same link.

1 MiB reads, each block of the file once in random order, by 1, 2, 4 and 8 threads on one shared descriptor; then four processes that each
read the whole file through mmap. Each with a fresh mount and cache. The link is what curl gets, measured before, between and after.
The hub counts how often it sent each byte: once is all that is needed, however many read. "hub MB/s" is its rate while it was sending:
where the link was full and the readers were slow nevertheless, they were reading what had long come.
"""

from __future__ import annotations

import argparse

from benchmarks.report import GIGABYTE, MEGABYTE, Chart, Goal, Report, median, ratio
from benchmarks.rig import Rig, rig_options

SUMMARY = "random reads by 1 to 8 threads and mmap by four processes of a cold file, beside the link"
PROGRAMS = ("curl", "ip", "tc", "nsenter", "fusermount3")

BLOCK_BYTES = 1024 * 1024
THREADS = (1, 2, 4, 8)
PROCESSES = 4
RATIO_MIN = 0.9
SEED = 20240101
NAME = "model.safetensors"


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB")
    parser.add_argument("--seed", type=int, default=SEED, help="of the order of reads (default: %(default)s)")


def run(options: argparse.Namespace) -> Report:
    report = Report("parallel")
    links: list[float] = []
    with Rig.set_up(options, {NAME: options.size}) as rig:

        def measure_link() -> None:
            found = rig.download(NAME)
            links.append(found.rate)
            report.runs.append({"way": "curl", **found.document()})

        cases = [(f"{count} thread{'s' * (count > 1)}, random 1 MiB", count) for count in THREADS]
        for at, (label, threads) in enumerate([*cases, (f"{PROCESSES} processes, mmap", 0)]):
            if at % 2 == 0:
                measure_link()
            with rig.mounted() as mount:
                path = str(mount.file(NAME))
                if threads:
                    reading = ["random", path, "--block", str(BLOCK_BYTES)]
                    programs = [[*reading, "--threads", str(threads), "--seed", str(options.seed)]]
                else:
                    programs = [["mapped", path, "--block", str(BLOCK_BYTES)]] * PROCESSES
                found = rig.read(mount, programs)
                rig.check_digest(found, NAME, block=BLOCK_BYTES if threads else 0)
                rig.await_quiet()
                traffic, sending_s = rig.traffic(NAME), rig.sending_s()
            report.runs.append(
                {
                    "way": label,
                    **found.document(),
                    "sent": traffic.sent,
                    "sent_repeated": traffic.repeated,
                    "sending_s": sending_s,
                }
            )
            report.table.append(
                {
                    "what": label,
                    "MB/s": found.rate / MEGABYTE,
                    "ratio": None,
                    "hub MB/s": ratio(traffic.sent, sending_s) / MEGABYTE,
                    "sent by hub / size": ratio(traffic.sent, traffic.size),
                    "sent more than once": traffic.repeated,
                    "CPU-s/GB": found.usage["manta"].cpu_s / (found.size / GIGABYTE),
                    "peak RSS MB": found.usage["manta"].rss_peak / MEGABYTE,
                }
            )
            report.goals.append(Goal(f"bytes sent more than once: {label}", traffic.repeated, "==", 0))
        measure_link()
    link = median(links)
    bars = []
    for at, row in enumerate(report.table):
        rate = float(row["MB/s"] or 0) * MEGABYTE
        row["ratio"] = ratio(rate, link)
        report.goals.insert(at, Goal(f"rate / curl: {row['what']}", ratio(rate, link), ">=", RATIO_MIN))
        bars.append((str(row["what"]), rate / MEGABYTE))
    report.table.insert(0, {"what": f"curl, median of {len(links)}", "MB/s": link / MEGABYTE, "ratio": 1.0})
    report.chart = Chart(
        f"cold reads of {options.size / 2**30:.3g} GiB, {options.rate / 1e9:g} Gbit/s link",
        "MB/s",
        bars,
        [("curl, median", link / MEGABYTE), ("goal", RATIO_MIN * link / MEGABYTE)],
    )
    return report
