"""The mounts: directories of the daemon's one filesystem that people and pods asked for, here and only here.

A mount is made in three steps: the daemon makes the directory (`create`), the caller binds it to where it wants it (bind mounts belong to
the caller's mount namespace), and says so (`bound`). It ends when the caller says so (`remove`) or when the binding is gone from mountinfo
(plain umount, fusermount3 -u). Without root there are no bind mounts: then the one mount is the root of the filesystem itself.
Runs in the daemon's trio thread.

Where mounts outlive the daemon, the journal has what the next one needs to show the same: each mount with its token, what it has frozen
and which trees it has been shown. `restore` makes them again of stored trees, without asking the hub.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from manta.cache.store import Store
from manta.control.protocol import Mount, MountRequest
from manta.errors import Absent, InUse, Invalid, MantaError
from manta.fetch.sources import Provenance
from manta.fs.journal import Frozen, Journal, NoJournal, Recovered, RecoveredMount, Showed
from manta.fs.nodes import Folder, Node
from manta.fs.views import AwaitedFolder, HubCacheFolder, HubFolder, SnapshotFolder
from manta.hub.catalog import Catalog, Resolution
from manta.hub.origin import Access
from manta.model.ids import DEFAULT_REVISION, BlobId, Commit, RepoId, RepoKind, Target, parse_target
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

RESTORE_SECONDS_MAX = 20.0
"""How long `restore` waits for stored trees: a tree of 10,000 files takes 40 ms, while the kernel's requests wait. What has not come by
then is looked for when it is asked for."""


_NO_RATES: Mapping[BlobId, FileRate] = {}


@dataclass(eq=False)
class MountScope:
    """One mount's view of the hub: its right to read, and the commits it has frozen. What `manta.fs.views` calls a SnapshotSource."""

    access: Access
    _catalog: Catalog
    _store: Store
    _frozen: dict[tuple[RepoId, str | None], Resolution] = field(default_factory=dict)
    _snapshots: dict[tuple[RepoId, Commit], Snapshot] = field(default_factory=dict)
    _awaited: dict[tuple[RepoId, Commit], None] = field(default_factory=dict)
    """Trees that an earlier daemon held for this mount, and that were not found yet."""
    _journal: Journal = field(default_factory=NoJournal)
    _mount: str = ""

    async def freeze(self, repo: RepoId, revision: str | None) -> Commit:
        """Raises InUse when the mount shows FROZEN_MAX repos already."""
        key = repo, revision
        if key not in self._frozen:
            if len(self._frozen) >= FROZEN_MAX:
                raise InUse(
                    f"This mount shows {FROZEN_MAX} repos already; unmount it and mount it again, or mount {repo} alone."
                )
            resolution = await self._catalog.resolve(repo, revision, self.access)
            if key not in self._frozen:
                self._frozen[key] = resolution
                self._journal.frozen(self._mount, _frozen(repo, revision, resolution))
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
            snapshot = await self._catalog.stored(repo, commit) if key in self._awaited else None
            if snapshot is None:
                snapshot = await self._catalog.snapshot(repo, commit, self.access)
                if (denial := self._catalog.denial(snapshot, self.access)) is not None:
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


