"""Calls in threads: their results, their deadlines, and what one that hangs costs."""

from __future__ import annotations

import asyncio
import threading

import pytest

from manta.errors import Absent, Unavailable
from manta_csi.threads import Threads


def test_results_and_errors_arrive() -> None:
    def fail() -> None:
        raise Absent("no")

    async def main() -> None:
        threads = Threads("test", 1)
        assert await threads.run(lambda: 7, timeout_s=10, what="x") == 7
        with pytest.raises(Absent):
            await threads.run(fail, timeout_s=10, what="x")
        assert await threads.run(lambda: 8, timeout_s=10, what="x") == 8

    asyncio.run(main())


def test_one_that_hangs_takes_one_place_until_it_ends() -> None:
    async def main() -> None:
        threads, release = Threads("test", 1), threading.Event()
        try:
            with pytest.raises(Unavailable, match=r"The mount did not end within 0\.05 s"):
                await threads.run(lambda: release.wait(30), timeout_s=0.05, what="The mount")
            with pytest.raises(Unavailable, match="earlier calls have not ended"):
                await threads.run(lambda: 1, timeout_s=0.05, what="The mount")
        finally:
            release.set()
        assert await threads.run(lambda: 1, timeout_s=10, what="The mount") == 1

    asyncio.run(main())


def test_a_caller_that_goes_leaves_the_call_alone() -> None:
    async def main() -> None:
        threads, release, ended = Threads("test", 1), threading.Event(), threading.Event()

        def work() -> None:
            release.wait(30)
            ended.set()

        task = asyncio.create_task(threads.run(work, timeout_s=30, what="x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        assert await threads.run(lambda: ended.wait(10), timeout_s=10, what="x")

    asyncio.run(main())
