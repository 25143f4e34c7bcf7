"""A peer server for tests, in the test's own loop, with a cache on disk, a scripted daemon, and askers that say what they like."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from manta.cache.chunkmap import ChunkMap
from manta.cache.digests import chunk_digest
from manta.cache.incarnation import incarnation
from manta.cache.layout import Layout
from manta.model.extents import CHUNK_SIZE, ChunkGrid
from manta.model.ids import BlobAlgorithm, BlobId
from manta.swarm.auth import Answer, Request, answer_is_genuine, new_nonce, sign
from manta.swarm.limits import Limits
from manta.swarm.protocol import ENCODING, MAC, Pull, Refusal, chunk_head, chunk_target, decode
from manta.swarm.questions import Questions
from manta.swarm.server import Server
from manta.wire.messages import Message
from manta.wire.peering import Asked, Gone, Listening, Reply, Settings

ME = "00000000000000aa"
ASKER = "00000000000000bb"
OTHER = "00000000000000cc"
KEY = b"a key that all of the nodes share"
PATIENCE_S = 20.0
PULL = Pull(kind="models", repo="org/name", commit="c" * 40, path="model.safetensors")

T = TypeVar("T")


def run(test: Coroutine[None, None, T]) -> T:
    """A test's loop; one that hangs fails."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await test

    return asyncio.run(bounded())


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def blob_of(data: bytes) -> BlobId:
    return BlobId(BlobAlgorithm.SHA256, hashlib.sha256(data).hexdigest())


def shelve(
    directory: Path,
    data: bytes,
    chunks: Sequence[int] | None = None,
    *,
    boot_id: bytes | None = None,
    sealed: bool = False,
    chunk_size: int = CHUNK_SIZE,
) -> BlobId:
    """Puts `chunks` (None: all) of a blob into the cache, as the daemon does."""
    blob, layout, grid = blob_of(data), Layout(directory), ChunkGrid(len(data), chunk_size)
    layout.data(blob).parent.mkdir(parents=True, exist_ok=True)
    with layout.data(blob).open("wb") as file:
        file.truncate(len(data))
        chunk_map = ChunkMap.create(layout.map(blob), blob, grid, boot_id or incarnation(directory))
        for chunk in range(len(grid)) if chunks is None else chunks:
            extent = grid.extent(chunk)
            file.seek(extent.start)
            file.write(data[extent.start : extent.end])
            chunk_map.record(chunk, chunk_digest(data[extent.start : extent.end]))
    if sealed:
        chunk_map.mark_sealed(chunk_map.generation)
    chunk_map.close()
    return blob


@dataclass
class FakeMembers:
    """The membership, as the server knows it. `heard_of` are the nodes that asked, and from where."""

    nodes: set[str]
    heard_of: list[tuple[str, str]] = field(default_factory=list)

    def is_member(self, node: str) -> bool:
        return node in self.nodes

    def heard(self, node: str, host: str) -> None:
        self.heard_of.append((node, host))


