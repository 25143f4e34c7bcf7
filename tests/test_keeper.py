"""manta.keeper, run as it is run: by path, with toy daemons that deposit, crash, hang, flood and are adopted."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from manta import keeper

KEEPER = Path(keeper.__file__)
TIMEOUT_S = 30.0

TOY = """
import json, os, select, signal, socket, subprocess, sys, time
place = sys.argv[1]

def note(**said):
    with open(place + "/notes", "a") as file:
        file.write(json.dumps({"pid": os.getpid(), **said}) + chr(10))

def tell(message, *fds):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(os.environ["NOTIFY_SOCKET"])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, sys.byteorder) for fd in fds))]
        sock.sendmsg([message if isinstance(message, bytes) else message.encode()], rights if fds else [])

def store(name, fd):
    tell(f"FDSTORE=1\\nFDNAME={name}\\nFDPOLL=0", fd)

def barrier():
    ours, theirs = os.pipe()
    tell("BARRIER=1", theirs)
    os.close(theirs)
    assert select.select([ours], [], [], 20)[0] and os.read(ours, 1) == b""

def memory(text):
    fd = os.memfd_create("toy")
    os.write(fd, text.encode())
    return fd

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def sleep():
    while True:
        signal.pause()

inherited = {}
if "LISTEN_FDS" in os.environ:
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    names = os.environ["LISTEN_FDNAMES"].split(":")
    assert len(names) == int(os.environ["LISTEN_FDS"])
    inherited = {name: 3 + at for at, name in enumerate(names)}
listed = os.listdir("/proc/self/fd")
descriptors = sorted(int(fd) for fd in listed if os.path.exists(f"/proc/self/fd/{fd}"))  # all but the listing's own
try:
    life = 1 + open(place + "/notes").read().count('"life"')
except FileNotFoundError:
    life = 1
note(life=life, argv=sys.argv[3:], fds=descriptors, session=os.getsid(0), parent=os.getppid(),
     told={name: os.pread(fd, 100, 0).decode() for name, fd in inherited.items() if name.startswith("m")},
     names=list(inherited))
"""

PATCHED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("keeper", sys.argv[1])
keeper = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keeper)
for name, value in {constants!r}.items():
    setattr(keeper, name, value)
del sys.argv[0]
sys.exit(keeper.main())
"""


class Kept:
    """Starts keepers of toy daemons, and ends them all."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._running: list[subprocess.Popen[str]] = []

    def command(self, body: str) -> list[str]:
        script = self.place / "toy.py"
        script.write_text(TOY + body)
        return [sys.executable, "-S", str(script), str(self.place)]

    def start(self, body: str, *options: str, fds: tuple[int, ...] = (), **constants: float) -> subprocess.Popen[str]:
        command = keeper.command_line(str(self.place), self.command(body), *options)
        if constants:
            at = command.index(str(KEEPER))
            command[at:at] = ["-c", PATCHED.format(constants=constants)]
        return self.popen(command, fds)

    def popen(self, command: list[str], fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, pass_fds=fds, start_new_session=True
        )
        self._running.append(process)
        return process

    @property
    def notes(self) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            return [
                json.loads(line)
                for line in (self.place / "notes").read_text().splitlines(keepends=True)
                if line[-1:] == "\n"
            ]
        return []

    @property
    def lives(self) -> list[dict[str, Any]]:
        return [note for note in self.notes if "life" in note]

    def wait_for(self, what: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        until(lambda: what(self.notes))
        return self.notes

    @property
    def sockets(self) -> list[Path]:
        return list(self.place.glob("keep.*"))

    def end(self) -> None:
        for process in self._running:
            process.kill()
        # A daemon whose keeper is killed lives on, and may start another.
        mark = os.fsencode(self.place)
        while alive := [pid for pid in _processes() if mark in _command_of(pid)]:
            for pid in alive:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self._running:
            process.communicate(timeout=TIMEOUT_S)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and what was said."""
    _, said = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, said


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    all_of_it = Kept(tmp_path)
    yield all_of_it
    all_of_it.end()


