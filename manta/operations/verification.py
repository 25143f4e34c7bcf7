"""Whether what is cached is what it was, and mending what is not: `manta cache verify`, here and only here. trio thread.

The digest worker reads and compares, a few chunks per order and few orders at once: it is nice, so readers and transfers go first. What
is damaged is made absent at once, and what the kernel has of the blob is dropped: no reader gets it any more, and without `repair` it is
fetched when it is read next. Mounted and open blobs are no exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from manta.cache.metadata import MetadataStore
from manta.cache.recovery import settle_doubtful
from manta.cache.store import Blob, Store
from manta.errors import Absent, MantaError, Unavailable
from manta.fetch.fetcher import Fetcher
from manta.fetch.sources import PROVENANCES_MAX, Provenance
from manta.fetch.workers import Workers
from manta.hub.origin import Access
from manta.model.ids import BlobId
from manta.telemetry.events import Telemetry
from manta.wire.messages import Failed

log = logging.getLogger(__name__)

ORDER_BYTES = 64 * 1024 * 1024
"""Read per order: 10 ms from the page cache, under a second from a slow disk. Progress moves and cancelling works in such steps."""

ORDERS_MAX = 2
"""Orders at once: a disk that readers use should not have a long queue of ours, and two threads hash faster than disks read."""

NAMED_MAX = 8
"""Damaged chunks of one kind that a sentence names."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What became of one blob."""

    damaged: int = 0
    """Chunks."""
    repaired: int = 0
    sentence: str = ""
    """What was found and done, for a person; empty where all is well."""


Progress = Callable[[int], None]
"""Hears of the bytes that were looked at."""


