"""The keeper that lives apart: holds one daemon's descriptors for the next one, behind a unix socket. Here and only here.

For daemons that somebody else starts, in containers: keeper and daemon have pid and mount namespaces of their own and share nothing but
the directory of the socket. `keeper.py` is the one that starts the daemon itself. Like that one it is run by path (`python -S -P
manta/keepstore.py --socket PATH`; `manta keeper` does it), knows nothing but the standard library, and is one thread with one loop.

A daemon connects (SOCK_SEQPACKET) and says TAKE=1. Where no other daemon is connected it is answered LISTEN_FDS=N and LISTEN_FDNAMES=A:B,
with the descriptors; from then on it is the daemon, until its connection ends. Otherwise it is answered WAIT=1 at once, and the rest
when the one before is gone: the kernel closes a connection when the process is dead, not before, so that no two serve one descriptor. The
daemon says the lines that it says to any keeper, as sd_notify(3) has them: FDSTORE=1 with FDNAME and one descriptor, FDSTOREREMOVE=1 with
FDNAME, BARRIER=1 with a pipe's end that is closed once all before is done, READY=1, STOPPING=1.

Its end decides what follows:
  after STOPPING=1    what is kept is let go
  otherwise           it is held until another daemon is ready, for `--give-up-after` at most; then readers get ENOTCONN
This process's end harms nobody while a daemon is ready: that one sees its connection end and deposits all again with the next keeper.
Told to end while what it keeps is nowhere else, it stays until a daemon is ready, or has been given up. Told twice it goes.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from contextlib import suppress

FDS_MAX = 16
"""Descriptors kept. A daemon has two."""
MESSAGE_BYTES_MAX, TURN_MESSAGES_MAX = 4096, 64
"""Of one message; of those of one connection that are read before the others are looked at."""
CONNECTIONS_MAX = 16
"""A daemon and its successors, who wait. More are closed at once."""
GIVE_UP_S = 300.0
"""Without a daemon that is ready: as long as kubelet waits at most between two starts of a container that crashes."""
GIVE_UP_S_MAX = 7 * 86400.0
SOCKET_PATH_MAX = 107

_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid: of another pid namespace, the pid is 0
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * FDS_MAX)


class Refused(Exception):
    """The socket cannot be had. Its argument is a sentence."""


class Keepstore:
    """``Keepstore(...).run()`` returns the exit status when it was told to end."""

    def __init__(self, path: str, give_up_after_s: float) -> None:
        """Listens at `path`. Raises Refused, OSError."""
        self._path = path
        self._give_up_after_s = give_up_after_s
        self._kept: dict[str, int] = {}
        self._connections: dict[int, socket.socket] = {}  # by descriptor, in the order of coming
        self._takers: list[int] = []  # those of them that wait for the daemon's end, in the order of coming
        self._daemon = -1  # the one of them that has what is kept
        self._ready = self._stopping = False  # what the daemon said
        self._give_up_at: float | None = None  # while something is kept and no daemon is ready
        self._told = 0  # to end, so many times
        self._poll = select.poll()
        self._listener = _listen(path)
        self._wake, theirs = socket.socketpair()
        self._wake.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._listener, select.POLLIN)

    def run(self) -> int:
        """Returns the exit status, 0."""
        _say("INFO", f"keeps at {self._path} what a daemon deposits")
        try:
            while not self._over():
                wait_s = None if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())
                events = dict(self._poll.poll(None if wait_s is None else wait_s * 1000 + 1))
                if self._wake.fileno() in events:
                    self._hear(len(self._wake.recv(512)))
                # Who ends makes room, before others come.
                for fd in [fd for fd in self._connections if fd in events]:
                    if fd in self._connections:
                        self._read(fd)
                if self._listener.fileno() in events:
                    self._accept()
                if self._give_up_at is not None and time.monotonic() >= self._give_up_at:
                    self._give_up()
            return 0
        finally:
            with suppress(OSError):
                os.unlink(self._path)

    def _over(self) -> bool:
        return self._told > 1 or bool(self._told and (self._ready or not self._kept))

    def _hear(self, times: int) -> None:
        self._told += times
        if self._told == 1 and not self._over():
            _say(
                "WARNING",
                f"told to end, and nobody else has {', '.join(self._kept)}: staying until a daemon is ready. A second signal ends it now,"
                " and what is mounted.",
            )

    # Connections -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            uid = user_of(connection)
            if uid != os.geteuid() or len(self._connections) >= CONNECTIONS_MAX:
                _say("WARNING", f"a connection by user {uid} is refused; {len(self._connections)} are open")
                connection.close()
                return
            connection.setblocking(False)
            self._connections[connection.fileno()] = connection
            self._poll.register(connection, select.POLLIN)

    def _read(self, fd: int) -> None:
        """Does what a connection says."""
        for _ in range(TURN_MESSAGES_MAX):
            try:
                data, ancillary, flags, _ = self._connections[fd].recvmsg(
                    MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it ended without reading all; what it said before comes next
            fds = descriptors_in(ancillary)
            if data and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                said = said_in(data)
                if fd == self._daemon:
                    self._obey(said, fds)
                elif said.get("TAKE") == "1":
                    self._take(fd)
            for left in fds:
                os.close(left)
            if not data:
                self._close(fd)
            if fd not in self._connections:
                return

    def _close(self, fd: int) -> None:
        """A connection has ended, or ends now."""
        self._poll.unregister(fd)
        self._connections.pop(fd).close()
        if fd in self._takers:
            self._takers.remove(fd)
        if fd != self._daemon:
            return
        self._daemon = -1
        if self._stopping:
            self._let_go()
        elif self._kept and self._give_up_at is None:
            self._give_up_at = time.monotonic() + self._give_up_after_s
            _say(
                "WARNING",
                f"the daemon is gone: {', '.join(self._kept)} kept for the next one, {self._give_up_after_s:g} s at most",
            )
        self._ready = self._stopping = False

        if self._takers:
            self._hand_over(self._takers.pop(0))

    def _take(self, fd: int) -> None:
        """A connection wants to be the daemon's."""
        if self._daemon == -1:
            self._hand_over(fd)
        elif fd != self._daemon and fd not in self._takers:
            self._takers.append(fd)
            self._answer(fd, "WAIT=1", [])

    def _hand_over(self, fd: int) -> None:
        self._daemon = fd
        self._answer(
            fd, f"LISTEN_FDS={len(self._kept)}\nLISTEN_FDNAMES={':'.join(self._kept)}", list(self._kept.values())
        )

    def _answer(self, fd: int, message: str, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        try:
            self._connections[fd].sendmsg([message.encode()], rights, socket.MSG_NOSIGNAL)
        except OSError:  # it is gone already, or reads nothing
            self._close(fd)

    # What is kept ----------------------------------------------------------------------------------------------------

    def _obey(self, said: dict[str, str], fds: list[int]) -> None:
        """Does what the daemon says. What is to be kept is taken out of `fds`; the caller closes the rest, and a barrier with it."""
        name = said.get("FDNAME", "stored")
        if said.get("FDSTOREREMOVE") == "1":
            if name in self._kept:
                os.close(self._kept.pop(name))
        elif said.get("FDSTORE") == "1":
            room = name in self._kept or len(self._kept) < FDS_MAX
            # All names go into one message to the next daemon.
            if room and len(fds) == 1 and name.isascii() and name.isprintable() and ":" not in name and len(name) < 100:
                if name in self._kept:
                    os.close(self._kept[name])
                self._kept[name] = fds.pop()
            else:
                _say("WARNING", f"{len(fds)} descriptors named {name!r} are not kept: one at a time, at most {FDS_MAX}")
        if said.get("READY") == "1" and not self._ready:
            self._ready, self._give_up_at = True, None
            _say("INFO", f"a daemon is ready, {', '.join(self._kept) or 'nothing'} kept")
        if said.get("STOPPING") == "1":
            self._stopping = True

    def _let_go(self) -> None:
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()
        self._give_up_at = None

    def _give_up(self) -> None:
        _say(
            "ERROR",
            f"no daemon was ready for {self._give_up_after_s:g} s: {', '.join(self._kept)} let go, and what is mounted ends now",
        )
        self._let_go()
        if self._daemon != -1:
            self._close(self._daemon)  # it has them too, and deposits them again when it is ready after all


# What both sides of a connection read; the daemon's is `manta.operations.remote_keeping` ---------------------------------


def user_of(connection: socket.socket) -> int:
    """The user id of who is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    return int(uid)


def said_in(data: bytes) -> dict[str, str]:
    """The NAME=VALUE lines of a message."""
    return dict(line.split("=", 1) for line in data.decode(errors="replace").split("\n") if "=" in line)


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that came with a message; the caller's now."""
    return [
        fd
        for _level, kind, payload in ancillary
        if kind == socket.SCM_RIGHTS
        for (fd,) in struct.iter_unpack("=i", payload[: len(payload) // 4 * 4])
    ]


def _listen(path: str) -> socket.socket:
    """A socket at `path`, in the place of one that nobody listens at. Raises Refused, OSError."""
    if not os.path.isabs(path) or len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise Refused(
            f"The socket's path {path!r} must be absolute and have {SOCKET_PATH_MAX} bytes at most: choose another."
        )
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Refused(f"{path} is there and is no socket: remove it, or choose another path.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)  # one whose queue is full listens, too
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)  # a killed keeper's
            except BlockingIOError:
                raise Refused(f"Another keeper listens at {path}: end it first.") from None
            else:
                raise Refused(f"Another keeper listens at {path}: end it first.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(CONNECTIONS_MAX)
    return listener


def _say(level: str, sentence: str) -> None:
    """A line of the log, which is what stderr is."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a terminal that was closed
        os.write(2, f"{stamp} {level} keeper: {sentence}\n".encode(errors="backslashreplace"))


def command_line(path: str, give_up_after_s: float = GIVE_UP_S) -> list[str]:
    """The command that becomes a keeper which listens at `path`."""
    script = os.path.abspath(__file__)
    return [sys.executable, "-S", "-P", script, "--socket", path, "--give-up-after", f"{give_up_after_s:g}"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Holds a Manta daemon's descriptors for the next one.")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--give-up-after", type=float, default=GIVE_UP_S)
    options = parser.parse_args()
    try:
        return Keepstore(options.socket, options.give_up_after).run()
    except Refused as refusal:
        _say("ERROR", str(refusal))
    except OSError as error:
        _say("ERROR", f"Nobody can listen at {options.socket}: {error.strerror}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
