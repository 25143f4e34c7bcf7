"""manta.testing.cluster: nodes mount and read in their namespaces, die and come back, and nothing of them stays. Without the swarm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manta.errors import Corrupt, Unavailable
from manta.testing import netns, scratch
from manta.testing.cluster import Cluster, Node, obstacle
from manta.testing.hub import Generated, HubSpec, RepoSpec, Text
from manta.testing.hub.files import FileSpec
from manta.testing.reading import Found, Reading

pytestmark = [
    pytest.mark.netns,
    pytest.mark.fuse,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "possible"),
]

REPO = "org/name"
FILES: dict[str, FileSpec] = {
    "config.json": Text("{}"),
    "sub/a.bin": Generated("a", 20_000_000),
    "sub/b.bin": Generated("b", 3),
}

OWNER = """
import time
from manta.testing.cluster import Cluster
from manta.testing.hub import HubSpec

with Cluster.set_up(HubSpec(), 1) as cluster, cluster.nodes(1, swarm=False):
    print(cluster.folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster.set_up(HubSpec(repos=[RepoSpec(id=REPO, files=dict(FILES))]), 2) as made:
        yield made
    assert not made.folder.exists()
    assert scratch.mounts(made.folder) == []
    assert not [name for name in os.listdir("/run/netns") if name == made.net.switch]


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[list[Node]]:
    cluster.hub.reset()
    with cluster.nodes(2, swarm=False) as made:
        yield made
    assert not any(node.folder.exists() for node in made)
    assert not any(node.processes() for node in made)


def test_each_node_reads_all_of_it_from_the_origin(cluster: Cluster, nodes: list[Node]) -> None:
    found = cluster.read(nodes, REPO)
    assert [each.bytes for each in found] == 2 * [cluster.size(REPO)]
    cluster.await_quiet()
    assert cluster.origin_bytes(REPO) == 2 * cluster.size(REPO)
    inside, others = (network_of(node) for node in nodes)
    assert len(inside) == 1
    assert inside.isdisjoint(others)


def network_of(node: Node) -> set[str]:
    """The namespaces of its processes, but of those that have ended since they were listed."""
    found = set()
    for pid in node.processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found


def test_a_killed_node_comes_back_with_its_cache_or_without(cluster: Cluster, nodes: list[Node]) -> None:
    cluster.read(nodes[:1], REPO)
    nodes[0].kill()
    assert nodes[0].processes() == []
    assert scratch.mounts(nodes[0].folder) == []
    nodes[0].start()
    cluster.hub.reset(content=False)
    cluster.read(nodes[:1], REPO)
    assert cluster.origin_bytes(REPO) == 0
    nodes[0].kill()
    nodes[0].empty()
    nodes[0].start()
    cluster.read(nodes[:1], REPO)
    assert cluster.origin_bytes(REPO) == cluster.size(REPO)


def test_a_struck_node_keeps_its_mounts(cluster: Cluster, nodes: list[Node]) -> None:
    directory = nodes[0].mount(REPO)
    before = set(nodes[0].processes())
    nodes[0].strike()
    with cluster.reading(nodes[0], REPO, directory) as reading:
        reading.go()
        cluster.check(REPO, reading.result(60), nodes[0])
    assert len(before & set(nodes[0].processes())) == 1  # the keeper


def test_a_node_that_is_cut_off_reads_on_when_it_is_back(cluster: Cluster, nodes: list[Node]) -> None:
    directory = nodes[0].mount(REPO)
    cluster.net.cut(cluster.net.nodes[0])
    with cluster.reading(nodes[0], REPO, directory) as reading:
        reading.go()
        with pytest.raises(Unavailable, match="still waiting"):
            reading.result(0.5)
        assert cluster.origin_bytes(REPO) == 0
        cluster.net.mend(cluster.net.nodes[0])
        cluster.check(REPO, reading.result(60), nodes[0])


def test_other_bytes_and_errors_are_told(cluster: Cluster, nodes: list[Node]) -> None:
    size = cluster.size(REPO)
    right = {f"/m/{name}": fact.sha256 for name, fact in cluster.hub.files(REPO).files.items()}
    good = Found(0.0, 1.0, size, 0.0, right, "")
    cluster.check(REPO, good, nodes[0])
    for wrong in (
        Found(0.0, 1.0, size, 0.0, right | {"/m/sub/a.bin": "0" * 64}, ""),
        Found(0.0, 1.0, size - 1, 0.0, right, ""),
        Found(0.0, 1.0, size, 0.0, {}, ""),
    ):
        with pytest.raises(Corrupt):
            cluster.check(REPO, wrong, nodes[0])
    with pytest.raises(Unavailable, match="no such thing"):
        cluster.check(REPO, Found(0.0, 1.0, 0, 0.0, {}, "no such thing"), nodes[0])


def test_a_reader_of_a_mount_that_hangs_is_ended(cluster: Cluster, nodes: list[Node]) -> None:
    directory = nodes[0].mount(REPO)
    stopped = nodes[0].processes()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    with Reading(nodes[0].folder, [directory / "sub/a.bin"]) as reading:
        reading.go()
        with pytest.raises(Unavailable):
            reading.result(0.5)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    nodes[0].kill()


def test_a_daemon_that_does_not_start_is_told_with_its_log(cluster: Cluster) -> None:
    with cluster.nodes(1, swarm=False, settings={"fetch.workers": "many"}, start=False) as (node,):
        with pytest.raises(Unavailable, match=r"(?s)did not start.*many"):
            node.start()
        node.kill()


def test_an_error_leaves_nothing_either(cluster: Cluster) -> None:
    seen: list[Node] = []

    def fail() -> None:
        with cluster.nodes(1, swarm=False) as (node,):
            seen.append(node)
            node.mount(REPO)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen[0].processes() == []
    assert scratch.mounts(seen[0].folder) == []


def test_what_a_killed_owner_left_is_swept() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout
    with owner.stdout as lines:
        folder = Path(lines.readline().decode().strip())
    owner.kill()
    owner.wait(timeout=20)
    assert scratch.processes(folder)
    scratch.sweep(folder.parent)
    assert netns.sweep()
    assert scratch.processes(folder) == []
    assert not folder.exists()
