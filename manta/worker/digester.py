"""Running digests of blobs, advanced as their chunks arrive in order. Runs in the digest worker's threads; here and only here."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from manta.cache.digests import READ_BYTES, BlobDigest
from manta.errors import Corrupt
from manta.model.ids import parse_blob_id
from manta.wire.messages import Digest, Digested
from manta.worker.failure import OrderFailed, disk_failure

RUNNING_MAX = 256
"""Digests kept half-done. A blob that falls out starts anew, which costs one more read of it (1.8 GB/s)."""


class Digester:
    """Keeps the state between orders. The daemon sends one order per blob at a time."""

    def __init__(self) -> None:
        self._running: OrderedDict[str, tuple[BlobDigest, int]] = OrderedDict()
        self._lock = threading.Lock()

    def advance(self, order: Digest, fd: int) -> Digested:
        """Reads `start`..`end` and digests it. Raises OrderFailed where `start` is not where this blob's digest stands."""
        with self._lock:
            digest, at = self._running.pop(order.blob, (None, 0))
        if order.start == 0:
            digest, at = BlobDigest(parse_blob_id(order.blob), order.blob_size), 0
        if digest is None or at != order.start:
            raise OrderFailed("absent", "the digest of this blob has to start anew")
        try:
            _feed(digest, fd, order.start, order.end)
        except OSError as e:
            raise disk_failure(e) from e
        except Corrupt as e:
            raise OrderFailed("cache_broken", "the cache file is shorter than its chunk map says") from e
        if order.end == order.blob_size:
            return Digested(order.order, order.end, digest.hexdigest())
        with self._lock:
            self._running[order.blob] = digest, order.end
            while len(self._running) > RUNNING_MAX:
                self._running.popitem(last=False)
        return Digested(order.order, order.end, "")


def _feed(digest: BlobDigest, fd: int, start: int, end: int) -> None:
    view, at = memoryview(bytearray(READ_BYTES)), start
    while at < end:
        count = os.preadv(fd, [view[: min(READ_BYTES, end - at)]], at)
        if count == 0:
            raise Corrupt(f"the cache file ends at {at}")
        digest.update(view[:count])
        at += count
