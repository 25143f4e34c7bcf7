"""What came from where, by blob: how often the cluster has read the origin. Here and only here. Pure.

Filled by `manta.fetch.fetcher`, read for `manta peers`. Counts from the daemon's start on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

BLOBS_MAX = 4096
"""Blobs remembered, about 1 MB; what was fetched longest ago is forgotten first, and counts in the sums on."""


@dataclass(slots=True)
class Entry:
    """One blob. Bytes."""

    size: int
    name: str
    from_origin: int = 0
    from_peers: int = 0


class Ledger:
    """Sums and entries; bytes that came twice count twice."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.from_origin = 0
        self.from_peers = 0
        self.to_peers = 0

    def came(self, blob: str, size: int, name: str, count: int, *, peer: bool) -> None:
        """`count` bytes of `blob` came, from another node or from the origin."""
        entry = self.entries.setdefault(blob, Entry(size, name))
        self.entries.move_to_end(blob)
        if peer:
            entry.from_peers += count
            self.from_peers += count
        else:
            entry.from_origin += count
            self.from_origin += count
        if len(self.entries) > BLOBS_MAX:
            self.entries.popitem(last=False)
