"""`python -m benchmarks NAME [options] --json FILE`: runs one benchmark, prints its table, writes its results, draws its chart.

Exit codes: 0 all goals met (or --no-goals), 1 a goal missed, 2 it could not be run, 128+N ended by signal N. `python -m benchmarks list`
names the benchmarks.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from benchmarks import (
    chart,
    churn,
    cluster,
    cold,
    faults,
    load,
    loopback,
    machine,
    metadata,
    parallel,
    peerpath,
    publish,
    simulate,
    survive,
    ttfb,
    warm,
)
from benchmarks.report import Report, encode
from benchmarks.rig import REPOSITORY
from manta.errors import MantaError
from manta.testing import netns
from manta.testing.hub import HubError

BENCHMARKS: dict[str, ModuleType] = {
    "cold": cold,
    "ttfb": ttfb,
    "parallel": parallel,
    "load": load,
    "faults": faults,
    "metadata": metadata,
    "loopback": loopback,
    "warm": warm,
    "survive": survive,
    "cluster": cluster,
    "churn": churn,
    "peerpath": peerpath,
    "publish": publish,
    "simulate": simulate,
}

MISSED = 1
NOT_RUN = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Manta's benchmarks.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    names.add_parser("list", help="name the benchmarks")
    for name, module in BENCHMARKS.items():
        sub = names.add_parser(name, help=module.SUMMARY, description=(module.__doc__ or "").partition("\n\n")[2])
        module.add_options(sub)
        sub.add_argument(
            "--json", type=Path, metavar="FILE", help="write the results here; the chart goes beside it as PNG"
        )
        sub.add_argument("--no-goals", action="store_true", help="exit with 0 also where a goal is missed")
        sub.add_argument("--no-chart", action="store_true", help="draw none")
    return parser


def main(arguments: list[str]) -> int:
    options = build_parser().parse_args(arguments)
    if options.name == "list":
        for name, module in BENCHMARKS.items():
            print(f"{name:10} {module.SUMMARY}")
        return 0
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _end)
    module = BENCHMARKS[options.name]
    try:
        machine.require(module.PROGRAMS)
        if "ip" in module.PROGRAMS and (reason := netns.obstacle()):
            raise MantaError(f"The hub cannot be put behind a link: {reason}")
        report: Report = module.run(options)
    except (MantaError, HubError) as error:
        print(f"benchmarks {options.name}: {error}", file=sys.stderr)
        return NOT_RUN
    except KeyboardInterrupt:
        print("interrupted; everything is cleaned up", file=sys.stderr)
        return 128 + signal.SIGINT
    _publish(report, options)
    return 0 if report.met or options.no_goals else MISSED


def _publish(report: Report, options: argparse.Namespace) -> None:
    """Writes the results before the chart, which is the part that may fail."""
    if options.json:
        document = report.document(machine.describe(options.scratch), machine.commit(REPOSITORY))
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(encode(document))
        if report.chart and not options.no_chart:
            if chart.possible():
                chart.draw(report.chart, options.json.with_suffix(".png"))
            else:
                report.notes.append("no chart: matplotlib is not installed (pip install manta[bench])")
    print(report.text())


def _end(signum: int, _frame: FrameType | None) -> NoReturn:
    """Leaves by way of every `with` block, so that mounts, namespaces and files go."""
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