@dataclass
class FakeDaemon:
    """Gets what the peer process tells. `answers` are by what is asked; a question without one stays open."""

    answers: dict[str, Callable[[Asked], Reply | Awaitable[Reply] | None]] = field(default_factory=dict)
    told: list[Message] = field(default_factory=list)
    questions: Questions | None = None
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)
    _tasks: set[asyncio.Future[None]] = field(default_factory=set)

    def tell(self, message: Message) -> None:
        self.told.append(message)
        task = asyncio.ensure_future(self._take(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, message: Message) -> None:
        async with self.heard:
            self.heard.notify_all()
        if isinstance(message, Asked) and (answer := self.answers.get(message.what)) is not None:
            reply = answer(message)
            if isinstance(reply, Awaitable):
                reply = await reply
            if reply is not None:
                self.reply(reply)

    def reply(self, reply: Reply, fd: int | None = None) -> None:
        assert self.questions is not None
        self.questions.reply(reply, fd)

    def asked(self, what: str) -> list[Asked]:
        return [message for message in self.told if isinstance(message, Asked) and message.what == what]

    def gone(self) -> list[int]:
        return [message.order for message in self.told if isinstance(message, Gone)]

    async def until(self, holds: Callable[[], object]) -> None:
        """Until `holds` does, which only what is told can change."""
        async with asyncio.timeout(PATIENCE_S), self.heard:
            await self.heard.wait_for(lambda: bool(holds()))

    async def hear(self, kind: type[T], where: Callable[[T], bool] = lambda _: True) -> T:
        """The first message of a kind for which `where` holds."""

        def found() -> list[T]:
            return [message for message in self.told if isinstance(message, kind) and where(message)]

        await self.until(found)
        return found()[0]


@dataclass
class Got:
    """An answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def refusal(self) -> Refusal:
        return decode(self.body, Refusal)


@dataclass
class Asker:
    """Another node. Every answer that it gets must be signed, unless it is refused for its own signature."""

    port: int
    node: str = ASKER
    keys: tuple[bytes, ...] = (KEY,)
    tls: ssl.SSLContext | None = None
    to: str = ME

    async def connect(self, limit: int = 2**16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.tls is not None:
            return await asyncio.open_connection(
                "127.0.0.1", self.port, ssl=self.tls, server_hostname="localhost", limit=limit
            )
        return await asyncio.open_connection("127.0.0.1", self.port, limit=limit)

    def head(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        range_: str = "",
        *,
        nonce: str | None = None,
        now: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[bytes, str]:
        """A request's head, and its number."""
        nonce = nonce or new_nonce()
        request = Request(method, target, range_, body)
        fields = {
            "host": f"127.0.0.1:{self.port}",
            "authorization": sign(request, self.node, self.to, self.keys, time.time() if now is None else now, nonce),
        }
        if body:
            fields["content-length"] = str(len(body))
        if range_:
            fields["range"] = range_
        fields |= headers or {}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape"), nonce

    async def ask(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        range_: str = "",
        *,
        now: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> Got:
        """On a connection of its own."""
        reader, writer = await self.connect()
        try:
            head, nonce = self.head(method, target, body, range_, now=now, headers=headers)
            writer.write(head + body)
            got = await read_answer(reader)
        finally:
            await hang_up(writer)
        self.check(got, nonce)
        return got

    def check(self, got: Got, nonce: str) -> None:
        """That the node has signed the answer."""
        if got.status == 401 or not self.keys:
            return
        if "x-manta-digest" in got.headers:
            start, end = 0, 0
            if got.status == 206:
                start, end = (int(n) for n in got.headers["content-range"].split()[1].partition("/")[0].split("-"))
                end += 1
            else:
                end = int(got.headers.get("x-manta-bytes", len(got.body)))
            digest = bytes.fromhex(got.headers["x-manta-digest"])
            said = Answer(got.status, chunk_head(digest, start, end, got.headers[ENCODING], len(got.body)))
        else:
            said = Answer(got.status, body=got.body)
        assert answer_is_genuine(said, got.headers.get(MAC, ""), nonce, ME, self.keys[0])

    async def chunk(
        self, blob: BlobId, size: int, chunk: int, pull: Pull | None = None, range_: str = "", lz4: bool = False
    ) -> Got:
        headers = {"x-manta-accept": "lz4"} if lz4 else {}
        return await self.ask("GET", chunk_target(blob, size, chunk, pull), range_=range_, headers=headers)


async def read_answer(reader: asyncio.StreamReader) -> Got:
    """Raises IncompleteReadError where the connection ends before the answer does."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Got(int(lines[0].split()[1]), headers, body)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


@dataclass
class Node:
    """A server that runs, its daemon and its cache."""

    server: Server
    daemon: FakeDaemon
    cache: Path
    port: int
    members: FakeMembers

    def asker(self, node: str = ASKER, keys: tuple[bytes, ...] = (KEY,)) -> Asker:
        return Asker(self.port, node, keys)


SETTINGS = Settings(
    0, node=ME, cache_dir="", host="127.0.0.1", port=0, peers="static:127.0.0.1:9", keys=[KEY], started=7.0
)


@asynccontextmanager
async def serving(
    cache: Path, settings: Settings = SETTINGS, limits: Limits | None = None, *, listening: bool = True
) -> AsyncIterator[Node]:
    daemon, members = FakeDaemon(), FakeMembers({ASKER, OTHER})
    daemon.questions = Questions(daemon.tell, limits or Limits())
    settings = msgspec.structs.replace(settings, cache_dir=str(cache))
    server = Server(settings, daemon.questions, daemon.tell, members, limits or Limits())
    running = asyncio.create_task(server.run())
    node = Node(server, daemon, cache, 0, members)
    try:
        if listening:
            node.port = int((await daemon.hear(Listening)).address.rpartition(":")[2])
        yield node
    finally:
        running.cancel()
        await asyncio.wait({running})
        if not running.cancelled():
            running.result()


def open_files() -> list[str]:
    """What this process has open below a test's directory."""
    folder = "/proc/self/fd"
    names = []
    for name in os.listdir(folder):
        try:
            names.append(os.readlink(f"{folder}/{name}"))
        except FileNotFoundError:
            continue
    return [name for name in names if "/blobs/" in name]
