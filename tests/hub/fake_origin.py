"""An origin in memory, for tests of what asks one: it can be held, fail, and refuse some of those who ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import trio

from manta.errors import Absent
from manta.hub import location
from manta.hub.origin import Access, Location, OriginRequest, Resolved, origin_of
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId
from manta.model.snapshot import FileEntry, Snapshot


def commit(letter: str) -> Commit:
    return Commit(letter * 40)


def entry(path: str, letter: str = "1") -> FileEntry:
    return FileEntry(path, 3, BlobId(BlobAlgorithm.SHA256, letter * 64), letter * 40)


class FakeOrigin:
    """Put refs and trees in; `asked` is what was asked, in order."""

    endpoint = "https://hub.example"

    def __init__(self) -> None:
        self.refs: dict[tuple[RepoId, str | None], Commit] = {}
        self.trees: dict[tuple[RepoId, Commit], list[FileEntry]] = {}
        self.members: dict[RepoId, set[Access]] = {}
        """Of gated repos: who may read them."""
        self.private: set[RepoId] = set()
        self.failure: Exception | None = None
        self.open = trio.Event()
        """Questions wait for it."""
        self.open.set()
        self.asked: list[str] = []

    def hold(self) -> None:
        self.open = trio.Event()

    def add(self, repo: RepoId, revision: str | None, at: Commit, files: Iterable[FileEntry]) -> None:
        self.refs[repo, revision] = at
        self.trees[repo, at] = list(files)

    async def _answer(self, question: str) -> None:
        self.asked.append(question)
        await self.open.wait()
        if self.failure is not None:
            raise self.failure

    async def resolve(self, repo: RepoId, revision: str | None, access: Access) -> Resolved:
        await self._answer(f"resolve {repo}@{revision}")
        if (repo, revision) not in self.refs and revision is None:
            revision = "main"
        at = (
            Commit(revision) if revision and (repo, Commit(revision)) in self.trees else self.refs.get((repo, revision))
        )
        if at is None:
            raise Absent(f"{repo} has no revision {revision!r}.")
        return Resolved(repo, revision, at, repo in self.members, repo in self.private, repo)

    async def snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        await self._answer(f"snapshot {repo}@{commit[0]}")
        files = self.trees.get((repo, commit))
        if files is None:
            raise Absent(f"{repo} has no commit {commit}.")
        if repo in self.members and access not in self.members[repo]:
            files = [replace(file, blob=None) for file in files]
        return Snapshot.of(repo, commit, files, gated=repo in self.members, private=repo in self.private)

    async def may_read(self, repo: RepoId, commit: Commit, entry: FileEntry, access: Access) -> bool:
        await self._answer(f"read {repo}@{commit[0]}/{entry.path}")
        return repo not in self.members or access in self.members[repo]

    def location_request(self, repo: RepoId, commit: Commit, path: str, access: Access) -> OriginRequest:
        return location.location_request(self.endpoint, repo, commit, path, access)

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
        return location.parse_location(
            self.endpoint, repo, commit, entry, access, status=status, url=url, headers=headers, now=now
        )

    def note_headers(self, headers: Mapping[str, str]) -> None:
        pass

    def same_origin(self, url: str) -> bool:
        return origin_of(url) == origin_of(self.endpoint)