class Verification:
    """`discarded` hears of blobs of which the kernel may have wrong pages, `telemetry` what was found; None: nobody looks."""

    def __init__(
        self,
        store: Store,
        metadata: MetadataStore,
        workers: Workers,
        fetcher: Fetcher,
        discarded: Callable[[BlobId], None],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._store = store
        self._metadata = metadata
        self._workers = workers
        self._fetcher = fetcher
        self._discarded = discarded
        self._telemetry = telemetry or Telemetry()
        self._limiter = trio.CapacityLimiter(ORDERS_MAX)

    async def verify(
        self, blob_id: BlobId, size: int, progress: Progress, *, full: bool, repair: Access | None
    ) -> Findings:
        """Compares every cached chunk with its digest; `full`: a sealed blob with the hub's digest of the whole instead.

        `repair` is who asks the hub for what is damaged; None: nobody. Raises CacheBroken, NoSpace and Unavailable where it cannot be said
        what is damaged.
        """
        found = await self._verify(blob_id, size, progress, full=full, repair=repair)
        self._telemetry.verified("repaired" if found.repaired else "damaged" if found.damaged else "sound")
        return found

    async def _verify(
        self, blob_id: BlobId, size: int, progress: Progress, *, full: bool, repair: Access | None
    ) -> Findings:
        with self._store.open_blob(blob_id, size, use=False) as blob:
            was_sealed = blob.sealed
            damaged = await (self._whole(blob, progress) if full and was_sealed else self._chunks(blob, progress))
            if not damaged:
                return Findings()
            self._discarded(blob_id)
            if (transfer := self._fetcher.transfer(str(blob_id))) is not None:
                transfer.sealed = trio.Event()  # who completes it waits for a new seal
            provenances = await trio.to_thread.run_sync(self._provenances, blob_id, repair or Access(""))
            name = f"{provenances[0]} ({blob_id})" if provenances else str(blob_id)
            found = f"{name}: {_described(damaged, len(blob.grid))}"
            log.error("%s", found)
            if repair is None:
                return Findings(
                    len(damaged),
                    sentence=f"{found}. They are not served any more; they are fetched anew when they are read, or by"
                    " `manta cache verify --repair`.",
                )
            try:
                await self._refetch(blob, sorted(damaged), provenances, whole=was_sealed)
            except MantaError as e:
                return Findings(
                    len(damaged),
                    sentence=f"{found}. They are not served any more, and could not be fetched anew: {e.message}",
                )
            done = "were fetched anew, and the whole matches the hub's digest" if was_sealed else "were fetched anew"
            return Findings(len(damaged), len(damaged), f"{found}. They {done}.")

    # Finding ---------------------------------------------------------------------------------------------------------

    async def _chunks(self, blob: Blob, progress: Progress) -> dict[int, str]:
        """The damaged chunks, absent by now, and what is wrong with each."""
        damaged: dict[int, str] = {}
        if blob.doubtful:

            def settled(count: int) -> None:
                trio.from_thread.check_cancelled()
                progress(count)

            lost = await trio.to_thread.run_sync(settle_doubtful, blob, settled)
            damaged |= dict.fromkeys(lost, "was lost when the host crashed")
        per_order = max(1, ORDER_BYTES // blob.grid.chunk_size)
        for first in range(0, len(blob.grid), per_order):
            asked = {c: blob.digest(c) for c in range(first, min(first + per_order, len(blob.grid))) if blob.has(c)}
            found = {c: "has a damaged entry in its chunk map" for c, digest in asked.items() if digest is None}
            found |= await self._compare(blob, {c: digest for c, digest in asked.items() if digest is not None})
            for chunk, how in found.items():
                # It may have been fetched anew since.
                if blob.has(chunk) and blob.digest(chunk) == asked[chunk]:
                    damaged[chunk] = how
                    await trio.to_thread.run_sync(blob.clear, chunk)
            progress(sum(len(blob.grid.extent(chunk)) for chunk in asked))
        return damaged

    async def _compare(self, blob: Blob, digests: dict[int, bytes]) -> dict[int, str]:
        if not digests:
            return {}
        extents = {chunk: blob.grid.extent(chunk) for chunk in digests}
        chunk_at = {extent.start: chunk for chunk, extent in extents.items()}
        async with self._limiter:
            with blob.descriptor() as fd:
                answer = await self._workers.verify(
                    [(extent.start, extent.end, digests[chunk]) for chunk, extent in extents.items()], fd
                )
        if isinstance(answer, Failed):
            raise Unavailable(f"{blob.id} could not be verified: {answer.message}. Try again.")
        return {chunk_at[start]: how for start, how in answer.damaged}

    async def _whole(self, blob: Blob, progress: Progress) -> dict[int, str]:
        """As `_chunks`, of a sealed blob by its id; its chunks are looked at where that does not match."""
        at = 0
        while at < blob.size or not blob.size:
            end = min(at + ORDER_BYTES, blob.size)
            async with self._limiter:
                with blob.descriptor() as fd:
                    answer = await self._workers.digest(str(blob.id), at, end, blob.size, fd)
            if isinstance(answer, Failed):
                if answer.reason != "cache_broken":
                    raise Unavailable(f"{blob.id} could not be verified: {answer.message}. Try again.")
                break  # it cannot be read: the chunks tell where
            progress(end - at)
            at = end
            if answer.hex == blob.id.hex:
                return {}
            if answer.hex:
                break
        damaged = await self._chunks(blob, lambda _: None)
        if not damaged:
            reason = "its bytes do not have the digest that the hub says, and every chunk is as it was recorded"
            await trio.to_thread.run_sync(blob.discard, reason)
            damaged = dict.fromkeys(range(len(blob.grid)), "is part of a file that does not have the hub's digest")
        return damaged

    # Mending ---------------------------------------------------------------------------------------------------------

    async def _refetch(self, blob: Blob, chunks: list[int], provenances: list[Provenance], *, whole: bool) -> None:
        """Has `chunks` again; `whole`: and the blob sealed. Raises what became of the fetch."""
        if not provenances:
            raise Absent("No stored commit shows this blob; a mount that shows it fetches it when it is read.")
        transfer = self._fetcher.open(provenances[0])
        for provenance in reversed(provenances):
            transfer.sources.add(provenance)  # the last is tried first
        try:
            if whole:
                await transfer.complete()
            else:
                for chunk in chunks:
                    await transfer.ensure(blob.grid.extent(chunk))
        finally:
            if transfer.users == 1:
                self._fetcher.stop_background(str(blob.id))  # cancelled or failed, and nobody else wants it
            self._fetcher.close(transfer)

    def _provenances(self, blob: BlobId, access: Access) -> list[Provenance]:
        """Where stored trees show `blob`, the latest commit of each repo first. SLOW: reads them until enough are found."""
        found: list[Provenance] = []
        for repo in self._metadata.repos():
            for commit in reversed(self._metadata.snapshots(repo)):
                snapshot = self._metadata.snapshot(repo, commit)
                entry = next(snapshot.showing(blob), None) if snapshot is not None else None
                if entry is not None:
                    found.append(Provenance(repo, commit, entry, access))
                if len(found) == PROVENANCES_MAX:
                    return found
        return found


def _described(damaged: dict[int, str], chunks: int) -> str:
    """2 of 10 chunks are damaged: 3, 7 (does not match its digest)"""
    by_kind: dict[str, list[int]] = {}
    for chunk in sorted(damaged):
        by_kind.setdefault(damaged[chunk], []).append(chunk)
    parts = []
    for how, numbers in by_kind.items():
        more = f" and {len(numbers) - NAMED_MAX} more" if len(numbers) > NAMED_MAX else ""
        parts.append(f"{', '.join(map(str, numbers[:NAMED_MAX]))}{more} ({how})")
    return f"{len(damaged)} of {chunks} chunk{'s' * (chunks > 1)} {'are' if len(damaged) > 1 else 'is'} damaged: {'; '.join(parts)}"
