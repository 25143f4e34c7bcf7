"""What may still be fetched, and which blobs to evict for it, here and only here. Pure: no disk, no clock. Used by `manta.operations.room`.

There are two bounds: bytes that the cache may take (`limit`), and bytes of the disk that stay free (`floor`). The last stretch before a
bound is the *reserve*: when it is reached eviction begins, and until that has made room only what readers wait for is fetched. At the
bound nothing is. So neither bound is passed by more than the chunk that was ordered last, however fast bytes come.

Whole blobs go, least recently used first. A model is read whole, so half of a blob saves no more of the next start than none of it, and
the time of use is known per blob without a write per read. What is open, pinned or part of a mount never goes.
"""

from __future__ import annotations

import enum
from collections.abc import Container, Iterable
from dataclasses import dataclass

from manta.cache.inventory import BlobInfo
from manta.model.ids import BlobId

SLACK = 16
"""Once eviction begins, it goes on until a 16th of the bound is free before it (hysteresis).

Without slack a full cache would look for victims at each new chunk: a pass over 10,000 blobs for every 8 MiB. With a 16th of 500 GiB a pass
comes once per 31 GiB fetched, about the size of one model, which is what is about to be needed when something is fetched into a full cache.
More slack would throw away what may still be used.
"""

RESERVE_BYTES = 64 * 1024 * 1024
"""At 1 GB/s 64 ms: what comes while the first blobs are being removed."""

RESERVE_SHARE = 32
"""And no more than a 32nd of the limit or of the disk: half of SLACK, so that an eviction always ends outside the reserve."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the cache and its disk hold, in bytes. `coming`: ordered and not in a chunk map yet."""

    cached: int
    coming: int
    disk_free: int
    disk_size: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """`limit` 0: no limit but the disk. `floor` counts as half of the disk at most: on a small one nothing could be fetched at all."""

    limit: int
    floor: int

    def reserve(self, disk_size: int) -> int:
        shares = [whole // RESERVE_SHARE for whole in (self.limit, disk_size) if whole]
        return min([RESERVE_BYTES, *shares])

    def floor_on(self, disk_size: int) -> int:
        return min(self.floor, disk_size // 2)

    def room(self, usage: Usage) -> int:
        """Bytes that may still be ordered before a bound is passed; negative beyond it."""
        room = usage.disk_free - self.floor_on(usage.disk_size)
        if self.limit:
            room = min(room, self.limit - usage.cached)
        return room - usage.coming


class Admission(enum.Enum):
    """What may be fetched now."""

    ALL = "all"
    READERS = "what readers wait for"
    NOTHING = "nothing"


def admission(usage: Usage, bounds: Bounds) -> Admission:
    room = bounds.room(usage)
    if room > bounds.reserve(usage.disk_size):
        return Admission.ALL
    return Admission.READERS if room > 0 else Admission.NOTHING


def excess(usage: Usage, bounds: Bounds) -> int:
    """Bytes to evict so that everything may be fetched again, with slack; 0 where it may. What is evicted counts for both bounds."""
    if admission(usage, bounds) is Admission.ALL:
        return 0
    floor = bounds.floor_on(usage.disk_size)
    slack = max(floor // SLACK, 2 * bounds.reserve(usage.disk_size))
    over = floor + slack - (usage.disk_free - usage.coming)
    if bounds.limit:
        over = max(over, usage.cached + usage.coming - (bounds.limit - bounds.limit // SLACK))
    return max(over, 0)


def oldest(blobs: Iterable[BlobInfo], needed: int, pinned: Container[BlobId] = ()) -> list[BlobInfo]:
    """The least recently used of `blobs` that together have `needed` bytes, or all that may go where those have less."""
    chosen: list[BlobInfo] = []
    if needed <= 0:
        return chosen
    for blob in sorted(blobs, key=lambda b: (b.last_used, b.id)):
        if blob.in_use or blob.cached == 0 or blob.id in pinned:
            continue
        chosen.append(blob)
        needed -= blob.cached
        if needed <= 0:
            break
    return chosen
