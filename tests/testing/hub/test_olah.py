"""olah, a caching proxy for the Hub written by others, between huggingface_hub and the test hub.

It brings its own dependencies, so it lives in a virtual environment of its own:
    python -m venv /tmp/olah && /tmp/olah/bin/pip install olah==0.5.4
    MANTA_OLAH=/tmp/olah/bin/olah-cli python -m pytest tests/testing/hub/test_olah.py
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import GATED, MODEL, OLD_NAME, OWNERLESS, READER_TOKEN, RENAMED, SHARDED
from tests.testing.hub.conftest import Client

OLAH = os.environ.get("MANTA_OLAH") or shutil.which("olah-cli")

pytestmark = pytest.mark.skipif(OLAH is None, reason="no olah-cli on PATH; set MANTA_OLAH to one to run this")


@pytest.fixture
def olah(hub: HubProcess, tmp_path: Path) -> Iterator[str]:
    """olah's endpoint, with the test hub as its Hugging Face."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = f"127.0.0.1:{port}"
    folder = tmp_path / "olah"
    folder.mkdir()
    command = [str(OLAH), "--host", "127.0.0.1", "--port", str(port), "--hf-scheme", "http"]
    command += ["--hf-netloc", hub.endpoint.removeprefix("http://")]
    command += ["--hf-lfs-netloc", hub.cdn_endpoint.removeprefix("http://")]
    command += ["--mirror-scheme", "http", "--mirror-netloc", here, "--mirror-lfs-netloc", here]
    command += ["--repos-path", str(folder / "repos"), "--log-path", str(folder / "logs")]
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, (folder / "out").read_text()
            assert time.monotonic() < deadline, "olah did not start"
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://{here}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("repo", [MODEL, SHARDED, GATED, OWNERLESS, OLD_NAME])
def test_snapshots_through_olah(hub: HubProcess, olah: str, client: Client, repo: str) -> None:
    code = f"""
import hashlib, os
from huggingface_hub import snapshot_download
folder = snapshot_download({repo!r})
result = {{}}
for parent, _, names in os.walk(folder):
    for name in names:
        path = os.path.join(parent, name)
        with open(path, "rb") as file:
            result[os.path.relpath(path, folder)] = hashlib.file_digest(file, "sha256").hexdigest()
"""
    digests = client(code, endpoint=olah, token=READER_TOKEN)
    files = hub.files(RENAMED if repo == OLD_NAME else repo).files
    assert set(digests) == set(files)
    for path, file in files.items():
        assert not file.sha256 or digests[path] == file.sha256
    assert hub.stats().violations == []
