"""manta.cli.restart: asking for it, waiting for the next daemon, and every way that neither comes."""

from __future__ import annotations

import pytest

from manta.cli import restart as module
from manta.errors import InUse, Invalid, Unavailable
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon, Request


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.0)


def test_it_tells_from_which_to_which(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.pid = 7
    done = manta("restart")
    assert (done.code, done.err) == (0, "")
    assert done.out == "restarted: manta 0.1.0, pid 7 -> manta 0.2.0, pid 1, in 0 s\n"
    daemon.next = ("0.3.0", 2)
    document = manta("restart", "--json").json
    assert document["from"] == {"version": "0.2.0", "pid": 1, "started": 0.0}
    assert document["to"] == {"version": "0.3.0", "pid": 2, "started": 0.0}
    assert document["seconds"] >= 0


def test_it_need_not_wait(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.pid = 7
    assert "pid 7) hands over" in manta("restart", "--no-wait").out
    assert len(daemon.asked("GET", "/v1/status")) == 1
    assert manta("restart", "--no-wait", "--json").json == {"from": {"version": "0.2.0", "pid": 1, "started": 0.0}}


def test_nobody_there(manta: Manta, place: object) -> None:
    done = manta("restart")
    assert done.code == 3
    assert "nothing to restart" in done.err


@pytest.mark.parametrize(("error", "code"), [(InUse("No keeper."), 6), (Invalid("No."), 2), (Unavailable("Later."), 3)])
def test_a_refusal_is_the_daemons(manta: Manta, daemon: FakeDaemon, error: InUse, code: int) -> None:
    daemon.refusals["POST /v1/restart"] = [error]
    done = manta("restart")
    assert (done.code, done.err) == (code, f"manta: {error.message}\n")


def test_a_daemon_that_leaves_in_mid_answer_has_agreed(manta: Manta, daemon: FakeDaemon) -> None:
    def leave(request: Request) -> None:
        if request.path == "/v1/restart":
            daemon.version, daemon.pid = daemon.next

    daemon.on_request = leave
    daemon.raw["POST /v1/restart"] = b""
    assert "-> manta 0.2.0, pid 1" in manta("restart").out


def test_answers_that_are_none_are_asked_for_again(manta: Manta, daemon: FakeDaemon) -> None:
    """While the next daemon starts, its socket may not be there, and an answer may be cut off."""

    def start(request: Request) -> None:
        if len(daemon.requests) == 5:
            daemon.raw.clear()
        elif request.path == "/v1/restart":
            daemon.raw["GET /v1/status"] = b""

    daemon.on_request = start
    assert "-> manta 0.2.0, pid 1" in manta("restart").out


def test_a_daemon_that_does_not_come_back_is_said(
    manta: Manta, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HANDOVER_S", 0.05)
    daemon.next = (daemon.version, daemon.pid)
    done = manta("restart")
    assert done.code == 3
    assert "the old one does not leave" in done.err
    assert "daemon.log" in done.err
