"""Fixtures of the mount suite: one hub for all tests, a fresh node for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.testing.hub import Generated, HubProcess, RepoSpec, Text
from manta.testing.hub.standard import MODEL, standard_spec
from tests.mount.node import Node, needs_fuse

BIG = "manta/big"
"""A repo with one file of many chunks, BIG_SIZE bytes: not a multiple of anything."""
BIG_FILE = "weights.bin"
BIG_SIZE = 61 * 1024 * 1024 + 777


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = needs_fuse()
    for item in items:
        if "/tests/mount/" in str(item.path):
            item.add_marker(pytest.mark.fuse)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def hub_process() -> Iterator[HubProcess]:
    spec = standard_spec()
    spec.repos.append(RepoSpec(id=BIG, files={"config.json": Text("{}"), BIG_FILE: Generated("big", BIG_SIZE)}))
    with HubProcess(spec) as hub:
        yield hub


@pytest.fixture
def hub(hub_process: HubProcess) -> Iterator[HubProcess]:
    """The hub as its spec says, without faults."""
    yield hub_process
    hub_process.reset()


@pytest.fixture
def node(hub: HubProcess) -> Iterator[Node]:
    with Node(hub.endpoint) as node:
        yield node


@pytest.fixture(scope="module")
def shared_mount(hub_process: HubProcess) -> Iterator[Path]:
    """One mount of the standard model for tests that change nothing."""
    with Node(hub_process.endpoint) as node:
        yield node.mount(MODEL)
