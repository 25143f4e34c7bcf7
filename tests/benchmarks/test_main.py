"""benchmarks.__main__: arguments, exit codes, and that results are written as the contract says."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as main_module
from benchmarks import cold, machine
from benchmarks.report import Chart, Goal, Report
from manta.errors import Absent, Corrupt
from manta.testing import netns


@pytest.fixture(autouse=True)
def _ready(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is missing, and the signal handlers that main sets are put back."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(machine, "require", lambda programs: None)
    monkeypatch.setattr(netns, "obstacle", lambda: "")
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def returning(value: float) -> Report:
    return Report(
        "cold",
        table=[{"what": "mount", "ratio": value}],
        goals=[Goal("mount / curl", value, ">=", 0.95)],
        chart=Chart("cold", "MB/s", [("mount", 118.0)], [("goal", 113.6)]),
    )


@pytest.mark.parametrize(("value", "flags", "code"), [(1.0, [], 0), (0.5, [], 1), (0.5, ["--no-goals"], 0)])
def test_the_exit_code_tells_whether_the_goals_were_met(
    monkeypatch: pytest.MonkeyPatch, value: float, flags: list[str], code: int
) -> None:
    monkeypatch.setattr(cold, "run", lambda options: returning(value))
    assert main_module.main(["cold", *flags]) == code


def test_results_are_written_and_the_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cold, "run", lambda options: returning(1.0))
    path = tmp_path / "deep" / "cold.json"
    assert main_module.main(["cold", "--json", str(path), "--no-chart"]) == 0
    document = json.loads(path.read_text())
    assert document["name"] == "cold"
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["memory_bytes"] > 0
    assert document["goals"] == [{"name": "mount / curl", "value": 1.0, "goal": ">= 0.95", "met": True}]
    assert list(path.parent.iterdir()) == [path]
    assert "mount / curl" in capsys.readouterr().out


def test_the_chart_goes_beside_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is optional and not installed")
    monkeypatch.setattr(cold, "run", lambda options: returning(1.0))
    assert main_module.main(["cold", "--json", str(tmp_path / "cold.json")]) == 0
    assert (tmp_path / "cold.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [Absent("This benchmark needs curl"), Corrupt("other bytes than the hub has")])
def test_what_could_not_be_run_is_said_and_is_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(options: argparse.Namespace) -> Report:
        raise error

    monkeypatch.setattr(cold, "run", fail)
    assert main_module.main(["cold", "--json", str(tmp_path / "cold.json")]) == 2
    assert str(error) in capsys.readouterr().err
    assert not (tmp_path / "cold.json").exists()


def test_without_namespaces_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netns, "obstacle", lambda: "run as root")
    assert main_module.main(["cold"]) == 2
    assert "run as root" in capsys.readouterr().err


def test_an_interrupt_ends_with_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: argparse.Namespace) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(cold, "run", interrupt)
    assert main_module.main(["cold"]) == 130


def test_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(main_module.BENCHMARKS)


@pytest.mark.parametrize("name", main_module.BENCHMARKS)
def test_sizes_and_rates_can_be_reduced(name: str) -> None:
    options = main_module.build_parser().parse_args([name, "--size", "256MiB", "--rate", "2e8"])
    assert options.size == 256 * 1024**2
    assert options.rate == 2e8


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["cold", "--size", "many"], ["cold", "--rounds", "0"], ["cold", "--rate", "-1"]]
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main_module.main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err
