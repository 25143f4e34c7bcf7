"""Gets wanted chunks into the cache: drives the scheduler, the hub's answers and the workers. Here and only here.

Runs in the daemon's trio thread. Fetches belong to the daemon: a reader only waits, a cancelled reader kills no fetch, and N readers of
one chunk cause one. The decisions are in pure modules: what next (`scheduler`), what after a failure (`retry`), where from (`sources`).
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator

import trio

from manta.cache.recovery import settle_doubtful
from manta.cache.store import Blob, Store
from manta.config import FetchConfig
from manta.errors import BY_CODE, Denied, MantaError, Throttled, Unavailable
from manta.fetch.meter import Meter
from manta.fetch.retry import ATTEMPTS_MAX, PAUSE_SECONDS, PAUSE_SECONDS_MAX, judge
from manta.fetch.scheduler import Priority, Scheduler, Want
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.fetch.workers import Attention, Workers
from manta.hub.origin import Location, Origin
from manta.wire.messages import Failed, Fetch, Fetched

log = logging.getLogger(__name__)

LOCATING_MAX = 16
"""Requests for locations under way: each costs the hub's quota, and a person who opens 1,000 files at once does not need them all now."""

OnFailure = Callable[[Provenance, MantaError], None]
OnArrival = Callable[[Transfer], None]


