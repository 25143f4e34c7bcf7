"""What a person pinned, and the file that remembers it, here and only here. Used by the daemon: for eviction, and for `manta cache pin`.

A pin has the name it was asked for by and the blobs that were meant at that time, cached or not, so it holds without the hub and without
stored trees. Questions belong to the trio thread; `add` and `drop` are SLOW (fsync).

A damaged file: who pinned a model counts on finding it when the hub is away, while a cache that evicts nothing fails loudly (NoSpace) and
loses nothing. So until pins are written again *every* blob counts as pinned, nothing is refused, `problem` says so for status and log, and
the damaged file stays where it is, so that a restart knows too. The next `add` or `drop` puts a copy aside as pins.json.damaged and starts
anew.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from manta.cache.disk import disk_error, disk_errors, replace_file
from manta.errors import Invalid
from manta.model.ids import BlobId, parse_blob_id

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Pin:
    """`blobs` stay in the cache until the pin called `name` is dropped. `since` is seconds since the epoch."""

    name: str
    blobs: frozenset[BlobId]
    since: float


class _StoredPin(msgspec.Struct, frozen=True):
    name: str
    since: float
    blobs: list[str]


class _File(msgspec.Struct, frozen=True):
    version: int
    pins: list[_StoredPin]


_decoder = msgspec.json.Decoder(_File)


class Pins:
    """The pins of one cache directory. ``blob in pins`` is what eviction asks."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises CacheBroken where the disk fails; a damaged file is no error, see the module."""
        self._path = path
        self._lock = threading.Lock()
        # Replaced as a whole and never changed, so that a reader in another thread sees the old pins or the new.
        self._pins: Mapping[str, Pin] = MappingProxyType({})
        self._blobs: frozenset[BlobId] = frozenset()
        self.problem: str | None = None
        """A sentence for a person while the file is damaged."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise disk_error(error, path, "reading the pins") from error
        try:
            stored = _decoder.decode(data)
            if stored.version != _VERSION:
                raise Invalid(f"its format is version {stored.version}, not {_VERSION}")
            self._adopt({p.name: Pin(p.name, frozenset(map(parse_blob_id, p.blobs)), p.since) for p in stored.pins})
        except (msgspec.DecodeError, UnicodeDecodeError, Invalid) as error:
            self.problem = (
                f"The list of pins {path} is damaged ({error}). Until something is pinned or unpinned again, everything counts as"
                " pinned and nothing is evicted: pin again what must stay."
            )
            logger.error("%s", self.problem)

    def __contains__(self, blob: object) -> bool:
        return self.problem is not None or blob in self._blobs

    @property
    def pins(self) -> Mapping[str, Pin]:
        """The pins by name, as they are now."""
        return self._pins

    def add(self, name: str, blobs: Iterable[BlobId], when: float) -> Pin:
        """SLOW: pins `blobs` as `name`, instead of what had that name. On the disk when it returns. Raises NoSpace and CacheBroken."""
        pin = Pin(name, frozenset(blobs), when)
        with self._lock:
            self._save({**self._pins, name: pin})
        return pin

    def drop(self, name: str) -> Pin | None:
        """SLOW: unpins `name`; None where nothing was pinned by that name. Raises NoSpace and CacheBroken."""
        with self._lock:
            dropped = self._pins.get(name)
            if dropped is not None or self.problem is not None:
                self._save({known: pin for known, pin in self._pins.items() if known != name})
        return dropped

    def _adopt(self, pins: Mapping[str, Pin]) -> None:
        self._pins = MappingProxyType(dict(pins))
        self._blobs = frozenset().union(*(pin.blobs for pin in pins.values()))

    def _save(self, pins: Mapping[str, Pin]) -> None:
        stored = _File(_VERSION, [_StoredPin(p.name, p.since, sorted(map(str, p.blobs))) for p in pins.values()])
        with disk_errors(self._path, "saving the pins"):
            if self.problem is not None:
                # A copy, not a rename: a crash before the new file is there must not look like a cache without pins.
                with suppress(FileNotFoundError):
                    replace_file(self._path.with_name(self._path.name + ".damaged"), self._path.read_bytes())
            replace_file(self._path, msgspec.json.format(msgspec.json.encode(stored), indent=1))
        self._adopt(pins)
        self.problem = None
