"""manta.fuse.kernel_session against a kernel that the test plays: requests and answers over a socket pair, no mount."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from manta.errors import Corrupt, MantaError
from manta.fs.filesystem import Filesystem
from manta.fs.inodes import ROOT
from manta.fs.views import SnapshotFolder
from manta.fuse import protocol
from manta.fuse.kernel_session import FEATURES, KernelSession
from manta.fuse.protocol import Init, Negotiated, Opcode, Open
from manta.telemetry.events import Telemetry
from tests.fs.fakes import CHUNK, FIRST, MODEL, MemoryHub, MemorySource, content, fetching
from tests.fuse.test_protocol import entries

CONFIG = b'{"hidden_size": 384}'
WEIGHTS = content(3 * CHUNK + 5)
AGREED = Negotiated(45, Init.MAX_PAGES | Init.PASSTHROUGH | Init.HAS_RESEND, 131072)
DEADLINE_S = 20


class Kernel:
    """The other side of the connection."""

    def __init__(self, wire: trio.socket.SocketType, refused: list[MantaError]) -> None:
        self._wire = wire
        self._unique = 0
        self._answers: dict[int, tuple[int, bytes]] = {}
        self.refused = refused

    async def send(self, opcode: int, nodeid: int = ROOT, body: bytes = b"") -> int:
        """Returns the request's number."""
        self._unique += 2
        await self.send_raw(
            struct.pack("<IIQQIIIHH", 40 + len(body), opcode, self._unique, nodeid, 0, 0, 77, 0, 0) + body
        )
        return self._unique

    async def send_raw(self, message: bytes) -> None:
        await self._wire.send(message)

    async def answer(self, unique: int) -> tuple[int, bytes]:
        """The errno and the body."""
        while unique not in self._answers:
            with trio.fail_after(DEADLINE_S):
                message = await self._wire.recv(2 << 20)
            length, error, answered = struct.unpack_from("<IiQ", message)
            assert length == len(message)
            assert answered not in self._answers, "answered twice"
            self._answers[answered] = -error, message[16:]
        return self._answers.pop(unique)

    async def ask(self, opcode: int, nodeid: int = ROOT, body: bytes = b"") -> bytes:
        number, answer = await self.answer(await self.send(opcode, nodeid, body))
        assert number == 0, errno.errorcode[number]
        return answer

    async def fail(self, opcode: int, nodeid: int = ROOT, body: bytes = b"") -> str:
        """The name of the errno."""
        number, _ = await self.answer(await self.send(opcode, nodeid, body))
        return errno.errorcode[number]

    async def look_up(self, name: bytes, parent: int = ROOT) -> int:
        """The nodeid."""
        return int(struct.unpack_from("<Q", await self.ask(Opcode.LOOKUP, parent, name + b"\0"))[0])

    async def open(self, nodeid: int, opcode: int = Opcode.OPEN) -> tuple[int, Open]:
        """The handle and how it was opened."""
        handle, flags, _ = struct.unpack("<QIi", await self.ask(opcode, nodeid, struct.pack("<II", os.O_RDONLY, 0)))
        return handle, Open(flags)


def read_in(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


@asynccontextmanager
async def kernel(directory: Path, *, native: bool = False) -> AsyncIterator[tuple[Kernel, MemoryHub]]:
    hub = MemoryHub()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    refused: list[MantaError] = []
    async with fetching(directory, hub) as blobs:
        files = [hub.plain("config.json", CONFIG), hub.lfs("model.safetensors", WEIGHTS), hub.plain("a/b", b"b")]
        folder = SnapshotFolder(MemorySource(hub), hub.commit(MODEL, FIRST, files, "main"))
        filesystem = Filesystem(folder, blobs, Telemetry(), fill=False, native=native)
        session = KernelSession(filesystem, refused.append)
        session.adopt(directory, ours.detach(), msgspec.json.encode(AGREED))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.serve)
            with trio.socket.from_stdlib_socket(theirs) as wire:
                yield Kernel(wire, refused), hub
            nursery.cancel_scope.cancel()
        filesystem.close()
        session.leave()


