"""What a hub holds: repos, their commits, trees and refs, users and renames. Pure values and rules.

Defines Blob, Tree, Commit, Repository, User and Catalogue, here and only here. Object ids are computed as
git computes them, so a tree's ids are those `git ls-tree` would show for the same files. spec.py and
folder.py build catalogues; answers.py reads them; changes.py alters them while the hub runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Literal, get_args

from manta.testing.hub.content import Content, git_blob_sha1_hex, sha256_hex

RepoType = Literal["model", "dataset", "space"]
Gate = Literal["auto", "manual", False]
REPO_TYPES: tuple[RepoType, ...] = get_args(RepoType)

# Files of this size or more cannot be pushed to the Hub as plain git files.
LFS_SIZE_MIN = 10 << 20

# The names that the Hub's standard .gitattributes hands to LFS, whatever their size.
LFS_NAMES = (
    "*.7z",
    "*.arrow",
    "*.bin",
    "*.bz2",
    "*.ckpt",
    "*.ftz",
    "*.gguf",
    "*.gz",
    "*.h5",
    "*.joblib",
    "*.mlmodel",
    "*.model",
    "*.msgpack",
    "*.npy",
    "*.npz",
    "*.onnx",
    "*.ot",
    "*.parquet",
    "*.pb",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.rar",
    "*.safetensors",
    "*.tar",
    "*.tar.*",
    "*.tflite",
    "*.tgz",
    "*.wasm",
    "*.xz",
    "*.zip",
    "*.zst",
    "*tfevents*",
)

# Commit ids must not depend on when a hub was started, so commits without a date carry this one.
EPOCH = datetime(2024, 1, 1, tzinfo=UTC)

Digest = Callable[[Content], str]


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub would hold this file as an LFS object; git-lfs leaves empty files alone."""
    if size == 0:
        return False
    name = path.rpartition("/")[2]
    return size >= LFS_SIZE_MIN or any(fnmatchcase(name, pattern) for pattern in LFS_NAMES)


@dataclass(frozen=True, slots=True)
class Blob:
    """One file's content and the names the Hub gives it.

    `oid` is the git object id: of the file itself, or of its LFS pointer. `sha256` is empty for git files.
    """

    content: Content
    oid: str
    sha256: str = ""
    pointer_size: int = 0
    xet_hash: str = ""

    @property
    def id(self) -> str:
        """The blob's identity: the sha256 of an LFS file, the git object id of any other."""
        return self.sha256 or self.oid

    @property
    def size(self) -> int:
        return self.content.size


