"""The `simulate` benchmark, here and only here; run by `benchmarks.__main__`.

The swarm's own policy in discrete time (benchmarks/simulation): cold nodes that read the same model at once, as many as there may be,
behind links that this machine does not have. For each number of nodes: copies that the origin sent, and the time of the median, the 99th
percentile and the slowest node, beside the bound that no way of sharing can beat and beside the swarm turned off.

--compare FILE reads what `python -m benchmarks cluster --json FILE` measured, simulates the same model and numbers of nodes, and puts what
was predicted beside it. Nothing is fitted to the measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from benchmarks import rig
from benchmarks.fleet import LINK_RATE, SHARDS
from benchmarks.report import Report
from manta.config import Config, parse_size
from manta.errors import Absent

SUMMARY = "the swarm's policy in discrete time: origin copies and time for 10 to 10,000 nodes, or beside what `cluster` measured"
PROGRAMS = ()

NODES = "1,2,4,8,10,30,100,300,1000"
PROFILES = EQUAL, HETEROGENEOUS, CHURN = "equal", "heterogeneous", "churn"
SEED = 20250101


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=_numbers, default=_numbers(NODES), help=f"how many, each (default: {NODES})")
    parser.add_argument("--size", type=rig.file_size, default=parse_size("1GiB"), help="of the model (default: 1GiB)")
    parser.add_argument("--shards", type=rig.count, default=SHARDS, help=f"files of the model (default: {SHARDS})")
    parser.add_argument(
        "--link",
        "--rate",
        dest="rate",
        type=rig.link_rate,
        default=LINK_RATE,
        help=f"bits per second of a usual node's link (default: {LINK_RATE:g})",
    )
    parser.add_argument("--origin-link", type=rig.link_rate, help="of the origin's link (default: as the nodes')")
    parser.add_argument("--profile", choices=PROFILES, default=EQUAL, help="see docs (default: equal)")
    parser.add_argument("--spread", type=float, default=0.0, help="seconds within which the readers start (default: 0)")
    parser.add_argument("--slots", type=rig.count, default=Config().swarm.slots, help="uploads at a time")
    parser.add_argument(
        "--downloads", type=rig.count, default=Config().swarm.downloads, help="chunks from members at a time"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of all that is random (default: %(default)s)")
    parser.add_argument("--chart", choices=("time", "copies"), default="time", help="what is drawn (default: time)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what `cluster --json FILE` wrote")
    parser.set_defaults(scratch=Path())


def run(options: argparse.Namespace) -> Report:
    """Raises Absent without numpy, Invalid for a FILE that is none."""
    if importlib.util.find_spec("numpy") is None:
        raise Absent("The simulation needs numpy: pip install manta[bench], then run it again.")
    from benchmarks.simulation import study

    return study.compare(options) if options.compare else study.simulate(options)


def _numbers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = [0]
    if not 0 < numbers[0] <= numbers[-1] <= 100_000:
        raise argparse.ArgumentTypeError(f"not numbers of nodes: {text!r}")
    return numbers
