"""Mounts: made, bound, watched and removed; what status says of them; what a mount freezes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from manta.control.protocol import MountRequest
from manta.errors import Absent, Denied, InUse, Invalid, Unavailable
from manta.fetch.sources import Provenance
from manta.fs.nodes import Folder, TextNode
from manta.hub.origin import Access
from manta.model.ids import Commit
from manta.operations import scope as scope_module
from manta.operations.mounts import BIND_SECONDS_MAX, Mounted
from manta.operations.scope import MountScope
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, THIRD, MemoryHub, content, lfs, plain
from tests.operations.node import Node, node

WEIGHTS = content(3 * CHUNK)


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    files = [hub.plain("config.json", b"{}"), hub.lfs("onnx/model.onnx", WEIGHTS)]
    hub.commit(MODEL, FIRST, files, None, "main", "v1")
    hub.commit(OTHER, SECOND, [hub.plain("other.json", b"[]")], None, "main")
    return hub


async def names(folder: Folder) -> list[str]:
    return [name for name, _ in await folder.children()]


async def folder_of(n: Node, mounted: Mounted) -> Folder:
    found = await n.mounts.folder.child(mounted.id)
    assert isinstance(found, Folder)
    return found


@pytest.mark.trio
async def test_a_mount_is_a_directory_of_the_filesystem(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        assert await names(n.mounts.folder) == []
        mounted = await n.mount(MountRequest("org/name", "/models"))
        assert mounted.commit == FIRST
        assert await names(n.mounts.folder) == [mounted.id]
        assert await names(await folder_of(n, mounted)) == ["config.json", "onnx"]
        assert n.mounts.source(mounted) == f"/run/manta/x/root/{mounted.id}"
        assert n.mounts[mounted.id] is mounted
        assert list(n.mounts) == [mounted]
        assert n.mounts.folder.lifetime_s == 0
        with pytest.raises(Absent, match="manta status"):
            await n.mounts.folder.child("2-org--name")


@pytest.mark.trio
async def test_status_says_what_is_mounted(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("hf://org/name@v1", "/models", token="hf_callers"))
        said = n.describe(mounted)
        assert said.target == "hf://org/name@v1"
        assert (said.revision, said.commit, said.view, said.directory) == ("v1", FIRST, "tree", "/models")
        assert (said.files, said.size, said.cached) == (2, 2 + len(WEIGHTS), 0)
        assert not said.stale
        assert said.errors == []
        await n.fetch("org/name")
        assert n.describe(mounted).cached == 2 + len(WEIGHTS)


@pytest.mark.trio
async def test_the_callers_token_is_kept_where_no_text_shows_it(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mounts.create(MountRequest("org/name", "/models", token="hf_callers"), Access("hf_callers"))
        assert mounted.scope.asking == n.identity.latest(mounted.scope.access) == Access("hf_callers")
        assert "hf_callers" not in repr(mounted)
        assert "hf_callers" not in str(n.describe(mounted))


@pytest.mark.trio
async def test_a_subfolder_is_mounted_and_counted_alone(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("org/name/onnx", "/models"))
        assert await names(await folder_of(n, mounted)) == ["model.onnx"]
        said = n.describe(mounted)
        assert (said.files, said.size) == (1, len(WEIGHTS))
        with pytest.raises(Absent, match="has no folder 'onx'"):
            await n.mount(MountRequest("org/name/onx", "/models"))
        with pytest.raises(Invalid, match="hub-cache view shows a repo as a whole"):
            await n.mount(MountRequest("org/name/onnx", "/models", "hub-cache"))
        assert len(n.mounts) == 1


@pytest.mark.trio
async def test_the_whole_hub_is_mounted_and_counted_by_what_it_has_opened(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("", "/hub"))
        assert (n.describe(mounted).files, n.describe(mounted).commit, n.describe(mounted).revision) == (0, "", "")
        organisation = await (await folder_of(n, mounted)).child("org")
        assert isinstance(organisation, Folder)
        await organisation.child("name")
        await organisation.child("other")
        said = n.describe(mounted)
        assert (said.files, said.size) == (3, 4 + len(WEIGHTS))


@pytest.mark.trio
async def test_the_hub_cache_view_is_a_folder_for_hf_libraries(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        alone = await n.mount(MountRequest("org/name", "/a", "hub-cache"))
        assert await names(await folder_of(n, alone)) == ["models--org--name"]
        whole = await n.mount(MountRequest("", "/b", "hub-cache"))
        await (await folder_of(n, whole)).child("models--org--other")
        assert await names(await folder_of(n, whole)) == ["models--org--other"]
        assert n.describe(whole).files == 1


@pytest.mark.trio
async def test_what_the_hub_refuses_leaves_nothing(tmp_path: Path, hub: MemoryHub) -> None:
    hub.denied.add(ACCESS)
    async with node(tmp_path, hub) as n:
        with pytest.raises(Denied):
            await n.mount(MountRequest("org/name", "/models"))
        with pytest.raises(Absent):
            await n.mount(MountRequest("org/missing", "/models"))
        with pytest.raises(Invalid):
            await n.mount(MountRequest("no target", "/models"))
        assert len(n.mounts) == 0
        assert n.gone == []


# Their end -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_removed_mount_is_gone(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("org/name", "/models"))
        n.mounts.remove(mounted.id)
        assert n.gone == [mounted.id]
        assert await names(n.mounts.folder) == []
        for again in (n.mounts.remove, n.mounts.__getitem__):
            with pytest.raises(Absent, match="There is no mount"):
                again(mounted.id)
        assert n.mounts.totals() == (0, 0)
        assert all(blob not in n.mounts.blobs() for blob in hub.blobs)
        other = await n.mount(MountRequest("org/name", "/models"))
        assert other.id != mounted.id


@pytest.mark.trio
async def test_a_mount_whose_binding_is_gone_ends(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        here = await n.mount(MountRequest("org/name", "/here"))
        there = await n.mount(MountRequest("org/name", "/there"))
        n.mounts.bound(here.id, "/really/here")
        assert n.describe(here).directory == "/really/here"
        n.mounts.drop_unbound({here.id, there.id}, trio.current_time())
        assert n.gone == []
        n.mounts.drop_unbound({there.id}, trio.current_time())
        assert n.gone == [here.id]
        n.mounts.drop_unbound(set(), trio.current_time())
        assert n.gone == [here.id, there.id]


@pytest.mark.trio
async def test_a_mount_that_nobody_binds_ends_after_a_while(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("org/name", "/models"))
        mock_clock.jump(BIND_SECONDS_MAX - 1)
        n.mounts.drop_unbound(set(), trio.current_time())
        assert n.gone == []
        mock_clock.jump(2)
        n.mounts.drop_unbound(set(), trio.current_time())
        assert n.gone == [mounted.id]
        with pytest.raises(Absent):
            n.mounts.bound(mounted.id, "/models")


@pytest.mark.trio
async def test_without_root_there_is_one_mount_and_it_is_the_filesystem(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub, root=None) as n:
        with pytest.raises(Absent, match="Nothing is mounted"):
            await n.mounts.folder.child("config.json")
        mounted = await n.mount(MountRequest("org/name", "/home/me/models"))
        assert n.mounts.direct
        assert n.mounts.source(mounted) == "/home/me/models"
        assert await names(n.mounts.folder) == ["config.json", "onnx"]
        assert n.mounts.folder.attributes()["commit"] == FIRST
        assert n.mounts.folder.lifetime_s == mounted.root.lifetime_s > 0
        with pytest.raises(InUse, match=r"serves one mount, and it serves /home/me/models\..*--cache-dir"):
            await n.mount(MountRequest("org/other", "/home/me/other"))
        n.mounts.remove(mounted.id)
        await n.mount(MountRequest("org/other", "/home/me/other"))
        assert await names(n.mounts.folder) == ["other.json"]


# What a mount freezes ------------------------------------------------------------------------------------------------


def scope(n: Node, access: Access = ACCESS) -> MountScope:
    return MountScope(access, n.catalog, n.store)


@pytest.mark.trio
async def test_a_commit_is_frozen_once(tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock) -> None:
    async with node(tmp_path, hub) as n:
        mount = scope(n)
        found: list[Commit] = []

        async def freeze() -> None:
            found.append(await mount.freeze(MODEL, "main"))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(freeze)
        hub.commit(MODEL, THIRD, [plain("a", b"")], None, "main")
        mock_clock.jump(3600)
        await freeze()
        assert found == [FIRST] * 6
        assert await mount.current(MODEL, "main") == THIRD
        assert await scope(n).freeze(MODEL, "main") == THIRD


@pytest.mark.trio
async def test_only_what_can_be_shown_counts_as_frozen(tmp_path: Path, hub: MemoryHub) -> None:
    """Names of a gated repo are public, its tree is not: a lookup of it must not spoil the listing of the others."""
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("", "/hub"))
        organisation = await (await folder_of(n, mounted)).child("org")
        assert isinstance(organisation, Folder)
        await organisation.child("name")
        hub.denied.add(ACCESS)
        with pytest.raises(Denied):
            await organisation.child("other")
        assert await names(organisation) == ["name"]


@pytest.mark.trio
async def test_a_mount_holds_what_it_has_shown(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mount = scope(n)
        snapshot = await mount.snapshot(MODEL, await mount.freeze(MODEL, None))
        hub.failure = Absent("The repo is gone.")
        hub.denied.add(ACCESS)
        assert await mount.snapshot(MODEL, FIRST) is snapshot
        assert mount.held == {(MODEL, FIRST): snapshot}


@pytest.mark.parametrize("bound", ["TREES_MAX", "FILES_MAX"])
@pytest.mark.trio
async def test_what_a_mount_may_hold_is_bounded(
    bound: str, tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scope_module, "FROZEN_MAX", 2)
    monkeypatch.setattr(scope_module, bound, 1)
    async with node(tmp_path, hub) as n:
        mount = scope(n)
        await mount.freeze(MODEL, None)
        await mount.freeze(MODEL, "v1")
        with pytest.raises(InUse, match="shows 2 repos already; unmount"):
            await mount.freeze(OTHER, None)
        assert await mount.freeze(MODEL, None) == FIRST
        await mount.snapshot(MODEL, FIRST)
        with pytest.raises(InUse, match="shows 1 commits with 2 files already; unmount"):
            await mount.snapshot(OTHER, SECOND)
        await mount.snapshot(MODEL, FIRST)


@pytest.mark.trio
async def test_a_hub_that_is_away_leaves_what_is_stored_mountable_and_says_so(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        n.mounts.remove((await n.mount(MountRequest("org/name", "/models"))).id)
        hub.failure = Unavailable("https://hub.example does not answer.")
        mock_clock.jump(3600)
        mounted = await n.mount(MountRequest("org/name", "/models"))
        assert n.describe(mounted).stale
        assert n.describe(mounted).commit == FIRST
        with pytest.raises(Unavailable, match="does not answer"):
            await n.mount(MountRequest("org/other", "/other"))


@pytest.mark.trio
async def test_a_mount_says_what_went_wrong_with_its_own_files(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("org/name", "/models"))
        other = await n.mount(MountRequest("org/other", "/other"))
        whole = await n.mount(MountRequest("", "/hub"))
        n.failures.add(Provenance(MODEL, FIRST, lfs("a", b""), ACCESS), Unavailable("slow"))
        n.failures.add(Provenance(OTHER, SECOND, lfs("b", b""), ACCESS), Unavailable("slower"))
        assert n.describe(mounted).errors == ["slow"]
        assert n.describe(other).errors == ["slower"]
        assert n.describe(whole).errors == []
        await whole.scope.snapshot(MODEL, FIRST)
        for commit in ("main", "v1", None):
            await whole.scope.freeze(MODEL, commit)
        assert n.describe(whole).errors == ["slow"]  # once, however many names the commit has
        for number in range(100):
            n.failures.add(Provenance(MODEL, FIRST, lfs("a", b""), ACCESS), Unavailable(f"slow {number}"))
        assert len(n.describe(whole).errors) == 8


@pytest.mark.trio
async def test_a_hub_cache_mount_says_what_went_wrong_with_the_commits_its_refs_meant_since(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.mount(MountRequest("org/name", "/cache", "hub-cache"))
        repo = await (await folder_of(n, mounted)).child("models--org--name")
        assert isinstance(repo, Folder)
        hub.commit(MODEL, THIRD, [plain("a", b"")], None, "main")
        mock_clock.jump(60)
        refs = await repo.child("refs")
        assert isinstance(refs, Folder)
        main = await refs.child("main")
        assert isinstance(main, TextNode)
        assert main.content == THIRD.encode()
        n.failures.add(Provenance(MODEL, THIRD, lfs("a", b""), ACCESS), Unavailable("slow"))
        assert n.describe(mounted).errors == ["slow"]
        assert n.describe(mounted).commit == FIRST
