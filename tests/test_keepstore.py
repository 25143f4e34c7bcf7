"""manta.keepstore, run as it is run: by path, with this process as the daemons that come, deposit, go and come again."""

from __future__ import annotations

import ast
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest

from manta import keepstore

TIMEOUT_S = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


class Toy:
    """A daemon, as the keeper sees one: a connection."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def tell(self, message: str, *fds: int) -> None:
        socket.send_fds(self.socket, [message.encode()], fds)

    def hear(self) -> tuple[str, dict[str, str]]:
        """A message, and the contents of the descriptors that came with it, by name."""
        data, fds, _, _ = socket.recv_fds(self.socket, 4096, 16)
        text = data.decode()
        names = text.partition("LISTEN_FDNAMES=")[2].split(":") if fds else []
        contents = {name: os.pread(fd, 100, 0).decode() for name, fd in zip(names, fds, strict=True)}
        for fd in fds:
            os.close(fd)
        return text, contents

    def take(self) -> dict[str, str]:
        self.tell("TAKE=1")
        text, kept = self.hear()
        assert text.startswith(f"LISTEN_FDS={len(kept)}\n")
        return kept

    def store(self, name: str, content: str) -> None:
        fd = os.memfd_create("toy")
        os.write(fd, content.encode())
        self.tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)
        os.close(fd)

    def barrier(self) -> None:
        ours, theirs = os.pipe()
        self.tell("BARRIER=1", theirs)
        os.close(theirs)
        assert select.select([ours], [], [], TIMEOUT_S)[0]
        os.close(ours)

    def has_answer(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])


class Store:
    """The keeper."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started: list[subprocess.Popen[str]] = []

    def start(self, give_up_after_s: float = 60.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            keepstore.command_line(str(self.path), give_up_after_s),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "keeps at" in line, line
        return process

    def daemon(self) -> Toy:
        return Toy(self.path)


@pytest.fixture
def store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="manta-keep-") as folder:
        made = Store(Path(folder) / "below/keeper.sock")
        yield made
        for process in made.started:
            process.kill()
            process.communicate(timeout=TIMEOUT_S)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said


def deposit(store: Store, **contents: str) -> Toy:
    """A daemon that is ready, and has deposited these."""
    daemon = store.daemon()
    daemon.take()
    for name, content in contents.items():
        daemon.store(name, content)
    daemon.tell("READY=1")
    daemon.barrier()
    return daemon


def test_it_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(Path(keepstore.__file__).read_text())
    modules = {
        name.split(".")[0]
        for found in ast.walk(tree)
        if isinstance(found, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in found.names] if isinstance(found, ast.Import) else [found.module or "relative"]
        )
    }
    assert modules <= sys.stdlib_module_names


def test_what_one_daemon_left_the_next_one_gets_and_the_one_after(store: Store) -> None:
    store.start()
    with deposit(store, fuse="f", journal="old") as first:
        first.store("journal", "new")
        first.barrier()
    with store.daemon() as second:
        assert second.take() == {"fuse": "f", "journal": "new"}
        second.store("third", "t")
        second.tell("FDSTOREREMOVE=1\nFDNAME=fuse")
        second.barrier()
    with store.daemon() as third:
        assert third.take() == {"journal": "new", "third": "t"}


def test_two_daemons_never_have_what_is_kept_at_the_same_time(store: Store) -> None:
    store.start()
    with deposit(store, fuse="f") as first, store.daemon() as second, store.daemon() as third:
        for waiting in (second, third):
            waiting.tell("TAKE=1")
            assert waiting.hear() == ("WAIT=1", {})
        second.store("fuse", "forged")
        second.tell("STOPPING=1")
        second.barrier()  # it was read
        assert not second.has_answer()
        first.socket.close()
        assert second.hear()[1] == {"fuse": "f"}
        second.barrier()
        assert not third.has_answer()
        second.socket.close()
        assert third.hear()[1] == {"fuse": "f"}


def test_who_waits_and_goes_is_passed_over(store: Store) -> None:
    store.start()
    with deposit(store, fuse="f") as first, store.daemon() as second, store.daemon() as third:
        for waiting in (second, third):
            waiting.tell("TAKE=1")
            waiting.hear()
        second.socket.close()
        first.socket.close()
        assert third.hear()[1] == {"fuse": "f"}


def test_a_connection_that_asks_for_nothing_gets_nothing_and_counts_for_nothing(store: Store) -> None:
    process = store.start(give_up_after_s=60)
    with deposit(store, fuse="f"), store.daemon():
        pass
    with store.daemon() as silent, store.daemon() as second:
        assert second.take() == {"fuse": "f"}
        assert not silent.has_answer()
        second.tell("READY=1")
        second.barrier()
    with store.daemon() as third:
        assert third.take() == {"fuse": "f"}
    process.kill()
    assert ended(process)[1].count("the daemon is gone") == 2, "and the third was not ready"


def test_after_stopping_nothing_is_kept(store: Store) -> None:
    process = store.start()
    with deposit(store, fuse="f") as first:
        first.tell("STOPPING=1")
    with store.daemon() as second:
        assert second.take() == {}
    process.terminate()
    assert ended(process)[0] == 0, "and so nobody is waited for"


