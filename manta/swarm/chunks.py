"""A chunk for another node: whether it may have it, from where it comes, whether it is its turn, and how it is sent. Here and only here.

One asyncio loop. Used by `manta.swarm.server`.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable

from aiohttp import web

from manta.errors import Unavailable
from manta.swarm import compression
from manta.swarm.auth import Answer, Sender, sign_answer
from manta.swarm.limits import Limits
from manta.swarm.permits import Permits
from manta.swarm.protocol import (
    ACCEPT_LZ4,
    DIGEST,
    ENCODING,
    MAC,
    PLAIN_BYTES,
    ChunkRequest,
    Refusal,
    chunk_head,
    parse_chunk_target,
)
from manta.swarm.pulls import Pulls
from manta.swarm.questions import Answered, refused
from manta.swarm.shelf import OpenChunk, Shelf
from manta.swarm.slots import Recipients, Slots
from manta.swarm.uploads import Allowance, Upload
from manta.wire.link import in_thread

TOLD_NODES_MAX = 1024
"""Nodes that are told of singly each second; a message to the daemon has room for about 2000."""


class Tally:
    """What was given since it was last taken."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()
        self._chunks: Counter[str] = Counter()
        self.refused_busy = 0

    def add(self, node: str, count: int, *, whole: bool) -> None:
        """`whole`: with these bytes the answer was complete."""
        name = node if node in self._bytes or len(self._bytes) < TOLD_NODES_MAX else ""
        self._bytes[name] += count
        self._chunks[name] += whole

    def take(self) -> tuple[list[tuple[str, int, int]], int]:
        """By node, bytes and chunks; and how often there was no slot."""
        given = [(node, count, self._chunks[node]) for node, count in self._bytes.items()]
        refused_busy, self.refused_busy = self.refused_busy, 0
        self._bytes.clear()
        self._chunks.clear()
        return given, refused_busy


class Chunks:
    """Answers requests for chunks as node `me`. `is_member` tells who is worth naming to others."""

    def __init__(
        self,
        me: str,
        shelf: Shelf,
        slots: Slots,
        pulls: Pulls,
        permits: Permits,
        allowance: Allowance,
        is_member: Callable[[str], bool],
        limits: Limits,
    ) -> None:
        self.tally = Tally()
        self._me = me
        self._shelf = shelf
        self._slots = slots
        self._pulls = pulls
        self._permits = permits
        self._allowance = allowance
        self._is_member = is_member
        self._limits = limits
        self._recipients = Recipients()
        self._packing = asyncio.Semaphore(limits.packed)

    async def answer(self, request: web.BaseRequest, sender: Sender) -> web.StreamResponse | Answered:
        """The chunk, sent; or what to say instead. Raises Invalid for a request that is none, Unavailable, and ConnectionError where the
        asker is gone."""
        asked = parse_chunk_target(request.raw_path, request.headers.get("range", ""))
        withheld = refused(403, Refusal(reason="withheld", message=f"{asked.blob} is given to nobody by this node."))
        if asked.pull is None and not await self._permits.allowed(asked.blob):
            return withheld
        found = self._shelf.open_chunk(asked.blob, asked.size, asked.chunk)
        if found is None:
            if asked.pull is None:
                return refused(404, Refusal(reason="absent", message="The chunk is not here."))
            pulled = await self._pulls.wait(sender.node, asked)
            if pulled is None:
                return refused(202, Refusal(reason="coming", message="The chunk is being fetched. Ask again."))
            if pulled.status != 200:
                return Answered(pulled.status if pulled.status in {403, 503} else 502, pulled.body)
            self._permits.reconsider(asked.blob)
            found = self._shelf.open_chunk(asked.blob, asked.size, asked.chunk)
            if found is None:
                raise Unavailable("The chunk was fetched, and is gone again. Ask again.")
        try:
            if asked.pull is not None and not await self._permits.allowed(asked.blob):
                return withheld
            if not self._slots.acquire(sender.node):
                return self._busy(asked, sender.node)
            try:
                return await self._give(request, sender, asked, found)
            finally:
                self._slots.release(sender.node)
        finally:
            found.close()

    def _busy(self, asked: ChunkRequest, node: str) -> Answered:
        self.tally.refused_busy += 1
        holders = self._recipients.holders(str(asked.blob), asked.chunk, node)
        return refused(
            503,
            Refusal(
                reason="busy",
                message="This node gives to as many as it may.",
                holders=[holder for holder in holders if self._is_member(holder)],
            ),
        )

    async def _give(
        self, request: web.BaseRequest, sender: Sender, asked: ChunkRequest, found: OpenChunk
    ) -> web.StreamResponse:
        start, end = found.extent.start + asked.start, found.extent.start + asked.end
        if request.headers.get(ACCEPT_LZ4) == "lz4" and not self._packing.locked() and _pays(found.fd, start, end):
            async with self._packing:  # until it is sent: packed chunks are in memory
                packed = await in_thread(_packed, found.fd, start, end)
                if len(packed) < end - start:
                    return await self._send(request, sender, asked, found, packed)
        return await self._send(request, sender, asked, found, None)

    async def _send(
        self, request: web.BaseRequest, sender: Sender, asked: ChunkRequest, found: OpenChunk, packed: bytes | None
    ) -> web.StreamResponse:
        """`packed` is the body; None: the file's bytes are."""
        encoding, count = ("lz4", len(packed)) if packed is not None else ("identity", asked.end - asked.start)
        status = 200 if asked.whole else 206
        head = chunk_head(found.digest, asked.start, asked.end, encoding, count)
        headers = {"server": "manta", DIGEST: found.digest.hex(), ENCODING: encoding}
        if mac := sign_answer(Answer(status, head), sender, self._me):
            headers[MAC] = mac
        if packed is not None:
            headers[PLAIN_BYTES] = str(asked.end - asked.start)
        if not asked.whole:
            headers["content-range"] = f"bytes {asked.start}-{asked.end - 1}/{len(found.extent)}"
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = count
        await response.prepare(request)
        upload = Upload(request, self._allowance, self._limits)
        try:
            if packed is not None:
                await upload.memory(packed)
            else:
                at = found.extent.start
                await upload.file(found.fd, at + asked.start, at + asked.end)
        finally:
            self.tally.add(sender.node, upload.sent, whole=upload.sent == count)
        if asked.end == len(found.extent):  # the last that is asked for
            self._recipients.given(str(asked.blob), asked.chunk, sender.node)
        await response.write_eof()
        return response


def _pays(fd: int, start: int, end: int) -> bool:
    """Raises OSError."""
    sample = [os.pread(fd, upto - at, start + at) for at, upto in compression.places(end - start)]
    return compression.worth(b"".join(sample))


def _packed(fd: int, start: int, end: int) -> bytes:
    """SLOW."""
    data = os.pread(fd, end - start, start)
    if len(data) != end - start:
        raise ConnectionAbortedError("the file is shorter than it was")
    return compression.pack(data)
