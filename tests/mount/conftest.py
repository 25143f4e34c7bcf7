"""Fixtures of the mount suite: one hub for all tests, a fresh node for each, and every test by each FUSE session.

The rule. What a reader, the kernel or an operator can tell sessions apart by runs with every session, always: names, reads, errors of
reads, ends, restarts, what is held in memory and shown. Where the subject lies above the FUSE adapters (what the origin did, what the
disk did, which certificate it was), so that the filesystem gives either session the same bytes or the same error, the test is marked
`above_fuse` and runs with the first session, and with all under --all-sessions. What one session alone can do is marked
`only("kernel")`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.testing.hub import Generated, GeneratedContent, HubProcess, RepoSpec, Text
from manta.testing.hub.standard import MODEL, standard_spec
from tests.mount.node import SESSION, SESSIONS, Node, needs_fuse

BIG = "manta/big"
"""A repo with one file of many chunks, BIG_SIZE bytes: not a multiple of anything."""
BIG_FILE = "weights.bin"
BIG_SIZE = 61 * 1024 * 1024 + 777


def true_digest(at: int, end: int) -> str:
    """The sha256 of BIG_FILE's bytes from `at` to `end`."""
    return hashlib.sha256(GeneratedContent("big", BIG_SIZE).read(at, end)).hexdigest()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true bytes of BIG_FILE, on the disk."""
    path = tmp_path_factory.mktemp("truth") / BIG_FILE
    with path.open("wb") as out:
        out.writelines(GeneratedContent("big", BIG_SIZE).pieces())
    return path


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "session" not in metafunc.fixturenames:
        return
    only = next(metafunc.definition.iter_markers("only"), None)
    sessions = SESSIONS if only is None else tuple(name for name in SESSIONS if name in only.args)
    if metafunc.definition.get_closest_marker("above_fuse") and not metafunc.config.getoption("--all-sessions"):
        sessions = sessions[:1]
    metafunc.parametrize("session", sessions, indirect=True, scope="module")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = needs_fuse()
    for item in items:
        if "/tests/mount/" in str(item.path):
            item.add_marker(pytest.mark.fuse)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def session(request: pytest.FixtureRequest) -> Iterator[str]:
    """The FUSE session by which all nodes of the test serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SESSION, request.param)
        yield request.param


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
def node(session: str, hub: HubProcess) -> Iterator[Node]:
    with Node(hub.endpoint) as node:
        yield node


@pytest.fixture(scope="module")
def shared_mount(session: str, hub_process: HubProcess) -> Iterator[Path]:
    """One mount of the standard model for tests that change nothing."""
    with Node(hub_process.endpoint) as node:
        yield node.mount(MODEL)
