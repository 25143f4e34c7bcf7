"""The worker's loop: takes orders from the daemon's socket, runs each as a task, answers. Here and only here.

One asyncio process per worker. The daemon bounds the orders in flight, so nothing here queues without a bound; when the daemon is
gone (end of the socket), the worker is too. It knows no paths, no cache layout and no tokens but those of the order at hand.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, assert_never

from manta.wire.channel import Closed
from manta.wire.link import Link, follow_daemon, in_thread
from manta.wire.messages import (
    Cancel,
    Digest,
    Digested,
    Failed,
    Fetch,
    Fetched,
    Locate,
    Located,
    Message,
    Progress,
    Pull,
    Ready,
    ToWorker,
    Verified,
    Verify,
    Watch,
    decode_to_worker,
)
from manta.worker.digester import Digester
from manta.worker.failure import OrderFailed
from manta.worker.verifier import verify

if TYPE_CHECKING:
    from manta.worker.origin import OriginClient
    from manta.worker.peer import PeerClient

_DIGEST_NICENESS = 10  # digests take idle CPU: a reader or a transfer goes first


class _Worker:
    def __init__(self, link: Link[ToWorker], origin: OriginClient | None, peers: PeerClient | None) -> None:
        self._link = link
        self._origin = origin
        self._peers = peers
        self._digester = Digester()
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        self._link.send(Ready(0, os.getpid()))
        while True:
            try:
                order, fd = await self._link.receive()
            except Closed:
                break
            except ValueError:
                # The daemon's own messages are sound, so this is no daemon of this version: it replaces what does not answer.
                print(f"manta worker {os.getpid()}: got what is no message, ending", file=sys.stderr)
                break
            if isinstance(order, Watch):
                if self._origin is not None and self._peers is not None:
                    self._origin.watch(order.order)
                    self._peers.watch(order.order)
                continue
            if isinstance(order, Cancel):
                if task := self._tasks.get(order.order):
                    task.cancel()
                continue
            task = asyncio.create_task(self._run(order, fd))
            self._tasks[order.order] = task
            task.add_done_callback(partial(self._forget, order.order))
            # Its first step, before anything can cancel it: a task that never began would neither answer nor close its descriptor.
            await asyncio.sleep(0)
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._origin is not None:
            self._origin.close()
        if self._peers is not None:
            self._peers.close()

    def _forget(self, number: int, _task: asyncio.Task[None]) -> None:
        self._tasks.pop(number, None)

    async def _run(self, order: Locate | Fetch | Pull | Digest | Verify, fd: int | None) -> None:
        try:
            answer: Message = await self._carry_out(order, fd)
        except asyncio.CancelledError:
            answer = Failed(order.order, "cancelled", "was cancelled")
        except OrderFailed as e:
            answer = Failed(
                order.order,
                e.reason,
                e.message,
                e.status,
                e.retry_after_s,
                e.unreachable,
                e.behind,
                list(e.holders),
                e.origin,
            )
        except Exception as e:
            answer = Failed(order.order, "unavailable", f"failed in the worker: {type(e).__name__}")
        finally:
            if fd is not None:
                os.close(fd)
        try:
            self._link.send(answer)
        except ValueError:  # larger than a message may be: an origin can make its headers so
            self._link.send(Failed(order.order, "unavailable", "was answered with more than an answer may hold"))

    async def _carry_out(
        self, order: Locate | Fetch | Pull | Digest | Verify, fd: int | None
    ) -> Located | Fetched | Digested | Verified:
        match order:
            case Locate():
                return await self._online().locate(order)
            case Fetch():
                assert fd is not None
                return await self._online().fetch(order, fd, partial(self._tell_progress, order.order))
            case Pull():
                assert fd is not None
                return await self._of_swarm().pull(order, fd, partial(self._tell_progress, order.order))
            case Digest():
                assert fd is not None
                return await in_thread(self._digester.advance, order, fd)
            case Verify():
                assert fd is not None
                return await in_thread(verify, order, fd)
            case _:
                assert_never(order)

    def _tell_progress(self, number: int, at: int, upto: int) -> None:
        if not self._link.behind:  # else the next one tells more
            self._link.send(Progress(number, at, upto))

    def _online(self) -> OriginClient:
        if self._origin is None:
            raise OrderFailed("unavailable", "reached a worker that only digests")
        return self._origin

    def _of_swarm(self) -> PeerClient:
        if self._peers is None:
            raise OrderFailed("unavailable", "reached a worker that only digests")
        return self._peers


async def _serve(role: str, sock: socket.socket) -> None:
    origin = peers = None
    if role == "fetch":
        # The digest worker does without their libraries.
        from manta.worker.origin import OriginClient
        from manta.worker.peer import PeerClient

        origin, peers = OriginClient(), PeerClient()
    # What is loaded by now stays for good: taking it out of the collector's sight spares its passes over it.
    gc.freeze()
    await _Worker(Link(sock, decode_to_worker), origin, peers).serve()


def run(role: str, fd: int) -> int:
    """Serves orders until the daemon's end of the socket is closed. The exit code is 0."""
    follow_daemon()
    if role == "digest":
        os.nice(_DIGEST_NICENESS)
    with socket.socket(fileno=fd) as sock:
        asyncio.run(_serve(role, sock))
    return 0
