"""manta.control.client: answers, errors and deadlines over a real unix socket; starting a daemon, and every way that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from manta.config import CacheConfig, Config, DaemonConfig, FuseConfig
from manta.control import client as module
from manta.control.client import Client, connect, ensure_daemon, with_daemon
from manta.control.protocol import (
    CacheListing,
    CacheSelection,
    GcRequest,
    Job,
    MountRequest,
    PrefetchRequest,
    Running,
    Status,
    VerifyRequest,
)
from manta.errors import Absent, CacheBroken, Corrupt, Denied, InUse, MantaError, NotRunning, Throttled, Unavailable
from manta.testing import scratch
from tests.cli.fake_daemon import COMMIT, FakeDaemon, blob

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's daemons are kept")


@pytest.fixture
def config() -> Iterator[Config]:
    with tempfile.TemporaryDirectory(prefix="manta-client-") as folder:
        place = Path(folder)
        yield replace(Config(), cache=CacheConfig(dir=place / "cache"), daemon=DaemonConfig(runtime_dir=place / "run"))


@pytest.fixture
def daemon(config: Config) -> Iterator[FakeDaemon]:
    with FakeDaemon(config.make_instance_dir() / "control.sock") as fake:
        yield fake


def refuse(daemon: FakeDaemon, request: str, error: MantaError) -> None:
    daemon.refusals[request] = [error]


def test_every_call_asks_what_the_protocol_says(daemon: FakeDaemon) -> None:
    client = Client(daemon.socket_path)
    mounted = client.mount(MountRequest("org/name", "/mnt", "hub-cache", "hf_token"))
    assert mounted.commit == COMMIT
    assert client.bound(mounted.id, "/mnt") == mounted
    assert client.status().mounts == [mounted]
    assert client.unmount(mounted.id) == mounted
    assert client.prefetch(PrefetchRequest("org/name")).state == "done"
    assert client.job("7").id == "7"
    assert client.cancel("7").state == "cancelled"
    daemon.listing = CacheListing([blob()], 1000, 0)
    assert client.cache().blobs == [blob()]
    assert client.pin(CacheSelection(["org/name"])).blobs == client.unpin(CacheSelection([])).blobs
    assert isinstance(client.verify(VerifyRequest()), Job)
    assert client.remove(CacheSelection(["org/name"])) == client.collect(GcRequest(5, dry_run=True))
    assert isinstance(client.shutdown(), Status)
    assert client.restart() == Running("0.1.0", os.getpid())
    assert client.running() == Running("0.2.0", 1)
    assert client.peers() == client.peers(cluster=True) == daemon.peers
    assert client.page() == daemon.page
    assert [str(request) for request in daemon.requests] == [
        "POST /v1/mounts",
        "POST /v1/mounts/1/bound",
        "GET /v1/status",
        "DELETE /v1/mounts/1",
        "POST /v1/prefetch",
        "GET /v1/jobs/7",
        "DELETE /v1/jobs/7",
        "GET /v1/cache",
        "POST /v1/cache/pin",
        "POST /v1/cache/unpin",
        "POST /v1/cache/verify",
        "POST /v1/cache/rm",
        "POST /v1/cache/gc",
        "POST /v1/shutdown",
        "POST /v1/restart",
        "GET /v1/status",
        "GET /v1/peers",
        "GET /v1/peers?cluster=1",
        "GET /v1/peers/page",
    ]
    assert daemon.requests[0].body == {
        "target": "org/name",
        "directory": "/mnt",
        "view": "hub-cache",
        "token": "hf_token",
        "anonymous": False,
        "prefetch": "none",
        "pin": False,
        "pod": None,
    }
    assert daemon.requests[12].body == {"size": 5, "dry_run": True}


@pytest.mark.parametrize("error", [Absent("No."), Denied("No."), InUse("No."), Unavailable("No."), CacheBroken("No.")])
def test_an_error_arrives_as_what_it_was(daemon: FakeDaemon, error: MantaError) -> None:
    refuse(daemon, "GET /v1/cache", error)
    with pytest.raises(type(error)) as caught:
        Client(daemon.socket_path).cache()
    assert caught.value.message == "No."


def test_a_throttled_daemon_and_a_code_of_the_future_are_still_errors(daemon: FakeDaemon) -> None:
    refuse(daemon, "GET /v1/cache", Throttled("Later.", 5.0))
    with pytest.raises(MantaError, match="Later"):
        Client(daemon.socket_path).cache()
    body = b'{"code": "unheard_of", "message": "Hm."}'
    daemon.raw["GET /v1/status"] = b"HTTP/1.1 500 x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with pytest.raises(MantaError, match="Hm"):
        Client(daemon.socket_path).status()


def test_nobody_there(config: Config) -> None:
    with pytest.raises(NotRunning):
        Client(config.socket_path).status()
    config.make_instance_dir()
    with socket.socket(socket.AF_UNIX) as abandoned:  # what a killed daemon leaves
        abandoned.bind(os.fspath(config.socket_path))
    with pytest.raises(NotRunning, match="manta mount"):
        connect(config)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", Unavailable),
        (b"SSH-2.0-whatever\r\n\r\n", Unavailable),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", Corrupt),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\n<html>", Corrupt),
    ],
)
def test_an_answer_that_is_none_is_a_sentence(daemon: FakeDaemon, answer: bytes, kind: type[MantaError]) -> None:
    daemon.raw["GET /v1/status"] = answer
    with pytest.raises(kind, match=str(daemon.socket_path)):
        Client(daemon.socket_path).status()


def test_an_answer_without_end_is_cut_off(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES_MAX", 1000)
    daemon.raw["GET /v1/status"] = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000
    with pytest.raises(Unavailable, match="more than 1000 bytes"):
        Client(daemon.socket_path).status()


def test_a_stuck_daemon_is_not_waited_for_longer_than_asked(daemon: FakeDaemon) -> None:
    over = threading.Event()
    daemon.on_request = lambda _: over.wait(30)
    with pytest.raises(Unavailable, match=r"did not answer within 0\.05 s"):
        Client(daemon.socket_path).status(timeout_s=0.05)
    over.set()


# Starting a daemon ---------------------------------------------------------------------------------------------------

_SCRIPT = """#!{python} -IS
# Stands in for `python -m manta daemon --ephemeral --ready-fd N`, and starts the real keeper where that is asked for.
import json, os, socket, sys
if sys.argv[1] == "-S":
    os.execv("{python}", ["python", *sys.argv[1:]])
