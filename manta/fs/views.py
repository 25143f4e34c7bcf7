"""Directory layouts: what a mounted repo, or the whole hub, looks like as a filesystem, here and only here.

Two views. `tree`: the repo's files as they are; for the whole hub ORG/NAME[@REVISION]/... below datasets/ and spaces/ too. `hub-cache`: the
layout that Hugging Face libraries read through HF_HUB_CACHE (facts: models--ORG--NAME with refs, snapshots, blobs, trees, .no_exist).
"""

from __future__ import annotations

import abc
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, overload

from manta.errors import Absent, Invalid
from manta.fetch.sources import Provenance
from manta.fs.nodes import BlobNode, Folder, LinkNode, Node, TextNode
from manta.hub.origin import Access
from manta.model.ids import (
    DEFAULT_REVISION,
    BlobAlgorithm,
    Commit,
    RepoId,
    RepoKind,
    is_commit,
    is_name_part,
    parse_revision,
)
from manta.model.snapshot import FileEntry, Snapshot

REF_LIFETIME_SECONDS = 5.0
"""How long a ref of the hub-cache view is taken for current. It follows the hub: a client that is online compares it with the hub's own
answer and, where they differ, tries to write it, which fails on a read-only mount (facts/hub.md)."""

LISTING_LIFETIME_SECONDS = 10.0
"""How long a name stays absent where new ones can appear: an organisation's repos, the snapshots of a repo."""


class SnapshotSource(Protocol):
    """What views need of the hub's catalog for one mount, with that mount's right to read. Calls raise `manta.errors`."""

    access: Access

    async def freeze(self, repo: RepoId, revision: str | None) -> Commit:
        """The commit that this mount shows for `revision`: resolved once, then the same for the mount's life."""
        ...

    async def current(self, repo: RepoId, revision: str) -> Commit:
        """What the hub says now, at most REF_LIFETIME_SECONDS old."""
        ...

    async def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot: ...

    def cached_bytes(self, snapshot: Snapshot, folder: str) -> int:
        """Bytes of the files below `folder` that are in the cache."""
        ...

    def frozen(self) -> Mapping[tuple[RepoId, str | None], Commit]:
        """What has been frozen so far."""
        ...

    def shown(self, repo: RepoId) -> Sequence[Commit]:
        """The commits of `repo` whose trees `snapshot` has given so far, also to an earlier daemon."""
        ...


def _absent(name: str) -> Absent:
    return Absent(f"There is no {name!r} here.")


def _revision_of(name: str) -> str:
    """The revision that a name in a path means. Raises Invalid for what none can be, also bytes that are no text (surrogates)."""
    if not name.isprintable():
        raise Invalid(f"{name!r} is not a revision.")
    return parse_revision(name)


def _name_of(revision: str) -> str:
    """What `_revision_of` reads as `revision`."""
    return revision.replace("%", "%25").replace("/", "%2F")


class _Listing(Sequence[tuple[str, Node]]):
    """Names, with nodes that are made when they are looked at: of a folder of 100,000 files the kernel takes a few hundred at a time."""

    def __init__(self, names: Sequence[str], node: Callable[[str], Node]) -> None:
        self._names = names
        self._node = node

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, at: int) -> tuple[str, Node]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[tuple[str, Node]]: ...
    def __getitem__(self, at: int | slice) -> tuple[str, Node] | Sequence[tuple[str, Node]]:
        if isinstance(at, slice):
            return _Listing(self._names[at], self._node)
        name = self._names[at]
        return name, self._node(name)


class _TreeFolder(Folder):
    """A folder of a snapshot's tree. What it shows for a file or a folder in it is up to the view (`_node`)."""

    def __init__(self, source: SnapshotSource, snapshot: Snapshot, folder: str, key: str) -> None:
        if folder not in snapshot.folders:
            raise Absent(f"{snapshot.repo}@{snapshot.commit} has no folder {folder!r}.")
        self._source = source
        self._snapshot = snapshot
        self._folder = folder
        self.key = key

    async def child(self, name: str) -> Node:
        if name not in self._entries:
            raise _absent(name)
        return self._child(name)

    async def children(self) -> Sequence[tuple[str, Node]]:
        return _Listing(list(self._entries), self._child)

    @property
    def _entries(self) -> Mapping[str, FileEntry | None]:
        return self._snapshot.folders[self._folder]

    def _child(self, name: str) -> Node:
        return self._node(self._path(name), self._entries[name])

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    @abc.abstractmethod
    def _node(self, path: str, entry: FileEntry | None) -> Node:
        """What is shown for `path`; `entry` None is a folder."""

    def attributes(self) -> Mapping[str, str]:
        return {
            "repo": str(self._snapshot.repo),
            "commit": self._snapshot.commit,
            "cached_bytes": str(self._source.cached_bytes(self._snapshot, self._folder)),
        }


