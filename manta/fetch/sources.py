"""Where a blob's bytes can come from: the places in repos that show it, and the location the hub named last. Pure values.

Built by `manta.fs` (which knows the path that was opened), used by `manta.fetch.fetcher`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from manta.hub.origin import Access, Location
from manta.model.ids import BlobId, Commit, RepoId
from manta.model.snapshot import FileEntry

PROVENANCES_MAX = 4
"""Places remembered per blob. One is enough while it works; the others are for a repo that vanishes."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """One place where the origin has a blob, and the right by which we may have it."""

    repo: RepoId
    commit: Commit
    entry: FileEntry
    access: Access

    def __str__(self) -> str:
        return f"{self.repo}/{self.entry.path}"


class Sources:
    """The provenances of one blob, best first, and the location that the best one led to."""

    def __init__(self) -> None:
        self._provenances: list[Provenance] = []
        self.location: Location | None = None
        self.located_by: Provenance | None = None
        """The place whose question led to `location`."""
        self.misled = False
        """What another node said of the location was of no use: the hub is asked."""

    def add(self, provenance: Provenance) -> None:
        """What was asked for last is tried first: it is what somebody has a right to now."""
        if self._provenances and self._provenances[0] == provenance:
            return
        if provenance in self._provenances:
            self._provenances.remove(provenance)
        self._provenances.insert(0, provenance)
        del self._provenances[PROVENANCES_MAX:]

    def turn_to(
        self,
        provenance: Provenance,
        refused: Container[Provenance],
        elsewhere: Callable[[BlobId], Iterable[Provenance]],
    ) -> bool:
        """`provenance` leads nowhere: the best is now one that is not `refused`. False where there is none: then it stays as it is.

        `elsewhere` names more places of a blob, where those that are known are all refused.
        """
        blob = provenance.entry.blob
        more = elsewhere(blob) if blob is not None and all(p in refused for p in self._provenances) else ()
        other = next((p for p in (*self._provenances, *more) if p not in refused), None)
        if other is not None:
            self.add(other)
        return other is not None

    def forget(self, access: Access) -> None:
        """Nobody asks by `access` any more as before: what it led to is not used again, and its places come last."""
        if self.located_by is not None and self.located_by.access == access:
            self.location = self.located_by = None
        self._provenances.sort(key=lambda provenance: provenance.access == access)

    @property
    def best(self) -> Provenance:
        return self._provenances[0]

    def __iter__(self) -> Iterator[Provenance]:
        return iter(self._provenances)