assert sys.argv[1:6] == ["-m", "manta", "daemon", "--ephemeral", "--ready-fd"], sys.argv
ready = int(sys.argv[sys.argv.index("--ready-fd") + 1])
place = sys.argv[0].rpartition("/")[0]
with open(place + "/started", "a") as log:
    log.write(json.dumps(dict(os.environ)) + chr(10))
print("a line in the log", flush=True)
{body}
"""

_SERVE = """
runtime = [x for x in os.scandir(os.environ["MANTA_DAEMON_RUNTIME_DIR"])][0].path
server = socket.socket(socket.AF_UNIX)
server.bind(runtime + "/control.sock")
server.listen()
status = open(place + "/status").read()
os.write(ready, b'{"ok": true}' + bytes([10]))
os.close(ready)
while True:
    client, _ = server.accept()
    client.recv(65536)
    client.sendall(("HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(status), status)).encode())
    client.close()
"""


class Starter:
    """Makes the client start a script instead of a daemon."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        self._monkeypatch = monkeypatch

    def does(self, body: str) -> None:
        script = self.place / "python"
        script.write_text(_SCRIPT.format(python=os.path.realpath(sys.executable), body=body))
        script.chmod(0o755)
        self._monkeypatch.setattr(sys, "executable", str(script))

    @property
    def starts(self) -> int:
        started = self.place / "started"
        return len(started.read_text().splitlines()) if started.exists() else 0


@pytest.fixture
def starter(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    import msgspec

    place = config.daemon.runtime_dir.parent
    status = FakeDaemon(config.socket_path).status()
    (place / "status").write_bytes(msgspec.json.encode(status))
    yield Starter(place, monkeypatch)
    # Keepers too, which would start another.
    scratch.end(scratch.processes_with("MANTA_DAEMON_RUNTIME_DIR", str(config.daemon.runtime_dir)))


def test_a_daemon_is_started_with_this_configuration_and_used(
    config: Config, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_inherited")
    monkeypatch.setenv("MANTA_CACHE_DIR", "/elsewhere")
    starter.does(_SERVE)
    client = ensure_daemon(config)
    assert client.launched
    assert client.status().version
    (line,) = (starter.place / "started").read_text().splitlines()
    environment = json.loads(line)
    assert environment["HF_TOKEN"] == "hf_inherited"
    for name, value in config.environment().items():
        assert environment[name] == value
    assert config.log_path.read_text() == "a line in the log\n"
    again = ensure_daemon(config)
    assert not again.launched
    assert starter.starts == 1


def test_two_at_the_same_time_start_one_daemon(config: Config, starter: Starter) -> None:
    starter.does(_SERVE)
    launched: list[bool] = []
    threads = [threading.Thread(target=lambda: launched.append(ensure_daemon(config).launched)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launched) == [False, False, False, True]
    assert starter.starts == 1


def test_what_the_daemon_says_is_what_the_person_reads(config: Config, starter: Starter) -> None:
    starter.does(
        """os.write(ready, json.dumps({"code": "denied", "message": "No /dev/fuse."}).encode() + bytes([10]))"""
    )
    with pytest.raises(Denied, match=r"^No /dev/fuse\.$"):
        ensure_daemon(config)


def test_a_daemon_that_dies_without_a_word_is_quoted_from_its_log(config: Config, starter: Starter) -> None:
    starter.does("print('ImportError: the reason', flush=True); sys.exit(3)")
    with pytest.raises(Unavailable, match=r"exit status 3(.|\n)*ImportError: the reason"):
        ensure_daemon(config)


def test_a_daemon_that_speaks_nonsense_is_an_error(config: Config, starter: Starter) -> None:
    starter.does("os.write(ready, b'hello' + bytes([10]))")
    with pytest.raises(Unavailable, match="'hello'"):
        ensure_daemon(config)


def test_a_daemon_that_never_gets_ready_is_ended_at_the_deadline(config: Config, starter: Starter) -> None:
    starter.does("import signal; signal.pause()")
    with pytest.raises(Unavailable, match="did not become ready in time"):
        ensure_daemon(config, deadline_s=0.5)


@needs_root
def test_a_kept_daemon_that_is_of_no_use_ends_with_its_keeper(
    config: Config, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "END_S", 0.2)
    starter.does(
        """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(ready, b"%d" % os.getpid())
signal.pause()"""
    )
    config.make_instance_dir()
    ours, theirs = os.pipe()
    try:
        process = module._spawn(config, theirs)
        daemon = int(os.read(ours, 20))
    finally:
        os.close(ours)
        os.close(theirs)
    assert module._end(process) == 128 + signal.SIGKILL
    assert process.pid != daemon
    assert not Path(f"/proc/{daemon}").exists()
    assert list(config.instance_dir.glob("keep.*")) == []


@needs_root
@pytest.mark.parametrize("session", ["auto", "pyfuse3"])
def test_a_session_that_cannot_outlive_its_daemon_has_no_keeper(config: Config, starter: Starter, session: str) -> None:
    starter.does(_SERVE)
    ensure_daemon(replace(config, fuse=FuseConfig(session=session)))
    environment = json.loads((starter.place / "started").read_text())
    assert ("MANTA_KEEPER_PID" in environment) is (session == "auto")
    assert environment.get("NOTIFY_SOCKET", "").startswith(f"{config.instance_dir}/keep." if session == "auto" else "")


def test_a_cache_that_an_exiting_daemon_still_holds_is_waited_for(config: Config, starter: Starter) -> None:
    held = '{"code": "in_use", "message": "Held."}'
    starter.does(
        f"""
if not os.path.exists(place + "/once"):
    open(place + "/once", "w").close()
    os.write(ready, b'{held}' + bytes([10]))
    sys.exit(1)
{_SERVE}"""
    )
    assert ensure_daemon(config).launched
    assert starter.starts == 2


def test_a_cache_that_is_held_for_good_is_an_error(
    config: Config, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HELD_S", 0.0)
    starter.does("""os.write(ready, b'{"code": "in_use", "message": "Held by pid 5."}' + bytes([10]))""")
    with pytest.raises(InUse, match="Held by pid 5"):
        ensure_daemon(config)


def test_a_daemon_that_leaves_between_being_found_and_being_asked_is_replaced(
    config: Config, daemon: FakeDaemon
) -> None:
    daemon.refusals["POST /v1/mounts"] = [NotRunning("The daemon is shutting down.")]
    mounted = with_daemon(config, lambda client: client.mount(MountRequest("org/name", "/mnt")))
    assert mounted.target == "org/name"
    assert len(daemon.asked("POST", "/v1/mounts")) == 2


@pytest.mark.parametrize("ends", [1, 2])
def test_a_daemon_that_ends_while_it_is_asked_is_followed_by_another_once(
    config: Config, daemon: FakeDaemon, ends: int
) -> None:
    asked: list[object] = []

    def ask(client: Client) -> str:
        asked.append(client)
        if len(asked) <= ends:
            raise module.WentAway("The daemon went away before it answered.")
        return "an answer"

    if ends == 1:
        assert with_daemon(config, ask) == "an answer"
    else:
        with pytest.raises(Unavailable, match="went away"):
            with_daemon(config, ask)
    assert len(asked) == 2


def test_an_error_that_is_the_answer_is_not_asked_for_twice(config: Config, daemon: FakeDaemon) -> None:
    daemon.refusals["POST /v1/mounts"] = [Unavailable("The hub cannot be reached.")]
    with pytest.raises(Unavailable, match="hub"):
        with_daemon(config, lambda client: client.mount(MountRequest("org/name", "/mnt")))
    assert len(daemon.asked("POST", "/v1/mounts")) == 1


def test_a_large_log_is_put_aside(config: Config, starter: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_BYTES_MAX", 10)
    config.make_instance_dir()
    config.log_path.write_text("a log of long ago\n")
    starter.does(_SERVE)
    ensure_daemon(config)
    assert config.log_path.read_text() == "a line in the log\n"
    assert config.log_path.with_name("daemon.log.1").read_text() == "a log of long ago\n"
