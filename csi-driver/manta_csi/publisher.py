"""Publishing a volume and ending it, here and only here: the steps between the daemon, the state file and the kernel.

Publish: the state file says what is begun; the daemon resolves, authorises and makes the directory (PUT); it is bound to the target; the
daemon is told. Nothing is downloaded. Each step may be repeated, so a publish that was cut off anywhere is ended by the next one, or
undone by an unpublish or by `manta_csi.reconciliation`. Unpublish takes the mount away first, without asking anybody, and tells the
daemon then: where it does not answer, the entry stays in the state file until it does.

One thing at a time is done with a target. What is begun is ended even if its caller has gone: see `Publisher.run`. Belongs to the event
loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from manta.control.protocol import Mount, MountRequest
from manta.errors import Absent, Conflict, Denied, Invalid, MantaError, Unavailable
from manta_csi import attributes
from manta_csi.daemon import UNPUBLISH_S, Daemon
from manta_csi.mounttable import Attempt, MountTable, clear_target, place_of
from manta_csi.refusals import InProgress, Unknown, softened
from manta_csi.settings import TokenPolicy
from manta_csi.state import Entry, State
from manta_csi.threads import Threads

log = logging.getLogger(__name__)

PUBLISH_S = 75.0
"""For a publish, without what follows where it failed. The kubelet waits for 2 minutes, and the sentence that says why must reach it."""

UNDO_S = 20.0
"""For taking back what a failed publish has done."""

BIND_S = 10.0
"""For a bind: the daemon answers its lookups from memory."""

TABLE_S = 5.0
"""For a look into mountinfo, which waits while others mount."""

CLEAR_S = 20.0
"""For an unmount and the removal of a directory, neither of which asks the daemon's filesystem."""

BUSY_S = 2.0
"""How long a second call waits for the first one with the same target before it is told to come again."""

MOUNT_CALLS_MAX = 32
"""Mount calls under way. Fifty pods at once share them: each takes a millisecond, unless the daemon's filesystem hangs."""

