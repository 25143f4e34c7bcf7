"""Fixtures of the cluster suite: four nodes with the swarm on, in network namespaces behind equal links, and a repo for each test.

The nodes run on from test to test; a test that kills or cuts one off leaves it so, and the next test gets it well again. Nothing here
asks how long something took: the links are limited so that bytes take a while and things can happen meanwhile, and what counts is bytes
and counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from manta.testing.cluster import KEY, Cluster, Node, await_members, obstacle, set_key, start_all
from manta.testing.hub import Generated, HubSpec, RepoSpec, Text

NODES = 4
SETTINGS = {"hub.timeout_s": "5"}
"""How long a mount waits for a hub that is gone is not what is tested here."""
RATE = 400_000_000
REPOS = 12
SHARD_BYTES = 6 * 8 * 1024 * 1024 - 12345
"""Six chunks, the last one short. One chunk of the repo that is fetched twice makes 1.08 copies."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = obstacle()
    for item in items:
        if "/tests/cluster/" in str(item.path):
            item.add_marker(pytest.mark.netns)
            item.add_marker(pytest.mark.fuse)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def _spec() -> HubSpec:
    return HubSpec(
        repos=[
            RepoSpec(
                id=f"cluster/model-{number}",
                files={
                    "config.json": Text(f'{{"number": {number}}}\n'),
                    "model-1.safetensors": Generated(f"{number} first", SHARD_BYTES),
                    "model-2.safetensors": Generated(f"{number} second", SHARD_BYTES),
                },
            )
            for number in range(REPOS)
        ]
    )


@pytest.fixture(scope="package")
def running() -> Iterator[tuple[Cluster, list[Node]]]:
    with (
        Cluster.set_up(_spec(), NODES, rate=RATE, origin_rate=RATE) as cluster,
        cluster.nodes(NODES, swarm=True, settings=SETTINGS) as nodes,
    ):
        yield cluster, nodes


@pytest.fixture
def cluster(running: tuple[Cluster, list[Node]]) -> Iterator[Cluster]:
    """All links and the hub as they were made, counters at zero; afterwards too."""
    made, _ = running
    _heal(made)
    yield made
    _heal(made)


@pytest.fixture
def nodes(cluster: Cluster, running: tuple[Cluster, list[Node]]) -> list[Node]:
    """Four nodes that run, with the cluster's key, and know of each other."""
    _, made = running
    strangers = [node for node in made if (node.folder / "key").read_text().strip() != KEY]
    for node in strangers:
        node.stop()
        set_key(node, KEY)
    start_all([node for node in made if not node.pid])
    await_members(made)
    return made


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def repo(numbers: Iterator[int]) -> str:
    """A repo that no node has anything of: two shards of six chunks and a small file."""
    return f"cluster/model-{next(numbers)}"


@pytest.fixture
def other_repo(numbers: Iterator[int]) -> str:
    """Another one."""
    return f"cluster/model-{next(numbers)}"


def _heal(cluster: Cluster) -> None:
    for host in (*cluster.net.nodes, cluster.net.origin):
        cluster.net.mend(host)
    cluster.hub.reset(content=False)


def copies(cluster: Cluster, repo: str) -> float:
    """How many times the repo's size the hub has sent of it."""
    cluster.await_quiet()
    return cluster.origin_bytes(repo) / cluster.size(repo)
