"""What must be put right between mountinfo, the state file and the daemon after crashes, here and only here.

`plan` is pure. The loop runs at the start, then every RECONCILE_S, and every RETRY_S while the daemon is away or has to be told something:
a publication that nobody has is ended; one of which the state file says nothing, and which is mounted, is taken over; an entry whose
target is gone is told to the daemon and dropped; a mount that the daemon does not know is noticed as dead. A target that is there and not
mounted is left to the kubelet, which publishes or unpublishes it: after a reboot, and where we cannot see the mounts of the host.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from manta.control.protocol import Publication
from manta.errors import MantaError
from manta_csi.daemon import MEMORY_S, Daemon
from manta_csi.mounttable import is_gone
from manta_csi.publisher import PREFIX, TABLE_S, Publisher
from manta_csi.refusals import InProgress
from manta_csi.state import Entry, State
from manta_csi.threads import Threads

log = logging.getLogger(__name__)

RECONCILE_S = 60.0
"""Between two looks while nothing is known to be wrong: what it mends is invisible to pods."""

RETRY_S = 2.0
"""Between two looks while the daemon is away, or owes us an answer."""

DEAD_SHOWN_MAX = 1024


@dataclass(frozen=True, slots=True)
class Plan:
    adopt: Sequence[Entry]
    """Mounted, known to the daemon, and not in the state file."""
    end: Sequence[tuple[str, str]]
    """Publications to end: the name and the target."""
    forget: Sequence[str]
    """Targets whose entries are of no use."""
    dead: Sequence[str]
    """Targets whose mount the daemon does not know: reads fail there."""


def plan(
    entries: Iterable[Entry],
    publications: Iterable[Publication],
    *,
    mounted: Container[str],
    gone: Container[str],
    kubelet_dir: str,
) -> Plan:
    """`mounted` are targets with a mount of ours, `gone` those without even a directory. The rest is left to the kubelet."""
    entries = list(entries)
    at_daemon = {publication.name: publication for publication in publications if publication.name.startswith(PREFIX)}
    named = {entry.name for entry in entries}
    adopt: list[Entry] = []
    end: list[tuple[str, str]] = []
    forget: list[str] = []
    dead: list[str] = []
    for entry in entries:
        if entry.target in mounted:
            if entry.name not in at_daemon:
                dead.append(entry.target)
        elif entry.target in gone:
            if entry.name in at_daemon:
                end.append((entry.name, entry.target))
            else:
                forget.append(entry.target)
    targets = {entry.target for entry in entries}
    for name, publication in at_daemon.items():
        if name in named or not publication.directory.startswith(f"{kubelet_dir}/"):
            continue
        if publication.directory in mounted and publication.directory not in targets:
            volume = publication.pod.volume if publication.pod else ""
            adopt.append(Entry(name, volume, publication.directory))
            targets.add(publication.directory)
        else:
            end.append((name, publication.directory))
    return Plan(adopt, end, forget, dead)


class Reconciler:
    """Belongs to the event loop."""

    def __init__(self, publisher: Publisher, daemon: Daemon, state: State, kubelet_dir: str) -> None:
        self._publisher = publisher
        self._daemon = daemon
        self._state = state
        self._kubelet_dir = kubelet_dir
        self._threads = Threads("manta-reconcile", 1)
        self._noticed: set[str] = set()
        self._away = False

    async def run(self) -> None:
        while True:
            self._publisher.owes.clear()
            try:
                settled = await self.once()
            except Exception:
                log.exception("the reconciliation failed; it is tried again")
                settled = False
            if settled:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RECONCILE_S):
                        await self._publisher.owes.wait()
            await asyncio.sleep(RETRY_S)

    async def once(self) -> bool:
        """Whether all is as it should be now."""
        try:
            publications = await self._daemon.publications()
        except MantaError as error:
            if not self._away:
                log.warning(
                    "the Manta daemon does not answer; volumes are published when it does again: %s", error.message
                )
            self._away = True
            return False
        if self._away:
            log.info("the Manta daemon answers again")
            self._away = False
        try:
            todo = await self._plan(publications)
            return await self._carry_out(todo)
        except MantaError as error:
            log.warning("the reconciliation is tried again: %s", error.message)
            return False

    async def _plan(self, publications: Sequence[Publication]) -> Plan:
        table = await self._publisher.table()
        mounted = set(table.ours_below(self._kubelet_dir))
        unmounted = []
        for entry in self._state.entries():
            if table.at(entry.target) is not None:
                mounted.add(entry.target)
            else:
                unmounted.append(entry.target)
        gone = await self._threads.run(
            lambda: {target for target in unmounted if is_gone(target)}, timeout_s=TABLE_S, what="A look at the targets"
        )
        # The entries are read last, with no wait after: whatever was published meanwhile is among them.
        return plan(self._state.entries(), publications, mounted=mounted, gone=gone, kubelet_dir=self._kubelet_dir)

    async def _carry_out(self, todo: Plan) -> bool:
        for entry in todo.adopt:
            if self._state.get(entry.target) is None:
                log.info("%s is taken over from the daemon and mountinfo", entry.target)
                await self._state.put(entry)
        settled = True
        for name, target in todo.end:
            settled &= await self._alone(target, partial(self._end, name, target))
        for target in todo.forget:
            settled &= await self._alone(target, partial(self._forget, target))
        for target in todo.dead:
            if target not in self._noticed and len(self._noticed) < DEAD_SHOWN_MAX:
                log.error(
                    "the volume at %s is dead: its daemon ended and nobody kept its filesystem; its pod must be started anew",
                    target,
                )
        self._noticed = set(todo.dead)
        return settled

    async def _alone(self, target: str, work: Callable[[bool], Awaitable[bool]]) -> bool:
        """Does it, told whether something is mounted on the target by now, and not while a pod's call is at it."""
        try:
            async with self._publisher.alone(target):
                return await work((await self._publisher.table()).at(target) is not None)
        except InProgress:
            return False

    async def _gone(self, target: str) -> bool:
        return await self._threads.run(partial(is_gone, target), timeout_s=TABLE_S, what="A look at a target")

    async def _end(self, name: str, target: str, mounted: bool) -> bool:
        entry = self._state.get(target)
        if entry is not None and entry.name != name:
            entry = None  # another volume's by now
        elif mounted or (entry is not None and not await self._gone(target)):
            return True  # published anew meanwhile
        log.info("the publication %s of %s, which nobody has, is ended", name, target)
        if entry is not None:
            return await self._publisher.tell_end(name, target, MEMORY_S)
        await self._daemon.unpublish(name)
        return True

    async def _forget(self, target: str, mounted: bool) -> bool:
        if not mounted and await self._gone(target):
            await self._state.drop(target)
        return True
