"""The `faults` benchmark, here and only here; run by `benchmarks.__main__`.

A cold file read once, in order, while 2% of the requests to the CDN fail, beside the same without faults.

Rounds of one read of each kind through a fresh mount, in turns which comes first. Of every 50 requests one is struck, at a place drawn from
the seed; what strikes it is dealt from a shuffled deck (MIX), across the rounds, so that with the default size and rounds the deck is dealt
once. The figure is what all rounds with faults made together, over what all rounds without made: each card counts once, and no median
hides the round with the stalls. A byte altered on the way is not in the deck: a reader that is served as bytes come has it before anything
can tell, and is told afterwards (docs/fault-matrix.md). Whoever reads here must get the right digest.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator

from benchmarks.report import MEGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import Measurement, Rig, count, rig_options
from manta.model.extents import CHUNK_SIZE
from manta.testing.hub import HubProcess
from manta.testing.hub.faults import (
    Action,
    Fail,
    Reset,
    ShortRange,
    Stall,
    TooMany,
    Truncate,
)

SUMMARY = "sequential read of a cold file while 2% of the requests fail, beside the same without faults"
PROGRAMS = ("ip", "tc", "nsenter", "fusermount3")

BLOCK_BYTES = 4 * 1024 * 1024
RATIO_MIN = 0.85
SEED = 20240601
NAME = "model.safetensors"

REQUESTS_PER_FAULT = 50
"""2%."""

MIX: dict[str, tuple[Action, int]] = {
    "stall in the body": (Stall(after_bytes=1_000_000, seconds=600), 2),
    "reset in the body": (Reset(after_bytes=2_000_000), 3),
    "reset before the headers": (Reset(before_headers=True), 2),
    "truncated body": (Truncate(after_bytes=3_000_000), 3),
    "HTTP 500": (Fail(status=500, body="html"), 2),
    "HTTP 503": (Fail(status=503), 2),
    "HTTP 429, Retry-After 1 s": (TooMany(form="retry-after", seconds=1), 1),
    "HTTP 403, as of an expired URL": (Fail(status=403, body="xml"), 2),
    "206 for fewer bytes than asked for": (ShortRange(missing=2_000_000), 3),
}
"""The deck: what strikes, and how many cards of it there are. A stall lasts until the client leaves."""


def add_options(parser: argparse.ArgumentParser) -> None:
    rig_options(parser, size="2GiB")
    parser.add_argument("--rounds", type=count, default=4, help="rounds with and without faults (default: 4)")
    parser.add_argument("--seed", type=int, default=SEED, help="of what strikes which request (default: %(default)s)")


class Deck:
    """Deals faults: one card to each block of REQUESTS_PER_FAULT requests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._cards: list[str] = []
        self._dealt: dict[int, str] = {}

    def deal(self, hub: HubProcess, requests: int) -> None:
        """Puts the faults of the next `requests` requests in force."""
        self._dealt.clear()
        for block in range(0, requests, REQUESTS_PER_FAULT):
            if not self._cards:
                self._cards = [name for name, (_, cards) in MIX.items() for _ in range(cards)]
                self._random.shuffle(self._cards)
            name = self._cards.pop()
            at = block + self._random.randrange(REQUESTS_PER_FAULT)
            self._dealt[hub.add_fault(MIX[name][0], origin="cdn", skip=at, times=1)] = name

    def collect(self, hub: HubProcess) -> Counter[str]:
        """What has struck. Cards of requests that never came go back to the top, in their order."""
        struck = {state.id for state in hub.faults() if state.struck}
        self._cards += [name for id_, name in reversed(self._dealt.items()) if id_ not in struck]
        return Counter(name for id_, name in self._dealt.items() if id_ in struck)


def run(options: argparse.Namespace) -> Report:
    report = Report("faults")
    deck = Deck(options.seed)
    found: dict[str, list[Measurement]] = {"without": [], "with": []}
    struck: Counter[str] = Counter()
    requests = 0
    with Rig.set_up(options, {NAME: options.size}) as rig:
        for number in range(options.rounds):
            for way in ("without", "with") if number % 2 == 0 else ("with", "without"):
                with rig.mounted() as mount:
                    if way == "with":
                        # Retries are requests too: more than the chunks.
                        deck.deal(rig.hub, 2 * max(1, options.size // CHUNK_SIZE))
                    measured = rig.read(mount, [["sequential", str(mount.file(NAME)), "--block", str(BLOCK_BYTES)]])
                    rig.check_digest(measured, NAME)
                    traffic, faults = rig.traffic(NAME), deck.collect(rig.hub) if way == "with" else Counter[str]()
                    asked = rig.hub.stats().origins["cdn"].requests
                found[way].append(measured)
                struck += faults
                requests += asked if way == "with" else 0
                report.runs.append(
                    {
                        "round": number,
                        "way": f"{way} faults",
                        **measured.document(),
                        "requests": asked,
                        "struck": dict(faults),
                        "sent_repeated": traffic.repeated,
                    }
                )
    value = ratio(_rate(found["with"]), _rate(found["without"]))
    report.table = list(_rows(found, value, struck, requests))
    report.goals = [Goal("with faults / without, all rounds together", value, ">=", RATIO_MIN)]
    report.notes.append(f"{struck.total()} of {requests} requests were struck: " + _told(struck))
    report.chart = Chart(
        f"sequential cold read of {options.size / 2**30:.3g} GiB, {options.rate / 1e9:g} Gbit/s link, 2% of requests fail",
        "MB/s",
        [
            (f"{way} faults, round {at + 1}", m.rate / MEGABYTE)
            for way, all_ in found.items()
            for at, m in enumerate(all_)
        ],
        [("goal", RATIO_MIN * _rate(found["without"]) / MEGABYTE)],
    )
    return report


def _rate(measured: list[Measurement]) -> float:
    """Bytes per second of all of them together."""
    return ratio(sum(each.size for each in measured), sum(each.seconds for each in measured))


def _rows(found: dict[str, list[Measurement]], value: float, struck: Counter[str], requests: int) -> Iterator[Row]:
    for way, measured in found.items():
        yield {
            "what": f"{way} faults",
            "MB/s": _rate(measured) / MEGABYTE,
            "ratio": value if way == "with" else 1.0,
            "slowest round MB/s": min(each.rate for each in measured) / MEGABYTE,
            "first byte ms": 1000 * median([each.first_byte_s for each in measured]),
            "struck": struck.total() if way == "with" else 0,
            "share struck": ratio(struck.total(), requests) if way == "with" else 0.0,
        }


def _told(struck: Counter[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in struck.most_common()) or "none"
