"""Which blobs to evict, here and only here. Pure: no disk, no clock. Used by the daemon, which then calls `Store.remove`.

Whole blobs go, least recently used first. A model is read whole, so half of a blob saves no more of the next start than none of it, and
the time of use is known per blob without a write per read. What is in use or pinned never goes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from manta.cache.inventory import BlobInfo
from manta.model.ids import BlobId

SLACK = 16
"""Once a bound is crossed, evict until a 16th of it is free beyond it (hysteresis).

Without slack a full cache would look for victims at each new chunk: a pass over 10,000 blobs for every 8 MiB. With a 16th of 500 GiB a pass
comes once per 31 GiB fetched, about the size of one model, which is what is about to be needed when something is fetched into a full cache.
More slack would throw away what may still be used.
"""


def excess(cached_bytes: int, limit: int, disk_free: int, floor: int) -> int:
    """Bytes to evict so that at most `limit` (0: no limit) are cached and at least `floor` are free on the disk, with slack.

    0 within both bounds. What one eviction frees counts for both.
    """
    over = 0
    if limit and cached_bytes > limit:
        over = cached_bytes - (limit - limit // SLACK)
    if disk_free < floor:
        over = max(over, floor + floor // SLACK - disk_free)
    return over


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


def victims(
    blobs: Iterable[BlobInfo],
    cached_bytes: int,
    limit: int,
    disk_free: int,
    floor: int,
    pinned: Container[BlobId] = (),
) -> list[BlobInfo]:
    """The blobs to evict now, first the least recently used; empty within both bounds, which are `excess`'s."""
    return oldest(blobs, excess(cached_bytes, limit, disk_free, floor), pinned)
