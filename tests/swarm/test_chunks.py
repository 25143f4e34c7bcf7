"""Chunks as a worker gets them from a node: the two sides of the protocol together."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from manta.cache.digests import chunk_digest
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobId
from manta.swarm.limits import Limits
from manta.swarm.protocol import Refusal, encode
from manta.wire.messages import Pull
from manta.wire.peering import Asked, Reply, Uploaded
from manta.worker.failure import OrderFailed
from manta.worker.peer import PeerClient
from tests.swarm.node import ASKER, KEY, ME, OTHER, PULL, SETTINGS, Node, content, run, serving, shelve

DATA = content(CHUNK_SIZE + 300_000)
TEXT = b"".join(b"line %d of a text\n" % n for n in range(40_000))


def order(node: Node, blob: BlobId, size: int, chunk: int, *extents: tuple[int, int], **more: object) -> Pull:
    start = chunk * CHUNK_SIZE
    end = min(start + CHUNK_SIZE, size)
    made = Pull(
        1, f"127.0.0.1:{node.port}", ME, ASKER, str(blob), size, chunk, start, end, list(extents) or [(start, end)], 5.0,
        5.0, [KEY],
    )  # fmt: skip
    return msgspec.structs.replace(made, **more)


async def pull(order: Pull, path: Path) -> bytes:
    """What is in the file afterwards, where the chunk is."""
    client = PeerClient()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, order.blob_size)
        fetched = await client.pull(order, fd, lambda _at, _upto: None)
        data = os.pread(fd, order.end - order.start, order.start)
        assert fetched.digest == chunk_digest(data)
        return data
    finally:
        os.close(fd)
        client.close()


def test_a_worker_gets_chunks(tmp_path: Path) -> None:
    async def test() -> None:
        blob, text = shelve(tmp_path, DATA), shelve(tmp_path, TEXT)
        async with serving(tmp_path) as node:
            assert await pull(order(node, blob, len(DATA), 0), tmp_path / "a") == DATA[:CHUNK_SIZE]
            in_two = [(CHUNK_SIZE + 1000, len(DATA)), (CHUNK_SIZE, CHUNK_SIZE + 1000)]
            assert await pull(order(node, blob, len(DATA), 1, *in_two), tmp_path / "b") == DATA[CHUNK_SIZE:]
            assert await pull(order(node, text, len(TEXT), 0, lz4=True), tmp_path / "c") == TEXT
            told = await node.daemon.hear(Uploaded, lambda message: bool(message.given))
            [(who, count, _)] = told.given
            assert who == ASKER
            assert count < len(DATA) + len(TEXT)  # packed

    run(test())


def test_a_worker_waits_for_what_is_fetched_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=Limits(hold_s=0.05)) as node:

            async def fetch(asked: Asked) -> Reply:
                await asyncio.sleep(0.2)  # some questions are answered: it is coming
                shelve(tmp_path, TEXT)
                return Reply(asked.order, 200)

            node.daemon.answers["pull"] = fetch
            blob = shelve(tmp_path / "elsewhere", TEXT)
            assert await pull(order(node, blob, len(TEXT), 0, pull=encode(PULL)), tmp_path / "a") == TEXT
            assert len(node.daemon.asked("pull")) == 1

    run(test())


def test_a_worker_hears_why_there_is_no_chunk(tmp_path: Path) -> None:
    async def test() -> None:
        blob = shelve(tmp_path, DATA, [0])
        async with serving(tmp_path, msgspec.structs.replace(SETTINGS, slots=1)) as node:

            async def failing(asked: Pull) -> OrderFailed:
                with pytest.raises(OrderFailed) as failed:
                    await pull(asked, tmp_path / "x")
                return failed.value

            assert (await failing(order(node, blob, len(DATA), 1))).reason == "absent"
            assert (
                await failing(order(node, blob, len(DATA), 0, keys=[b"another key of the same len"]))
            ).reason == "denied"
            said = encode(Refusal(reason="throttled", message="Too many.", retry_s=7.0, origin="https://hub"))
            node.daemon.answers["pull"] = lambda asked: Reply(asked.order, 502, said)
            failure = await failing(order(node, blob, len(DATA), 1, pull=encode(PULL)))
            assert (failure.reason, failure.retry_after_s) == ("throttled", 7.0)
            assert (await node.asker(OTHER).chunk(blob, len(DATA), 0)).status == 200
            node.server._slots.acquire("somebody")
            failure = await failing(order(node, blob, len(DATA), 0))
            assert failure.reason == "busy"
            assert failure.holders == [OTHER]

    run(test())
