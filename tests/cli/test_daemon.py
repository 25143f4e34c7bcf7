"""manta.cli.daemon: when `manta daemon` becomes a keeper, and when it is the daemon itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

import manta.daemon
from manta import keeper
from manta.config import load
from tests.cli.conftest import Manta


class Became(BaseException):
    """What os.execv was called with. Not an Exception, which `main` would report."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, place: Path) -> list[dict[str, Any]]:
    """What the daemon was run with, in this process."""
    seen: list[dict[str, Any]] = []

    def run(config: object, **options: Any) -> int:
        seen.append(options)
        return 0

    def become(path: str, command: list[str]) -> NoReturn:
        raise Became(path, command)

    monkeypatch.setattr(manta.daemon, "run", run)
    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "manta", "daemon", "--log-level", "debug"])
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    return seen


@pytest.mark.skipif(os.geteuid() != 0, reason="the runtime directory would not be the user's")
def test_what_a_person_runs_becomes_the_keeper_of_the_same_command(manta: Manta, runs: list[dict[str, Any]]) -> None:
    with pytest.raises(Became) as became:
        manta("daemon", "--log-level", "debug")
    path, command = became.value.args
    assert path == sys.executable
    runtime = load().config.instance_dir
    assert runtime.is_dir()
    daemon = [sys.executable, "-m", "manta", "daemon", "--log-level", "debug"]
    assert command == keeper.command_line(str(runtime), daemon)
    assert runs == []


@pytest.mark.parametrize(
    "options",
    [
        ["--unkept"],
        ["--fuse", "pyfuse3"],
        ["--ready-fd", "9"],
        ["--set", "fuse.session=pyfuse3"],
        ["--keeper", "/run/k"],
    ],
)
def test_some_run_the_daemon_itself(manta: Manta, runs: list[dict[str, Any]], options: list[str]) -> None:
    assert manta("daemon", *options).code == 0
    assert len(runs) == 1


def test_with_a_supervisor_or_without_root_it_is_the_daemon_itself(
    manta: Manta, runs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
        assert manta("daemon").code == 0
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert manta("daemon").code == 0
    assert runs == [{"ephemeral": False, "ready_fd": None}] * 2