def test_who_waits_for_a_daemon_that_never_comes_is_freed(store: Store) -> None:
    process = store.start(give_up_after_s=0.3)
    ours, theirs = os.pipe()
    with store.daemon() as first:
        first.take()
        first.tell("FDSTORE=1\nFDNAME=pipe\nFDPOLL=0", theirs)
        os.close(theirs)
        first.tell("READY=1")
        first.barrier()
        assert not select.select([ours], [], [], 0)[0]
    assert os.read(ours, 1) == b""
    os.close(ours)
    with store.daemon() as second:
        assert second.take() == {}
    process.terminate()
    assert "no daemon was ready for 0.3 s: pipe let go" in ended(process)[1]


def test_daemons_that_come_and_never_are_ready_are_given_up_too(store: Store) -> None:
    """Each that is not ready leaves the others' time as it was; the one that is there then loses its connection, and deposits anew."""
    store.start(give_up_after_s=0.4)
    deposit(store, fuse="f").socket.close()
    with store.daemon() as second:
        assert second.take() == {"fuse": "f"}
    with store.daemon() as third:
        assert third.take() == {"fuse": "f"}
        assert third.hear() == ("", {})
    with store.daemon() as fourth:
        assert fourth.take() == {}


def test_a_daemon_that_is_ready_stays_as_long_as_it_likes(store: Store) -> None:
    store.start(give_up_after_s=0.3)
    deposit(store, fuse="f").socket.close()
    with store.daemon() as second:
        assert second.take() == {"fuse": "f"}
        second.tell("READY=1")
        second.barrier()
        assert not select.select([second.socket], [], [], 0.6)[0]
        second.barrier()
    with store.daemon() as third:
        assert third.take() == {"fuse": "f"}


def test_there_are_bounds_on_what_it_keeps_and_on_who_connects(store: Store) -> None:
    process = store.start()
    with store.daemon() as first:
        first.take()
        for number in range(20):
            first.store(f"m{number}", str(number))
        first.store("a:b", "")
        first.store("x" * 100, "")
        first.tell("FDSTORE=1\nFDNAME=none")
        first.tell("FDSTORE=1\nFDNAME=m0\n" + "X" * 5000, 0)
        first.tell("READY=1\nSTATUS=whatever\nMAINPID=1\n=\n\n")
        first.barrier()
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 3 + 16 + 8, "nothing that was sent and not kept is open"
        with_it = [store.daemon() for _ in range(keepstore.CONNECTIONS_MAX)]
        assert with_it[-1].socket.recv(10) == b"", "one too many"
        for toy in with_it:
            toy.socket.close()
    with store.daemon() as second:
        assert second.take() == {f"m{number}": str(number) for number in range(16)}


def test_a_killed_keeper_s_socket_is_replaced_and_a_living_ones_is_not(store: Store) -> None:
    first = store.start()
    refused = subprocess.run(
        keepstore.command_line(str(store.path)), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert refused.returncode == 1
    assert "Another keeper listens" in refused.stderr
    first.kill()
    first.wait()
    assert store.path.exists()
    second = store.start()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700
    with store.daemon() as daemon:
        assert daemon.take() == {}
    second.terminate()
    assert ended(second)[0] == 0
    assert not store.path.exists()


@pytest.mark.parametrize("path", ["relative", f"/tmp/{'x' * 120}"])
def test_a_path_that_cannot_be_is_a_sentence(path: str) -> None:
    done = subprocess.run(
        keepstore.command_line(path), capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd="/"
    )
    assert done.returncode == 1
    assert "absolute and have 107 bytes" in done.stderr


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = subprocess.run(
        keepstore.command_line(str(tmp_path / "file")), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 1
    assert "is no socket" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_end_it_leaves_at_once_where_a_daemon_has_everything(store: Store, number: signal.Signals) -> None:
    process = store.start()
    with deposit(store, fuse="f") as daemon:
        process.send_signal(number)
        assert ended(process)[0] == 0
        assert daemon.hear() == ("", {}), "which sees it"
        assert not store.path.exists()


def test_told_to_end_it_stays_while_it_alone_has_what_is_kept(store: Store) -> None:
    """Daemon and keeper replaced at the same time: whichever order it takes, nothing is lost."""
    process = store.start()
    deposit(store, fuse="f").socket.close()
    process.terminate()
    assert process.stderr is not None
    until(lambda: "staying" in process.stderr.readline())  # type: ignore[union-attr]
    with store.daemon() as second:
        assert second.take() == {"fuse": "f"}
        assert process.poll() is None
        second.tell("READY=1")
        assert process.wait(timeout=TIMEOUT_S) == 0
        assert second.hear() == ("", {})


def test_told_twice_it_goes(store: Store) -> None:
    process = store.start()
    deposit(store, fuse="f").socket.close()
    process.terminate()
    assert process.stderr is not None
    until(lambda: "staying" in process.stderr.readline())  # type: ignore[union-attr]
    process.terminate()
    assert process.wait(timeout=TIMEOUT_S) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_another_user_is_refused(store: Store) -> None:
    process = store.start()
    for path in (store.path, store.path.parent, store.path.parent.parent):
        path.chmod(0o777)
    script = """
import os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
    asking.connect(sys.argv[1])
    print(asking.recv(9))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(store.path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.stdout == "b''\n" or "ConnectionResetError" in done.stderr
    process.terminate()
    assert "user 65534 is refused" in ended(process)[1]
