"""Chunks that the daemon fetches from the origin on behalf of others, here and only here. One asyncio loop.

However many ask for a chunk, the daemon is asked once. Each of them is held for a moment and then told that it is coming, to ask again: a
node that asks with a deadline knows all the time that this one lives. When nobody has asked again for a while, the daemon hears that too.
Used by `manta.swarm.server`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from manta.errors import Unavailable
from manta.model.ids import BlobId
from manta.swarm.limits import Limits
from manta.swarm.protocol import ChunkRequest, Pull
from manta.swarm.questions import Answered, Crowded, Question, Questions
from manta.wire.peering import PullAsked

FAILURES_MAX = 1024

_Chunk = tuple[BlobId, int, int]
_Where = tuple[str, str, str, str]
"""Of a pull: where the origin has the blob. Of two repos that have it, one may be closed to this node."""


@dataclass(slots=True, eq=False)
class _Pull:
    where: _Where
    urgent: bool
    question: Question
    seen: float
    done: asyncio.Future[Answered] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    waiting: int = 0


class Pulls:
    """`sweep` is to be called about once a second."""

    def __init__(self, questions: Questions, limits: Limits) -> None:
        self._questions = questions
        self._limits = limits
        self._pulls: dict[_Chunk, _Pull] = {}
        self._failures: OrderedDict[tuple[_Chunk, _Where], tuple[Answered, float]] = OrderedDict()

    def __len__(self) -> int:
        """Chunks that are being fetched."""
        return len(self._pulls)

    async def wait(self, node: str, asked: ChunkRequest) -> Answered | None:
        """What became of the chunk: status 200 when it is in the cache, else why it cannot be had; None: it is coming.

        Raises Unavailable where too many are being fetched.
        """
        assert asked.pull is not None
        where = _where(asked.pull)
        chunk = (asked.blob, asked.size, asked.chunk)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.hold_s
        while (left := until - loop.time()) > 0:
            if (failure := self._failures.get((chunk, where))) is not None and failure[1] > loop.time():
                return failure[0]
            pull = self._join(node, chunk, where, asked.pull)
            pull.waiting += 1
            try:
                await asyncio.wait({pull.done}, timeout=left)
            finally:
                pull.waiting -= 1
                pull.seen = loop.time()
            if not pull.done.done():
                return None
            answered = pull.done.result()
            if answered.status == 200 or pull.where == where:
                return answered
            # It failed where another asker had said; where this one says, it may be to be had.
        return None

    def sweep(self) -> None:
        """Gives up what nobody waits for any more, and forgets old failures."""
        now = asyncio.get_running_loop().time()
        for chunk, pull in list(self._pulls.items()):
            if not pull.waiting and now - pull.seen > self._limits.abandoned_s:
                del self._pulls[chunk]
                self._questions.drop(pull.question)
        while self._failures and next(iter(self._failures.values()))[1] <= now:
            self._failures.popitem(last=False)

    def _join(self, node: str, chunk: _Chunk, where: _Where, pull: Pull) -> _Pull:
        """The one pull of the chunk that is under way, begun where there is none. Raises Unavailable."""
        current = self._pulls.get(chunk)
        if current is None:
            if len(self._pulls) >= self._limits.pulls:
                raise Crowded("This node fetches as many chunks for others as it may; try again, or ask another.")
            question = self._questions.put(node, "pull", _body(chunk, pull))
            current = _Pull(where, pull.urgent, question, asyncio.get_running_loop().time())
            self._pulls[chunk] = current
            question.answer.add_done_callback(self._ending(chunk, current))
        elif pull.urgent and not current.urgent:
            # A reader waits for it now. Asked anew before the old question is dropped: the fetch goes on.
            with contextlib.suppress(Unavailable):
                question = self._questions.put(node, "pull", _body(chunk, pull))
                dropped, current.question = current.question, question
                current.where, current.urgent = where, True
                question.answer.add_done_callback(self._ending(chunk, current))
                self._questions.drop(dropped)
        return current

    def _ending(self, chunk: _Chunk, pull: _Pull) -> Callable[[asyncio.Future[Answered]], None]:
        def end(answer: asyncio.Future[Answered]) -> None:
            if answer.cancelled() or pull.question.answer is not answer or self._pulls.get(chunk) is not pull:
                return
            answered = answer.result()
            pull.question.taken = True
            answered.close()  # a refusal is short
            del self._pulls[chunk]
            if answered.status != 200:
                until = asyncio.get_running_loop().time() + self._limits.failure_s
                self._failures[chunk, pull.where] = answered, until
                self._failures.move_to_end((chunk, pull.where))
                if len(self._failures) > FAILURES_MAX:
                    self._failures.popitem(last=False)
            pull.done.set_result(answered)

        return end


def _where(pull: Pull) -> _Where:
    return pull.kind, pull.repo, pull.commit, pull.path


def _body(chunk: _Chunk, pull: Pull) -> bytes:
    blob, size, number = chunk
    return msgspec.msgpack.encode(
        PullAsked(str(blob), size, number, pull.kind, pull.repo, pull.commit, pull.path, pull.urgent)
    )
