"""What the benchmarks of clusters share, here and only here: a model of a few shards, links, and nodes that read it at once.

    with set_up(options) as cluster, nodes_of(cluster, options, 8, swarm=True) as nodes:
        found = read(cluster, nodes, bound_s(...))

Used by `cluster` and `churn`. The cluster itself is `manta.testing.cluster`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import rig
from benchmarks.report import GIGABYTE, ratio
from benchmarks.rig import READER_TIMEOUT_S, REPO, SLOWDOWN_MAX, UNLIMITED_RATE, seeded_tensors
from benchmarks.sampler import GroupUsage, Sampler, machine_times
from manta.config import parse_size
from manta.errors import Invalid, Unavailable
from manta.testing import netns
from manta.testing.cluster import Cluster, Node, await_members, start_all
from manta.testing.hub import HubSpec, RepoSpec, Text
from manta.testing.reading import Found

SHARDS = 4

LINK_RATE = 100_000_000
"""Bits per second of each link: 12 MB/s of payload, 96 MB/s for eight nodes together. Measured on a busy machine with two cores, without
the swarm and with an origin of eight times the link, so that all eight fetch at their links' rate: nodes, hub and readers took 47 % of the
cores here (the slowest 1.10 times the bound), 68 % at 200 Mbit/s (1.21), 77 % and all that was left at 400 (1.50)."""

ON, OFF, BOTH = "on", "off", "both"


def fleet_options(parser: argparse.ArgumentParser, *, size: str, nodes: int) -> None:
    """The options of a benchmark of a cluster, with its own default of bytes and nodes."""
    parser.add_argument(
        "--size",
        type=rig.file_size,
        default=parse_size(size),
        help=f"of the model, in {SHARDS} shards (default: {size})",
    )
    parser.add_argument("--nodes", type=rig.count, default=nodes, help=f"how many (default: {nodes})")
    parser.add_argument(
        "--link",
        "--rate",
        dest="rate",
        type=rig.link_rate,
        default=LINK_RATE,
        help=f"bits per second of each node's link, each way; 0: no limit (default: {LINK_RATE:g})",
    )
    parser.add_argument("--origin-link", type=rig.link_rate, help="of the hub's link (default: as the nodes')")
    parser.add_argument(
        "--swarm", choices=(BOTH, ON, OFF), default=BOTH, help="run with the swarm on, off, or both (default: both)"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path("/var/tmp"), help="where cache directories go (default: /var/tmp)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="a setting of the nodes' daemons"
    )


def ways(options: argparse.Namespace) -> list[str]:
    """ "off", "on", or both."""
    return [way for way in (OFF, ON) if options.swarm in (way, BOTH)]


def origin_rate(options: argparse.Namespace) -> int:
    """Bits per second of the hub's link."""
    rate: int = options.rate if options.origin_link is None else options.origin_link
    return rate


