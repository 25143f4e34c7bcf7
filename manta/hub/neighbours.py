"""What other nodes know of the hub's public repos, so that one of them asks it for all. Here and only here.

Used by `manta.hub.catalog`, in the daemon's trio thread. How members are asked is `manta.fetch.swarm`'s; they tell of public repos only,
and whoever has the cluster's key is believed about them, as the hub is.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from manta.errors import Invalid, MantaError
from manta.model.ids import Commit, RepoId, is_commit
from manta.model.snapshot import Snapshot
from manta.swarm.protocol import Resolved, ResolveRequest, TreeRequest, decode, encode

log = logging.getLogger(__name__)

Ask = Callable[[str, str, bytes], Awaitable[bytes | None]]
"""Asks the member who asks the hub about a key: what, the key, the request's body. None where that is this node, or it does not tell.
Raises Throttled where the hub asked that member for a pause."""

AskAny = Callable[[str, str, bytes], Awaitable[bytes | None]]
"""Asks all members until one tells: what, the key, the body. Who asks the hub about the key is first."""

ReadTree = Callable[[bytes, RepoId, Commit], Snapshot]
"""SLOW: a stored tree, read. Raises Invalid where it is not the one asked for."""


class Neighbours:
    """`None` from each method: ask the hub."""

    def __init__(self, ask: Ask, ask_any: AskAny, read_tree: ReadTree) -> None:
        self._ask = ask
        self._ask_any = ask_any
        self._read_tree = read_tree

    async def resolve(self, repo: RepoId, revision: str) -> Commit | None:
        """The commit that `revision` names now, by the word of the node who asks the hub about the repo. Raises Throttled."""
        request = ResolveRequest(kind=repo.kind.value, repo=repo.name, revision=revision)
        return _commit(await self._ask("resolve", f"resolve/{repo}", encode(request)))

    async def remembered(self, repo: RepoId, revision: str) -> Commit | None:
        """What any of them remembers: the hub cannot be asked."""
        request = ResolveRequest(kind=repo.kind.value, repo=repo.name, revision=revision, known=True)
        return _commit(await self._ask_any("resolve", f"resolve/{repo}", encode(request)))

    async def tree(self, repo: RepoId, commit: Commit, *, anybody: bool = False) -> Snapshot | None:
        """The tree of a commit, as that node has it, or with `anybody` any. Raises Throttled."""
        body = encode(TreeRequest(kind=repo.kind.value, repo=repo.name, commit=commit))
        ask = self._ask_any if anybody else self._ask
        data = await ask("tree", f"resolve/{repo}", body)
        if data is None:
            return None
        try:
            return await trio.to_thread.run_sync(self._read, data, repo, commit, abandon_on_cancel=True)
        except MantaError as error:
            log.warning("another node gave a tree of %s that cannot be used: %.300s", repo, error.message)
            return None

    def _read(self, data: bytes, repo: RepoId, commit: Commit) -> Snapshot:
        """Raises Invalid and Corrupt for what no filesystem can show, and for what is nobody's to tell: what is not public."""
        snapshot = self._read_tree(data, repo, commit)
        if snapshot.gated or snapshot.private or any(entry.blob is None for entry in snapshot.files.values()):
            raise Invalid("it is not of a public repo")
        snapshot.folders, snapshot.contents  # noqa: B018 - worked out here, in a thread
        return snapshot


def _commit(body: bytes | None) -> Commit | None:
    if body is None:
        return None
    try:
        told = decode(body, Resolved)
    except MantaError:
        return None
    return Commit(told.commit) if is_commit(told.commit) else None
