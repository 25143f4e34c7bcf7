"""One end of the socket between the daemon and a worker: a message with at most one descriptor per datagram.

Defined here and only here, on any non-blocking socket: `manta.worker.service` drives it from asyncio, `manta.fetch.workers` from trio.
"""

from __future__ import annotations

import os
import socket

from manta.wire.messages import MESSAGE_BYTES_MAX

# LEN, not SPACE: its padding would let in a second descriptor, which nobody would close. The kernel closes what does not fit.
_RIGHTS_BYTES = socket.CMSG_LEN(4)


class Closed(Exception):
    """The other end is gone."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends. Both are closed on exec unless passed on by name."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send_nowait(sock: socket.socket, data: bytes, fd: int | None = None) -> None:
    """Raises BlockingIOError when the socket is full, Closed when the other end is gone."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))]
    try:
        sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionError) as e:
        raise Closed from e


def receive_nowait(sock: socket.socket) -> tuple[bytes, int | None]:
    """One datagram and the descriptor that came with it, now the caller's. Raises BlockingIOError, or Closed at the end."""
    try:
        data, rights, _flags, _address = sock.recvmsg(MESSAGE_BYTES_MAX, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError as e:
        raise Closed from e
    fd: int | None = None
    for level, kind, payload in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd = int.from_bytes(payload[:4], "little")
    if not data:
        if fd is not None:
            os.close(fd)
        raise Closed
    return data, fd
