"""The daemon's side of being kept: descriptors go to whoever started it, and come to the next daemon. Here and only here.

The keeper is Manta's own (`manta/keeper.py`) or systemd (FileDescriptorStoreMax); both speak sd_notify(3), which answers nothing. So
whether a descriptor is kept is found out: one end of a pipe is deposited first, and whether the other end sees it closed tells whether
there was room. A barrier (a descriptor that comes back, closed, when all before it is done) tells when.

When Manta's keeper dies, `watch` starts another and deposits everything again. Used by `manta.daemon`, in the trio thread.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import Literal, Self

import trio

from manta import keeper
from manta.errors import Unavailable

log = logging.getLogger(__name__)

DEADLINE_S = 5.0
"""For the keeper to do what it was told: it takes a millisecond. Readers do not wait for this."""

RETRY_S = 0.05
PAUSE_S_MAX = 30.0
"""Between attempts to start a keeper: doubled from RETRY_S. Mounts work without; they only would not outlive this daemon."""

PROBE = "probe"
"""The name of the pipe's end."""

Kind = Literal["keeper", "systemd", "store", "none"]
"""store: a keeper that lives apart, see `remote_keeping`."""


class Gone(Exception):
    """The keeper is not there. Caught here and in `remote_keeping`."""


class Keeping:
    """``with Keeping.from_environment() as keeping``, once, before there are threads and children.

    Deposited descriptors stay the caller's, who keeps them open until it removes them: a new keeper gets them again.
    """

    def __init__(
        self, kind: Kind, address: str, keeper_pid: int, inherited: dict[str, int], command: Sequence[str]
    ) -> None:
        self.kind = kind
        self.inherited = inherited
        """What the daemon before left, by name: descriptors that are the caller's now, and kept as before."""
        self._address = address
        self._keeper_pid = keeper_pid
        self._command = command
        self._pidfd = -1
        self._spawned = False
        """Whether the keeper is a child of ours, and not our parent."""
        self._socket: socket.socket | None = None
        self._deposits = dict(inherited)
        self._kept = set(inherited)
        self._unchanged = dict(inherited)
        """Of `inherited`, what is still kept as it came."""
        self._refusals: dict[str, str] = {}
        self._missing = ""
        self._stopping = False
        self._lock = trio.Lock()
        if kind in {"none", "store"}:
            return
        with suppress(OSError):
            self._connect(address)
        if kind == "keeper":
            with suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(keeper_pid)
            if self._pidfd != -1 and os.getppid() != keeper_pid:  # it died at once, and this is who has its pid now
                os.close(self._pidfd)
                self._pidfd = -1

    @classmethod
    def from_environment(
        cls, environ: MutableMapping[str, str] = os.environ, command: Sequence[str] | None = None
    ) -> Keeping:
        """What the variables of the protocol say. They are removed: they are not for workers.

        `command` is what a new keeper starts when this daemon is gone: the one that this process was started with.
        """
        address, pid, of, count, names = (
            environ.pop(name, "")
            for name in ("NOTIFY_SOCKET", "MANTA_KEEPER_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        environ.pop("FDSTORE", None)  # how much systemd keeps; since version 254 only
        inherited: dict[str, int] = {}
        if of == str(os.getpid()) and count.isdecimal():
            for fd, name in zip(range(3, 3 + int(count)), names.split(":"), strict=False):
                os.set_inheritable(fd, False)
                if name == PROBE or name in inherited:
                    os.close(fd)
                else:
                    inherited[name] = fd
        kind: Kind = "none"
        if address.startswith(("/", "@")):
            kind = "keeper" if pid.isdecimal() else "systemd"
        return cls(kind, address, int(pid) if pid.isdecimal() else 0, inherited, command or _own_command())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the keeper, which goes on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._pidfd != -1:
            os.close(self._pidfd)
            self._pidfd = -1

    # What the daemon says --------------------------------------------------------------------------------------------

    @property
    def kept(self) -> frozenset[str]:
        """The names of what the keeper is known to hold."""
        return frozenset(self._kept)

    @property
    def problem(self) -> str | None:
        """What is wrong with being kept now, and what to do: a sentence for the status."""
        return self._missing or next(iter(self._refusals.values()), None)

    def describe(self) -> str:
        """Who keeps what, for the status."""
        holds = f"holds {', '.join(sorted(self._kept))}" if self._kept else "holds nothing"
        match self.kind:
            case "none":
                return "none: mounts end with the daemon"
            case "systemd":
                return f"systemd, {holds}"
            case _:
                return (
                    f"pid {self._keeper_pid}, {holds}" if self._socket is not None else "gone, another is being started"
                )

    def ready(self) -> None:
        """The daemon serves. A keeper that starts it in the place of another waits half a minute for this."""
        self._say("READY=1")

    def stopping(self) -> None:
        """The daemon ends for good: nobody shall be started in its place, whatever its exit status, or inherit what it unmounts."""
        self._stopping = True
        for name in self._kept:
            self._say(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._kept.clear()
        self._say("STOPPING=1")

    async def deposit(self, name: str, fd: int) -> None:
        """Has the keeper hold `fd`, in the place of what it holds by that name. Returns when it does.

        Raises Unavailable where it does not within DEADLINE_S, or has no room: then the mounts do not outlive the daemon, and `problem`
        says so.
        """
        if self.kind == "none":
            raise Unavailable(f"Nobody keeps {name}: the daemon was started without a keeper. Its mounts end with it.")
        refusal = f"The keeper of this daemon did not take {name} within {DEADLINE_S:g} s: its mounts end with it."
        with trio.move_on_after(DEADLINE_S):
            while True:
                try:
                    async with self._lock:
                        await self._store(name, fd)
                    self._deposits[name] = fd
                    self._refusals.pop(name, None)
                    return
                except Unavailable as e:
                    refusal = e.message
                    break
                except (Gone, OSError):
                    await trio.sleep(RETRY_S)  # `watch` starts another
        self._refusals[name] = refusal
        raise Unavailable(refusal)

    async def remove(self, name: str) -> None:
        """Has the keeper let go of what it holds by that name. Raises Unavailable where it does not within DEADLINE_S."""
        for known in (self._deposits, self._unchanged, self._refusals):
            known.pop(name, None)
        with trio.move_on_after(DEADLINE_S), suppress(Gone, OSError):  # who is gone holds nothing
            async with self._lock:
                if name in self._kept:
                    await self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
                    await self._barrier()
                    self._kept.discard(name)
        if name in self._kept:
            raise Unavailable(f"The keeper of this daemon does not let go of {name} within {DEADLINE_S:g} s.")

    async def watch(self) -> None:
        """Starts another keeper when Manta's own ends. Returns where there is none, or when the daemon is stopping."""
        while self.kind == "keeper":
            if self._pidfd != -1:
                await trio.lowlevel.wait_readable(self._pidfd)
            if self._stopping:
                return
            async with self._lock:
                await self._replace_keeper()

    # The protocol ----------------------------------------------------------------------------------------------------

    async def _store(self, name: str, fd: int) -> None:
        """Raises Unavailable where there is no room, Gone, OSError."""
        if name in self._kept and self._unchanged.get(name) == fd:
            return
        ours, probe = os.pipe()
        try:
            try:
                await self._tell(f"FDSTORE=1\nFDNAME={PROBE}\nFDPOLL=0", probe)
            finally:
                os.close(probe)
            await self._barrier()
            if readable(ours):  # nobody has the other end any more
                raise Unavailable(
                    "systemd keeps no descriptors of this unit, or not enough: mounts will not outlive the daemon."
                    " FileDescriptorStoreMax=16 in the unit changes that."
                    if self.kind == "systemd"
                    else f"The keeper holds {keeper.FDS_MAX} descriptors already: mounts will not outlive the daemon."
                )
        finally:
            os.close(ours)
        await self._tell(f"FDSTOREREMOVE=1\nFDNAME={PROBE}")
        if self.kind == "systemd" and name in self._kept:  # it would hold both
            await self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
        await self._tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)
        await self._barrier()
        self._unchanged.pop(name, None)
        self._kept.add(name)

    async def _barrier(self) -> None:
        ours, theirs = os.pipe()
        try:
            try:
                await self._tell("BARRIER=1", theirs)
            finally:
                os.close(theirs)
            await trio.lowlevel.wait_readable(ours)
        finally:
            os.close(ours)
        if self._is_gone():  # the pipe's end dies with a keeper, too
            raise Gone

    def _is_gone(self) -> bool:
        return self.kind == "keeper" and (self._pidfd == -1 or readable(self._pidfd))

    async def _tell(self, message: str, fd: int | None = None) -> None:
        while not self._tell_nowait(message, fd):
            if self._socket is not None:
                await trio.lowlevel.wait_writable(self._socket)

    def _tell_nowait(self, message: str, fd: int | None = None) -> bool:
        """Whether there was room for it. Raises Gone, OSError."""
        if self._socket is None:
            raise Gone
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
        try:
            self._socket.sendmsg([message.encode()], rights, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except ConnectionError:
            raise Gone from None
        return True

    def _say(self, message: str) -> None:
        """What needs no confirmation. Who has no keeper now tells the next one."""
        if self.kind == "none":
            return
        with suppress(Gone, OSError):
            if not self._tell_nowait(message):
                log.warning("the keeper did not hear %s: it has too much to read", message)

    def _connect(self, address: str) -> None:
        """Raises OSError."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            connected.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError:
            connected.close()
            raise
        self._socket = connected

    # Another keeper --------------------------------------------------------------------------------------------------

    async def _replace_keeper(self) -> None:
        pause_s = RETRY_S
        while True:
            await self._forget_keeper()
            log.warning("the keeper (pid %d) is gone: starting another", self._keeper_pid)
            try:
                with trio.fail_after(DEADLINE_S):
                    self._start_keeper()
                    await self._reach_keeper()
                    for name, fd in self._deposits.items():
                        await self._store(name, fd)
            except (Gone, OSError, trio.TooSlowError, Unavailable) as e:
                reason = str(e) or "it ended, or did not answer"
            else:
                break
            self._missing = (
                f"The keeper ended, and another one cannot be started ({reason.rstrip('.')}): mounts end with the daemon until that"
                " works. It is tried again and again."
            )
            log.error("%s", self._missing)
            await trio.sleep(pause_s)
            pause_s = min(PAUSE_S_MAX, pause_s * 2)
        if self._stopping:
            self._say("STOPPING=1")
        self._missing = ""
        log.info("the new keeper (pid %d) holds %s", self._keeper_pid, ", ".join(self._deposits) or "nothing")

    def _start_keeper(self) -> None:
        """Raises OSError."""
        runtime = os.path.dirname(self._address)
        command = keeper.command_line(runtime, self._command, "--adopt", str(os.getpid()))
        nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
        self._keeper_pid = os.posix_spawn(command[0], command, os.environ, file_actions=[nothing], setsid=True)
        self._spawned = True
        self._pidfd = os.pidfd_open(self._keeper_pid)
        self._address = keeper.socket_path(runtime, self._keeper_pid)

    async def _reach_keeper(self) -> None:
        """Raises Gone, OSError. The caller has a deadline."""
        while True:
            try:
                self._connect(self._address)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if readable(self._pidfd):
                    raise Gone from None
            await trio.sleep(RETRY_S)

    async def _forget_keeper(self) -> None:
        """It is dead; or it was started in vain, and dies now."""
        self._kept.clear()
        self._unchanged.clear()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        with suppress(OSError):
            os.unlink(self._address)
        if self._pidfd == -1:
            return
        if self._spawned:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with trio.move_on_after(DEADLINE_S):
                await trio.lowlevel.wait_readable(self._pidfd)
            with suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not wait
        os.close(self._pidfd)
        self._pidfd = -1


def readable(fd: int) -> bool:
    """Now: of a pidfd, that the process has ended; of a pipe that nobody writes to, that its other end is closed."""
    poll = select.poll()  # select() cannot take the thousandth descriptor
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _own_command() -> list[str]:
    """This process's command, without the descriptor that was for it alone, which the keeper puts at its end."""
    command = [sys.executable, *sys.orig_argv[1:]]
    return command[:-2] if command[-2:-1] == ["--ready-fd"] else command
