"""Changes: what can happen to a hub's content while it runs. The vocabulary, and its only implementation.

Sent by tests over the admin API, or carried by a Mutate fault so that a change happens exactly between two
requests. A change applies at once and to every later request.
"""

from __future__ import annotations

import msgspec

from manta.testing.hub.files import FileSpec, read_spec
from manta.testing.hub.repository import (
    Catalogue,
    Gate,
    Repository,
    RepoType,
    Tree,
    User,
    make_blob,
    make_commit,
)


class _Change(msgspec.Struct, forbid_unknown_fields=True, tag_field="change", frozen=True, kw_only=True):
    pass


class _RepoChange(_Change, frozen=True, kw_only=True):
    repo: str
    repo_type: RepoType = "model"


class MoveBranch(_RepoChange, tag="move-branch", frozen=True, kw_only=True):
    """Point a branch at another commit: a revision, a sha, or a name the spec gave a commit."""

    to: str
    branch: str = "main"


class DeleteBranch(_RepoChange, tag="delete-branch", frozen=True, kw_only=True):
    """Remove a branch; its commits stay reachable by sha."""

    branch: str = "main"


class Push(_RepoChange, tag="push", frozen=True, kw_only=True):
    """Commit files on top of a branch; paths in `removed` go."""

    files: dict[str, FileSpec] = {}
    removed: list[str] = []
    branch: str = "main"
    title: str = "Update"


class SetGated(_RepoChange, tag="set-gated", frozen=True, kw_only=True):
    """Put a repo behind a gate, or take the gate away (false)."""

    gated: Gate = "auto"


class SetPrivate(_RepoChange, tag="set-private", frozen=True, kw_only=True):
    private: bool = True


class SetDeleted(_RepoChange, tag="set-deleted", frozen=True, kw_only=True):
    """Delete a repo, or bring a deleted one back."""

    deleted: bool = True


class Rename(_RepoChange, tag="rename", frozen=True, kw_only=True):
    """Rename a repo; the old name answers with a redirect."""

    to: str


class GrantAccess(_Change, tag="grant-access", frozen=True, kw_only=True):
    """Let a user read a private or gated repo, or all of a namespace."""

    user: str
    repo: str


class RevokeAccess(_Change, tag="revoke-access", frozen=True, kw_only=True):
    """Take that right back; URLs already signed stay good, as on the Hub."""

    user: str
    repo: str


class RevokeToken(_Change, tag="revoke-token", frozen=True, kw_only=True):
    """Make a token invalid: every request that carries it is answered 401."""

    token: str


Change = (
    MoveBranch
    | DeleteBranch
    | Push
    | SetGated
    | SetPrivate
    | SetDeleted
    | Rename
    | GrantAccess
    | RevokeAccess
    | RevokeToken
)


def apply_change(catalogue: Catalogue, change: Change) -> None:
    """Carry out a change; raises LookupError when it names something the hub does not have."""
    match change:
        case GrantAccess():
            _user(catalogue, change.user).access.add(change.repo)
        case RevokeAccess():
            _user(catalogue, change.user).access.discard(change.repo)
        case RevokeToken():
            if catalogue.users.pop(change.token, None) is None:
                raise LookupError(f"no such token on this hub: {change.token[:6]}...")
        case _:
            _apply_to_repo(catalogue, _repo(catalogue, change), change)


def _apply_to_repo(
    catalogue: Catalogue,
    repo: Repository,
    change: MoveBranch | DeleteBranch | Push | SetGated | SetPrivate | SetDeleted | Rename,
) -> None:
    match change:
        case MoveBranch():
            commit = repo.commit(repo.named.get(change.to, change.to))
            if commit is None:
                raise LookupError(f"{repo.id} has no commit or revision {change.to!r}")
            repo.refs.branches[change.branch] = commit.id
        case DeleteBranch():
            if repo.refs.branches.pop(change.branch, None) is None:
                raise LookupError(f"{repo.id} has no branch {change.branch!r}")
        case Push():
            parent = repo.commits.get(repo.refs.branches.get(change.branch, ""))
            files = dict(parent.tree.files) if parent else {}
            for path in change.removed:
                del files[path]
            for path, spec in change.files.items():
                files[path] = make_blob(path, read_spec(spec))
            commit = make_commit(Tree(files), change.title, parent=parent.id if parent else "")
            repo.add(commit, branch=change.branch)
        case SetGated():
            repo.gated = change.gated
        case SetPrivate():
            repo.private = change.private
        case SetDeleted():
            repo.deleted = change.deleted
        case Rename():
            catalogue.rename(repo, change.to)


def _repo(catalogue: Catalogue, change: _RepoChange) -> Repository:
    repo = catalogue.repos.get((change.repo_type, change.repo))
    if repo is None:
        raise LookupError(f"no {change.repo_type} {change.repo!r} on this hub")
    return repo


def _user(catalogue: Catalogue, name: str) -> User:
    for user in catalogue.users.values():
        if user.name == name:
            return user
    raise LookupError(f"no user {name!r} on this hub")
