"""Verifies blobs against the hub's digest while their chunks arrive, and seals them. Here and only here.

Runs in the daemon's trio thread; the digest worker does the arithmetic. A blob's digest follows its complete prefix, so that the
bytes are still in the page cache when they are digested, and little is left to do when the last chunk comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from manta.errors import CacheBroken, Corrupt, MantaError, Unavailable
from manta.fetch.fetcher import Fetcher, OnFailure
from manta.fetch.quarantine import CONDEMNED_SECONDS
from manta.fetch.scheduler import Priority
from manta.fetch.transfer import Transfer
from manta.fetch.workers import Workers
from manta.telemetry.events import Telemetry
from manta.wire.messages import Digested, Failed

log = logging.getLogger(__name__)

DIGESTS_MAX = 4
"""Digest orders under way; the digest worker runs them in threads, and hashing releases the GIL."""

STEP_BYTES_MAX = 1024**3
"""Bytes in one order: bounds how long one blob keeps a thread (0.6 s of sha256)."""

FAILURES_MAX = 3
"""Times that a blob's digest may be lost to a dying worker before it is left for later."""

OnDiscard = Callable[[Transfer], None]


class Sealer:
    """`failed` hears of each blob that is corrupt, `discarded` of it too, once its bytes are not to be served any more.

    `telemetry` hears how each blob ended; None: nobody looks.
    """

    def __init__(
        self, workers: Workers, failed: OnFailure, discarded: OnDiscard, telemetry: Telemetry | None = None
    ) -> None:
        self._workers = workers
        self._failed = failed
        self._discarded = discarded
        self._telemetry = telemetry or Telemetry()
        self._limiter = trio.CapacityLimiter(DIGESTS_MAX)
        self._following: set[Transfer] = set()
        self._nursery: trio.Nursery | None = None
        self._fetcher: Fetcher | None = None

    async def run(self, fetcher: Fetcher) -> None:
        """Follows the blobs named to `grown` as long as it is not cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery, self._fetcher = nursery, fetcher
            for transfer in self._following:  # grown before now
                nursery.start_soon(self._follow, transfer)
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # a chunk may still come while everything ends

    def grown(self, transfer: Transfer) -> None:
        """More of the blob is there."""
        if transfer not in self._following and not transfer.blob.sealed and transfer.broken is None:
            self._following.add(transfer)
            transfer.users += 1
            if self._nursery is not None:
                self._nursery.start_soon(self._follow, transfer)

    async def _follow(self, transfer: Transfer) -> None:
        assert self._fetcher is not None
        try:
            await self._advance(transfer)
        except MantaError as e:
            self._telemetry.seal_ended("failed")
            if transfer.blob.complete:
                transfer.unverified(e)
            else:
                transfer.stir()
            self._failed(transfer.sources.best, e)
        finally:
            self._following.discard(transfer)
            self._fetcher.close(transfer)

    async def _advance(self, transfer: Transfer) -> None:
        blob, failures = transfer.blob, 0
        while not blob.sealed and transfer.broken is None:
            if transfer.digested == 0 or transfer.generation != blob.generation:
                # From the start, also when a chunk that was digested has been found damaged and thrown away since.
                transfer.digested, transfer.generation = 0, blob.generation
            at = transfer.digested
            end = min(blob.prefix_end, at + STEP_BYTES_MAX)
            if end <= at and blob.size:
                return  # `grown` comes again
            async with self._limiter:
                with blob.descriptor() as fd:
                    answer = await self._workers.digest(str(blob.id), at, end, blob.size, fd)
            if isinstance(answer, Failed):
                if answer.reason in {"no_space", "cache_broken"}:
                    raise CacheBroken(f"{transfer.name} could not be verified: {answer.message}.")
                failures += 1
                if failures > FAILURES_MAX:
                    raise Unavailable(
                        f"{transfer.name} could not be verified: {answer.message}. Its bytes stay; it is verified later."
                    )
                transfer.digested = 0  # the worker was replaced: from the start
                continue
            transfer.digested = end
            if answer.hex:
                await self._conclude(transfer, answer)

    async def _conclude(self, transfer: Transfer, answer: Digested) -> None:
        assert self._fetcher is not None
        blob = transfer.blob
        transfer.digested = 0
        if blob.generation != transfer.generation:
            return  # what was digested is not what is there
        if answer.hex == blob.id.hex:
            try:
                await trio.to_thread.run_sync(blob.seal, transfer.generation)
            except Corrupt:
                return  # a chunk was thrown away in the meantime
            self._fetcher.quarantine.release(blob.id)
            transfer.quarantined = False
            if transfer.misled:
                self._discarded(transfer)
                transfer.misled = False
            self._fetcher.verified(transfer)
            transfer.sealed.set()
            transfer.stir()
            self._telemetry.seal_ended("sealed")
            log.info("sealed %s (%s)", blob.id, transfer.name)
            return
        again = self._fetcher.quarantine.take(blob.id)
        transfer.quarantined = True
        error = Corrupt(
            f"{transfer.name}: its bytes have the digest {answer.hex}, the hub says {blob.id.hex}; they were thrown away and "
            + (
                "are fetched anew."
                if again
                else f"are not asked for again before {CONDEMNED_SECONDS / 60:.0f} minutes have passed. Report it to the owner of the repo."
            )
        )
        self._telemetry.seal_ended("mismatch")
        log.error("%s", error.message)
        if not again:
            self._fetcher.quarantine.condemn(blob.id, error, trio.current_time())
            transfer.broken = error
        try:
            blob.discard(error.message)
        finally:
            self._discarded(transfer)
        transfer.sources.location = None
        transfer.want_whole(Priority.FILL)  # nothing where it is broken
        transfer.stir()
        self._failed(transfer.sources.best, error)
