"""Care of the cache as a person asks for it: what is in it, what is pinned, what is removed, here and only here. trio thread.

What goes by itself when room is needed is `manta.operations.room`'s.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Sequence, Set

import trio

from manta.cache.inventory import BlobInfo
from manta.cache.metadata import MetadataStore
from manta.cache.pins import Pins
from manta.cache.policy import oldest
from manta.cache.store import Store
from manta.config import CacheConfig
from manta.control.protocol import Blob, CacheListing, Removal
from manta.errors import Absent, InUse, Invalid
from manta.model.ids import DEFAULT_REVISION, BlobId, Commit, Target, is_commit, parse_blob_id, parse_target
from manta.model.snapshot import Snapshot
from manta.operations.room import Room
from manta.telemetry.events import Telemetry

NAMES_MAX = 4

SHORT_COMMIT = re.compile("[0-9a-f]{7,39}")
"""The beginning of a commit, as `manta cache ls` shows it (12 digits) and git does (7 at least)."""

SHORT_BLOB_MIN = len("git-") + 7


class Housekeeping:
    """`mounted` names the blobs of all mounts: they count as in use. `telemetry` hears what goes; None: nobody looks."""

    def __init__(
        self,
        store: Store,
        metadata: MetadataStore,
        pins: Pins,
        config: CacheConfig,
        room: Room,
        mounted: Callable[[], Container[BlobId]],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._pins = pins
        self._config = config
        self._room = room
        self._mounted = mounted
        self._telemetry = telemetry or Telemetry()

    # What there is ---------------------------------------------------------------------------------------------------

    async def listing(self, only: Iterable[BlobId] | None = None) -> CacheListing:
        wanted = None if only is None else set(only)
        infos = [i for i in self._store.listing() if wanted is None or i.id in wanted]
        return await trio.to_thread.run_sync(self._listed, infos, self._mounted())

    def _listed(self, infos: Sequence[BlobInfo], mounted: Container[BlobId]) -> CacheListing:
        """SLOW: reads the stored trees, and takes 10 µs per blob."""
        names = self._names({info.id for info in infos})
        blobs = [self._describe(info, names.get(info.id, []), mounted) for info in infos]
        blobs.sort(key=lambda b: (b.names, b.id))
        return CacheListing(blobs, self._store.cached_bytes, self._config.size)

    def _describe(self, info: BlobInfo, names: list[str], mounted: Container[BlobId]) -> Blob:
        return Blob(
            id=str(info.id),
            size=info.size,
            cached=info.cached,
            sealed=info.sealed,
            pinned=info.id in self._pins,
            in_use=info.in_use or info.id in mounted,
            last_used=info.last_used,
            names=names,
        )

    def _names(self, blobs: Set[BlobId]) -> dict[BlobId, list[str]]:
        """Where stored trees show each of `blobs`. SLOW: reads them all."""
        names: dict[BlobId, list[str]] = defaultdict(list)
        for repo in self._metadata.repos():
            for commit in self._metadata.snapshots(repo):
                snapshot = self._metadata.snapshot(repo, commit)
                for entry in snapshot.files.values() if snapshot is not None else ():
                    if entry.blob is not None and entry.blob in blobs and len(names[entry.blob]) < NAMES_MAX:
                        names[entry.blob].append(f"{repo}@{commit[:12]}/{entry.path}")
        return names

    # What a person names ---------------------------------------------------------------------------------------------

    async def select(self, names: list[str]) -> set[BlobId]:
        """The blobs that `names` mean: blob ids, or targets by what is stored of them. Raises Absent, Invalid."""
        chosen: set[BlobId] = set()
        for name in names:
            chosen |= await trio.to_thread.run_sync(self._select_one, name)
        return chosen

    def _select_one(self, name: str) -> set[BlobId]:
        if "/" not in name:
            return {self._blob(name)}
        target = parse_target(name)
        snapshot = self._stored(target)
        entries = list(snapshot.below(target.subfolder))
        if not entries and (file := snapshot.files.get(target.subfolder)) is not None:
            entries = [file]
        if target.subfolder and not entries:
            raise Absent(f"{target.repo}@{snapshot.commit[:12]} has no folder or file {target.subfolder!r}.")
        return {entry.blob for entry in entries if entry.blob is not None}

    def _blob(self, name: str) -> BlobId:
        """The blob with that id, or the only one whose id begins so."""
        if len(name) >= SHORT_BLOB_MIN:
            found = [info.id for info in self._store.listing() if str(info.id).startswith(name)]
            if len(found) == 1:
                return found[0]
            if found:
                raise Invalid(
                    f"{len(found)} blobs in the cache begin with {name}: name more of the id (`manta cache ls --verbose`)."
                )
        parse_blob_id(name)
        raise Absent(f"{name} is not in the cache; `manta cache ls` lists what is.")

    def _stored(self, target: Target) -> Snapshot:
        revision = target.revision or DEFAULT_REVISION
        commit: Commit | None = None
        if is_commit(revision):
            commit = Commit(revision)
        elif (ref := self._metadata.ref(target.repo, revision)) is not None:
            commit = ref[0]
        elif SHORT_COMMIT.fullmatch(revision):
            found = [known for known in self._metadata.snapshots(target.repo) if known.startswith(revision)]
            if len(found) > 1:
                raise Invalid(
                    f"{len(found)} commits of {target.repo} in the cache begin with {revision}: name more of it."
                )
            commit = found[0] if found else None
        snapshot = self._metadata.snapshot(target.repo, commit) if commit is not None else None
        if snapshot is None:
            raise Absent(f"{target.repo}@{revision} is not in the cache: mount it or prefetch it first.")
        return snapshot

    # What may go -----------------------------------------------------------------------------------------------------

    async def pin(self, names: list[str]) -> CacheListing:
        if not names:
            raise Invalid("Say what to pin: a blob id or a target such as ORG/NAME.")
        chosen = {name: await self.select([name]) for name in names}  # all or none
        for name, blobs in chosen.items():
            await trio.to_thread.run_sync(self._pins.add, name, blobs, time.time())
        return await self.listing(set().union(*chosen.values()))

    async def keep(self, name: str, blobs: Iterable[BlobId]) -> None:
        """Pins `blobs` as `name`, unless they are."""
        wanted, pinned = frozenset(blobs), self._pins.pins.get(name)
        if pinned is None or pinned.blobs != wanted:
            await trio.to_thread.run_sync(self._pins.add, name, wanted, time.time())

    async def unpin(self, names: list[str]) -> CacheListing:
        """Takes names as they were given to `pin`. No names: all pins."""
        chosen: set[BlobId] = set()
        unknown = [name for name in names if name not in self._pins.pins]
        if self._pins.problem is not None:
            # Any drop ends the state in which everything counts as pinned.
            await trio.to_thread.run_sync(self._pins.drop, "")
        elif unknown:
            raise Absent(
                f"{unknown[0]!r} is not pinned. Pins have the name they were given: {', '.join(self._pins.pins) or 'there are none'}."
            )
        for name in names or list(self._pins.pins):
            pin = await trio.to_thread.run_sync(self._pins.drop, name)
            chosen |= pin.blobs if pin is not None else set()
        return await self.listing(chosen)

    async def remove(self, names: list[str]) -> Removal:
        """Removes what is neither in use nor pinned; says why it kept the rest."""
        if not names:
            raise Invalid(
                "Say what to remove: a blob id or a target such as ORG/NAME. To empty the cache: manta cache gc --size 0."
            )
        chosen = await self.select(names)
        return await self._remove([info for info in map(self._store.find, sorted(chosen)) if info is not None])

    async def collect(self, size: int, *, dry_run: bool) -> Removal:
        """Evicts, least recently used first, down to `size` bytes (-1: the configured bounds)."""
        needed = self._store.cached_bytes - size if size >= 0 else self._room.needed()
        chosen = oldest(self._room.evictable(), needed, self._pins)
        if dry_run:
            listed = await trio.to_thread.run_sync(self._listed, chosen, self._mounted())
            return Removal(listed.blobs, sum(info.cached for info in chosen), [])
        return await self._remove(chosen)

    async def _remove(self, infos: list[BlobInfo]) -> Removal:
        names = await trio.to_thread.run_sync(self._names, {info.id for info in infos}) if infos else {}
        removed, kept, freed = [], [], 0
        mounted = self._mounted()
        for info in infos:
            described = self._describe(info, names.get(info.id, []), mounted)
            title = described.names[0] if described.names else described.id
            if described.pinned:
                kept.append(f"{title} is pinned: `manta cache unpin` it first.")
            elif info.id in mounted:
                kept.append(f"{title} is part of a mount: unmount it first.")
            else:
                try:
                    freed += await trio.to_thread.run_sync(self._store.remove, info.id)
                except (InUse, Absent) as e:
                    kept.append(e.message)
                else:
                    removed.append(described)
        self._telemetry.evicted(len(removed), freed, "request")
        return Removal(removed, freed, kept)
