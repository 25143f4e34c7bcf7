"""How the CLI writes: sizes, rates, tables, the progress line and JSON, here and only here. Used by every command.

Answers go to stdout; progress, hints and errors to stderr, so that output can be piped while a person still sees what happens.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from manta.control.protocol import Mount

AMOUNT_COLUMNS = 42
"""Of "90.9 MB of 91.6 MB, 99.9 MB/s, 59 min 59 s left", nearly always."""
DETAIL_COLUMNS = 17
"""Of ", 1234/5678 files"."""
BAR_COLUMNS_MIN = 6

Clock = Callable[[], float]

REDRAW_S = 0.1
"""Between two drawings of the progress line on a terminal: smooth to the eye, nothing to the CPU."""

PLAIN_S = 5.0
"""Between two progress lines where there is no terminal: a log should tell that it goes on, and stay readable."""

RATE_WINDOW_S = 5.0
"""The rate shown is that of the last seconds: long enough to be steady, short enough to show a stall."""


def size(count: float) -> str:
    """Bytes as people read them on disks and networks: 1000 based, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def duration(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def share(done: int, total: int) -> str:
    """`done` of `total` in percent, rounded down: 100% means all of it."""
    return f"{100 * done // total}%" if total else "100%"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines with aligned columns. A column whose head begins with ">" is aligned to the right."""
    right = [name.startswith(">") for name in head]
    cells = [[name.removeprefix(">") for name in head], *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]


class Console:
    """Where one command writes. `as_json`: stdout carries one JSON document and nothing else."""

    def __init__(
        self,
        *,
        as_json: bool = False,
        verbosity: int = 0,
        out: IO[str] | None = None,
        err: IO[str] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        """-1 quiet, 0, 1 verbose, 2 with tracebacks."""
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._clock = clock

    def say(self, *lines: str) -> None:
        """What the command was asked for. Silent with --json, where `document` carries it."""
        if not self.as_json:
            for line in lines:
                print(line, file=self._out)

    def tell(self, line: str) -> None:
        """What a person may want to know beside it: what was done, what comes next. Silent with --quiet and --json."""
        if self.verbosity >= 0 and not self.as_json:
            print(line, file=self._out)

    def note(self, line: str) -> None:
        """A detail for --verbose, on stderr."""
        if self.verbosity >= 1:
            print(f"manta: {line}", file=self._err)

    def warn(self, line: str) -> None:
        """Something that is not as it should be, on stderr, also with --json."""
        if self.verbosity >= 0:
            print(f"manta: {line}", file=self._err)

    def fail(self, code: str, message: str) -> None:
        """The one error that ends the command: a sentence on stderr; with --json a document on stdout instead."""
        if self.as_json:
            self.document({"error": {"code": code, "message": message}})
        else:
            print(f"manta: {message}", file=self._err)

    def document(self, value: object) -> None:
        """The command's JSON document, with --json only. msgspec structs are allowed anywhere in it."""
        if self.as_json:
            import json

            print(json.dumps(value, ensure_ascii=False, default=_plain), file=self._out)

    def flush(self) -> None:
        """For what runs on after it has said something: a reader of the pipe must not wait for more."""
        self._out.flush()

    def progress(self, what: str) -> Progress:
        shown = self.verbosity >= 0 and not self.as_json
        return Progress(what, self._err if shown else None, self._clock)


def _plain(value: object) -> object:
    import msgspec

    return msgspec.to_builtins(value, str_keys=True, enc_hook=str)


def _columns(stream: IO[str]) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


class Progress:
    """One line that moves: redrawn in place on a terminal, a line every few seconds elsewhere, nothing when `stream` is None.

    It keeps its own record of bytes over time for the rate, and never waits: whoever polls calls `show` as often as it likes.
    """

    def __init__(self, what: str, stream: IO[str] | None, clock: Clock) -> None:
        self.what = what
        self._stream = stream
        self._clock = clock
        self._terminal = stream is not None and stream.isatty()
        # A terminal gets its line at once; a log only when there is something to tell.
        self._drawn_at = float("-inf") if self._terminal else clock()
        self._width = 0
        self._samples: deque[tuple[float, int]] = deque()

    def show(self, done: int, total: int, *, detail: str = "", last: bool = False) -> None:
        now = self._clock()
        rate_now = self._rate(now, done)
        if self._stream is None or (not last and now - self._drawn_at < (REDRAW_S if self._terminal else PLAIN_S)):
            return
        self._drawn_at = now
        left = ""
        if not last and rate_now > 0 and done < total:
            left = f", {duration((total - done) / rate_now)} left"
        amount = f"{size(done)} of {size(total)}, {rate(rate_now)}{left}"
        beside = f", {detail}" if detail else ""
        if not self._terminal:
            print(f"{self.what}: {share(done, total)}, {amount}{beside}", file=self._stream, flush=True)
            return
        columns = _columns(self._stream)
        # The bar's width depends on nothing that changes, or it would jump; the detail gets what is left.
        room = min(30, columns - len(self.what) - AMOUNT_COLUMNS - (DETAIL_COLUMNS if detail else 0) - 9)
        filled = room * done // total if total else room
        bar = f" [{'#' * filled}{'.' * (room - filled)}]" if room >= BAR_COLUMNS_MIN else ""
        line = f"{self.what}{bar} {share(done, total):>4} {amount}"
        line = (line + beside if len(line + beside) < columns else line)[: columns - 1]
        # Blanks erase what a longer line left; no escape codes, so any terminal does.
        self._stream.write(f"\r{line}{' ' * max(0, self._width - len(line))}")
        self._stream.flush()
        self._width = len(line)

    def end(self) -> None:
        """Leaves the line standing, and the cursor below it."""
        if self._terminal and self._stream is not None and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _rate(self, now: float, done: int) -> float:
        if len(self._samples) == 1 and self._samples[0][1] == done:
            self._samples.clear()  # the clock starts with the first byte
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()
        (then, before) = self._samples[0]
        return max(0.0, (done - before) / (now - then)) if now > then else 0.0


def mounted_on(mount: Mount) -> str:
    """Where a person finds a mount: its directory, or for a volume its pod, whose kubelet's directory nobody knows by heart."""
    return f"pod {mount.pod.namespace}/{mount.pod.name}" if mount.pod is not None else mount.directory
