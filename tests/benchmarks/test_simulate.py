"""`python -m benchmarks simulate`: its table, and what was measured beside what is predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as main_module
from manta.testing import netns

pytest.importorskip("numpy", reason="numpy is optional and not installed")


@pytest.mark.parametrize("profile", ["equal", "heterogeneous", "churn"])
def test_it_runs_without_root_or_namespaces(
    profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netns, "obstacle", lambda: "run as root")
    path = tmp_path / "simulate.json"
    code = main_module.main(
        f"simulate --nodes 1,3 --size 32MiB --shards 2 --profile {profile} --no-chart --no-goals --json {path}".split()
    )
    assert code == 0
    document = json.loads(path.read_text())
    assert [row["nodes"] for row in document["table"]] == [1, 3]
    assert all(row["origin copies"] >= 1 for row in document["table"])
    assert document["table"][1]["swarm off s"] == pytest.approx(3 * document["table"][0]["bound s"], rel=0.7)
    assert "slowest / bound" in capsys.readouterr().out


def test_what_was_measured_stands_beside_what_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "cluster.json"
    runs = [
        {"nodes": nodes, "swarm": way, "seconds": [2.9, 3.1], "bytes": 64 << 20, "origin_bytes": 64 << 20, "idle": 0.5}
        for nodes in (1, 2)
        for way in ("on", "off")
    ]
    measured.write_text(json.dumps({"name": "cluster", "runs": runs}))
    path = tmp_path / "compare.json"
    assert main_module.main(f"simulate --compare {measured} --link 2e8 --no-chart --json {path}".split()) == 0
    table = json.loads(path.read_text())["table"]
    assert [(row["nodes"], row["swarm"]) for row in table] == [(1, "on"), (1, "off"), (2, "on"), (2, "off")]
    assert all(row["slowest s measured"] == 3.1 for row in table)
    assert [row["copies predicted"] for row in table] == pytest.approx([1, 1, 1, 2], abs=0.01)
    assert table[3]["predicted / measured"] == pytest.approx(5.6 / 3.1, rel=0.05)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"runs": [{"nodes": 1}]}', '{"runs": 3}'])
def test_what_is_no_measurement_is_said(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(text)
    assert main_module.main(["simulate", "--compare", str(path)]) == 2
    assert "is no result of" in capsys.readouterr().err


@pytest.mark.parametrize("nodes", ["0", "x", "", "-3", "1000000"])
def test_numbers_of_nodes(nodes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_module.main(["simulate", f"--nodes={nodes}"])
    assert "not numbers of nodes" in capsys.readouterr().err
