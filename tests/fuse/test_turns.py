"""manta.fuse.turns: one task reads while answers need no waiting, others take over when one does."""

from __future__ import annotations

from collections import deque

import pytest
import trio
import trio.testing

from manta.fuse.turns import SPARE_MAX, Turns


class Requests:
    """Requests by number; those that are odd wait until they are let go."""

    def __init__(self, count: int) -> None:
        self.waiting: deque[int] = deque(range(count))
        self.gates = {number: trio.Event() for number in range(1, count, 2)}
        self.answered: list[int] = []
        self.tasks: set[trio.lowlevel.Task] = set()
        self.under_way = 0
        self.most = 0
        self.come = trio.Event()
        self.ended = False

    async def next(self) -> bytes | None:
        while not self.waiting:
            if self.ended:
                return None
            await self.come.wait()
            self.come = trio.Event()
        return bytes([self.waiting.popleft()])

    def end(self) -> None:
        self.ended = True
        self.come.set()

    async def answer(self, message: bytes) -> None:
        number = message[0]
        self.tasks.add(trio.lowlevel.current_task())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            if (gate := self.gates.get(number)) is not None:
                await gate.wait()
            self.answered.append(number)
        finally:
            self.under_way -= 1


@pytest.mark.trio
async def test_what_needs_no_waiting_is_answered_by_one_task() -> None:
    requests = Requests(200)
    requests.gates.clear()
    requests.end()
    await Turns(requests, 10).run()
    assert requests.answered == list(range(200))
    assert len(requests.tasks) == 1


@pytest.mark.trio
async def test_one_that_waits_keeps_nobody_else_waiting(autojump_clock: trio.testing.MockClock) -> None:
    requests = Requests(100)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Turns(requests, 1000).run)
        await trio.testing.wait_all_tasks_blocked()
        assert requests.answered == list(range(0, 100, 2))
        assert requests.under_way == 50
        for number in (99, 1, 51):
            requests.gates[number].set()
            await trio.testing.wait_all_tasks_blocked()
        assert requests.answered[50:] == [99, 1, 51]
        for gate in requests.gates.values():
            gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(requests.answered) == list(range(100))
        requests.end()


@pytest.mark.trio
async def test_no_more_than_the_bound_at_once_and_then_it_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    requests = Requests(60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Turns(requests, 5).run)
        await trio.testing.wait_all_tasks_blocked()
        assert requests.under_way == 5
        assert len(requests.waiting) == 50
        for number in range(1, 60, 2):
            requests.gates[number].set()
            await trio.testing.wait_all_tasks_blocked()
        assert sorted(requests.answered) == list(range(60))
        assert requests.most == 5
        requests.end()


@pytest.mark.trio
async def test_tasks_that_are_not_needed_any_more_leave(autojump_clock: trio.testing.MockClock) -> None:
    requests = Requests(200)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Turns(requests, 1000).run)
        await trio.testing.wait_all_tasks_blocked()
        for gate in requests.gates.values():
            gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        (inner,) = next(iter(nursery.child_tasks)).child_nurseries
        assert len(inner.child_tasks) <= SPARE_MAX + 1
        requests.end()


@pytest.mark.trio
async def test_the_end_cancels_what_is_still_being_answered(autojump_clock: trio.testing.MockClock) -> None:
    requests = Requests(2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Turns(requests, 10).run)
        await trio.testing.wait_all_tasks_blocked()
        requests.end()
    assert requests.answered == [0]
    assert requests.under_way == 0


@pytest.mark.trio
async def test_cancelling_one_answer_from_within_goes_through(autojump_clock: trio.testing.MockClock) -> None:
    class Impatient(Requests):
        async def answer(self, message: bytes) -> None:
            with trio.move_on_after(1):
                await super().answer(message)

    requests = Impatient(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Turns(requests, 10).run)
        await trio.sleep(2)
        assert requests.under_way == 0
        assert requests.answered == [0, 2]
        requests.end()
