"""Bytes on their way to another node: by sendfile where the connection is plain, as fast as they are taken and allowed, and not slower than
is tolerable. Here and only here. One asyncio loop; used by `manta.swarm.server`.

The loop's own sendfile says nothing before it is done, so that a slow reader shows only when a deadline for a slice has passed, and each
slice takes the transport apart and puts it together again. Here the socket is written through a descriptor of its own beside the transport,
which has nothing to write meanwhile. What a reader has taken is what its kernel has acknowledged: what is handed to our kernel says little.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable, Coroutine

from aiohttp import ClientConnectionError, web

from manta.swarm.limits import Limits

SLICE_BYTES = 1024 * 1024
"""Handed to the kernel at a time; then others have their turn."""

TLS_SLICE_BYTES = 256 * 1024

BURST_SECONDS = 0.1
"""Of the upload rate: what may go at once after a silence."""


_AT_ONCE = struct.pack("ii", 1, 0)


class TooSlow(ConnectionError):
    """The reader was cut off."""


class Allowance:
    """`rate` bytes per second for all uploads together; 0 is no limit. Pure: the clock is an argument."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free_at = float("-inf")
        self.slice_bytes = SLICE_BYTES if not rate else min(SLICE_BYTES, max(16 * 1024, rate // 16))

    def spend(self, count: int, now: float) -> float:
        """`count` bytes were sent: how many seconds to wait before the next."""
        if not self._rate:
            return 0.0
        self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self._rate
        return max(0.0, self._free_at - now)


class Upload:
    """The body of one answer to `request`, whose head was just prepared. `sent` are the bytes that were handed to the kernel.

    `file` and `memory` raise ConnectionError where the reader is gone (TooSlow: was cut off), and where the file cannot be read or is
    shorter than it was. Then the connection is of no use any more.
    """

    def __init__(self, request: web.BaseRequest, allowance: Allowance, limits: Limits) -> None:
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the connection was closed")
        self.sent = 0
        self._writer = request.writer
        self._transport = transport
        self._connection = transport.get_extra_info("socket")
        self._socket = self._connection.fileno()
        self._tls = transport.get_extra_info("sslcontext") is not None
        self._allowance = allowance
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._writable: asyncio.Future[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._cut = False

    async def file(self, fd: int, start: int, end: int) -> None:
        """Bytes `start`..`end` of the file `fd`."""
        if self._tls:
            await self._send(self._through_tls(lambda at, count: os.pread(fd, count, start + at), end - start))
        else:
            await self._send(self._by_socket(lambda to, at, count: os.sendfile(to, fd, start + at, count), end - start))

    async def memory(self, data: bytes) -> None:
        view = memoryview(data)
        if self._tls:
            await self._send(self._through_tls(lambda at, count: view[at : at + count], len(view)))
        else:
            await self._send(self._by_socket(lambda to, at, count: os.write(to, view[at : at + count]), len(view)))

    async def _send(self, sending: Coroutine[None, None, None]) -> None:
        try:
            await sending
        except (ConnectionError, ClientConnectionError) as error:
            if self._cut:
                raise TooSlow("the reader was too slow") from error
            raise ConnectionResetError("the reader is gone") from error
        except OSError as error:
            raise ConnectionAbortedError("the file cannot be read") from error
        finally:
            if self._watch is not None:
                self._watch.cancel()

    async def _by_socket(self, move: Callable[[int, int, int], int], total: int) -> None:
        """`move` writes to a descriptor, from an offset on, at most so many bytes, and says how many."""
        # Nothing of the head may wait in the transport: what is written beside it would overtake that.
        self._transport.set_write_buffer_limits(0)
        await self._writer.drain()
        to = os.dup(self._socket)
        try:
            while self.sent < total:
                if self._transport.is_closing():
                    raise ConnectionResetError("the connection was closed")
                try:
                    count = move(to, self.sent, min(self._allowance.slice_bytes, total - self.sent))
                except BlockingIOError:
                    self._begin_watch()
                    await self._until_writable(to)
                    continue
                if not count:
                    raise ConnectionAbortedError("the file is shorter than it was")
                self.sent += count
                # Without a pause too: others have their turn.
                await asyncio.sleep(self._allowance.spend(count, self._loop.time()))
        finally:
            os.close(to)

    async def _until_writable(self, fd: int) -> None:
        self._writable = self._loop.create_future()
        self._loop.add_writer(fd, self._writable.set_result, None)
        try:
            await self._writable
        finally:
            self._loop.remove_writer(fd)
            self._writable = None

    async def _through_tls(self, read: Callable[[int, int], bytes | memoryview], total: int) -> None:
        while self.sent < total:
            piece = read(self.sent, min(TLS_SLICE_BYTES, self._allowance.slice_bytes, total - self.sent))
            if not piece:
                raise ConnectionAbortedError("the file is shorter than it was")
            self.sent += len(piece)
            self._begin_watch()
            await self._writer.write(piece)
            await asyncio.sleep(self._allowance.spend(len(piece), self._loop.time()))

    # Slow readers ----------------------------------------------------------------------------------------------------

    def _begin_watch(self) -> None:
        """From the first time on that the reader is waited for: one that takes all at once costs no timer."""
        if self._watch is None:
            self._look_again_after(self.sent, max(0, self._taken()))

    def _look_again_after(self, sent: int, taken: int) -> None:
        self._watch = self._loop.call_later(self._limits.slow_window_s, self._look, sent, taken)

    def _look(self, sent_before: int, taken_before: int) -> None:
        """Of what was sent a window ago, enough must have been taken since; where we sent less than that, all of it."""
        if self._transport.is_closing():
            self._wake()
            return
        taken = self._taken()
        enough = int(self._limits.slow_bytes_per_s * self._limits.slow_window_s)
        if taken >= min(taken_before + enough, sent_before):
            self._look_again_after(self.sent, taken)
            return
        self._cut = True
        # What the kernel has of it goes too: megabytes, which it would keep for such a reader.
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_exception(ConnectionResetError("the connection was closed"))

    def _taken(self) -> int:
        """Bytes that the reader's kernel has; with TLS a little less, for its own bytes."""
        if self._transport.is_closing():
            return 0  # its socket's number may be another's by now
        waiting = int.from_bytes(fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)), "little")
        return self.sent - self._transport.get_write_buffer_size() - waiting
