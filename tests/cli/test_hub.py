"""manta.cli.hub: a folder served, found and read with plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.cli.conftest import Manta


def serve(place: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "manta", "hub", "serve", str(place / "models"), "--port", "0", "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_folder_is_served_until_the_signal(place: Path) -> None:
    (place / "models/org/name").mkdir(parents=True)
    (place / "models/org/name/config.json").write_text("{}")
    with serve(place) as hub:
        assert hub.stdout is not None
        endpoint = json.loads(hub.stdout.readline())["endpoint"]
        assert endpoint.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{endpoint}/org/name/resolve/main/config.json", timeout=10) as answer:
            assert answer.read() == b"{}"
        hub.send_signal(signal.SIGTERM)
        hub.communicate(timeout=20)
    assert hub.returncode == 0


def test_what_cannot_be_served_is_a_sentence(manta: Manta, place: Path) -> None:
    done = manta("hub", "serve", place / "nowhere", "--port", "0")
    assert done.code == 2
    assert "is not a directory" in done.err
    (place / "models").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = manta("hub", "serve", place / "models", "--port", taken.getsockname()[1])
    assert done.code == 2
    assert "cannot be listened on" in done.err


def test_serving_everybody_without_a_token_is_warned_about(manta: Manta, place: Path) -> None:
    done = manta("hub", "serve", place / "nowhere", "--host", "0.0.0.0", "--port", "0")
    assert "anyone who reaches 0.0.0.0 can read every file" in done.err
