"""Tasks that take turns at reading requests, here and only here.

One task reads and answers. Most requests are answered without waiting, and then the same task reads the next: no task is made or woken for
them. When an answer has to wait, the turn goes to another task at that moment, and not before.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol, TypeVar

import trio

T = TypeVar("T")

SPARE_MAX = 16
"""Tasks kept without work: enough that readers who wait in turn make none anew."""

BATCH = 64
"""Requests that are answered before other tasks get to run: a millisecond or two of lookups."""


class Source(Protocol):
    """Where requests come from, and who answers them."""

    async def next(self) -> bytes | None:
        """One request, without a checkpoint where there is one now; None at the end."""
        ...

    async def answer(self, message: bytes) -> None: ...


class Turns:
    """Runs `source` to its end with at most `tasks_max` requests at once."""

    def __init__(self, source: Source, tasks_max: int) -> None:
        self._source = source
        self._tasks_max = tasks_max
        self._tasks = 0
        self._reading = False
        self._spare: deque[trio.Event] = deque()
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Returns when the source has ended; what is being answered then is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._start()

    def _start(self) -> None:
        self._tasks += 1
        self._reading = True
        self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        while True:
            if not await self._take_turn():
                self._nursery.cancel_scope.cancel()
                return
            # Our turn has gone to another, and our request is answered: wait for the next turn, or leave where enough others do.
            if not self._reading:
                self._reading = True
                continue
            if len(self._spare) >= SPARE_MAX:
                self._tasks -= 1
                return
            turn = trio.Event()
            self._spare.append(turn)
            await turn.wait()

    async def _take_turn(self) -> bool:
        """Answers requests until one has had to wait, and is answered. False at the end."""
        answered = 0
        while True:
            message = await self._source.next()
            if message is None:
                return False
            if await _told_of_waiting(self._source.answer(message), self._pass_turn):
                return True
            answered += 1
            if answered % BATCH == 0:
                await trio.lowlevel.checkpoint()

    def _pass_turn(self) -> None:
        self._reading = False
        if self._spare:
            self._reading = True
            self._spare.popleft().set()
        elif self._tasks < self._tasks_max:
            self._start()
        # Otherwise whoever is done first reads on.


@types.coroutine
def _told_of_waiting(work: Coroutine[Any, Any, object], waits: Callable[[], None]) -> Generator[Any, Any, bool]:
    """Runs `work` in this task; calls `waits` when it waits for the first time. Returns whether it did."""
    try:
        asked = work.send(None)
    except StopIteration:
        return False
    waits()
    while True:
        try:
            try:
                told = yield asked
            except BaseException as e:
                asked = work.throw(e)
            else:
                asked = work.send(told)
        except StopIteration:
            return True
