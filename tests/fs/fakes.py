"""What the tests of the filesystem and of the daemon's operations stand on: a hub in memory with the fake workers, and a view's source.

The store and the fetcher are the real ones. Content is seeded per blob, so that a wrong offset shows in the first byte.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from manta.cache.store import Blob, Store
from manta.config import FetchConfig
from manta.errors import Absent, Denied, MantaError
from manta.fetch.fetcher import Fetcher
from manta.fetch.sealer import Sealer
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.hub.origin import Access, Location, OriginRequest, Resolved
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry, Snapshot
from manta.testing.workers import FakeWorkers

CHUNK = 4096
"""Bytes in a chunk here: a page, so that a sparse file's holes are whole chunks."""

MODEL = RepoId(RepoKind.MODEL, "org/name")
OTHER = RepoId(RepoKind.MODEL, "org/other")
FIRST, SECOND, THIRD = Commit("1" * 40), Commit("2" * 40), Commit("3" * 40)
ACCESS = Access("hf_secret")


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def lfs(path: str, data: bytes) -> FileEntry:
    """An entry as the hub gives one for a file in LFS."""
    blob = BlobId(BlobAlgorithm.SHA256, hashlib.sha256(data).hexdigest())
    return FileEntry(path, len(data), blob, hashlib.sha1(path.encode() + data).hexdigest())


def plain(path: str, data: bytes) -> FileEntry:
    """An entry as the hub gives one for a file in git itself."""
    digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return FileEntry(path, len(data), BlobId(BlobAlgorithm.GIT_SHA1, digest), digest)


def hidden(path: str, size: int = 100) -> FileEntry:
    """An entry whose digest the hub masks."""
    return FileEntry(path, size, None, hashlib.sha1(path.encode()).hexdigest())


