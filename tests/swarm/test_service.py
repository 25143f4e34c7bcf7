"""The peer process as a process of its own, over its socket: settled, it listens, answers, asks members, and ends with the daemon."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from manta.swarm.protocol import Report, decode, encode
from manta.testing import scratch
from manta.wire.channel import Closed, pair, receive_nowait, send_nowait
from manta.wire.messages import Message, Ready
from manta.wire.messages import encode as encoded
from manta.wire.peering import (
    Asked,
    Call,
    Called,
    Cancelled,
    Follow,
    FromPeerProcess,
    Listening,
    Member,
    Members,
    OwnPauses,
    Presence,
    Reply,
    Trouble,
    decode_from_peer_process,
)
from tests.swarm.node import ASKER, KEY, ME, SETTINGS, Asker, content, run, shelve

PATIENCE_S = 20.0

T = TypeVar("T")


@dataclass
class Peer:
    """A peer process and the daemon's end of its socket."""

    process: subprocess.Popen[str]
    socket: socket.socket

    def send(self, message: Message | bytes, fd: int | None = None) -> None:
        send_nowait(self.socket, message if isinstance(message, bytes) else encoded(message), fd)

    def receive(self) -> FromPeerProcess:
        """The next message. Raises Closed at the end."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                data, fd = receive_nowait(self.socket)
            except BlockingIOError:
                if not select.select([self.socket], [], [], max(0, deadline - time.monotonic()))[0]:
                    raise TimeoutError("the peer process says nothing") from None
                continue
            assert fd is None
            return decode_from_peer_process(data)

    def hear(self, kind: type[T], where: Callable[[T], bool] = lambda _: True) -> T:
        """The next message of a kind for which `where` holds; those before it are passed over."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            message = self.receive()
            if isinstance(message, kind) and where(message):
                return message
        raise TimeoutError(f"the peer process says no {kind.__name__}")

    def end(self) -> int:
        """Its exit code, once its socket has ended."""
        try:
            while True:
                self.receive()
        except Closed:
            pass
        return self.process.wait(PATIENCE_S)

    def complaints(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Peer, int]]]:
    """Starts peer processes; `settled` ones listen, with `settings` changed as said, on the cache in tmp_path/NODE."""
    peers: list[Peer] = []

    def start(settled: bool = True, **settings: object) -> tuple[Peer, int]:
        ours, theirs = pair()
        ours.setblocking(False)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "manta.swarm", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        peer = Peer(process, ours)
        peers.append(peer)
        assert peer.receive() == Ready(0, process.pid)
        if not settled:
            return peer, 0
        changed = msgspec.structs.replace(SETTINGS, **settings)
        cache = tmp_path / changed.node
        cache.mkdir()
        peer.send(msgspec.structs.replace(changed, cache_dir=str(cache)))
        return peer, int(peer.hear(Listening).address.rpartition(":")[2])

    yield start
    for peer in peers:
        peer.socket.close()
        peer.process.kill()
        peer.process.communicate()


def test_it_serves_and_asks_the_daemon(start: Callable[..., tuple[Peer, int]], tmp_path: Path) -> None:
    peer, port = start()
    data = content(1_000_000)
    blob = shelve(tmp_path / ME, data)
    assert run(Asker(port).chunk(blob, len(data), 0)).body == data

    async def report() -> bytes:
        import asyncio

        asking = asyncio.create_task(Asker(port).ask("POST", "/v1/ask/report"))
        asked = await asyncio.to_thread(peer.hear, Asked)
        assert (asked.node, asked.what) == (ASKER, "report")
        fd = os.memfd_create("report")
        os.write(fd, b"what the daemon said")
        peer.send(Reply(asked.order, 200), fd)
        os.close(fd)
        return (await asking).body

    assert run(report()) == b"what the daemon said"
    assert not [name for name in scratch.open_files(peer.process.pid) if "memfd" in name or "/blobs/" in name]
    peer.socket.close()
    assert peer.process.wait(PATIENCE_S) == 0
    assert peer.complaints() == ""


