"""Nodes of a cluster cost the origin one copy between them, and whoever comes later none."""

from __future__ import annotations

import time

from manta.testing.cluster import READ_TIMEOUT_S, Cluster, Node
from manta.testing.hub import faults
from tests.cluster.conftest import copies

COPIES_MAX = 1.1
"""One chunk of twelve may be fetched twice: whose owner was asked by two at once may change its mind."""

PAUSE_S = 5
"""Nodes tell each other of pauses about once a second."""


def test_four_cold_nodes_at_once_take_one_copy_from_the_origin(cluster: Cluster, nodes: list[Node], repo: str) -> None:
    cluster.read(nodes, repo)
    assert 1.0 <= copies(cluster, repo) <= COPIES_MAX


def test_a_node_that_joins_a_warm_cluster_takes_nothing(cluster: Cluster, nodes: list[Node], repo: str) -> None:
    nodes[3].kill()
    cluster.read(nodes[:3], repo)
    cluster.await_quiet()
    cluster.hub.reset(content=False)
    nodes[3].start()
    cluster.read(nodes[3:], repo)
    cluster.await_quiet()
    assert cluster.origin_bytes(repo) == 0


def test_what_one_has_all_can_read_while_the_origin_is_gone(cluster: Cluster, nodes: list[Node], repo: str) -> None:
    cluster.read(nodes[:1], repo)
    cluster.await_quiet()
    cluster.hub.reset(content=False)
    cluster.net.cut(cluster.net.origin)
    cluster.read(nodes[1:], repo)
    assert cluster.origin_bytes(repo) == 0


def test_what_several_have_in_parts_all_can_read_while_the_origin_is_gone(
    cluster: Cluster, nodes: list[Node], repo: str
) -> None:
    directories = [node.mount(repo) for node in nodes]
    files = ("config.json", "model-1.safetensors", "model-2.safetensors")
    for node, directory, name in zip(nodes, directories, files, strict=False):
        with cluster.reading(node, repo, directory, name) as reading:
            reading.go()
            assert reading.result(60).error == ""
    cluster.await_quiet()
    cluster.net.cut(cluster.net.origin)
    cluster.read(nodes, repo)


def test_a_pause_that_one_is_asked_for_is_kept_by_all(cluster: Cluster, nodes: list[Node], repo: str) -> None:
    cluster.hub.add_fault(faults.TooMany(form="retry-after", seconds=PAUSE_S), origin="cdn", times=1)
    waiting: set[Node] = set()
    with cluster.readings(nodes, repo) as readings:
        for reading in readings:
            reading.go()
        deadline = time.monotonic() + READ_TIMEOUT_S
        while not all(reading.ended() for reading in readings) and time.monotonic() < deadline:
            waiting |= {node for node in nodes if _is_asked_to_wait(cluster, node)}
            time.sleep(0.2)
        for node, reading in zip(nodes, readings, strict=True):
            cluster.check(repo, reading.result(1), node)
    assert waiting == set(nodes)
    assert copies(cluster, repo) <= COPIES_MAX


def _is_asked_to_wait(cluster: Cluster, node: Node) -> bool:
    sources = node.client.status().sources
    return any(source.origin == cluster.hub.cdn_endpoint and source.throttled_until > time.time() for source in sources)