class _Content(msgspec.Struct, frozen=True):
    """What the journal has of a mount."""

    request: MountRequest
    """With its token, where that is not the daemon's own."""
    directory: str
    created: float
    """Seconds since the epoch."""
    confirmed: bool
    seen: bool = False


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
    """Of the mounted folder; None for the whole hub, where it grows, and while its tree is awaited."""
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
    """`root` is where the daemon's filesystem is mounted; None: mounts are direct. `gone` hears of each mount that ended, `journal` of all
    that the next daemon must know."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        root: Path | None,
        gone: Callable[[Mounted], None],
        journal: Journal | None = None,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._root = root
        self._gone = gone
        self._mounted: dict[str, Mounted] = {}
        self._made = 0
        self._journal = journal or NoJournal()
        self._journal.rewritten_by(self._rewrite)
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
        self._made += 1
        slug = "hub" if target is None else target.repo.name.replace("/", "--")
        mount_id = f"{self._made}-{slug}"
        commit = contents = None
        if target is not None:
            commit = await scope.freeze(target.repo, target.revision)
            contents = (await scope.snapshot(target.repo, commit)).contents_of(target.subfolder)
        root = self._root_of(mount_id, target, request, scope, commit)
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
        self._show(mounted)
        scope.follow(self._journal, mount_id)
        # The mount last: where the daemon dies before that, the next one has never heard of it.
        self._journal.numbered(self._made)
        scope.rewrite()
        self._record(mounted)
        log.info("mount %s: %s at %s for %s", mount_id, request.target or "the hub", commit or "-", request.directory)
        return mounted

    @staticmethod
    def _root_of(
        mount_id: str, target: Target | None, request: MountRequest, scope: MountScope, commit: Commit | None
    ) -> Folder:
        """Raises Invalid for what cannot be shown so, Absent where the tree lacks the folder."""
        if target is None or commit is None:
            return HubFolder(scope, mount_id) if request.view == "tree" else HubCacheFolder(scope, mount_id)
        if request.view == "tree":
            if (snapshot := scope.held.get((target.repo, commit))) is None:
                return AwaitedFolder(scope, target.repo, commit, target.subfolder, place=mount_id)
            return SnapshotFolder(scope, snapshot, target.subfolder, place=mount_id)
        if target.subfolder:
            raise Invalid(
                f"The hub-cache view shows a repo as a whole: leave {target.subfolder!r} away, or use --view tree."
            )
        return HubCacheFolder(scope, mount_id, only=(target.repo, target.revision))

    def _show(self, mounted: Mounted) -> None:
        self._mounted[mounted.id] = mounted
        if self.direct:
            # The top is the mount itself: what it lacks it goes on lacking.
            self.folder.lifetime_s = mounted.root.lifetime_s

    def bound(self, mount_id: str, directory: str) -> Mounted:
        mounted = self[mount_id]
        mounted.directory = directory
        mounted.confirmed = True
        self._record(mounted)
        return mounted

    def remove(self, mount_id: str) -> Mounted:
        """The directory is gone; open files in it stay readable until they are closed."""
        mounted = self[mount_id]
        self._journal.unmounted(mount_id)
        del self._mounted[mount_id]
        log.info("mount %s ended (%s)", mount_id, mounted.directory)
        self._gone(mounted)
        return mounted

    def drop_unbound(self, bound_roots: set[str], now: float) -> None:
        """Ends the mounts whose binding is gone. `bound_roots`: the directories of our filesystem that mountinfo shows bound."""
        for mounted in self:
            if mounted.id in bound_roots:
                if not mounted.seen:
                    mounted.seen = True
                    self._record(mounted)
            elif mounted.seen or (not mounted.confirmed and now - mounted.created > BIND_SECONDS_MAX):
                self.remove(mounted.id)

    # Across daemons ------------------------------------------------------------------------------------------------------

    def _record(self, mounted: Mounted) -> None:
        access = mounted.scope.access
        token = access.token if access != self._catalog.owner else ""
        content = _Content(
            msgspec.structs.replace(mounted.request, token=token),
            mounted.directory,
            time.time() - (trio.current_time() - mounted.created),
            mounted.confirmed,
            mounted.seen,
        )
        self._journal.mounted(mounted.id, msgspec.json.encode(content))

    def _rewrite(self) -> None:
        self._journal.numbered(self._made)
        for mounted in self:
            mounted.scope.rewrite()
            self._record(mounted)

    async def restore(self, recovered: Recovered, access: Callable[[str], Access]) -> None:
        """Makes the mounts of an earlier daemon again, before anything else is mounted or served. Asks the hub nothing: where a tree is not
        stored, its names fail until the hub gives it. `access` is who asks for a token that a mount came with, "" for the daemon's own.
        """
        self._made = max(self._made, recovered.mounts_so_far)
        for mount_id, kept in recovered.mounts.items():
            try:
                self._show(self._restored(mount_id, kept, access))
            except (MantaError, msgspec.DecodeError) as e:
                log.error("mount %s of the daemon before could not be made again: %s", mount_id, e)
        with trio.move_on_after(RESTORE_SECONDS_MAX):
            for mounted in self:
                await mounted.scope.load()
        for mounted in self:
            try:
                mounted.root = self._root_of(mounted.id, mounted.target, mounted.request, mounted.scope, mounted.commit)
            except MantaError as e:
                log.error("mount %s shows nothing: %s", mounted.id, e.message)
            awaited = mounted.target is not None and self._contents(mounted) is None
            log.info("mount %s goes on%s", mounted.id, ", its tree is asked for when it is used" if awaited else "")

    def _restored(self, mount_id: str, kept: RecoveredMount, access: Callable[[str], Access]) -> Mounted:
        """Without trees so far. Raises Invalid, msgspec.DecodeError."""
        content = msgspec.json.decode(kept.content, type=_Content)
        request = msgspec.structs.replace(content.request, token="")
        target = parse_target(request.target) if request.target else None
        scope = MountScope(access(content.request.token), self._catalog, self._store)
        scope.recover(kept)
        scope.follow(self._journal, mount_id)
        commit: Commit | None = None
        if target is not None:
            commit = scope.commit(target.repo, target.revision)
        root = self._root_of(mount_id, target, request, scope, commit)
        age = max(0.0, time.time() - content.created)
        return Mounted(
            mount_id,
            request,
            target,
            commit,
            None,
            scope,
            root,
            trio.current_time() - age,
            content.directory,
            content.confirmed,
            content.seen,
        )

    @staticmethod
    def _contents(mounted: Mounted) -> Contents | None:
        """Of the mounted folder: None for the whole hub, and while its tree is awaited."""
        target, commit = mounted.target, mounted.commit
        if mounted.contents is None and target is not None and commit is not None:
            snapshot = mounted.scope.held.get((target.repo, commit))
            mounted.contents = snapshot.contents_of(target.subfolder) if snapshot is not None else None
        return mounted.contents

    # What they show ------------------------------------------------------------------------------------------------------

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
        contents = self._contents(mounted)
        shown = [contents] if contents is not None else whole_hub
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
