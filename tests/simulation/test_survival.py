"""What outlives a daemon: mounts, names and open files, of the journal and of what is stored, with the hub away.

The whole of it without a kernel: a model remembers what a kernel would, daemons are killed between any two requests, and the next one must
know all of it.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from manta.cache.metadata import MetadataStore
from manta.control.protocol import Mount, MountRequest
from manta.errors import Absent, MantaError, Superseded, Unavailable
from manta.fs import journal as journal_module
from manta.fs.filesystem import Attributes, Filesystem, OpenedFile
from manta.fs.inodes import ROOT
from manta.fs.journal import Journal
from manta.hub.catalog import Catalog
from manta.hub.origin import Access
from manta.operations.failures import Failures
from manta.operations.mounts import BIND_SECONDS_MAX, Mounted, Mounts
from manta.telemetry.events import Telemetry
from tests.fs.fakes import (
    ACCESS,
    CHUNK,
    FIRST,
    MODEL,
    OTHER,
    SECOND,
    THIRD,
    Blobs,
    MemoryHub,
    blob_of,
    content,
    fetching,
)

BIG = content(3 * CHUNK + 7, seed=1)
SMALL = content(100, seed=2)
SHARED = content(2 * CHUNK, seed=3)
GUEST = Access("hf_guest")
ROOT_PATH = Path("/run/manta/x/root")


def a_hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(
        MODEL,
        FIRST,
        [
            hub.lfs("model.safetensors", BIG),
            hub.plain("config.json", SMALL),
            hub.lfs("onnx/copy", SHARED),
            hub.plain("onnx/deep/empty", b""),
        ],
        None,
        "main",
    )
    hub.commit(OTHER, SECOND, [hub.lfs("other/same", SHARED), hub.plain("x.json", SMALL)], None, "main", "v1")
    return hub


class Daemon:
    """What of a daemon outlives it or not. `kill` leaves nothing but the journal's memory, the cache and the hub."""

    def __init__(self, hub: MemoryHub, blobs: Blobs, nursery: trio.Nursery, journal: Journal) -> None:
        self.hub = hub
        self.blobs = blobs
        self.nursery = nursery
        self.journal = journal
        catalog = Catalog(hub, MetadataStore(blobs.store.layout.meta), nursery, owner=ACCESS)
        self.gone: list[str] = []
        self.mounts = Mounts(catalog, blobs.store, ROOT_PATH, lambda mounted: self.gone.append(mounted.id), journal)
        self.fs = Filesystem(
            self.mounts.folder,
            blobs,
            Telemetry(),
            fill=False,
            native=True,
            complete_bytes_max=200,
            journal=journal,
        )

    @classmethod
    async def after(cls, dead: Daemon) -> Daemon:
        journal, recovered = Journal.open(dead.kill())
        daemon = cls(dead.hub, dead.blobs, dead.nursery, journal)
        await daemon.mounts.restore(recovered, lambda request, _: Access(request.token) if request.token else ACCESS)
        daemon.fs.recover(recovered)
        return daemon

    def kill(self) -> int:
        """The keeper's descriptor of the journal."""
        fd = os.dup(self.journal.fd)
        for file in self.fs._files.values():
            file.close()
        self.journal.close()
        return fd

    async def mount(self, request: MountRequest, access: Access = ACCESS) -> Mounted:
        return await self.mounts.create(request, access)

    def describe(self, mounted: Mounted) -> Mount:
        return self.mounts.describe(mounted, Failures())

    async def walk(self, *names: str) -> Attributes:
        found = await self.fs.attributes(ROOT)
        for name in names:
            found = await self.fs.look_up(found.inode, name.encode())
        return found

    async def content(self, inode: int) -> bytes:
        opened = await self.fs.open_file(inode)
        if opened.native is not None:
            self.fs.opened(opened.handle, False)
        try:
            return bytes(await self.fs.read(opened.handle, 0, 1 << 20))
        finally:
            self.fs.close_file(opened.handle)