class Fetcher:
    """`origin` None: offline, nothing can be fetched. `failed` hears of each fetch that was given up, `grown` of each chunk that came."""

    def __init__(
        self,
        store: Store,
        workers: Workers,
        origin: Origin | None,
        config: FetchConfig,
        failed: OnFailure,
        grown: OnArrival,
    ) -> None:
        self._store = store
        self._workers = workers
        self._origin = origin
        self._config = config
        self._failed = failed
        self._grown = grown
        self._transfers: dict[str, Transfer] = {}
        self._scheduler = Scheduler(config.connections, self._next_missing)
        self._locating = trio.CapacityLimiter(LOCATING_MAX)
        self._stirred = trio.Event()
        self._nursery: trio.Nursery
        self.origin_meter = Meter()

    # For readers -----------------------------------------------------------------------------------------------------

    def open(self, provenance: Provenance) -> Transfer:
        """The transfer of what `provenance` shows; `close` must follow. Raises Denied for a hidden blob, NoSpace, CacheBroken."""
        entry = provenance.entry
        if entry.blob is None:
            raise Denied(
                f"{provenance} cannot be read: {provenance.repo} is gated and this token has no access. Ask for access on its page at"
                " the hub, log in with `hf auth login` or set HF_TOKEN, and mount it again."
            )
        key = str(entry.blob)
        transfer = self._transfers.get(key)
        if transfer is None:
            blob = self._store.open_blob(entry.blob, entry.size)
            transfer = Transfer(blob, self._scheduler, self._on_asked, self._config.read_timeout_s)
            self._transfers[key] = transfer
            if blob.doubtful:
                transfer.users += 1
                transfer.settling = True
                self._scheduler.hold(blob.id, math.inf)
                self._nursery.start_soon(self._settle, transfer)
        transfer.sources.add(provenance)
        transfer.users += 1
        if transfer.blob.complete and not transfer.blob.sealed:
            self._grown(transfer)  # it could not be verified so far: an earlier daemon was stopped, or a worker died
        return transfer

    def close(self, transfer: Transfer) -> None:
        """What is wanted of it in the background goes on."""
        transfer.users -= 1
        self._let_go(transfer)

    def _let_go(self, transfer: Transfer) -> None:
        blob = transfer.blob
        if transfer.users == 0 and not transfer.locating and not self._scheduler.wants(blob.id):
            self._transfers.pop(str(blob.id), None)
            blob.close()

    @property
    def active(self) -> Iterator[Transfer]:
        """The transfers of which anything is still to come."""
        return (t for t in self._transfers.values() if not t.blob.complete and self._scheduler.wants(t.blob.id))

    def transfer(self, blob_id: str) -> Transfer | None:
        """The transfer of a blob that is in use, if it is."""
        return self._transfers.get(blob_id)

    def stop_background(self, blob_id: str) -> None:
        """Nobody cares for the whole of this blob any more; readers still get what they read."""
        if (transfer := self._transfers.get(blob_id)) is not None:
            self._scheduler.unwant_whole(transfer.blob.id)
            self._let_go(transfer)

    # The driver ------------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Sends orders as long as it is not cancelled; `open` works from `started` on."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                self._stirred = trio.Event()
                now = trio.current_time()
                while (want := self._scheduler.next(now)) is not None:
                    self._send(want)
                change = self._scheduler.next_change(now)
                with trio.move_on_at(math.inf if change is None else change):
                    await self._stirred.wait()

    def _send(self, want: Want) -> None:
        transfer = self._transfers[str(want.blob)]
        location = transfer.sources.location
        if location is not None and not location.stale(time.time()):
            self._nursery.start_soon(self._carry_out, transfer, want, location)
            return
        self._scheduler.again(want)
        self._scheduler.hold(want.blob, math.inf)
        if not transfer.locating:
            transfer.locating = True
            self._nursery.start_soon(self._locate, transfer)

    def _on_asked(self, transfer: Transfer) -> None:
        if self._origin is None and not transfer.settling:
            error = Unavailable(
                f"{transfer.name} is not in the cache, and Manta is offline (--offline, MANTA_HUB_OFFLINE or HF_HUB_OFFLINE is set)."
                " Unset it, or prefetch while online."
            )
            self._give_up(transfer, error, None)
            return
        self._stirred.set()

    def _next_missing(self, blob_id: object, chunk: int) -> int | None:
        blob: Blob = self._transfers[str(blob_id)].blob
        if blob.complete:
            return None
        for candidate in range(max(chunk, blob.prefix_end // blob.grid.chunk_size), len(blob.grid)):
            if not blob.has(candidate):
                return candidate
        return None

    async def _settle(self, transfer: Transfer) -> None:
        """Compares what a host crash put in doubt with its digests; everything wanted of the blob is on hold meanwhile."""

        def progress(_count: int) -> None:
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(transfer.wake)

        try:
            bad = await trio.to_thread.run_sync(settle_doubtful, transfer.blob, progress)
            log.info("%s: %d chunks were damaged when the host crashed and are fetched anew", transfer.name, len(bad))
        except MantaError as e:
            self._give_up(transfer, e, None)
        transfer.settling = False
        self._scheduler.release(transfer.blob.id)
        transfer.wake()
        if self._origin is None and self._scheduler.wants(transfer.blob.id):
            self._on_asked(transfer)  # what is damaged cannot be had
        self._grown(transfer)
        self._stirred.set()
        self.close(transfer)

    # One location ----------------------------------------------------------------------------------------------------

    async def _locate(self, transfer: Transfer) -> None:
        """Asks the hub where the blob's bytes are; everything wanted of the blob is on hold meanwhile."""
        try:
            transfer.sources.location = await self._ask_for_location(transfer)
        except MantaError as e:
            self._give_up(transfer, e, None)
        finally:
            transfer.locating = False
            self._scheduler.release(transfer.blob.id)
            self._stirred.set()
            self._let_go(transfer)

    async def _ask_for_location(self, transfer: Transfer) -> Location:
        """Raises Denied, Absent, Corrupt when every provenance is refused, Unavailable when the hub does not answer."""
        assert self._origin is not None
        attempts = 0
        while True:
            provenance = transfer.sources.best
            request = self._origin.location_request(
                provenance.repo, provenance.commit, provenance.entry.path, provenance.access
            )
            async with self._locating:
                answer = await self._workers.locate(request.url, dict(request.headers), self._config.stall_s)
            attempts += 1
            pause = min(PAUSE_SECONDS * 2 ** (attempts - 1), PAUSE_SECONDS_MAX)
            try:
                if isinstance(answer, Failed):
                    raise Unavailable(
                        f"{provenance}: {answer.message}. Try again; `manta doctor` checks the way to the hub."
                    )
                return self._origin.parse_location(
                    provenance.repo,
                    provenance.commit,
                    provenance.entry,
                    provenance.access,
                    status=answer.status,
                    url=answer.url,
                    headers=answer.headers,
                    now=time.time(),
                )
            except Throttled as e:
                # It does not count towards giving up: waiting is what the hub asked for, and readers have their own deadline.
                attempts -= 1
                pause = e.retry_after_s or pause
                self._scheduler.hold_origin(trio.current_time() + pause)
                log.warning("the hub asks for a pause of %.0f s: %s", pause, e.message)
            except Unavailable:
                if attempts >= ATTEMPTS_MAX:
                    raise
            except MantaError:
                if attempts >= ATTEMPTS_MAX or not transfer.sources.demote(provenance):
                    raise
                pause = 0.0
            await trio.sleep(pause)

    # One order -------------------------------------------------------------------------------------------------------

    async def _carry_out(self, transfer: Transfer, want: Want, location: Location) -> None:
        blob, config = transfer.blob, self._config
        extent = blob.grid.extent(want.chunk)
        wanted, last = transfer.extents_for(want)
        extents = [(e.start, e.end) for e in wanted]
        attention = Attention(wanted=want.priority is Priority.DEMAND or transfer.awaited(want.chunk))

        def make(number: int) -> Fetch:
            return Fetch(
                number,
                location.url,
                dict(location.headers),
                extent.start,
                extent.end,
                extents,
                blob.size,
                config.stall_s,
                last,
                attention.wanted,
            )

        came = 0

        def progress(at: int, upto: int) -> None:
            nonlocal came
            came += upto - at
            self.origin_meter.add(upto - at, trio.current_time())
            transfer.arrived(want.chunk, at, upto)

        transfer.attentions[want.chunk] = attention
        try:
            answer = await self._workers.fetch(make, blob.fd, progress, attention)
            if isinstance(answer, Fetched) and last:
                blob.record(want.chunk, answer.digest)
        except MantaError as e:  # the disk refused the chunk map, or no worker could be had
            self._scheduler.finished(want)
            self._give_up(transfer, e, want.chunk)
        else:
            if isinstance(answer, Failed):
                self._after_failure(transfer, want, location, answer, came)
            elif not last:
                self._scheduler.finished(want)
                self._scheduler.want_rest(blob.id, want.chunk)
                transfer.stir()  # who waits for another part of the chunk asks for it now
            else:
                self._scheduler.finished(want)
                self._scheduler.learn(answer.first_byte_s, answer.seconds)
                transfer.recorded(want.chunk)
                self._grown(transfer)
        finally:
            del transfer.attentions[want.chunk]
        self._stirred.set()
        self._let_go(transfer)

    def _after_failure(self, transfer: Transfer, want: Want, location: Location, failure: Failed, came: int) -> None:
        now = trio.current_time()
        counts = transfer.attempts.setdefault(want.chunk, Counter())
        if failure.reason == "unavailable" and came:
            counts[failure.reason] = 0  # it got further: a link that breaks often is not one that leads nowhere
        counts[failure.reason] += 1
        attempts = counts[failure.reason]
        verdict = judge(failure, attempts)
        log.info(
            "chunk %d of %s (%s): %s; attempt %d, %s",
            want.chunk, transfer.blob.id, transfer.name, failure.message, attempts, "trying again" if verdict.retry else "giving up",
        )  # fmt: skip
        if failure.reason == "corrupt":
            transfer.distrust(want.chunk)
        if verdict.relocate and transfer.sources.location is location:
            transfer.sources.location = None
        if not verdict.retry:
            self._scheduler.finished(want)
            kind = BY_CODE.get(failure.reason, Unavailable)
            self._give_up(transfer, kind(f"{transfer.name}: {failure.message}. {_ADVICE[failure.reason]}"), want.chunk)
            return
        self._scheduler.again(want)
        if verdict.pause_s:
            self._scheduler.hold(want.blob, now + verdict.pause_s)
        if verdict.origin_pause_s:
            self._scheduler.hold_origin(now + verdict.origin_pause_s)
            log.warning("the origin asks for a pause of %.0f s", verdict.origin_pause_s)

    def _give_up(self, transfer: Transfer, error: MantaError, chunk: int | None) -> None:
        """Tells the readers. Background work on the blob ends too: it would fail the same way; the next read starts it again."""
        if chunk is None:
            transfer.attempts.clear()
            self._scheduler.forget(transfer.blob.id)
        else:
            transfer.attempts.pop(chunk, None)
            self._scheduler.unwant_whole(transfer.blob.id)
        transfer.fail(error, chunk)
        self._failed(transfer.sources.best, error)


_ADVICE: dict[str, str] = {
    "absent": "The file is gone from the hub; mount a revision that exists.",
    "denied": "Check the token with `manta doctor`, and the access to the repo on its page at the hub.",
    "throttled": "The hub limits requests; they go on by themselves.",
    "unavailable": "Try again; `manta doctor` checks the way to the hub.",
    "corrupt": "What came was not what the hub announced; a proxy in between may alter it. Try again.",
    "no_space": "Free space on the cache disk, set cache.size, or run `manta cache gc`.",
    "cache_broken": "Check the cache disk (dmesg); choose another with --cache-dir.",
    "cancelled": "Try again.",
}
