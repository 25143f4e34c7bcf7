"""The benchmarks themselves, far too small to say anything about speed: they run, find the right bytes, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as main_module
from benchmarks import load, loopback, metadata, rig, scratch
from manta.testing import netns

OBSTACLE = netns.obstacle() or ("" if Path("/dev/fuse").exists() else "there is no /dev/fuse")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.netns,
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "possible"),
]

SMALL = {
    "cold": ["--size", "16MiB", "--rounds", "1"],
    "ttfb": ["--size", "1MiB", "--samples", "2", "--latency", "0.005"],
    "parallel": ["--size", "16MiB"],
    "load": ["--size", "16MiB"],
    "faults": ["--size", "16MiB", "--rounds", "1"],
    "metadata": ["--size", "1MiB", "--files", "40"],
    "loopback": ["--size", "16MiB", "--rounds", "1"],
}
GOALS = {"cold": 2, "ttfb": 1, "parallel": 10, "load": 3, "faults": 1, "metadata": 9, "loopback": 2}


@pytest.fixture
def folder() -> Iterator[Path]:
    """pytest's own temporary paths are longer than a socket's may be."""
    with tempfile.TemporaryDirectory(prefix="manta-") as path:
        yield Path(path)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs_and_cleans_up(
    name: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "load":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    missing = [program for program in main_module.BENCHMARKS[name].PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, and a test installs nothing")
    # Everybody's page cache is not a test's to drop.
    for module in (rig, load, metadata, loopback):
        monkeypatch.setattr(module, "drop_page_cache", lambda: None)
    namespaces = set(os.listdir("/run/netns"))
    results = tmp_path / "results.json"
    arguments = [name, *SMALL[name], "--scratch", str(folder), "--json", str(results), "--no-goals", "--no-chart"]
    assert main_module.main(arguments) == 0, capsys.readouterr().err
    document = json.loads(results.read_text())
    assert document["runs"]
    assert document["table"]
    assert len(document["goals"]) == GOALS[name]
    # Counts hold at any size, unlike ratios.
    assert all(goal["met"] for goal in document["goals"] if goal["goal"] == "== 0")
    assert list(folder.iterdir()) == []
    assert [mount for mount in scratch.mountinfo() if mount[0].is_relative_to(folder)] == []
    ours = f"manta-{os.getpid()}-"
    assert not [entry for entry in set(os.listdir("/run/netns")) - namespaces if entry.startswith(ours)]
