"""A child process of the daemon and the socket to it: spawned, spoken to, its complaints logged. Here and only here.

In the daemon's trio thread. Used by `manta.fetch.workers` (the workers) and `manta.fetch.swarm` (the peer process).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import trio

from manta.config import SWARM_KEY_VARIABLE
from manta.telemetry.logs import fields
from manta.wire.channel import Closed, pair, receive_nowait, send_nowait
from manta.wire.messages import Message, encode

log = logging.getLogger(__name__)

SECRETS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", SWARM_KEY_VARIABLE})
"""Variables that no child gets: what it needs of them comes by its socket, and one of them talks to strangers."""

COMPLAINT_BYTES_MAX = 16 * 1024
COMPLAINT_SECONDS = 0.05
"""A traceback is written line by line: what comes within this is one record."""

T = TypeVar("T", bound=Message)


class Channel(Generic[T]):
    """The daemon's end of a child's socket. One task receives; any task sends. `decode` reads what comes."""

    def __init__(self, sock: socket.socket, decode: Callable[[bytes], T]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decode = decode
        self._sending = trio.Lock()

    async def send(self, message: Message, fd: int | None = None) -> None:
        """Waits while the child has too much unread. Raises Closed, and ValueError for a message that is too large."""
        data = encode(message)
        async with self._sending:
            while True:
                try:
                    send_nowait(self._socket, data, fd)
                except BlockingIOError:
                    await self._wait(trio.lowlevel.wait_writable)
                except OSError as e:
                    raise Closed from e
                else:
                    return

    def tell_nowait(self, message: Message) -> None:
        """Tells the child about an order it has, unless it is too busy to be told: then it goes on as before."""
        with contextlib.suppress(BlockingIOError, Closed, OSError):
            send_nowait(self._socket, encode(message))

    async def receive(self) -> T:
        """Raises Closed at the end, ValueError for what is no message."""
        while True:
            try:
                data, fd = receive_nowait(self._socket)
            except BlockingIOError:
                await self._wait(trio.lowlevel.wait_readable)
                continue
            except OSError as e:
                raise Closed from e
            if fd is not None:
                os.close(fd)  # no child sends one
            return self._decode(data)

    async def _wait(self, ready: Callable[[socket.socket], object]) -> None:
        try:
            await ready(self._socket)  # type: ignore[misc]
        except (trio.ClosedResourceError, OSError) as e:
            raise Closed from e

    def close(self) -> None:
        if self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()


def spawn(
    module: str, arguments: Sequence[str], decode: Callable[[bytes], T]
) -> tuple[subprocess.Popen[bytes], Channel[T], trio.lowlevel.FdStream]:
    """Starts ``python -m module ARGUMENTS FD``: the process, the socket to it, and its stderr. Raises OSError.

    Call it in the daemon's own thread: a child's PR_SET_PDEATHSIG fires when the *thread* that started it ends.
    """
    ours, theirs = pair()
    said, stderr = os.pipe()
    with theirs:
        try:
            process = subprocess.Popen(
                # -P: whatever lies in the directory where the daemon was started must not stand in for a module.
                [sys.executable, "-P", "-m", module, *arguments, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={name: value for name, value in os.environ.items() if name not in SECRETS},
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        except OSError:
            ours.close()
            os.close(said)
            raise
        finally:
            os.close(stderr)
    return process, Channel(ours, decode), trio.lowlevel.FdStream(said)


async def pass_on(stderr: trio.lowlevel.FdStream, role: str, pid: int) -> None:
    """What a child writes to its stderr (a library's complaint, a traceback) becomes log records, so that the log has one format."""
    async with stderr as stream:
        while said := await stream.receive_some(COMPLAINT_BYTES_MAX):
            with trio.move_on_after(COMPLAINT_SECONDS):
                while len(said) < COMPLAINT_BYTES_MAX and (more := await stream.receive_some(COMPLAINT_BYTES_MAX)):
                    said += more
            text = said.decode(errors="replace").strip()
            log.warning("a %s worker says: %s", role, text, extra=fields(role=role, worker=pid))


def ending(process: subprocess.Popen[bytes]) -> str:
    """How it ended, for people."""
    code = process.returncode
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
