"""What a network and its trouble are like, here and only here: values that a simulation is given. Seeded where they are random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from manta.testing import netns

GIGABIT = 125e6
"""Bytes per second."""

PAYLOAD_SHARE = netns.payload_rate(8)
"""Of what a link carries, the part that is TCP's payload, where a namespace's link is the measure."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a node stands. Bytes per second."""

    up: float
    down: float
    starts: float = 0.0
    """When its reader starts, in seconds."""
    has: float = 0.0
    """The share of the model that it has in its cache."""


@dataclass(frozen=True, slots=True)
class Crash:
    """Node `node` (its place) ends at `at` and is back after `seconds`; infinity: never."""

    node: int
    at: float
    seconds: float
    keeps_cache: bool = True
    silently: bool = False
    """The host is gone: nobody hears of it. Otherwise its connections are reset."""


@dataclass(frozen=True, slots=True)
class Partition:
    """From `at` on for `seconds` the nodes in `nodes` and all others cannot reach each other; the origin can be reached by all."""

    nodes: frozenset[int]
    at: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Hub:
    """The origin. Bytes per second, seconds."""

    rate: float
    latency_s: float = 0.02
    """From a request to its first byte, beside the transfer."""
    per_connection: float = float("inf")
    requests: int = 0
    """In each `window_s`; what is beyond is refused with 429 and the rest of the window as pause. 0: no limit."""
    window_s: float = 5.0
    dark: tuple[float, float] = (0.0, 0.0)
    """From when till when it cannot be reached."""


@dataclass(frozen=True, slots=True)
class Weather:
    """All of it."""

    sites: Sequence[Site]
    hub: Hub
    latency_s: float = 0.0005
    """One way between two nodes."""
    request_s: float = 0.0004
    """What a request costs the peer process, which answers one at a time: a signature to check, one to make."""
    crashes: Sequence[Crash] = field(default=())
    partitions: Sequence[Partition] = field(default=())


def equal(nodes: int, rate: float, *, hub: float = 0.0, spread_s: float = 0.0, seed: int = 0) -> Weather:
    """Equal links for all, the hub's (`hub` 0) like theirs; the readers start within `spread_s`."""
    chance = random.Random(seed)
    link = rate * PAYLOAD_SHARE
    sites = [Site(link, link, chance.random() * spread_s) for _ in range(nodes)]
    return Weather(sites, Hub((hub or rate) * PAYLOAD_SHARE))


def heterogeneous(nodes: int, rate: float, *, hub: float = 0.0, spread_s: float = 0.0, seed: int = 0) -> Weather:
    """A tenth of the nodes has ten times `rate`, seven tenths have it, and two tenths a fifth of it up and half of it down."""
    chance = random.Random(seed)
    sites = []
    for _ in range(nodes):
        kind, link = chance.random(), rate * PAYLOAD_SHARE
        up, down = (10 * link, 10 * link) if kind < 0.1 else (link, link) if kind < 0.8 else (link / 5, link / 2)
        sites.append(Site(up, down, chance.random() * spread_s))
    return Weather(sites, Hub((hub or rate) * PAYLOAD_SHARE, per_connection=rate / 2))


def churning(
    nodes: int,
    rate: float,
    seconds: float,
    *,
    hub: float = 0.0,
    spread_s: float = 0.0,
    seed: int = 0,
    share: float = 0.02,
) -> Weather:
    """Equal links; in each second of `seconds`, `share` of the nodes (at least one every three seconds) crash, for 1 to 4 seconds: a third
    of them lose their cache, a third vanish without a word."""
    chance = random.Random(seed)
    calm = equal(nodes, rate, hub=hub, spread_s=spread_s, seed=seed)
    crashes = []
    every, at = 1 / max(share * nodes, 1 / 3), 0.0
    while (at := at + chance.expovariate(1 / every)) < seconds:
        node = chance.randrange(nodes)
        crashes.append(
            Crash(node, at, 1 + 3 * chance.random(), chance.random() > 1 / 3, silently=chance.random() < 1 / 3)
        )
    return Weather(calm.sites, calm.hub, crashes=crashes)