@asynccontextmanager
async def daemon(directory: Path, hub: MemoryHub | None = None) -> AsyncIterator[Daemon]:
    hub = hub or a_hub()
    async with fetching(directory, hub) as blobs, trio.open_nursery() as nursery:
        yield Daemon(hub, blobs, nursery, Journal.create())
        nursery.cancel_scope.cancel()


AWAY = Unavailable("https://hub.example does not answer.")


# Mounts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_mounts_go_on_without_the_hub(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        await first.mount(MountRequest("org/name", "/models"))
        await first.mount(MountRequest("org/other@v1/other", "/other", token=GUEST.token), GUEST)
        await first.mount(MountRequest("org/name", "/cache", "hub-cache"))
        gone = await first.mount(MountRequest("org/other", "/gone"))
        hub_mount = await first.mount(MountRequest("", "/hub"))
        await first.walk(hub_mount.id, "org", "other@v1")
        first.mounts.bound("1-org--name", "/really/models")
        first.mounts.remove(gone.id)
        described = [first.describe(mounted) for mounted in first.mounts]
        first.hub.failure = AWAY
        asked = len(first.hub.asked)
        second = await Daemon.after(first)
        assert [second.describe(mounted) for mounted in second.mounts] == described
        assert len(second.hub.asked) == asked
        assert [mounted.scope.access for mounted in second.mounts] == [ACCESS, GUEST, ACCESS, ACCESS]
        assert all("hf_" not in repr(mounted.request) and not mounted.request.token for mounted in second.mounts)
        assert second.mounts["1-org--name"].confirmed
        assert not second.mounts["2-org--other"].confirmed
        assert blob_of(SHARED) in second.mounts.blobs()
        assert {name for name, _ in await second.mounts["5-hub"].root.children()} >= {"org"}
        # And they freeze and show on what is new to them, under numbers that nobody had.
        second.hub.failure = None
        assert (await second.mount(MountRequest("org/name", "/more"))).id == "6-org--name"
        with pytest.raises(Absent):
            await second.walk(gone.id)


@pytest.mark.trio
async def test_a_frozen_commit_stays_what_it_was_however_the_repo_moves(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("", "/hub"))
        await first.walk(mounted.id, "org", "name")
        first.hub.commit(MODEL, THIRD, [first.hub.plain("config.json", b"new")], None, "main")
        second = await Daemon.after(await Daemon.after(first))
        folder = await second.walk(mounted.id, "org", "name")
        assert (await second.fs.extended_attributes(folder.inode))["user.manta.commit"] == FIRST


@pytest.mark.trio
async def test_a_private_tree_is_shown_to_the_mount_that_had_it_and_to_no_other(tmp_path: Path) -> None:
    hub = a_hub()
    hub.trees[MODEL, FIRST].__dict__["private"] = True
    async with daemon(tmp_path, hub) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"), GUEST)
        hub.failure = AWAY
        second = await Daemon.after(first)
        assert (await second.walk(mounted.id, "config.json")).size == len(SMALL)
        with pytest.raises(Unavailable, match="private or gated"):
            await second.mount(MountRequest(f"org/name@{FIRST}", "/more"), Access("hf_another"))


