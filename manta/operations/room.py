"""Room in the cache: evicts before a bound is passed, and says what may be fetched while there is little. Here and only here. trio thread.

`manta.cache.policy` has the rules. The fetcher asks `least_urgent` before each order, which is what makes eviction follow the rate at which
bytes come; between orders the bounds are looked at every few seconds, because others fill the disk too. What is open, pinned or part of a
mount is protected: a mount promises that what it shows and has read stays readable when the hub is away. Where everything is protected, a
bound cannot be kept by evicting. Then background work stops first, readers go on until the bound is reached, and from there on they get
NoSpace for what is not cached. `problem` says so in `manta status`, the log says it once, and it ends by itself when there is room.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Protocol

import trio

from manta.cache.inventory import BlobInfo
from manta.cache.pins import Pins
from manta.cache.policy import Admission, Bounds, Usage, admission, excess, oldest
from manta.cache.store import Store
from manta.config import CacheConfig
from manta.errors import Absent, InUse, MantaError, NoSpace
from manta.fetch.scheduler import Priority
from manta.model.ids import BlobId
from manta.telemetry.events import Telemetry

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often the disk is looked at while nothing is fetched: how long what was held back waits when a person has made room. Costs a few
system calls."""

RETRY_SECONDS = 1.0
"""How long after an eviction that made no room the next one is tried: what is protected does not change faster than people act."""

SPACE_SECONDS = 0.02
"""How long an answer about free space is used while bytes come; what was cached since is subtracted."""


class Fetching(Protocol):
    """The part of the fetcher that waits for room."""

    @property
    def coming(self) -> int: ...

    def room_changed(self) -> None: ...

    def refuse_prefetches(self, error: MantaError) -> None: ...


