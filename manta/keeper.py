"""The keeper: holds the daemon's descriptors, so that mounts outlive it, and starts the next daemon with them. Here and only here.

It is run by path (`python -S -P manta/keeper.py`) and knows nothing but the standard library: what it does must not change, or fail,
with anything else of Manta. One process, one thread, one loop. The daemon is its child; or, where a keeper was killed, its parent, which
started this one to be adopted (`--adopt`). Killing the keeper harms nobody: the daemon goes on and starts another.

It speaks systemd's protocol (sd_notify(3), sd_listen_fds(3)), so that systemd can be the keeper in its place. The daemon sends datagrams
of NAME=VALUE lines to $NOTIFY_SOCKET: FDSTORE=1 with FDNAME and one descriptor has it kept, in the place of one of that name;
FDSTOREREMOVE=1 with FDNAME lets go of it; BARRIER=1 comes with a pipe's end, which is closed once all before is done; READY=1 and
STOPPING=1. The rest is ignored. The next daemon finds what is kept from descriptor 3 on, named by LISTEN_FDNAMES.

How the daemon ends decides what follows:
  status 0, or after STOPPING=1, or after a signal that came through here    the keeper leaves, with its status
  before any daemon was ready                                               the keeper leaves, with its status
  status 75 (RESTART)                                                       the next daemon is started at once
  otherwise, with descriptors kept                                          the next one is started, after a pause that grows
  otherwise, with nothing kept                                              the keeper leaves, with its status
It gives up after CRASHES_MAX ends in CRASHES_S, or when no daemon was ready for `--give-up-after`: it leaves, which closes what it kept,
and readers get ENOTCONN instead of waiting. Of a daemon that it adopted it cannot know the status: without STOPPING=1 that is a crash.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

RESTART = 75
"""The status of a daemon that wants to be followed by another: sysexits' EX_TEMPFAIL, which nothing else in Manta uses."""
FDS_MAX = 16
"""Descriptors kept. A daemon has two."""
MESSAGE_BYTES_MAX, TURN_MESSAGES_MAX = 4096, 64
"""Of one message; of those that are read before signals and the daemon's end are looked at again."""
GIVE_UP_S = 60.0
"""Without a daemon that is ready: no start is tried after this. A start takes a second, and may take half of this."""
CRASHES_MAX, CRASHES_S = 24, 90.0
"""Where each daemon fails at once, the pauses below make that one minute. One that lives for four seconds each time goes on for ever."""
STEADY_S, PAUSE_S, PAUSE_S_MAX = 3.0, 0.1, 2.0
"""A daemon that was ready for so long is followed at once when it crashes; with each shorter life in a row the pause doubles."""
END_S, HURRY_S = 12.0, 2.0
"""For a daemon that was told to end, whose own bound is 10 s (operations/watchdog.py); that was told twice, or killed. A killed one that
is still there hangs in the kernel, maybe on what is kept here."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid
_ANCILLARY_BYTES = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * FDS_MAX)


def command_line(runtime: str, command: Sequence[str], *options: str) -> list[str]:
    """The command that becomes a keeper for `command`. `runtime` is the directory of its socket, which nobody else may enter. Options:

    `--ready-fd N`: an inheritable descriptor, for the first daemon and no later one, to which it is announced with the same option.
    `--adopt PID`: the daemon runs already, and is the caller. `--give-up-after S`: instead of GIVE_UP_S.
    """
    return [sys.executable, "-S", "-P", os.path.abspath(__file__), "--runtime", runtime, *options, "--", *command]


def socket_path(runtime: str, keeper: int) -> str:
    """Where the keeper with that pid listens. A name of its own: the keeper of a second daemon, which is refused, must not take it away
    from the first's. It is no longer than control.sock's, whose length was checked."""
    return f"{runtime}/keep.{keeper}"


def is_there(runtime: str) -> bool:
    """Whether a keeper listens there: then a daemon runs, or is about to."""
    return any(lives for _, lives in _sockets(runtime))


def _sockets(runtime: str) -> list[tuple[str, bool]]:
    """The sockets of keepers in `runtime`, each with whether somebody listens."""
    found = []
    for name in os.listdir(runtime):
        if name.startswith("keep."):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                found.append((f"{runtime}/{name}", probe.connect_ex(f"{runtime}/{name}") == 0))
    return found


class _Leave(Exception):
    """The keeper's end. Its arguments are the exit status and, where a person should know, the reason."""