def test_it_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse(KEEPER.read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules <= sys.stdlib_module_names


def test_what_a_daemon_deposited_comes_to_the_next_one_and_the_one_after(kept: Kept) -> None:
    process = kept.start(
        """
if life == 1:
    store("m1", memory("one")); store("m2", memory("two")); tell("READY=1"); barrier(); die()
if life == 2:
    store("m2", memory("changed")); store("m3", memory("three")); tell("FDSTOREREMOVE=1\\nFDNAME=m1"); tell("READY=1"); sys.exit(9)
tell("READY=1")
"""
    )
    code, said = ended(process)
    first, second, third = kept.lives
    assert first["told"] == {}
    assert second["told"] == {"m1": "one", "m2": "two"}
    assert third["told"] == {"m2": "changed", "m3": "three"}
    assert code == 0
    assert "ended with status 137" in said
    assert "ended with status 9" in said
    assert kept.sockets == []


def test_a_daemon_has_its_own_session_and_the_descriptors_it_should_have(kept: Kept) -> None:
    process = kept.start(
        """
tell("READY=1")
if life == 1:
    store("a", memory("")); store("b", memory("")); barrier(); die()
"""
    )
    assert ended(process)[0] == 0
    first, second = kept.lives
    assert first["session"] == first["pid"]
    assert first["parent"] == process.pid
    assert (first["fds"], second["fds"]) == ([0, 1, 2], [0, 1, 2, 3, 4])


def test_status_75_asks_for_another_also_with_nothing_kept(kept: Kept) -> None:
    code, said = ended(kept.start("tell('READY=1'); sys.exit(75 if life < 3 else 0)"))
    assert (code, len(kept.lives)) == (0, 3)
    assert "in 0 s" in said or "starts in 0 s" in said


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("sys.exit(3)", 3),
        ("store('m', memory('')); barrier(); die()", 137),  # before it was ready
        ("tell('READY=1'); sys.exit(4)", 4),  # nothing kept
        ("tell('READY=1'); store('m', memory('')); tell('STOPPING=1'); sys.exit(1)", 1),
        ("tell('READY=1'); store('m', memory('')); sys.exit(0)", 0),
        ("sys.exit(75)", 75),
    ],
)
def test_it_leaves_with_the_status_of_a_daemon_that_is_not_followed(kept: Kept, body: str, status: int) -> None:
    assert ended(kept.start(body))[0] == status
    assert len(kept.lives) == 1
    assert kept.sockets == []


def test_a_command_that_is_none_is_a_sentence(kept: Kept) -> None:
    code, said = ended(kept.popen(keeper.command_line(str(kept.place), ["/no/such/thing"])))
    assert code == 127
    assert "/no/such/thing cannot be started" in said


def test_the_descriptor_of_who_waits_goes_to_the_first_daemon_only(kept: Kept) -> None:
    ours, theirs = os.pipe()
    try:
        process = kept.start(
            """
tell("READY=1")
if life == 1:
    store("m", memory("")); barrier()
    os.write(int(sys.argv[3]) if sys.argv[2] == "--ready-fd" else -1, b"here")
    while not os.path.exists(place + "/go"):
        time.sleep(0.01)
    die()
sleep()
""",
            "--ready-fd",
            str(theirs),
            fds=(theirs,),
        )
        os.close(theirs)
        assert os.read(ours, 10) == b"here"
        (kept.place / "go").touch()
        assert os.read(ours, 10) == b"", "the keeper has it no more, and the second daemon never had"
    finally:
        os.close(ours)
    kept.wait_for(lambda notes: len(notes) == 2)
    first, second = kept.lives
    assert first["fds"] == [0, 1, 2, theirs]
    assert second["argv"] == []
    assert second["fds"] == [0, 1, 2, 3]
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM


# Giving up -----------------------------------------------------------------------------------------------------------

HOLDS_A_PIPE = """
if life == 1:
    ours, theirs = os.pipe()
    if not os.fork():
        # Somebody who waits for the mount.
        os.close(theirs)
        os.read(ours, 1)
        note(freed=True)
        os._exit(0)
    store("pipe", theirs); tell("READY=1"); barrier(); die()
"""


