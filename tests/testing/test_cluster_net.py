"""manta.testing.cluster_net: everybody reaches everybody at the rate of the links, links can be cut, and nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from manta.errors import Invalid
from manta.testing import netns
from manta.testing.cluster_net import Host, Network, network

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(netns.obstacle()), reason=netns.obstacle() or "possible")]

RATE = 200_000_000
BODY_BYTES = 8 * 1024 * 1024

SENDER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("up", flush=True)
while True:
    connection, _ = listener.accept()
    with connection:
        try:
            connection.sendall(bytes(int(sys.argv[2])))
        except OSError:
            pass
"""

RECEIVER = """
import json, socket, sys, time
try:
    connection = socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2]))
except OSError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
with connection:
    size = len(connection.recv(1))
    began = time.monotonic()
    while data := connection.recv(1 << 20):
        size += len(data)
print(json.dumps({"size": size, "seconds": time.monotonic() - began}))
"""

OWNER = """
import time
from manta.testing.cluster_net import network

with network(2, rate=1_000_000) as net:
    net.nodes[0].popen(["sleep", "60"])
    print(net.switch, flush=True)
    time.sleep(60)
"""


def serve(host: Host) -> None:
    process = host.popen([sys.executable, "-c", SENDER, host.address, str(BODY_BYTES)], stdout=subprocess.PIPE)
    assert process.stdout
    with process.stdout as lines:
        assert lines.readline() == b"up\n"


def receive(at: Host, sender: Host, timeout_s: float = 10.0) -> dict[str, float]:
    command = at.command([sys.executable, "-c", RECEIVER, sender.address, str(timeout_s)])
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def best_rate(at: Host, sender: Host) -> float:
    """A bucket keeps its rate whatever the machine does; a busy machine makes a transfer slower. So the best of a few counts."""
    return max(BODY_BYTES / receive(at, sender)["seconds"] for _ in range(3))


def left(net: Network) -> list[str]:
    return [host.name for host in (*net.nodes, net.origin) if named(host.name)] + [net.switch] * named(net.switch)


def named(name: str) -> bool:
    return Path("/run/netns", name).exists()


def test_each_link_has_its_rate_both_ways() -> None:
    with network(2, rate=RATE, origin_rate=2 * RATE) as net:
        one, two = net.nodes
        for host in (one, net.origin):
            serve(host)
        # The bucket of 256 KiB is 3 % of the body.
        assert best_rate(two, one) == pytest.approx(netns.payload_rate(RATE), rel=0.08)
        assert best_rate(two, net.origin) == pytest.approx(netns.payload_rate(RATE), rel=0.08)
        net.set_rate(two, 0)
        assert best_rate(two, net.origin) == pytest.approx(netns.payload_rate(2 * RATE), rel=0.08)
        net.set_rate(two, RATE // 2)
        assert best_rate(two, one) == pytest.approx(netns.payload_rate(RATE // 2), rel=0.1)


def test_a_cut_link_carries_nothing_and_a_mended_one_all() -> None:
    with network(3) as net:
        serve(net.nodes[0])
        net.cut(net.nodes[0])
        assert "error" in receive(net.nodes[1], net.nodes[0], 0.5)
        net.mend(net.nodes[0])
        net.mend(net.nodes[2])  # was well
        for number in (1, 2):
            assert receive(net.nodes[number], net.nodes[0])["size"] == BODY_BYTES


def test_nothing_is_left_and_nothing_of_it_was_here() -> None:
    before = subprocess.run(["ip", "-o", "address"], capture_output=True, check=True, timeout=10).stdout
    with network(2, rate=RATE, origin_rate=RATE) as net:
        sleeper = net.nodes[1].popen(["sleep", "60"])
        assert subprocess.run(["ip", "-o", "address"], capture_output=True, check=True, timeout=10).stdout == before
        assert len(left(net)) == 4
    assert sleeper.wait(timeout=5) == -signal.SIGTERM
    assert left(net) == []


def test_two_clusters_live_side_by_side() -> None:
    with network(1) as first, network(1) as second:
        serve(first.nodes[0])
        assert receive(first.origin, first.nodes[0])["size"] == BODY_BYTES
        assert "error" in receive(second.origin, second.nodes[0], 0.5)


def test_what_a_killed_owner_left_goes_with_the_next_namespace() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout
    with owner.stdout as lines:
        switch = lines.readline().decode().strip()
    theirs = [name for name in os.listdir("/run/netns") if name.startswith(switch.removesuffix("switch"))]
    assert len(theirs) == 4
    owner.kill()
    owner.wait(timeout=20)
    assert all(map(named, theirs))
    with netns.namespace():
        assert not any(map(named, theirs))


@pytest.mark.parametrize("nodes", [0, 201])
def test_a_number_of_nodes_that_cannot_be_is_refused(nodes: int) -> None:
    with pytest.raises(Invalid, match="1 to 200"), network(nodes):
        pass