class MemoryHub:
    """The bytes of blobs, the trees of commits and what revisions name. It is an Origin, and `workers` have its bytes.

    `failure` is what becomes of every question, `denied` who may read nothing, `asked` what was asked and `tokens` with which.
    `gated` and `private` have the tokens that may read such a repo. `latest` says with what is asked on behalf of an access.
    """

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.blobs: dict[BlobId, bytes] = {}
        self.trees: dict[tuple[RepoId, Commit], Snapshot] = {}
        self.refs: dict[tuple[RepoId, str | None], Commit] = {}
        self.denied: set[Access] = set()
        self.failure: MantaError | None = None
        self.asked: list[str] = []
        self.tokens: list[str] = []
        self.gated: dict[RepoId, set[str]] = {}
        self.private: dict[RepoId, set[str]] = {}
        self.latest: Callable[[Access], Access] = lambda access: access
        self.workers = FakeWorkers()

    def add(self, entry: FileEntry, data: bytes) -> FileEntry:
        assert entry.blob is not None
        self.blobs[entry.blob] = data
        return entry

    def lfs(self, path: str, data: bytes) -> FileEntry:
        return self.add(lfs(path, data), data)

    def plain(self, path: str, data: bytes) -> FileEntry:
        return self.add(plain(path, data), data)

    def commit(self, repo: RepoId, commit: Commit, files: Iterable[FileEntry], *revisions: str | None) -> Snapshot:
        """A commit of `repo`, named by `revisions` from now on."""
        snapshot = self.trees[repo, commit] = Snapshot.of(repo, commit, files)
        for entry in snapshot.files.values():
            if entry.blob in self.blobs:
                self.workers.publish(
                    self.location_request(repo, commit, entry.path, ACCESS).url, self.blobs[entry.blob]
                )
        for revision in revisions:
            self.refs[repo, revision] = commit
        return snapshot

    async def _answer(self, question: str, repo: RepoId, access: Access) -> None:
        self.asked.append(question)
        self.tokens.append(self.latest(access).token)
        await trio.lowlevel.checkpoint()
        if self.failure is not None:
            raise self.failure
        if repo in self.private and self.tokens[-1] not in self.private[repo]:
            raise Absent(f"{repo} does not exist, or it is private.")

    def _hidden(self, repo: RepoId) -> tuple[bool, bool]:
        """Whether it is gated, and whether private: as said here, or by any of its trees."""
        trees = [tree for (of, _), tree in self.trees.items() if of == repo]
        return repo in self.gated or any(t.gated for t in trees), repo in self.private or any(t.private for t in trees)

    def _masks(self, repo: RepoId, access: Access) -> bool:
        return access in self.denied or (repo in self.gated and self.latest(access).token not in self.gated[repo])

    async def resolve(self, repo: RepoId, revision: str | None, access: Access) -> Resolved:
        await self._answer(f"resolve {repo}@{revision}", repo, access)
        commit = self.refs.get((repo, revision))
        if commit is None and revision is not None and (repo, Commit(revision)) in self.trees:
            commit = Commit(revision)
        if commit is None:
            raise Absent(f"{repo} has no revision {revision!r}.")
        gated, private = self._hidden(repo)
        return Resolved(repo, revision, commit, gated=gated, private=private, canonical=repo)

    async def snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        await self._answer(f"snapshot {repo}@{commit[0]}", repo, access)
        if (repo, commit) not in self.trees:
            raise Absent(f"{repo} has no commit {commit}.")
        if self._masks(repo, access):
            masked = [FileEntry(f.path, f.size, None, f.git_oid) for f in self.trees[repo, commit].files.values()]
            return Snapshot.of(repo, commit, masked, gated=True)
        gated, private = self._hidden(repo)
        return replace(self.trees[repo, commit], gated=gated, private=private)

    async def may_read(self, repo: RepoId, commit: Commit, entry: FileEntry, access: Access) -> bool:
        await self._answer(f"read {repo}@{commit[0]}/{entry.path}", repo, access)
        return not self._masks(repo, access)

    def location_request(self, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
        return OriginRequest(f"{self.endpoint}/{repo.kind.value}/{repo.name}/{commit}/{path}", {})

    def parse_location(
        self,
        repo: RepoId,
        commit: Commit,
        entry: FileEntry,
        access: Access,
        *,
        status: int,
        url: str,
        headers: Mapping[str, str],
        now: float,
    ) -> Location:
        self.tokens.append(self.latest(access).token)
        if self._masks(repo, access) or (repo in self.private and self.tokens[-1] not in self.private[repo]):
            raise Denied(f"{repo} may not be read with this token. Ask for access.")
        if status == 404:
            raise Absent(f"{repo}/{entry.path} is gone from the hub.")
        return Location(headers["location"], {})

    def note_headers(self, headers: Mapping[str, str]) -> None:
        pass

    def same_origin(self, url: str) -> bool:
        return url.startswith(self.endpoint + "/")


class Blobs:
    """The daemon's side of the filesystem: what it opens, and what the cache has."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self.store = store
        self.fetcher = fetcher
        self.shown: tuple[int, int] = (0, 0)
        self.opened = 0
        """Files that were opened and not closed."""
        self.failures: list[str] = []

    def open(self, provenance: Provenance) -> Transfer:
        transfer = self.fetcher.open(provenance)
        self.opened += 1
        return transfer

    def close(self, transfer: Transfer) -> None:
        self.opened -= 1
        self.fetcher.close(transfer)

    def failed(self, transfer: Transfer, error: MantaError) -> None:
        self.failures.append(error.message)

    def cached_bytes(self, provenance: Provenance) -> tuple[int, bool]:
        info = self.store.find(provenance.entry.blob) if provenance.entry.blob is not None else None
        return (info.cached, info.sealed) if info is not None else (0, False)

    def cached(self) -> Iterable[BlobId]:
        return [info.id for info in self.store.listing()]

    def hold(self, blob: BlobId) -> Blob:
        info = self.store.find(blob)
        assert info is not None
        return self.store.open_blob(blob, info.size)

    def totals(self) -> tuple[int, int]:
        return self.shown


@asynccontextmanager
async def fetching(
    directory: Path, hub: MemoryHub, config: FetchConfig | None = None, *, seal: bool = True
) -> AsyncIterator[Blobs]:
    """The store at `directory`, with the fetcher (and, where `seal`, the sealer) running over `hub`."""
    with Store(directory, chunk_size=CHUNK) as store:
        failures: list[str] = []
        sealer = Sealer(hub.workers, lambda _, e: failures.append(e.message), lambda _: None)
        fetcher = Fetcher(
            store,
            hub.workers,
            hub,
            config or FetchConfig(),
            lambda _, e: failures.append(e.message),
            sealer.grown if seal else lambda _: None,
        )
        blobs = Blobs(store, fetcher)
        blobs.failures = failures
        async with trio.open_nursery() as nursery:
            await nursery.start(fetcher.run)
            if seal:
                nursery.start_soon(sealer.run, fetcher)
            yield blobs
            nursery.cancel_scope.cancel()


class MemorySource:
    """A view's source over a MemoryHub, for one access: what `manta.operations.mounts.MountScope` is in the daemon."""

    def __init__(self, hub: MemoryHub, access: Access = ACCESS) -> None:
        self.hub = hub
        self.access = access
        self.frozen_commits: dict[tuple[RepoId, str | None], Commit] = {}
        self.shown_commits: dict[tuple[RepoId, Commit], None] = {}
        self.cached: dict[str, int] = {}
        """Bytes in the cache by path."""

    async def freeze(self, repo: RepoId, revision: str | None) -> Commit:
        if (repo, revision) not in self.frozen_commits:
            resolved = await self.hub.resolve(repo, revision, self.access)
            self.frozen_commits.setdefault((repo, revision), resolved.commit)
        return self.frozen_commits[repo, revision]

    async def current(self, repo: RepoId, revision: str) -> Commit:
        return (await self.hub.resolve(repo, revision, self.access)).commit

    async def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot:
        self.shown_commits.setdefault((repo, commit))
        return await self.hub.snapshot(repo, commit, self.access)

    def cached_bytes(self, snapshot: Snapshot, folder: str) -> int:
        return sum(self.cached.get(entry.path, 0) for entry in snapshot.below(folder))

    def frozen(self) -> Mapping[tuple[RepoId, str | None], Commit]:
        return self.frozen_commits

    def shown(self, repo: RepoId) -> Sequence[Commit]:
        return [commit for of, commit in self.shown_commits if of == repo]


def blob_of(data: bytes) -> BlobId:
    """The blob of an LFS file with that content."""
    blob = MemoryHub().lfs("x", data).blob
    assert blob is not None
    return blob
