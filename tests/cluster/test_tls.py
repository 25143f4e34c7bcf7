"""Nodes that speak TLS share one copy as others do, and have nothing to do with one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trustme

from manta.testing.cluster import Cluster, Node, await_members, start_all
from tests.cluster.conftest import copies
from tests.mount.node import wait_until

NAME = "nodes.example"
"""One name for all of them, as a cluster's certificate has it."""


@contextmanager
def encrypted(nodes: list[Node], folder: Path) -> Iterator[None]:
    """Starts them anew with certificates of one authority, and stops them at the end."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    for number, node in enumerate(nodes):
        certificate = authority.issue_cert(NAME)
        certificate.private_key_pem.write_to_path(str(folder / f"{number}.key"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{number}.pem"))
        node.stop()
        node.settings |= {
            "swarm.tls_certificate": str(folder / f"{number}.pem"),
            "swarm.tls_key": str(folder / f"{number}.key"),
            "swarm.tls_authorities": str(folder / "authority.pem"),
            "swarm.tls_name": NAME,
        }
    try:
        start_all(nodes)
        yield
    finally:
        for node in nodes:
            node.stop()
            for name in ("certificate", "key", "authorities", "name"):
                del node.settings[f"swarm.tls_{name}"]


def test_with_certificates_nodes_share_one_copy(cluster: Cluster, nodes: list[Node], repo: str, tmp_path: Path) -> None:
    ours, plain = nodes[:3], nodes[3]
    with encrypted(ours, tmp_path):
        # All four are named, and the one that speaks plain HTTP is none of them.
        await_members(ours)
        addresses = {node.settings["swarm.listen"] for node in ours}
        for node in ours:
            up = {member.address for member in node.client.peers().members if member.state == "up"}
            assert up == addresses - {node.settings["swarm.listen"]}
        wait_until(lambda: all(member.state != "up" for member in plain.client.peers().members))
        cluster.read(ours, repo)
        assert 1.0 <= copies(cluster, repo) <= 1.1
        given = sum(member.bytes_out for node in ours for member in node.client.peers().members)
        assert given > cluster.size(repo), "two thirds and more of three copies"
