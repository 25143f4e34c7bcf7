"""Fixtures for the hub's tests: one hub process for all of them, and clients that speak to it over HTTP."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import standard_spec

TIMEOUT_S = 60


@dataclass(frozen=True)
class Answer:
    """What came back; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def fetch(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    token: str = "",
    body: bytes | None = None,
    range_: str = "",
) -> Answer:
    """One request as it is, redirects not followed; raises what http.client raises."""
    parts = urlsplit(url)
    all_headers = dict(headers or {})
    if token:
        all_headers["Authorization"] = f"Bearer {token}"
    if range_:
        all_headers["Range"] = range_
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, body, all_headers)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, answer)


@pytest.fixture(scope="session")
def _hub() -> Iterator[HubProcess]:
    with HubProcess(standard_spec()) as hub:
        yield hub
        # Whatever the tests did to it, the hub never failed in a way it did not plan.
        assert hub.stderr() == ""


@pytest.fixture
def hub(_hub: HubProcess) -> HubProcess:
    """The standard hub, as if freshly started."""
    _hub.reset()
    return _hub


Client = Callable[..., Any]


@pytest.fixture
def client(hub: HubProcess, tmp_path: Path) -> Client:
    """Run Python code with huggingface_hub against the hub, in a process of its own.

    The code leaves its outcome in `result`, which must be JSON; an exception fails the test.
    """

    def run(code: str, *, token: str = "", xet: bool = False, endpoint: str = "") -> Any:
        environment = hub.environment(tmp_path / "hf", token=token, xet=xet)
        if endpoint:
            environment["HF_ENDPOINT"] = endpoint
        program = f"import json, sys\n{code}\njson.dump(result, sys.stdout)\n"
        process = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    return run
