"""The way to the origin of a blob's bytes, as far as is known without asking: what `manta.fetch.gate` looks at. Here and only here.

Reads what the fetcher keeps; changes nothing but what it is told. Belongs to the trio thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from manta.errors import MantaError
from manta.fetch.throttle import Throttles
from manta.fetch.transfer import Transfer
from manta.hub.circuit import Circuits
from manta.model.extents import Extent
from manta.model.ids import BlobId

REFUSED_SECONDS = 2.0
"""How long the hub is not asked again about a blob that it refused: a reader that tries each of a file's chunks costs one request, and
a person who has just been given access waits no longer than this."""

REFUSED_SECONDS_MAX = 60.0
"""And how long it is not asked in advance, of what no reader waits for: twice as long with each refusal in a row, up to this."""

REFUSALS_MAX = 1024
"""Blobs of which it is remembered that the hub did not say where they are."""


@dataclass(slots=True)
class _Refused:
    """What the hub said of one blob, and until when it is not asked again: for a reader, and in advance."""

    error: MantaError | None = None
    until: float = 0.0
    unasked_until: float = 0.0
    times: int = 0


class Way:
    """`hub` is the origin that is asked for locations; None: it is never asked (offline). A `gate.Origin`."""

    def __init__(
        self, transfers: Mapping[str, Transfer], throttles: Throttles, circuits: Circuits, hub: str | None
    ) -> None:
        self._transfers = transfers
        self._throttles = throttles
        self._circuits = circuits
        self._hub = hub
        self._refused: OrderedDict[BlobId, _Refused] = OrderedDict()

    def refuse(self, blob: BlobId, now: float, error: MantaError) -> None:
        """The hub did not say where `blob` is, for the reason `error`. `now` is on trio's clock."""
        refused = self._refused.setdefault(blob, _Refused())
        refused.error, refused.until = error, now + REFUSED_SECONDS
        refused.unasked_until = now + min(REFUSED_SECONDS * 2.0**refused.times, REFUSED_SECONDS_MAX)
        refused.times = min(refused.times + 1, 16)
        self._refused.move_to_end(blob)
        if len(self._refused) > REFUSALS_MAX:
            self._refused.popitem(last=False)

    def located(self, blob: BlobId) -> None:
        """The hub said where it is."""
        self._refused.pop(blob, None)

    def refusal(self, blob: BlobId, now: float) -> MantaError | None:
        """Why the hub did not say where `blob` is, while it is not asked again for a reader either."""
        refused = self._refused.get(blob)
        return refused.error if refused is not None and now < refused.until else None

    def reachable(self, blob: BlobId, now: float) -> bool:
        """Whether it could be asked now: neither offline, out of reach, in a pause nor refused."""
        refused = self._refused.get(blob)
        if self._hub is None or (refused is not None and now < refused.unasked_until):
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

    def generation(self, blob: BlobId) -> int:
        return self._transfers[str(blob)].blob.generation
