"""Fake workers: `manta.fetch.workers.Workers` without processes and without a network, for tests of the fetcher and the sealer.

    workers = FakeWorkers()
    workers.publish(hub_url, data)                    # what `locate` and `fetch` answer with
    fault = workers.fault("fetch", hold=True, after_bytes=1000)   # the next fetch stops there ...
    await fault.reached.wait()
    fault.release()                                   # ... until now
    workers.fault("fetch", failed("denied", status=403), times=2)
    workers.fault("digest", Unavailable("no worker"))
    workers.give(node, blob, data)                    # what `pull` gets from that node
    workers.fetches, workers.bytes_sent, workers.under_way, workers.violations

It does to the cache file what a worker does: it writes the ordered extents of known content in their order and tells so piece by piece,
and digests what is in the file with the worker's own code. Every location is a new URL with a secret in it, so that a test sees which one
is used and whether one leaks. It belongs to one trio thread, sleeps on trio's clock and never by itself.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import trio

from manta.cache.digests import chunk_digest
from manta.errors import MantaError
from manta.fetch.workers import OnProgress, OrderControl
from manta.wire.messages import (
    Cancel,
    Digest,
    Digested,
    Failed,
    Fetch,
    Fetched,
    Locate,
    Located,
    Pull,
    Reason,
    Verified,
    Verify,
    Watch,
)
from manta.worker.digester import Digester
from manta.worker.failure import OrderFailed, disk_failure
from manta.worker.verifier import verify

Kind = Literal["locate", "fetch", "pull", "digest", "verify"]
Order = Locate | Fetch | Pull | Digest | Verify

SECRET = "x-secret-signature"
"""Is in every location's URL: what people read must not hold it."""

PIECE_BYTES = 64 * 1024
"""A worker hears of about as much at a time from a fast connection."""


def failed(
    reason: Reason = "unavailable",
    message: str = "failed as told",
    status: int = 0,
    retry_after_s: float = 0.0,
    *,
    unreachable: bool = False,
    behind: bool = False,
    holders: Sequence[str] = (),
    origin: str = "",
) -> Failed:
    """A failure to give to `FakeWorkers.fault`, whatever the order's number will be."""
    return Failed(0, reason, message, status, retry_after_s, unreachable, behind, list(holders), origin)


@dataclass(eq=False)
class Fault:
    """What befalls the next `times` orders (None: all) of a kind for which `where` holds. Made by `FakeWorkers.fault`."""

    kind: Kind
    answer: Failed | Located | MantaError | None
    where: Callable[[Order], bool]
    times: int | None
    after_bytes: int
    hold: bool
    flip: int | None
    struck: int = 0
    reached: trio.Event = field(default_factory=trio.Event)
    """Set when the first order has come to it."""
    _released: trio.Event = field(default_factory=trio.Event)

    def release(self) -> None:
        """Lets go on what it holds, and holds nothing more."""
        self._released.set()

    async def strike(self) -> None:
        """Waits where it holds. Raises its answer where that is an error."""
        self.reached.set()
        if self.hold:
            await self._released.wait()
        if isinstance(self.answer, MantaError):
            raise self.answer


