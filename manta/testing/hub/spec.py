"""HubSpec: what a test hub holds and how it behaves, as one JSON-serialisable value; and how to build it.

Tests and benchmarks write a HubSpec in Python (standard.py has the usual one) or in JSON; process.py hands
it to the hub's process, where __main__.py builds a catalogue from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import msgspec
from msgspec import Meta

from manta.testing.hub.digest_index import DigestIndex
from manta.testing.hub.files import FileSpec, read_spec
from manta.testing.hub.limits import Quotas
from manta.testing.hub.repository import (
    Blob,
    Catalogue,
    Commit,
    Gate,
    Refs,
    Repository,
    RepoType,
    Tree,
    User,
    make_blob,
    make_commit,
)

MAIN = "main"


class CommitSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A commit: the files of `base` (a commit named earlier), less `removed`, with `files` put over them."""

    name: str
    files: dict[str, FileSpec] = {}
    base: str | None = None
    removed: list[str] = []
    title: str = ""


class RepoSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A repo. `files` is short for one commit called "main"; with `commits`, refs map names to their names.

    Branch main is the last commit unless `branches` says otherwise. `pulls` and `converts` become refs/pr/N
    and refs/convert/NAME. `renamed_from`: old names that redirect. `xet`: LFS files announce Xet hashes
    (the Xet protocol itself is not served, so clients need HF_HUB_DISABLE_XET=1).
    """

    id: str
    type: RepoType = "model"
    files: dict[str, FileSpec] = {}
    commits: list[CommitSpec] = []
    branches: dict[str, str] = {}
    tags: dict[str, str] = {}
    pulls: dict[str, str] = {}
    converts: dict[str, str] = {}
    private: bool = False
    gated: Gate = False
    xet: bool = False
    renamed_from: list[str] = []


class UserSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A user with a token; `access` lists repo ids and namespaces whose private or gated repos it may read."""

    name: str
    token: str
    access: list[str] = []
    pro: bool = False


class Settings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How the hub behaves; see answers.Policy and admin.SettingsUpdate for units and meanings."""

    latency_s: Annotated[float, Meta(ge=0, le=60)] = 0.0
    bandwidth: Annotated[float, Meta(gt=0)] | None = None
    quotas: Quotas = Quotas()
    signed_url_lifetime_s: float = 3600
    cdn_allows_head: bool = False
    redirect_blobs: bool = True
    log_max: Annotated[int, Meta(ge=1)] = 10_000


class HubSpec(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A whole hub. `folders` are served as `manta hub serve` would; see folder.py for their layout."""

    repos: list[RepoSpec] = []
    users: list[UserSpec] = []
    folders: list[str] = []
    settings: Settings = msgspec.field(default_factory=Settings)


def build_catalogue(spec: HubSpec, index: DigestIndex) -> Catalogue:
    """The catalogue a spec describes, folders aside. Takes every file's digest, big files in parallel.

    Raises ValueError for a spec that contradicts itself and OSError for a disk file that cannot be read.
    """
    with ThreadPoolExecutor() as pool:
        repos = [_build_repo(repo, index, pool) for repo in spec.repos]
    users = [User(user.name, user.token, set(user.access), user.pro) for user in spec.users]
    catalogue = Catalogue(repos, users)
    for repo in spec.repos:
        for old in repo.renamed_from:
            catalogue.renamed[repo.type, old] = repo.id
    return catalogue


def _build_repo(spec: RepoSpec, index: DigestIndex, pool: ThreadPoolExecutor) -> Repository:
    if spec.files and spec.commits:
        raise ValueError(f"{spec.id}: give either files or commits, not both")
    commits = spec.commits or [CommitSpec(name=MAIN, files=spec.files)]
    repo = Repository(spec.type, spec.id, private=spec.private, gated=spec.gated)
    trees: dict[str, dict[str, Blob]] = {}
    for each in commits:
        commit = _build_commit(spec, each, repo, trees, index, pool)
        repo.add(commit)
        repo.named[each.name] = commit.id

    def shas(names: Mapping[str, str]) -> dict[str, str]:
        unknown = sorted(set(names.values()) - set(repo.named))
        if unknown:
            raise ValueError(f"{spec.id}: refs to commits that the spec does not have: {', '.join(unknown)}")
        return {name: repo.named[commit] for name, commit in names.items()}

    branches = {MAIN: commits[-1].name, **spec.branches}
    repo.refs = Refs(shas(branches), shas(spec.tags), shas(spec.pulls), shas(spec.converts))
    return repo


def _build_commit(
    repo_spec: RepoSpec,
    spec: CommitSpec,
    repo: Repository,
    trees: dict[str, dict[str, Blob]],
    index: DigestIndex,
    pool: ThreadPoolExecutor,
) -> Commit:
    if spec.base is not None and spec.base not in trees:
        raise ValueError(f"{repo_spec.id}: commit {spec.name!r} is based on {spec.base!r}, which is not before it")
    files = dict(trees[spec.base]) if spec.base is not None else {}
    for path in spec.removed:
        del files[path]

    def blob(item: tuple[str, FileSpec]) -> tuple[str, Blob]:
        path, file = item
        content = read_spec(file)
        return path, make_blob(path, content, xet=repo_spec.xet, sha256=index.sha256, git_sha1=index.git_sha1)

    files |= dict(pool.map(blob, spec.files.items()))
    trees[spec.name] = files
    parent = repo.named.get(spec.base or "", "")
    return make_commit(Tree(files), spec.title or f"Upload {spec.name}", parent=parent)
