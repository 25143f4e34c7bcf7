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
from benchmarks import load, loopback, metadata, rig, warm
from manta.testing import netns, scratch

OBSTACLE = netns.obstacle() or ("" if Path("/dev/fuse").exists() else "there is no /dev/fuse")

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.netns,
    pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "possible"),
]

SMALL = {
    "cold": ("cold --size 16MiB --rounds 1", 2),
    "ttfb": ("ttfb --size 1MiB --samples 2 --latency 0.005", 1),
    "parallel": ("parallel --size 16MiB", 10),
    "load": ("load --size 16MiB", 3),
    "faults": ("faults --size 16MiB --rounds 1", 1),
    "metadata, kernel": ("metadata --size 1MiB --files 40 --fuse kernel --set fuse.complete_at_open=64KiB", 8),
    "metadata, pyfuse3": ("metadata --size 1MiB --files 40 --fuse pyfuse3", 9),
    "loopback": ("loopback --size 16MiB --rounds 1", 2),
    "warm": ("warm --size 16MiB --rounds 1", 10),
    "survive, kernel": ("survive --size 8MiB --rate 1e7 --kills 2 --fuse kernel", 4),
    "survive, pyfuse3": ("survive --size 8MiB --rate 2e7 --kills 2 --fuse pyfuse3", 4),
    "cluster": ("cluster --size 16MiB --nodes 2", 2),
    "cluster, one joins": ("cluster --size 16MiB --nodes 2 --swarm on --join", 2),
    "churn": ("churn --size 16MiB --nodes 2 --swarm on --kills 2 --every 0.5", 3),
    "peerpath": ("peerpath --size 16MiB --rounds 1", 1),
    "publish": ("publish --latency 0.005 --concurrent 3 --volumes 30", 8),
}
"""A command, and how many goals it has."""


@pytest.fixture
def folder() -> Iterator[Path]:
    """pytest's own temporary paths are longer than a socket's may be."""
    with tempfile.TemporaryDirectory(prefix="manta-") as path:
        yield Path(path)


@pytest.mark.parametrize("case", SMALL)
def test_it_runs_and_cleans_up(
    case: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = SMALL[case][0].split()
    if name in ("load", "warm", "survive"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    missing = [program for program in main_module.BENCHMARKS[name].PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, and a test installs nothing")
    # Everybody's page cache is not a test's to drop.
    for module in (rig, load, metadata, loopback, warm):
        monkeypatch.setattr(module, "drop_page_cache", lambda: None)
    monkeypatch.setattr(warm, "TURNS", dict.fromkeys(warm.TURNS, 1))
    namespaces = set(os.listdir("/run/netns"))
    results = tmp_path / "results.json"
    arguments = [name, *options, "--scratch", str(folder), "--json", str(results), "--no-goals", "--no-chart"]
    assert main_module.main(arguments) == 0, capsys.readouterr().err
    document = json.loads(results.read_text())
    assert document["runs"]
    assert document["table"]
    assert len(document["goals"]) == SMALL[case][1]
    # Counts hold at any size, unlike ratios.
    assert all(goal["met"] for goal in document["goals"] if goal["goal"] == "== 0")
    assert list(folder.iterdir()) == []
    assert [mount for mount in scratch.mountinfo() if mount[0].is_relative_to(folder)] == []
    ours = f"manta-{os.getpid()}-"
    assert not [entry for entry in set(os.listdir("/run/netns")) - namespaces if entry.startswith(ours)]