PREFIX = "csi-"
"""Of all names that the driver gives to publications."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Request:
    """A publish request, after the checks that need no look at its attributes."""

    volume: str
    target: str
    readonly: bool
    access: int
    context: Mapping[str, str] = field(repr=False)
    """May hold service account tokens."""
    secrets: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        return publication_name(self.volume, self.target)


def publication_name(volume: str, target: str) -> str:
    """One volume may be published at several targets: a PersistentVolume that several pods of a node use."""
    return PREFIX + hashlib.sha256(f"{volume}\0{target}".encode()).hexdigest()[:48]


def target_of(path: str, kubelet_dir: Path, real: Path) -> str:
    """The target as mountinfo writes it: `kubelet_dir` may be a symlink to `real`. Raises Invalid for a path that is not below it."""
    below = path.removeprefix(f"{kubelet_dir}/")
    plain = len(path.encode(errors="replace")) < 4096 and path.isprintable()
    if not plain or below == path or any(part in {"", ".", ".."} for part in below.rstrip("/").split("/")):
        raise Invalid(
            f"The target path {path[:200]!r} does not lie below the kubelet's directory {kubelet_dir}, as this driver knows it:"
            " set --kubelet-dir (kubeletDir in the chart) to the kubelet's --root-dir."
        )
    return f"{real}/{below.rstrip('/')}"


class Publisher:
    """The volumes of this node."""

    def __init__(self, daemon: Daemon, state: State, *, token_policy: TokenPolicy) -> None:
        self._daemon = daemon
        self._state = state
        self._policy = token_policy
        self._threads = Threads("manta-mount", MOUNT_CALLS_MAX)
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hanging: dict[str, Attempt] = {}
        self.owes = asyncio.Event()
        """Set when the daemon has to be told something later; the reconciliation clears it."""

    async def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """`work`, which goes on to its end also where its caller is cancelled: a publish must not be left half done."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone: then nobody else looks at it

    async def finish(self, timeout_s: float) -> None:
        """Waits for what is under way."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)

    @asynccontextmanager
    async def alone(self, target: str) -> AsyncIterator[None]:
        """Nobody else does anything with this target meanwhile. Raises InProgress where somebody does for longer than BUSY_S."""
        lock, users = self._locks.get(target, (asyncio.Lock(), 0))
        self._locks[target] = lock, users + 1
        try:
            try:
                async with asyncio.timeout(BUSY_S):
                    await lock.acquire()
            except TimeoutError as error:
                raise InProgress(f"Something is being done with {target} already; ask again.") from error
            try:
                yield
            finally:
                lock.release()
        finally:
            lock, users = self._locks[target]
            if users == 1:
                del self._locks[target]
            else:
                self._locks[target] = lock, users - 1

    async def table(self) -> MountTable:
        return await self._threads.run(MountTable.read, timeout_s=TABLE_S, what="A look into mountinfo")

    # Publish ---------------------------------------------------------------------------------------------------------

    async def publish(self, request: Request) -> Mount:
        """Shows the volume at its target. The same again is fine, and checks the pod's rights anew.

        Raises Conflict where the target shows something else, InProgress, what `attributes` and the daemon raise, and never anything
        final where the volume is shown already.
        """
        async with self.alone(request.target):
            there = (await self.table()).at(request.target)
            entry = self._state.get(request.target)
            if there is not None:
                if entry is None and not there.is_manta:
                    raise Conflict(f"Another filesystem ({there.fstype}) is mounted on the target {request.target}.")
                if entry is not None:
                    _check_same(entry, request)
            try:
                async with asyncio.timeout(PUBLISH_S):
                    return await self._show(request, entry)
            except TimeoutError:
                failure: MantaError = Unavailable(f"The volume could not be published within {PUBLISH_S:g} s.")
            except MantaError as error:
                failure = error
            if there is not None:
                raise softened(failure)
            await self._undo(request)
            raise failure

    async def _show(self, request: Request, entry: Entry | None) -> Mount:
        given = attributes.given(request.context)
        wanted = self._mount_request(request, attributes.parse(given))
        if (attempt := self._hanging.get(request.target)) is not None:
            if not attempt.ended.is_set():
                raise InProgress(
                    f"An earlier mount on {request.target} still hangs in the kernel: the Manta daemon does not answer it."
                )
            del self._hanging[request.target]
        begun = Entry(request.name, request.volume, request.target, given, request.readonly, request.access)
        if entry is not None and entry.attributes is not None and entry != begun:
            # Ended, but for the daemon, which was away: it must not take this one for that one.
            await self._daemon.unpublish(entry.name)
        await self._state.put(begun)
        try:
            mount = await self._daemon.publish(request.name, wanted)
        except Denied as error:
            if wanted.token or wanted.anonymous:
                raise  # its sentence speaks of the pod's secret
            raise Denied(
                f"{error.message} It was asked with the node's token, since the volume names no secret."
            ) from error
        if mount.source == request.target:
            raise Unavailable(
                "The Manta daemon runs without root and cannot share its filesystem: run it as root, as the chart does."
            )
        await self._bind(mount.source, request.target)
        return await self._daemon.bound(request.name, request.target)

    def _mount_request(self, request: Request, wanted: attributes.Attributes) -> MountRequest:
        token = attributes.token(request.secrets)
        return MountRequest(
            target=wanted.target,
            directory=request.target,
            view=wanted.view,
            token=token,
            anonymous=not token and self._policy == "secret",
            prefetch=wanted.prefetch,
            pin=wanted.pin,
            pod=attributes.pod(request.context, request.volume),
        )

    async def _bind(self, source: str, target: str) -> None:
        attempt = Attempt(source, target)
        try:
            await self._threads.run(attempt, timeout_s=BIND_S, what=f"The mount on {target}")
        except BaseException:
            attempt.give_up()
            if not attempt.ended.is_set():
                self._hanging[target] = attempt
            raise

    async def _clear(self, target: str, *, known: bool = True) -> None:
        await self._threads.run(
            partial(clear_target, target, known=known), timeout_s=CLEAR_S, what=f"The unmount of {target}"
        )

    async def _undo(self, request: Request) -> None:
        """After a publish that failed nothing is left: no directory, and no entry unless the daemon has still to be told."""
        try:
            async with asyncio.timeout(UNDO_S):
                await self._clear(request.target)
                if self._state.get(request.target) is not None:
                    await self.tell_end(request.name, request.target)
        except TimeoutError:
            log.warning(
                "a failed publish at %s could not be undone within %g s; that is tried again later",
                request.target,
                UNDO_S,
            )
        except MantaError as error:
            log.warning("after a failed publish: %s", error.message)

    # Unpublish -------------------------------------------------------------------------------------------------------

    async def unpublish(self, volume: str, target: str) -> None:
        """The target is gone afterwards, whether the daemon lives or not. Fine where nothing was published."""
        async with self.alone(target):
            entry = self._state.get(target)
            if entry is not None and entry.volume not in {"", volume}:
                log.warning("%s shows another volume than %s, which is left alone", target, volume)
                return
            await self._clear(target, known=entry is not None)
            await self.tell_end(entry.name if entry else publication_name(volume, target), target)

    async def tell_end(self, name: str, target: str, timeout_s: float = UNPUBLISH_S) -> bool:
        """Tells the daemon that a publication has ended, whose target is gone. Where it does not answer, the entry stays, for later."""
        try:
            await self._daemon.unpublish(name, timeout_s)
        except MantaError as error:
            self.owes.set()
            log.warning("the daemon will be told later that %s is unmounted: %s", target, error.message)
            return False
        await self._state.drop(target)
        return True

    # Stats -----------------------------------------------------------------------------------------------------------

    async def look(self, volume: str, path: str) -> tuple[Mount | None, str]:
        """What the daemon says of a published volume, and what is wrong with it, a sentence. Raises Unknown, and what the daemon raises.

        Asks the daemon and mountinfo, and never the mount.
        """
        entry = self._state.get(path)
        table = await self.table()
        there = table.at(path)
        if (
            there is None
            or (entry is None and not there.is_manta)
            or (entry is not None and entry.volume not in {"", volume})
        ):
            raise Unknown(f"The volume {volume} is not published at {path}.")
        try:
            mount = await self._daemon.publication(entry.name if entry else publication_name(volume, path))
        except Absent:
            return (
                None,
                "The Manta daemon has lost this volume in a crash, and reads fail: delete the pod, so that it starts anew.",
            )
        if place_of(there) != table.place(mount.source):
            return (
                mount,
                "The volume shows a filesystem whose Manta daemon has ended, and reads fail: delete the pod, so that it starts anew.",
            )
        return mount, mount.errors[-1] if mount.errors else ""


def _check_same(entry: Entry, request: Request) -> None:
    if entry.volume not in {"", request.volume}:
        raise Conflict(f"The target {request.target} shows the volume {entry.volume} already.")
    if entry.attributes is None:
        return
    try:
        asked = attributes.given(request.context)
    except Invalid:
        return  # is refused in a moment, softly
    if (entry.attributes, entry.readonly, entry.access) != (asked, request.readonly, request.access):
        raise Conflict(
            f"The volume {request.volume} is published at {request.target} already, with other arguments: unpublish it first."
        )
