"""One fetch worker that pulls a blob from a node, without a daemon: the peer path alone, here and only here. Used by `peerpath`.

It is ordered about as the daemon orders it (`manta.wire.messages.Pull`, a chunk each, as many at a time), and writes the same file and
checks the same digests; nobody reads along and nothing is recorded.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from manta.config import SwarmConfig
from manta.errors import Unavailable
from manta.model.extents import CHUNK_SIZE
from manta.swarm import auth, protocol
from manta.testing import netns
from manta.testing.cluster import REPOSITORY
from manta.wire import channel, messages

ME = "be" * 8
"""The id of the node that asks: none that is a member."""

ANSWER_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
UNDER_WAY_MAX = min(SwarmConfig().downloads, SwarmConfig().slots)
"""What the daemon has one node asked for at a time, as far as that one gives."""
REFUSED_MAX = 1000
BUSY_S = 0.002


@dataclass(frozen=True, slots=True)
class Giver:
    """The node that has the blob."""

    address: str
    """HOST:PORT."""
    node: str
    keys: tuple[bytes, ...]


def hello(address: str, keys: tuple[bytes, ...]) -> Giver:
    """The node at `address`. Raises Unavailable where it does not say who it is."""
    header = auth.sign(auth.Request("GET", "/v1/hello"), ME, "", keys, time.time(), auth.new_nonce())
    connection = http.client.HTTPConnection(address, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("GET", "/v1/hello", headers={"Authorization": header})
        answer = connection.getresponse()
        body = answer.read(protocol.ANSWER_BYTES_MAX)
    except OSError as error:
        raise Unavailable(f"The node at {address} does not answer: {error}.") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise Unavailable(f"The node at {address} answered {answer.status} when it was asked who it is.")
    return Giver(address, protocol.decode(body, protocol.Hello).node, keys)


class Puller:
    """A running worker. Made by `puller`."""

    def __init__(self, process: subprocess.Popen[bytes], ours: socket.socket) -> None:
        self.pid = process.pid
        self._socket = ours
        self._await(messages.Ready)

    def pull(self, giver: Giver, blob: str, size: int, path: Path) -> float:
        """Seconds that all chunks of the blob took to be in the file and checked. Raises Unavailable where one failed."""
        waiting = [
            messages.Pull(
                order=number + 1,
                address=giver.address,
                node=giver.node,
                me=ME,
                blob=blob,
                blob_size=size,
                chunk=number,
                start=start,
                end=min(start + CHUNK_SIZE, size),
                extents=[(start, min(start + CHUNK_SIZE, size))],
                stall_s=ANSWER_TIMEOUT_S,
                patience_s=ANSWER_TIMEOUT_S,
                keys=list(giver.keys),
            )
            for number, start in enumerate(range(0, size, CHUNK_SIZE))
        ]
        waiting.reverse()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(fd, size)
            under_way: dict[int, messages.Pull] = {}
            began = time.monotonic()
            refused = 0
            while waiting or under_way:
                while waiting and len(under_way) < UNDER_WAY_MAX:
                    order = waiting.pop()
                    channel.send_nowait(self._socket, messages.encode(order), fd)
                    under_way[order.order] = order
                answer = self._await(messages.Fetched, messages.Failed)
                order = under_way.pop(answer.order)
                if isinstance(answer, messages.Failed):
                    refused += 1
                    if answer.reason != "busy" or refused > REFUSED_MAX:
                        raise Unavailable(f"A chunk was not pulled ({answer.reason}): {answer.message}")
                    # A slot is free only once the giver knows that its last byte has gone.
                    waiting.append(order)
                    time.sleep(BUSY_S)
            return time.monotonic() - began
        finally:
            os.close(fd)

    def _await(self, *kinds: type[messages.Message]) -> messages.FromWorker:
        """The next message of one of these kinds; Progress and the like are passed over."""
        while True:
            try:
                data, _ = channel.receive_nowait(self._socket)
            except (TimeoutError, channel.Closed) as error:
                raise Unavailable("The worker gave no answer, or has ended.") from error
            message = messages.decode_from_worker(data)
            if isinstance(message, kinds):
                return message


@contextmanager
def puller(place: netns.Place) -> Iterator[Puller]:
    """A fetch worker in `place`, gone at the end."""
    ours, theirs = channel.pair()
    with ours:
        ours.settimeout(ANSWER_TIMEOUT_S)
        with theirs:
            process = subprocess.Popen(
                place.command([sys.executable, "-m", "manta.worker", "fetch", str(theirs.fileno())]),
                pass_fds=[theirs.fileno()],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
            )
        try:
            yield Puller(process, ours)
        finally:
            process.kill()
            process.wait(END_TIMEOUT_S)
