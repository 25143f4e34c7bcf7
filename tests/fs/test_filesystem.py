"""The filesystem without a kernel: names, listings, attributes, files, extended attributes, and what it forgets."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from manta.config import FetchConfig
from manta.errors import Absent, Denied, InUse, Invalid, MantaError, Superseded, Unavailable
from manta.fetch.sources import Provenance
from manta.fs.filesystem import SENT_BACK_SECONDS, Attributes, Filesystem, OpenedFile, Totals
from manta.fs.inodes import ROOT
from manta.fs.nodes import FOREVER_SECONDS, Folder, Node, TextNode
from manta.fs.views import LISTING_LIFETIME_SECONDS, REF_LIFETIME_SECONDS, HubCacheFolder, SnapshotFolder
from manta.model.ids import BlobId
from manta.model.snapshot import FileEntry
from manta.telemetry.events import Telemetry
from tests.fs.fakes import (
    ACCESS,
    CHUNK,
    FIRST,
    MODEL,
    OTHER,
    SECOND,
    Blobs,
    MemoryHub,
    MemorySource,
    content,
    fetching,
    hidden,
    plain,
)

CONFIG = b'{"hidden_size": 384}'
WEIGHTS = content(3 * CHUNK + 5)


class Bench:
    """A filesystem over a tree of one commit, with the store and the fetcher below it."""

    def __init__(self, hub: MemoryHub, blobs: Blobs) -> None:
        self.hub = hub
        self.blobs = blobs
        self.source = MemorySource(hub)
        self.telemetry = Telemetry()

    def over(self, root: Folder) -> Filesystem:
        return Filesystem(root, self.blobs, self.telemetry, fill=False)

    def show(self, files: Iterable[FileEntry], folder: str = "") -> Filesystem:
        return self.over(SnapshotFolder(self.source, self.hub.commit(MODEL, FIRST, files, "main"), folder))


@asynccontextmanager
async def bench(directory: Path, config: FetchConfig | None = None, *, seal: bool = True) -> AsyncIterator[Bench]:
    hub = MemoryHub()
    async with fetching(directory, hub, config, seal=seal) as blobs:
        yield Bench(hub, blobs)


async def listed(fs: Filesystem, inode: int, page: int = 7) -> dict[str, Attributes]:
    """A listing as the kernel asks for it: in pages, each entry told of where there is room."""
    handle = (await fs.open_folder(inode)).handle
    shown: dict[str, Attributes] = {}
    start = 0
    while entries := list(itertools.islice(await fs.list_folder(handle, inode, start), page + 1)):
        for entry in entries[:page]:  # for one more there was no room: it comes again
            fs.told(entry)
            shown[os.fsdecode(entry.name)] = entry.attributes
            start = entry.following
    fs.close_folder(handle)
    return shown


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_names_lead_to_attributes(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("config.json", CONFIG), plain("onnx/model.onnx", WEIGHTS)])
        config = await fs.look_up(ROOT, b"config.json")
        assert config == Attributes(config.inode, config.inode, "file", len(CONFIG), FOREVER_SECONDS, FOREVER_SECONDS)
        onnx = await fs.look_up(ROOT, b"onnx")
        assert (onnx.kind, onnx.size) == ("folder", 0)
        model = await fs.look_up(onnx.inode, b"model.onnx")
        assert (model.kind, model.size) == ("file", len(WEIGHTS))
        assert await fs.attributes(model.inode) == model
        assert (await fs.attributes(ROOT)).kind == "folder"
        assert len({ROOT, config.inode, onnx.inode, model.inode}) == 4


@pytest.mark.trio
async def test_absent_names_are_remembered_as_long_as_the_folder_cannot_change(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("a", b"a")])
        with pytest.raises(Absent):
            await fs.look_up(ROOT, b"model.safetensors.index.json")
        assert fs.absence_valid_s(ROOT) == FOREVER_SECONDS
        assert fs.known_inodes == 1


@pytest.mark.trio
async def test_what_is_in_no_folder_the_kernel_may_name_is_not_remembered(tmp_path: Path) -> None:
    """The session asks this in answer to any Absent: it must not fail there."""
    async with bench(tmp_path) as b:
        fs = b.show([plain("a", b"a")])
        with pytest.raises(Absent):
            await fs.look_up(987654321, b"a")
        assert fs.absence_valid_s(987654321) == 0
        assert fs.absence_valid_s((await fs.look_up(ROOT, b"a")).inode) == 0


@pytest.mark.trio
@pytest.mark.parametrize(
    "name", ["with space.txt", "größe/模型 🐟.bin", " ", "a\nb", "%2F", "-rf", ".hidden", "x" * 255]
)
async def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain(name, b"content")])
        inode = ROOT
        for part in name.split("/"):
            assert list(await listed(fs, inode)) == [part]
            inode = (await fs.look_up(inode, part.encode())).inode
        assert (await fs.attributes(inode)).size == 7


@pytest.mark.trio
@pytest.mark.parametrize("name", [b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80"])
async def test_bytes_that_are_no_utf8_are_absent(tmp_path: Path, name: bytes) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("caf\u00e9", b"")])
        with pytest.raises(Absent):
            await fs.look_up(ROOT, name)
        whole = b.over(HubCacheFolder(b.source, "1-hub"))
        with pytest.raises(Absent):
            await whole.look_up(ROOT, name)


@pytest.mark.trio
async def test_lookups_are_counted_and_forgotten(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("a", b"a"), plain("b", b"b")])
        a = (await fs.look_up(ROOT, b"a")).inode
        assert (await fs.look_up(ROOT, b"a")).inode == a
        await listed(fs, ROOT)
        assert fs.known_inodes == 3
        fs.forget(a, 2)
        assert (await fs.attributes(a)).size == 1
        fs.forget(a, 1)
        with pytest.raises(Absent):
            await fs.attributes(a)
        assert fs.known_inodes == 2
        fs.forget(a, 5)
        fs.forget(ROOT, 5)
        assert (await fs.attributes(ROOT)).kind == "folder"


@pytest.mark.trio
async def test_inodes_are_the_same_in_the_next_daemon_and_in_every_view(tmp_path: Path) -> None:
    files = [plain("a/b/weights", WEIGHTS), plain("other name", WEIGHTS)]
    seen: list[tuple[int, ...]] = []
    for run in range(2):
        async with bench(tmp_path / str(run)) as b:
            fs = b.show(files)
            a = (await fs.look_up(ROOT, b"a")).inode
            ab = (await fs.look_up(a, b"b")).inode
            weights = (await fs.look_up(ab, b"weights")).inode
            assert (await fs.look_up(ROOT, b"other name")).inode == weights
            b.hub.commit(OTHER, SECOND, [plain("copy", WEIGHTS)], None)
            cache = b.over(HubCacheFolder(b.source, "2-org--other"))
            repo = (await cache.look_up(ROOT, b"models--org--other")).inode
            blobs = (await cache.look_up(repo, b"blobs")).inode
            blob = plain("copy", WEIGHTS).blob
            assert blob is not None
            assert (await cache.look_up(blobs, blob.hex.encode())).inode == weights
            seen.append((a, ab, weights, repo, blobs))
    assert seen[0] == seen[1]


@pytest.mark.trio
async def test_what_is_no_folder_has_no_names_and_what_is_no_link_no_target(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("a", b"a")])
        a = (await fs.look_up(ROOT, b"a")).inode
        with pytest.raises(Invalid, match="not a directory"):
            await fs.look_up(a, b"x")
        with pytest.raises(Invalid, match="not a directory"):
            await fs.open_folder(a)
        with pytest.raises(Invalid, match="not a symbolic link"):
            await fs.read_link(a)
        with pytest.raises(Invalid, match="not a file"):
            await fs.open_file(ROOT)


@pytest.mark.trio
async def test_inodes_that_nobody_gave_are_absent(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([])
        uses: list[Callable[[int], Awaitable[object]]] = [
            fs.attributes,
            fs.open_file,
            fs.read_link,
            fs.extended_attributes,
        ]
        for use in uses:
            with pytest.raises(Absent, match="424242"):
                await use(424242)
        with pytest.raises(Absent, match="424242"):
            await fs.open_folder(424242)


# Listings ------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_listing_says_of_each_entry_what_a_lookup_says(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.hub.commit(MODEL, FIRST, [plain("config.json", CONFIG), plain("onnx/model.onnx", WEIGHTS)], None, "main")
        cache = b.over(HubCacheFolder(b.source, "1-org--name", only=(MODEL, None)))
        pending, seen = [ROOT], 0
        while pending:
            folder = pending.pop()
            for name, attributes in (await listed(cache, folder)).items():
                assert await cache.look_up(folder, name.encode()) == attributes, name
                seen += 1
                if attributes.kind == "folder":
                    pending.append(attributes.inode)
        assert seen == 15


@pytest.mark.trio
async def test_twelve_thousand_entries_are_listed_in_pages(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        names = [f"shard-{n:05}-of-12000.safetensors" for n in range(12_000)]
        fs = b.show([plain(name, name.encode()) for name in names])
        shown = await listed(fs, ROOT, page=128)
        assert list(shown) == names
        assert len({a.inode for a in shown.values()}) == 12_000
        assert fs.known_inodes == 12_001
        for attributes in shown.values():
            fs.forget(attributes.inode, 1)
        assert fs.known_inodes == 1


@pytest.mark.trio
async def test_an_entry_counts_once_the_kernel_was_told(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("a", b"a")])
        handle = (await fs.open_folder(ROOT)).handle
        [entry] = await fs.list_folder(handle, ROOT, 0)
        assert fs.known_inodes == 1
        fs.told(entry)
        assert fs.known_inodes == 2
        assert await fs.attributes(entry.attributes.inode) == entry.attributes
        fs.forget(entry.attributes.inode, 1)
        assert fs.known_inodes == 1


@pytest.mark.trio
async def test_a_listing_begins_anywhere_and_stays_what_it_was(tmp_path: Path) -> None:
    class Growing(Folder):
        key = "growing"
        names: list[str]

        async def child(self, name: str) -> Node:
            raise Absent(name)

        async def children(self) -> list[tuple[str, Node]]:
            return [(name, TextNode(name, b"")) for name in self.names]

    async with bench(tmp_path) as b:
        folder = Growing()
        folder.names = ["a", "b", "c"]
        fs = b.over(folder)
        handle = (await fs.open_folder(ROOT)).handle
        folder.names = ["z"]
        assert [entry.name for entry in await fs.list_folder(handle, ROOT, 1)] == [b"b", b"c"]
        assert list(await fs.list_folder(handle, ROOT, 3)) == []
        assert list(await fs.list_folder(handle, ROOT, 1000)) == []
        fs.close_folder(handle)
        fs.close_folder(handle)
        with pytest.raises(Invalid, match="not open"):
            await fs.list_folder(handle, ROOT, 0)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_file_is_opened_read_and_closed(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([b.hub.lfs("weights", WEIGHTS)])
        opened = await fs.open_file((await fs.look_up(ROOT, b"weights")).inode)
        assert opened.keep_cache
        assert bytes(await fs.read(opened.handle, 5, 100)) == WEIGHTS[5:105]
        assert b.telemetry.tally.bytes == 100
        assert (fs.open_files, b.blobs.opened) == (1, 1)
        fs.close_file(opened.handle)
        assert (fs.open_files, b.blobs.opened) == (0, 0)
        fs.close_file(opened.handle)
        assert b.blobs.opened == 0
        with pytest.raises(Invalid, match="not open"):
            await fs.read(opened.handle, 0, 1)


@pytest.mark.trio
async def test_opening_leaves_a_trace_in_the_cache_only_where_something_is_cached(tmp_path: Path) -> None:
    """Programs open far more files than they read; but what is open and cached must not be evicted."""
    async with bench(tmp_path) as b:
        fs = b.show([b.hub.lfs("weights", WEIGHTS)])
        inode = (await fs.look_up(ROOT, b"weights")).inode
        first = (await fs.open_file(inode)).handle
        assert b.blobs.store.listing() == []
        await fs.read(first, 0, 1)
        fs.close_file(first)
        second = (await fs.open_file(inode)).handle
        [info] = b.blobs.store.listing()
        assert info.in_use
        fs.close_file(second)


@pytest.mark.trio
async def test_a_file_without_bytes_needs_no_fetch(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("empty", b"")])
        empty = await fs.look_up(ROOT, b"empty")
        assert empty.size == 0
        opened = await fs.open_file(empty.inode)
        assert opened.keep_cache
        assert await fs.read(opened.handle, 0, 4096) == b""
        assert b.blobs.opened == 0


@pytest.mark.trio
@pytest.mark.parametrize("size", [0, 100])
async def test_what_the_hub_hides_is_shown_and_not_opened(tmp_path: Path, size: int) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([hidden("weights", size)])
        found = await fs.look_up(ROOT, b"weights")
        assert found.size == size
        with pytest.raises(Denied, match=r"org/name/weights cannot be read: org/name is gated.*hf auth login"):
            await fs.open_file(found.inode)
        assert fs.open_files == 0
        assert await fs.extended_attributes(found.inode) == {"user.manta.state": "hidden"}


@pytest.mark.trio
async def test_a_text_that_may_change_is_not_kept_by_the_kernel(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.hub.commit(MODEL, FIRST, [plain("a", b"a")], None, "main")
        fs = b.over(HubCacheFolder(b.source, "1", only=(MODEL, None)))
        repo = (await fs.look_up(ROOT, b"models--org--name")).inode
        refs = (await fs.look_up(repo, b"refs")).inode
        main = await fs.look_up(refs, b"main")
        assert main == Attributes(main.inode, main.inode, "file", 40, REF_LIFETIME_SECONDS, REF_LIFETIME_SECONDS)
        assert fs.absence_valid_s(refs) == REF_LIFETIME_SECONDS
        old = await fs.open_file(main.inode)
        assert not old.keep_cache
        b.hub.commit(MODEL, SECOND, [plain("a", b"b")], "main")
        assert (await fs.look_up(refs, b"main")).inode == main.inode
        new = await fs.open_file(main.inode)
        assert await fs.read(old.handle, 0, 4096) == FIRST.encode()
        assert await fs.read(new.handle, 0, 4096) == SECOND.encode()


@pytest.mark.trio
async def test_a_link_has_a_target(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.hub.commit(MODEL, FIRST, [plain("größe", b"x")], None)
        fs = b.over(HubCacheFolder(b.source, "1", only=(MODEL, None)))
        inode = ROOT
        for name in ("models--org--name", "snapshots", FIRST, "größe"):
            inode = (await fs.look_up(inode, name.encode())).inode
        attributes, target = await fs.attributes(inode), await fs.read_link(inode)
        assert (attributes.kind, attributes.size) == ("link", len(target))
        assert target.startswith(b"../../blobs/")


@pytest.mark.trio
async def test_the_end_closes_what_is_open_and_forgets_what_was_known(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([b.hub.lfs("weights", WEIGHTS)])
        inode = (await fs.look_up(ROOT, b"weights")).inode
        await fs.open_file(inode)
        await fs.open_file(inode)
        await fs.open_folder(ROOT)
        fs.close()
        assert (fs.open_files, b.blobs.opened, fs.known_inodes) == (0, 0, 1)
        assert (await fs.look_up(ROOT, b"weights")).inode == inode  # the next mount of the same daemon


# Extended attributes and totals --------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_file_tells_how_much_of_it_is_cached(tmp_path: Path) -> None:
    async with bench(tmp_path, seal=False) as b:
        entry = b.hub.lfs("weights", WEIGHTS)
        fs = b.show([entry])
        inode = (await fs.look_up(ROOT, b"weights")).inode

        async def state() -> tuple[str, str]:
            found = await fs.extended_attributes(inode)
            assert found.pop("user.manta.blob") == str(entry.blob)
            assert set(found) == {"user.manta.state", "user.manta.cached_bytes"}
            return found["user.manta.state"], found["user.manta.cached_bytes"]

        assert await state() == ("absent", "0")
        opened = await fs.open_file(inode)
        await fs.read(opened.handle, 2 * CHUNK, 1)
        await wait_all_tasks_blocked()  # the reader has its byte before the chunk is recorded
        transfer = b.blobs.fetcher.transfer(str(entry.blob))
        assert transfer is not None
        assert await state() == ("partial", str(CHUNK))
        await fs.read(opened.handle, 0, len(WEIGHTS))
        await wait_all_tasks_blocked()
        assert await state() == ("complete", str(len(WEIGHTS)))
        transfer.blob.seal()
        assert await state() == ("sealed", str(len(WEIGHTS)))


@pytest.mark.trio
async def test_a_file_without_bytes_is_complete(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("empty", b"")])
        found = await fs.extended_attributes((await fs.look_up(ROOT, b"empty")).inode)
        assert found["user.manta.state"] == "complete"


@pytest.mark.trio
async def test_a_folder_tells_its_repo_commit_and_what_is_cached_below_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([plain("onnx/model", WEIGHTS), plain("config.json", CONFIG)])
        b.source.cached = {"onnx/model": 7, "config.json": 20}
        names = {"user.manta.repo": "org/name", "user.manta.commit": FIRST}
        assert await fs.extended_attributes(ROOT) == {**names, "user.manta.cached_bytes": "27"}
        onnx = (await fs.look_up(ROOT, b"onnx")).inode
        assert await fs.extended_attributes(onnx) == {**names, "user.manta.cached_bytes": "7"}


@pytest.mark.trio
async def test_texts_and_links_have_no_extended_attributes(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.hub.commit(MODEL, FIRST, [plain("a", b"x")], None, "main")
        fs = b.over(HubCacheFolder(b.source, "1", only=(MODEL, None)))
        for path in (["refs", "main"], ["snapshots", FIRST, "a"]):
            inode = (await fs.look_up(ROOT, b"models--org--name")).inode
            for name in path:
                inode = (await fs.look_up(inode, name.encode())).inode
            assert await fs.extended_attributes(inode) == {}


@pytest.mark.trio
async def test_totals_are_those_of_all_mounts(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        fs = b.show([])
        b.blobs.shown = (5 * 1024**3, 12)
        assert fs.totals() == Totals(5 * 1024**3, 12)


@pytest.mark.trio
async def test_the_lifetime_of_absence_is_the_folders_own(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        b.hub.commit(MODEL, FIRST, [plain("a", b"x")], None)
        fs = b.over(HubCacheFolder(b.source, "1"))
        assert fs.absence_valid_s(ROOT) == LISTING_LIFETIME_SECONDS
        repo = (await fs.look_up(ROOT, b"models--org--name")).inode
        snapshots = (await fs.look_up(repo, b"snapshots")).inode
        assert fs.absence_valid_s(snapshots) == LISTING_LIFETIME_SECONDS
        tree = (await fs.look_up(snapshots, FIRST.encode())).inode
        assert fs.absence_valid_s(tree) == FOREVER_SECONDS
        assert os.fsdecode(await fs.read_link((await fs.look_up(tree, b"a")).inode)).count("../") == 2


# Natively ------------------------------------------------------------------------------------------------------------

SMALL = content(CHUNK + 1, seed=1)
PID = 4711


class NativeBench:
    """A filesystem of a big file, "weights", and one small enough to be completed, "config". `dropped`: what the session heard."""

    def __init__(self, hub: MemoryHub, blobs: Blobs) -> None:
        self.hub = hub
        self.blobs = blobs
        self.weights = hub.lfs("weights", WEIGHTS)
        self.config = hub.lfs("config", SMALL)
        snapshot = hub.commit(MODEL, FIRST, [self.weights, self.config, hidden("hidden")], "main")
        self.fs = Filesystem(
            SnapshotFolder(MemorySource(hub), snapshot),
            blobs,
            Telemetry(),
            fill=False,
            native=True,
            complete_bytes_max=2 * CHUNK,
        )
        self.dropped: list[int] = []
        self.fs.drop_pages = self.dropped.append

    @property
    def blob(self) -> BlobId:
        assert self.weights.blob is not None
        return self.weights.blob

    async def inode(self, name: bytes = b"weights") -> int:
        return (await self.fs.look_up(ROOT, name)).inode

    async def open(self, inode: int, backing: int = 1, pid: int = PID) -> OpenedFile:
        """As the session does where the kernel takes every backing file."""
        opened = await self.fs.open_file(inode, pid)
        if opened.native is not None:
            self.fs.opened(opened.handle, True, opened.native.backing or backing)
        return opened

    async def open_by_name(self, name: bytes = b"weights", pid: int = PID) -> tuple[int, OpenedFile]:
        """As the kernel does: where the number it knows is answered ESTALE, it looks the name up and tries once more."""
        inode = await self.inode(name)
        try:
            return inode, await self.open(inode, pid=pid)
        except Superseded:
            inode = await self.inode(name)
            return inode, await self.open(inode, pid=pid)

    async def fetch(self) -> None:
        """Has all of "weights" in the cache, sealed."""
        transfer = self.blobs.open(Provenance(MODEL, FIRST, self.weights, ACCESS))
        await transfer.complete()
        self.blobs.close(transfer)

    async def damage(self) -> None:
        """As `manta cache verify` does with a chunk that it found damaged."""
        with self.blobs.store.open_blob(self.blob, len(WEIGHTS)) as blob:
            await trio.to_thread.run_sync(blob.clear, 1)
            if (transfer := self.blobs.fetcher.transfer(str(self.blob))) is not None:
                transfer.sealed = trio.Event()


@asynccontextmanager
async def native_bench(directory: Path) -> AsyncIterator[NativeBench]:
    hub = MemoryHub()
    async with fetching(directory, hub) as blobs:
        yield NativeBench(hub, blobs)


def data_of(opened: OpenedFile) -> bytes:
    """What the kernel would read of the backing file."""
    assert opened.native is not None
    with opened.native.descriptor() as fd:
        return os.pread(fd, 1 << 20, 0)


@pytest.mark.trio
async def test_a_sealed_blob_is_opened_natively_and_another_is_not(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        cold = await b.open(inode)
        assert cold.native is None
        b.fs.close_file(cold.handle)
        await b.fetch()
        warm = await b.open(inode, backing=5)
        assert warm.native is not None
        assert (warm.native.inode, warm.native.blob, warm.native.backing) == (inode, b.blob, None)
        assert data_of(warm) == WEIGHTS
        # The kernel has one backing file per inode: the second is told of it, and the last to close gives it back.
        again = await b.open(inode)
        assert again.native is not None
        assert again.native.backing == 5
        assert b.fs.close_file(warm.handle) is None
        assert b.fs.close_file(again.handle) == 5
        assert b.fs.close_file(again.handle) is None


@pytest.mark.trio
async def test_a_session_that_cannot_is_offered_nothing(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        await b.fetch()
        snapshot = b.hub.trees[MODEL, FIRST]
        plain = Filesystem(SnapshotFolder(MemorySource(b.hub), snapshot), b.blobs, Telemetry(), fill=False)
        opened = await plain.open_file((await plain.look_up(ROOT, b"weights")).inode)
        assert opened.native is None


@pytest.mark.trio
async def test_a_native_file_keeps_its_blob_in_use(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        opened = await b.open(inode)
        with pytest.raises(InUse):
            b.blobs.store.remove(b.blob)
        b.fs.close_file(opened.handle)
        b.blobs.store.remove(b.blob)


@pytest.mark.trio
async def test_a_backing_file_that_the_kernel_refuses_is_served_by_copying(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        opened = await b.fs.open_file(inode, PID)
        b.fs.opened(opened.handle, False)
        assert bytes(await b.fs.read(opened.handle, 0, 10)) == WEIGHTS[:10]
        # And while it is open, those that could be native get another nodeid.
        other, native = await b.open_by_name()
        assert native.native is not None
        assert other != inode
        assert (await b.fs.attributes(other)).number == inode
        assert b.fs.numbers_of(b.blob) == [inode, other]
        refused = await b.fs.open_file(other, PID)
        with pytest.raises(Superseded):
            b.fs.opened(refused.handle, False)
        assert b.fs.open_files == 2
        b.fs.opened(opened.handle, False)  # nothing to say of it any more


@pytest.mark.trio
async def test_a_blob_sealed_while_open_is_native_by_another_nodeid(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        await b.fetch()
        with pytest.raises(Superseded):
            await b.open(inode)
        other, native = await b.open_by_name(pid=PID + 1)
        assert other != inode
        assert native.native is not None
        assert bytes(await b.fs.read(reader.handle, 0, 5)) == WEIGHTS[:5]
        b.fs.close_file(reader.handle)
        assert await b.inode() == other  # it stays the one in use
        listing = await b.fs.list_folder((await b.fs.open_folder(ROOT)).handle, ROOT, 0)
        assert {e.name: (e.attributes.inode, e.attributes.number) for e in listing}[b"weights"] == (other, inode)


@pytest.mark.trio
async def test_an_open_that_has_no_name_to_look_up_is_not_sent_back_twice(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    """/proc/PID/fd: the kernel comes again with the same number."""
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        await b.fetch()
        for _ in range(2):
            with pytest.raises(Superseded):
                await b.open(inode)
            again = await b.open(inode)
            assert again.native is None
            assert bytes(await b.fs.read(again.handle, 7, 5)) == WEIGHTS[7:12]
        with pytest.raises(Superseded):
            await b.open(inode)
        mock_clock.jump(SENT_BACK_SECONDS)
        with pytest.raises(Superseded):
            await b.open(inode)
        with pytest.raises(Superseded):
            await b.open(inode, pid=PID + 1)
        b.fs.close_file(reader.handle)


# Damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_blob_damaged_under_native_readers_is_copied_to_others_and_repaired_in_place(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        old = await b.open(inode)
        file = b.blobs.store.layout.data(b.blob).stat().st_ino
        with b.blobs.store.layout.data(b.blob).open("r+b") as data:
            data.seek(CHUNK)
            data.write(bytes(CHUNK))
        await b.damage()
        with pytest.raises(Superseded):
            await b.open(inode)
        other, copying = await b.open_by_name(pid=PID + 1)
        assert other != inode
        assert copying.native is None
        assert bytes(await b.fs.read(copying.handle, CHUNK, CHUNK)) == WEIGHTS[CHUNK : 2 * CHUNK]
        await b.fetch()
        assert data_of(old) == WEIGHTS
        assert b.blobs.store.layout.data(b.blob).stat().st_ino == file
        # Whole again: natively, by the number whose readers are.
        found, native = await b.open_by_name()
        assert native.native is not None
        assert found == inode
        assert native.native.backing == 1


@pytest.mark.trio
async def test_a_damaged_blob_is_never_given_to_the_kernel_also_where_there_is_no_name_to_look_up(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    mock_clock.autojump_threshold = 0.1
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        await b.fetch()
        await b.open(inode)
        await b.damage()
        with pytest.raises(Superseded):
            await b.open(inode)
        again = await b.open(inode)  # after it was made whole
        assert again.native is not None
        assert data_of(again) == WEIGHTS
        await b.damage()
        b.hub.workers.fault("fetch", hold=True, times=None)
        for _ in range(2):
            with pytest.raises(Superseded):
                await b.open(inode)
        assert b.fs.open_files == 2


# Small files -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_small_file_is_complete_when_it_is_open(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode(b"config")
        opened = await b.open(inode)
        assert opened.native is not None
        assert data_of(opened) == SMALL


@pytest.mark.trio
async def test_a_file_that_is_to_be_whole_is_complete_when_it_is_open_and_its_errors_are_the_opens(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with bench(tmp_path) as b:
        files = [b.hub.lfs("whole.bin", WEIGHTS), b.hub.plain("config.json", CONFIG)]
        root = SnapshotFolder(b.source, b.hub.commit(MODEL, FIRST, files, "main"))
        whole = files[0].blob
        fs = Filesystem(root, b.blobs, b.telemetry, fill=False, whole=lambda place: place.entry.blob == whole)
        found = await fs.look_up(ROOT, b"whole.bin")
        b.hub.denied.add(ACCESS)
        with pytest.raises(Denied):
            await fs.open_file(found.inode)
        assert (fs.open_files, b.blobs.opened) == (0, 0)
        assert any("may not be read" in failure for failure in b.blobs.failures)
        b.hub.denied.clear()
        mock_clock.jump(10)
        opened = await fs.open_file(found.inode)
        assert (await fs.extended_attributes(found.inode))["user.manta.cached_bytes"] == str(len(WEIGHTS))
        fs.close_file(opened.handle)
        assert b.telemetry.waiting() == 0
        await fs.open_file((await fs.look_up(ROOT, b"config.json")).inode)
        assert b.blobs.store.find(files[1].blob) is None  # type: ignore[arg-type]


@pytest.mark.trio
async def test_small_files_opened_at_once_are_fetched_once(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode(b"config")
        natives = []

        async def open_one() -> None:
            natives.append((await b.open(inode)).native)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(open_one)
        assert None not in natives
        assert len(b.hub.workers.fetches) == 2


@pytest.mark.trio
async def test_a_small_file_that_does_not_come_in_time_is_copied(tmp_path: Path, mock_clock: MockClock) -> None:
    mock_clock.autojump_threshold = 0.1
    async with native_bench(tmp_path) as b:
        b.hub.workers.fault("locate", hold=True, times=None)
        began = trio.current_time()
        opened = await b.open(await b.inode(b"config"))
        assert opened.native is None
        assert trio.current_time() - began <= 2.0
        with pytest.raises(Unavailable):
            await b.fs.read(opened.handle, 0, 1)


@pytest.mark.trio
async def test_opening_a_small_file_can_be_cancelled(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode(b"config")
        with trio.CancelScope() as scope:
            scope.cancel()
            await b.open(inode)
        assert scope.cancelled_caught
        assert (b.fs.open_files, b.blobs.opened) == (0, 0)


@pytest.mark.trio
async def test_what_is_hidden_is_refused_as_ever(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        with pytest.raises(MantaError, match="gated"):
            await b.open(await b.inode(b"hidden"))
        assert b.blobs.opened == 0


@pytest.mark.trio
async def test_an_error_of_the_hub_is_not_one_of_the_open(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode(b"config")
        b.hub.denied.add(ACCESS)
        opened = await b.open(inode)
        assert opened.native is None
        with pytest.raises(MantaError, match="may not be read"):
            await b.fs.read(opened.handle, 0, 1)


# A second copy of the pages --------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_pages_that_were_copied_are_dropped_when_the_last_copying_file_is_closed(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        first, second = await b.open(inode), await b.open(inode)
        b.fs.close_file(first.handle)
        await b.fetch()
        assert b.dropped == []
        b.fs.close_file(second.handle)
        assert b.dropped == [inode]


@pytest.mark.trio
async def test_pages_copied_before_the_blob_was_sealed_are_dropped_when_it_is_opened_natively(tmp_path: Path) -> None:
    async with native_bench(tmp_path) as b:
        inode = await b.inode()
        reader = await b.open(inode)
        b.fs.close_file(reader.handle)
        await b.fetch()
        assert b.dropped == []
        await b.open(inode)
        assert b.dropped == [inode]
        await b.open(inode)
        assert b.dropped == [inode]
