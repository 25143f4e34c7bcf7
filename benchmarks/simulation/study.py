"""What `python -m benchmarks simulate` runs: for each number of nodes, or for each run that was measured. Here and only here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.report import GIGABYTE, Curves, Goal, Report, Row, ratio
from benchmarks.rig import say
from benchmarks.simulate import CHURN, EQUAL, HETEROGENEOUS
from benchmarks.simulation.cluster import Cluster, Outcome
from benchmarks.simulation.order import Policy
from benchmarks.simulation.weather import PAYLOAD_SHARE, Weather, churning, equal, heterogeneous
from manta.errors import Invalid

COPIES_MAX = 1.05
TO_BOUND_MAX = 1.5
GOAL_NODES_MAX = 10
"""Goals are about as many nodes as can be measured too; beyond them the figures are what they are."""


def _weather(options: argparse.Namespace, nodes: int) -> Weather:
    rate, hub = options.rate / 8, (options.origin_link or options.rate) / 8
    shape: dict[str, Any] = {"hub": hub, "spread_s": options.spread, "seed": options.seed}
    if options.profile == HETEROGENEOUS:
        return heterogeneous(nodes, rate, **shape)
    if options.profile == CHURN:
        return churning(nodes, rate, 2 * options.size / (rate * PAYLOAD_SHARE), **shape)
    return equal(nodes, rate, **shape)


def simulate(options: argparse.Namespace) -> Report:
    report = Report("simulate")
    on: dict[int, Outcome] = {}
    off_s: dict[int, float] = {}
    for nodes in options.nodes:
        weather = _weather(options, nodes)
        on[nodes] = found = _run(weather, options, swarm=True)
        # Without the swarm all share the origin's link, and nothing else matters: a copy for each.
        off_s[nodes] = max(found.bound_s, nodes * found.size / weather.hub.rate)
        report.runs.append({"profile": options.profile, **asdict(found), "copies": found.copies})
        report.table.append(_row(found, off_s[nodes]))
        say(
            f"{nodes} nodes: {found.copies:.3f} copies, slowest {ratio(found.slowest_s, found.bound_s):.2f} x the bound"
        )
        if options.profile == EQUAL and 1 < nodes <= GOAL_NODES_MAX:
            report.goals.append(Goal(f"origin copies, {nodes} nodes", found.copies, "<=", COPIES_MAX))
            slowest = ratio(found.slowest_s, found.bound_s)
            report.goals.append(Goal(f"slowest node / bound, {nodes} nodes", slowest, "<=", TO_BOUND_MAX))

    report.chart = _chart(options, on)
    return report


def _chart(options: argparse.Namespace, on: dict[int, Outcome]) -> Curves:
    """Time or copies against the number of nodes."""
    kinds: dict[str, tuple[str, list[tuple[str, Callable[[Outcome], float]]]]] = {
        "time": (
            "seconds",
            [
                ("slowest node", lambda found: found.slowest_s),
                ("median", lambda found: found.median_s),
                ("bound", lambda found: found.bound_s),
            ],
        ),
        "copies": (
            "copies of the model",
            [
                ("from the origin", lambda found: found.copies),
                ("wasted in transfers that broke off", lambda found: found.wasted_bytes / found.size),
                ("one", lambda _: 1.0),
            ],
        ),
    }
    unit, curves = kinds[options.chart]
    size, rate = f"{options.size / 2**30:.3g} GiB", f"{options.rate / 1e6:g} Mbit/s"
    return Curves(
        f"{size} read at once by cold nodes ({options.profile}), simulated: links {rate}",
        "nodes",
        unit,
        [(label, [(nodes, value(found)) for nodes, found in on.items()]) for label, value in curves],
        logarithmic=len(on) > 3 and max(on) >= 100,
    )


def _run(weather: Weather, options: argparse.Namespace, *, swarm: bool) -> Outcome:
    policy = Policy(swarm=swarm, slots=options.slots, downloads=options.downloads)
    return Cluster(weather, options.size, policy, shards=options.shards, seed=options.seed).run()


def _row(found: Outcome, off_s: float) -> Row:
    nodes = found.nodes
    return {
        "nodes": nodes,
        "origin copies": found.copies,
        "median s": found.median_s,
        "p99 s": found.p99_s,
        "slowest s": found.slowest_s,
        "bound s": found.bound_s,
        "slowest / bound": ratio(found.slowest_s, found.bound_s),
        "swarm off s": off_s,
        "GB exchanged": found.peer_bytes / GIGABYTE,
        "wasted GB": found.wasted_bytes / GIGABYTE,
        "asked / node": found.asked / nodes,
        "busy / node": found.busy / nodes,
        "failed": found.failed,
        "crashes": found.crashes,
    }


# Beside a measurement --------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> Report:
    report = Report("simulate")
    measured = _measured(options.compare)
    predicted: dict[tuple[int, bool], Outcome] = {}
    for run in measured:
        nodes, swarm = int(run["nodes"]), run["swarm"] == "on"
        options.size = int(run["bytes"])
        found = predicted[nodes, swarm] = _run(_weather(options, nodes), options, swarm=swarm)
        seconds = [float(each) for each in run["seconds"]]
        report.runs.append({"measured": run, "predicted": {**asdict(found), "copies": found.copies}})
        report.table.append(
            {
                "nodes": nodes,
                "swarm": str(run["swarm"]),
                "copies measured": ratio(run["origin_bytes"], run["bytes"]),
                "copies predicted": found.copies,
                "slowest s measured": max(seconds),
                "slowest s predicted": found.slowest_s,
                "predicted / measured": ratio(found.slowest_s, max(seconds)),
                "bound s": found.bound_s,
            }
        )
    report.notes.append(
        "links and size are those given here; they must be those of the measurement (--link, --origin-link, --shards)"
    )
    report.chart = Curves(
        "measured in network namespaces, and predicted",
        "nodes",
        "s until the slowest node has all",
        [
            (
                f"{what}, swarm {way}",
                [(n, seconds) for n, how, seconds in _slowest(measured, predicted, what) if how == way],
            )
            for way in dict.fromkeys(str(run["swarm"]) for run in measured)
            for what in ("measured", "predicted")
        ],
    )
    return report


def _slowest(
    measured: list[dict[str, Any]], predicted: dict[tuple[int, bool], Outcome], what: str
) -> list[tuple[int, str, float]]:
    found = []
    for run in measured:
        nodes, way = int(run["nodes"]), str(run["swarm"])
        seconds = max(run["seconds"]) if what == "measured" else predicted[nodes, way == "on"].slowest_s
        found.append((nodes, way, float(seconds)))
    return found


def _measured(path: Path) -> list[dict[str, Any]]:
    """The runs of a `cluster` benchmark. Raises Invalid."""
    try:
        runs = json.loads(path.read_text())["runs"]
        for run in runs:
            if not {"nodes", "swarm", "seconds", "origin_bytes", "bytes"} <= run.keys():
                raise ValueError("a run lacks nodes, swarm, seconds, origin_bytes or bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Invalid(f"{path} is no result of `python -m benchmarks cluster --json FILE`: {error}.") from error
    return list(runs)
