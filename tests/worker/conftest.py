"""What the worker's tests share: a hub process with one file, and a cache file to fetch it into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.testing.hub import Generated, GeneratedContent, HubProcess, HubSpec, RepoSpec, UserSpec

SIZE = 3_000_017
REPO = "manta/one"
FILE = "model.safetensors"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="session")
def _worker_hub() -> Iterator[HubProcess]:
    spec = HubSpec(
        repos=[
            RepoSpec(id=REPO, files={FILE: Generated(seed="one", size=SIZE), "config.txt": Generated("git", 5000)}),
            RepoSpec(id="manta/private", files={FILE: Generated("hidden", 10_000)}, private=True),
        ],
        users=[UserSpec(name="reader", token=TOKEN, access=["manta/private"])],
    )
    with HubProcess(spec) as hub:
        yield hub


@pytest.fixture
def hub(_worker_hub: HubProcess) -> HubProcess:
    """The hub, as if freshly started."""
    _worker_hub.reset()
    return _worker_hub


@pytest.fixture(scope="session")
def data() -> bytes:
    """The true bytes of FILE."""
    return GeneratedContent("one", SIZE).read()


@pytest.fixture
def cache_fd(tmp_path: Path) -> Iterator[int]:
    """A sparse cache file of SIZE bytes."""
    fd = os.open(tmp_path / "cache.data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)
