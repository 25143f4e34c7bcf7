"""Which blobs may be given to others at all, here and only here. One asyncio loop.

With a key and `share` all, every blob: who has the key belongs to the cluster. Else only those of public repos: which they are the daemon
knows, who is asked once and remembered. Used by `manta.swarm.server`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from dataclasses import dataclass

from manta.errors import Unavailable
from manta.model.ids import BlobId
from manta.swarm.limits import Limits
from manta.swarm.questions import Crowded, Questions

REMEMBERED_MAX = 4096
YES_SECONDS = 600.0
NO_SECONDS = 5.0
"""A repo is seldom made private, while a blob that was unknown a moment ago may be a public one's now."""


@dataclass(slots=True)
class _Permit:
    allowed: bool
    until: float


class Permits:
    """`all_of_them`: nobody is asked."""

    def __init__(self, questions: Questions, limits: Limits, *, all_of_them: bool) -> None:
        self._questions = questions
        self._limits = limits
        self.all_of_them = all_of_them
        self._known: OrderedDict[BlobId, _Permit] = OrderedDict()
        self._asking: dict[BlobId, asyncio.Task[bool]] = {}

    def known(self, blob: BlobId) -> bool:
        """Whether it is known that `blob` may be given away. Where nothing is known, that is found out for the next time."""
        if self.all_of_them:
            return True
        permit = self._remembered(blob)
        if permit is None:
            with contextlib.suppress(Unavailable):
                self._ask(blob)
        return permit is not None and permit.allowed

    async def allowed(self, blob: BlobId) -> bool:
        """Raises Unavailable where the daemon does not say."""
        if self.all_of_them:
            return True
        permit = self._remembered(blob)
        return permit.allowed if permit is not None else await asyncio.shield(self._ask(blob))

    def reconsider(self, blob: BlobId) -> None:
        """Forgets a no: more is known of `blob` now."""
        if (permit := self._known.get(blob)) is not None and not permit.allowed:
            del self._known[blob]

    def _remembered(self, blob: BlobId) -> _Permit | None:
        permit = self._known.get(blob)
        if permit is None or permit.until < asyncio.get_running_loop().time():
            return None
        self._known.move_to_end(blob)
        return permit

    def _ask(self, blob: BlobId) -> asyncio.Task[bool]:
        """At most as many at a time as there may be questions. Raises Unavailable."""
        task = self._asking.get(blob)
        if task is None:
            if len(self._asking) >= self._limits.questions:
                raise Crowded("This node has too many questions of others to answer; try again.")
            task = self._asking[blob] = asyncio.create_task(self._learn(blob))
            task.add_done_callback(lambda done: self._asked(blob, done))
        return task

    async def _learn(self, blob: BlobId) -> bool:
        answered = await self._questions.ask("", "public", str(blob).encode(), self._limits.permit_s)
        answered.close()
        allowed = answered.status == 200
        until = asyncio.get_running_loop().time() + (YES_SECONDS if allowed else NO_SECONDS)
        self._known[blob] = _Permit(allowed, until)
        self._known.move_to_end(blob)
        if len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return allowed

    def _asked(self, blob: BlobId, task: asyncio.Task[bool]) -> None:
        del self._asking[blob]
        if not task.cancelled():
            task.exception()  # nobody may have waited for it