class SnapshotFolder(_TreeFolder):
    """A folder of a snapshot, its files as they are.

    `place` tells apart where the snapshot is shown: a mount, a name in it. The kernel gives the inode of a directory one name, so one that
    is found by two moves from the first to the second, and a mount of the first is then taken for one of the second.
    """

    def __init__(self, source: SnapshotSource, snapshot: Snapshot, folder: str = "", *, place: str = "") -> None:
        super().__init__(source, snapshot, folder, _tree_key(place, snapshot.repo, snapshot.commit, folder))
        self._place = place

    def _node(self, path: str, entry: FileEntry | None) -> Node:
        if entry is None:
            return SnapshotFolder(self._source, self._snapshot, path, place=self._place)
        return BlobNode(Provenance(self._snapshot.repo, self._snapshot.commit, entry, self._source.access))


class AwaitedFolder(Folder):
    """What stands for a SnapshotFolder after a restart of the daemon while its tree cannot be had: each use asks for it again."""

    def __init__(self, source: SnapshotSource, repo: RepoId, commit: Commit, folder: str, *, place: str) -> None:
        self._source = source
        self._repo = repo
        self._commit = commit
        self._folder = folder
        self._place = place
        self.key = _tree_key(place, repo, commit, folder)

    async def child(self, name: str) -> Node:
        return await (await self._come()).child(name)

    async def children(self) -> Sequence[tuple[str, Node]]:
        return await (await self._come()).children()

    async def _come(self) -> SnapshotFolder:
        snapshot = await self._source.snapshot(self._repo, self._commit)
        return SnapshotFolder(self._source, snapshot, self._folder, place=self._place)

    def attributes(self) -> Mapping[str, str]:
        return {"repo": str(self._repo), "commit": self._commit}


def _tree_key(place: str, repo: RepoId, commit: Commit, folder: str) -> str:
    return f"tree:{place}:{repo}@{commit}:{folder}"


# The whole hub as a tree ---------------------------------------------------------------------------------------------


class HubFolder(Folder):
    """The top of a mount of the whole hub (models), or its datasets/ and spaces/."""

    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(self, source: SnapshotSource, mount: str, kind: RepoKind = RepoKind.MODEL) -> None:
        self._source = source
        self._mount = mount
        self._kind = kind
        self.key = f"hub:{mount}:{kind.value}"

    async def child(self, name: str) -> Node:
        if self._kind is RepoKind.MODEL and name in {RepoKind.DATASET.value, RepoKind.SPACE.value}:
            return HubFolder(self._source, self._mount, RepoKind(name))
        if not is_name_part(name):
            raise _absent(name)
        # The hub cannot be asked whether an organisation exists; one without repos is an empty folder.
        return OrganisationFolder(self._source, self._mount, self._kind, name)

    async def children(self) -> Sequence[tuple[str, Node]]:
        names = {repo.organisation for repo, _revision in self._source.frozen() if repo.kind is self._kind}
        if self._kind is RepoKind.MODEL:
            names |= {RepoKind.DATASET.value, RepoKind.SPACE.value}
        return [(name, await self.child(name)) for name in sorted(names)]


class OrganisationFolder(Folder):
    """ORG/ in a mount of the whole hub: NAME or NAME@REVISION below it, each frozen when it is first looked up."""

    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(self, source: SnapshotSource, mount: str, kind: RepoKind, organisation: str) -> None:
        self._source = source
        self._kind = kind
        self._organisation = organisation
        self.key = f"hub:{mount}:{kind.value}/{organisation}"

    async def child(self, name: str) -> Node:
        short_name, at, revision = name.partition("@")
        try:
            repo = RepoId(self._kind, f"{self._organisation}/{short_name}")
            commit = await self._source.freeze(repo, _revision_of(revision) if at else None)
        except Invalid as e:
            raise _absent(name) from e
        return await self._shown(name, repo, commit)

    async def children(self) -> Sequence[tuple[str, Node]]:
        shown: list[tuple[str, Node]] = []
        for (repo, revision), commit in list(self._source.frozen().items()):
            if repo.kind is self._kind and repo.organisation == self._organisation:
                name = repo.short_name if revision is None else f"{repo.short_name}@{_name_of(revision)}"
                shown.append((name, await self._shown(name, repo, commit)))
        return sorted(shown, key=lambda item: item[0])

    async def _shown(self, name: str, repo: RepoId, commit: Commit) -> SnapshotFolder:
        snapshot = await self._source.snapshot(repo, commit)
        return SnapshotFolder(self._source, snapshot, place=f"{self.key}/{name}")


