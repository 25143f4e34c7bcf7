"""The channel: one datagram, one message; descriptors arrive as the receiver's own; a closed end is said so."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.wire.channel import Closed, pair, receive_nowait, send_nowait
from manta.wire.messages import MESSAGE_BYTES_MAX

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    a, b = pair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_datagrams_keep_their_order_and_their_bounds(ends: Ends) -> None:
    a, b = ends
    for data in (b"one", b"two", b"x" * MESSAGE_BYTES_MAX):
        send_nowait(a, data)
    assert [receive_nowait(b) for _ in range(3)] == [(b"one", None), (b"two", None), (b"x" * MESSAGE_BYTES_MAX, None)]
    with pytest.raises(BlockingIOError):
        receive_nowait(b)


def test_a_descriptor_arrives_with_its_message_and_is_the_receivers_own(ends: Ends, tmp_path: Path) -> None:
    a, b = ends
    path = tmp_path / "file"
    with path.open("w+b") as file:
        send_nowait(a, b"first", None)
        send_nowait(a, b"second", file.fileno())
        assert receive_nowait(b) == (b"first", None)
        data, fd = receive_nowait(b)
        assert data == b"second"
        assert fd is not None
        assert fd != file.fileno()
    try:
        os.pwrite(fd, b"written", 0)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
    assert path.read_bytes() == b"written"


def test_of_several_descriptors_none_stays_behind(ends: Ends) -> None:
    a, b = ends
    before = open_fds()
    socket.send_fds(a, [b"three"], [0, 1, 2])
    data, fd = receive_nowait(b)
    assert data == b"three"
    assert fd is not None
    assert open_fds() == before + 1
    os.close(fd)


def test_a_message_without_bytes_is_an_end_and_leaves_no_descriptor(ends: Ends) -> None:
    a, b = ends
    before = open_fds()
    socket.send_fds(a, [b""], [0])
    with pytest.raises(Closed):
        receive_nowait(b)
    assert open_fds() == before


def test_the_end_comes_after_what_was_sent(ends: Ends) -> None:
    a, b = ends
    send_nowait(a, b"last words")
    a.close()
    assert receive_nowait(b) == (b"last words", None)
    for _ in range(2):
        with pytest.raises(Closed):
            receive_nowait(b)


def test_sending_to_a_closed_end_is_said_and_no_signal(ends: Ends) -> None:
    a, b = ends
    b.close()
    with pytest.raises(Closed):
        send_nowait(a, b"anyone there?")


def test_an_end_with_unread_messages_that_closes_is_an_end_to_the_other(ends: Ends) -> None:
    a, b = ends
    send_nowait(a, b"never read")
    b.close()  # the kernel answers with a reset
    for _ in range(2):
        with pytest.raises(Closed):
            receive_nowait(a)


def test_a_full_socket_blocks_and_empties(ends: Ends) -> None:
    a, b = ends
    sent = 0
    try:
        while sent < 10_000:
            send_nowait(a, b"%d" % sent)
            sent += 1
    except BlockingIOError:
        pass
    assert 0 < sent < 10_000
    assert receive_nowait(b) == (b"0", None)
    for number in range(1, sent):
        assert receive_nowait(b)[0] == b"%d" % number
    send_nowait(a, b"again")
    assert receive_nowait(b) == (b"again", None)


def test_ends_are_not_inherited() -> None:
    a, b = pair()
    with a, b:
        assert not a.get_inheritable()
        assert not b.get_inheritable()
