"""What the cache knows of each of its blobs, and the running totals, here and only here. In memory; `recovery.scan` fills it at start.

Used by `manta.cache.store`, which keeps it true; `BlobInfo` also by `manta.cache.policy` and whoever lists the cache. A lock makes it safe
to use from the daemon's trio thread and its worker threads; nothing here is slow.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from manta.model.ids import BlobId


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One blob of the cache."""

    id: BlobId
    size: int
    cached: int
    """Bytes of its chunks on the disk, those in doubt after a host crash included."""
    sealed: bool
    last_used: float
    """Seconds since the epoch: when it was last opened or closed."""
    in_use: bool = False
    """Whether the daemon has it open."""


class Inventory:
    """All blobs of the cache directory, by id."""

    def __init__(self, blobs: Iterable[BlobInfo] = ()) -> None:
        self._lock = threading.Lock()
        self._blobs = {blob.id: blob for blob in blobs}
        self._cached = sum(blob.cached for blob in self._blobs.values())

    def __len__(self) -> int:
        return len(self._blobs)

    @property
    def cached_bytes(self) -> int:
        """Bytes of all blobs' chunks on the disk."""
        return self._cached

    def find(self, blob: BlobId) -> BlobInfo | None:
        return self._blobs.get(blob)

    def listing(self) -> list[BlobInfo]:
        with self._lock:
            return list(self._blobs.values())

    def put(self, info: BlobInfo) -> None:
        """Adds a blob, or replaces what was known of it."""
        with self._lock:
            self._put(info)

    def update(
        self,
        blob: BlobId,
        *,
        cached: int | None = None,
        sealed: bool | None = None,
        last_used: float | None = None,
        in_use: bool | None = None,
    ) -> None:
        """Changes what is given of what is known of `blob`; nothing where it is not known."""
        with self._lock:
            known = self._blobs.get(blob)
            if known is not None:
                self._put(
                    BlobInfo(
                        blob,
                        known.size,
                        known.cached if cached is None else cached,
                        known.sealed if sealed is None else sealed,
                        known.last_used if last_used is None else last_used,
                        known.in_use if in_use is None else in_use,
                    )
                )

    def drop(self, blob: BlobId) -> None:
        """Forgets `blob`."""
        with self._lock:
            known = self._blobs.pop(blob, None)
            self._cached -= known.cached if known is not None else 0

    def _put(self, info: BlobInfo) -> None:
        known = self._blobs.get(info.id)
        self._cached += info.cached - (known.cached if known is not None else 0)
        self._blobs[info.id] = info
