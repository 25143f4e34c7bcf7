"""What this node answers other nodes' questions: chunks fetched on their behalf, what the hub said, what this node has. Here and only here.

In the daemon's trio thread; asked by `manta.fetch.swarm`. The access to the hub is this node's own, and no token is ever in an answer. What
is told of metadata is what everybody may know: trees and commits of public repos. Chunks may be those of any blob, or with
`swarm.share = public`, and without a key, only those that a public repo has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Iterable

import msgspec
import trio

from manta.cache.disk import pwrite_all
from manta.cache.metadata import MetadataStore
from manta.cache.store import Store
from manta.errors import Absent, Denied, Invalid, MantaError, Unavailable
from manta.fetch.fetcher import Fetcher
from manta.fetch.sources import Provenance
from manta.fetch.swarm import Answer, Swarm
from manta.hub.catalog import Catalog
from manta.hub.origin import Access
from manta.model.extents import ChunkGrid
from manta.model.ids import BlobId, Commit, RepoId, RepoKind, is_commit, parse_blob_id, parse_revision
from manta.model.snapshot import FileEntry, Snapshot
from manta.swarm.protocol import (
    BlobReport,
    LocationRequest,
    Report,
    Resolved,
    ResolveRequest,
    SharedLocation,
    TreeRequest,
    decode,
    encode,
)
from manta.wire.peering import Asked, PullAsked

REPORTED_MAX = 512
"""Blobs in a report, those fetched last: with bitmaps of 100 GiB each 1.6 KB, below what an answer may hold."""

PATH_BYTES_MAX = 4096


class Sharing:
    """Also what `manta.operations.peers` looks at. `page` writes the status page's data. `access` is the node's own; `mounted` are the
    snapshots that mounts show. `version` and `started` (seconds since the epoch) are the daemon's."""

    def __init__(
        self,
        swarm: Swarm,
        fetcher: Fetcher,
        store: Store,
        catalog: Catalog,
        metadata: MetadataStore,
        access: Callable[[], Access],
        mounted: Callable[[], Iterable[Snapshot]],
        version: str,
        started: float,
    ) -> None:
        self._swarm = swarm
        self._fetcher = fetcher
        self._store = store
        self._catalog = catalog
        self._metadata = metadata
        self._access = access
        self._mounted = mounted
        self._version = version
        self._started = started
        self.page: Callable[[], Awaitable[bytes]]
        self.node = swarm.node
        self.slots = swarm.slots
        self.members = swarm.members
        self.exchanges = swarm.exchanges
        self.ask_report = swarm.ask_report

    @property
    def address(self) -> str:
        return self._swarm.address

    @property
    def problem(self) -> str:
        return self._swarm.problem

    @property
    def busy(self) -> int:
        return self._swarm.busy

    async def answer(self, asked: Asked) -> Answer:
        """Raises the named errors of what was tried."""
        match asked.what:
            case "pull":
                return await self._pull(asked)
            case "resolve":
                return await self._resolve(decode(asked.body, ResolveRequest))
            case "tree":
                return await self._tree(decode(asked.body, TreeRequest))
            case "location":
                return await self._location(decode(asked.body, LocationRequest))
            case "report":
                return Answer(200, b"", _in_memory(encode(self.report())))
            case "public":
                return await self._public(asked.body.decode("ascii", "replace"))
            case "page":
                return Answer(200, b"", _in_memory(await self.page()))
        raise Invalid(f"No node asks for {asked.what[:40]!r}: the other node may be of another version.")

    # Chunks ----------------------------------------------------------------------------------------------------------

    async def _pull(self, asked: Asked) -> Answer:
        wanted = msgspec.msgpack.decode(asked.body, type=PullAsked)
        blob = parse_blob_id(wanted.blob)
        if self._fetcher.comes_from(blob, wanted.chunk) == asked.node:
            # Each would wait for the other: the one who asks goes elsewhere.
            raise Unavailable(f"Chunk {wanted.chunk} of {blob} is being asked of the node that asks for it.")
        place = self._place(wanted.kind, wanted.repo, wanted.commit, wanted.path, blob, wanted.size)
        await self._fetcher.supply(place, wanted.chunk, urgent=wanted.urgent)
        return Answer(200)

    def _place(self, kind: str, repo: str, commit: str, path: str, blob: BlobId, size: int) -> Provenance:
        """Raises Invalid for what is no place in a repo. That the blob is really there the hub says when it is asked."""
        if not is_commit(commit) or not 0 < len(path.encode("utf-8", "surrogateescape")) <= PATH_BYTES_MAX:
            raise Invalid(f"{repo[:100]!r} at {commit[:50]!r} names no file.")
        parts = path.split("/")
        if any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise Invalid(f"{path[:100]!r} is no path in a repo.")
        return Provenance(_repo(kind, repo), Commit(commit), FileEntry(path, size, blob), self._access())

    async def _public(self, name: str) -> Answer:
        """Whether a blob may be given to everybody: where a public repo has it."""
        blob = parse_blob_id(name)
        if any(not (s.gated or s.private) and blob in s.contents.blobs for s in self._mounted()):
            return Answer(200)
        if await trio.to_thread.run_sync(self._stored_public, blob, abandon_on_cancel=True):
            return Answer(200)
        raise Denied(f"{blob} is not known to be of a public repo, and only those are given to other nodes here.")

    def _stored_public(self, blob: BlobId) -> bool:
        for repo in self._metadata.repos():
            for commit in self._metadata.snapshots(repo):
                snapshot = self._metadata.snapshot(repo, commit)
                public = snapshot is not None and not (snapshot.gated or snapshot.private)
                if snapshot is not None and public and blob in snapshot.contents.blobs:
                    return True
        return False

    # What the hub said -----------------------------------------------------------------------------------------------

    async def _resolve(self, request: ResolveRequest) -> Answer:
        repo, revision = _repo(request.kind, request.repo), request.revision
        if revision:
            parse_revision(revision)
        if request.known:
            known = await trio.to_thread.run_sync(self._metadata.ref, repo, revision or "main", abandon_on_cancel=True)
            if known is None:
                raise Absent(f"{repo} is not known here.")
            commit, age_s = known[0], max(time.time() - known[1], 0.0)
        else:
            self._refuse_unless_owner(f"resolve/{repo}")
            resolution = await self._catalog.current(repo, revision or None, self._access())
            if resolution.stale:
                raise Unavailable(f"The hub could not be asked about {repo}: {resolution.reason}")
            commit, age_s = resolution.commit, 0.0
        snapshot = await self._catalog.stored(repo, commit)
        if snapshot is None and not request.known:
            snapshot = await self._catalog.snapshot(repo, commit, self._access())
        if snapshot is None or snapshot.gated or snapshot.private:
            raise Denied(f"{repo} is not known to be public: each node asks the hub itself.")
        return Answer(200, encode(Resolved(commit=commit, age_s=age_s)))

    async def _tree(self, request: TreeRequest) -> Answer:
        repo = _repo(request.kind, request.repo)
        if not is_commit(request.commit):
            raise Invalid(f"{request.commit[:50]!r} is no commit.")
        snapshot = await self._catalog.stored(repo, Commit(request.commit))
        if snapshot is None or snapshot.gated or snapshot.private:
            raise Absent(f"No tree of {repo} at {request.commit[:12]} is here that everybody may know.")
        data = await trio.to_thread.run_sync(self._metadata.encoded, repo, snapshot.commit, abandon_on_cancel=True)
        if data is None:
            raise Absent(f"The tree of {repo} at {request.commit[:12]} is not stored here.")
        return Answer(200, b"", _in_memory(data))

    async def _location(self, request: LocationRequest) -> Answer:
        blob = parse_blob_id(request.blob)
        self._refuse_unless_owner(f"location/{blob}")
        place = self._place(request.kind, request.repo, request.commit, request.path, blob, request.size)
        location = await self._fetcher.locate(place)
        if any(name.lower() == "authorization" for name in location.headers):
            raise Denied(f"{place} is given by the hub itself, to whom it knows: each node asks it itself.")
        now = time.time()
        expires_s = max(location.expires_at - now, 1.0) if location.expires_at is not None else 0.0
        refresh_s = max(location.refresh_at - now, 1.0) if location.refresh_at is not None else 0.0
        shared = SharedLocation(
            url=location.url, headers=dict(location.headers), expires_s=expires_s, refresh_s=refresh_s
        )
        return Answer(200, encode(shared))

    def _refuse_unless_owner(self, key: str) -> None:
        """Two nodes that see other members would each ask the other, for ever."""
        if (owner := self._swarm.owner(key)) is not None:
            raise Absent(f"Node {owner} asks the hub about this, as this node sees the members.")

    # What this node has done -----------------------------------------------------------------------------------------

    def report(self) -> Report:
        swarm, ledger = self._swarm, self._swarm.ledger
        blobs = []
        for name, entry in list(reversed(ledger.entries.items()))[:REPORTED_MAX]:
            blobs.append(
                BlobReport(
                    blob=name,
                    size=entry.size,
                    name=entry.name,
                    have=self._have(name),
                    from_origin=entry.from_origin,
                    from_peers=entry.from_peers,
                )
            )
        return Report(
            node=swarm.node,
            address=swarm.address,
            version=self._version,
            started=self._started,
            from_origin=ledger.from_origin,
            from_peers=ledger.from_peers,
            to_peers=ledger.to_peers,
            origin_rate=self._fetcher.origin_meter.rate(trio.current_time()),
            blobs=blobs,
            exchanges=swarm.exchanges(),
            slots=swarm.slots,
            busy=swarm.busy,
            cache_bytes=self._store.cached_bytes,
        )

    def _have(self, name: str) -> bytes:
        """The chunks of a blob that are here, a bit each."""
        try:
            blob = parse_blob_id(name)
            if (info := self._store.find(blob)) is None:
                return b""
            chunks = len(ChunkGrid(info.size))
            if info.sealed:  # most are, and looking at each chunk would take 60 ms for 512 blobs
                return ((1 << chunks) - 1).to_bytes(-(-chunks // 8), "little")
            held = self._store.open_blob(blob, info.size, use=False)
        except MantaError:
            return b""
        try:
            have = bytearray((chunks + 7) // 8)
            for chunk in range(chunks):
                if held.has(chunk):
                    have[chunk >> 3] |= 1 << (chunk & 7)
            return bytes(have)
        finally:
            held.close()


def _in_memory(data: bytes) -> int:
    """A descriptor that `data` can be read from. Raises Unavailable where there is no memory for it."""
    fd = os.memfd_create("manta-answer", os.MFD_CLOEXEC)
    try:
        pwrite_all(fd, data, 0)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"The answer has no room in memory ({error.strerror}).") from error
    return fd


def _repo(kind: str, name: str) -> RepoId:
    """Raises Invalid."""
    try:
        return RepoId(RepoKind(kind), name)
    except ValueError as error:
        raise Invalid(f"{kind[:40]!r} is no kind of repo.") from error
