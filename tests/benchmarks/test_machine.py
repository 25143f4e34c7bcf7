"""benchmarks.machine: what it says of this machine, and how it names what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import machine
from manta.errors import Absent


def test_the_description_has_a_value_for_everything(tmp_path: Path) -> None:
    described = machine.describe(tmp_path)
    assert set(described) == {"cpu", "cores", "memory_bytes", "kernel", "python", "cache_filesystem"}
    assert all(described.values())


def test_proc_is_its_own_filesystem() -> None:
    assert machine.filesystem(Path("/proc")) == "proc"


def test_the_commit_says_whether_the_tree_was_changed(tmp_path: Path) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = machine.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path) == f"{clean}+changes"


def test_outside_of_git_there_is_no_commit(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == ""


def test_nothing_happens_where_nothing_is_missing() -> None:
    machine.require(["sh"])


def test_what_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(Absent, match="needs aria2c, rclone: install aria2 rclone"):
        machine.require(["aria2c", "rclone"])


def test_without_root_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda program: "/x/apt-get" if program == "apt-get" else None)
    with pytest.raises(Absent, match="apt-get install curl"):
        machine.require(["curl"])
