"""Where everything lies in a cache directory, and whether a directory is one, here and only here.

    version           the format's number
    CACHEDIR.TAG      tells backup tools to skip it (bford.info/cachedir)
    lock              held by the daemon (`manta.cache.lock`)
    pins.json         what a person pinned (`manta.cache.pins`)
    node              by what id other nodes know this one
    meta/             trees and refs (`manta.cache.metadata`)
    blobs/3f/sha256-3f....data and .map
                      a blob's bytes, sparse, and its chunk map (`manta.cache.chunkmap`); in 256 folders by the first two digits

The daemon is the one writer; peer servers only open the files under blobs/ for reading. All of it is for the daemon's user alone: cached
models may be gated or private.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from manta.cache.disk import TEMPORARY_SUFFIX, disk_errors, replace_file
from manta.errors import CacheBroken, Invalid
from manta.model.ids import BlobId, parse_blob_id

logger = logging.getLogger(__name__)

FORMAT = 1
"""Grows when an older Manta could no longer read what a newer one wrote. The map's own version is in `manta.cache.chunkmap`."""

DATA_SUFFIX = ".data"
MAP_SUFFIX = ".map"
DOOMED_SUFFIX = ".gone"
"""Ends the name of a data file that was removed from the cache and only waits for its slow unlink."""

_TAG = b"""Signature: 8a477f597d28d172789f06886806bc55
# This directory is a cache of Manta. Everything in it can be fetched again; backups may skip it.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths in the cache directory `directory`."""

    directory: Path

    @property
    def blobs(self) -> Path:
        return self.directory / "blobs"

    @property
    def meta(self) -> Path:
        return self.directory / "meta"

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    @property
    def pins(self) -> Path:
        return self.directory / "pins.json"

    @property
    def node(self) -> Path:
        return self.directory / "node"

    @property
    def version(self) -> Path:
        return self.directory / "version"

    @property
    def tag(self) -> Path:
        return self.directory / "CACHEDIR.TAG"

    def data(self, blob: BlobId) -> Path:
        return self.directory / f"blobs/{blob.hex[:2]}/{blob}{DATA_SUFFIX}"

    def map(self, blob: BlobId) -> Path:
        return self.directory / f"blobs/{blob.hex[:2]}/{blob}{MAP_SUFFIX}"

    def claim(self) -> None:
        """Makes the directory, or checks that it is a cache or empty. A directory that is not ours is not touched.

        Raises Invalid for a directory with other things in it and for a cache of a newer Manta; NoSpace and CacheBroken.
        """
        with disk_errors(self.directory, "preparing the cache directory"):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_ours({entry.name for entry in os.scandir(self.directory)})

    def prepare(self) -> None:
        """SLOW: makes what is missing in the directory, with its lock held. Raises NoSpace and CacheBroken."""
        with disk_errors(self.directory, "preparing the cache directory"):
            self._close_to_others()
            self.blobs.mkdir(mode=0o700, exist_ok=True)
            self.meta.mkdir(mode=0o700, exist_ok=True)
            if not self.tag.exists():
                replace_file(self.tag, _TAG)
            if not self.version.exists():
                replace_file(self.version, b"%d\n" % FORMAT)

    def _check_ours(self, names: set[str]) -> None:
        if self.version.name not in names:
            ours = {p.name for p in (self.blobs, self.meta, self.lock, self.tag)}
            ours |= {name + TEMPORARY_SUFFIX for name in (self.tag.name, self.version.name)}
            # A fresh filesystem mounted here has a lost+found.
            if foreign := sorted(names - ours - {"lost+found"}):
                raise Invalid(
                    f"{self.directory} is no Manta cache and is not empty (it holds {foreign[0]!r})."
                    " Name an empty or new directory as the cache."
                )
            return
        text = self.version.read_text("ascii", "replace").strip()
        if not text.isdecimal():
            raise CacheBroken(
                f"{self.version} is damaged: it should hold the number {FORMAT}."
                f" Write that into it if no newer Manta used this cache, else remove {self.directory}."
            )
        if int(text) > FORMAT:
            raise Invalid(
                f"The cache {self.directory} was written by a newer Manta (format {text}; this one knows {FORMAT})."
                " Upgrade Manta, or name another cache directory."
            )

    def _close_to_others(self) -> None:
        if os.stat(self.directory).st_mode & 0o077:
            try:
                os.chmod(self.directory, 0o700)
            except PermissionError:
                logger.warning(
                    "%s is open to other users and belongs to another one; its folders are closed.", self.directory
                )


def node_id(layout: Layout) -> str:
    """SLOW: the id of the node whose cache this is, 16 hex digits: made once, and kept with the cache, which is what others know it for.

    Raises NoSpace and CacheBroken.
    """
    with disk_errors(layout.node, "reading the node's id"):
        try:
            known = layout.node.read_text("ascii", "replace").strip()
        except FileNotFoundError:
            known = ""
        if re.fullmatch(r"[0-9a-f]{16}", known):
            return known
        made = secrets.token_hex(8)
        replace_file(layout.node, f"{made}\n".encode())
        return made


def blob_of(name: str) -> tuple[BlobId, str] | None:
    """The blob that a file name under blobs/ belongs to, and the name's suffix; None for a name that is not ours."""
    stem, dot, suffix = name.rpartition(".")
    try:
        return parse_blob_id(stem), dot + suffix
    except Invalid:
        return None
