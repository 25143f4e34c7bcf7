"""`manta top`: a live view of one daemon. What it shows is `manta.cli.frame`; here are the terminal, the keys and the clock.

A thread asks the daemon, so that a key is heeded at once also while the daemon does not answer. Plain ANSI: the alternate screen, the
cursor and three styles, which every terminal of today has; where there is none (a pipe, TERM=dumb), one frame is printed.
"""

from __future__ import annotations

import os
import queue
import select
import shutil
import signal
import sys
import termios
import threading
import time
import tty
from types import FrameType, TracebackType
from typing import Self

from manta.cli.frame import Line, Style, frame
from manta.cli.invocation import Invocation
from manta.control.client import Client
from manta.control.protocol import Status
from manta.errors import MantaError

REFRESH_S = 1.0
ANSWER_S = 10.0
PIPE_COLUMNS = 160
"""The width where there is no terminal: as wide as a log viewer is likely to be."""

_SGR: dict[Style, str] = {
    "plain": "",
    "title": "\x1b[1m",
    "warning": "\x1b[33m",
    "error": "\x1b[31m",
}
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _ERASED, _REST_ERASED, _RESET = "\x1b[H", "\x1b[2K", "\x1b[J", "\x1b[0m"


def top(invocation: Invocation) -> int:
    console = invocation.console
    client = invocation.connect()
    live = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if invocation.arguments.once or console.as_json or not live:
        seen = client.status()
        console.document(seen)
        width = shutil.get_terminal_size((PIPE_COLUMNS, 0)).columns
        console.say(*(line.text for line in frame(seen, now=time.time(), width=width)))
        return 0
    try:
        with _Poll(client) as poll, _Screen() as screen:
            _watch(poll, screen)
    except KeyboardInterrupt:
        pass  # as good an end as q
    return 0


def _watch(poll: _Poll, screen: _Screen) -> None:
    """Draws until q is pressed or the terminal is gone."""
    latest: Status | None = None
    trouble, came = "", 0.0
    read_rate: float | None = None
    while True:
        for answer in poll.answers():
            if isinstance(answer, MantaError):
                trouble = f"{answer.message} Trying again."
                continue
            now, read_rate = time.monotonic(), None
            if latest is not None and latest.pid == answer.pid and now > came:
                read_rate = (answer.read_bytes - latest.read_bytes) / (now - came)
            latest, came, trouble = answer, now, ""
        if latest is not None:
            screen.draw(latest, read_rate, trouble)
        ready, _, _ = select.select([sys.stdin, poll, screen], [], [], REFRESH_S)
        if sys.stdin in ready:
            keys = os.read(sys.stdin.fileno(), 64)
            if not keys or b"q" in keys.lower():
                return
        if screen in ready:
            screen.drain()


class _Poll:
    """Asks the daemon every REFRESH_S in a thread. Readable (for select) when `answers` has some."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._answers: queue.SimpleQueue[Status | MantaError] = queue.SimpleQueue()
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True, name="poll")

    def fileno(self) -> int:
        return self._readable

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # The thread may still wait for an answer, and is left behind with its pipe: this process is about to end.
        self._over.set()

    def answers(self) -> list[Status | MantaError]:
        """What has come since it was last asked."""
        try:
            os.read(self._readable, 64)
        except BlockingIOError:
            return []
        found = []
        while not self._answers.empty():
            found.append(self._answers.get())
        return found

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                self._answers.put(self._client.status(timeout_s=ANSWER_S))
            except MantaError as e:
                self._answers.put(e)
            os.write(self._writable, b".")
            self._over.wait(REFRESH_S)


class _Screen:
    """The terminal, taken over; given back at the end, and while the job is stopped (^Z). Readable (for select) when its size changed."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(sys.stdin)
        self._coloured = not os.environ.get("NO_COLOR")
        self._signals, self._wakeup = os.pipe()
        for fd in (self._signals, self._wakeup):
            os.set_blocking(fd, False)

    def fileno(self) -> int:
        return self._signals

    def __enter__(self) -> Self:
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGWINCH, lambda _number, _frame: None)  # what has no handler wakes nobody up
        signal.signal(signal.SIGTSTP, self._stop)
        self._take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._give_back()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGWINCH, signal.SIGTSTP):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._signals)
        os.close(self._wakeup)

    def drain(self) -> None:
        os.read(self._signals, 64)

    def draw(self, seen: Status, read_rate: float | None, trouble: str) -> None:
        width, height = os.get_terminal_size(sys.stdout.fileno())
        # A terminal that does not know its size says 0.
        lines = frame(
            seen, now=time.time(), width=width or 80, height=height or 24, read_rate=read_rate, trouble=trouble
        )
        # No line break after the last line, which would scroll the first one away.
        # Erased before it is written: in the last column the cursor stands on what it wrote.
        text = "\n".join(_ERASED + self._painted(line) for line in lines)
        sys.stdout.write(_HOME + text + ("\n" + _REST_ERASED if len(lines) < (height or 24) else ""))
        sys.stdout.flush()

    def _painted(self, line: Line) -> str:
        sgr = _SGR[line.style] if self._coloured else ""
        return f"{sgr}{line.text}{_RESET}" if sgr else line.text

    def _take(self) -> None:
        tty.setcbreak(sys.stdin, termios.TCSANOW)
        sys.stdout.write(_ENTER)
        sys.stdout.flush()

    def _give_back(self) -> None:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, self._before)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here again when the job goes on.
        signal.signal(number, self._stop)
        self._take()
