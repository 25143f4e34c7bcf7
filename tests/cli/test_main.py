"""manta.cli.main: help, usage errors, exit codes, how errors are written, and that starting stays cheap."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

from manta import __version__
from manta.cli.main import EXIT_CODES, VIEWS, build_parser
from manta.control import protocol
from manta.errors import BY_CODE, MantaError
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for sub in group.choices.values():
            yield from leaves(sub)


def test_every_command_exists_and_explains_itself() -> None:
    found = list(leaves(build_parser()))
    assert len(found) == 20
    for leaf in found:
        module, _, function = str(leaf.get_default("runs")).partition(":")
        assert callable(getattr(importlib.import_module(f"manta.cli.{module}"), function))
        text = leaf.format_help()
        assert leaf.description
        assert "examples:" in text or "examples:" in (leaf.epilog or "")
        for action in leaf._actions:
            assert action.help, f"{leaf.prog} {action.option_strings or action.metavar}"


def test_views_are_those_of_the_protocol() -> None:
    assert protocol.VIEWS == VIEWS


def test_help_and_version(manta: Manta) -> None:
    done = manta("--help")
    assert done.code == 0
    assert "exit codes" in done.out
    assert manta("--version").out == f"manta {__version__}\n"
    assert "[TARGET] DIR" in manta("mount", "--help").out
    nothing = manta()
    assert nothing.code == 2
    assert "commands:" in nothing.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mout", "x"], "did you mean 'mount'"),
        (["cache", "lss"], "invalid choice: 'lss'"),
        (["cache"], "manta cache --help"),
        (["status", "--fast"], "--fast"),
        (["mount"], "DIR"),
        (["mount", "a/b", "c", "d"], "unrecognized arguments: d"),
        (["mount", "a/b", "c", "--view", "flat"], "'flat'"),
        (["mount", "not a repo", "c"], "not a target"),
        (["mount", "a/b@x", "c", "--revision", "y"], "two revisions"),
        (["mount", "c", "--revision", "y"], "--revision needs a repo"),
        (["status", "--set", "cache.size"], "SECTION.FIELD=VALUE"),
        (["status", "--set", "cache.siz=1"], "did you mean 'cache.size'"),
        (["config", "--set", "cache.size=big"], "500GiB"),
        (["status", "--config", "/no/such.toml"], "--config names does not exist"),
        (["hub", "serve", "x", "--port", "99999"], "is not a port"),
        (["hub", "serve", "x", "--tls-cert", "c"], "--tls-cert and --tls-key"),
        (["cache", "gc", "--size", "small"], "500GiB"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(manta: Manta, arguments: list[str], words: str) -> None:
    done = manta(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("manta: ")
    assert words in done.err
    assert "Traceback" not in done.err
    document = manta(*arguments, "--json")
    assert document.code == 2
    assert document.json["error"]["code"] == "invalid"
    assert document.err == ""


def test_each_error_has_its_exit_code(manta: Manta, daemon: FakeDaemon) -> None:
    by_kind = dict(EXIT_CODES)
    for kind in BY_CODE.values():
        daemon.refusals["GET /v1/status"] = [kind("A sentence.")] * 8
        expected = next((code for cls, code in EXIT_CODES if issubclass(kind, cls)), 1)
        if kind.code == "not_running":
            continue
        done = manta("status")
        assert (done.code, done.err) == (expected, "manta: A sentence.\n"), kind
    assert set(by_kind.values()) == {2, 3, 4, 5, 6, 7}
    daemon.refusals.clear()


def test_tracebacks_come_only_when_asked_for(manta: Manta, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.refusals["GET /v1/status"] = [MantaError("A sentence.")] * 2
    assert "Traceback" not in manta("status", "-v").err
    assert "Traceback" in manta("status", "-vv").err
    monkeypatch.setattr("manta.cli.status._say_daemon", lambda *_: 1 / 0)
    done = manta("status")
    assert done.code == 1
    assert (
        done.err
        == "manta: unexpected ZeroDivisionError: division by zero. This is a mistake in Manta; -vv shows where.\n"
    )


def test_ctrl_c_is_130(manta: Manta, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manta.cli.status._say_daemon", interrupted)
    done = manta("status")
    assert (done.code, done.err) == (130, "manta: interrupted\n")


def test_a_reader_that_has_enough_is_no_error(place: object) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "manta", "config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""


def test_options_may_stand_anywhere(manta: Manta, daemon: FakeDaemon, place: object) -> None:
    for arguments in (
        ["--view", "hub-cache", "org/name", "{}"],
        ["org/name", "--view", "hub-cache", "{}"],
        ["org/name", "{}", "--view", "hub-cache"],
    ):
        daemon.mounts.clear()
        daemon.requests.clear()
        done = manta("mount", *[a.format(f"{place}/here") for a in arguments])
        assert done.code == 0, done.err
        (request,) = daemon.asked("POST", "/v1/mounts")
        assert (request.body["target"], request.body["view"]) == ("org/name", "hub-cache")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from manta.cli.main import build_parser; build_parser().format_help();"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " {'msgspec', 'http', 'ssl', 'asyncio', 'trio', 'aiohttp', 'huggingface_hub', 'subprocess', 'tomllib', 'ctypes'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
