"""manta.operations.keeping, against the real keeper and against a stand-in for systemd that speaks the same protocol."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
import trio

from manta import keeper
from manta.errors import Unavailable
from manta.operations import keeping as module
from manta.operations.keeping import Keeping

TIMEOUT_S = 30.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


class Systemd:
    """Process 1's side of a unit with FileDescriptorStoreMax=`room`: says nothing, keeps what it is given, drops the rest."""

    def __init__(self, place: Path, room: int) -> None:
        self.kept: list[tuple[str, int]] = []
        self.said: list[str] = []
        self.deaf = False
        self._room = room
        self._path = place / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self._path))
        self._stop, self._theirs = os.pipe()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._theirs)
        self._thread.join()
        os.close(self._stop)
        self._socket.close()
        for _name, fd in self.kept:
            os.close(fd)

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self._path), "PATH": "/bin"}

    def _serve(self) -> None:
        while self._stop not in select.select([self._socket.fileno(), self._stop], [], [])[0]:
            data, fds, _flags, _address = socket.recv_fds(self._socket, 4096, 16)
            if not self.deaf:
                self._obey(data.decode(), fds)
            else:
                self.kept.extend(("unread", fd) for fd in fds)

    def _obey(self, text: str, fds: list[int]) -> None:
        lines = dict(line.split("=", 1) for line in text.splitlines())
        name = lines.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in lines:
            for kept in [kept for kept in self.kept if kept[0] == name]:
                self.kept.remove(kept)
                os.close(kept[1])
        elif "FDSTORE" in lines:
            assert lines["FDPOLL"] == "0"
            for fd in fds:
                if len(self.kept) < self._room:
                    self.kept.append((name, fd))
                else:
                    os.close(fd)
            fds = []
        else:
            self.said.append(text)
        for fd in fds:
            os.close(fd)


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="manta-keep-") as folder:
        yield Path(folder)


@pytest.fixture
def systemd(place: Path) -> Iterator[Systemd]:
    with Systemd(place, room=3) as stand_in:
        yield stand_in


def memory(text: str) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    return fd


def test_without_anybody_there_is_nothing_to_do_and_it_is_said() -> None:
    environment = {"PATH": "/bin", "LISTEN_PID": "1", "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:c", "FDSTORE": "3"}
    keeping = Keeping.from_environment(environment)
    assert environment == {"PATH": "/bin"}, "what the protocol set is not for workers"
    assert (keeping.kind, keeping.inherited, keeping.problem) == ("none", {}, None)
    assert "mounts end with the daemon" in keeping.describe()
    keeping.ready()
    keeping.stopping()

    async def use() -> None:
        with pytest.raises(Unavailable, match="without a keeper"):
            await keeping.deposit("fuse", 0)
        await keeping.remove("fuse")
        await keeping.watch()

    trio.run(use)


@pytest.mark.parametrize("address", ["vsock:2:1234", "", "relative"])
def test_an_address_that_nobody_understands_is_none(address: str) -> None:
    assert Keeping.from_environment({"NOTIFY_SOCKET": address}).kind == "none"


