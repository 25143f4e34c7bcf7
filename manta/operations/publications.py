"""Mounts by a name that their caller gives them: the same however often, and after whatever crash, it is asked for. Here and only here.

For volumes of pods: the CSI driver is told to publish one again and again, and may have been killed in between. Each time the hub is asked
whether the pod's token may still read what is mounted, and the pod's present token is taken over. The names are the mounts' (`Mounts`),
which bring them over a restart. In the daemon's trio thread.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import msgspec
import trio

from manta.control.protocol import PUBLICATION_CHARACTERS_MAX, MountRequest, Publication
from manta.errors import Absent, Conflict, Denied, InUse, Invalid, Unavailable
from manta.hub.identity import Identity
from manta.hub.origin import Access
from manta.operations.mounts import Mounted, Mounts

PUBLICATIONS_MAX = 2048
"""A node runs 110 pods by default, 250 to 500 where it is told to; a pod has one or a few models. A model's trees are in memory once."""

_NAME = re.compile(rf"[A-Za-z0-9._-]{{1,{PUBLICATION_CHARACTERS_MAX}}}")

_COMPARED = ("target", "directory", "view", "prefetch", "pin", "pod")
"""What makes it another request. Who asks is not among it: tokens are renewed."""


class Publications:
    """`pin` keeps what a mount shows in the cache for good; `forget` hears of what a mount was read by until now."""

    def __init__(
        self,
        mounts: Mounts,
        identity: Identity,
        pin: Callable[[Mounted], Awaitable[None]],
        forget: Callable[[Access], None],
    ) -> None:
        self._mounts = mounts
        self._identity = identity
        self._pin = pin
        self._forget = forget
        self._turns: dict[str, tuple[trio.Lock, int]] = {}  # and how many hold it or wait for it

    def __getitem__(self, name: str) -> Mounted:
        if name not in self._mounts.published:
            raise Absent(f"There is no publication {name!r}; GET /v1/publications lists them.")
        return self._mounts.published[name]

    def __iter__(self) -> Iterator[Publication]:
        for name, mounted in self._mounts.published.items():
            yield Publication(name, mounted.id, mounted.directory, mounted.request.pod)

    async def publish(self, name: str, request: MountRequest) -> Mounted:
        """The mount of that name: made, or the same as before.

        Raises what the hub says of the right to it; Conflict where the name is another mount's; InUse where there are too many; Invalid;
        Denied without root; NoSpace and CacheBroken where it cannot be pinned.
        """
        if not _NAME.fullmatch(name):
            raise Invalid(
                f"{name[:PUBLICATION_CHARACTERS_MAX]!r} cannot name a publication: 1 to {PUBLICATION_CHARACTERS_MAX} letters, digits,"
                " dots, dashes and underscores can."
            )
        if self._mounts.direct:
            raise Denied("A daemon without root makes no volumes for pods, since they are bind mounts: run it as root.")
        access = self._identity.of_pod(request.token, anonymous=request.anonymous)
        async with self._turn(name):
            if (mounted := self._mounts.published.get(name)) is not None:
                await self._again(mounted, request, access)
                return mounted
            return await self._first(name, request, access)

    async def _first(self, name: str, request: MountRequest, access: Access) -> Mounted:
        # Those under way may pass it, by as many as the control API serves at a time.
        if len(self._mounts.published) >= PUBLICATIONS_MAX:
            raise InUse(f"This node has {PUBLICATIONS_MAX} volumes published already: unpublish one first.")
        mounted = await self._mounts.create(request, access, name)
        await self._mounts.pin(mounted, self._pin)
        return mounted

    async def _again(self, mounted: Mounted, request: MountRequest, access: Access) -> None:
        if differs := [field for field in _COMPARED if getattr(request, field) != getattr(mounted.request, field)]:
            was = ", ".join(f"{field} {_shown(getattr(mounted.request, field))}" for field in differs)
            now = ", ".join(f"{field} {_shown(getattr(request, field))}" for field in differs)
            raise Conflict(
                f"The volume is published already with {was}, and was asked for with {now}: unpublish it first, or ask for it by another"
                " name."
            )
        # Whatever the hub says of it: it is what the pod has now, and the one from before may be somebody else's by now.
        if access != mounted.scope.asking:
            self._forget(mounted.scope.access)
        self._mounts.take_over(mounted, access, anonymous=request.anonymous)
        await self._mounts.authorise(mounted)
        if self._mounts.published.get(mounted.publication) is not mounted:
            raise Unavailable("The volume was unpublished while it was published anew: publish it again.")

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """One at a time of the same name."""
        lock, users = self._turns.get(name, (trio.Lock(), 0))
        self._turns[name] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._turns.pop(name)
            if users > 1:
                self._turns[name] = lock, users - 1


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