# The hub-cache view ----------------------------------------------------------------------------------------------------


class HubCacheFolder(Folder):
    """The folder to name in HF_HUB_CACHE: one entry per repo. `only` limits it to one repo, at the revision that was mounted."""

    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(self, source: SnapshotSource, mount: str, only: tuple[RepoId, str | None] | None = None) -> None:
        self._source = source
        self._mount = mount
        self._only = only
        self._repos: dict[RepoId, CachedRepoFolder] = {}
        self.key = f"hub-cache:{mount}"

    async def child(self, name: str) -> Node:
        repo = _repo_of_folder(name)
        if repo is None or (self._only is not None and repo != self._only[0]):
            raise _absent(name)
        if repo not in self._repos:
            # Asked before it is shown: a client takes a folder that exists for a repo that exists.
            revision = self._only[1] if self._only is not None else None
            commit = await self._source.freeze(repo, revision)
            folder = CachedRepoFolder(self._source, self._mount, repo, revision)
            await folder.take_in(commit)
            for shown in self._source.shown(repo):
                await folder.take_in(shown)
            self._repos.setdefault(repo, folder)
        return self._repos[repo]

    async def children(self) -> Sequence[tuple[str, Node]]:
        names = {repo.folder for repo, _revision in self._source.frozen()}
        if self._only is not None:
            names.add(self._only[0].folder)
        return [(name, await self.child(name)) for name in sorted(names)]


def _repo_of_folder(folder: str) -> RepoId | None:
    """The repo that HF libraries keep in `folder`, as far as its name tells."""
    kind, _, name = folder.partition("--")
    try:
        # ORG and NAME hold no "--" (the Hub's rule), so there is one way to read it.
        return RepoId(RepoKind(kind), name.replace("--", "/"))
    except (ValueError, Invalid):
        return None


class CachedRepoFolder(Folder):
    """models--ORG--NAME: refs, snapshots, blobs, trees and .no_exist of one repo."""

    def __init__(self, source: SnapshotSource, mount: str, repo: RepoId, revision: str | None) -> None:
        self.source = source
        self.repo = repo
        self.revision = revision
        self.snapshots: dict[Commit, Snapshot] = {}
        self.blobs: dict[str, Provenance] = {}
        self.key = f"hub-cache:{mount}:{repo}"

    async def take_in(self, commit: Commit) -> Snapshot:
        """The snapshot, whose blobs are shown from now on."""
        if commit not in self.snapshots:
            snapshot = await self.source.snapshot(self.repo, commit)
            self.snapshots[commit] = snapshot
            for entry in snapshot.files.values():
                name = _blob_name(entry)
                self.blobs.setdefault(name, Provenance(self.repo, commit, entry, self.source.access))
        return self.snapshots[commit]

    async def child(self, name: str) -> Node:
        match name:
            case "refs":
                return _RefsFolder(self, "")
            case "snapshots":
                return _CommitsFolder(self, "snapshots", _LinkedSnapshotFolder)
            case "blobs":
                return _BlobsFolder(self)
            case "trees":
                return _TreesFolder(self)
            case ".no_exist":
                return _CommitsFolder(self, ".no_exist", _AbsentNamesFolder)
            case _:
                raise _absent(name)

    async def children(self) -> Sequence[tuple[str, Node]]:
        return [(name, await self.child(name)) for name in (".no_exist", "blobs", "refs", "snapshots", "trees")]

    def attributes(self) -> Mapping[str, str]:
        return {"repo": str(self.repo)}


def _blob_name(entry: FileEntry) -> str:
    """The file's ETag, which is what HF libraries call a blob; a hidden one has none and is shown by its git object id."""
    return entry.blob.hex if entry.blob is not None else f"hidden-{entry.git_oid}"


class _RefsFolder(Folder):
    """refs/REVISION, in folders where a revision has slashes: refs/refs/pr/1, and the mounted revision's own."""

    lifetime_s = REF_LIFETIME_SECONDS

    def __init__(self, repo: CachedRepoFolder, prefix: str) -> None:
        self._repo = repo
        self._prefix = prefix
        self.key = f"{repo.key}:refs/{prefix}"

    async def child(self, name: str) -> Node:
        revision = f"{self._prefix}{name}"
        if revision in {"refs", "refs/pr", "refs/convert"} or self._mounted.startswith(f"{revision}/"):
            return _RefsFolder(self._repo, f"{revision}/")
        try:
            commit = await self._repo.source.current(self._repo.repo, _revision_of(revision))
        except Invalid as e:
            raise _absent(name) from e
        await self._repo.take_in(commit)
        return TextNode(f"{self.key}{name}", commit.encode(), REF_LIFETIME_SECONDS)

    async def children(self) -> Sequence[tuple[str, Node]]:
        """The mounted revision, while the hub has it; others are found by name."""
        if is_commit(self._mounted) or not self._mounted.startswith(self._prefix):
            return []
        name = self._mounted.removeprefix(self._prefix).split("/")[0]
        try:
            return [(name, await self.child(name))]
        except Absent:
            return []

    @property
    def _mounted(self) -> str:
        return self._repo.revision or DEFAULT_REVISION


