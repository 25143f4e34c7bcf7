"""A child's end of the socket: it never waits to send, says when it is behind, and ends where the daemon reads nothing any more."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Iterator

import pytest

from manta.wire import link as link_module
from manta.wire.channel import Closed, pair, receive_nowait, send_nowait
from manta.wire.link import Link, in_thread
from manta.wire.messages import Cancel, Progress, Ready, ToWorker, decode_from_worker, decode_to_worker, encode


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The daemon's and the child's."""
    a, b = pair()
    a.setblocking(False)
    with a, b:
        yield a, b


def test_messages_and_descriptors_arrive(ends: tuple[socket.socket, socket.socket]) -> None:
    async def test() -> None:
        daemon, child = ends
        link = Link[ToWorker](child, decode_to_worker)
        receiving = asyncio.create_task(link.receive())
        await asyncio.sleep(0)
        with open(os.devnull, "rb") as file:
            send_nowait(daemon, encode(Cancel(7)), file.fileno())
        message, fd = await receiving
        assert message == Cancel(7)
        assert fd is not None
        os.close(fd)
        link.send(Ready(0, 1))
        assert decode_from_worker(receive_nowait(daemon)[0]) == Ready(0, 1)
        daemon.close()
        with pytest.raises(Closed):
            await link.receive()
        link.send(Ready(0, 1))  # nobody hears it

    run(test)


def test_what_is_no_message_leaves_no_descriptor_open(ends: tuple[socket.socket, socket.socket]) -> None:
    async def test() -> None:
        daemon, child = ends
        link = Link[ToWorker](child, decode_to_worker)
        before = len(os.listdir("/proc/self/fd"))
        with open(os.devnull, "rb") as file:
            send_nowait(daemon, b"noise", file.fileno())
        with pytest.raises(ValueError, match="array"):
            await link.receive()
        assert len(os.listdir("/proc/self/fd")) == before

    run(test)


def test_what_the_daemon_has_not_read_waits_in_order(ends: tuple[socket.socket, socket.socket]) -> None:
    async def test() -> None:
        daemon, child = ends
        link = Link[ToWorker](child, decode_to_worker)
        sent = 0
        while not link.behind:
            link.send(Progress(1, sent, sent + 1))
            sent += 1
        for _ in range(1000):
            link.send(Progress(1, sent, sent + 1))
            sent += 1
        for expected in range(sent):
            while True:
                try:
                    data, _ = receive_nowait(daemon)
                    break
                except BlockingIOError:
                    await asyncio.sleep(0)
            assert decode_from_worker(data) == Progress(1, expected, expected + 1)
        await asyncio.sleep(0)
        assert not link.behind

    run(test)


def test_a_daemon_that_reads_nothing_is_the_end(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "UNSENT_BYTES_MAX", 10_000)

    async def test() -> None:
        _, child = ends
        link = Link[ToWorker](child, decode_to_worker)
        for number in range(5000):
            link.send(Progress(number, 0, 1))
        with pytest.raises(Closed):
            await link.receive()
        assert not link.behind

    run(test)


def test_work_in_a_thread_is_done_before_its_descriptor_may_be_closed() -> None:
    async def test() -> None:
        reader, writer = os.pipe()
        ended = []

        def work() -> None:
            os.read(reader, 1)
            ended.append(True)

        working = asyncio.create_task(in_thread(work))
        await asyncio.sleep(0)
        working.cancel()
        await asyncio.sleep(0)
        assert not working.done()
        os.write(writer, b"x")
        with pytest.raises(asyncio.CancelledError):
            await working
        assert ended == [True]
        os.close(reader)
        os.close(writer)

    run(test)