def make_blob(
    path: str,
    content: Content,
    *,
    xet: bool = False,
    sha256: Digest = sha256_hex,
    git_sha1: Digest = git_blob_sha1_hex,
) -> Blob:
    """The blob of a file at `path`; reads the whole content once, so call it where waiting is allowed."""
    if not is_lfs(path, content.size):
        return Blob(content, git_sha1(content))
    digest = sha256(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {content.size}\n".encode()
    return Blob(
        content,
        _object_id("blob", pointer),
        sha256=digest,
        pointer_size=len(pointer),
        # Not a Xet hash of the content, only its shape: nothing here serves the Xet protocol.
        xet_hash=hashlib.sha256(b"xet" + bytes.fromhex(digest)).hexdigest() if xet else "",
    )


def _object_id(kind: str, body: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(body)) + body, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of a tree; `oid` is its git tree id."""

    oid: str


Entry = Blob | Folder


class Tree:
    """The files of one commit, and the folders they make."""

    def __init__(self, files: Mapping[str, Blob]) -> None:
        for path in files:
            if not path or path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
                raise ValueError(f"not a path inside a repo: {path!r}")
        self.files: dict[str, Blob] = dict(sorted(files.items()))
        self._children: dict[str, dict[str, Entry]] = {"": {}}
        for path, blob in self.files.items():
            self._children_of(path.rpartition("/")[0])[path] = blob
        self.oid = self._seal("")
        self._walks: dict[str, list[tuple[str, Entry]]] = {}

    def _children_of(self, folder: str) -> dict[str, Entry]:
        if folder not in self._children:
            if folder in self.files:
                raise ValueError(f"both a file and a folder: {folder!r}")
            self._children[folder] = {}
            self._children_of(folder.rpartition("/")[0])[folder] = Folder("")
        return self._children[folder]

    def _seal(self, folder: str) -> str:
        """Compute the git tree id of `folder`, once all below it have theirs."""
        children = self._children[folder]
        for path, entry in children.items():
            if isinstance(entry, Folder):
                children[path] = Folder(self._seal(path))
        rows = []
        for path, entry in children.items():
            name = path.rpartition("/")[2].encode()
            mode, suffix = (b"40000", b"/") if isinstance(entry, Folder) else (b"100644", b"")
            rows.append((name + suffix, b"%s %s\0" % (mode, name) + bytes.fromhex(entry.oid)))
        rows.sort()  # git sorts a folder as if its name ended in a slash
        return _object_id("tree", b"".join(row for _, row in rows))

    def entry(self, path: str) -> Entry | None:
        """The file or folder at `path`, or None."""
        blob = self.files.get(path)
        if blob is not None or path not in self._children or not path:
            return blob
        return self._children[path.rpartition("/")[0]][path]

    def children(self, folder: str) -> list[tuple[str, Entry]] | None:
        """What lies directly in `folder` ("" is the root) by path, or None when it is not a folder."""
        entries = self._children.get(folder)
        return None if entries is None else sorted(entries.items())

    def walk(self, folder: str) -> list[tuple[str, Entry]] | None:
        """All files and folders below `folder` by path, or None when it is not a folder."""
        if folder not in self._children:
            return None
        if folder not in self._walks:
            prefix = f"{folder}/" if folder else ""
            rows = [
                row
                for at, entries in self._children.items()
                for row in entries.items()
                if at == folder or at.startswith(prefix)
            ]
            self._walks[folder] = sorted(rows)
        return self._walks[folder]


@dataclass(frozen=True, slots=True)
class Commit:
    """One snapshot of a repo, named by a 40-hex id that depends on its tree, parent and title only."""

    id: str
    tree: Tree
    title: str
    date: datetime
    parent: str = ""


def make_commit(tree: Tree, title: str, *, parent: str = "", date: datetime = EPOCH) -> Commit:
    """A commit whose id is what git would give it, were it made at EPOCH by "manta"."""
    author = f"manta <manta@localhost> {int(EPOCH.timestamp())} +0000"
    ancestry = f"parent {parent}\n" if parent else ""
    body = f"tree {tree.oid}\n{ancestry}author {author}\ncommitter {author}\n\n{title}\n"
    return Commit(_object_id("commit", body.encode()), tree, title, date, parent)


@dataclass
class Refs:
    """The moving names of a repo, each mapped to a commit id; `pulls` by number, `converts` by name."""

    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    converts: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Refs:
        return Refs(dict(self.branches), dict(self.tags), dict(self.pulls), dict(self.converts))

    def find(self, name: str) -> str | None:
        """The commit id that `name` stands for, short or in full (refs/heads/main, refs/pr/1)."""
        for prefix, names in (
            ("", self.branches),
            ("", self.tags),
            ("refs/heads/", self.branches),
            ("refs/tags/", self.tags),
            ("refs/pr/", self.pulls),
            ("refs/convert/", self.converts),
        ):
            if name.startswith(prefix) and name[len(prefix) :] in names:
                return names[name[len(prefix) :]]
        return None


@dataclass
class Repository:
    """A repo: immutable commits, moving refs, and who may see it."""

    type: RepoType
    id: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: Refs = field(default_factory=Refs)
    private: bool = False
    gated: Gate = False
    deleted: bool = False
    # Names that a spec gave its commits, so that tests can say "second" and not a sha.
    named: dict[str, str] = field(default_factory=dict)
    # What stands for the repo in CDN paths, as on the Hub: a digest that a rename leaves alone.
    key: str = ""
    # LFS objects by sha256, under each path that ever had them: the newest blob serves.
    _lfs: dict[str, dict[str, Blob]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.key = self.key or hashlib.sha256(f"{self.type}:{self.id}".encode()).hexdigest()

    @property
    def namespace(self) -> str:
        """The owner's name; empty for repos without one (gpt2)."""
        return self.id.rpartition("/")[0]

    def add(self, commit: Commit, *, branch: str = "") -> None:
        """Record a commit and, if given, move `branch` to it."""
        self.commits[commit.id] = commit
        for path, blob in commit.tree.files.items():
            if blob.sha256:
                self._lfs.setdefault(blob.sha256, {})[path] = blob
        if branch:
            self.refs.branches[branch] = commit.id

    def commit(self, revision: str) -> Commit | None:
        """The commit that `revision` (a branch, tag, PR ref or full sha) stands for now, or None."""
        sha = self.refs.find(revision) or revision
        return self.commits.get(sha)

    def forget(self, commit_id: str) -> None:
        """Drop a commit that no ref stands for."""
        self.commits.pop(commit_id, None)
        self._lfs.clear()
        for commit in self.commits.values():
            self.add(commit)

    def lfs_blob(self, sha256: str) -> Blob | None:
        """The LFS object of that digest, if a commit of this repo has it."""
        blobs = self._lfs.get(sha256)
        return None if blobs is None else next(reversed(blobs.values()))

    def paths_of(self, sha256: str) -> tuple[str, ...]:
        """The paths under which commits of this repo have an LFS object."""
        return tuple(self._lfs.get(sha256, ()))

    def history(self, commit: Commit) -> list[Commit]:
        """`commit` and its ancestors, newest first."""
        commits = [commit]
        while commits[-1].parent in self.commits:
            commits.append(self.commits[commits[-1].parent])
        return commits


@dataclass
class User:
    """A person or machine with a token; `access` lists repo ids and namespaces it may read."""

    name: str
    token: str
    access: set[str] = field(default_factory=set)
    pro: bool = False

    def may_read(self, repo: Repository) -> bool:
        """Whether private or gated content of `repo` is open to this user."""
        return repo.id in self.access or (repo.namespace != "" and repo.namespace in {self.name, *self.access})


class Catalogue:
    """All repos and users of a hub, found by name, by token or by CDN key."""

    def __init__(self, repos: Iterable[Repository] = (), users: Iterable[User] = ()) -> None:
        self.repos: dict[tuple[RepoType, str], Repository] = {}
        self.renamed: dict[tuple[RepoType, str], str] = {}
        self.users: dict[str, User] = {user.token: user for user in users}
        self._by_key: dict[str, Repository] = {}
        for repo in repos:
            self.add(repo)

    def add(self, repo: Repository) -> None:
        """Add or replace a repo."""
        self.repos[repo.type, repo.id] = repo
        self._by_key[repo.key] = repo

    def remove(self, repo: Repository) -> None:
        """Forget a repo altogether."""
        self.repos.pop((repo.type, repo.id), None)
        self._by_key.pop(repo.key, None)

    def repo(self, type_: RepoType, id_: str) -> Repository | None:
        """The repo of that name unless it is deleted."""
        repo = self.repos.get((type_, id_))
        return None if repo is None or repo.deleted else repo

    def repo_by_key(self, key: str) -> Repository | None:
        """The repo whose CDN paths carry `key`."""
        return self._by_key.get(key)

    def rename(self, repo: Repository, new_id: str) -> None:
        """Give a repo a new name; the old one redirects."""
        old_id = repo.id
        self.remove(repo)
        repo.id = new_id
        self.add(repo)
        self.renamed[repo.type, old_id] = new_id

    def checkpoint(self) -> Callable[[], None]:
        """A function that puts everything back as it is now (commits made later stay reachable by sha)."""
        states = [
            (repo, repo.id, repo.refs.copy(), repo.private, repo.gated, repo.deleted, dict(repo.named))
            for repo in self.repos.values()
        ]
        renamed = dict(self.renamed)
        users = [User(user.name, user.token, set(user.access), user.pro) for user in self.users.values()]

        def restore() -> None:
            self.repos.clear()
            self._by_key.clear()
            for repo, id_, refs, private, gated, deleted, named in states:
                repo.id, repo.refs, repo.private, repo.gated = id_, refs.copy(), private, gated
                repo.deleted, repo.named = deleted, dict(named)
                self.add(repo)
            self.renamed = dict(renamed)
            self.users = {user.token: User(user.name, user.token, set(user.access), user.pro) for user in users}

        return restore
