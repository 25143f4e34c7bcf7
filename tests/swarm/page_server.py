"""The status page on a port of its own, with the data of a swarm that is none: for tests in a browser. Here and only here."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

import trio

from manta.config import SwarmConfig
from manta.operations.peers import PeerView
from manta.swarm.document import DOCUMENT, HEADERS, JSON_HEADERS
from tests.operations.peer_state import NOW, FakePeerState, busy_swarm


class PageServer:
    """Serves / and /page.json as the peer server does. `state` may be changed at any time; `requests` are the targets asked for."""

    def __init__(self, state: FakePeerState | None = None) -> None:
        self.state = state or busy_swarm()
        self.status = 200
        """Of page.json."""
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                path = self.path.partition("?")[0]
                status, headers, body = 404, {"Content-Type": "text/plain"}, b"no"
                if path == "/":
                    status, headers, body = 200, HEADERS, DOCUMENT
                elif path == "/page.json":
                    status, headers, body = outer.status, JSON_HEADERS, outer.page_json()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                pass  # a browser that was ended

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def page_json(self) -> bytes:
        view = PeerView(SwarmConfig(peers="static:10.0.0.1:9402"), self.state, clock=lambda: NOW)
        return trio.run(view.page_json)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
