"""A hub that says exactly what a test tells it to: an HTTP server in threads, for answers that no real hub gives.

The faithful hub is `manta.testing.hub`; this one is for the wrong, the late and the malformed.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    """Before the headers."""
    drip_s: float = 0.0
    """Before each byte of the body."""
    cut: bool = False
    """Close the connection in the middle of the body."""


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})})


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    """Names in lower case."""


class ScriptedHub:
    """`answer` gives the answer to each request; `asked` has all requests so far."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[Asked] = []
        self.answer: Callable[[Asked], Answer] = lambda _: Answer(500)


@contextmanager
def scripted_hub() -> Iterator[ScriptedHub]:
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing: the test reads `asked`."""

        def _reply(self) -> None:
            asked = Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
            hub.asked.append(asked)
            answer = hub.answer(asked)
            stop.wait(answer.delay_s)
            self.send_response(answer.status)
            for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            body = answer.body[: len(answer.body) // 2] if answer.cut else answer.body
            if answer.drip_s:
                for byte in body:
                    if stop.wait(answer.drip_s):
                        break
                    self.wfile.write(bytes([byte]))
            else:
                self.wfile.write(body)
            if answer.cut:
                self.close_connection = True

        do_GET = do_HEAD = _reply  # noqa: N815

        def handle(self) -> None:
            with suppress(OSError):
                super().handle()

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    server = Server(("127.0.0.1", 0), Handler)
    hub = ScriptedHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        stop.set()
        server.shutdown()
        thread.join()
        server.server_close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """For what another thread does: nothing else tells that it is done."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.005)
