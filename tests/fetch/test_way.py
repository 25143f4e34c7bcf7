"""What is known of the way to the origin without asking."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import cast

import pytest

from manta.errors import Denied
from manta.fetch.throttle import Throttles
from manta.fetch.transfer import Transfer
from manta.fetch.way import REFUSALS_MAX, REFUSED_SECONDS, REFUSED_SECONDS_MAX, Way
from manta.hub.circuit import OPEN_AFTER_S, PROBE_S, Circuits
from manta.hub.origin import Location
from manta.model.ids import BlobAlgorithm, BlobId

HUB, CDN = "https://hub.test:443", "https://cdn.test:443"
BLOB = BlobId(BlobAlgorithm.SHA256, "0" * 64)
REFUSAL = Denied("No.")


class World:
    def __init__(self, hub: str | None = HUB) -> None:
        self.throttles, self.circuits = Throttles(), Circuits()
        self.transfer = SimpleNamespace(sources=SimpleNamespace(location=None), locating=False, quarantined=False)
        transfers = {str(BLOB): cast(Transfer, self.transfer)}
        self.way = Way(transfers, self.throttles, self.circuits, hub)

    def located(self, expires: float | None = None) -> None:
        self.transfer.sources.location = Location(f"{CDN}/x", {}, expires, expires)


def test_offline_it_is_never_there() -> None:
    assert not World(None).way.reachable(BLOB, 0.0)
    assert World().way.reachable(BLOB, 0.0)


@pytest.mark.parametrize("where", [HUB, CDN])
def test_a_pause_or_an_outage_of_who_would_be_asked(where: str) -> None:
    for trouble in ("pause", "outage"):
        world = World()
        if where == CDN:
            world.located()
        if trouble == "pause":
            world.throttles.pause(where, 5.0)
        else:
            world.circuits.of(where).failed(0.0, 0.0, "No connection.")
            world.circuits.of(where).failed(0.0, OPEN_AFTER_S, "No connection.")
        now = OPEN_AFTER_S if trouble == "outage" else 0.0
        assert not world.way.reachable(BLOB, now)
        assert world.way.reachable(BLOB, now + max(PROBE_S, 5.0))
        if where == HUB:
            world.located()
            assert world.way.reachable(BLOB, now)
            world.located(expires=time.time() - 1)
            assert not world.way.reachable(BLOB, now)


def test_a_refusal_holds_for_readers_and_longer_and_longer_for_what_nobody_waits_for() -> None:
    world, now = World(), 0.0
    pauses = []
    for _ in range(30):
        world.way.refuse(BLOB, now, REFUSAL)
        assert world.way.refusal(BLOB, now) is REFUSAL
        assert world.way.refusal(BLOB, now + REFUSED_SECONDS) is None
        began = now
        while not world.way.reachable(BLOB, now):
            now += 1.0
        pauses.append(now - began)
    assert pauses[:3] == [REFUSED_SECONDS, 2 * REFUSED_SECONDS, 4 * REFUSED_SECONDS]
    assert pauses[-1] == REFUSED_SECONDS_MAX
    world.way.refuse(BLOB, now, REFUSAL)
    world.way.located(BLOB)
    assert world.way.reachable(BLOB, now)
    assert world.way.refusal(BLOB, now) is None


def test_refusals_are_bounded() -> None:
    way = World().way
    for number in range(REFUSALS_MAX + 5):
        way.refuse(BlobId(BlobAlgorithm.SHA256, f"{number:064x}"), 0.0, REFUSAL)
    assert len(way._refused) == REFUSALS_MAX