def test_a_crash_loop_ends_and_frees_who_waits(kept: Kept) -> None:
    code, said = ended(
        kept.start(f"{HOLDS_A_PIPE}\ntell('READY=1'); barrier(); sys.exit(7)", CRASHES_MAX=5, PAUSE_S_MAX=0.02)
    )
    kept.wait_for(lambda notes: any("freed" in note for note in notes))
    assert code == 7
    assert len(kept.lives) == 5
    assert "the 5th in" in said
    assert "giving up" in said


def test_starts_that_fail_are_given_up_in_time(kept: Kept) -> None:
    code, said = ended(kept.start(f"{HOLDS_A_PIPE}\nsys.exit(8)", "--give-up-after", "1.5"))
    kept.wait_for(lambda notes: any("freed" in note for note in notes))
    assert code == 8
    assert "none was ready for" in said


def test_a_start_that_hangs_is_killed_and_given_up(kept: Kept) -> None:
    code, said = ended(
        kept.start(f"{HOLDS_A_PIPE}\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); sleep()", "--give-up-after", "0.6")
    )
    kept.wait_for(lambda notes: any("freed" in note for note in notes))
    assert code == 137
    assert "did not become ready in time: it is killed" in said
    assert "giving up" in said


def test_a_start_that_hung_once_is_tried_again(kept: Kept) -> None:
    process = kept.start(
        "if life == 1: store('m', memory('')); tell('READY=1'); barrier(); die()\nif life == 2: sleep()\ntell('READY=1')",
        "--give-up-after",
        "4",
    )
    assert ended(process)[0] == 0
    assert len(kept.lives) == 3


def test_short_lives_are_followed_after_growing_pauses_and_a_steady_one_at_once(kept: Kept) -> None:
    code, said = ended(
        kept.start(
            "store('m', memory('')); tell('READY=1'); barrier()\nif life == 4: time.sleep(0.3)\nif life < 6: die()\n",
            STEADY_S=0.2,
            PAUSE_S=0.01,
            PAUSE_S_MAX=0.025,
        )
    )
    assert code == 0
    assert [line.partition("starts in ")[2].split()[0] for line in said.splitlines()] == [
        "0.01",
        "0.02",
        "0.025",
        "0",
        "0.01",
    ]


# What is said to it --------------------------------------------------------------------------------------------------


def test_there_are_bounds_on_what_it_keeps(kept: Kept) -> None:
    code, said = ended(
        kept.start(
            """
if life == 1:
    for number in range(20):
        store(f"m{number}", memory(str(number)))
    store("m3", memory("replaced"))
    store("m:1", memory("")); store("m" * 300, memory("")); store("m\\x01", memory(""))
    tell("FDSTOREREMOVE=1\\nFDNAME=m0"); tell("FDSTORE=1\\nFDNAME=m0")
    tell("FDSTORE=1\\nFDNAME=m0", memory(""), memory(""))
    tell(b"\\xff\\xfe=\\x00\\n=\\n\\n" * 5); tell(b"")
    tell("FDSTORE=1\\nFDNAME=m0\\n" + "X" * 5000, memory("long"))
    tell("FDSTORE=1\\nFDNAME=m0\\n", *[memory("many")] * 40)
    tell("READY=1\\nSTATUS=whatever\\nMAINPID=1\\nWATCHDOG=1")
    barrier()
    keeper = os.getppid()
    note(held=sorted(os.listdir(f"/proc/{keeper}/fd"), key=int))
    die()
tell("READY=1")
"""
        )
    )
    assert code == 0
    assert kept.lives[1]["names"] == [f"m{number}" for number in range(1, 16)]
    assert kept.lives[1]["told"]["m3"] == "replaced"
    assert said.count("are not kept") == 4 + 3 + 2
    (held,) = (note["held"] for note in kept.notes if "held" in note)
    assert len(held) < 3 + 15 + 8, "nothing that was sent and not kept is left open"


def test_only_the_daemon_is_listened_to(kept: Kept) -> None:
    process = kept.start(
        """
tell("READY=1")
if life == 1:
    child = os.fork()
    if not child:
        store("m", memory("of a worker")); tell("STOPPING=1"); barrier(); os._exit(0)
    os.waitpid(child, 0)
    store("mine", memory("")); barrier(); die()
"""
    )
    assert ended(process)[0] == 0
    assert kept.lives[1]["names"] == ["mine"]


