"""The daemon's side of a keeper that lives apart (`manta/keepstore.py`): found by its socket, and never started. Here and only here.

Neither side knows the other's pid: they may be in containers of their own. Each sees the other's end by the end of their connection. What
is deposited, and how it is found out that it is kept, is as with the other keepers (`keeping`). A keeper that is not there yet, or not any
more, is looked for until it is; then everything is deposited. Used by `manta.daemon`, in the trio thread; `find` before there is one.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from pathlib import Path
from typing import Self

import trio

from manta import keepstore
from manta.errors import InUse, Unavailable
from manta.operations import keeping
from manta.operations.keeping import PROBE, Gone, Keeping

log = logging.getLogger(__name__)

APPEAR_S = 10.0
"""How long a daemon that starts waits for a keeper: where both are started together, it is a matter of which is first."""
HANDOVER_S = 30.0
"""How long it waits for a daemon before it that is still connected. One that was told to end has 10 s."""
RETRY_S = 0.05
PAUSE_S_MAX = 2.0
"""Between looks for the keeper: doubled from RETRY_S. Nobody waits for it, but until it is there a crash ends what is mounted."""


class RemoteKeeping(Keeping):
    """``with RemoteKeeping.find(path) as keeping``, once, before there are threads and children."""

    def __init__(self, path: str, connected: socket.socket | None, inherited: dict[str, int]) -> None:
        super().__init__("store", path, 0, inherited, ())
        self._socket = connected
        self._ready = False
        if connected is None:
            self._missing = self._absence

    @classmethod
    def find(cls, path: Path, *, appear_s: float = APPEAR_S, handover_s: float = HANDOVER_S) -> Self:
        """SLOW: waits for the keeper at `path`, for `appear_s` at most, and goes on without where it does not come; and for the daemon
        before this one to end, for `handover_s`. Raises InUse where it does not."""
        began = time.monotonic()
        pause_s = RETRY_S
        while True:
            try:
                connected = _connected(str(path))
            except (Gone, OSError):
                if time.monotonic() - began >= appear_s:
                    log.warning("nobody keeps at %s: starting without", path)
                    return cls(str(path), None, {})
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                continue
            try:
                inherited = _await_answer(connected, time.monotonic() + handover_s)
            except (Gone, OSError):  # it ended in the middle
                connected.close()
                continue
            if inherited is None:
                connected.close()
                raise InUse(
                    f"The keeper at {path} has another daemon, which did not end within {handover_s:g} s: one at a time takes over what it"
                    " keeps. End that one, and start this one again."
                )
            if inherited:
                log.info("the keeper at %s had %s", path, ", ".join(inherited))
            return cls(str(path), connected, inherited)

    def describe(self) -> str:
        holds = f"holds {', '.join(sorted(self._kept))}" if self._kept else "holds nothing"
        return f"{self._address}, {holds}" if self._socket is not None else f"none at {self._address}, looked for"

    def ready(self) -> None:
        self._ready = True
        super().ready()

    async def deposit(self, name: str, fd: int) -> None:
        """As `Keeping.deposit`; where there is no keeper now, the next one gets it."""
        self._deposits[name] = fd
        if self._socket is None:
            raise Unavailable(self._missing)
        await super().deposit(name, fd)

    async def watch(self) -> None:
        """Looks for another keeper when this one ends. Returns when the daemon is stopping."""
        while True:
            while self._socket is not None and not self._is_gone():
                await trio.lowlevel.wait_readable(self._socket)
            if self._stopping:
                return
            async with self._lock:
                await self._replace_keeper()

    @property
    def _absence(self) -> str:
        return (
            f"No keeper answers at {self._address}: mounts end with the daemon until one does. It is looked for again and again."
            " `manta keeper` is one."
        )

    def _is_gone(self) -> bool:
        """Reads what a keeper says unasked, which is nothing."""
        assert self._socket is not None
        try:
            return not self._socket.recv(keepstore.MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def _replace_keeper(self) -> None:
        if self._socket is not None:
            log.warning("the keeper at %s is gone: looking for another", self._address)
        pause_s = RETRY_S
        while True:
            self._forget()
            try:
                with trio.fail_after(keeping.DEADLINE_S):
                    await self._reach_keeper()
                    for name, fd in self._deposits.items():
                        await self._store(name, fd)
            except (Gone, OSError):
                self._missing = self._absence
            except trio.TooSlowError:
                self._missing = (
                    f"The keeper at {self._address} has another daemon, or hangs: mounts end with this one. It is asked again"
                    " and again."
                )
            except Unavailable as e:
                self._missing = e.message
            else:
                break
            self._forget()
            if self._stopping:
                return
            await trio.sleep(pause_s)
            pause_s = min(PAUSE_S_MAX, pause_s * 2)
        self._missing = ""
        self._refusals.clear()
        if self._ready:
            self._say("READY=1")
        if self._stopping:
            self._say("STOPPING=1")
        log.info("the keeper at %s holds %s", self._address, ", ".join(self._deposits) or "nothing")

    async def _reach_keeper(self) -> None:
        """Raises Gone, OSError. The caller has a deadline."""
        connected = _connected(self._address)
        try:
            while (kept := _answer(connected)) is None:
                await trio.lowlevel.wait_readable(connected)
        except BaseException:
            connected.close()
            raise
        self._socket = connected
        for name, fd in kept.items():  # ours, from before the connection was lost, or of no use: it is not mounted from
            os.close(fd)
            if name not in self._deposits:
                await self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _forget(self) -> None:
        self._kept.clear()
        self._unchanged.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connected(path: str) -> socket.socket:
    """A connection that has asked for what is kept. Raises Gone, OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        connection.connect(path)
        uid = keepstore.user_of(connection)
        if uid not in {0, os.geteuid()}:
            log.error("who listens at %s is user %d, and gets nothing: it must be root or this user", path, uid)
            raise Gone
        connection.send(b"TAKE=1")
    except BaseException:
        connection.close()
        raise
    return connection


def _answer(connection: socket.socket) -> dict[str, int] | None:
    """What the keeper had, by name; None as long as it has not answered. Raises Gone, OSError."""
    try:
        while True:
            # Not socket.recv_fds, which forgets its flags (Python 3.11): children would inherit them.
            data, ancillary, _flags, _address = connection.recvmsg(
                keepstore.MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4 * keepstore.FDS_MAX), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise Gone
            said = keepstore.said_in(data)
            if "LISTEN_FDS" in said:
                break
            log.info("the keeper has another daemon: waiting for its end")
    except BlockingIOError:
        return None
    fds = keepstore.descriptors_in(ancillary)
    names = said.get("LISTEN_FDNAMES", "").split(":")
    kept: dict[str, int] = {}
    for name, fd in zip(names, fds, strict=False):
        if name == PROBE or name in kept:
            os.close(fd)
        else:
            kept[name] = fd
    return kept


def _await_answer(connection: socket.socket, deadline: float) -> dict[str, int] | None:
    """As `_answer`, for those who may wait; None at the deadline."""
    while (kept := _answer(connection)) is None and (left_s := deadline - time.monotonic()) > 0:
        select.select([connection], [], [], left_s)
    return kept