class Keeper:
    """``Keeper(...).run(...)`` returns the exit status when there is nothing more to keep."""

    def __init__(self, runtime: str, command: Sequence[str], give_up_after_s: float) -> None:
        self._command = list(command)
        self._give_up_after_s = give_up_after_s
        self._kept: dict[str, int] = {}
        self._pid, self._pidfd = 0, -1  # the daemon's; no pidfd during a pause
        self._status: int | None = None  # as waitpid has it; None while it lives, and for one that was adopted
        self._ready_at: float | None = None
        self._stopping = self._killed = False
        self._kill_at: float | None = None
        self._ever_ready = self._told = False  # told: to end, by a signal
        self._short_lives = 0
        self._crashes: deque[float] = deque(maxlen=CRASHES_MAX)
        self._unready_since = 0.0
        self._poll = select.poll()
        self._wake, theirs = socket.socketpair()
        self._wake.setblocking(False)
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *FORWARDED):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # a daemon that starts its keeper has them blocked
        for path in [path for path, lives in _sockets(runtime) if not lives]:
            with suppress(OSError):
                os.unlink(path)  # a killed keeper's
        self._path = socket_path(runtime, os.getpid())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        mask = os.umask(0o177)
        self._socket.bind(self._path)
        os.umask(mask)
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)

    def run(self, ready_fd: int | None, adopt: int | None) -> int:
        """Returns the exit status. `ready_fd`, `adopt`: see `command_line`."""
        try:
            if adopt is None:
                self._start(ready_fd)
                if ready_fd is not None:
                    os.close(ready_fd)  # or nobody would see that the daemon ended without a word
            else:
                self._adopt(adopt)
            while True:
                status = self._until_ended()
                resume_at = time.monotonic() + self._pause_after(status)
                while not self._told and time.monotonic() < resume_at:
                    self._turn(resume_at)
                if self._told:
                    raise _Leave(status or 1, "told to end while no daemon ran: `manta umount` removes what it mounted")
                self._start(None)
        except _Leave as leave:
            code, why = leave.args
            if why:
                _say("ERROR", why)
            return int(code)
        finally:
            with suppress(OSError):
                os.unlink(self._path)

    # The daemon ------------------------------------------------------------------------------------------------------

    def _start(self, ready_fd: int | None) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # what comes for the child before its exec must not be lost
        pid = os.fork()
        if pid == 0:
            self._become_daemon(ready_fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        self._watch(pid)
        if self._ever_ready:  # somebody waits
            self._kill_at = time.monotonic() + self._give_up_after_s / 2

    def _become_daemon(self, ready_fd: int | None) -> NoReturn:
        """In the child: a session of its own, the kept descriptors from 3 on, no others but `ready_fd`."""
        try:
            os.setsid()
            for number in FORWARDED:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            after = 3 + len(self._kept)
            for at, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, after) for fd in self._kept.values()], 3):
                os.dup2(fd, at)
            spared = after if ready_fd is None else ready_fd  # with `ready_fd` nothing is kept yet
            os.closerange(after, spared)
            os.closerange(spared + (ready_fd is not None), os.sysconf("SC_OPEN_MAX"))
            os.environ.update(NOTIFY_SOCKET=self._path, MANTA_KEEPER_PID=str(os.getppid()))
            if self._kept:
                names = ":".join(self._kept)
                os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(self._kept)), LISTEN_FDNAMES=names)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
            command = self._command if ready_fd is None else [*self._command, "--ready-fd", str(ready_fd)]
            os.execvp(command[0], command)
        except BaseException as error:
            _say("ERROR", f"{self._command[0]} cannot be started: {error}")
        finally:
            os._exit(127)

    def _adopt(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            self._watch(pid)
        if os.getppid() != pid or self._pidfd == -1:
            raise _Leave(1, f"the daemon (pid {pid}) ended before a new keeper had anything of it: leaving")
        self._ever_ready, self._ready_at = True, time.monotonic()

    def _watch(self, pid: int) -> None:
        """Raises ProcessLookupError."""
        self._pid, self._pidfd = pid, os.pidfd_open(pid)
        self._status = self._ready_at = self._kill_at = None
        self._stopping = self._killed = False
        self._poll.register(self._pidfd, select.POLLIN)

    def _until_ended(self) -> int | None:
        """The status with which the daemon ended, 128 and the signal where one killed it; None where it cannot be known."""
        while not self._turn(self._kill_at):
            if self._kill_at is None or time.monotonic() < self._kill_at:
                continue
            if self._killed:
                raise _Leave(
                    1, f"the daemon (pid {self._pid}) hangs in the kernel and cannot be killed: its mounts end"
                )
            late = "end" if self._told else "become ready"
            _say("ERROR", f"the daemon (pid {self._pid}) did not {late} in time: it is killed")
            self._send(signal.SIGKILL)
            self._killed, self._kill_at = True, time.monotonic() + HURRY_S
        self._receive_some()  # what it said last
        self._reap()
        self._poll.unregister(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        code = None if self._status is None else os.waitstatus_to_exitcode(self._status)
        return 128 - code if code is not None and code < 0 else code

    def _pause_after(self, status: int | None) -> float:
        """Seconds until the next daemon. Raises _Leave where there shall be none."""
        now = time.monotonic()
        asked = status == RESTART
        if self._told or not self._ever_ready or status == 0 or (self._stopping and not asked):
            raise _Leave(status or 0, "")
        ended = f"the daemon (pid {self._pid}) ended" + ("" if status is None else f" with status {status}")
        if not self._kept and not asked:
            raise _Leave(status or 1, f"{ended} and left nothing to keep: leaving")
        lived_s = 0.0 if self._ready_at is None else now - self._ready_at
        self._short_lives = 0 if asked or lived_s >= STEADY_S else self._short_lives + 1
        if self._ready_at is not None:
            self._unready_since = now
        self._crashes.append(now)
        since = now - self._crashes[0]
        if len(self._crashes) == CRASHES_MAX and since < CRASHES_S:
            raise _Leave(status or 1, f"{ended}, the {CRASHES_MAX}th in {since:.0f} s: giving up, its mounts end now")
        if (unready_s := now - self._unready_since) >= self._give_up_after_s:
            raise _Leave(status or 1, f"{ended}; none was ready for {unready_s:.0f} s: giving up, its mounts end now")
        pause_s = min(PAUSE_S_MAX, PAUSE_S * 2 ** (self._short_lives - 1)) if self._short_lives else 0.0
        _say(
            "INFO" if asked else "WARNING",
            f"{ended}: the next one starts in {pause_s:g} s and gets {', '.join(self._kept) or 'nothing'}",
        )
        return pause_s

    # What comes in ---------------------------------------------------------------------------------------------------

    def _turn(self, until: float | None) -> bool:
        """Waits for what comes, at most until then, and does it. Whether the daemon has ended."""
        events = dict(self._poll.poll(None if until is None else max(0.0, until - time.monotonic()) * 1000))
        if self._wake.fileno() in events:
            for number in self._wake.recv(512):
                self._signalled(number)
        self._receive_some()
        return self._pidfd in events

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
            return
        kill_at = time.monotonic() + (HURRY_S if self._told else END_S)
        self._told, self._kill_at = True, kill_at if self._kill_at is None else min(kill_at, self._kill_at)
        self._send(number)

    def _send(self, number: int) -> None:
        if self._pidfd != -1:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        """Also those that are not ours: as process 1 of a container the keeper inherits them."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._pid:
                    self._status = ended[1]

    def _receive_some(self) -> None:
        for _ in range(TURN_MESSAGES_MAX):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MESSAGE_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            sender, fds = (0, 0, 0), []
            for _level, kind, payload in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    sender = _CREDENTIALS.unpack(payload)
                elif kind == socket.SCM_RIGHTS:
                    fds = [fd for (fd,) in struct.iter_unpack("=i", payload[: len(payload) // 4 * 4])]
            if sender[:2] == (self._pid, os.geteuid()) and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._obey(data, fds)
            for fd in fds:
                os.close(fd)

    def _obey(self, data: bytes, fds: list[int]) -> None:
        """Does what the daemon says. What is to be kept is taken out of `fds`; the caller closes the rest, and a barrier with it."""
        said = dict(line.split("=", 1) for line in data.decode(errors="replace").split("\n") if "=" in line)
        name = said.get("FDNAME", "stored")
        if said.get("FDSTOREREMOVE") == "1":
            if name in self._kept:
                os.close(self._kept.pop(name))
        elif said.get("FDSTORE") == "1":
            room = name in self._kept or len(self._kept) < FDS_MAX
            if room and len(fds) == 1 and name.isascii() and name.isprintable() and ":" not in name and len(name) < 256:
                if name in self._kept:
                    os.close(self._kept[name])
                self._kept[name] = fds.pop()
            else:
                _say("WARNING", f"{len(fds)} descriptors named {name!r} are not kept: one at a time, at most {FDS_MAX}")
        if said.get("READY") == "1" and self._ready_at is None:
            self._ever_ready, self._ready_at = True, time.monotonic()
            if not self._told and not self._killed:
                self._kill_at = None
        if said.get("STOPPING") == "1":
            self._stopping = True


def _say(level: str, sentence: str) -> None:
    """A line of the daemon's log, which is what stderr is."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):  # a terminal that was closed
        os.write(2, f"{stamp} {level} keeper: {sentence}\n".encode(errors="backslashreplace"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Holds the Manta daemon's descriptors and starts the next one.")
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--adopt", type=int)
    parser.add_argument("--give-up-after", type=float, default=GIVE_UP_S)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    return Keeper(options.runtime, options.command, options.give_up_after).run(options.ready_fd, options.adopt)


if __name__ == "__main__":
    sys.exit(main())
