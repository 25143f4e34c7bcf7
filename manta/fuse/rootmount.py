"""The daemon's one FUSE mount: which session serves it, how it begins, is taken over, is left, and ends. Here and only here.

Runs in the daemon's trio thread, but for `abort`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from manta.config import FuseConfig
from manta.control.binding import MOUNTINFO, Answer, mounted_at, mounts, probe, unbind
from manta.errors import InUse, MantaError, Unavailable
from manta.fs.filesystem import Filesystem
from manta.fuse import device, kernel_settings
from manta.fuse.kernel_session import FEATURES, KernelSession
from manta.fuse.protocol import NOTHING

log = logging.getLogger(__name__)

INIT_SECONDS_MAX = 10.0
"""The kernel and the session shake hands in a millisecond; after this the mount is used with the kernel's own settings."""

UNMOUNT_SECONDS = 5.0
"""How long readers may go on with what they have open after the daemon was told to stop. Then the FUSE connection is aborted, and they get
errors. The bound on the whole end is the watchdog's."""

HELD_SECONDS = 2.0
"""A mount that nobody holds answers in a millisecond, that it is dead."""

MOUNTINFO_SECONDS = 5.0
"""mountinfo is looked at this often also when the kernel announces no change."""


class Session(Protocol):
    """What serves the mount: `KernelSession`, `Pyfuse3Session`."""

    name: str
    native_refusal: str

    @property
    def native(self) -> bool: ...

    @property
    def resends(self) -> bool: ...

    async def serve(self, *, resend: bool = False) -> None: ...

    def forget_name(self, name: str) -> None: ...

    def forget_pages(self, nodeids: Iterable[int]) -> None: ...

    def close(self) -> None: ...


