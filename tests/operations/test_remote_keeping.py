"""manta.operations.remote_keeping, against the real keeper: found, lost, replaced, busy, absent."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from manta import keepstore
from manta.errors import InUse, Unavailable
from manta.operations import keeping as deposits
from manta.operations.remote_keeping import RemoteKeeping

TIMEOUT_S = 20.0


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="manta-keep-") as folder:
        yield Path(folder) / "keeper.sock"


@contextmanager
def keeper(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        keepstore.command_line(str(path)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=TIMEOUT_S)


@contextmanager
def memory(text: str) -> Iterator[int]:
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    try:
        yield fd
    finally:
        os.close(fd)


def taken(path: Path) -> dict[str, str]:
    """What the next daemon gets, which goes without a word."""
    with RemoteKeeping.find(path) as keeping:
        contents = {name: os.pread(fd, 100, 0).decode() for name, fd in keeping.inherited.items()}
        for fd in keeping.inherited.values():
            assert not os.get_inheritable(fd)
            os.close(fd)
    return contents


async def until_kept(keeping: RemoteKeeping, *names: str) -> None:
    with trio.fail_after(TIMEOUT_S):
        while keeping.kept != set(names) or keeping.problem:
            await trio.sleep(0.01)


@pytest.mark.trio
async def test_what_is_deposited_comes_to_the_next_daemon(path: Path) -> None:
    with keeper(path), memory("f") as fuse, memory("old") as old, memory("new") as new:
        with RemoteKeeping.find(path) as keeping:
            assert (keeping.kind, keeping.inherited, keeping.problem) == ("store", {}, None)
            await keeping.deposit("fuse", fuse)
            await keeping.deposit("journal", old)
            await keeping.deposit("journal", new)
            await keeping.deposit("else", new)
            await keeping.remove("else")
            keeping.ready()
            assert keeping.describe() == f"{path}, holds fuse, journal"
        assert taken(path) == {"fuse": "f", "journal": "new"}
        assert taken(path) == {"fuse": "f", "journal": "new"}, "who ends without a word leaves it"
        with RemoteKeeping.find(path) as keeping:
            assert keeping.kept == {"fuse", "journal"}
            for fd in keeping.inherited.values():
                os.close(fd)
            keeping.stopping()
        assert taken(path) == {}


@pytest.mark.trio
async def test_a_keeper_that_is_replaced_gets_everything_again(path: Path) -> None:
    with memory("f") as fuse, memory("j") as journal, keeper(path) as first, RemoteKeeping.find(path) as keeping:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeping.watch)
            await keeping.deposit("fuse", fuse)
            await keeping.deposit("journal", journal)
            keeping.ready()
            first.terminate()
            await trio.to_thread.run_sync(first.wait)
            with trio.fail_after(TIMEOUT_S):
                while not keeping.problem:
                    await trio.sleep(0.01)
            assert "mounts end with the daemon" in keeping.problem
            assert keeping.describe() == f"none at {path}, looked for"
            assert keeping.kept == frozenset()
            with keeper(path) as second:
                await until_kept(keeping, "fuse", "journal")
                # It knows that this one is ready: told to end, it does not wait for another.
                await keeping.deposit("fuse", fuse)
                second.terminate()
                await trio.to_thread.run_sync(second.wait)
            with keeper(path):
                await until_kept(keeping, "fuse", "journal")
                nursery.cancel_scope.cancel()
                keeping.__exit__()
                assert await trio.to_thread.run_sync(taken, path) == {"fuse": "f", "journal": "j"}


@pytest.mark.trio
async def test_without_a_keeper_it_begins_and_says_so_and_deposits_when_one_comes(path: Path) -> None:
    with memory("f") as fuse, RemoteKeeping.find(path, appear_s=0.0) as keeping:
        assert f"No keeper answers at {path}" in (keeping.problem or "")
        keeping.ready()
        with pytest.raises(Unavailable, match="manta keeper"):
            await keeping.deposit("fuse", fuse)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeping.watch)
            with keeper(path):
                await until_kept(keeping, "fuse")
                nursery.cancel_scope.cancel()
                keeping.__exit__()
                assert await trio.to_thread.run_sync(taken, path) == {"fuse": "f"}


def test_a_keeper_that_comes_late_is_waited_for(path: Path) -> None:
    found: list[str] = []

    def find() -> None:
        with RemoteKeeping.find(path, appear_s=TIMEOUT_S) as keeping:
            found.append(keeping.describe())

    finding = threading.Thread(target=find)
    finding.start()
    with keeper(path):
        finding.join(timeout=TIMEOUT_S)
    assert found == [f"{path}, holds nothing"]


@pytest.mark.trio
async def test_another_daemon_is_waited_for_and_not_for_ever(path: Path) -> None:
    with keeper(path), memory("f") as fuse:
        with RemoteKeeping.find(path) as first:
            await first.deposit("fuse", fuse)
            first.ready()
            with pytest.raises(InUse, match=r"another daemon, which did not end within 0\.1 s"):
                RemoteKeeping.find(path, handover_s=0.1)
            kept: list[dict[str, str]] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, lambda: kept.append(taken(path)))
                await trio.sleep(0.1)
                assert kept == []
                first.__exit__()
        assert kept == [{"fuse": "f"}]


@pytest.mark.trio
async def test_a_keeper_that_hangs_is_asked_again_and_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deposits, "DEADLINE_S", 0.1)
    with RemoteKeeping.find(path, appear_s=0.0) as keeping, memory("f") as fuse:
        with pytest.raises(Unavailable):
            await keeping.deposit("fuse", fuse)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeping.watch)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as mute:
                mute.bind(str(path))
                mute.listen()
                with trio.fail_after(TIMEOUT_S):
                    while "or hangs" not in (keeping.problem or ""):
                        await trio.sleep(0.01)
            path.unlink()
            monkeypatch.setattr(deposits, "DEADLINE_S", 5.0)
            with keeper(path):
                await until_kept(keeping, "fuse")
                nursery.cancel_scope.cancel()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_who_is_another_user_gets_nothing(path: Path) -> None:
    path.parent.chmod(0o777)
    script = (
        "import os, socket, sys\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "s.bind(sys.argv[1]); s.listen(); print(1, flush=True); print(s.accept()[0].recv(9))"
    )
    with subprocess.Popen([sys.executable, "-S", "-c", script, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        began = time.monotonic()
        with RemoteKeeping.find(path, appear_s=0.0) as keeping:
            assert keeping.problem
        assert time.monotonic() - began < TIMEOUT_S
        assert process.stdout.readline() == b"b''\n"
