"""Blobs that were found to have the wrong digest, and what may become of them, here and only here. Trio thread, no I/O.

Bytes are served as they arrive, before the digest of the whole can be known. Once it is known to be wrong, no byte of the blob is served
until all of it has come anew and matched: not to those who have it open, and not to those who open it later. Wrong twice is no accident of
the network: it is then left alone for CONDEMNED_SECONDS. Filled by `manta.fetch.sealer`; `manta.fetch.fetcher` asks it at each open.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from manta.errors import Corrupt
from manta.model.ids import BlobId

REFETCHES_MAX = 1
"""How often a blob is fetched anew at once."""

CONDEMNED_SECONDS = 600.0
"""How long a blob that stayed wrong is not asked for again: a program that tries in a loop must not fetch gigabytes each time."""

SUSPECTS_MAX = 1000


@dataclass(slots=True)
class _Suspect:
    refetches: int = 0
    error: Corrupt | None = None
    condemned_until: float = 0.0


class Quarantine:
    """Times are trio's clock. At most SUSPECTS_MAX blobs: the one that was found wrong longest ago is forgotten first."""

    def __init__(self) -> None:
        self._suspects: OrderedDict[BlobId, _Suspect] = OrderedDict()

    def holds(self, blob: BlobId) -> bool:
        """Whether no byte of `blob` may be served before all of it has been verified."""
        return blob in self._suspects

    def verdict(self, blob: BlobId, now: float) -> Corrupt | None:
        """Why `blob` is not to be fetched at all; None where it may be."""
        suspect = self._suspects.get(blob)
        if suspect is None:
            return None
        if suspect.error is not None and now >= suspect.condemned_until:
            suspect.error, suspect.refetches = None, 0
        return suspect.error

    def take(self, blob: BlobId) -> bool:
        """`blob` was found wrong. Whether to fetch it anew; `condemn` must follow where not."""
        suspect = self._suspects.setdefault(blob, _Suspect())
        self._suspects.move_to_end(blob)
        if len(self._suspects) > SUSPECTS_MAX:
            self._suspects.popitem(last=False)
        suspect.refetches += 1
        return suspect.refetches <= REFETCHES_MAX

    def condemn(self, blob: BlobId, error: Corrupt, now: float) -> None:
        """`error` is what everyone who wants `blob` gets for CONDEMNED_SECONDS."""
        suspect = self._suspects[blob]
        suspect.error, suspect.condemned_until = error, now + CONDEMNED_SECONDS

    def release(self, blob: BlobId) -> None:
        """All of `blob` has matched its digest."""
        self._suspects.pop(blob, None)