class Room:
    """`mounted` names the blobs of all mounts. Give it the fetcher with `run`. `telemetry` hears what goes; None: nobody looks."""

    def __init__(
        self,
        store: Store,
        pins: Pins,
        config: CacheConfig,
        mounted: Callable[[], Container[BlobId]],
        telemetry: Telemetry | None = None,
    ) -> None:
        self._store = store
        self._pins = pins
        self._mounted = mounted
        self._telemetry = telemetry or Telemetry()
        self._bounds = Bounds(config.size, config.free_space_floor)
        self._short = trio.Event()
        self._space: tuple[float, int, int, int] | None = None  # when, free, size, cached then
        self.refusal: MantaError | None = None
        """What readers get for what is not cached, while nothing can be fetched."""
        self.problem: str | None = None
        """A sentence for `manta status` while a bound cannot be kept, or the directory is not what it was."""
        self._said: set[object] = set()

    # For the fetcher -------------------------------------------------------------------------------------------------

    def least_urgent(self, coming: int) -> Priority | None:
        """The least urgent kind of work that may be ordered now; None for nothing. `coming` bytes are ordered and not recorded."""
        try:
            usage = self._usage(coming)
        except MantaError as e:
            # Writing tells more about a disk that cannot be asked than statvfs: a reader's fetch finds out.
            self._say(e.message, e.message)
            self._short.set()
            return Priority.DEMAND
        allowed = admission(usage, self._bounds)
        if allowed is Admission.ALL:
            self.refusal = None
            return Priority.FILL
        self._short.set()
        if allowed is Admission.READERS:
            self.refusal = None
            return Priority.DEMAND
        return Priority.DEMAND if self.refusal is not None else None

    def _usage(self, coming: int) -> Usage:
        """Raises CacheBroken."""
        now, cached = trio.current_time(), self._store.cached_bytes
        if self._space is None or not 0 <= now - self._space[0] < SPACE_SECONDS:
            free, size = self._store.disk_space()
            self._space = now, free, size, cached
        _, free, size, then = self._space
        return Usage(cached, coming, free - max(0, cached - then), size)

    # Eviction --------------------------------------------------------------------------------------------------------

    async def run(self, fetching: Fetching) -> None:
        """Keeps the cache within its bounds as long as it is not cancelled."""
        while True:
            with trio.move_on_after(LOOK_SECONDS):
                await self._short.wait()
            self._short = trio.Event()
            try:
                if await trio.to_thread.run_sync(self._store.look_after):
                    fetching.room_changed()
                enough = await self._look(fetching)
            except MantaError as e:
                self._say(e.message, e.message)
                enough = False
            if not enough:
                await trio.sleep(RETRY_SECONDS)

    async def _look(self, fetching: Fetching) -> bool:
        """Evicts what it takes. False where that was not enough. Raises CacheBroken."""
        self._space = None
        usage = self._usage(fetching.coming)
        was_short = self.problem is not None
        # Again where more has come while blobs were removed.
        while needed := excess(usage, self._bounds):
            was_short = True
            reason = "limit" if self._limit_is_nearer(usage) else "floor"
            freed = await self._evict(oldest(self.evictable(), needed, self._pins), reason)
            self._space = None
            usage = self._usage(fetching.coming)
            if not freed:
                break
            log.info("evicted %d bytes; %d are cached, %d free on the disk", freed, usage.cached, usage.disk_free)
        # Without what is coming: that is short for as long as it takes, and part of it is on the disk already.
        allowed = admission(replace(usage, coming=0), self._bounds)
        if allowed is Admission.ALL:
            self.refusal = None
            self._say(None, None)
        else:
            sentence = self._sentence(usage, allowed)
            self._say(sentence, allowed)
            error = NoSpace(sentence)
            self.refusal = error if allowed is Admission.NOTHING else None
            fetching.refuse_prefetches(error)
        if was_short:
            fetching.room_changed()
        return allowed is Admission.ALL

    def evictable(self) -> list[BlobInfo]:
        mounted = self._mounted()
        return [info for info in self._store.listing() if info.id not in mounted]

    async def _evict(self, chosen: list[BlobInfo], reason: str) -> int:
        """Removes `chosen`, but for what has come into use meanwhile. Returns the bytes it freed. Raises CacheBroken."""
        freed = 0
        for info in chosen:
            try:
                size = await trio.to_thread.run_sync(self._store.remove, info.id)
            except (InUse, Absent):
                continue
            freed += size
            self._telemetry.evicted(1, size, reason)
        return freed

    def _limit_is_nearer(self, usage: Usage) -> bool:
        """Which of the two bounds is the tighter one: cache.size, or the disk's free space."""
        room_on_disk = usage.disk_free - self._bounds.floor_on(usage.disk_size)
        return bool(self._bounds.limit) and self._bounds.limit - usage.cached <= room_on_disk

    def disk_free(self) -> int:
        """Bytes that the disk has left; 0 where it cannot be asked, which `problem` tells."""
        try:
            return self._usage(0).disk_free
        except MantaError:
            return 0

    def needed(self) -> int:
        """Bytes to evict to be well within the bounds. Raises CacheBroken."""
        self._space = None
        return excess(self._usage(0), self._bounds)

    # What is said ----------------------------------------------------------------------------------------------------

    def _sentence(self, usage: Usage, allowed: Admission) -> str:
        bounds, directory = self._bounds, self._store.directory
        floor = bounds.floor_on(usage.disk_size)
        if self._limit_is_nearer(usage):
            full = f"The cache {directory} holds {_size(usage.cached)}, its limit is {_size(bounds.limit)} (cache.size)"
            remedy = "raise cache.size"
        else:
            full = (
                f"The disk of the cache {directory} has {_size(usage.disk_free)} free, of which"
                f" {_size(floor)} stay free (cache.free_space_floor)"
            )
            remedy = "free space on that disk"
        open_, pinned, mounted = self._protected()
        held = ", ".join(
            f"{_size(count)} {what}"
            for count, what in ((open_, "open"), (mounted, "mounted"), (pinned, "pinned"))
            if count
        )
        kept = f"nothing cached may go ({held})" if held else "there is nothing cached that could go"
        effect = (
            "reads of what is not cached fail"
            if allowed is Admission.NOTHING
            else "only what readers wait for is fetched"
        )
        return f"{full}, and {kept}: {effect}. To make room: `manta umount`, `manta cache unpin`, or {remedy}."

    def _protected(self) -> tuple[int, int, int]:
        """Cached bytes that are open, else pinned, else mounted."""
        mounted, open_bytes, pinned_bytes, mounted_bytes = self._mounted(), 0, 0, 0
        for info in self._store.listing():
            if info.in_use:
                open_bytes += info.cached
            elif info.id in self._pins:
                pinned_bytes += info.cached
            elif info.id in mounted:
                mounted_bytes += info.cached
        return open_bytes, pinned_bytes, mounted_bytes

    def _say(self, problem: str | None, matter: object) -> None:
        """Into the log once per `matter` until all is well: the figures in a sentence change all the time."""
        if problem is None:
            if self.problem is not None:
                log.info("the cache is well again: everything is fetched")
            self._said.clear()
        elif matter not in self._said:
            log.warning("%s", problem)
            self._said.add(matter)
        self.problem = problem


def _size(count: int) -> str:
    """As people read sizes of disks: 1000 based, like `manta status`."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.2f} TB"
