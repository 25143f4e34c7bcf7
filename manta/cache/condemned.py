"""Blobs whose chunk maps say more than is true and cannot be changed, because their disk refuses it: never read until they are gone.

Used by `manta.cache.store`. A chunk was found damaged, the daemon wanted it absent, and the disk took neither that nor the removal of the
map (a filesystem that turned read-only does this). In memory the chunk is absent; a restart would believe the map again. So the blob's id
is kept in a journal *outside* the cache's disk, in the runtime directory, which lives as long as the host is up; and after a host crash
the maps of unsealed blobs are doubted anyway. Any thread.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from manta.cache.chunkmap import remove_map
from manta.cache.disk import replace_file
from manta.cache.layout import Layout
from manta.errors import Invalid
from manta.model.ids import BlobId, parse_blob_id

logger = logging.getLogger(__name__)


class Condemned:
    """The blobs of `layout` that are condemned. `journal` None: they are remembered as long as this process lives."""

    def __init__(self, layout: Layout, journal: Path | None) -> None:
        """SLOW: takes away the maps that an earlier daemon could not, where the disk lets it."""
        self._layout = layout
        self._journal = journal
        self._lock = threading.Lock()
        self._blobs: set[BlobId] = set()
        if journal is not None:
            try:
                self._blobs |= set(map(parse_blob_id, msgspec.json.decode(journal.read_bytes(), type=list[str])))
            except FileNotFoundError:
                pass
            except (OSError, msgspec.DecodeError, UnicodeDecodeError, Invalid) as error:
                logger.warning("The list of condemned blobs %s cannot be read (%s).", journal, error)
        self.retry()

    def __contains__(self, blob: BlobId) -> bool:
        return blob in self._blobs

    def __len__(self) -> int:
        return len(self._blobs)

    def add(self, blob: BlobId) -> None:
        with self._lock:
            if blob not in self._blobs:
                logger.error(
                    "The disk refuses to forget damaged chunks of %s. It is not opened again until the disk takes that.",
                    blob,
                )
                self._blobs.add(blob)
                self._save()

    def retry(self) -> None:
        """SLOW: tries again to take the maps away."""
        with self._lock:
            gone = {blob for blob in self._blobs if self._removed(blob)}
            if gone:
                self._blobs -= gone
                self._save()

    def _removed(self, blob: BlobId) -> bool:
        try:
            remove_map(self._layout.map(blob))
        except FileNotFoundError:
            return True  # the folder is gone, and the map with it
        except OSError:
            return False
        logger.warning("Forgot %s, of which damaged chunks could not be forgotten before. It is fetched again.", blob)
        return True

    def _save(self) -> None:
        if self._journal is None:
            return
        try:
            replace_file(self._journal, msgspec.json.encode(sorted(map(str, self._blobs))))
        except OSError as error:
            logger.error(
                "The list of condemned blobs %s cannot be written (%s): run `manta cache verify` after a restart of the daemon.",
                self._journal, error.strerror,
            )  # fmt: skip