class RootMount:
    """The mount of `filesystem`, called `source` in mountinfo.

    `scratch` is a directory of ours (see `kernel_settings`). `refused` hears why a request got an error, `unmounted` that somebody else has
    unmounted it.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        config: FuseConfig,
        source: str,
        scratch: Path,
        refused: Callable[[MantaError], None],
        unmounted: Callable[[], None],
    ) -> None:
        self._filesystem = filesystem
        self._config = config
        self._source = source
        self._scratch = scratch
        self._refused = refused
        self._unmounted = unmounted
        self._without = NOTHING
        for feature in filter(None, config.without.split(",")):
            self._without |= FEATURES[feature]
        self._session: Session | None = None
        self._serving: trio.CancelScope
        self._ended = trio.Event()
        self._device = ""
        """MAJOR:MINOR while it is mounted."""
        self._left = False
        self.why = ""
        """Why this session serves it, as a clause."""

    # Which session -------------------------------------------------------------------------------------------------------

    @property
    def session(self) -> str:
        """Its name; empty while nothing is mounted."""
        return self._session.name if self._session is not None else ""

    @property
    def native_refusal(self) -> str:
        """Why the kernel does not read cached files by itself; empty where it does."""
        if self._session is None:
            return "nothing is mounted"
        if self._session.name != KernelSession.name:
            return f"the {self._session.name} session cannot offer it"
        if "passthrough" in self._config.without:
            return "fuse.without turns it off"
        if not self._session.native:
            return "this kernel does not offer it (Linux 6.9 does)"
        return self._session.native_refusal

    @property
    def survival_refusal(self) -> str:
        """Why another daemon could not take the mount over; empty where it could."""
        if self._session is None:
            return "nothing is mounted"
        if self._session.name != KernelSession.name:
            return f"the {self._session.name} session cannot be taken over"
        if "resend" in self._config.without:
            return "fuse.without turns it off"
        if not self._session.resends:
            return "this kernel does not send requests again (Linux 6.9 does)"
        return ""

    def _mounted_session(self, directory: Path) -> Session:
        """Raises Denied, Unavailable."""
        wanted, refusal = self._config.session, device.why_not()
        if wanted != "pyfuse3" and (wanted == "kernel" or not refusal):
            kernel = KernelSession(self._filesystem, self._refused, without=self._without)
            try:
                kernel.mount(directory, self._source)
            except MantaError as e:
                if wanted == "kernel":
                    raise
                refusal = e.message.rstrip(".")
            else:
                self.why = "as configured" if wanted == "kernel" else "kernel and privileges allow it"
                return kernel
        self.why = "as configured" if wanted == "pyfuse3" else refusal
        # Imported where it is used: it needs libfuse, which the kernel session does without.
        from manta.fuse.pyfuse3_session import Pyfuse3Session

        session = Pyfuse3Session(self._filesystem, self._refused)
        session.mount(directory, self._source)
        return session

    # Life ----------------------------------------------------------------------------------------------------------------

    async def mount(self, directory: Path, nursery: trio.Nursery) -> None:
        """Mounts on `directory` and serves in `nursery`. Raises Denied, Unavailable, InUse."""
        session = self._mounted_session(directory)
        await self._begin(session, directory, nursery, resend=False)

    async def take_over(
        self, directory: Path, nursery: trio.Nursery, fd: int, state: bytes, restore: Callable[[], Awaitable[None]]
    ) -> None:
        """As `mount`, with the connection of a daemon that is gone: see `KernelSession.adopt`. `restore` makes the filesystem what that
        daemon showed, before anybody is served. Raises Corrupt, Unavailable, before that; then `fd` is still the caller's."""
        entry = mounted_at(str(directory))
        if entry is None or not entry.is_manta:
            raise Unavailable(f"{directory} is not mounted any more.")
        session = KernelSession(self._filesystem, self._refused, without=self._without)
        session.adopt(directory, fd, state)
        self.why = "taken over from the daemon before"
        await restore()
        await self._begin(session, directory, nursery, resend=True)

    async def _begin(self, session: Session, directory: Path, nursery: trio.Nursery, *, resend: bool) -> None:
        self._session = session
        self._filesystem.native = session.native
        self._filesystem.drop_pages = lambda nodeid: self.forget_pages([nodeid])
        self._ended = trio.Event()
        self._serving = trio.CancelScope()
        nursery.start_soon(self._serve, session, resend)
        if not resend:
            # The answer to the kernel's INIT, which a session's loop may give, would undo the settings: a statvfs comes after it. In a
            # thread that may be left behind, because it is our own mount that it waits for.
            with trio.move_on_after(INIT_SECONDS_MAX), contextlib.suppress(OSError):
                await trio.to_thread.run_sync(os.statvfs, directory, abandon_on_cancel=True)
        if (entry := mounted_at(str(directory))) is not None:
            self._device = entry.device
            kernel_settings.apply(entry.device, self._config.readahead_kib, self._scratch)

    async def _serve(self, session: Session, resend: bool) -> None:
        try:
            with self._serving:
                await session.serve(resend=resend)
            if not self._serving.cancelled_caught:
                self._close()
                self._unmounted()
        finally:
            # Cancelled, it is still mounted: `leave` or `end` says what becomes of it.
            self._ended.set()

    def _close(self) -> None:
        """In the trio thread on purpose: libfuse's session is not to be touched from two. Its umount2 is lazy and does not wait."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._device = ""
            self._filesystem.close()

    @property
    def state(self) -> tuple[int, bytes]:
        """The connection, and what the next daemon must know to take it over. Only where `survival_refusal` is empty."""
        assert isinstance(self._session, KernelSession)
        return self._session.fd, self._session.state

    async def leave(self) -> None:
        """Stops serving and leaves the mount to the next daemon: who reads waits for that one. Only where `survival_refusal` is empty."""
        assert isinstance(self._session, KernelSession)
        self._left = True
        self._serving.cancel()
        await self._ended.wait()
        self._session.leave()

    async def end(self, hurried: trio.Event) -> None:
        """Unmounts everything, lazily where it is busy: readers keep what they have open for UNMOUNT_SECONDS, or until `hurried`."""
        if self._session is None:
            return
        if self._device:
            _unmount_all(self._device)
        with trio.move_on_after(UNMOUNT_SECONDS):
            await first_of(self._ended, hurried)
        if not self._ended.is_set():
            self.abort()
        self._close()

    def abort(self) -> None:
        """Takes the filesystem away whoever uses it: they get errors now. Any thread, so that the watchdog can. Nothing after `leave`."""
        if (mounted := self._device) and not self._left:
            log.warning("files are still open: their readers get errors from now on")
            _unmount_all(mounted)
            kernel_settings.abort(mounted, self._scratch)

    # What the kernel must forget -------------------------------------------------------------------------------------------

    def forget_name(self, name: str) -> None:
        """A name in the top directory is gone."""
        if self._session is not None:
            self._session.forget_name(name)

    def forget_pages(self, nodeids: Iterable[int]) -> None:
        """What the kernel has cached of these files is wrong, or held twice."""
        if self._session is not None:
            self._session.forget_pages(nodeids)

    # Who is bound to it ------------------------------------------------------------------------------------------------------

    def bound(self, root: Path) -> set[str]:
        """The names in the top directory that are bound somewhere in this mount namespace. `root`: where it is mounted."""
        entries = mounts()
        ours = mounted_at(str(root), entries)
        if ours is None:
            return set()
        return {e.root.strip("/").split("/")[0] for e in entries if e.device == ours.device and e.root != "/"}

    @staticmethod
    async def watch(changed: Callable[[], None]) -> None:
        """Tells `changed` when a mount has come or gone: the kernel marks mountinfo readable-with-priority.

        In a thread: the kernel tells of each change once, and trio would lose one that comes while it arms its epoll.
        """
        with MOUNTINFO.open() as mountinfo:
            poll = select.poll()
            poll.register(mountinfo, select.POLLPRI | select.POLLERR)
            while True:
                await trio.to_thread.run_sync(poll.poll, 1000 * MOUNTINFO_SECONDS, abandon_on_cancel=True)
                changed()


async def first_of(*events: trio.Event) -> None:
    """Returns when one of them is set."""
    async with trio.open_nursery() as waiting:

        async def until(event: trio.Event) -> None:
            await event.wait()
            waiting.cancel_scope.cancel()

        for event in events:
            waiting.start_soon(until, event)


def _unmount_all(mounted: str) -> None:
    """Unmounts a filesystem of ours (MAJOR:MINOR) wherever it is visible, lazily: what is busy goes when it is let go."""
    for entry in reversed(mounts()):
        if entry.device == mounted:
            try:
                unbind(entry.directory, lazy=True)
            except MantaError as e:
                log.info("%s could not be unmounted: %s", entry.directory, e.message)


def refuse_if_held(root: Path) -> None:
    """SLOW: raises InUse where what is mounted on `root` waits for a daemon that somebody else is starting: to detach it would end mounts
    that go on in a moment. One that nobody holds answers at once, that it is dead."""
    entry = mounted_at(str(root))
    if entry is not None and entry.is_manta and probe(str(root), timeout_s=HELD_SECONDS) is Answer.SILENT:
        raise InUse(
            f"{root} is held for a daemon that its keeper is starting: try again in a moment. If none comes, `umount --lazy {root}` ends"
            " what is mounted."
        )


def detach_stale(root: Path) -> None:
    """Takes away what a daemon that died left mounted on `root`, which nobody serves. Raises InUse."""
    while (entry := mounted_at(str(root))) is not None:
        if not entry.is_manta:
            raise InUse(
                f"{root} is a mountpoint of something else ({entry.fstype}); unmount it, or choose another runtime directory."
            )
        log.warning("detaching %s and what is bound to it, which a daemon that died left behind", root)
        _unmount_all(entry.device)
        if mounted_at(str(root)) == entry:
            raise InUse(f"The dead mount on {root} cannot be detached; run `umount -l {root}`.")


async def make(root: Path) -> None:
    """The directory to mount on."""
    await trio.to_thread.run_sync(partial(root.mkdir, mode=0o700, exist_ok=True))
