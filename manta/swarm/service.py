"""The peer process: takes what the daemon says from its socket, and runs the peer server and the membership. Here and only here.

One asyncio process. It reads the cache's files and writes none; it has the cluster's key from the daemon, and no token of the hub. When the
daemon is gone (end of the socket), so is this process.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol, assert_never

from manta.swarm.limits import Limits
from manta.swarm.questions import Questions
from manta.swarm.server import Server
from manta.wire.channel import Closed
from manta.wire.link import Link, follow_daemon
from manta.wire.messages import Message, Ready
from manta.wire.peering import (
    Call,
    Called,
    Cancelled,
    Follow,
    OwnPauses,
    Reply,
    Settings,
    ToPeerProcess,
    decode_to_peer_process,
)

CALLS_MAX = 256
"""Under way at a time."""

Tell = Callable[[Message], None]


class Membership(Protocol):
    """Who the other nodes are and what they have."""

    async def run(self) -> None: ...

    def follow(self, blobs: list[tuple[str, int]]) -> None: ...

    async def call(self, call: Call, fd: int | None) -> Called: ...

    def set_keys(self, keys: list[bytes]) -> None: ...

    def is_member(self, node: str) -> bool: ...

    def heard(self, node: str, host: str) -> None: ...


MakeMembership = Callable[[Settings, Tell], Membership]


class _Peer:
    def __init__(self, link: Link[ToPeerProcess], settings: Settings, make_membership: MakeMembership) -> None:
        self._link = link
        self._members = make_membership(settings, link.send)
        limits = Limits()
        self._questions = Questions(link.send, limits)
        self._server = Server(settings, self._questions, link.send, self._members, limits)
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def serve(self) -> None:
        """Until the daemon is gone. What fails in the server or the membership ends the process: the daemon starts another."""
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(self._server.run()), group.create_task(self._members.run())]
            try:
                await self._listen(group)
            finally:
                for task in [*running, *self._calls.values()]:
                    task.cancel()

    async def _listen(self, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                message, fd = await self._link.receive()
            except Closed:
                return
            except ValueError:
                _complain("got what is no message, ending")
                return
            if isinstance(message, Call):
                await self._begin(group, message, fd)
            elif isinstance(message, Reply):
                self._questions.reply(message, fd)
            else:
                if fd is not None:
                    os.close(fd)
                self._take(message)

    def _take(self, message: Settings | Follow | OwnPauses | Cancelled) -> None:
        match message:
            case Follow():
                self._members.follow(message.blobs)
            case OwnPauses():
                self._server.set_origins(message.pauses, message.origin_rate)
                self._link.send(Ready(0, os.getpid()))
            case Settings():
                self._server.set_keys(message.keys)
                self._members.set_keys(message.keys)
            case Cancelled():
                if task := self._calls.get(message.order):
                    task.cancel()
            case _:
                assert_never(message)

    async def _begin(self, group: asyncio.TaskGroup, call: Call, fd: int | None) -> None:
        if len(self._calls) >= CALLS_MAX:
            self._link.send(Called(call.order, 0, b"", "has more to ask of members than it may ask at a time"))
            if fd is not None:
                os.close(fd)
            return
        task = group.create_task(self._call(call, fd))
        self._calls[call.order] = task
        task.add_done_callback(partial(self._forget, call.order))
        # Its first step, before anything can cancel it: a task that never began would not close its descriptor.
        await asyncio.sleep(0)

    def _forget(self, order: int, _task: asyncio.Task[None]) -> None:
        self._calls.pop(order, None)

    async def _call(self, call: Call, fd: int | None) -> None:
        try:
            called = await self._members.call(call, fd)
        except asyncio.CancelledError:
            called = Called(call.order, 0, b"", "was cancelled")
        finally:
            if fd is not None:
                os.close(fd)
        try:
            self._link.send(called)
        except ValueError:  # larger than a message may be: no descriptor was there to take it
            self._link.send(Called(call.order, 0, b"", "was answered with more than an answer may hold"))


def _complain(what: str) -> None:
    print(f"manta peer process {os.getpid()}: {what}", file=sys.stderr)


async def _serve(sock: socket.socket, make_membership: MakeMembership) -> None:
    link = Link(sock, decode_to_peer_process)
    link.send(Ready(0, os.getpid()))
    try:
        settings, fd = await link.receive()
    except Closed:
        return
    except ValueError:
        _complain("got what is no message, ending")
        return
    if fd is not None:
        os.close(fd)
    if not isinstance(settings, Settings):
        _complain("got something else before its settings, ending")
        return
    peer = _Peer(link, settings, make_membership)
    # What is loaded by now stays for good: taking it out of the collector's sight spares its passes over it.
    gc.freeze()
    await peer.serve()


def run(fd: int, make_membership: MakeMembership) -> int:
    """Serves until the daemon's end of the socket is closed. The exit code is 0."""
    follow_daemon()
    with socket.socket(fileno=fd) as sock:
        asyncio.run(_serve(sock, make_membership))
    return 0