def test_a_flood_of_messages_keeps_it_from_nothing(kept: Kept) -> None:
    process = kept.start(
        """
def ended(*_):
    os.kill(child, signal.SIGKILL)
    sys.exit(0)
signal.signal(signal.SIGTERM, ended)
child = os.fork()
if not child:
    while True:
        tell(b"FDSTORE=1", 0)
tell("READY=1")
store("m", memory("")); barrier()
note(stored=True)
sleep()
"""
    )
    kept.wait_for(lambda notes: any("stored" in note for note in notes))
    process.terminate()
    assert ended(process)[0] == 0


def test_its_socket_is_for_its_user_alone(kept: Kept) -> None:
    process = kept.start("tell('READY=1'); note(here=True); sleep()")
    kept.wait_for(lambda notes: len(notes) == 2)
    (path,) = kept.sockets
    assert str(path) == keeper.socket_path(str(kept.place), process.pid)
    assert path.stat().st_mode & 0o777 == 0o600
    process.terminate()
    ended(process)
    assert kept.sockets == []


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", keeper.FORWARDED)
def test_a_signal_reaches_the_daemon_which_ends_in_order(kept: Kept, number: int) -> None:
    process = kept.start(
        f"""
def ended(*_):
    note(heard=True)
    sys.exit(0)
signal.signal({number:d}, ended)
store("m", memory("")); tell("READY=1"); barrier(); note(here=True)
sleep()
"""
    )
    kept.wait_for(lambda notes: len(notes) == 2)
    process.send_signal(number)
    assert ended(process)[0] == 0
    assert "heard" in kept.notes[-1]


def test_a_second_signal_is_passed_on_too(kept: Kept) -> None:
    process = kept.start(
        """
heard = 0
def hear(*_):
    global heard
    heard += 1
    note(heard=heard)
    if heard == 2:
        sys.exit(0)
signal.signal(signal.SIGTERM, hear)
signal.signal(signal.SIGINT, hear)
tell("READY=1"); note(here=True)
sleep()
"""
    )
    kept.wait_for(lambda notes: len(notes) == 2)
    process.terminate()
    kept.wait_for(lambda notes: len(notes) == 3)
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 0


def test_who_does_not_end_is_killed(kept: Kept) -> None:
    process = kept.start(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); store('m', memory('')); tell('READY=1'); barrier(); note(a=1); sleep()",
        END_S=0.2,
    )
    kept.wait_for(lambda notes: len(notes) == 2)
    process.terminate()
    code, said = ended(process)
    assert code == 137
    assert "did not end in time: it is killed" in said
    assert len(kept.lives) == 1


def test_a_daemon_that_crashes_because_it_was_told_to_end_is_not_followed(kept: Kept) -> None:
    process = kept.start("store('m', memory('')); tell('READY=1'); barrier(); note(a=1); sleep()")
    kept.wait_for(lambda notes: len(notes) == 2)
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM
    assert len(kept.lives) == 1


def test_a_signal_during_a_pause_ends_it(kept: Kept) -> None:
    process = kept.start("store('m', memory('')); tell('READY=1'); barrier(); die()", PAUSE_S=60, PAUSE_S_MAX=60)
    kept.wait_for(lambda notes: len(notes) == 1)
    assert process.stderr is not None
    assert "starts in 60 s" in process.stderr.readline()
    process.terminate()
    code, said = ended(process)
    assert code == 137
    assert "manta umount" in said


def test_a_signal_that_was_sent_while_it_started_is_not_lost(kept: Kept) -> None:
    process = kept.start("sleep()")
    until(lambda: bool(kept.sockets))  # it is there, and the daemon may be or not
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM


# Its own end, and the next keeper ------------------------------------------------------------------------------------

ADOPTS = """
def start_keeper():
    command = json.loads(os.environ["TOY_KEEPER"])
    at = command.index("--")
    command[at:at] = ["--adopt", str(os.getpid())]
    process = subprocess.Popen(command, start_new_session=True)
    os.environ["NOTIFY_SOCKET"] = f"{place}/keep.{process.pid}"
    while not os.path.exists(os.environ["NOTIFY_SOCKET"]):
        time.sleep(0.01)
    time.sleep(0.05)
    return process
"""