def test_what_is_inherited_has_its_names_and_is_not_passed_on(place: Path) -> None:
    script = """
import json, os, sys
from manta.operations.keeping import Keeping
os.environ["LISTEN_PID"] = str(os.getpid())
keeping = Keeping.from_environment()
print(json.dumps([keeping.kind, {name: os.pread(fd, 9, 0).decode() for name, fd in keeping.inherited.items()},
    [os.get_inheritable(fd) for fd in keeping.inherited.values()], sorted(keeping.kept), [n for n in os.environ if "LISTEN" in n]]))
os.fstat(5)  # the probe of a daemon that died with it, which is closed
"""
    fuse, journal, probe = memory("fuse"), memory("journal"), memory("probe")
    for at, fd in enumerate((fuse, journal, probe), 200):
        os.dup2(fd, at)
        os.close(fd)
    try:
        done = subprocess.run(
            [
                "bash",
                "-c",
                'exec 3<&200 4<&201 5<&202 200<&- 201<&- 202<&-; exec "$@"',
                "-",
                sys.executable,
                "-c",
                script,
            ],
            pass_fds=(200, 201, 202),
            env={
                **os.environ,
                "LISTEN_FDS": "3",
                "LISTEN_FDNAMES": "fuse:journal:probe",
                "NOTIFY_SOCKET": str(place / "x"),
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        for fd in (200, 201, 202):
            os.close(fd)
    assert json.loads(done.stdout) == [
        "systemd",
        {"fuse": "fuse", "journal": "journal"},
        [False, False],
        ["fuse", "journal"],
        [],
    ]
    assert "Bad file descriptor" in done.stderr


# systemd -------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_systemd_keeps_what_it_is_given(systemd: Systemd) -> None:
    fuse, journal, other = memory("fuse"), memory("journal"), memory("other")
    try:
        with Keeping.from_environment(systemd.environment) as keeping:
            await keeping.deposit("fuse", fuse)
            await keeping.deposit("journal", journal)
            assert [name for name, _ in systemd.kept] == ["fuse", "journal"]
            assert os.pread(systemd.kept[0][1], 9, 0) == b"fuse"
            await keeping.deposit("journal", other)
            assert [name for name, _ in systemd.kept] == ["fuse", "journal"], "it would keep two of one name"
            assert os.pread(systemd.kept[1][1], 9, 0) == b"other"
            assert keeping.describe() == "systemd, holds fuse, journal"
            keeping.ready()
            await keeping.remove("journal")
            assert [name for name, _ in systemd.kept] == ["fuse"]
            keeping.stopping()
            until(lambda: systemd.said[-1:] == ["STOPPING=1"])
            assert systemd.kept == [], "systemd would give it to the daemon that `systemctl restart` starts"
            assert [text for text in systemd.said if text != "BARRIER=1"] == ["READY=1", "STOPPING=1"]
            assert keeping.problem is None
            await keeping.watch()
    finally:
        for fd in (fuse, journal, other):
            os.close(fd)


@pytest.mark.trio
async def test_a_unit_that_keeps_nothing_is_found_out(place: Path) -> None:
    with Systemd(place, room=0) as systemd, Keeping.from_environment(systemd.environment) as keeping:
        with pytest.raises(Unavailable, match="FileDescriptorStoreMax"):
            await keeping.deposit("fuse", 0)
        assert "will not outlive the daemon" in (keeping.problem or "")
        assert keeping.kept == frozenset()
        assert keeping.describe() == "systemd, holds nothing"


@pytest.mark.trio
async def test_a_unit_that_keeps_too_little_is_found_out_and_what_it_keeps_stays(place: Path) -> None:
    with Systemd(place, room=1) as systemd, Keeping.from_environment(systemd.environment) as keeping:
        await keeping.deposit("fuse", 0)
        with pytest.raises(Unavailable, match="or not enough"):
            await keeping.deposit("journal", 0)
        assert keeping.kept == {"fuse"}
        assert keeping.problem
        await keeping.remove("journal")
        assert not keeping.problem, "nobody wants it kept any more"


@pytest.mark.trio
async def test_who_does_not_answer_is_not_waited_for(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.1)
    with Keeping.from_environment(systemd.environment) as keeping:
        await keeping.deposit("fuse", 0)
        systemd.deaf = True
        with pytest.raises(Unavailable, match="did not take journal"):
            await keeping.deposit("journal", 0)
        with pytest.raises(Unavailable, match="does not let go of fuse"):
            await keeping.remove("fuse")


# Manta's own keeper --------------------------------------------------------------------------------------------------

DAEMON = """
import json, os, signal, sys
import trio
from manta.operations import keeping as module
from manta.operations.keeping import Keeping
place = sys.argv[1]
keeping = Keeping.from_environment(command=json.loads(os.environ["TEST_COMMAND"]))

def note(**said):
    with open(place + "/notes", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **said}) + chr(10))

def read(fd):
    return os.pread(fd, 100, 0).decode()

def memory(text):
    fd = os.memfd_create("test")
    os.write(fd, text.encode())
    return fd

def say():
    note(kind=keeping.kind, describes=keeping.describe(), kept=sorted(keeping.kept), problem=keeping.problem,
         keeper=keeping._keeper_pid, inherited={name: read(fd) for name, fd in keeping.inherited.items()})

async def main():
"""


class Kept:
    def __init__(self, place: Path) -> None:
        self.place = place

    def start(self, body: str) -> subprocess.Popen[str]:
        indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
        (self.place / "daemon.py").write_text(f"{DAEMON}{indented}\n\ntrio.run(main)\n")
        command = [sys.executable, str(self.place / "daemon.py"), str(self.place)]
        self.process = subprocess.Popen(
            keeper.command_line(str(self.place), command),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TEST_COMMAND": json.dumps(command), "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        return self.process

    @property
    def notes(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (self.place / "notes").read_text().splitlines()]
        return []

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        until(lambda: len(self.notes) >= count)
        return self.notes

    def end(self) -> None:
        self.process.kill()
        mark = os.fsencode(self.place)
        while alive := [
            pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if mark in _command_of(pid)
        ]:
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.communicate(timeout=TIMEOUT_S)


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def kept(place: Path) -> Iterator[Kept]:
    all_of_it = Kept(place)
    yield all_of_it
    all_of_it.end()


def test_a_killed_daemon_is_followed_by_one_that_has_what_it_deposited(kept: Kept) -> None:
    process = kept.start(
        """
if not keeping.inherited:
    await keeping.deposit("fuse", memory("f"))
    await keeping.deposit("journal", memory("old"))
    await keeping.deposit("journal", memory("new"))
    await keeping.deposit("else", memory("x"))
    await keeping.remove("else")
    keeping.ready()
    say()
    os.kill(os.getpid(), signal.SIGKILL)
await keeping.deposit("fuse", keeping.inherited["fuse"])
keeping.ready()
say()
keeping.stopping()
sys.exit(1)
"""
    )
    _, said = process.communicate(timeout=TIMEOUT_S)
    first, second = kept.notes
    assert first["kind"] == "keeper"
    assert first["kept"] == second["kept"] == ["fuse", "journal"]
    assert first["describes"] == f"pid {process.pid}, holds fuse, journal"
    assert second["inherited"] == {"fuse": "f", "journal": "new"}
    assert process.returncode == 1, said


def test_when_the_keeper_is_killed_another_gets_everything(kept: Kept) -> None:
    process = kept.start(
        """
async with trio.open_nursery() as nursery:
    nursery.start_soon(keeping.watch)
    if not keeping.inherited:
        await keeping.deposit("fuse", memory("f"))
        await keeping.deposit("journal", memory("j"))
    keeping.ready()
    say()
    before = keeping._keeper_pid
    while keeping._keeper_pid == before or len(keeping.kept) < max(2, len(keeping.inherited)):
        await trio.sleep(0.01)
    say()
    if keeping.inherited:
        keeping.stopping()
        nursery.cancel_scope.cancel()
    else:
        await keeping.deposit("third", memory("t"))
        os.kill(os.getpid(), signal.SIGKILL)
"""
    )
    kept.wait_for(1)
    process.kill()
    _first, second, third = kept.wait_for(3)
    assert second["keeper"] not in {process.pid, 0}
    assert second["kept"] == ["fuse", "journal"]
    assert second["problem"] is None
    assert third["keeper"] == second["keeper"], "which started the next daemon"
    assert third["inherited"] == {"fuse": "f", "journal": "j", "third": "t"}
    os.kill(third["keeper"], signal.SIGKILL)
    fourth = kept.wait_for(4)[3]
    assert fourth["kept"] == ["fuse", "journal", "third"], "what was inherited and left alone is deposited again too"
    until(lambda: not list(kept.place.glob("keep.*")))


def test_a_keeper_that_cannot_be_replaced_is_a_problem_until_it_can(kept: Kept) -> None:
    process = kept.start(
        """
module.PAUSE_S_MAX = 0.05
lines = module.keeper.command_line
module.keeper.command_line = lambda *given: ["/bin/false"]
async with trio.open_nursery() as nursery:
    nursery.start_soon(keeping.watch)
    await keeping.deposit("fuse", memory("f"))
    keeping.ready()
    say()
    while not keeping.problem:
        await trio.sleep(0.01)
    say()
    module.DEADLINE_S = 0.2
    try:
        await keeping.deposit("journal", memory("j"))
    except module.Unavailable as error:
        note(refused=error.message)
    module.DEADLINE_S = 10
    module.keeper.command_line = lines
    await keeping.deposit("journal", memory("j"))
    say()
    keeping.stopping()
    nursery.cancel_scope.cancel()
"""
    )
    kept.wait_for(1)
    process.kill()
    _, second, third, fourth = kept.wait_for(4)
    assert "another one cannot be started" in second["problem"]
    assert second["describes"].startswith("gone")
    assert "journal" in third["refused"]
    assert fourth["problem"] is None
    assert fourth["kept"] == ["fuse", "journal"]


def test_a_keeper_that_dies_while_the_daemon_ends_is_not_replaced(kept: Kept) -> None:
    process = kept.start(
        """
async with trio.open_nursery() as nursery:
    nursery.start_soon(keeping.watch)
    keeping.ready()
    keeping.stopping()
    pidfd = os.pidfd_open(keeping._keeper_pid)
    say()
    await trio.lowlevel.wait_readable(pidfd)
    await trio.sleep(0.1)
note(over=True)
"""
    )
    (note,) = kept.wait_for(1)
    process.kill()
    assert kept.wait_for(2)[1] == {"pid": note["pid"], "over": True}
    assert not [
        pid
        for pid in Path("/proc").glob("[0-9]*")
        if b"--adopt" in _command_of(int(pid.name)) and str(kept.place).encode() in _command_of(int(pid.name))
    ]
