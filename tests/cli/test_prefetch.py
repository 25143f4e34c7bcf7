"""manta.cli.prefetch: progress to the end, what failed, Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manta.cli import prefetch as module
from manta.cli.prefetch import title
from manta.errors import Denied
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import COMMIT, FakeDaemon, job


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.0)


def test_it_follows_the_job_to_its_end(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.jobs = [job("running", 0), job("running", 0), job("running", 400), job("done", 1000)]
    done = manta("prefetch", "org/name", "--revision", "v1")
    assert done.code == 0, done.err
    assert daemon.asked("POST", "/v1/prefetch")[0].body == {"target": "org/name@v1", "token": ""}
    assert "org/name@0123456789ab: 100%, 1.0 kB of 1.0 kB" in done.err
    assert "2 files, 1.0 kB in the cache (1.0 kB fetched" in done.out


def test_what_is_cached_already_is_said(manta: Manta, daemon: FakeDaemon) -> None:
    done = manta("prefetch", "org/name")
    assert "all cached" in done.out
    assert done.err == ""
    assert manta("prefetch", "org/name", "-q").out == ""


def test_json_is_the_last_state(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.jobs = [job("running", 0), job("done", 1000)]
    done = manta("prefetch", "org/name", "--json")
    assert (done.json["state"], done.err) == ("done", "")


def test_problems_are_listed_and_the_code_says_so(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.jobs = [job("failed", 300, problems=["model.bin: the hub refused."])]
    done = manta("prefetch", "org/name")
    assert done.code == 1
    assert "model.bin: the hub refused." in done.err
    assert "300 B of 1.0 kB are in the cache. The same command tries the rest again" in done.err
    daemon.jobs = [job("cancelled", 300)]
    assert "somebody else cancelled it" in manta("prefetch", "org/name").err


def test_a_refusal_is_the_daemons_sentence(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.refusals["POST /v1/prefetch"] = [Denied("org/name is gated.")]
    done = manta("prefetch", "org/name")
    assert (done.code, done.err) == (5, "manta: org/name is gated.\n")


def test_another_hub_than_the_daemons_is_an_error(manta: Manta, daemon: FakeDaemon) -> None:
    assert manta("prefetch", "org/name", "--endpoint", "http://other").code == 6
    assert daemon.asked("POST", "/v1/prefetch") == []


def test_detached_it_returns_at_once(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.jobs = [job("running", 0)]
    done = manta("prefetch", "org/name", "--detach")
    assert done.code == 0
    assert "in the background" in done.out
    assert daemon.asked("GET", "/v1/jobs/.*") == []


def test_ctrl_c_cancels_the_job_and_says_what_stays(daemon: FakeDaemon, place: Path) -> None:
    daemon.jobs = [job("running", 400)]
    looked = threading.Event()
    daemon.on_request = lambda request: looked.set() if request.path == "/v1/jobs/7" else None
    with subprocess.Popen(
        [sys.executable, "-m", "manta", "prefetch", "org/name"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert looked.wait(20)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert len(daemon.asked("DELETE", "/v1/jobs/7")) == 1
    assert "400 B of 1.0 kB of org/name@0123456789ab are in the cache and stay there" in err


def test_titles_are_short() -> None:
    assert title(job()) == f"org/name@{COMMIT[:12]}"
    assert title(job(name="cache")) == "cache"
