"""What one mount has been shown of the hub, by its own right: the commits it has frozen and the trees it holds. Here and only here.

Runs in the daemon's trio thread. Used by `manta.operations.mounts`, and by `manta.fs.views` as their source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from manta.cache.store import Store
from manta.errors import InUse, Invalid, Unavailable
from manta.fs.journal import Frozen, Journal, NoJournal, RecoveredMount, Showed
from manta.hub.catalog import Catalog, Resolution
from manta.hub.origin import Access
from manta.model.ids import Commit, RepoId, RepoKind
from manta.model.snapshot import Snapshot

FROZEN_MAX = 1000
"""Repos that one mount of the whole hub may have opened."""

TREES_MAX = 1000
"""Trees that one mount may hold in memory: of the repos it has opened and, in the hub-cache view, of each commit that was asked for or
that a ref has meant since. A tree of a hundred files is about 60 KB."""

FILES_MAX = 1_000_000
"""Files of all those trees, counted before the latest: 600 MB."""


@dataclass(eq=False)
class MountScope:
    """One mount's view of the hub: its right to read, and the commits it has frozen. What `manta.fs.views` calls a SnapshotSource.

    `access` is what its files are read by, and stays the same. `asking` is with what the catalog is asked: by default the same.
    `checked`: each tree is shown only while the origin says that it may be, see `Catalog.authorise`.
    """

    access: Access
    _catalog: Catalog
    _store: Store
    _frozen: dict[tuple[RepoId, str | None], Resolution] = field(default_factory=dict)
    _snapshots: dict[tuple[RepoId, Commit], Snapshot] = field(default_factory=dict)
    _awaited: dict[tuple[RepoId, Commit], None] = field(default_factory=dict)
    """Trees that an earlier daemon held for this mount, and that were not found yet."""
    _journal: Journal = field(default_factory=NoJournal)
    _mount: str = ""
    asking: Access = field(default=None)  # type: ignore[assignment]  # in __post_init__
    checked: bool = False

    def __post_init__(self) -> None:
        self.asking = self.asking or self.access

    async def freeze(self, repo: RepoId, revision: str | None) -> Commit:
        """Raises InUse when the mount shows FROZEN_MAX repos already."""
        key = repo, revision
        if key not in self._frozen:
            if len(self._frozen) >= FROZEN_MAX:
                raise InUse(
                    f"This mount shows {FROZEN_MAX} repos already; unmount it and mount it again, or mount {repo} alone."
                )
            resolution = await self._catalog.resolve(repo, revision, self.asking)
            if self.checked and resolution.stale:
                try:
                    await self._catalog.authorise(repo, resolution.commit, self.asking)
                except Unavailable:
                    # In the words that it would have without anything of it in the cache: whether there is, is not told.
                    raise Unavailable(resolution.reason) from None
            if key not in self._frozen:
                self._frozen[key] = resolution
                self._journal.frozen(self._mount, _frozen(repo, revision, resolution))
        return self._frozen[key].commit

    async def current(self, repo: RepoId, revision: str) -> Commit:
        return (await self._catalog.current(repo, revision, self.asking)).commit

    async def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot:
        """Held as long as the mount, so that it outlives the repo. Raises Denied where nothing of it may be read."""
        key = repo, commit
        if key not in self._snapshots:
            files = sum(len(held.files) for held in self._snapshots.values())
            if len(self._snapshots) >= TREES_MAX or files >= FILES_MAX:
                raise InUse(
                    f"This mount shows {len(self._snapshots)} commits with {files} files already; unmount it and mount it again, or mount"
                    f" {repo} alone."
                )
            snapshot = await self._catalog.stored(repo, commit) if key in self._awaited else None
            if snapshot is None:
                if self.checked:
                    await self._catalog.authorise(repo, commit, self.asking)
                snapshot = await self._catalog.snapshot(repo, commit, self.asking)
                if (denial := self._catalog.denial(snapshot, self.asking)) is not None:
                    raise denial
            if key not in self._snapshots:
                self._snapshots[key] = snapshot
                self._awaited.pop(key, None)
                self._journal.showed(self._mount, Showed(_written(repo), commit))
        return self._snapshots[key]

    def frozen(self) -> Mapping[tuple[RepoId, str | None], Commit]:
        """What has been frozen and can be shown: one repo that may not be read must not spoil a listing of the others."""
        return {
            (repo, revision): resolution.commit
            for (repo, revision), resolution in self._frozen.items()
            if (repo, resolution.commit) in self._snapshots
        }

    def commit(self, repo: RepoId, revision: str | None) -> Commit:
        """What is frozen for it. Raises Invalid where nothing is."""
        if (repo, revision) not in self._frozen:
            raise Invalid(f"{repo} was not frozen by the daemon before.")
        return self._frozen[repo, revision].commit

    def stale(self, repo: RepoId, revision: str | None) -> bool:
        """Whether what is frozen is what the cache remembered, because the hub could not be asked."""
        return self._frozen[repo, revision].stale

    def cached_bytes(self, snapshot: Snapshot, folder: str) -> int:
        return self._store.cached_of(snapshot.contents_of(folder).blobs)

    def shown(self, repo: RepoId) -> Sequence[Commit]:
        return [commit for shown, commit in self._snapshots if shown == repo]

    async def authorise(self, repo: RepoId, commit: Commit) -> None:
        """Has the right to what is shown asked about anew. Raises as `Catalog.authorise`; what is held stays."""
        await self._catalog.authorise(repo, commit, self.asking)

    def follow(self, journal: Journal, mount: str) -> None:
        """From now on `journal` is told what this mount freezes and is shown."""
        self._journal, self._mount = journal, mount

    def rewrite(self) -> None:
        """Tells the journal all of it."""
        for (repo, revision), resolution in self._frozen.items():
            self._journal.frozen(self._mount, _frozen(repo, revision, resolution))
        for repo, commit in (*self._snapshots, *self._awaited):
            self._journal.showed(self._mount, Showed(_written(repo), commit))

    def recover(self, recovered: RecoveredMount) -> None:
        """Takes over what it had frozen and held, of which `load` finds the trees. Raises Invalid."""
        for frozen in recovered.frozen:
            self._frozen[_read(frozen.repo), frozen.revision] = Resolution(Commit(frozen.commit), stale=frozen.stale)
        for showed in recovered.showed:
            self._awaited[_read(showed.repo), Commit(showed.commit)] = None

    async def load(self) -> None:
        """Finds the trees that an earlier daemon held, as far as they are stored."""
        for key in list(self._awaited):
            if (snapshot := await self._catalog.stored(*key)) is not None:
                self._snapshots[key] = snapshot
                del self._awaited[key]

    @property
    def held(self) -> Mapping[tuple[RepoId, Commit], Snapshot]:
        """What `snapshot` has given so far."""
        return self._snapshots


def _frozen(repo: RepoId, revision: str | None, resolution: Resolution) -> Frozen:
    return Frozen(_written(repo), revision, resolution.commit, resolution.stale)


def _written(repo: RepoId) -> str:
    """With its kind in any case: an organisation may be called "datasets"."""
    return f"{repo.kind.value}/{repo.name}"


def _read(text: str) -> RepoId:
    """Raises Invalid for what `_written` did not write."""
    kind, _, name = text.partition("/")
    try:
        return RepoId(RepoKind(kind), name)
    except ValueError as e:
        raise Invalid(f"{text!r} is no repo.") from e
