"""The `cluster` benchmark, here and only here; run by `benchmarks.__main__`.

Cold nodes behind equal links that read the same model at once, with the swarm on and off; or one node that joins a warm cluster (--join).

Each node is a real daemon with a FUSE mount and a cache of its own, in a network namespace behind a link that is limited both ways; the
hub is behind another. A plain reader on each takes one shard after the other, in order, and every byte is compared. The bound is what no
way of sharing can beat: one copy over the origin's link, or over a node's own, whichever takes longer. Without the swarm each node takes
its own copy from the origin. The links are slow enough that the machine is not what is measured: the share of its cores that nodes,
hub and readers took, and the share that was idle, stand beside.

With --join all but one node get the model first, over links without limit; then links are limited, and the last node is started and reads.
"""

from __future__ import annotations

import argparse

from benchmarks import rig
from benchmarks.fleet import ON, Round, fleet_options, nodes_of, origin_rate, patience_s, read, seconds_at, set_up, ways
from benchmarks.report import MEGABYTE, Chart, Curves, Goal, Report, Row, median, ratio
from benchmarks.rig import REPO, say
from manta.testing import netns
from manta.testing.cluster import Cluster, await_members

SUMMARY = "cold nodes behind equal links read the same model at once: origin copies and time, with the swarm on and off"
PROGRAMS = ("ip", "tc", "nsenter")

COPIES_MAX = 1.05
TO_BOUND_MAX = 1.5
JOIN_MIN = 0.9


def add_options(parser: argparse.ArgumentParser) -> None:
    fleet_options(parser, size="1GiB", nodes=8)
    parser.add_argument("--join", action="store_true", help="one node joins a cluster that has all of it")


def run(options: argparse.Namespace) -> Report:
    with set_up(options, options.nodes) as cluster:
        return _join(cluster, options) if options.join else _cold(cluster, options)


def _counts(nodes: int) -> list[int]:
    """1, 2, 4 ... up to `nodes`, and that."""
    return [*(1 << power for power in range(nodes.bit_length()) if 1 << power < nodes), nodes]


# All at once -----------------------------------------------------------------------------------------------------------


def _cold(cluster: Cluster, options: argparse.Namespace) -> Report:
    report = Report("cluster")
    rounds: dict[tuple[int, str], Round] = {}
    size = cluster.size(REPO)
    bound_s = max(seconds_at(size, origin_rate(options)), seconds_at(size, options.rate))
    for count in _counts(options.nodes):
        for way in ways(options):
            with nodes_of(cluster, options, count, way) as nodes:
                found = read(cluster, nodes, patience_s(options, size, count))
            say(
                f"{count} nodes, swarm {way}: {found.copies:.2f} copies, {max(found.seconds):.1f} s, {found.idle:.0%} idle"
            )
            rounds[count, way] = found
            report.runs.append({"nodes": count, "swarm": way, "bound_s": bound_s, **found.document()})
    report.table = [_row(count, way, found, bound_s) for (count, way), found in rounds.items()]
    if last := rounds.get((options.nodes, ON)):
        report.goals = [
            Goal(f"origin copies, {options.nodes} nodes, swarm on", last.copies, "<=", COPIES_MAX),
            Goal(
                f"slowest node / bound, {options.nodes} nodes, swarm on",
                ratio(max(last.seconds), bound_s),
                "<=",
                TO_BOUND_MAX,
            ),
        ]
    report.chart = Curves(
        f"{size / 2**30:.3g} GiB read at once by cold nodes, links {options.rate / 1e6:g} Mbit/s,"
        f" origin {origin_rate(options) / 1e6:g} Mbit/s",
        "nodes",
        "s until the slowest node has all",
        [
            *(
                (
                    f"swarm {way}",
                    [(count, max(found.seconds)) for (count, how), found in rounds.items() if how == way],
                )
                for way in ways(options)
            ),
            ("bound", [(count, bound_s) for count in _counts(options.nodes)]),
        ],
    )
    return report


def _row(count: int, way: str, found: Round, bound_s: float) -> Row:
    return {
        "nodes": count,
        "swarm": way,
        "origin copies": found.copies,
        "slowest s": max(found.seconds),
        "median s": median(found.seconds),
        "bound s": bound_s,
        "slowest / bound": ratio(max(found.seconds), bound_s),
        "CPU-s/GB": found.cpu_s_per_gb,
        "own CPU %": 100 * found.busy,
        "idle %": 100 * found.idle,
        **{f"{kind} requests": number for kind, number in sorted(found.requests.items())},
    }


# One joins -------------------------------------------------------------------------------------------------------------


def _join(cluster: Cluster, options: argparse.Namespace) -> Report:
    report = Report("cluster")
    size = cluster.size(REPO)
    found: dict[str, Round] = {}
    limited = (*((host, options.rate) for host in cluster.net.nodes), (cluster.net.origin, origin_rate(options)))
    for way in ways(options):
        with nodes_of(cluster, options, options.nodes, way, start=options.nodes - 1) as nodes:
            for host, _ in limited:
                cluster.net.set_rate(host, 0)
            if nodes[:-1]:
                read(cluster, nodes[:-1], patience_s(options, size, options.nodes))
            for host, rate in limited:
                cluster.net.set_rate(host, rate)
            nodes[-1].start()
            if way == ON:
                await_members(nodes)
            rig.drop_page_cache()
            cluster.hub.reset(content=False)
            found[way] = read(cluster, nodes[-1:], patience_s(options, size, 1))
        say(f"swarm {way}: {_rate(found[way]) / MEGABYTE:.1f} MB/s, {found[way].copies:.2f} copies")
        report.runs.append({"joined": options.nodes - 1, "swarm": way, **found[way].document()})
    link = netns.payload_rate(options.rate)
    report.table = [
        {
            "swarm": way,
            "warm nodes": options.nodes - 1,
            "MB/s": _rate(each) / MEGABYTE,
            "of its link": ratio(_rate(each), link),
            "origin bytes": each.origin_bytes,
            "CPU-s/GB": each.cpu_s_per_gb,
            "own CPU %": 100 * each.busy,
            "idle %": 100 * each.idle,
            **{f"{kind} requests": number for kind, number in sorted(each.requests.items())},
        }
        for way, each in found.items()
    ]
    if ON in found:
        report.goals = [
            Goal("rate of the joining node / its link", ratio(_rate(found[ON]), link), ">=", JOIN_MIN),
            Goal("bytes from the origin for the joining node", found[ON].origin_bytes, "==", 0),
        ]
    report.chart = Chart(
        f"one cold node joins {options.nodes - 1} warm ones, {size / 2**30:.3g} GiB, {options.rate / 1e6:g} Mbit/s links",
        "MB/s",
        [(f"swarm {way}", _rate(each) / MEGABYTE) for way, each in found.items()],
        [("its link", link / MEGABYTE)] if options.rate else [],
    )
    return report


def _rate(found: Round) -> float:
    return ratio(found.size, max(found.seconds))
