"""Chunks from other nodes over HTTP, as a worker sees it: asked for, believed or not, into the cache file. Here and only here.

asyncio. Another node may be broken or hostile, and so may be who answers in its place. Of an answer that it did not sign no byte is
taken, and of one that it did no more than asked for, in bounded time; what has come is the chunk only when all of it has the digest
that was announced with it. Where there is no key, nothing is signed. Nothing from here goes to a log: answers name the address and what
happened.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
from yarl import URL

from manta.errors import Corrupt, Invalid
from manta.model.extents import Extent
from manta.model.ids import parse_blob_id
from manta.swarm import auth, protocol
from manta.swarm.compression import Unpacker
from manta.wire.messages import Fetched, Pull, Reason
from manta.worker.client import Client
from manta.worker.connection import Broken, Connection, Head
from manta.worker.failure import OrderFailed
from manta.worker.intake import Intake
from manta.worker.origin import RETRY_AFTER_SECONDS_MAX
from manta.worker.sink import ChunkSink

CONNECT_SECONDS_MAX = 3.0
"""Nodes of a cluster are milliseconds apart; a SYN that was lost is sent again after one second, and after two more."""

RATE_MIN = 64 * 1024
"""Bytes per second, averaged over `stall_s`. Who sends less is as good as silent: a whole chunk would take more than two minutes."""

REFUSAL_BYTES_MAX = 64 * 1024
SAID_CHARACTERS_MAX = 300
HOLDERS_MAX = 16
ORIGIN_CHARACTERS_MAX = 300

_DIGEST = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,9})-(\d{1,9})/(\d{1,9}|\*)", re.ASCII)
_REASONS: dict[int, Reason] = {401: "denied", 403: "denied", 404: "absent"}
_BEHIND: dict[str, Reason] = {
    "absent": "absent",
    "denied": "denied",
    "throttled": "throttled",
    "corrupt": "corrupt",
    "no_space": "no_space",
    "cache_broken": "cache_broken",
}
"""What another node's own fetch may have failed with; anything else is "unavailable"."""


