"""manta.cli.completion: the scripts are right for their shells (those that are installed), and complete what they should."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from manta.cli.completion import script
from manta.cli.main import build_parser
from tests.cli.conftest import Manta


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_its_script(manta: Manta, shell: str) -> None:
    text = manta("completion", shell).out
    assert text == script(build_parser(), shell)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def complete(place: Path, *words: str) -> list[str]:
    """What bash offers for the last of `words`."""
    driver = """
        source "$1"; shift
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        _manta
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    (place / "script").write_text(script(build_parser(), "bash"))
    done = subprocess.run(
        ["bash", "-c", driver, "test", str(place / "script"), *words],
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout != "\n" else []


def test_bash_completes_commands_options_and_values(place: Path) -> None:
    assert complete(place, "manta", "pre") == ["prefetch"]
    assert "umount" in complete(place, "manta", "")
    assert complete(place, "manta", "cache", "") == ["ls", "verify", "pin", "unpin", "rm", "gc"]
    assert complete(place, "manta", "mount", "--vi") == ["--view"]
    assert complete(place, "manta", "mount", "org/name", "--view", "") == ["tree", "hub-cache"]
    assert complete(place, "manta", "cache", "gc", "--dr") == ["--dry-run"]
    assert complete(place, "manta", "completion", "z") == ["zsh"]
    assert complete(place, "manta", "--ver") == ["--version"]
    assert "--ready-fd" not in complete(place, "manta", "daemon", "--")


def test_bash_completes_directories_and_files(place: Path) -> None:
    (place / "dir one").mkdir()
    (place / "dir.toml").touch()
    assert complete(place, "manta", "umount", "di") == ["dir one"]
    assert complete(place, "manta", "mount", "org/name", "di") == ["dir one"]
    assert sorted(complete(place, "manta", "status", "--config", "di")) == ["dir one", "dir.toml"]
    assert complete(place, "manta", "prefetch", "di") == []


def test_fish_completes_values(place: Path) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed here")
    (place / "script").write_text(script(build_parser(), "fish"))
    done = subprocess.run(
        [
            "fish",
            "--no-config",
            "-c",
            f"source {place}/script; complete -C 'manta mount --view '; complete -C 'manta cache p'",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
    )
    words = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert words == ["hub-cache", "tree", "pin"]