def set_up(options: argparse.Namespace, hosts: int) -> AbstractContextManager[Cluster]:
    """A cluster whose hub holds REPO: SHARDS safetensors files of `--size` together, and a small file."""
    shards = {
        f"model-{number:05}-of-{SHARDS:05}.safetensors": seeded_tensors(f"shard {number}", options.size // SHARDS)
        for number in range(1, SHARDS + 1)
    }
    spec = HubSpec(repos=[RepoSpec(id=REPO, files={"config.json": Text("{}\n"), **shards})])
    return Cluster.set_up(spec, hosts, rate=options.rate, origin_rate=origin_rate(options), base=options.scratch)


@contextmanager
def nodes_of(
    cluster: Cluster, options: argparse.Namespace, count: int, way: str, *, start: int | None = None
) -> Iterator[list[Node]]:
    """`count` fresh nodes; the first `start` of them (None: all) run and know of each other.

    The page cache is dropped and the hub's counters are at zero.
    """
    settings = dict(_setting(text) for text in options.set)
    with cluster.nodes(count, swarm=way == ON, settings=settings, start=False) as nodes:
        running = nodes[:start]
        start_all(running)
        if way == ON:
            await_members(running)
        rig.drop_page_cache()
        cluster.hub.reset(content=False)
        yield nodes


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise Invalid(f"--set {text}: expected SECTION.FIELD=VALUE.")
    return key, value


def seconds_at(size: int, rate: int) -> float:
    """How long `size` bytes of payload take on a link of `rate` bits per second; 0 where it has no limit."""
    return size / netns.payload_rate(rate) if rate else 0.0


def patience_s(options: argparse.Namespace, size: int, nodes: int) -> float:
    """How long readers may take: far beyond every goal, also where each takes its own copy from the origin."""
    slowest = max(
        seconds_at(size * nodes, origin_rate(options) or UNLIMITED_RATE),
        seconds_at(size, options.rate or UNLIMITED_RATE),
    )
    return READER_TIMEOUT_S + SLOWDOWN_MAX * slowest


@dataclass(frozen=True, slots=True)
class Round:
    """What nodes did that read the model at once."""

    found: list[Found]
    size: int
    """Bytes that each read."""
    origin_bytes: int
    """Bytes of bodies that the hub sent meanwhile."""
    requests: dict[str, int]
    """That the hub had, from the mounts on, by kind."""
    usage: dict[str, GroupUsage]
    """By group: manta, hub, readers."""
    idle: float
    """Of the machine's cores, the share that did nothing from the readers' start to the last one's end."""

    @property
    def seconds(self) -> list[float]:
        """Each node's, from the moment when all began."""
        began = min(each_found.began for each_found in self.found)
        return [each_found.ended - began for each_found in self.found]

    @property
    def copies(self) -> float:
        return ratio(self.origin_bytes, self.size)

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds of all Manta processes per GB that readers got."""
        return ratio(self.usage["manta"].cpu_s, len(self.found) * self.size / GIGABYTE)

    @property
    def busy(self) -> float:
        """Of the machine's cores, the share that nodes, hub and readers took; what the kernel does for the links is not in it."""
        own = sum(usage.cpu_s for usage in self.usage.values())
        return ratio(own, max(self.seconds) * len(os.sched_getaffinity(0)))

    def document(self) -> dict[str, object]:
        return {
            "seconds": [round(seconds, 3) for seconds in self.seconds],
            "bytes": self.size,
            "origin_bytes": self.origin_bytes,
            "requests": self.requests,
            "cpu_s": {group: round(usage.cpu_s, 3) for group, usage in self.usage.items()},
            "rss_peak": {group: usage.rss_peak for group, usage in self.usage.items()},
            "idle": round(self.idle, 4),
        }


def read(cluster: Cluster, nodes: Sequence[Node], timeout_s: float) -> Round:
    """REPO mounted on each and read by all at once, every byte compared; until they have verified and sealed what they got."""
    with cluster.readings(nodes, REPO) as readings:
        groups: dict[str, Callable[[], list[int]]] = {
            "manta": partial(list, [node.pid for node in nodes]),
            "hub": partial(list, [cluster.hub.pid]),
            "readers": partial(list, [reading.pid for reading in readings]),
        }
        deadline = time.monotonic() + timeout_s
        with Sampler(groups, shares_of=()) as sampler:
            idle, total = machine_times()
            for reading in readings:
                reading.go()
            found = [reading.result(deadline - time.monotonic()) for reading in readings]
            idle, total = machine_times()[0] - idle, machine_times()[1] - total
            cluster.await_quiet()
            for node in nodes:
                _await_sealed(node, deadline)
    for node, result in zip(nodes, found, strict=True):
        cluster.check(REPO, result, node)
    return Round(
        found,
        cluster.size(REPO),
        cluster.origin_bytes(REPO),
        {str(kind): number for kind, number in cluster.hub.stats().kinds.items()},
        {name: sampler.usage(name) for name in groups},
        ratio(idle, total),
    )


def _await_sealed(node: Node, deadline: float) -> None:
    """Until it fetches nothing more and has verified what is complete: that work belongs to the read."""
    while node.client.status().transfers or any(
        blob.cached == blob.size and not blob.sealed for blob in node.client.cache().blobs
    ):
        if time.monotonic() > deadline:
            raise Unavailable(f"{node.folder.name} was still fetching long after the read.{node.log()}")
        time.sleep(0.1)