def test_a_daemon_lives_on_when_its_keeper_is_killed_and_the_next_keeper_adopts_it(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = f"""{ADOPTS}
if life == 1:
    first = os.getppid()
    store("m", memory("before")); tell("READY=1"); barrier(); note(deposited=True)
    while os.getppid() == first:
        time.sleep(0.01)
    process = start_keeper()
    store("m", memory("after")); barrier()
    note(keeper=process.pid)
    die()
tell("READY=1")
note(took=inherited, over=os.getppid())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
sleep()
"""
    monkeypatch.setenv("TOY_KEEPER", json.dumps(keeper.command_line(str(kept.place), kept.command(body))))
    process = kept.start(body)
    kept.wait_for(lambda notes: len(notes) == 2)
    process.kill()
    process.wait()
    notes = kept.wait_for(lambda notes: any("over" in note for note in notes))
    (second,) = (note["keeper"] for note in notes if "keeper" in note)
    assert kept.lives[1]["told"] == {"m": "after"}
    assert notes[-1]["over"] == second, "the second keeper started the second daemon"
    assert [path.name for path in kept.sockets] == [f"keep.{second}"], "the killed keeper's socket was removed"
    os.kill(second, signal.SIGTERM)
    until(lambda: not kept.sockets)


@pytest.mark.parametrize(
    ("ends", "lives"),
    [
        ("tell('STOPPING=1'); sys.exit(1)", 1),  # in order, as far as anybody can know
        ("sys.exit(0)", 2),  # without a word: a crash
        ("sys.exit(75)", 2),
    ],
)
def test_an_adopted_daemon_says_itself_that_it_ends_in_order(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, ends: str, lives: int
) -> None:
    body = f"""{ADOPTS}
if life == 1:
    process = start_keeper()
    store("m", memory("")); barrier()
    note(keeper=process.pid)
    {ends}
tell("READY=1"); note(second=True)
"""
    monkeypatch.setenv("TOY_KEEPER", json.dumps(keeper.command_line(str(kept.place), kept.command(body))))
    daemon = kept.popen(kept.command(body))
    ended(daemon)  # also of the keeper, which has the same stderr
    assert len(kept.lives) == lives
    assert kept.sockets == []


def test_signals_reach_an_adopted_daemon(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"""{ADOPTS}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as the daemon has it
process = start_keeper()
note(keeper=process.pid)
signal.sigwait([signal.SIGTERM])
note(heard=True)
"""
    monkeypatch.setenv("TOY_KEEPER", json.dumps(keeper.command_line(str(kept.place), kept.command(body))))
    daemon = kept.popen(kept.command(body))
    notes = kept.wait_for(lambda notes: len(notes) == 2)
    os.kill(notes[-1]["keeper"], signal.SIGTERM)
    assert ended(daemon)[0] == 0
    assert "heard" in kept.notes[-1]
    until(lambda: not kept.sockets)


def test_nobody_else_can_be_adopted(kept: Kept) -> None:
    process = kept.start("", "--adopt", "1")
    code, said = ended(process)
    assert code == 1
    assert "ended before" in said
    assert kept.lives == []


def test_two_keepers_in_one_directory_do_not_disturb_each_other(kept: Kept) -> None:
    first = kept.start("tell('READY=1'); store('m', memory('')); barrier(); note(here=True); sleep()")
    kept.wait_for(lambda notes: len(notes) == 2)
    second = kept.start("sys.exit(6)")
    assert ended(second)[0] == 6
    assert [path.name for path in kept.sockets] == [f"keep.{first.pid}"]


def test_as_process_1_it_collects_the_children_of_others(kept: Kept) -> None:
    """In a container. Here it is made a subreaper, which inherits orphans as process 1 does."""
    body = """
if not os.fork():
    if not os.fork():
        os.execv("/bin/true", ["true"])
    os._exit(0)
os.wait()
tell("READY=1"); note(here=True); sleep()
"""
    command = keeper.command_line(str(kept.place), kept.command(body))
    subreaper = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = kept.popen([sys.executable, "-c", subreaper, *command])
    kept.wait_for(lambda notes: len(notes) == 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: children.read_text().split() == [str(kept.lives[0]["pid"])])
