"""serve_folder in a process of its own: what `manta hub serve DIR` gives an air-gapped site."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manta.testing.hub import GeneratedContent
from tests.testing.hub.conftest import Client, fetch

WEIGHTS = GeneratedContent("served", 12_000_000)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS.read())
    return tmp_path / "site"


@contextmanager
def _serving(root: Path, *, token: str = "", log: bool = False) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    code = f"""
from pathlib import Path
from manta.testing.hub.serve import serve_folder
serve_folder({str(root)!r}, port=0, token={token!r}, log_requests={log}, index=Path({str(root.parent / "index.json")!r}),
             ready=lambda endpoint: print(endpoint, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        yield process.stdout.readline().strip(), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_clients_download_from_it(root: Path, client: Client) -> None:
    code = """
import hashlib, os
from huggingface_hub import snapshot_download, HfApi, HfFileSystem
folder = snapshot_download("org/name")
with HfFileSystem().open("org/name/model.safetensors") as file:
    file.seek(9_000_000)
    part = file.read(10)
result = [
    sorted(os.listdir(folder)),
    hashlib.file_digest(open(folder + "/model.safetensors", "rb"), "sha256").hexdigest(),
    [model.id for model in HfApi().list_models()],
    part.hex(),
]
"""
    with _serving(root) as (endpoint, _):
        # A token left over from the real Hub must not get in the way.
        files, sha256, models, part = client(code, endpoint=endpoint, token="hf_of_another_hub")
    assert files == ["config.json", "model.safetensors"]
    assert sha256 == hashlib.sha256(WEIGHTS.read()).hexdigest()
    assert models == ["org/name"]
    assert bytes.fromhex(part) == WEIGHTS.read(9_000_000, 9_000_010)


def test_one_port_serves_files_directly(root: Path) -> None:
    with _serving(root) as (endpoint, _):
        url = f"{endpoint}/org/name/resolve/main/model.safetensors"
        head = fetch(url, method="HEAD")
        assert head.status == 200
        assert head.headers["etag"] == head.headers["x-linked-etag"]
        part = fetch(url, range_="bytes=5000000-5000099")
        assert (part.status, part.body) == (206, WEIGHTS.read(5_000_000, 5_000_100))
        assert fetch(f"{endpoint}/org/name/resolve/main/config.json").body == b"{}"
        assert fetch(f"{endpoint}/org/missing/resolve/main/x").headers["x-error-code"] == "RepoNotFound"


def test_no_admin_api(root: Path) -> None:
    with _serving(root) as (endpoint, _):
        assert fetch(f"{endpoint}/_hub/stats").status == 404
        assert fetch(f"{endpoint}/_hub/faults", method="POST", body=b"{}").status in {404, 405}


def test_a_token_can_be_required(root: Path) -> None:
    with _serving(root, token="secret") as (endpoint, _):
        for path in ("/api/models/org/name", "/org/name/resolve/main/config.json", "/api/models"):
            assert fetch(endpoint + path).status == 401
            assert fetch(endpoint + path, token="wrong").status == 401
            assert fetch(endpoint + path, token="secret").status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_in_peace_and_requests_are_logged(root: Path, number: signal.Signals) -> None:
    with _serving(root, log=True) as (endpoint, process):
        fetch(f"{endpoint}/org/name/resolve/main/config.json", range_="bytes=0-0")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
    assert "GET /org/name/resolve/main/config.json bytes=0-0: 206, 1 bytes" in errors
    assert "Traceback" not in errors


def test_it_ends_while_it_hashes(root: Path) -> None:
    with (root / "org" / "name" / "endless.bin").open("wb") as file:
        file.truncate(1 << 42)  # sparse; its sha256 would take most of an hour
    with _serving(root) as (endpoint, process):
        assert fetch(f"{endpoint}/api/whoami-v2").status == 401
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
    assert "Traceback" not in errors
