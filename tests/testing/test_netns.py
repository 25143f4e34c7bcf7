"""manta.testing.netns: a namespace answers at its address, sends at its rate, and is gone afterwards whatever happens."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manta.testing import netns

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(netns.obstacle()), reason=netns.obstacle() or "possible")]

BODY_BYTES = 16 * 1024 * 1024
RATE = 400_000_000

SERVER = f"""
import http.server, sys

class Zeros(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "{BODY_BYTES}")
        self.end_headers()
        for _ in range({BODY_BYTES} // 65536):
            self.wfile.write(bytes(65536))

    def log_message(self, *args):
        pass

server = http.server.HTTPServer((sys.argv[1], 0), Zeros)
print(server.server_port, flush=True)
server.serve_forever()
"""

OWNER = """
import sys, time
from manta.testing import netns

with netns.namespace() as far:
    far.popen(["sleep", "60"])
    print(far.name, flush=True)
    time.sleep(60)
"""


def named(name: str) -> bool:
    return Path("/run/netns", name).exists()


def interface(name: str) -> Path:
    return Path("/sys/class/net", f"manta{name.rpartition('-')[2]}")


def serve(far: netns.Namespace) -> int:
    process = far.popen([sys.executable, "-c", SERVER, far.address], stdout=subprocess.PIPE)
    assert process.stdout
    with process.stdout as lines:
        return int(lines.readline())


def download(address: str, port: int) -> float:
    """Seconds that the body took, after its first byte."""
    connection = http.client.HTTPConnection(address, port, timeout=30)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        response.read(1)
        began = time.monotonic()
        while response.read(1024 * 1024):
            pass
        return time.monotonic() - began
    finally:
        connection.close()


def test_the_link_sends_at_the_rate_that_was_asked_for() -> None:
    with netns.namespace(rate=RATE) as far:
        port = serve(far)
        # The bucket keeps its rate whatever the machine does; a busy machine makes a transfer slower. So the best of a few counts.
        best = BODY_BYTES / min(download(far.address, port) for _ in range(5))
    assert best == pytest.approx(netns.payload_rate(RATE), rel=0.05)


def test_nothing_is_left_after_the_block() -> None:
    with netns.namespace() as far:
        sleeper = far.popen(["sleep", "60"])
        assert named(far.name)
        assert interface(far.name).exists()
    assert sleeper.wait(timeout=5) == -signal.SIGTERM
    assert not named(far.name)
    assert not interface(far.name).exists()


def test_a_process_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "END_TIMEOUT_S", 0.3)
    with netns.namespace() as far:
        stubborn = far.popen(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"], stdout=subprocess.PIPE)
        assert stubborn.stdout
        with stubborn.stdout as lines:
            assert lines.readline() == b"up\n"
    assert stubborn.wait(timeout=5) == -signal.SIGKILL
    assert not named(far.name)


def test_two_namespaces_live_side_by_side() -> None:
    with netns.namespace() as one, netns.namespace() as two:
        assert {one.address, one.host_address}.isdisjoint({two.address, two.host_address})
        for far in (one, two):
            subprocess.run(far.command(["ip", "-4", "address", "show", "eth0"]), check=True, capture_output=True)


def test_an_exception_removes_everything() -> None:
    made: list[str] = []

    def fail() -> None:
        with netns.namespace() as far:
            made.append(far.name)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not named(made[0])
    assert not interface(made[0]).exists()


def start_owner() -> tuple[subprocess.Popen[bytes], str]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout
    with owner.stdout as lines:
        name = lines.readline().decode().strip()
    assert named(name)
    return owner, name


def test_sigterm_to_the_owner_removes_everything() -> None:
    owner, name = start_owner()
    owner.terminate()
    assert owner.wait(timeout=20) == 128 + signal.SIGTERM
    assert not named(name)
    assert not interface(name).exists()


def test_what_a_killed_owner_left_goes_with_the_next_namespace() -> None:
    owner, name = start_owner()
    owner.kill()
    owner.wait(timeout=20)
    assert named(name)
    with netns.namespace() as far:
        assert not named(name)
        assert not interface(name).exists()
        assert named(far.name)
        assert netns.sweep() == []  # the living owner's stays


def test_a_reused_pid_does_not_keep_a_dead_owners_namespace() -> None:
    name = f"manta-{os.getpid()}-1-{netns.SUBNET_COUNT - 1}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    assert netns.sweep() == [name]
    assert not named(name)
