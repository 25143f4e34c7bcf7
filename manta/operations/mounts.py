"""The mounts: directories of the daemon's one filesystem that people and pods asked for, here and only here.

A mount is made in three steps: the daemon makes the directory (`create`), the caller binds it to where it wants it (bind mounts belong to
the caller's mount namespace), and says so (`bound`). It ends when the caller says so (`remove`) or when the binding is gone from mountinfo
(plain umount, fusermount3 -u). Without root there are no bind mounts: then the one mount is the root of the filesystem itself.
Runs in the daemon's trio thread.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from manta.cache.store import Store
from manta.control.protocol import Mount, MountRequest
from manta.errors import Absent, InUse, Invalid
from manta.fetch.sources import Provenance
from manta.fs.nodes import Folder, Node
from manta.fs.views import HubCacheFolder, HubFolder, SnapshotFolder
from manta.hub.catalog import Catalog, Resolution
from manta.hub.origin import Access
from manta.model.ids import DEFAULT_REVISION, BlobId, Commit, RepoId, Target, parse_target
from manta.model.snapshot import Contents, Snapshot
from manta.operations.failures import Failures
from manta.telemetry.events import FileRate

log = logging.getLogger(__name__)

BIND_SECONDS_MAX = 60.0
"""A directory that nobody has bound after this long belonged to a caller that died."""

FROZEN_MAX = 1000
"""Repos that one mount of the whole hub may have opened."""

TREES_MAX = 1000
"""Trees that one mount may hold in memory: of the repos it has opened and, in the hub-cache view, of each commit that was asked for or
that a ref has meant since. A tree of a hundred files is about 60 KB."""

FILES_MAX = 1_000_000
"""Files of all those trees, counted before the latest: 600 MB."""


_NO_RATES: Mapping[BlobId, FileRate] = {}


@dataclass(eq=False)
class MountScope:
    """One mount's view of the hub: its right to read, and the commits it has frozen. What `manta.fs.views` calls a SnapshotSource."""

    access: Access
    _catalog: Catalog
    _store: Store
    _frozen: dict[tuple[RepoId, str | None], Resolution] = field(default_factory=dict)
    _snapshots: dict[tuple[RepoId, Commit], Snapshot] = field(default_factory=dict)

    async def freeze(self, repo: RepoId, revision: str | None) -> Commit:
        """Raises InUse when the mount shows FROZEN_MAX repos already."""
        key = repo, revision
        if key not in self._frozen:
            if len(self._frozen) >= FROZEN_MAX:
                raise InUse(
                    f"This mount shows {FROZEN_MAX} repos already; unmount it and mount it again, or mount {repo} alone."
                )
            resolution = await self._catalog.resolve(repo, revision, self.access)
            self._frozen.setdefault(key, resolution)
        return self._frozen[key].commit

    async def current(self, repo: RepoId, revision: str) -> Commit:
        return (await self._catalog.current(repo, revision, self.access)).commit

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
            snapshot = await self._catalog.snapshot(repo, commit, self.access)
            if (denial := self._catalog.denial(snapshot, self.access)) is not None:
                raise denial
            self._snapshots.setdefault(key, snapshot)
        return self._snapshots[key]

    def frozen(self) -> Mapping[tuple[RepoId, str | None], Commit]:
        """What has been frozen and can be shown: one repo that may not be read must not spoil a listing of the others."""
        return {
            (repo, revision): resolution.commit
            for (repo, revision), resolution in self._frozen.items()
            if (repo, resolution.commit) in self._snapshots
        }

    def stale(self, repo: RepoId, revision: str | None) -> bool:
        """Whether what is frozen is what the cache remembered, because the hub could not be asked."""
        return self._frozen[repo, revision].stale

    def cached_bytes(self, snapshot: Snapshot, folder: str) -> int:
        return self._store.cached_of(snapshot.contents_of(folder).blobs)

    @property
    def held(self) -> Mapping[tuple[RepoId, Commit], Snapshot]:
        """What `snapshot` has given so far."""
        return self._snapshots


