"""The mounts: directories of the daemon's one filesystem that people and pods asked for, here and only here.

A mount is made in three steps: the daemon makes the directory (`create`), the caller binds it to where it wants it (bind mounts belong to
the caller's mount namespace), and says so (`bound`). It ends when the caller says so (`remove`) or when the binding is gone from mountinfo
(plain umount, fusermount3 -u). Without root there are no bind mounts: then the one mount is the root of the filesystem itself.
Runs in the daemon's trio thread.

Where mounts outlive the daemon, the journal has what the next one needs to show the same: each mount with its name and token, what it has
frozen and which trees it has been shown. `restore` makes them again of stored trees, without asking the hub. Mounts that have a name are
`manta.operations.publications`'; what a mount has been shown is `manta.operations.scope`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from manta.cache.store import Store
from manta.control.protocol import SMALL_BYTES_MAX, Mount, MountRequest
from manta.errors import Absent, Denied, InUse, Invalid, MantaError
from manta.fetch.sources import Provenance
from manta.fs.journal import Journal, NoJournal, Recovered, RecoveredMount
from manta.fs.nodes import Folder, Node
from manta.fs.views import AwaitedFolder, HubCacheFolder, HubFolder, SnapshotFolder
from manta.hub.catalog import Catalog
from manta.hub.identity import Identity
from manta.hub.origin import Access
from manta.model.ids import DEFAULT_REVISION, BlobId, Commit, Target, parse_target
from manta.model.snapshot import Contents
from manta.operations.failures import RECENT_PER_MOUNT, Failures
from manta.operations.scope import MountScope
from manta.telemetry.events import FileRate

log = logging.getLogger(__name__)

BIND_SECONDS_MAX = 60.0
"""A directory that nobody has bound after this long belonged to a caller that died."""

RESTORE_SECONDS_MAX = 20.0
"""How long `restore` waits for stored trees: a tree of 10,000 files takes 40 ms, while the kernel's requests wait. What has not come by
then is looked for when it is asked for."""


_NO_RATES: Mapping[BlobId, FileRate] = {}


class _Content(msgspec.Struct, frozen=True):
    """What the journal has of a mount."""

    request: MountRequest
    """With its token, where that is not the daemon's own."""
    directory: str
    created: float
    """Seconds since the epoch."""
    confirmed: bool
    seen: bool = False
    publication: str = ""


