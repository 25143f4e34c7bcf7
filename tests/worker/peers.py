"""Another node for the tests of `manta.worker.peer`: a real socket, and answers that are honest until a test says otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from manta.cache.digests import chunk_digest
from manta.model.extents import CHUNK_SIZE
from manta.swarm import auth, protocol
from manta.wire.messages import Fetched, Pull
from manta.worker.failure import OrderFailed
from manta.worker.peer import PeerClient

ME, NODE, OTHER = "a" * 16, "b" * 16, "c" * 16
KEY, OTHER_KEY = b"0123456789abcdef-one", b"0123456789abcdef-two"

LENGTH = 300_000
START, END = CHUNK_SIZE, CHUNK_SIZE + LENGTH
"""Chunk 1, the last of its blob."""

DATA = random.Random(5).randbytes(LENGTH)
WRONG = DATA[:1000] + bytes([DATA[1000] ^ 1]) + DATA[1001:]
BLOB = "sha256-" + "0" * 64


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    target: str
    headers: dict[str, str]
    sender: auth.Sender
    start: int
    end: int
    """Which bytes of the chunk."""
    pull: protocol.Pull | None

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


def message(status: int, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunk(
    asked: Asked,
    *,
    data: bytes = DATA,
    body: bytes | None = None,
    digest: bytes | None = None,
    status: int | None = None,
    encoding: str = "identity",
    given: tuple[int, int] | None = None,
    node: str = NODE,
    changed: dict[str, str | None] | None = None,
) -> bytes:
    """The answer with the bytes that were asked for, and whatever else it is to say; `changed` is what of its headers somebody changes
    after it was signed (None: takes away)."""
    start, end = given or (asked.start, asked.end)
    body = data[start:end] if body is None else body
    digest = chunk_digest(DATA) if digest is None else digest
    status = status or (206 if asked.range else 200)
    head = protocol.chunk_head(digest, start, end, encoding, len(body))
    headers: dict[str, str | None] = {
        "Content-Length": str(len(body)),
        protocol.DIGEST: digest.hex(),
        protocol.ENCODING: encoding,
        protocol.MAC: auth.sign_answer(auth.Answer(status, head), asked.sender, node),
    }
    if status == 206:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(DATA)}"
    headers |= changed or {}
    return message(status, {name: value for name, value in headers.items() if value is not None}, body)


def refusal(asked: Asked, status: int, refused: protocol.Refusal | bytes, *, node: str = NODE) -> bytes:
    body = refused if isinstance(refused, bytes) else protocol.encode(refused)
    mac = auth.sign_answer(auth.Answer(status, "", body), asked.sender, node)
    return message(status, {"Content-Length": str(len(body)), protocol.MAC: mac}, body)


Answer = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]] | Callable[[Asked], bytes] | None
"""Writes its answer by itself, or says what it is; None: closes the connection."""


@dataclass
class Node:
    """Gives each request the next of `answers`, then honest ones. What is no sound request of `ME` ends up in `troubles`."""

    answers: list[Answer] = field(default_factory=list)
    keys: Sequence[bytes] = (KEY,)
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0
    closed: int = 0
    """Connections that the client has closed, seen where the node waits for that."""
    port: int = 0
    troubles: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked = self._parse(await reader.readuntil(b"\r\n\r\n"))
                self.asked.append(asked)
                answer = self.answers.pop(0) if self.answers else chunk
                if answer is None:
                    return
                said = answer(asked, writer) if _writes(answer) else answer(asked)  # type: ignore[call-arg]
                if isinstance(said, bytes):
                    writer.write(said)
                else:
                    await said
                await writer.drain()

    def _parse(self, head: bytes) -> Asked:
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split()
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        ranged = headers.get("range", "")
        request = protocol.parse_chunk_target(target, ranged)
        try:
            sender = self._verifier.check(
                headers.get("authorization", ""), auth.Request(method, target, ranged), time.time()
            )
        except Exception as e:
            self.troubles.append(str(e))
            raise ConnectionError from e
        if (method, sender.node, sender.to, str(request.blob), request.chunk) != ("GET", ME, NODE, BLOB, 1):
            self.troubles.append(first)
        return Asked(target, headers, sender, request.start, request.end, request.pull)

    def __post_init__(self) -> None:
        self._verifier = auth.Verifier(NODE, self.keys)


def _writes(answer: object) -> bool:
    return asyncio.iscoroutinefunction(answer)


@contextlib.asynccontextmanager
async def serving(node: Node, tls: ssl.SSLContext | None = None) -> AsyncIterator[Node]:
    tasks: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.create_task(node.serve(reader, writer)))

    listener = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    node.port = listener.sockets[0].getsockname()[1]
    try:
        yield node
    finally:
        listener.close()
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [e for e in ended if isinstance(e, Exception) and not isinstance(e, ssl.SSLError)] == []
        assert node.troubles == []


@dataclass
class Outcome:
    """What became of one order."""

    fetched: Fetched | None = None
    failure: OrderFailed | None = None
    told: list[tuple[int, int]] = field(default_factory=list)

    @property
    def reason(self) -> str:
        return self.failure.reason if self.failure is not None else ""

    @property
    def message(self) -> str:
        return self.failure.message if self.failure is not None else ""


class Puller:
    """A worker's client and a cache file of it, in which nothing may ever lie outside the ordered extents."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.ftruncate(self.fd, END + 100_000)
        self.client = PeerClient()

    def close(self) -> None:
        self.client.close()
        os.close(self.fd)

    @property
    def chunk(self) -> bytes:
        """What the file has of it."""
        return os.pread(self.fd, LENGTH, START)

    @property
    def untouched(self) -> bool:
        return self.chunk == bytes(LENGTH)

    async def pull(self, node: Node, *extents: tuple[int, int], **fields: object) -> Outcome:
        """`extents` are relative to the chunk; none: all of it."""
        outcome = Outcome()
        order = pull_order(node.address, *extents, **fields)
        try:
            outcome.fetched = await self.client.pull(order, self.fd, lambda at, upto: outcome.told.append((at, upto)))
        except OrderFailed as e:
            outcome.failure = e
        assert os.pread(self.fd, 1000, START - 1000) == bytes(1000)
        assert os.pread(self.fd, 100_000, END) == bytes(100_000)
        return outcome


def pull_order(address: str, *extents: tuple[int, int], **fields: object) -> Pull:
    values: dict[str, object] = {
        "node": NODE,
        "me": ME,
        "blob": BLOB,
        "blob_size": END,
        "chunk": 1,
        "start": START,
        "end": END,
        "extents": [(START + start, START + end) for start, end in extents or [(0, LENGTH)]],
        "stall_s": 10.0,
        "patience_s": 10.0,
        "keys": [KEY],
        **fields,
    }
    return Pull(7, address, **values)  # type: ignore[arg-type]
