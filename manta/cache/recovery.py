"""What is believed after a restart, and how doubt is ended, here and only here.

`scan` reads what a cache directory holds (the store calls it when it opens). `settle_doubtful` compares a blob's bytes with its chunk map
after a host crash. All of it is SLOW: the daemon runs it in worker threads, and reading
and hashing release the GIL.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manta.cache.chunkmap import read_outline
from manta.cache.digests import READ_BYTES, extent_digest
from manta.cache.disk import TEMPORARY_SUFFIX, disk_errors
from manta.cache.inventory import BlobInfo
from manta.cache.layout import DATA_SUFFIX, DOOMED_SUFFIX, MAP_SUFFIX, Layout, blob_of
from manta.errors import Corrupt
from manta.model.ids import BlobId

if TYPE_CHECKING:
    from manta.cache.store import Blob

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Called in the worker thread with the bytes checked since the last call, once per chunk. What it raises ends the work and comes out."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a cache directory held when it was opened."""

    blobs: list[BlobInfo] = field(default_factory=list)
    unsealed: list[BlobId] = field(default_factory=list)
    """Complete, and not sealed: the last daemon ended before it compared them with their ids."""
    dropped: list[Path] = field(default_factory=list)
    """Files that belonged to nothing and were removed."""


def scan(layout: Layout) -> Scan:
    """SLOW: reads every blob's outline, about 36 µs each from a warm page cache, and removes files that belong to nothing.

    What one damaged file says never stops it: that blob is dropped, and fetched again when it is asked for. Raises CacheBroken.
    """
    found = Scan()
    with disk_errors(layout.blobs, "scanning the cache"):
        for folder in sorted(entry.path for entry in os.scandir(layout.blobs) if entry.is_dir(follow_symlinks=False)):
            _scan_folder(Path(folder), found)
    if found.dropped:
        logger.warning(
            "Removed %d stray files from %s, the first: %s", len(found.dropped), layout.blobs, found.dropped[0]
        )
    return found


def _scan_folder(folder: Path, found: Scan) -> None:
    names = {entry.name for entry in os.scandir(folder)}
    for name in sorted(names):
        leftover = name.endswith((TEMPORARY_SUFFIX, DOOMED_SUFFIX))
        ours = blob_of(name.removesuffix(TEMPORARY_SUFFIX).removesuffix(DOOMED_SUFFIX))
        if ours is None or ours[1] not in {DATA_SUFFIX, MAP_SUFFIX}:
            logger.warning("Left alone what is not Manta's: %s", folder / name)
            continue
        blob, suffix = ours
        other = f"{blob}{MAP_SUFFIX if suffix == DATA_SUFFIX else DATA_SUFFIX}"
        if leftover or other not in names:
            _drop(folder / name, found)
        elif suffix == MAP_SUFFIX:
            try:
                _scan_blob(blob, folder, found)
            except OSError as error:
                logger.warning("Cannot read the cached blob %s: %s", folder / name, error.strerror)


def _scan_blob(blob: BlobId, folder: Path, found: Scan) -> None:
    data, chunk_map = folder / f"{blob}{DATA_SUFFIX}", folder / f"{blob}{MAP_SUFFIX}"
    status = os.stat(data)
    try:
        header, cached = read_outline(chunk_map, status.st_size)
        if header.blob != blob:
            raise Corrupt(f"it is the map of {header.blob}")
    except Corrupt as reason:
        logger.warning("The chunk map %s is worthless: %s. The blob is dropped.", chunk_map, reason.message)
        _drop(chunk_map, found)
        _drop(data, found)
        return
    found.blobs.append(BlobInfo(blob, header.grid.size, cached, header.sealed, status.st_mtime))
    if cached == header.grid.size and not header.sealed:
        found.unsealed.append(blob)


def _drop(path: Path, found: Scan) -> None:
    with suppress(OSError):
        os.unlink(path)
        found.dropped.append(path)


def settle_doubtful(blob: Blob, progress: Progress | None = None) -> list[int]:
    """SLOW: ends the doubt that a host crash left about chunks of `blob`: they become present or absent. Returns the absent ones.

    May run while readers read and workers fetch. Raises NoSpace and CacheBroken.
    """
    buffer = bytearray(READ_BYTES)
    lost = []
    with blob.hold():
        for chunk in blob.doubtful:
            digest = blob.digest(chunk)
            if digest is None:
                continue  # cleared meanwhile
            extent = blob.grid.extent(chunk)
            try:
                with blob.descriptor() as fd:
                    good = extent_digest(fd, extent, buffer) == digest
            except (Corrupt, OSError):
                good = False  # the data file is too short, or the disk does not give it back
            if blob.settle(chunk, digest, good=good) and not good:
                lost.append(chunk)
            if progress is not None:
                progress(len(extent))
    if lost:
        logger.warning("%d chunks of %s do not match their digests, the first: %d", len(lost), blob.id, lost[0])
    return lost
