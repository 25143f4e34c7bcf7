"""What this node answers other nodes' questions: chunks fetched on their behalf, what the hub said, what this node has. Here and only here.

In the daemon's trio thread; asked by `manta.fetch.swarm`. The access to the hub is this node's own, and no token is ever in an answer. What
is told of metadata is what everybody may know: trees, commits and locations of public repos; of others not even that they are there.
Chunks may be those of any blob, or with `swarm.share = public`, and without a key, only those that a public repo has. On a member's behalf
only that is fetched which a tree that this node may see has at the place that the member names: who asks for a private repo's chunk knows
its digest already. Trees that other nodes told count as the hub's, as in `manta.hub.neighbours`.
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
from manta.model.snapshot import Snapshot
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

REVISION_CHARACTERS_MAX = 1024
"""Git's names of refs end well before."""

PLACE_SECONDS = 15.0
"""How long the tree is waited for that a chunk is asked of: who asks waits 20 s for the chunk."""


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
        self._looking = trio.CapacityLimiter(1)
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
        place = await self._place(
            wanted.kind, wanted.repo, wanted.commit, wanted.path, blob, wanted.size, public=self._swarm.public_only
        )
        await self._fetcher.supply(place, wanted.chunk, urgent=wanted.urgent)
        return Answer(200)

    async def _place(
        self, kind: str, repo: str, commit: str, path: str, blob: BlobId, size: int, *, public: bool
    ) -> Provenance:
        """The place, where the blob really is there: nothing is made in the cache, and no question asked, for what a member makes up.

        `public`: and everybody may know it. Raises Invalid for what is no place in a repo, Absent for all else that is not to be had: which
        repos there are that only some may see is not told.
        """
        if not is_commit(commit):
            raise Invalid(f"{commit[:50]!r} is no commit.")
        of, access = _repo(kind, repo), self._access()
        unknown = Absent(f"This node knows of no {path[:100]!r} with that content in {of} at {commit[:12]}.")
        try:
            with trio.fail_after(PLACE_SECONDS):
                snapshot = await self._catalog.snapshot(of, Commit(commit), access)
        except (Absent, Denied):
            raise unknown from None
        except trio.TooSlowError:
            raise Unavailable(f"The tree of {of} did not come within {PLACE_SECONDS:g} s.") from None
        entry = snapshot.files.get(path)
        if entry is None or (entry.blob, entry.size) != (blob, size) or (public and self._catalog.hidden(snapshot)):
            raise unknown
        return Provenance(of, snapshot.commit, entry, access)

    async def _public(self, name: str) -> Answer:
        """Whether a blob may be given to everybody: where a public repo has it."""
        blob = parse_blob_id(name)
        if any(not self._catalog.hidden(s) and blob in s.contents.blobs for s in self._mounted()):
            return Answer(200)
        # Only of what is here: looking through all trees takes a while, and one at a time.
        if self._store.find(blob) is not None and await trio.to_thread.run_sync(
            self._stored_public, blob, abandon_on_cancel=True, limiter=self._looking
        ):
            return Answer(200)
        raise Denied(f"{blob} is not known to be of a public repo, and only those are given to other nodes here.")

    def _stored_public(self, blob: BlobId) -> bool:
        for repo in self._metadata.repos():
            for commit in self._metadata.snapshots(repo):
                snapshot = self._metadata.snapshot(repo, commit)
                if snapshot is not None and not _hidden(snapshot) and blob in snapshot.contents.blobs:
                    return True
        return False

    # What the hub said -----------------------------------------------------------------------------------------------

    async def _resolve(self, request: ResolveRequest) -> Answer:
        repo, revision = _repo(request.kind, request.repo), request.revision
        if revision:
            parse_revision(revision)
        if len(revision) > REVISION_CHARACTERS_MAX:
            raise Invalid(f"A revision of {len(revision)} characters is none.")
        unknown = Absent(f"{repo} is not known to be public here: each node asks the hub itself.")
        if request.known:
            known = await trio.to_thread.run_sync(self._metadata.ref, repo, revision or "main", abandon_on_cancel=True)
            if known is None:
                raise unknown
            commit, age_s = known[0], max(time.time() - known[1], 0.0)
        else:
            self._refuse_unless_owner(f"resolve/{repo}")
            try:
                resolution = await self._catalog.current(repo, revision or None, self._access())
            except (Absent, Denied):
                raise unknown from None
            if resolution.stale:
                raise Unavailable(f"The hub could not be asked about {repo}: {resolution.reason}")
            if resolution.hidden:  # whatever it was when its trees were stored
                raise unknown
            commit, age_s = resolution.commit, 0.0
        snapshot = await self._catalog.stored(repo, commit)
        if snapshot is None and not request.known:
            try:
                snapshot = await self._catalog.snapshot(repo, commit, self._access())
            except (Absent, Denied):
                raise unknown from None
        if snapshot is None or self._catalog.hidden(snapshot):
            raise unknown
        return Answer(200, encode(Resolved(commit=commit, age_s=age_s)))

    async def _tree(self, request: TreeRequest) -> Answer:
        repo = _repo(request.kind, request.repo)
        if not is_commit(request.commit):
            raise Invalid(f"{request.commit[:50]!r} is no commit.")
        snapshot = await self._catalog.stored(repo, Commit(request.commit))
        if snapshot is None or self._catalog.hidden(snapshot):
            raise Absent(f"No tree of {repo} at {request.commit[:12]} is here that everybody may know.")
        data = await trio.to_thread.run_sync(self._metadata.encoded, repo, snapshot.commit, abandon_on_cancel=True)
        if data is None:
            raise Absent(f"No tree of {repo} at {request.commit[:12]} is here that everybody may know.")
        return Answer(200, b"", await trio.to_thread.run_sync(_in_memory, data))

    async def _location(self, request: LocationRequest) -> Answer:
        blob = parse_blob_id(request.blob)
        self._refuse_unless_owner(f"location/{blob}")
        place = await self._place(
            request.kind, request.repo, request.commit, request.path, blob, request.size, public=True
        )
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


def _hidden(snapshot: Snapshot) -> bool:
    """Whether not everybody may see it."""
    return snapshot.gated or snapshot.private


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
