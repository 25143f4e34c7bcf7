"""The latest sentences about what went wrong, for `manta status`, here and only here. Bounded; trio thread."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Container

from manta.errors import MantaError
from manta.fetch.sources import Provenance
from manta.model.ids import Commit, RepoId

log = logging.getLogger(__name__)

RECENT_MAX = 16
RECENT_PER_MOUNT = 8


class Failures:
    """Newest last; a sentence that repeats is kept once."""

    def __init__(self) -> None:
        self._recent: deque[tuple[RepoId | None, Commit | None, str]] = deque(maxlen=RECENT_MAX * 4)
        self.count = 0

    def add(self, provenance: Provenance, error: MantaError) -> None:
        self._add((provenance.repo, provenance.commit, error.message))

    def add_general(self, error: MantaError) -> None:
        """One that belongs to no repo, unless a repo has it already."""
        if not any(sentence == error.message for _, _, sentence in self._recent):
            self._add((None, None, error.message))

    def _add(self, failure: tuple[RepoId | None, Commit | None, str]) -> None:
        self.count += 1
        if failure in self._recent:
            self._recent.remove(failure)
        else:
            log.warning("%s", failure[-1])  # whatever status tells is in the log
        self._recent.append(failure)

    def all(self) -> list[str]:
        return [sentence for _, _, sentence in self._recent][-RECENT_MAX:]

    def of(self, snapshots: Container[tuple[RepoId, Commit]]) -> list[str]:
        """Those about files of `snapshots`."""
        return [s for repo, commit, s in self._recent if (repo, commit) in snapshots][-RECENT_PER_MOUNT:]
