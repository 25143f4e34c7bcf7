"""`rclone mount` of one file of the hub, here and only here: the rival of the `loopback` benchmark.

rclone's http remote lists what an HTML page links to, and the hub has no such page. So one that links to the file is served beside it,
and requests for the file are redirected to its signed CDN URL, as the hub redirects everybody: rclone makes few requests (they ask for
128 MiB and more), and the bytes come from the CDN without a detour.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from manta.errors import Unavailable
from manta.testing import scratch

CacheMode = Literal["off", "full"]
"""rclone's --vfs-cache-mode: straight from the network, or by way of sparse files on disk."""

START_TIMEOUT_S = 20
END_TIMEOUT_S = 20
MODIFIED = "Sat, 01 Jan 2000 00:00:00 GMT"


@contextmanager
def mounted(folder: Path, name: str, size: int, url: str, mode: CacheMode) -> Iterator[tuple[Path, int]]:
    """The path of the file `name` in a fresh mount below `folder`, and rclone's pid. `url` is where its bytes are.

    All settings but the cache's place and mode are rclone's own; of them matter --vfs-read-chunk-size (128 MiB, doubling) and
    --buffer-size (16 MiB). At the end it is unmounted, and the cache gone with `folder` at the latest.
    """
    directory = folder / f"rclone-{mode}"
    directory.mkdir()
    with _index(name, size, url) as index:
        command = ["rclone", "mount", f":http,url='{index}':", str(directory), "--read-only", "--vfs-cache-mode", mode]
        command += ["--cache-dir", str(folder / "rclone-cache"), "--config", os.devnull]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _await_mount(process, directory)
            yield directory / name, process.pid
        finally:
            process.terminate()  # it unmounts
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=END_TIMEOUT_S)


def _await_mount(process: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while directory not in scratch.mounts(directory):
        if process.poll() is not None:
            errors = process.stderr.read().decode(errors="replace") if process.stderr else ""
            raise Unavailable(f"rclone mount exited with {process.returncode}: {errors.strip()}")
        if time.monotonic() > deadline:
            raise Unavailable(f"rclone mount did not mount {directory} within {START_TIMEOUT_S} s")
        time.sleep(0.05)


@contextmanager
def _index(name: str, size: int, url: str) -> Iterator[str]:
    """The URL of a page that links to `name`, a file of `size` bytes that are at `url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(200, {"Content-Length": str(size), "Last-Modified": MODIFIED, "Accept-Ranges": "bytes"})

        def do_GET(self) -> None:
            if self.path == "/":
                page = f'<a href="{name}">{name}</a>'.encode()
                self._answer(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
                self.wfile.write(page)
            else:
                self._answer(302, {"Location": url, "Content-Length": "0"})

        def _answer(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Nothing: standard error is the benchmark's."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="rclone's index", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
