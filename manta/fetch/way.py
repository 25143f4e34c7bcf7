"""The way to the origin of a blob's bytes, as far as is known without asking: what `manta.fetch.gate` looks at. Here and only here.

Reads what the fetcher keeps; changes nothing but what it is told. Belongs to the trio thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping

from manta.fetch.throttle import Throttles
from manta.fetch.transfer import Transfer
from manta.hub.circuit import Circuits
from manta.model.extents import Extent
from manta.model.ids import BlobId

REFUSALS_MAX = 1024
"""Blobs of which it is remembered that the hub did not say where they are."""


class Way:
    """`hub` is the origin that is asked for locations; None: it is never asked (offline). A `gate.Origin`."""

    def __init__(
        self, transfers: Mapping[str, Transfer], throttles: Throttles, circuits: Circuits, hub: str | None
    ) -> None:
        self._transfers = transfers
        self._throttles = throttles
        self._circuits = circuits
        self._hub = hub
        self._refused: OrderedDict[BlobId, float] = OrderedDict()

    def refuse(self, blob: BlobId, until: float) -> None:
        """The hub did not say where `blob` is: it is not asked in advance before `until` (trio's clock)."""
        self._refused[blob] = until
        self._refused.move_to_end(blob)
        if len(self._refused) > REFUSALS_MAX:
            self._refused.popitem(last=False)

    def reachable(self, blob: BlobId, now: float) -> bool:
        """Whether it could be asked now: neither offline, out of reach, in a pause nor refused."""
        if self._hub is None or now < self._refused.get(blob, now):
            return False
        location = self._transfers[str(blob)].sources.location
        asked = self._hub if location is None or location.stale(time.time()) else location.origin
        return self._throttles.until(asked, now) is None and self._circuits.of(asked).wait_s(now) <= 0

    def ready(self, blob: BlobId) -> bool:
        return not self._transfers[str(blob)].locating

    def alone(self, blob: BlobId) -> bool:
        return self._transfers[str(blob)].quarantined

    def missing(self, blob: BlobId) -> list[int]:
        held = self._transfers[str(blob)].blob
        return held.missing(Extent(0, held.size))

    def lacks(self, blob: BlobId, chunk: int) -> bool:
        return not self._transfers[str(blob)].blob.has(chunk)