def test_two_of_them_find_each_other(start: Callable[..., tuple[Peer, int]], tmp_path: Path) -> None:
    other, port = start(node=ASKER)
    data = content(100_000)
    blob = shelve(tmp_path / ASKER, data)
    peer, _ = start(peers=f"static:127.0.0.1:{port}")
    members = peer.hear(Members, lambda message: any(member.state == "up" for member in message.members))
    [member] = members.members
    assert isinstance(member, Member)
    assert member.node == ASKER
    peer.send(Follow(0, [(str(blob), len(data))]))
    assert peer.hear(Presence) == Presence(0, ASKER, str(blob), b"\x01")
    peer.send(OwnPauses(0, {"https://hub": 10.0}))
    peer.send(Call(7, ASKER, "report", b"", 10.0))
    asked = other.hear(Asked)
    assert (asked.node, asked.what) == (ME, "report")
    told = encode(Report(node=ASKER, address="", version="", started=0.0, from_origin=1, from_peers=2, to_peers=3))
    other.send(Reply(asked.order, 200, told))
    called = peer.hear(Called)
    assert (called.order, called.status) == (7, 200)
    assert decode(called.body, Report).to_peers == 3
    # A question that nobody waits for any more is answered all the same, once.
    peer.send(Call(8, ASKER, "report", b"", 10.0))
    other.hear(Asked)
    peer.send(Cancelled(8))
    called = peer.hear(Called)
    assert (called.order, called.status) == (8, 0)
    peer.send(Cancelled(8))
    # The answer of any size goes to a descriptor, which is closed.
    with (tmp_path / "answer").open("w+b") as answer:
        peer.send(Call(9, ASKER, "report", b"", 10.0), answer.fileno())
        other.send(Reply(other.hear(Asked).order, 200, told))
        called = peer.hear(Called)
        assert (called.order, called.status, called.body) == (9, 200, b"")
        assert os.pread(answer.fileno(), 1000, 0) == told


def test_a_replaced_key_is_used(start: Callable[..., tuple[Peer, int]], tmp_path: Path) -> None:
    peer, port = start()
    new = b"the key that comes after the old one"
    assert run(Asker(port, keys=(new,)).ask("GET", "/v1/hello")).status == 401
    peer.send(msgspec.structs.replace(SETTINGS, keys=[new, KEY]))
    while run(Asker(port, keys=(new,)).ask("GET", "/v1/hello")).status == 401:
        assert peer.process.poll() is None
    assert run(Asker(port).ask("GET", "/v1/hello")).status == 200


def test_a_taken_port_is_told(start: Callable[..., tuple[Peer, int]]) -> None:
    peer, _ = start(settled=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        peer.send(msgspec.structs.replace(SETTINGS, cache_dir="/nowhere", port=taken.getsockname()[1]))
        trouble = peer.hear(Trouble, lambda message: message.kind == "listen")
        assert "in use" in trouble.message


@pytest.mark.parametrize("noise", [b"noise", b"\x91\xa5ready", encoded(Ready(1, 2)), encoded(Follow(0, []))])
def test_what_is_no_message_ends_it(start: Callable[..., tuple[Peer, int]], noise: bytes) -> None:
    peer, _ = start(settled=False)
    peer.send(noise)
    assert peer.end() == 0
    said = peer.complaints()
    assert said.count("\n") == 1
    assert "ending" in said


def test_noise_later_ends_it_too(start: Callable[..., tuple[Peer, int]]) -> None:
    peer, _ = start()
    peer.send(b"noise")
    assert peer.end() == 0
    assert "no message" in peer.complaints()


def test_it_leaves_ctrl_c_to_the_daemon(start: Callable[..., tuple[Peer, int]]) -> None:
    peer, port = start()
    peer.process.send_signal(signal.SIGINT)
    assert run(Asker(port).ask("GET", "/v1/hello")).status == 200


def test_the_key_is_nowhere_to_be_seen(start: Callable[..., tuple[Peer, int]]) -> None:
    peer, port = start()
    run(Asker(port, keys=(b"another key of the same length...",)).ask("GET", "/v1/hello"))
    for name in ("cmdline", "environ"):
        assert KEY not in Path(f"/proc/{peer.process.pid}/{name}").read_bytes()
    assert KEY.decode() not in repr(SETTINGS)
    peer.socket.close()
    peer.process.wait(PATIENCE_S)
    assert peer.complaints() == ""


def test_a_person_is_told_who_starts_it() -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "manta.swarm"], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == 2
    assert "started by the Manta daemon" in ended.stderr
