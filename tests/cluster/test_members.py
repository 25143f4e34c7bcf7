"""Members that vanish, are cut off or hold another key: the others go on, and a node that is alone works by itself."""

from __future__ import annotations

import subprocess

from manta.testing.cluster import Cluster, Node, set_key
from tests.cluster.conftest import copies

STRANGE_KEY = "the key of another cluster altogether"


def test_a_member_that_is_killed_while_all_read_costs_nobody_an_error(
    cluster: Cluster, nodes: list[Node], repo: str
) -> None:
    directories = [node.mount(repo) for node in nodes]
    survivors = nodes[:3]
    readings = [cluster.reading(node, repo, at) for node, at in zip(survivors, directories, strict=False)]
    try:
        for reading in readings:
            reading.go()
        cluster.hub.wait_for(2, origin="cdn", kind="blob", repo=repo)
        nodes[3].kill()
        for node, reading in zip(survivors, readings, strict=True):
            cluster.check(repo, reading.result(60), node)
    finally:
        for reading in readings:
            reading.close()
    assert copies(cluster, repo) < 2
    # With what it has and what the others have, it needs nothing more when it is back.
    cluster.hub.reset(content=False)
    nodes[3].start()
    cluster.read(nodes[3:], repo)
    cluster.await_quiet()
    assert cluster.origin_bytes(repo) == 0


def test_the_others_read_on_while_a_member_is_cut_off_and_it_when_it_is_back(
    cluster: Cluster, nodes: list[Node], repo: str
) -> None:
    lonely = cluster.net.nodes[0]
    directories = [node.mount(repo) for node in nodes]
    readings = [cluster.reading(node, repo, at) for node, at in zip(nodes, directories, strict=True)]
    try:
        for reading in readings:
            reading.go()
        cluster.hub.wait_for(2, origin="cdn", kind="blob", repo=repo)
        cluster.net.cut(lonely)
        for node, reading in zip(nodes[1:], readings[1:], strict=True):
            cluster.check(repo, reading.result(60), node)
        cluster.net.mend(lonely)
        cluster.check(repo, readings[0].result(60), nodes[0])
    finally:
        for reading in readings:
            reading.close()
    # At worst each side takes a copy, and what was on its way when the link was cut comes again.
    assert copies(cluster, repo) < 2.5


def test_a_node_with_another_key_is_left_alone_and_works_by_itself(
    cluster: Cluster, nodes: list[Node], repo: str, other_repo: str
) -> None:
    stranger, *friends = nodes
    stranger.stop()
    set_key(stranger, STRANGE_KEY)
    stranger.start()
    cluster.read([stranger], repo)
    assert 1.0 <= copies(cluster, repo) <= 1.1
    # Nobody takes anything from it, and the others share as before.
    cluster.hub.reset(content=False)
    cluster.read(friends, repo)
    assert 1.0 <= copies(cluster, repo) <= 1.1
    # Nobody gives it anything.
    cluster.read(friends, other_repo)
    cluster.await_quiet()
    cluster.hub.reset(content=False)
    cluster.read([stranger], other_repo)
    assert 1.0 <= copies(cluster, other_repo) <= 1.1


def test_the_page_opens_elsewhere_by_its_link_only(cluster: Cluster, nodes: list[Node]) -> None:
    link = nodes[0].client.page().url

    def opened(url: str) -> str:
        """The status that a program of another node gets, and what it gets."""
        command = ["curl", "--silent", "--max-time", "10", "--write-out", "\n%{http_code}", url]
        return subprocess.run(
            nodes[1].place.command(command), check=False, capture_output=True, text=True, timeout=20
        ).stdout

    page, _, status = opened(link).rpartition("\n")
    assert status == "200"
    assert "<html" in page
    assert nodes[0].settings["swarm.listen"] in link
    assert opened(link.partition("?")[0]).endswith("\n403")
    assert opened(link[:-1] + ("0" if link[-1] != "0" else "1")).endswith("\n403")
