"""What the worker's tests share: a hub process with one file, and a cache file to fetch it into."""

from __future__ import annotations

import os
import shutil
import subprocess
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For localhost, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"