class _CommitsFolder(Folder):
    """snapshots/ and .no_exist/: a folder for each commit, made by `make`. Lists those that were looked at, finds every other."""

    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(
        self, repo: CachedRepoFolder, name: str, make: Callable[[CachedRepoFolder, Snapshot, str], Folder]
    ) -> None:
        self._repo = repo
        self._make = make
        self.key = f"{repo.key}:{name}"

    async def child(self, name: str) -> Node:
        if not is_commit(name):
            raise _absent(name)
        return self._make(self._repo, await self._repo.take_in(Commit(name)), "")

    async def children(self) -> Sequence[tuple[str, Node]]:
        return [(commit, await self.child(commit)) for commit in sorted(self._repo.snapshots)]


class _LinkedSnapshotFolder(_TreeFolder):
    """snapshots/COMMIT/...: links into blobs/, as HF libraries make them; scan-cache tools count each blob once."""

    def __init__(self, repo: CachedRepoFolder, snapshot: Snapshot, folder: str) -> None:
        super().__init__(repo.source, snapshot, folder, f"{repo.key}:snapshots/{snapshot.commit}/{folder}")
        self._repo = repo

    def _node(self, path: str, entry: FileEntry | None) -> Node:
        if entry is None:
            return _LinkedSnapshotFolder(self._repo, self._snapshot, path)
        up = "../" * (2 + path.count("/"))
        return LinkNode(f"{self._repo.key}:snapshots/{self._snapshot.commit}/{path}", f"{up}blobs/{_blob_name(entry)}")


class _BlobsFolder(Folder):
    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(self, repo: CachedRepoFolder) -> None:
        self._repo = repo
        self.key = f"{repo.key}:blobs"

    async def child(self, name: str) -> Node:
        if name not in self._repo.blobs:
            raise _absent(name)
        return BlobNode(self._repo.blobs[name])

    async def children(self) -> Sequence[tuple[str, Node]]:
        return [(name, BlobNode(provenance)) for name, provenance in sorted(self._repo.blobs.items())]


class _TreesFolder(Folder):
    """trees/COMMIT.json: a listing that saves HF libraries a request."""

    lifetime_s = LISTING_LIFETIME_SECONDS

    def __init__(self, repo: CachedRepoFolder) -> None:
        self._repo = repo
        self.key = f"{repo.key}:trees"

    async def child(self, name: str) -> Node:
        commit = name.removesuffix(".json")
        if not name.endswith(".json") or not is_commit(commit):
            raise _absent(name)
        return TextNode(f"{self.key}/{name}", _tree_file(await self._repo.take_in(Commit(commit))))

    async def children(self) -> Sequence[tuple[str, Node]]:
        return [(f"{commit}.json", await self.child(f"{commit}.json")) for commit in sorted(self._repo.snapshots)]


def _tree_file(snapshot: Snapshot) -> bytes:
    """The format that huggingface_hub 2.4 writes (facts/hub.md)."""
    files: dict[str, dict[str, object]] = {}
    for path, entry in snapshot.files.items():
        shown: dict[str, object] = {"size": entry.size, "blob_id": entry.git_oid}
        if entry.blob is not None and entry.blob.algorithm is BlobAlgorithm.SHA256:
            shown |= {"lfs_sha256": entry.blob.hex, "lfs_size": entry.size}
        files[path] = shown
    return json.dumps({"format_version": 1, "files": files}).encode()


class _AbsentNamesFolder(Folder):
    """.no_exist/COMMIT/NAME is there for each NAME that the snapshot lacks: HF libraries then ask the hub nothing."""

    def __init__(self, repo: CachedRepoFolder, snapshot: Snapshot, folder: str) -> None:
        self._repo = repo
        self._snapshot = snapshot
        self._folder = folder
        self.key = f"{repo.key}:.no_exist/{snapshot.commit}/{folder}"

    async def child(self, name: str) -> Node:
        path = f"{self._folder}/{name}" if self._folder else name
        if path in self._snapshot.files:
            raise _absent(name)
        if path in self._snapshot.folders:
            return _AbsentNamesFolder(self._repo, self._snapshot, path)
        return TextNode(f"{self._repo.key}:.no_exist/{self._snapshot.commit}/{path}", b"")

    async def children(self) -> Sequence[tuple[str, Node]]:
        return []  # absent names are without number; they are found by name