@pytest.mark.trio
async def test_names_lead_to_attributes(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        entry = await k.ask(Opcode.LOOKUP, ROOT, b"config.json\0")
        nodeid, _, _, _, _, _ = struct.unpack_from("<QQQQII", entry)
        attributes = await k.ask(Opcode.GETATTR, nodeid, bytes(16))
        assert attributes[16:] == entry[40:]
        _number, size = struct.unpack_from("<QQ", attributes, 16)
        assert size == len(CONFIG)
        assert len(await k.ask(Opcode.STATX, nodeid, bytes(24))) == 288
        absent = await k.ask(Opcode.LOOKUP, ROOT, b"nothing\0")
        assert struct.unpack_from("<QQQ", absent) == (0, 0, 86400), "the kernel remembers that it is not there"
        assert await k.fail(Opcode.GETATTR, 4242, bytes(16)) in {"ENOENT", "ESTALE"}


@pytest.mark.trio
async def test_a_file_is_opened_and_read(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        nodeid = await k.look_up(b"model.safetensors")
        handle, flags = await k.open(nodeid)
        assert flags == Open.KEEP_CACHE
        assert (
            await k.ask(Opcode.READ, nodeid, read_in(handle, CHUNK - 1, CHUNK + 3))
            == WEIGHTS[CHUNK - 1 : 2 * CHUNK + 2]
        )
        assert await k.ask(Opcode.READ, nodeid, read_in(handle, 3 * CHUNK, CHUNK)) == WEIGHTS[3 * CHUNK :]
        assert await k.ask(Opcode.READ, nodeid, read_in(handle, 10 * CHUNK, CHUNK)) == b""
        await k.ask(Opcode.RELEASE, nodeid, struct.pack("<QIIQ", handle, 0, 0, 0))


@pytest.mark.trio
@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
async def test_a_directory_is_listed_in_pieces(tmp_path: Path, opcode: Opcode) -> None:
    async with kernel(tmp_path) as (k, _):
        handle, flags = await k.open(ROOT, Opcode.OPENDIR)
        assert flags == Open.CACHE_DIR | Open.KEEP_CACHE, "a commit's listing never changes"
        names, position = [], 0
        while True:
            part = await k.ask(opcode, ROOT, read_in(handle, position, 200))
            if not part:
                break
            for name, number, position in entries(part, plus=opcode is Opcode.READDIRPLUS):  # noqa: B007
                names.append(name)
                assert number
        assert sorted(names) == [b"a", b"config.json", b"model.safetensors"]
        await k.ask(Opcode.RELEASEDIR, ROOT, struct.pack("<QIIQ", handle, 0, 0, 0))


@pytest.mark.trio
async def test_extended_attributes_are_told_with_their_size_first(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        nodeid = await k.look_up(b"config.json")
        size, _ = struct.unpack(
            "<II", await k.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", 0, 0) + b"user.manta.state\0")
        )
        value = await k.ask(Opcode.GETXATTR, nodeid, struct.pack("<II", size, 0) + b"user.manta.state\0")
        assert value == b"absent"
        assert await k.fail(Opcode.GETXATTR, nodeid, struct.pack("<II", 2, 0) + b"user.manta.state\0") == "ERANGE"
        assert await k.fail(Opcode.GETXATTR, nodeid, struct.pack("<II", 0, 0) + b"user.other\0") == "ENODATA"
        names = await k.ask(Opcode.LISTXATTR, nodeid, struct.pack("<II", 4096, 0))
        assert b"user.manta.blob\0" in names


@pytest.mark.trio
async def test_what_writes_and_what_is_not_known_is_refused(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        nodeid = await k.look_up(b"config.json")
        assert await k.fail(Opcode.OPEN, nodeid, struct.pack("<II", os.O_RDWR, 0)) == "EROFS"
        assert await k.fail(9, ROOT, bytes(8) + b"x\0") == "EROFS"  # MKDIR
        assert await k.fail(34, ROOT, bytes(8)) == "ENOSYS"  # ACCESS
        assert await k.fail(4711, ROOT, bytes(100)) == "ENOSYS"
        assert len(await k.ask(Opcode.STATFS)) == 80


@pytest.mark.trio
async def test_nonsense_is_survived(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        await k.send_raw(b"x")
        await k.send_raw(bytes(39))
        await k.send_raw(struct.pack("<IIQQIIIHH", 41, 1, 1, 1, 0, 0, 0, 0, 0))
        await k.send(Opcode.BATCH_FORGET, body=struct.pack("<II", 1 << 31, 0))
        await k.send(Opcode.FORGET, nodeid=4242, body=struct.pack("<Q", 3))
        await k.send(Opcode.INTERRUPT, body=struct.pack("<Q", 4242))
        for opcode in (Opcode.LOOKUP, Opcode.READ, Opcode.GETXATTR, Opcode.RELEASE, Opcode.READDIRPLUS):
            assert await k.fail(opcode, ROOT, b"\1") == "EIO"
        assert await k.look_up(b"config.json")


@pytest.mark.trio
async def test_a_read_that_waits_keeps_nobody_waiting_and_can_be_interrupted(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, hub):
        nodeid, small = await k.look_up(b"model.safetensors"), await k.look_up(b"config.json")
        held = hub.workers.fault("fetch", hold=True, times=None)
        handle, _ = await k.open(nodeid)
        waiting = await k.send(Opcode.READ, nodeid, read_in(handle, 0, CHUNK))
        other = await k.send(Opcode.READ, nodeid, read_in(handle, CHUNK, CHUNK))
        assert await k.look_up(b"config.json") == small
        await k.send(Opcode.INTERRUPT, body=struct.pack("<Q", waiting))
        assert await k.answer(waiting) == (errno.EINTR, b"")
        held.release()
        assert await k.answer(other) == (0, WEIGHTS[CHUNK : 2 * CHUNK])
        assert await k.ask(Opcode.READ, nodeid, read_in(handle, 0, CHUNK)) == WEIGHTS[:CHUNK]


@pytest.mark.trio
async def test_a_read_that_fails_is_an_errno_and_a_sentence(tmp_path: Path) -> None:
    async with kernel(tmp_path) as (k, _):
        assert await k.fail(Opcode.READ, ROOT, read_in(99, 0, 10)) == "EINVAL"
        assert "not" in k.refused[0].message


@pytest.mark.trio
async def test_where_the_kernel_takes_no_backing_file_it_is_read_through_us(tmp_path: Path) -> None:
    async with kernel(tmp_path, native=True) as (k, _):  # a socket takes none
        nodeid = await k.look_up(b"model.safetensors")
        handle, _ = await k.open(nodeid)
        await k.ask(Opcode.READ, nodeid, read_in(handle, 0, len(WEIGHTS)))
        await k.ask(Opcode.RELEASE, nodeid, struct.pack("<QIIQ", handle, 0, 0, 0))
        with trio.fail_after(DEADLINE_S):
            while b"sealed" not in await k.ask(
                Opcode.GETXATTR, nodeid, struct.pack("<II", 99, 0) + b"user.manta.state\0"
            ):
                await trio.sleep(0.01)
        nodeid = await k.look_up(b"model.safetensors")
        handle, flags = await k.open(nodeid)
        assert flags == Open.KEEP_CACHE
        assert await k.ask(Opcode.READ, nodeid, read_in(handle, 5, 10)) == WEIGHTS[5:15]


@pytest.mark.trio
async def test_what_the_daemon_before_agreed_on_must_be_readable(tmp_path: Path) -> None:
    hub = MemoryHub()
    async with fetching(tmp_path, hub) as blobs:
        folder = SnapshotFolder(MemorySource(hub), hub.commit(MODEL, FIRST, [], "main"))
        session = KernelSession(Filesystem(folder, blobs, Telemetry()), lambda _: None)
        with pytest.raises(Corrupt):
            session.adopt(tmp_path, 0, b"{}")


def test_features_can_be_named() -> None:
    from manta.config import FUSE_FEATURES

    assert set(FEATURES) == set(FUSE_FEATURES)
    assert all(feature & protocol.WANTED for feature in FEATURES.values())
