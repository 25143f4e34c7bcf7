"""Calls that may block, in threads, each with a deadline, here and only here: the daemon's socket, mount calls, the disk.

A call that does not end in time is left behind in its thread; the place that it takes is free again when it ends. So what hangs in the
kernel costs one of a bounded number of threads, and whoever asks when all are taken is told so. The threads are daemon
threads: the driver can end while one hangs.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from manta.errors import Unavailable

_Result = TypeVar("_Result")


class Threads:
    """Up to `limit` calls at a time. Belongs to one event loop."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._limit = limit
        self._free = asyncio.Semaphore(limit)

    async def run(self, call: Callable[[], _Result], *, timeout_s: float, what: str) -> _Result:
        """What `call` returns or raises. Raises Unavailable after `timeout_s`; `what` is being done, for that sentence."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._free.acquire()
        except TimeoutError as error:
            raise Unavailable(
                f"{what} had to wait for {timeout_s:g} s: {self._limit} earlier calls have not ended. Is the Manta daemon stuck?"
            ) from error
        future: asyncio.Future[_Result] = loop.create_future()

        def end(result: _Result | None, error: BaseException | None) -> None:
            self._free.release()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where the call returns it

        def work() -> None:
            result, error = None, None
            try:
                result = call()
            except BaseException as raised:  # it is raised where it is awaited
                error = raised
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(end, result, error)

        try:
            threading.Thread(target=work, name=self.name, daemon=True).start()
        except RuntimeError as error:
            self._free.release()
            raise Unavailable(f"{what} was not begun: the system has no thread left for it.") from error
        try:
            async with asyncio.timeout_at(deadline):
                return await future
        except TimeoutError as error:
            if future.done() and not future.cancelled() and future.exception() is error:
                raise
            raise Unavailable(f"{what} did not end within {timeout_s:g} s.") from error
