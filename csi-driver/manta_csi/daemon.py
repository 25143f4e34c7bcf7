"""The node's Manta daemon as the driver asks it, here and only here: the control socket's client, in threads, with our own deadlines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from manta.control.client import Client
from manta.control.protocol import Mount, MountRequest, Publication, Status
from manta.errors import Absent, MantaError, NotRunning
from manta_csi.threads import Threads

RESOLVE_S = 60.0
"""For a publish: the daemon asks the hub, for 20 s a question at its default, two of them where the rights are checked too. With the
other steps' deadlines it is well below the kubelet's 2 minutes."""

MEMORY_S = 10.0
"""For what the daemon answers from memory: milliseconds, but on a node that is starting fifty pods."""

UNPUBLISH_S = 0.5
"""For the end of a publication, while a pod waits to be gone: the daemon answers in milliseconds. What did not come through is said again
later, with more patience."""

PROBE_S = 2.0
CALLS_MAX = 48
"""Requests under way. The daemon's control server takes 64 connections, and people need some."""

_Answer = TypeVar("_Answer")


class Daemon:
    """Belongs to one event loop."""

    def __init__(self, control_socket: Path) -> None:
        self._client = Client(control_socket)
        self._threads = Threads("manta-daemon", CALLS_MAX)

    async def publish(self, name: str, request: MountRequest) -> Mount:
        return await self._ask(partial(self._client.publish, name, request, timeout_s=RESOLVE_S), RESOLVE_S)

    async def bound(self, name: str, directory: str) -> Mount:
        return await self._ask(partial(self._client.publication_bound, name, directory, timeout_s=MEMORY_S), MEMORY_S)

    async def unpublish(self, name: str, timeout_s: float = MEMORY_S) -> None:
        """Fine where there is none of that name."""
        with suppress(Absent):
            await self._ask(partial(self._client.unpublish, name, timeout_s=timeout_s), timeout_s)

    async def publication(self, name: str) -> Mount:
        return await self._ask(partial(self._client.publication, name, timeout_s=MEMORY_S), MEMORY_S)

    async def publications(self) -> list[Publication]:
        return await self._ask(partial(self._client.publications, timeout_s=MEMORY_S), MEMORY_S)

    async def status(self) -> Status:
        return await self._ask(partial(self._client.status, timeout_s=MEMORY_S), MEMORY_S)

    async def answers(self) -> bool:
        try:
            await self._ask(partial(self._client.running, timeout_s=PROBE_S), PROBE_S)
        except MantaError:
            return False
        return True

    async def _ask(self, call: Callable[[], _Answer], timeout_s: float) -> _Answer:
        # The client keeps the deadline by itself; a second more for the thread, so that its sentence is the one that is heard.
        try:
            return await self._threads.run(call, timeout_s=timeout_s + 1.0, what="A request to the Manta daemon")
        except NotRunning as error:
            raise NotRunning(
                f"{error.message} It is starting, or it has failed: its own log says why. The kubelet asks again by itself."
            ) from error