@pytest.mark.trio
async def test_a_mount_whose_tree_is_lost_is_there_and_shows_it_when_the_hub_answers(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        config = await first.walk(mounted.id, "config.json")
        for tree in first.blobs.store.layout.meta.rglob("trees/*"):
            tree.unlink()
        first.hub.failure = AWAY
        second = await Daemon.after(first)
        again = second.mounts[mounted.id]
        assert again.commit == FIRST
        assert second.describe(again).files == 0
        root = await second.walk(mounted.id)
        assert (await second.fs.extended_attributes(root.inode))["user.manta.commit"] == FIRST
        with pytest.raises(Unavailable):
            await second.fs.attributes(config.inode)
        with pytest.raises(Unavailable):
            await second.fs.open_folder(root.inode)
        second.hub.failure = None
        second = await Daemon.after(second)  # which has not asked for it a moment ago
        assert (await second.fs.attributes(config.inode)) == config
        assert second.describe(second.mounts[mounted.id]).files == 4


@pytest.mark.trio
async def test_a_mount_that_the_journal_spoiled_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with daemon(tmp_path) as first:
        await first.mount(MountRequest("org/name", "/models"))
        first.journal.mounted("9-spoiled", b"{")
        first.journal.mounted("10-spoiled", b"null")
        second = await Daemon.after(first)
        assert [mounted.id for mounted in second.mounts] == ["1-org--name"]
        assert caplog.text.count("could not be made again") == 2


@pytest.mark.trio
async def test_what_nobody_bound_ends_also_across_daemons(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        mounted.created -= BIND_SECONDS_MAX + 1
        first.mounts._record(mounted)
        second = await Daemon.after(first)
        second.mounts.drop_unbound(set(), trio.current_time())
        assert second.gone == [mounted.id]


@pytest.mark.trio
async def test_a_hub_cache_shows_every_commit_that_it_had_shown(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("", "/cache", "hub-cache"))
        repo = (mounted.id, "models--org--name")
        await first.walk(*repo, "refs", "main")
        first.hub.commit(MODEL, THIRD, [first.hub.lfs("new", BIG + b"new")], None, "main")
        link = await first.walk(*repo, "snapshots", THIRD, "new")
        target = os.fsdecode(await first.fs.read_link(link.inode))
        new = await first.walk(*repo, "blobs", target.split("/")[-1])
        first.hub.failure = AWAY
        second = await Daemon.after(first)
        assert await second.fs.attributes(new.inode) == new
        assert [name for name, _ in await second.mounts[mounted.id].root.children()] == ["models--org--name"]
        snapshots = await second.walk(*repo, "snapshots")
        listing = await second.fs.list_folder((await second.fs.open_folder(snapshots.inode)).handle, 0, 0)
        assert [entry.name.decode() for entry in listing] == [FIRST, THIRD]


# Names and files -------------------------------------------------------------------------------------------------------


async def open_natively(d: Daemon, inode: int, backing: int = 1) -> OpenedFile:
    opened = await d.fs.open_file(inode)
    assert opened.native is not None
    d.fs.opened(opened.handle, True, opened.native.backing or backing)
    return opened


@pytest.mark.trio
async def test_open_files_go_on(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        big = await first.walk(mounted.id, "model.safetensors")
        reader = await first.fs.open_file(big.inode)
        assert bytes(await first.fs.read(reader.handle, 0, 1 << 20)) == BIG
        first.hub.failure = AWAY
        second = await Daemon.after(first)
        assert second.fs.open_files == 1
        assert bytes(await second.fs.read(reader.handle, 5, 100)) == BIG[5:105]
        assert second.blobs.opened == 1
        later = await second.fs.open_file((await second.walk(mounted.id, "config.json")).inode)
        assert later.handle not in {0, reader.handle}
        second.fs.close_file(reader.handle)
        second.fs.close_file(later.handle)
        with pytest.raises(MantaError, match="not open"):
            await second.fs.read(reader.handle, 0, 1)
        third = await Daemon.after(second)
        assert (third.fs.open_files, third.blobs.opened) == (0, 0)


@pytest.mark.trio
async def test_native_files_keep_their_blob_and_their_way(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        big = await first.walk(mounted.id, "model.safetensors")
        assert await first.content(big.inode) == BIG
        transfer = first.blobs.open(next(iter(first.mounts.provenances(blob_of(BIG)))))
        await transfer.complete()
        first.blobs.close(transfer)
        native = await open_natively(first, big.inode, backing=42)
        first.hub.failure = AWAY
        second = await Daemon.after(first)
        info = second.blobs.store.find(blob_of(BIG))
        assert info is not None
        assert info.in_use
        with pytest.raises(MantaError, match="is open"):
            second.blobs.store.remove(info.id)
        other = await open_natively(second, big.inode)
        assert other.native is not None
        assert other.native.backing == 42
        with second.blobs.store.open_blob(info.id, info.size) as damaged:
            await trio.to_thread.run_sync(damaged.clear, 0)
        with pytest.raises(Superseded):
            await second.fs.open_file(big.inode)
        assert (await second.walk(mounted.id, "model.safetensors")).inode != big.inode
        assert second.fs.close_file(other.handle) is None
        assert second.fs.close_file(native.handle) == 42
        info = second.blobs.store.find(info.id)
        assert info is not None
        assert not info.in_use


@pytest.mark.trio
async def test_an_open_that_was_not_answered_comes_again_and_is_open_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        big = await first.walk(mounted.id, "model.safetensors")
        await first.fs.open_file(big.inode, request=1001)
        await first.fs.open_file(big.inode, request=1002)
        second = await Daemon.after(first)
        again = await second.fs.open_file(big.inode, request=1002)
        assert second.fs.open_files == 2
        assert bytes(await second.fs.read(again.handle, 0, 4)) == BIG[:4]
        await second.fs.open_file(big.inode, request=1003)
        assert second.fs.open_files == 3


@pytest.mark.trio
async def test_the_backing_file_of_an_open_that_was_not_answered_is_closed(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        config = await first.walk(mounted.id, "config.json")
        opened = await first.fs.open_file(config.inode, request=1001)
        assert opened.native is not None
        first.fs.opened(opened.handle, True, 42)
        second = await Daemon.after(first)
        closed: list[int] = []
        second.fs.close_backing = closed.append
        again = await second.fs.open_file(config.inode, request=1001)
        assert again.native is not None
        assert again.native.backing is None
        assert closed == [42]


@pytest.mark.trio
async def test_folders_go_on_where_they_were(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        root = await first.walk(mounted.id)
        opened = await first.fs.open_folder(root.inode)
        assert opened.cacheable
        assert not (await first.fs.open_folder(ROOT)).cacheable
        entries = list(await first.fs.list_folder(opened.handle, root.inode, 0))
        first.fs.told(entries[0])
        first.hub.failure = AWAY
        second = await Daemon.after(first)
        again = list(await second.fs.list_folder(opened.handle, root.inode, 1))
        assert [entry.name for entry in again] == [entry.name for entry in entries[1:]]
        assert await second.fs.attributes(entries[0].attributes.inode) == entries[0].attributes
        second.fs.close_folder(opened.handle)
        fresh = (await second.fs.open_folder(root.inode)).handle
        second.fs.close_folder(fresh)
        with pytest.raises(MantaError, match="not open"):
            await second.fs.list_folder(fresh, root.inode, 0)


@pytest.mark.trio
async def test_what_is_not_there_any_more_is_looked_up_anew(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        config = await first.walk(mounted.id, "config.json")
        first.mounts.remove(mounted.id)
        second = await Daemon.after(first)
        with pytest.raises(Superseded, match="Look its name up again"):
            await second.fs.attributes(config.inode)
        with pytest.raises(Absent):
            await second.fs.attributes(424242)
        assert second.fs.absence_valid_s(config.inode) == 0


@pytest.mark.trio
async def test_a_kernel_that_is_gone_leaves_no_names_in_the_journal(tmp_path: Path) -> None:
    async with daemon(tmp_path) as first:
        mounted = await first.mount(MountRequest("org/name", "/models"))
        await first.fs.open_file((await first.walk(mounted.id, "config.json")).inode)
        first.fs.close()
        journal, recovered = Journal.open(os.dup(first.journal.fd))
        journal.close()
        assert recovered.names == {}
        assert recovered.files == {}
        assert list(recovered.mounts) == [mounted.id]


# At random -------------------------------------------------------------------------------------------------------------


@dataclass
class _KernelFile:
    nodeid: int
    path: tuple[str, ...]
    content: bytes
    backing: int = 0


@dataclass
class Kernel:
    """What a kernel remembers of a mount: what it looked up and where, what is open, and by which way per nodeid."""

    known: dict[int, Attributes] = field(default_factory=dict)
    places: dict[int, dict[tuple[str, ...], None]] = field(default_factory=dict)
    """Where each was found: a blob can be at several places, and any of them can be dropped."""
    lookups: dict[int, int] = field(default_factory=dict)
    files: dict[int, _KernelFile] = field(default_factory=dict)
    requests: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    backings: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def learn(self, path: tuple[str, ...], attributes: Attributes) -> None:
        before = self.known.setdefault(attributes.inode, attributes)
        assert (before.number, before.kind, before.size) == (attributes.number, attributes.kind, attributes.size)
        for places in self.places.values():
            places.pop(path, None)  # one name leads to one inode
        self.places.setdefault(attributes.inode, {})[path] = None
        self.lookups[attributes.inode] = self.lookups.get(attributes.inode, 0) + 1

    def check_modes(self) -> None:
        """What the kernel would refuse: both ways, or two backing files, of one nodeid."""
        by_nodeid: dict[int, set[int]] = {}
        for file in self.files.values():
            by_nodeid.setdefault(file.nodeid, set()).add(file.backing)
        assert all(len(backings) == 1 for backings in by_nodeid.values()), by_nodeid


PATHS = [
    ("1-org--name", "model.safetensors"),
    ("1-org--name", "config.json"),
    ("1-org--name", "onnx", "copy"),
    ("1-org--name", "onnx", "deep", "empty"),
    ("2-hub", "org", "other", "other", "same"),
    ("2-hub", "org", "name@main", "model.safetensors"),
    ("3-hub", "models--org--other", "refs", "main"),
    ("3-hub", "models--org--other", "blobs", blob_of(SHARED).hex),
    ("3-hub", "models--org--name", "trees", f"{FIRST}.json"),
]
"""Files, of which some are one blob at several places."""

LINK = ("3-hub", "models--org--other", "snapshots", SECOND, "x.json")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.trio
async def test_a_kernel_never_notices_which_daemon_it_asks(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LITTER_BYTES", 300)
    rng = random.Random(seed)
    kernel = Kernel()
    async with daemon(tmp_path) as first:
        d = first
        await d.mount(MountRequest("org/name", "/a"))
        await d.mount(MountRequest("", "/b"))
        await d.mount(MountRequest("", "/c", "hub-cache"))
        contents: dict[tuple[str, ...], bytes] = {}

        async def find(path: tuple[str, ...]) -> Attributes:
            at = ROOT
            for depth, name in enumerate(path, 1):
                found = await d.fs.look_up(at, name.encode())
                kernel.learn(path[:depth], found)
                at = found.inode
            return found

        async def open_at(path: tuple[str, ...]) -> None:
            inode = (await find(path)).inode
            for attempt in range(2):
                try:
                    opened = await d.fs.open_file(inode, 7, next(kernel.requests))
                    break
                except Superseded:
                    assert attempt == 0
                    inode = (await find(path)).inode
            backing = 0
            if opened.native is not None:
                natively = rng.random() < 0.8
                backing = opened.native.backing or next(kernel.backings)
                try:
                    d.fs.opened(opened.handle, natively, backing)
                except Superseded:
                    return
                backing = backing if natively else 0
            data = bytes(await d.fs.read(opened.handle, 0, 1 << 20))
            assert contents.setdefault(path, data) == data
            assert opened.handle not in kernel.files
            kernel.files[opened.handle] = _KernelFile(inode, path, data, backing)
            kernel.check_modes()

        for path in PATHS:
            if path[0] != "1-org--name":
                await find(path)
        kills = 0
        for _ in range(250):
            match rng.choices(
                ["look", "list", "open", "read", "close", "forget", "damage", "kill", "stat"],
                [10, 4, 10, 8, 8, 8, 2, 3, 4],
            )[0]:
                case "look":
                    await find(rng.choice([*PATHS, LINK])[: rng.randint(1, 5)])
                case "list":
                    nodeid = rng.choice([n for n, a in kernel.known.items() if a.kind == "folder"])
                    [folder] = kernel.places[nodeid]
                    handle = (await d.fs.open_folder(nodeid)).handle
                    for entry in await d.fs.list_folder(handle, nodeid, 0):
                        d.fs.told(entry)
                        kernel.learn((*folder, os.fsdecode(entry.name)), entry.attributes)
                    d.fs.close_folder(handle)
                case "open":
                    await open_at(rng.choice(PATHS))
                case "read" if kernel.files:
                    handle, file = rng.choice(list(kernel.files.items()))
                    offset = rng.randrange(len(file.content) + 1)
                    data = bytes(await d.fs.read(handle, offset, 5000))
                    assert data == file.content[offset : offset + 5000], file.path
                case "close" if kernel.files:
                    handle = rng.choice(list(kernel.files))
                    closed = kernel.files.pop(handle)
                    unused = d.fs.close_file(handle)
                    still = any(file.backing == closed.backing for file in kernel.files.values())
                    assert unused == (closed.backing if closed.backing and not still else None)
                case "forget":
                    # The kernel drops a name below which it knows none, and forgets what is not open and has no name any more.
                    everywhere = [(n, path) for n, paths in kernel.places.items() for path in paths]
                    parents = {path[:-1] for _, path in everywhere}
                    open_now = {file.nodeid for file in kernel.files.values()}
                    for nodeid, path in rng.sample(everywhere, len(everywhere) // 2):
                        if path not in parents and (len(kernel.places[nodeid]) > 1 or nodeid not in open_now):
                            del kernel.places[nodeid][path]
                    for nodeid in [n for n, paths in kernel.places.items() if not paths and n not in open_now]:
                        d.fs.forget(nodeid, kernel.lookups.pop(nodeid))
                        del kernel.known[nodeid], kernel.places[nodeid]
                case "damage":
                    infos = [info for info in d.blobs.store.listing() if info.sealed and info.size > CHUNK]
                    if infos:
                        info = rng.choice(infos)
                        with d.blobs.store.open_blob(info.id, info.size) as damaged:
                            await trio.to_thread.run_sync(damaged.clear, 0)
                        if (transfer := d.blobs.fetcher.transfer(str(info.id))) is not None:
                            transfer.sealed = trio.Event()
                case "stat" if kernel.known:
                    nodeid = rng.choice(list(kernel.known))
                    shown, known = await d.fs.attributes(nodeid), kernel.known[nodeid]
                    assert (shown.inode, shown.number, shown.kind, shown.size) == (
                        nodeid, known.number, known.kind, known.size,
                    )  # fmt: skip
                case "kill":
                    kills += 1
                    if rng.random() < 0.5:
                        d.journal.rewrite()
                    away = rng.random() < 0.5
                    d.hub.failure = AWAY if away else None
                    d = await Daemon.after(d)
                    assert d.journal.lost is None
                    assert d.fs.open_files == len(kernel.files)
                    # Half of the time all, otherwise later, as they are asked for.
                    for nodeid in kernel.known if rng.random() < 0.5 else ():
                        assert (await d.fs.attributes(nodeid)).number == kernel.known[nodeid].number
                    d.hub.failure = None
                case _:
                    pass
        assert kills
        d = await Daemon.after(d)
        for handle in list(kernel.files):
            d.fs.close_file(handle)
        for nodeid, count in kernel.lookups.items():
            d.fs.forget(nodeid, count)
        assert (d.fs.open_files, d.fs.known_inodes, d.blobs.opened) == (0, 1, 0)
        with trio.fail_after(30):
            while any(info.in_use and info.sealed for info in d.blobs.store.listing()):
                await trio.sleep(0.01)  # the sealer is about to let go
        journal, recovered = Journal.open(d.kill())
        journal.close()
        assert recovered.names == {}
        assert recovered.files == {}
