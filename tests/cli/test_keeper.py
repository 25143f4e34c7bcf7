"""manta.cli.keeper: what it becomes, and what it refuses."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from manta import keepstore
from tests.cli.conftest import Manta


class Became(BaseException):
    """What os.execv was called with. Not an Exception, which `main` would report."""


@pytest.fixture(autouse=True)
def becoming(monkeypatch: pytest.MonkeyPatch) -> None:
    def become(path: str, command: list[str]) -> NoReturn:
        raise Became(command)

    monkeypatch.setattr(os, "execv", become)


def test_it_becomes_a_process_of_the_standard_library(manta: Manta, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Became) as became:
        manta("keeper", "--keeper", "/run/x/keeper.sock")
    assert became.value.args == (keepstore.command_line("/run/x/keeper.sock", 300),)
    monkeypatch.setenv("MANTA_DAEMON_KEEPER", "/run/y/keeper.sock")
    with pytest.raises(Became) as became:
        manta("keeper", "--give-up-after", "45.5")
    assert became.value.args == (keepstore.command_line("/run/y/keeper.sock", 45.5),)


def test_it_must_know_where_to_listen(manta: Manta) -> None:
    done = manta("keeper")
    assert done.code == 2
    assert "MANTA_DAEMON_KEEPER" in done.err


@pytest.mark.parametrize("path", ["relative/keeper.sock", f"/run/{'x' * 103}"])
def test_the_path_is_a_socket_s(manta: Manta, path: str) -> None:
    done = manta("keeper", "--keeper", path)
    assert done.code == 2
    assert "absolute path of 107 bytes" in done.err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_it_does_not_wait_for_ever(manta: Manta, seconds: str) -> None:
    done = manta("keeper", "--keeper", "/run/x/keeper.sock", "--give-up-after", seconds)
    assert done.code == 2
    assert "--give-up-after" in done.err
