"""FolderSource: a folder of models on disk, served as repos. What `manta hub serve DIR` shows.

Layout of DIR, decided here and only here:
    DIR/ORG/NAME/...                a model, ORG/NAME
    DIR/NAME/...                    a model without a namespace, when NAME itself holds files
    DIR/datasets/..., DIR/spaces/...    the same for datasets and spaces
    DIR/...                         one model, local/<name of DIR>, when DIR itself holds files
Every repo has one branch, main. Its commit id follows from its files alone, so the same folder has the same
commit on any machine. Changed files make a new commit; the old one stays readable as far as its files do.
Folders named .git and .cache are left out; links to files are followed, links to folders inside a repo not.

Scans and hashes in threads; the catalogue is only touched on the event loop.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from manta.testing.hub.content import ContentChangedError, DigestStoppedError, FileContent, file_identity
from manta.testing.hub.digest_index import DigestIndex
from manta.testing.hub.repository import Blob, Catalogue, Repository, RepoType, Tree, make_blob, make_commit
from manta.testing.hub.routes import PLURALS, Route

# Commits kept per repo: enough for clients that froze one while the folder was updated a few times.
COMMITS_MAX = 16

# A request looks at the folder again when the last look is older than this.
RESCAN_S = 1.0

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_HEX40 = re.compile(r"[0-9a-f]{40}")
_LEFT_OUT = (".git", ".cache")

Key = tuple[RepoType, str]
Listing = dict[str, tuple[str, os.stat_result]]  # path in the repo -> path on disk and its status
Signature = tuple[tuple[str, tuple[int, int, int]], ...]


@dataclass
class _Known:
    """What is known of one repo's folder."""

    lock: asyncio.Lock
    signature: Signature = ()
    looked_at: float = float("-inf")


def _holds_files(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_file() and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False


def _subfolders(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and _NAME.fullmatch(entry.name))
    except OSError:
        return
    yield from names


def find_repos(directory: str) -> dict[Key, str]:
    """The repos in a folder and where their files are, after the layout above."""
    if _holds_files(directory):
        name = os.path.basename(os.path.abspath(directory))
        return {("model", f"local/{name}"): directory}
    repos: dict[Key, str] = {}
    roots: list[tuple[RepoType, str]] = [("model", directory)]
    roots += [(type_, os.path.join(directory, PLURALS[type_])) for type_ in ("dataset", "space")]
    for type_, root in roots:
        for first in _subfolders(root):
            path = os.path.join(root, first)
            if type_ == "model" and first in ("datasets", "spaces"):
                continue
            if _holds_files(path):
                repos[type_, first] = path
                continue
            for second in _subfolders(path):
                repos[type_, f"{first}/{second}"] = os.path.join(path, second)
    return repos


def list_files(folder: str) -> Listing:
    """All regular files below a repo's folder; what cannot be read or named in UTF-8 is left out."""
    listing: Listing = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for name in names:
            path = os.path.join(parent, name)
            try:
                os.fsencode(path).decode()
                status = os.stat(path)
            except (OSError, UnicodeDecodeError):
                continue
            if stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
                listing[os.path.relpath(path, folder)] = (path, status)
    return listing


def _signature(listing: Listing) -> Signature:
    return tuple(sorted((path, file_identity(status)) for path, (_, status) in listing.items()))


class FolderSource:
    """Keeps a catalogue's repos in step with a folder.

    `report` is told in a sentence what is being hashed and what has changed.
    """

    def __init__(
        self,
        directory: str,
        catalogue: Catalogue,
        index: DigestIndex,
        *,
        rescan_s: float = RESCAN_S,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        if not os.path.isdir(directory):
            raise NotADirectoryError(f"not a folder: {directory}")
        self._directory = os.path.abspath(directory)
        self._catalogue = catalogue
        self._index = index
        self._rescan_s = rescan_s
        self._report = report
        self._known: dict[Key, _Known] = {}
        self._found: dict[Key, str] = {}
        self._found_at = float("-inf")
        self._looking = asyncio.Lock()

    async def refresh(self, route: Route) -> None:
        """Bring what a request is about up to date; a repo not hashed yet is hashed first."""
        if route.kind == "list":
            await self.refresh_all()
        elif route.repo_id:
            key = (route.repo_type, route.repo_id)
            frozen = _HEX40.fullmatch(route.revision) and self._catalogue.repo(*key) is not None
            if not frozen:
                await self._look_around()
                if key in self._found or key in self._known:
                    await self._refresh_repo(key)

    async def refresh_all(self) -> None:
        """Bring every repo up to date."""
        await self._look_around()
        for key in sorted({*self._found, *self._known}):
            await self._refresh_repo(key)

    async def _look_around(self) -> None:
        async with self._looking:  # who comes meanwhile waits for what is found, and does not look again
            if time.monotonic() - self._found_at >= self._rescan_s:
                self._found = await asyncio.to_thread(find_repos, self._directory)
                self._found_at = time.monotonic()

    async def _refresh_repo(self, key: Key) -> None:
        known = self._known.setdefault(key, _Known(asyncio.Lock()))
        async with known.lock:
            if time.monotonic() - known.looked_at < self._rescan_s:
                return
            folder = self._found.get(key)
            if folder is None:
                self._forget(key)
                return
            listing = await asyncio.to_thread(list_files, folder)
            signature = _signature(listing)
            if signature != known.signature or self._catalogue.repo(*key) is None:
                try:
                    blobs = await asyncio.to_thread(self._blobs, key, listing)
                except ContentChangedError as changed:
                    self._report(f"{key[1]}: {changed} while it was hashed; looking again at the next request")
                    return
                except DigestStoppedError:
                    return
                self._take_over(key, blobs, listing)
                known.signature = signature
            known.looked_at = time.monotonic()

    def _blobs(self, key: Key, listing: Listing) -> dict[str, Blob]:
        """Hash what is new; runs in a thread, for as long as the disk and sha256 take."""
        size = sum(status.st_size for _, status in listing.values())
        self._report(f"{key[1]}: {len(listing)} files, {size / 1e9:.2f} GB: taking digests")
        blobs = {}
        for path, (place, status) in listing.items():
            content = FileContent(place, status)
            blobs[path] = make_blob(path, content, sha256=self._index.sha256, git_sha1=self._index.git_sha1)
            with content.opened():
                pass  # raises if the file changed while it was read
        self._index.save()
        return blobs

    def _take_over(self, key: Key, blobs: dict[str, Blob], listing: Listing) -> None:
        repo = self._catalogue.repo(*key)
        if repo is None:
            repo = Repository(*key)
            self._catalogue.add(repo)
        newest = max((status.st_mtime for _, status in listing.values()), default=0.0)
        commit = make_commit(Tree(blobs), "Served from a folder", date=datetime.fromtimestamp(newest, UTC))
        repo.commits.pop(commit.id, None)  # known files may have new places on disk; newest last
        repo.add(commit, branch="main")
        while len(repo.commits) > COMMITS_MAX:
            repo.forget(next(iter(repo.commits)))
        self._report(f"{repo.id}: commit {commit.id}")

    def _forget(self, key: Key) -> None:
        repo = self._catalogue.repo(*key)
        if repo is not None:
            self._catalogue.remove(repo)
            self._report(f"{repo.id}: gone from the folder")
        del self._known[key]
