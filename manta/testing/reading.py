"""A reader of a mount as a process of its own, here and only here: told to go, waited for with a deadline, ended whatever it waits for.

    with Reading(folder, paths) as reading:
        reading.go()
        found = reading.result(timeout_s=60)

Used by `manta.testing.cluster` and those who use that.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from manta.errors import Unavailable
from manta.testing import reader, scratch

START_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0


class Found(msgspec.Struct, frozen=True):
    """What a reader found; see `manta.testing.reader`."""

    began: float
    ended: float
    bytes: int
    cpu_s: float
    digests: dict[str, str]
    error: str

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Reading:
    """A running reader of files below `folder`; whatever is mounted there is aborted where the reader cannot be ended otherwise."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder = folder
        command = [sys.executable, "-S", "-E", "-P", reader.__file__, *map(str, paths)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
        self._said = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def go(self) -> None:
        """It begins to read. Before, it is waited for until it can."""
        if self._line(START_TIMEOUT_S) != b"ready":
            raise Unavailable("A reader did not start.")
        assert self._process.stdin
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self, timeout_s: float) -> Found:
        """Raises Unavailable where it has not ended in time."""
        line = self._line(timeout_s)
        if not line:
            raise Unavailable(f"A reader was still waiting after {timeout_s:g} s, or was killed.")
        return msgspec.json.decode(line, type=Found)

    def close(self) -> None:
        """Ends it, also where it waits in the kernel for a mount that does not answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if self._process.returncode is None:
            for device in scratch.fuse_devices(self._folder):
                scratch.abort(device)
            self._process.wait(END_TIMEOUT_S)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _line(self, timeout_s: float) -> bytes:
        """The next line that it says; empty where none comes in time."""
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._said:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(descriptor, 65536) if ready else b""
            if not piece:
                return b""
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return line
