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

FILE_BYTES_MAX = 256 * 1024 * 1024
"""Of an answer by descriptor: the tree of 250,000 files has about 60 MB."""


class Crowded(Unavailable):
    """As much is under way for others as may be."""


@dataclass(slots=True)
class Answered:
    """What the daemon said: a status as in `manta.swarm.protocol`, and the answer's body, in `file` where that is a descriptor. Who has it
    closes it."""

    status: int
    body: bytes = b""
    file: int | None = None

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None

    @property
    def file_bytes(self) -> int:
        """Bytes in `file`. Raises Unavailable where those are too many, or nobody knows."""
        assert self.file is not None
        try:
            size = os.fstat(self.file).st_size
        except OSError as error:
            raise Unavailable("The answer could not be read on the asked node.") from error
        if size > FILE_BYTES_MAX:
            raise Unavailable("The answer is longer than an answer may be.")
        return size


def refused(status: int, refusal: Refusal) -> Answered:
    return Answered(status, encode(refusal))


class Question:
    """One that was put to the daemon. `answer` is done once it has answered; who takes that says so."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.answer: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()
        self.taken = False


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
        """Nobody waits for the answer any more, or it was taken."""
        if self._open.pop(question.order, None) is not None:
            question.answer.cancel()
            self._tell(Gone(question.order))
        elif not question.taken and not question.answer.cancelled():
            question.answer.result().close()

    async def ask(self, node: str, what: str, body: bytes, deadline_s: float) -> Answered:
        """The caller closes it. Raises Unavailable where no answer comes in time."""
        question = self.put(node, what, body)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.wait({question.answer})
            question.taken = True
            return question.answer.result()
        except TimeoutError:
            raise Unavailable(f"The daemon of this node did not answer within {deadline_s:g} s.") from None
        finally:
            self.drop(question)

    def reply(self, reply: Reply, fd: int | None) -> None:
        """The daemon has answered. `fd`, ours from now on, holds the body where there is one."""
        question = self._open.pop(reply.order, None)
        answered = Answered(reply.status, reply.body, fd)
        if question is None:
            answered.close()
        else:
            question.answer.set_result(answered)
