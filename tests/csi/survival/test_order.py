"""A pod reads its volume and compares every byte, while daemon, driver and keeper are killed and started again in any order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from manta.testing import csinode, pods
from manta.testing.csinode import CsiNode
from manta.testing.hub import Generated, GeneratedContent, HubProcess, HubSpec, RepoSpec, Text
from manta.testing.hub.files import FileSpec
from manta.testing.kubelet import Pod, inline
from tests.mount.node import wait_until

MODEL, FILE, SIZE = "org/model", "weights.bin", 64 * 1024 * 1024 + 4321
BANDWIDTH = 20_000_000
"""Bytes per second of the hub: some of the kills come while the file is cold, the others while all of it is there."""

READER = r"""
import hashlib, json, os, random, sys
path, truth, progress = sys.argv[1:]
block, chance = 256 * 1024, random.Random(7)
fd, true, told = os.open(path, os.O_RDONLY), os.open(truth, os.O_RDONLY), os.open(progress, os.O_WRONLY | os.O_CREAT)
size = os.fstat(fd).st_size
found = {"reads": 0, "wrong": [], "errors": []}
while not os.path.exists(progress + ".end"):
    at = chance.randrange(0, size)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if os.pread(fd, block, at) != os.pread(true, block, at):
            found["wrong"].append(at)
    except OSError as error:
        found["errors"].append([at, error.errno])
    found["reads"] += 1
    os.pwrite(told, f"{found['reads']:12}".encode(), 0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubProcess]:
    files: dict[str, FileSpec] = {"config.json": Text("{}"), FILE: Generated("survival", SIZE)}
    with HubProcess(HubSpec(repos=[RepoSpec(id=MODEL, files=files)])) as hub:
        yield hub


@pytest.fixture
def node(hub: HubProcess) -> Iterator[CsiNode]:
    if reason := csinode.obstacle():
        pytest.skip(reason)
    with CsiNode(hub.endpoint, keeper=True) as node:
        if node.client.status().survival_refusal:
            node.wait_for_keeping()
        yield node


class Reading:
    """Process of a pod that reads on until it is told to end."""

    def __init__(self, pod: pods.Container, path: Path, truth: Path, progress: Path) -> None:
        self._progress = progress
        self._pod = pod
        command = [sys.executable, "-S", "-E", "-c", READER, str(path), str(truth), str(progress)]
        self._process = pod.popen(command, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It ends with its pod's container, if not before."""
        Path(f"{self._progress}.end").touch()
        self._pod.kill()
        self._process.communicate(timeout=30)

    def reads(self) -> int:
        return int(self._progress.read_text().strip() or 0) if self._progress.exists() else 0

    def goes_on(self) -> None:
        """Waits until it has read again."""
        before = self.reads()
        wait_until(lambda: self.reads() > before + 2, 40.0)

    def end(self) -> dict[str, object]:
        Path(f"{self._progress}.end").touch()
        said, _ = self._process.communicate(timeout=60)
        found: dict[str, object] = json.loads(said)
        return found


STRIKES = ("daemon", "keeper", "csi", "daemon", "node pod", "keeper")
"""The node's pod is daemon and driver together."""


def strike(node: CsiNode, what: str) -> None:
    if what in {"daemon", "node pod"}:
        node.daemon.kill()
    if what in {"csi", "node pod"}:
        node.driver.kill()
    if what == "keeper":
        node.keeper.kill()
        node.start_keeper()
    if what in {"csi", "node pod"}:
        node.start_driver()
        node.kubelet.restart()
    if what in {"daemon", "node pod"}:
        node.start_daemon()
    node.wait_for_keeping()


def test_a_pod_reads_on_whatever_is_killed_and_in_which_order(node: CsiNode, hub: HubProcess, tmp_path: Path) -> None:
    truth = tmp_path / FILE
    with truth.open("wb") as out:
        out.writelines(GeneratedContent("survival", SIZE).pieces())
    hub.set_bandwidth(BANDWIDTH)
    volume = inline(Pod("serve-0"), "model", {"model": MODEL})
    target = node.kubelet.set_up(volume)
    with Reading(node.pod(volume), node.models / FILE, truth, tmp_path / "progress") as reading:
        reading.goes_on()
        for what in STRIKES:
            strike(node, what)
            reading.goes_on()
            node.kubelet.republish(volume)
            assert node.kubelet.mounted(target) == 1, what
        found = reading.end()
    assert found["wrong"] == []
    assert found["errors"] == []
    # Nothing of it is in the way of what comes next.
    second = inline(Pod("serve-1"), "model", {"model": MODEL})
    with node.kubelet.volume(second):
        assert node.pod(second).run("cat", str(node.models / "config.json")) == "{}"
        node.end_pods()
    node.kubelet.tear_down(volume)
    assert node.kubelet.mounts() == []
    node.wait_until(lambda: node.client.publications() == [], "the daemon still has publications")


def test_a_pod_ends_while_nobody_of_manta_is_there(node: CsiNode) -> None:
    """Daemon and keeper are gone; the driver unpublishes all the same, and the next daemon knows nothing of it."""
    volume = inline(Pod("serve-0"), "model", {"model": MODEL})
    node.kubelet.set_up(volume)
    node.pod(volume).run("cat", str(node.models / "config.json"))
    node.keeper.kill()
    node.daemon.kill()
    node.end_pods()
    node.kubelet.tear_down(volume)
    assert node.kubelet.mounts() == []
    node.start_keeper()
    node.start_daemon()
    assert node.client.publications() == []
    with node.kubelet.volume(volume):
        assert node.host.run("cat", str(node.kubelet.target(volume) / "config.json")) == "{}"