class FakeWorkers:
    """Answers every order from what was published, after the faults that were set. `seconds_per_piece` is how long each piece takes."""

    def __init__(self, *, seconds_per_piece: float = 0.0, piece_bytes: int = PIECE_BYTES) -> None:
        self.seconds_per_piece = seconds_per_piece
        self.piece_bytes = piece_bytes
        self.lifetime_s: float | None = None
        """How long a location is good, by its URL; None: it does not say."""
        self.quota: dict[str, str] = {}
        """What the hub says of its quota: headers of each location."""
        self.orders: list[Order] = []
        """All that was ordered, the latest last."""
        self.under_way = 0
        self.under_way_max = 0
        self.bytes_sent = 0
        """Bytes written to cache files."""
        self.violations: list[str] = []
        """What no daemon may order, such as a chunk that is being fetched."""
        self._published: dict[str, bytes] = {}
        self._located: dict[str, str] = {}
        self._given: dict[tuple[str, str], tuple[bytes, bool]] = {}
        self._faults: list[Fault] = []
        self._chunks: Counter[tuple[str, int]] = Counter()
        self._digester = Digester()
        self._numbers = itertools.count(1)
        self._serial = itertools.count(1)

    # What a test says ------------------------------------------------------------------------------------------------

    def publish(self, url: str, data: bytes) -> None:
        """`url` on the hub leads to `data` from now on."""
        self._published[url] = data

    def withdraw(self, url: str) -> None:
        """`url` is unknown to the hub from now on (404); locations given out stay good."""
        self._published.pop(url, None)

    def give(self, node: str, blob: str, data: bytes, *, held: bool = True) -> None:
        """Other nodes: `node` has the blob from now on; where it is not `held`, it gives a chunk only to who asks it to fetch that."""
        self._given[node, blob] = data, held

    def fault(
        self,
        kind: Kind,
        answer: Failed | Located | MantaError | None = None,
        *,
        where: Callable[[Order], bool] | None = None,
        times: int | None = 1,
        after_bytes: int = 0,
        hold: bool = False,
        flip: int | None = None,
    ) -> Fault:
        """Puts a fault in force. The first one that fits an order befalls it; without `answer` the order goes on after it.

        `after_bytes` is where in a fetch or pull it strikes; `hold` stops there until `release`; `flip` inverts the byte at that offset of
        the blob, and is all that befalls the order.
        """
        fault = Fault(kind, answer, where or (lambda _order: True), times, after_bytes, hold, flip)
        self._faults.append(fault)
        return fault

    # What a test asks ------------------------------------------------------------------------------------------------

    @property
    def locates(self) -> list[Locate]:
        return [order for order in self.orders if isinstance(order, Locate)]

    @property
    def fetches(self) -> list[Fetch]:
        return [order for order in self.orders if isinstance(order, Fetch)]

    @property
    def pulls(self) -> list[Pull]:
        return [order for order in self.orders if isinstance(order, Pull)]

    @property
    def digests(self) -> list[Digest]:
        return [order for order in self.orders if isinstance(order, Digest)]

    # Workers ---------------------------------------------------------------------------------------------------------

    async def locate(self, url: str, headers: dict[str, str], deadline_s: float) -> Located | Failed:
        number = next(self._numbers)
        order = Locate(number, url, headers, deadline_s)
        with _Counted(self, order):
            await trio.lowlevel.checkpoint()
            if (fault := self._struck("locate", order)) is not None:
                with trio.move_on_after(deadline_s) as deadline:
                    await fault.strike()
                if deadline.cancelled_caught:
                    return Failed(
                        number, "unavailable", f"hub did not answer within {deadline_s:g} s", unreachable=True
                    )
                if isinstance(fault.answer, Failed):
                    return _numbered(fault.answer, number)
                if isinstance(fault.answer, Located):
                    return fault.answer
            data = self._published.get(url)
            if data is None:
                return Located(number, 404, url, {"x-error-code": "RepoNotFound"})
            location = f"https://cdn.test/{next(self._serial)}?signature={SECRET}"
            if self.lifetime_s is not None:
                location += f"&Expires={int(time.time() + self.lifetime_s)}"
            self._located[location] = url
            return Located(number, 302, url, {"location": location, "x-linked-size": str(len(data)), **self.quota})

    async def fetch(
        self, order: Callable[[int], Fetch], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed:
        told = order(next(self._numbers))
        hub_url = self._located[told.url]

        async def carry_out() -> Fetched | Failed:
            failure = await self._write(told, self._published.get(hub_url, b""), fd, progress)
            return failure or Fetched(told.order, _digest(told, fd) if told.last else b"", 0.0)

        return await self._bounded(told, hub_url, carry_out, control, watched=told.watched)

    async def pull(
        self, order: Callable[[int], Pull], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed:
        told = order(next(self._numbers))
        data, held = self._given.get((told.node, told.blob), (b"", False))

        async def carry_out() -> Fetched | Failed:
            if not data or not (held or told.pull):
                if (fault := self._struck("pull", told)) is not None:
                    await fault.strike()
                    if isinstance(fault.answer, Failed):
                        return _numbered(fault.answer, told.order)
                return Failed(told.order, "absent", f"{told.address} answered 404", 404)
            if not held:
                progress(told.start, told.start)
            if (failure := await self._write(told, data, fd, progress)) is not None:
                return failure
            if (digest := _digest(told, fd)) != chunk_digest(data[told.start : told.end]):
                return Failed(
                    told.order,
                    "corrupt",
                    f"{told.address} sent bytes that are not those of the digest it announced",
                )
            return Fetched(told.order, digest, 0.0)

        return await self._bounded(told, told.blob, carry_out, control, watched=True)

    async def _bounded(
        self,
        told: Fetch | Pull,
        content: str,
        carry_out: Callable[[], Awaitable[Fetched | Failed]],
        control: OrderControl,
        *,
        watched: bool,
    ) -> Fetched | Failed:
        """Carries an order out, unless it is cancelled, and notes what no daemon may order."""
        key = content, told.start
        if self._chunks[key] > 1:
            self.violations.append(
                f"chunk {told.start}..{told.end} of {content} was ordered a third time while under way"
            )
        if any(not told.start <= start < end <= told.end for start, end in told.extents):
            self.violations.append(f"extents {told.extents} of chunk {told.start}..{told.end}")
        self._chunks[key] += 1
        cancelled = trio.CancelScope()

        def tell(message: Watch | Cancel) -> None:
            if isinstance(message, Cancel):
                cancelled.cancel()

        control.bind(told.order, 0, tell, watched=watched)
        try:
            with _Counted(self, told), cancelled:
                await trio.lowlevel.checkpoint()
                return await carry_out()
            return Failed(told.order, "cancelled", "was cancelled")
        finally:
            control.release()
            self._chunks[key] -= 1

    async def digest(self, blob: str, start: int, end: int, blob_size: int, fd: int) -> Digested | Failed:
        number = next(self._numbers)
        order = Digest(number, blob, start, end, blob_size)
        with _Counted(self, order):
            await trio.lowlevel.checkpoint()
            if (fault := self._struck("digest", order)) is not None:
                await fault.strike()
                if isinstance(fault.answer, Failed):
                    if fault.answer.reason == "unavailable":
                        self._digester = Digester()  # its process died
                    return _numbered(fault.answer, number)
            try:
                return self._digester.advance(order, fd)
            except OrderFailed as e:
                return Failed(number, e.reason, e.message)

    async def verify(self, chunks: list[tuple[int, int, bytes]], fd: int) -> Verified | Failed:
        number = next(self._numbers)
        order = Verify(number, chunks)
        with _Counted(self, order):
            await trio.lowlevel.checkpoint()
            if (fault := self._struck("verify", order)) is not None:
                await fault.strike()
                if isinstance(fault.answer, Failed):
                    return _numbered(fault.answer, number)
            return verify(order, fd)

    # -----------------------------------------------------------------------------------------------------------------

    def _struck(self, kind: Kind, order: Order) -> Fault | None:
        for fault in self._faults:
            if fault.kind == kind and (fault.times is None or fault.struck < fault.times) and fault.where(order):
                fault.struck += 1
                return fault
        return None

    async def _write(self, order: Fetch | Pull, data: bytes, fd: int, progress: OnProgress) -> Failed | None:
        """The ordered extents of `data`; None when they are in the file."""
        fault, written = self._struck("fetch" if isinstance(order, Fetch) else "pull", order), 0
        for start, end in order.extents:
            at = start
            while at < end:
                upto = min(end, at + self.piece_bytes)
                if fault is not None and fault.flip is None and written + upto - at > fault.after_bytes:
                    upto = max(at, at + fault.after_bytes - written)
                piece = bytearray(data[at:upto])
                if fault is not None and fault.flip is not None and at <= fault.flip < upto:
                    piece[fault.flip - at] ^= 0xFF
                try:
                    os.pwrite(fd, piece, at)
                except OSError as e:
                    failure = disk_failure(e)
                    return Failed(order.order, failure.reason, failure.message)
                if upto > at:
                    await trio.sleep(self.seconds_per_piece)
                    self.bytes_sent += upto - at
                    progress(at, upto)
                written += upto - at
                at = upto
                if fault is not None and written >= fault.after_bytes and fault.flip is None:
                    struck, fault = fault, None
                    await struck.strike()
                    if isinstance(struck.answer, Failed):
                        return _numbered(struck.answer, order.order)
        return None


class _Counted:
    """Counts an order as under way."""

    def __init__(self, workers: FakeWorkers, order: Order) -> None:
        self._workers = workers
        workers.orders.append(order)

    def __enter__(self) -> None:
        self._workers.under_way += 1
        self._workers.under_way_max = max(self._workers.under_way, self._workers.under_way_max)

    def __exit__(self, *_: object) -> None:
        self._workers.under_way -= 1


def _digest(order: Fetch | Pull, fd: int) -> bytes:
    """Of the chunk, as it is in the file."""
    return chunk_digest(os.pread(fd, order.end - order.start, order.start))


def _numbered(answer: Failed, number: int) -> Failed:
    return msgspec.structs.replace(answer, order=number)