@dataclass(eq=False)
class Mounted:
    """One mount."""

    id: str
    request: MountRequest
    """Without its token, which is `scope.access` and shows in no text."""
    target: Target | None
    """None for the whole hub."""
    commit: Commit | None
    contents: Contents | None
    """Of the mounted folder; None for the whole hub, where it grows."""
    scope: MountScope
    root: Folder
    created: float
    directory: str
    confirmed: bool = False
    """The caller says that it has bound it."""
    seen: bool = False
    """Its binding was in our mountinfo. One in another mount namespace never is, and cannot be missed either."""


class _Blobs(Container[BlobId]):
    """The blobs of some snapshots, without a set of them all: a hundred mounts may show the same 200,000 files."""

    def __init__(self, parts: Sequence[Mapping[BlobId, int]]) -> None:
        self._parts = parts

    def __contains__(self, blob: object) -> bool:
        return any(blob in part for part in self._parts)


class _RootFolder(Folder):
    """The top of the daemon's filesystem: one directory per mount; or, without root, the one mount itself."""

    key = "root"
    lifetime_s = 0.0  # a directory is looked up by its caller as soon as it is there

    def __init__(self, mounts: Mounts) -> None:
        self._mounts = mounts

    async def child(self, name: str) -> Node:
        if self._mounts.direct:
            return await self._mounts.only.root.child(name)
        return self._mounts[name].root

    async def children(self) -> Sequence[tuple[str, Node]]:
        if self._mounts.direct:
            return await self._mounts.only.root.children()
        return [(mounted.id, mounted.root) for mounted in self._mounts]

    def attributes(self) -> Mapping[str, str]:
        return self._mounts.only.root.attributes() if self._mounts.direct else {}


