"""A child process's end of the socket to the daemon, on asyncio, and how such a process begins and works in threads. Here and only here.

Used by `manta.worker.service` and `manta.swarm.service`. The daemon's end is in trio: `manta.fetch.workers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from manta.wire.channel import Closed, receive_nowait, send_nowait
from manta.wire.messages import Message, encode

UNSENT_BYTES_MAX = 64 * 1024 * 1024
"""What waits while the daemon is slow to read: answers are one per order, news are not. A daemon that leaves more unread is stuck."""

_PR_SET_PDEATHSIG = 1

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")


class Link(Generic[M]):
    """`decode` reads what the daemon says; it raises ValueError for what is no message. One task receives; any sends."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], M]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decode = decode
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0

    async def receive(self) -> tuple[M, int | None]:
        """The next message and the descriptor that came with it, now the caller's. Raises Closed at the end, ValueError for no message."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data, fd = receive_nowait(self._socket)
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(self._socket, readable.set_result, None)
                try:
                    await readable
                finally:
                    loop.remove_reader(self._socket)
                continue
            try:
                return self._decode(data), fd
            except ValueError:
                if fd is not None:
                    os.close(fd)
                raise

    @property
    def behind(self) -> bool:
        """The daemon has not read all that was sent."""
        return bool(self._unsent)

    def send(self, message: Message) -> None:
        """Never waits. Raises ValueError for a message that is too large. `receive` sees the end where the daemon is stuck."""
        data = encode(message)
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if self._unsent_bytes > UNSENT_BYTES_MAX:
            self._drop()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                send_nowait(self._socket, self._unsent[0])
            except BlockingIOError:
                loop.add_writer(self._socket, self._flush)
                return
            except Closed:
                self._drop()  # the receiving side sees the end and stops the process
                break
            self._unsent_bytes -= len(self._unsent.popleft())
        loop.remove_writer(self._socket)

    def _drop(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0


def follow_daemon() -> None:
    """To be called first: this process ends when the daemon does and says so, not by the daemon's signals and not by a person's."""
    # Ctrl-C goes to the whole process group in the foreground; the daemon decides when its children stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The daemon takes its signals in a thread and blocks them elsewhere, which its children inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with contextlib.suppress(OSError):
        # A process that hangs in a system call when the daemon dies would not see the socket's end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def in_thread(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`work` in a thread, to its end: for work on a descriptor, which the caller closes afterwards."""
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        # The thread cannot be stopped, and must not read from a descriptor that is another file's by then.
        await asyncio.wait([working])
        raise
