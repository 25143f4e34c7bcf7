"""manta.cli.top: one frame where there is no terminal; on a terminal it is live, and gives the terminal back."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon


def test_without_a_terminal_one_frame_is_printed(manta: Manta, daemon: FakeDaemon, place: Path) -> None:
    manta("mount", "org/name", place / "here")
    for arguments in (("top",), ("top", "--once")):
        done = manta(*arguments)
        assert done.code == 0
        assert str(place / "here") in done.out
        assert "\x1b" not in done.out
    assert manta("top", "--json").json == manta("status", "--json").json


def test_no_daemon_is_code_3(manta: Manta) -> None:
    done = manta("top", "--once")
    assert done.code == 3
    assert "No Manta daemon runs" in done.err


class Terminal:
    """`manta top` on a pseudo terminal of 24 lines and 100 columns, in a child."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # the child: nothing of this process but its environment matters any more
            os.execve(sys.executable, [sys.executable, "-m", "manta", "top"], {**os.environ, **environment})
        self.resize(24, 100)
        self.seen = ""
        self.code: int | None = None

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def wait_for(self, words: str) -> str:
        """Returns what was written from now on up to where `words` came."""
        self.seen, deadline = "", time.monotonic() + 30
        while words not in self.seen:
            assert time.monotonic() < deadline, f"{words!r} did not come: {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
        return self.seen

    def end(self) -> int:
        """The exit code."""
        while self.code is None:
            try:
                os.read(self.fd, 65536)  # whoever has unread output cannot end
            except OSError:
                self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@contextmanager
def terminal(**environment: str) -> Iterator[Terminal]:
    opened = Terminal({"TERM": "xterm", **environment})
    try:
        yield opened
    finally:
        if opened.code is None:
            os.kill(opened.pid, 9)
            opened.end()
        os.close(opened.fd)


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_it_is_live_follows_the_screens_size_and_gives_the_terminal_back(
    daemon: FakeDaemon, key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.errors = ["The hub was gone."]
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal() as screen:
        before = termios.tcgetattr(screen.fd)
        first = screen.wait_for("The hub was gone.")
        assert "\x1b[?1049h" in first
        assert "\x1b[31m" in first
        daemon.errors = ["Another error."]
        screen.wait_for("Another error.")
        screen.resize(3, 20)
        title = f"manta 0.1.0, pid {os.getpid()}, up"[:20]
        screen.wait_for(f"\x1b[H\x1b[2K\x1b[1m{title}\x1b[0m\r\n")
        screen.resize(24, 100)
        screen.wait_for("Another error.")
        screen.type(key)
        assert screen.wait_for("\x1b[?1049l").endswith("\x1b[?25h\x1b[?1049l")
        after = termios.tcgetattr(screen.fd)
        assert after[3] == before[3], "echo and line editing are back"
        assert screen.end() == 0


def test_a_daemon_may_go_and_come_back(daemon: FakeDaemon) -> None:
    with terminal(NO_COLOR="1") as screen:
        assert "\x1b[1m" not in screen.wait_for("manta 0.1.0")
        path = daemon.socket_path
        daemon.__exit__()
        screen.wait_for("No Manta daemon answers")
        daemon.errors = ["Here again."]
        daemon.__enter__()
        assert daemon.socket_path == path
        screen.wait_for("Here again.")
        screen.wait_for("manta 0.1.0")
        assert "No Manta daemon" not in screen.wait_for("Here again.")
        screen.type(b"q")
        assert screen.end() == 0
