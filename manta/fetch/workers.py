"""The worker processes as the daemon sees them: started, given orders, replaced when they die. Here and only here.

`WorkerPool` runs in the daemon's trio thread. `Workers` is what the fetcher and the sealer need of it; `manta.testing.workers` has another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec
import trio

from manta.errors import Unavailable
from manta.fetch.process import Channel, ending, pass_on, spawn
from manta.telemetry.events import Telemetry
from manta.wire.channel import Closed
from manta.wire.messages import (
    Cancel,
    Digest,
    Digested,
    Failed,
    Fetch,
    Fetched,
    FromWorker,
    Locate,
    Located,
    Progress,
    Pull,
    Ready,
    ToWorker,
    Verified,
    Verify,
    Watch,
    decode_from_worker,
)

log = logging.getLogger(__name__)

START_SECONDS_MAX = 30.0
"""A worker is up in about 0.4 s; a machine that is starting fifty pods may take far longer."""

SILENCE_SLACK_SECONDS = 10.0
"""How much longer than its own deadline a worker may be silent about an order before it counts as stuck and is killed."""

START_FAILURES_MAX = 3
"""Workers of one role that ended in a row before they were ready. One may be an accident; after three, who waits for one is told."""

LAST_WORDS_SECONDS_MAX = 1.0
"""A worker that is killed closes its stderr at once; one that hangs in the kernel must not keep its orders from being answered."""

RESTART_PAUSE_SECONDS = 0.1
RESTART_PAUSE_SECONDS_MAX = 10.0
STABLE_SECONDS = 30.0
"""A worker that lived this long died by accident: its successor starts at once."""

Role = Literal["fetch", "digest"]
OnProgress = Callable[[int, int], None]


class OrderControl:
    """What may still be said about an order for a worker: that a reader waits for its bytes, that it is not needed any more.

    `given` hears of the order's number and of the worker (process id) that has got it.
    """

    def __init__(self, *, wanted: bool, given: Callable[[int, int], None] = lambda _number, _worker: None) -> None:
        self.wanted = wanted
        """A reader waits for its bytes."""
        self.cancelled = False
        self._given = given
        self._number = 0
        self._tell: Callable[[Watch | Cancel], None] | None = None

    def bind(self, number: int, worker: int, tell: Callable[[Watch | Cancel], None], *, watched: bool) -> None:
        """A worker (its process id) has it as order `number`. `tell` reaches it, unless it is busy; `watched`: it knows of the reader."""
        self._number, self._tell = number, tell
        self._given(number, worker)
        if self.wanted and not watched:
            tell(Watch(number))
        if self.cancelled:
            tell(Cancel(number))

    def release(self) -> None:
        """It has been answered."""
        self._tell = None

    def watch(self) -> None:
        if not self.wanted:
            self.wanted = True
            if self._tell is not None:
                self._tell(Watch(self._number))

    def cancel(self) -> None:
        """It is answered soon, as Failed with `cancelled` unless it was done. May be said again, should the worker not have heard."""
        self.cancelled = True
        if self._tell is not None:
            self._tell(Cancel(self._number))


class Workers(Protocol):
    """Each call is one order; it is answered, or raises Unavailable when no worker could be had."""

    async def locate(self, url: str, headers: dict[str, str], deadline_s: float) -> Located | Failed: ...

    async def fetch(
        self, order: Callable[[int], Fetch], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed: ...

    async def pull(
        self, order: Callable[[int], Pull], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed:
        """`progress` is of what is on the way, of no byte at all (at == upto) while the node fetches it: nothing of it is to be read."""

    async def digest(self, blob: str, start: int, end: int, blob_size: int, fd: int) -> Digested | Failed: ...

    async def verify(self, chunks: list[tuple[int, int, bytes]], fd: int) -> Verified | Failed: ...


@dataclass(slots=True)
class _Pending:
    """An order that waits for its answer."""

    progress: OnProgress | None
    silence_s: float
    scope: trio.CancelScope
    answered: trio.Event = field(default_factory=trio.Event)
    answer: Located | Fetched | Digested | Verified | Failed | None = None


class _Worker:
    """One process and its socket."""

    def __init__(
        self, role: Role, process: subprocess.Popen[bytes], channel: Channel[FromWorker], stderr: trio.lowlevel.FdStream
    ) -> None:
        self.role = role
        self.process = process
        self.channel = channel
        self.stderr = stderr
        self.pending: dict[int, _Pending] = {}
        self.started = False
        self.ready = False
        """It has started, and takes orders."""


def _spawn(role: Role) -> _Worker:
    """Raises OSError."""
    process, channel, stderr = spawn("manta.worker", [role], decode_from_worker)
    return _Worker(role, process, channel, stderr)


class WorkerPool:
    """`fetchers` processes with role fetch and one with role digest. Call `run` in a nursery; it ends when cancelled.

    `telemetry` hears of those that end; None: nobody looks.
    """

    def __init__(self, fetchers: int, telemetry: Telemetry | None = None) -> None:
        if not 1 <= fetchers <= 16:
            raise ValueError(f"1 to 16 workers, not {fetchers}")
        self._fetchers = fetchers
        self._telemetry = telemetry or Telemetry()
        self._workers: list[_Worker] = []
        self._numbers = itertools.count(1)
        self._changed = trio.Event()  # replaced whenever a worker gets ready, or starting one fails
        self._failed_starts: Counter[Role] = Counter()  # in a row
        self._trouble: dict[Role, str] = {}
        """What became of the last of them."""

    @property
    def pids(self) -> list[int]:
        return [w.process.pid for w in self._workers]

    @property
    def processes(self) -> list[tuple[Role, int]]:
        """Their roles and process ids."""
        return [(w.role, w.process.pid) for w in self._workers]

    # Life ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps the workers running; on cancellation stops them and waits for their end (bounded by their SIGKILL)."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep, "digest")
            for _ in range(self._fetchers):
                nursery.start_soon(self._keep, "fetch")

    async def _keep(self, role: Role) -> None:
        pause = RESTART_PAUSE_SECONDS
        while True:
            began = trio.current_time()
            try:
                worker = _spawn(role)
            except OSError as e:
                log.error("no %s worker can be started (%s); trying again", role, e.strerror)
                self._start_failed(role, f"cannot be started ({e.strerror})")
            else:
                self._workers.append(worker)
                try:
                    async with trio.open_nursery() as beside:
                        beside.start_soon(pass_on, worker.stderr, role, worker.process.pid)
                        await self._listen(worker)
                        # Before `kill`, which may collect its end.
                        self._telemetry.worker_ended(role, worker.process.pid)
                        worker.process.kill()
                        beside.cancel_scope.deadline = trio.current_time() + LAST_WORDS_SECONDS_MAX
                finally:
                    self._workers.remove(worker)
                    await self._bury(worker)
                if trio.current_time() - began > STABLE_SECONDS:
                    pause = RESTART_PAUSE_SECONDS
                log.warning(
                    "a %s worker (pid %d) ended with %s; starting another",
                    role,
                    worker.process.pid,
                    ending(worker.process),
                )
                if not worker.started:
                    self._start_failed(role, f"ended with {ending(worker.process)} before it was ready")
            await trio.sleep(pause)
            pause = min(pause * 2, RESTART_PAUSE_SECONDS_MAX)

    def _start_failed(self, role: Role, how: str) -> None:
        self._failed_starts[role] += 1
        self._trouble[role] = how
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _listen(self, worker: _Worker) -> None:
        """Hands out answers until the worker's end of the socket is closed, or it turns out not to be a worker."""
        with trio.move_on_after(START_SECONDS_MAX) as starting:
            while True:
                try:
                    message = await worker.channel.receive()
                except Closed:
                    return
                except (ValueError, msgspec.MsgspecError):
                    log.error("a worker (pid %d) sent what is no message; it is replaced", worker.process.pid)
                    return
                match message:
                    case Ready():
                        starting.deadline = math.inf
                        worker.ready = worker.started = True
                        self._failed_starts[worker.role] = 0
                        self._change()
                    case Progress():
                        if (pending := worker.pending.get(message.order)) is not None:
                            pending.scope.deadline = trio.current_time() + pending.silence_s
                            if pending.progress is not None:
                                pending.progress(message.at, message.upto)
                    case _:
                        if (pending := worker.pending.pop(message.order, None)) is not None:
                            pending.answer = message
                            pending.answered.set()
        log.error("a worker (pid %d) did not start in %.0f s; it is replaced", worker.process.pid, START_SECONDS_MAX)

    @staticmethod
    async def _bury(worker: _Worker) -> None:
        """No process stays, no order stays unanswered."""
        worker.channel.close()
        worker.process.kill()
        for number, pending in worker.pending.items():
            pending.answer = Failed(number, "unavailable", "was cut short: its worker process ended")
            pending.answered.set()
        worker.pending.clear()
        with trio.CancelScope(shield=True):
            # It has no way to refuse SIGKILL, but one in D state ends only with its disk's request: that is no reason to hold up readers.
            await trio.to_thread.run_sync(worker.process.wait)

    # Orders ----------------------------------------------------------------------------------------------------------

    async def locate(self, url: str, headers: dict[str, str], deadline_s: float) -> Located | Failed:
        answer = await self._order("fetch", lambda n: Locate(n, url, headers, deadline_s), None, None, deadline_s)
        assert isinstance(answer, Located | Failed)
        return answer

    async def fetch(
        self, order: Callable[[int], Fetch], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed:
        # Until its first byte an order may wait for a connection and for the origin, a stall each; a redirect adds another.
        silence_s = 3 * order(0).stall_s
        answer = await self._order("fetch", order, fd, progress, silence_s, control)
        assert isinstance(answer, Fetched | Failed)
        return answer

    async def pull(
        self, order: Callable[[int], Pull], fd: int, progress: OnProgress, control: OrderControl
    ) -> Fetched | Failed:
        # A wait for a connection, for an answer and for the first bytes, each bounded; word that the node is fetching is progress.
        silence_s = 3 * order(0).stall_s
        answer = await self._order("fetch", order, fd, progress, silence_s, control)
        assert isinstance(answer, Fetched | Failed)
        return answer

    async def digest(self, blob: str, start: int, end: int, blob_size: int, fd: int) -> Digested | Failed:
        silence_s = _reading_s(end - start)
        answer = await self._order("digest", lambda n: Digest(n, blob, start, end, blob_size), fd, None, silence_s)
        assert isinstance(answer, Digested | Failed)
        return answer

    async def verify(self, chunks: list[tuple[int, int, bytes]], fd: int) -> Verified | Failed:
        silence_s = _reading_s(sum(end - start for start, end, _ in chunks))
        answer = await self._order("digest", lambda n: Verify(n, chunks), fd, None, silence_s)
        assert isinstance(answer, Verified | Failed)
        return answer

    async def _order(
        self,
        role: Role,
        make: Callable[[int], ToWorker],
        fd: int | None,
        progress: OnProgress | None,
        silence_s: float,
        control: OrderControl | None = None,
    ) -> Located | Fetched | Digested | Verified | Failed:
        worker = await self._pick(role)
        number = next(self._numbers)
        if control is not None and control.cancelled:
            return Failed(number, "cancelled", "was cancelled before a worker had it")
        limit_s = silence_s + SILENCE_SLACK_SECONDS
        with trio.CancelScope(deadline=trio.current_time() + limit_s) as scope:
            pending = _Pending(progress, limit_s, scope)
            worker.pending[number] = pending
            try:
                await worker.channel.send(order := make(number), fd)
                if control is not None:
                    # Nobody can read the bytes of a Pull before it is done: there is nothing to watch.
                    watched = isinstance(order, Fetch) and order.watched
                    control.bind(number, worker.process.pid, worker.channel.tell_nowait, watched=watched)
                await pending.answered.wait()
            except Closed:
                # The task in `_keep` sees the same end and answers for all; here it may have been first.
                worker.ready = False
                worker.pending.pop(number, None)
                return Failed(number, "unavailable", "was cut short: its worker process ended")
            except ValueError as e:
                worker.pending.pop(number, None)
                return Failed(number, "unavailable", f"cannot be ordered from a worker: {e}")
            except trio.Cancelled:
                if worker.pending.pop(number, None) is not None and not scope.cancel_called:
                    worker.channel.tell_nowait(Cancel(number))
                raise
            finally:
                if control is not None:
                    control.release()
        if pending.answer is None:
            log.error("a %s worker (pid %d) was silent for %.0f s; it is killed", role, worker.process.pid, limit_s)
            worker.ready = False  # no more orders for it, until `_keep` has seen its end
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGKILL)
            return Failed(number, "unavailable", "was cut short: its worker process was stuck")
        return pending.answer

    async def _pick(self, role: Role) -> _Worker:
        """The ready worker with the fewest orders; waits for one. Raises Unavailable after START_SECONDS_MAX, or when none stays up."""
        with trio.move_on_after(START_SECONDS_MAX):
            while True:
                ready = [w for w in self._workers if w.role == role and w.ready]
                if ready:
                    return min(ready, key=lambda w: len(w.pending))
                if self._failed_starts[role] >= START_FAILURES_MAX:
                    raise Unavailable(
                        f"No {role} worker process stays up: the last one {self._trouble[role]}. It is tried again by itself; the"
                        " daemon's log has what it said."
                    )
                await self._changed.wait()
        raise Unavailable(
            f"No {role} worker process could be started in {START_SECONDS_MAX:.0f} s; see the daemon's log."
        )


def _reading_s(count: int) -> float:
    """How long a worker may read `count` bytes: a disk slower than 10 MB/s is stuck for our purpose."""
    return 60 + count / 10e6