class Mounts:
    """`root` is where the daemon's filesystem is mounted; None: mounts are direct. `gone` hears of each mount that ended."""

    def __init__(self, catalog: Catalog, store: Store, root: Path | None, gone: Callable[[Mounted], None]) -> None:
        self._catalog = catalog
        self._store = store
        self._root = root
        self._gone = gone
        self._mounted: dict[str, Mounted] = {}
        self._numbers = itertools.count(1)
        self.folder: Folder = _RootFolder(self)

    @property
    def direct(self) -> bool:
        return self._root is None

    @property
    def only(self) -> Mounted:
        """The one mount of a daemon without root. Raises Absent where there is none."""
        for mounted in self._mounted.values():
            return mounted
        raise Absent("Nothing is mounted.")

    def __getitem__(self, mount_id: str) -> Mounted:
        if mount_id not in self._mounted:
            raise Absent(f"There is no mount {mount_id!r}; `manta status` lists them.")
        return self._mounted[mount_id]

    def __iter__(self) -> Iterator[Mounted]:
        return iter(list(self._mounted.values()))

    def __len__(self) -> int:
        return len(self._mounted)

    async def create(self, request: MountRequest, access: Access) -> Mounted:
        """Resolves and freezes, and shows the directory. Raises what the hub says, Invalid for a bad request, InUse for a second direct
        one."""
        target = parse_target(request.target) if request.target else None
        scope = MountScope(access, self._catalog, self._store)
        number = next(self._numbers)
        slug = "hub" if target is None else target.repo.name.replace("/", "--")
        mount_id = f"{number}-{slug}"
        commit = contents = None
        root: Folder
        if target is None:
            root = HubFolder(scope, mount_id) if request.view == "tree" else HubCacheFolder(scope, mount_id)
        else:
            commit = await scope.freeze(target.repo, target.revision)
            snapshot = await scope.snapshot(target.repo, commit)
            contents = snapshot.contents_of(target.subfolder)
            if request.view == "tree":
                root = SnapshotFolder(scope, snapshot, target.subfolder, place=mount_id)
            elif target.subfolder:
                raise Invalid(
                    f"The hub-cache view shows a repo as a whole: leave {target.subfolder!r} away, or use --view tree."
                )
            else:
                root = HubCacheFolder(scope, mount_id, only=(target.repo, target.revision))
        if self.direct and self._mounted:
            other = self.only
            raise InUse(
                f"Without root a daemon serves one mount, and it serves {other.directory}. Unmount that first, run as root, or give this"
                " mount a cache of its own with --cache-dir."
            )
        request = msgspec.structs.replace(request, token="")
        mounted = Mounted(
            mount_id, request, target, commit, contents, scope, root, trio.current_time(), request.directory
        )
        self._mounted[mount_id] = mounted
        if self.direct:
            # The top is the mount itself: what it lacks it goes on lacking.
            self.folder.lifetime_s = root.lifetime_s
        log.info("mount %s: %s at %s for %s", mount_id, request.target or "the hub", commit or "-", request.directory)
        return mounted

    def bound(self, mount_id: str, directory: str) -> Mounted:
        mounted = self[mount_id]
        mounted.directory = directory
        mounted.confirmed = True
        return mounted

    def remove(self, mount_id: str) -> Mounted:
        """The directory is gone; open files in it stay readable until they are closed."""
        mounted = self[mount_id]
        del self._mounted[mount_id]
        log.info("mount %s ended (%s)", mount_id, mounted.directory)
        self._gone(mounted)
        return mounted

    def drop_unbound(self, bound_roots: set[str], now: float) -> None:
        """Ends the mounts whose binding is gone. `bound_roots`: the directories of our filesystem that mountinfo shows bound."""
        for mounted in self:
            if mounted.id in bound_roots:
                mounted.seen = True
            elif mounted.seen or (not mounted.confirmed and now - mounted.created > BIND_SECONDS_MAX):
                self.remove(mounted.id)

    def source(self, mounted: Mounted) -> str:
        """The directory to bind."""
        return mounted.directory if self._root is None else str(self._root / mounted.id)

    def totals(self) -> tuple[int, int]:
        """Bytes and files of all mounts together."""
        shown = [snapshot.contents for mounted in self for snapshot in mounted.scope.held.values()]
        return sum(contents.size for contents in shown), sum(contents.files for contents in shown)

    def blobs(self) -> Container[BlobId]:
        """The blobs that the mounts show now."""
        shown = {key: snapshot for mounted in self for key, snapshot in mounted.scope.held.items()}
        return _Blobs([snapshot.contents.blobs for snapshot in shown.values()])

    def provenances(self, blob: BlobId) -> Iterator[Provenance]:
        """Every place where a mount shows `blob`. Looks through all their files: for when something is wrong with the place in use."""
        for mounted in self._mounted.values():
            scope = mounted.scope
            for (repo, commit), snapshot in scope.held.items():
                for entry in snapshot.showing(blob):
                    yield Provenance(repo, commit, entry, scope.access)

    def describe(self, mounted: Mounted, failures: Failures, rates: Mapping[BlobId, FileRate] = _NO_RATES) -> Mount:
        """What status says of it. Sizes are of the mounted folder; for the whole hub, of the repos it has opened.

        `rates`: what comes for each blob that is being fetched.
        """
        scope, target = mounted.scope, mounted.target
        whole_hub = [snapshot.contents for snapshot in scope.held.values()]
        shown = [mounted.contents] if mounted.contents is not None else whole_hub
        return Mount(
            id=mounted.id,
            target=mounted.request.target,
            revision=(target.revision or DEFAULT_REVISION) if target is not None else "",
            commit=mounted.commit or "",
            view=mounted.request.view,
            source=self.source(mounted),
            directory=mounted.directory,
            files=sum(contents.files for contents in shown),
            size=sum(contents.size for contents in shown),
            cached=sum(self._store.cached_of(contents.blobs) for contents in shown),
            stale=target is not None and scope.stale(target.repo, target.revision),
            errors=failures.of(scope.held),
            rate=sum(
                rate.bytes_per_second
                for blob, rate in rates.items()
                if any(blob in contents.blobs for contents in shown)
            ),
        )