@dataclass(eq=False)
class Mounted:
    """One mount."""

    id: str
    request: MountRequest
    """Without its token, which is `scope.asking` and shows in no text."""
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
    publication: str = ""
    """Its name, where it has one."""
    refusal: str = ""
    """Why the hub would not let it be mounted now, as it said when it was asked last: a sentence."""


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
    that the next daemon must know. `identity` keeps the tokens that mounts came with; None: they ask by those for good."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        root: Path | None,
        gone: Callable[[Mounted], None],
        journal: Journal | None = None,
        identity: Identity | None = None,
    ) -> None:
        self._identity = identity
        self._catalog = catalog
        self._store = store
        self._root = root
        self._gone = gone
        self._mounted: dict[str, Mounted] = {}
        self._published: dict[str, Mounted] = {}
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

    @property
    def published(self) -> Mapping[str, Mounted]:
        """Those that have a name."""
        return self._published

    async def create(self, request: MountRequest, access: Access, publication: str = "") -> Mounted:
        """Resolves and freezes, and shows the directory; by a name that none has so far, the hub is asked for the right in any case.
        Raises what the hub says, Invalid for a bad request, InUse for a second direct one."""
        target = parse_target(request.target) if request.target else None
        if target is None and (request.pin or request.prefetch == "background"):
            raise Invalid(
                "The whole hub can be neither pinned nor fetched in the background: name a repo, or leave both away."
            )
        self._made += 1
        slug = "hub" if target is None else target.repo.name.replace("/", "--")
        mount_id = f"{self._made}-{slug}"
        scope = self._scope(mount_id, access, publication)
        try:
            mounted = await self._created(mount_id, target, request, scope, publication)
        except BaseException:
            self._release(mount_id)
            raise
        self._show(mounted)
        scope.follow(self._journal, mount_id)
        # The mount last: where the daemon dies before that, the next one has never heard of it.
        self._journal.numbered(self._made)
        scope.rewrite()
        self._record(mounted)
        log.info(
            "mount %s: %s at %s for %s", mount_id, request.target or "the hub", mounted.commit or "-", request.directory
        )
        return mounted

    def _scope(self, mount_id: str, access: Access, publication: str) -> MountScope:
        held = access
        if self._identity is not None and (publication or access != self._catalog.owner):
            held = self._identity.hold(mount_id, access)
        return MountScope(held, self._catalog, self._store, asking=access, checked=bool(publication))

    def _release(self, mount_id: str) -> None:
        if self._identity is not None:
            self._identity.release(mount_id)

    async def _created(
        self, mount_id: str, target: Target | None, request: MountRequest, scope: MountScope, publication: str
    ) -> Mounted:
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
        return Mounted(
            mount_id,
            msgspec.structs.replace(request, token=""),
            target,
            commit,
            contents,
            scope,
            root,
            trio.current_time(),
            request.directory,
            publication=publication,
        )

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
        if mounted.publication:
            self._published[mounted.publication] = mounted
        if self.direct:
            # The top is the mount itself: what it lacks it goes on lacking.
            self.folder.lifetime_s = mounted.root.lifetime_s

    def bound(self, mount_id: str, directory: str) -> Mounted:
        mounted = self[mount_id]
        mounted.directory = directory
        mounted.confirmed = True
        self._record(mounted)
        return mounted

    def take_over(self, mounted: Mounted, access: Access, *, anonymous: bool) -> None:
        """It is read by `access` from now on, also by what is open; and who has not bound it yet has as long as at first."""
        if self._identity is not None:
            self._identity.hold(mounted.id, access)
        mounted.scope.asking = access
        mounted.request = msgspec.structs.replace(mounted.request, anonymous=anonymous)
        mounted.created = trio.current_time() if not mounted.confirmed else mounted.created
        self._record(mounted)

    async def pin(self, mounted: Mounted, pin: Callable[[Mounted], Awaitable[None]]) -> None:
        """Has what it shows pinned, where it was asked for so. Where that fails the mount ends, and the error is raised."""
        if mounted.request.pin:
            try:
                await pin(mounted)
            except BaseException:
                with suppress(Absent):  # it has ended meanwhile
                    self.remove(mounted.id)
                raise

    async def authorise(self, mounted: Mounted) -> None:
        """Asks whether it could be mounted now. Raises Denied where not, which is noted with the mount, and it stays as it is; Unavailable
        where that cannot be said. Of a mount of the whole hub each repo is asked about when it is opened."""
        if mounted.target is None or mounted.commit is None:
            return
        try:
            await mounted.scope.authorise(mounted.target.repo, mounted.commit)
        except (Absent, Denied) as e:
            refusal = f"What {mounted.directory} shows may not be read any more; what is cached of it stays readable. {e.message}"
            if refusal != mounted.refusal:
                log.warning("mount %s: %s", mounted.id, refusal)
            mounted.refusal = refusal
            raise Denied(refusal) from None
        mounted.refusal = ""

    def remove(self, mount_id: str) -> Mounted:
        """The directory is gone; open files in it stay readable until they are closed. Its token is not used any more."""
        mounted = self[mount_id]
        self._journal.unmounted(mount_id)
        del self._mounted[mount_id]
        if self._published.get(mounted.publication) is mounted:
            del self._published[mounted.publication]
        self._release(mount_id)
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
        access = mounted.scope.asking
        token = access.token if access != self._catalog.owner else ""
        content = _Content(
            msgspec.structs.replace(mounted.request, token=token),
            mounted.directory,
            time.time() - (trio.current_time() - mounted.created),
            mounted.confirmed,
            mounted.seen,
            mounted.publication,
        )
        self._journal.mounted(mounted.id, msgspec.json.encode(content))

    def _rewrite(self) -> None:
        self._journal.numbered(self._made)
        for mounted in self:
            mounted.scope.rewrite()
            self._record(mounted)

    async def restore(self, recovered: Recovered, access: Callable[[MountRequest, str], Access]) -> None:
        """Makes the mounts of an earlier daemon again, before anything else is mounted or served. Asks the hub nothing: where a tree is not
        stored, its names fail until the hub gives it. `access` is who asks for a mount, by its request (the token is "" for the daemon's
        own) and its name.
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
            awaited = mounted.target is not None and self.contents(mounted) is None
            log.info("mount %s goes on%s", mounted.id, ", its tree is asked for when it is used" if awaited else "")

    def _restored(self, mount_id: str, kept: RecoveredMount, access: Callable[[MountRequest, str], Access]) -> Mounted:
        """Without trees so far. Raises Invalid, msgspec.DecodeError."""
        content = msgspec.json.decode(kept.content, type=_Content)
        request = msgspec.structs.replace(content.request, token="")
        target = parse_target(request.target) if request.target else None
        scope = self._scope(mount_id, access(content.request, content.publication), content.publication)
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
            content.publication,
        )

    @staticmethod
    def contents(mounted: Mounted) -> Contents | None:
        """Of the mounted folder: None for the whole hub, and while its tree is awaited."""
        target, commit = mounted.target, mounted.commit
        if mounted.contents is None and target is not None and commit is not None:
            snapshot = mounted.scope.held.get((target.repo, commit))
            mounted.contents = snapshot.contents_of(target.subfolder) if snapshot is not None else None
        return mounted.contents

    # What they show ------------------------------------------------------------------------------------------------------

    def shown(self, mounted: Mounted) -> Sequence[Contents]:
        """The mounted folder; of the whole hub, the repos that were opened."""
        contents = self.contents(mounted)
        return [contents] if contents is not None else [snapshot.contents for snapshot in mounted.scope.held.values()]

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

    def opens_whole(self, provenance: Provenance) -> bool:
        """Whether a file is to be complete when its open returns: a small one, that a mount shows which was asked for so."""
        blob = provenance.entry.blob
        return provenance.entry.size <= SMALL_BYTES_MAX and any(
            blob in snapshot.contents.blobs
            for mounted in self._mounted.values()
            if mounted.request.prefetch == "blocking-open"
            for snapshot in mounted.scope.held.values()
        )

    def provenances(self, blob: BlobId) -> Iterator[Provenance]:
        """Every place where a mount shows `blob`; those that the hub refused last come last. Looks through all their files: for when
        something is wrong with the place in use. Each mount was shown the blob by its own right (docs/architecture.md, Whose right)."""
        for mounted in sorted(self._mounted.values(), key=lambda mounted: bool(mounted.refusal)):
            scope = mounted.scope
            for (repo, commit), snapshot in scope.held.items():
                for entry in snapshot.showing(blob):
                    yield Provenance(repo, commit, entry, scope.access)

    def describe(self, mounted: Mounted, failures: Failures, rates: Mapping[BlobId, FileRate] = _NO_RATES) -> Mount:
        """What status says of it. Sizes are of the mounted folder; for the whole hub, of the repos it has opened.

        `rates`: what comes for each blob that is being fetched.
        """
        scope, target = mounted.scope, mounted.target
        shown = self.shown(mounted)
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
            errors=[*failures.of(scope.held), *filter(None, [mounted.refusal])][-RECENT_PER_MOUNT:],
            rate=sum(
                rate.bytes_per_second
                for blob, rate in rates.items()
                if any(blob in contents.blobs for contents in shown)
            ),
            publication=mounted.publication,
            prefetch=mounted.request.prefetch,
            pin=mounted.request.pin,
            pod=mounted.request.pod,
        )
