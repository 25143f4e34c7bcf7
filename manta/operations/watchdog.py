"""Ends the process when its orderly end takes too long: the one bound on the daemon's shutdown is here and only here.

Whatever a shutdown waits for (readers that hold files open, a cache disk that takes seconds for a sync, a worker in the kernel), the
process is gone END_SECONDS_MAX after it was told to stop. That costs nothing that was finished: a recorded chunk is in the chunk map
already, as a daemon killed by SIGKILL proves.
Threads and not tasks, for the signals too: what they are for may keep the trio thread itself. Used by `manta.daemon`.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

END_SECONDS_MAX = 10.0
"""From the signal to the end of the process. systemd waits 90 s by default, Kubernetes 30 s, and both kill then without any order."""

LAST_RESORT_SECONDS = 8.0
"""When the orderly way has had its time. What is left of END_SECONDS_MAX is for the kernel to take the filesystem away."""

HURRY_SECONDS = 1.0
"""The orderly way's time after a second signal."""

SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""What asks the daemon to end: a supervisor, Ctrl-C, a terminal that is closed."""

EXIT_CODE = 1
"""Of a process that had to be ended: the supervisor that restarts it should know."""


class Watchdog:
    """``with Watchdog(last_resort) as watchdog: ...``; nothing happens until `start`.

    `last_resort` frees those who wait for the filesystem. It runs in the watchdog's thread, beside whatever hangs.
    """

    def __init__(
        self,
        last_resort: Callable[[], None],
        *,
        exit_now: Callable[[int], object] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._last_resort = last_resort
        self._exit_now = exit_now
        self._clock = clock
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._over = False

    def heed_signals(self, told: Callable[[bool], None]) -> None:
        """From now on SIGNALS start the watchdog, and hurry it when they come again. `told` hears of each, with whether it came again.

        It is called in a thread. Call this before the process has other threads: it blocks the signals for them, and for child processes.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

        def heed() -> None:
            again = False
            while True:
                number = signal.Signals(signal.sigwait(SIGNALS))
                log.info("stopping%s: %s", " at once" if again else "", number.name)
                self.start()
                if again:
                    self.hurry()
                told(again)
                again = True

        threading.Thread(target=heed, daemon=True, name="signals").start()

    def start(self) -> None:
        """The end has begun. Does nothing the second time."""
        with self._changed:
            if self._deadline is not None or self._over:
                return
            self._deadline = self._clock() + LAST_RESORT_SECONDS
        # It needs no lock of the interpreter, which a thread that hangs in a system call may hold.
        faulthandler.dump_traceback_later(END_SECONDS_MAX, exit=True, file=sys.__stderr__ or sys.stderr)
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def hurry(self) -> None:
        """Whoever asked for the end asks again."""
        with self._changed:
            if self._deadline is not None:
                self._deadline = min(self._deadline, self._clock() + HURRY_SECONDS)
                self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._over and self._deadline is not None and (left := self._deadline - self._clock()) > 0:
                self._changed.wait(left)
            if self._over:
                return
        log.error(
            "the orderly end takes too long: the filesystem is aborted and the process ends now; finished chunks stay"
        )
        try:
            self._last_resort()
        finally:
            logging.shutdown()
            self._exit_now(EXIT_CODE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            if self._deadline is not None:
                faulthandler.cancel_dump_traceback_later()
            self._over = True
            self._changed.notify()