class PeerClient:
    """Carries out orders, any number at once. Must be made inside the loop that uses it."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._made_for: tuple[str, int, str] | None = None
        self._under_way: dict[int, _Pulling] = {}  # by order

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    async def pull(self, order: Pull, fd: int, progress: Callable[[int, int], None]) -> Fetched:
        """Raises OrderFailed. What `progress` tells of is in the file, and is not to be believed before this returns."""
        began = time.monotonic()
        sink = ChunkSink(fd, order.start, order.end, progress, watched=False)
        intake = Intake(sink)
        pulling = _Pulling(order, self._client_for(order), sink, intake, progress)
        ticker = asyncio.create_task(intake.keep_moving())
        self._under_way[order.order] = pulling
        try:
            for start, end in order.extents:
                sink.begin(start)
                await pulling.extent(Extent(start, end))
            digest = sink.finish()
        except TimeoutError as e:
            what = f"{order.address} did not answer within {order.stall_s:g} s"
            raise OrderFailed("unavailable", what, unreachable=True) from e
        except Broken as e:
            raise OrderFailed("unavailable", f"{order.address} {e.what}", unreachable=e.unreachable) from e
        finally:
            self._under_way.pop(order.order, None)
            ticker.cancel()
            sink.tell()
        if digest != pulling.announced:
            what = f"{order.address} sent bytes that are not those of the digest it announced"
            if sum(end - start for start, end in order.extents) < order.end - order.start:
                what += ", or what the cache file had of the chunk was not"
            raise OrderFailed("corrupt", what)
        first = sink.first_written if sink.first_written is not None else began
        return Fetched(order.order, digest, time.monotonic() - began, first - began)

    def watch(self, order: int) -> None:
        """A reader waits for the chunk of `order`: a node that fetches it on our behalf is told. Nothing where it has ended."""
        if (pulling := self._under_way.get(order)) is not None:
            pulling.hurry()

    def _client_for(self, order: Pull) -> Client:
        """Connections over plain TCP, or over TLS as the order says. Made anew when that changes, or the file of authorities."""
        path = order.tls_authorities
        try:
            made_for = path, os.stat(path).st_mtime_ns if path else 0, order.tls_name
            if self._client is None or made_for != self._made_for:
                client = Client(path, order.tls_name, direct=True)
                self.close()
                self._client, self._made_for = client, made_for
        except OSError as e:  # ssl.SSLError is one
            why = e.strerror or "no PEM file"
            raise OrderFailed("unavailable", f"the swarm's file of authorities {path} cannot be used ({why})") from e
        return self._client


@dataclass(frozen=True, slots=True)
class _Refused:
    """An answer without bytes, signed by the node."""

    status: int
    refusal: protocol.Refusal | None
    """None where the body is none."""


class _Pulling:
    """One order under way: asks for its extents, one after the other."""

    def __init__(
        self, order: Pull, client: Client, sink: ChunkSink, intake: Intake, progress: Callable[[int, int], None]
    ) -> None:
        self._order = order
        self._client = client
        self._sink = sink
        self._intake = intake
        self._progress = progress
        try:
            self._pull = protocol.decode(order.pull, protocol.Pull) if order.pull else None
            target = protocol.chunk_target(parse_blob_id(order.blob), order.blob_size, order.chunk, self._pull)
            scheme = "https" if order.tls_authorities else "http"
            self._url = URL(f"{scheme}://{order.address}{target}", encoded=True)
            if not self._url.raw_host or not self._url.explicit_port or self._url.raw_path_qs != target:
                raise ValueError
        except (Invalid, ValueError) as e:
            raise OrderFailed("unavailable", f"{order.address} cannot be asked: that is no address, or no chunk") from e
        self._next_url = self._url  # not at once: what is being asked is signed as it is
        self.announced: bytes | None = None
        """The chunk's digest, as the node says it; None while it has said none."""
        self._nonce = ""  # of the latest request
        self._waited_s = 0.0

    def hurry(self) -> None:
        """The next time it asks, it says that a reader waits."""
        if self._pull is not None and not self._pull.urgent:
            self._pull = msgspec.structs.replace(self._pull, urgent=True)
            blob, order = parse_blob_id(self._order.blob), self._order
            target = protocol.chunk_target(blob, order.blob_size, order.chunk, self._pull)
            self._next_url = URL(f"{self._url.scheme}://{order.address}{target}", encoded=True)

    async def extent(self, asked: Extent) -> None:
        """Raises OrderFailed, Broken, and TimeoutError where no answer comes."""
        while True:
            began = time.monotonic()
            refused = await self._ask(asked)
            if refused is None:
                return
            if refused.status != 202 or refused.refusal is None:
                raise self._failure(refused)
            # It fetches the chunk for us. That it said so keeps this order alive; no byte has come.
            self._progress(self._sink.at, self._sink.at)
            await asyncio.sleep(max(0.0, began + protocol.HOLD_SECONDS - time.monotonic()))
            self._waited_s += time.monotonic() - began
            if self._waited_s >= self._order.patience_s:
                what = f"{self._order.address} had not fetched it after {self._waited_s:.0f} s"
                raise OrderFailed("unavailable", what, 202, behind=True)

    async def _ask(self, asked: Extent) -> _Refused | None:
        """Writes what is answered; None when all of `asked` has come. Of a refusal the connection is kept."""
        self._url = self._next_url
        headers = partial(self._headers, asked)
        stall_s = self._order.stall_s
        connect_s = min(CONNECT_SECONDS_MAX, stall_s)
        async with self._client.exchange("GET", self._url, headers, connect_s=connect_s, silence_s=stall_s) as answer:
            connection, head = answer
            if head.status in {200, 206}:
                packed = self._check(head, asked)
                await self._receive(connection, head, asked, packed=packed)
                return None
            return await self._refusal(connection, head)

    def _is_whole(self, asked: Extent) -> bool:
        return (asked.start, asked.end) == (self._order.start, self._order.end)

    def _headers(self, asked: Extent) -> dict[str, str]:
        """Those of one request: a number is good for one only."""
        order, fields, ranged = self._order, {}, ""
        if not self._is_whole(asked):
            fields["Range"] = ranged = f"bytes={asked.start - order.start}-{asked.end - order.start - 1}"
        elif order.lz4:
            fields[protocol.ACCEPT_LZ4] = "lz4"
        request = auth.Request("GET", self._url.raw_path_qs, ranged)
        self._nonce = auth.new_nonce()
        fields["Authorization"] = auth.sign(request, order.me, order.node, order.keys, time.time(), self._nonce)
        return fields

    def _is_genuine(self, answer: auth.Answer, head: Head) -> bool:
        key = self._order.keys[0] if self._order.keys else b""
        mac = head.headers.get(protocol.MAC, "")
        return auth.answer_is_genuine(answer, mac, self._nonce, self._order.node, key)

    # What is answered ------------------------------------------------------------------------------------------------

    def _check(self, head: Head, asked: Extent) -> bool:
        """That the node says these are the asked bytes, before one is taken. Returns whether they are packed."""
        order, who = self._order, self._order.address
        start, end, size = asked.start - order.start, asked.end - order.start, order.end - order.start
        from_, upto, of = _range_of(head, size)
        named = _DIGEST.fullmatch(head.headers.get(protocol.DIGEST, ""))
        digest = bytes.fromhex(named[0]) if named else b""
        encoding = head.headers.get(protocol.ENCODING, "identity")
        said = protocol.chunk_head(digest, from_, upto, encoding, head.length or 0)
        if not self._is_genuine(auth.Answer(head.status, said), head):
            raise self._not_genuine(head.status)
        if not digest:
            raise OrderFailed("unavailable", f"{who} announced no digest of the chunk")
        if head.length is None:
            raise OrderFailed("unavailable", f"{who} does not say how much it sends")
        if (from_, upto, of) != (start, end, size):
            what = f"bytes {from_}-{upto - 1} of {of}" if of else "no range"
            raise OrderFailed("corrupt", f"{who} answered {what} to bytes {start}-{end - 1} of {size}")
        packed = encoding == "lz4" and order.lz4 and self._is_whole(asked)
        if not packed and encoding != "identity":
            raise OrderFailed("unavailable", f"{who} sent the chunk packed in a way that was not asked for")
        if head.length > len(asked) or (not packed and head.length != len(asked)):
            raise OrderFailed("corrupt", f"{who} sent {head.length} bytes as bytes {start}-{end - 1}")
        if self.announced not in {None, digest}:
            raise OrderFailed("corrupt", f"{who} announced another digest of the chunk than before")
        self.announced = digest
        return packed

    async def _receive(self, connection: Connection, head: Head, asked: Extent, *, packed: bool) -> None:
        """The body, as it comes. Raises OrderFailed and Broken."""
        loop, stall_s, who = asyncio.get_running_loop(), self._order.stall_s, self._order.address
        assert head.length is not None
        unpacker = Unpacker(len(asked)) if packed else None
        enough = RATE_MIN * stall_s
        came = 0

        def take(piece: memoryview) -> None:
            nonlocal came
            came += len(piece)
            if came >= enough:
                came = 0
                limit.reschedule(loop.time() + stall_s)
            if unpacker is None:
                self._intake.take(piece)
                return
            for data in unpacker.unpack(piece):
                self._intake.take(data)

        try:
            async with asyncio.timeout(stall_s) as limit:
                if unpacker is None:
                    with self._intake.of(connection, asked.end):
                        await connection.receive(head, take, head.length, stall_s)
                else:
                    # The kernel gathers nothing: how many bytes are still to come is known of packed ones only.
                    await connection.receive(head, take, head.length, stall_s)
                    unpacker.finish()
        except TimeoutError as e:
            what = f"{who} sent less than {RATE_MIN // 1024} KiB/s for {stall_s:g} s"
            raise OrderFailed("unavailable", what) from e
        except Corrupt as e:
            raise OrderFailed("corrupt", f"{who} sent what cannot be unpacked: {e.message}") from e

    async def _refusal(self, connection: Connection, head: Head) -> _Refused:
        """Reads why there are no bytes."""
        who, stall_s, body = self._order.address, self._order.stall_s, bytearray()
        try:
            async with asyncio.timeout(stall_s):
                more = await connection.receive(head, body.extend, REFUSAL_BYTES_MAX, stall_s)
        except TimeoutError as e:
            raise OrderFailed("unavailable", f"{who} did not end its answer within {stall_s:g} s", head.status) from e
        if more:
            raise OrderFailed("unavailable", f"{who} answered {head.status} with an endless reason", head.status)
        if not self._is_genuine(auth.Answer(head.status, "", bytes(body)), head):
            raise self._not_genuine(head.status)
        try:
            return _Refused(head.status, protocol.decode(bytes(body), protocol.Refusal))
        except Invalid:
            return _Refused(head.status, None)

    def _not_genuine(self, status: int) -> OrderFailed:
        who, node = self._order.address, self._order.node
        if status == 401:  # by one who does not know with which key to sign
            what = f"{who} does not take this node's signature: all nodes need the same swarm key and the same time"
        else:
            what = f"{who} answered {status} without the signature of node {node}"
        return OrderFailed("denied", what, status)

    def _failure(self, refused: _Refused) -> OrderFailed:
        status, refusal = refused.status, refused.refusal
        what = f"{self._order.address} answered {status}"
        if refusal is None:
            return OrderFailed(_REASONS.get(status, "unavailable"), what, status)
        if said := _printable(refusal.message, SAID_CHARACTERS_MAX):
            what += f": {said.rstrip('.')}"
        wait_s = _bounded_s(refusal.retry_s)
        if status == 503 and refusal.reason == "busy":
            holders = [node for node in refusal.holders if protocol.NODE_ID.fullmatch(node)][:HOLDERS_MAX]
            return OrderFailed("busy", what, status, wait_s, holders=holders)
        if status == 502:
            origin = _printable(refusal.origin, ORIGIN_CHARACTERS_MAX)
            reason = _BEHIND.get(refusal.reason, "unavailable")
            return OrderFailed(reason, what, status, wait_s, behind=True, origin=origin)
        return OrderFailed(_REASONS.get(status, "unavailable"), what, status, wait_s)


def _range_of(head: Head, size: int) -> tuple[int, int, int]:
    """Which bytes of the chunk come, from and up to, and how many it has, as the answer says; (0, 0, 0) where it says nothing clear."""
    if head.status == 200:
        return 0, size, size
    found = _CONTENT_RANGE.fullmatch(head.headers.get("content-range", ""))
    if found is None:
        return 0, 0, 0
    return int(found[1]), int(found[2]) + 1, size if found[3] == "*" else int(found[3])


def _printable(text: str, most: int) -> str:
    """Words of another node, for people: one line, nothing that a terminal obeys."""
    return "".join(c if c.isprintable() else " " for c in text[:most]).strip()


def _bounded_s(wait_s: float) -> float:
    """A wait that another node asks for; 0 where that is no number."""
    return min(wait_s, RETRY_AFTER_SECONDS_MAX) if wait_s >= 0 else 0.0
