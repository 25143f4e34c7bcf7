"""What the peer process asks the daemon on behalf of others, and the answers, here and only here. One asyncio loop.

Used by `manta.swarm.server`, `manta.swarm.pulls` and `manta.swarm.permits`; `manta.swarm.service` hands in the replies.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

from manta.errors import Unavailable
from manta.swarm.limits import Limits
from manta.swarm.protocol import Refusal, encode
from manta.wire.messages import Message
from manta.wire.peering import Asked, Gone, Reply

FILE_BYTES_MAX = 64 * 1024 * 1024
"""Of an answer by descriptor: the stored tree of a repo with half a million files."""


class Crowded(Unavailable):
    """As much is under way for others as may be."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What the daemon said: a status as in `manta.swarm.protocol`, and the answer's body."""

    status: int
    body: bytes


def refused(status: int, refusal: Refusal) -> Answered:
    return Answered(status, encode(refusal))


class Question:
    """One that was put to the daemon. `answer` is done once it has answered."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()


class Questions:
    """`tell` reaches the daemon."""

    def __init__(self, tell: Callable[[Message], None], limits: Limits) -> None:
        self._tell = tell
        self._limits = limits
        self._numbers = itertools.count(1)
        self._open: dict[int, Question] = {}

    def put(self, node: str, what: str, body: bytes) -> Question:
        """Asks; who asked calls `drop` when it is not interested any more. Raises Unavailable, Crowded where too much
        is unanswered."""
        if len(self._open) >= self._limits.questions:
            raise Crowded("This node has too many questions of others to answer; try again.")
        question = Question(next(self._numbers))
        try:
            self._tell(Asked(question.order, node, what, body))
        except ValueError as error:
            raise Unavailable("The question is too long.") from error
        self._open[question.order] = question
        return question

    def drop(self, question: Question) -> None:
        """Nobody waits for the answer any more. Nothing happens where it has come."""
        if self._open.pop(question.order, None) is not None:
            question.answer.cancel()
            self._tell(Gone(question.order))

    async def ask(self, node: str, what: str, body: bytes, deadline_s: float) -> Answered:
        """Raises Unavailable where no answer comes in time."""
        question = self.put(node, what, body)
        try:
            async with asyncio.timeout(deadline_s):
                return await question.answer
        except TimeoutError:
            raise Unavailable(f"The daemon of this node did not answer within {deadline_s:g} s.") from None
        finally:
            self.drop(question)

    def reply(self, reply: Reply, fd: int | None) -> None:
        """The daemon has answered. `fd` holds the body where there is one; it is not closed here."""
        question = self._open.pop(reply.order, None)
        if question is not None and not question.answer.done():
            question.answer.set_result(_answered(reply, fd))


def _answered(reply: Reply, fd: int | None) -> Answered:
    if fd is None:
        return Answered(reply.status, reply.body)
    try:
        size = os.fstat(fd).st_size
        body = os.pread(fd, size, 0) if size <= FILE_BYTES_MAX else b""
    except OSError:
        size, body = -1, b""
    if len(body) != size:
        return refused(502, Refusal(reason="unavailable", message="The answer could not be read on the asked node."))
    return Answered(reply.status, body)
