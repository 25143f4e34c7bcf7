"""Fixtures of the CLI's tests: an environment of its own, a fake daemon in it, and a way to run `manta` in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manta import config as config_module
from manta.cli.main import main
from manta.config import Config, load
from tests.cli.fake_daemon import FakeDaemon


@dataclass(frozen=True)
class Done:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Manta = Callable[..., Done]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short scratch directory (a socket's path has 107 bytes) that is home, cache and runtime directory of every command."""
    for name in list(os.environ):
        if name.startswith(("MANTA_", "HF_", "HUGGING", "TRANSFORMERS_", "XDG_")):
            monkeypatch.delenv(name)
    path = Path(os.path.realpath(tempfile.mkdtemp(prefix="manta-cli-")))
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.setenv("MANTA_CACHE_DIR", str(path / "cache"))
    monkeypatch.setenv("MANTA_DAEMON_RUNTIME_DIR", str(path / "run"))
    monkeypatch.setattr(config_module, "SYSTEM_FILE", path / "etc/config.toml")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def config(place: Path) -> Config:
    return load().config


@pytest.fixture
def daemon(config: Config) -> Iterator[FakeDaemon]:
    with FakeDaemon(config.make_instance_dir() / "control.sock") as fake:
        yield fake


@pytest.fixture
def manta(place: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Manta]:
    """Runs `manta ARGUMENTS` in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # --help and --version
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
