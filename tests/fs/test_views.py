"""What a mounted repo, the whole hub and the hub-cache layout look like, entry by entry."""

from __future__ import annotations

import json
import posixpath

import pytest
import trio

from manta.errors import Absent, Denied, Unavailable
from manta.fs.nodes import BlobNode, Folder, LinkNode, Node, TextNode
from manta.fs.views import HubCacheFolder, HubFolder, SnapshotFolder
from manta.model.ids import RepoId, RepoKind
from tests.fs.fakes import ACCESS, FIRST, MODEL, OTHER, SECOND, THIRD, MemoryHub, MemorySource, hidden, lfs, plain

DATASET = RepoId(RepoKind.DATASET, "org/data")
SPACE = RepoId(RepoKind.SPACE, "org/demo")

CONFIG = plain("config.json", b"{}")
WEIGHTS = lfs("model.safetensors", b"weights")
ONNX = lfs("onnx/fp16/model.onnx", b"onnx")


async def walk(root: Folder, path: str) -> Node:
    node: Node = root
    for name in path.split("/") if path else []:
        assert isinstance(node, Folder), f"{name} in something that is no folder"
        node = await node.child(name)
    return node


async def folder(root: Folder, path: str) -> Folder:
    found = await walk(root, path)
    assert isinstance(found, Folder)
    return found


async def names(root: Folder, path: str = "") -> list[str]:
    return [name for name, _ in await (await folder(root, path)).children()]


async def text(root: Folder, path: str) -> bytes:
    found = await walk(root, path)
    assert isinstance(found, TextNode)
    return found.content


async def absent(root: Folder, path: str) -> bool:
    try:
        await walk(root, path)
    except Absent:
        return True
    return False


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [CONFIG, WEIGHTS, ONNX], None, "main", "v1.0")
    hub.commit(MODEL, SECOND, [CONFIG, lfs("model.safetensors", b"newer")], "feature/x", "refs/pr/1", "50%25")
    return hub


def hub_cache(hub: MemoryHub, revision: str | None = None) -> HubCacheFolder:
    return HubCacheFolder(MemorySource(hub), "1-org--name", only=(MODEL, revision))


REPO = "models--org--name"


# Trees ---------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_tree_is_the_repos_files_as_they_are(hub: MemoryHub) -> None:
    source = MemorySource(hub)
    root = SnapshotFolder(source, hub.trees[MODEL, FIRST])
    assert await names(root) == ["config.json", "model.safetensors", "onnx"]
    assert await names(root, "onnx/fp16") == ["model.onnx"]
    node = await walk(root, "onnx/fp16/model.onnx")
    assert isinstance(node, BlobNode)
    assert node.provenance.entry == ONNX
    assert (node.provenance.repo, node.provenance.commit, node.provenance.access) == (MODEL, FIRST, ACCESS)
    assert await absent(root, "onnx/fp32")
    assert await absent(root, "") is False
    source.cached = {"onnx/fp16/model.onnx": 4, "config.json": 2}
    assert (await folder(root, "onnx")).attributes() == {"repo": "org/name", "commit": FIRST, "cached_bytes": "4"}


@pytest.mark.trio
async def test_a_subfolder_is_a_tree_of_its_own(hub: MemoryHub) -> None:
    root = SnapshotFolder(MemorySource(hub), hub.trees[MODEL, FIRST], "onnx/fp16")
    assert await names(root) == ["model.onnx"]
    assert await absent(root, "config.json")
    assert root.key == (await folder(SnapshotFolder(MemorySource(hub), hub.trees[MODEL, FIRST]), "onnx/fp16")).key
    for missing in ("onnx/fp32", "config.json", "onn"):
        with pytest.raises(Absent, match=f"has no folder '{missing}'"):
            SnapshotFolder(MemorySource(hub), hub.trees[MODEL, FIRST], missing)


# The whole hub -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_whole_hub_finds_repos_by_name(hub: MemoryHub) -> None:
    hub.commit(DATASET, THIRD, [plain("train.csv", b"1")], None)
    hub.commit(SPACE, THIRD, [plain("app.py", b"2")], None)
    root = HubFolder(MemorySource(hub), "1-hub")
    assert await names(root) == ["datasets", "spaces"]
    assert await names(root, "org/name") == ["config.json", "model.safetensors", "onnx"]
    assert await names(root, "datasets/org/data") == ["train.csv"]
    assert await names(root, "spaces/org/demo") == ["app.py"]
    assert await names(root) == ["datasets", "org", "spaces"]
    assert await names(root, "datasets") == ["org"]
    assert await names(root, "org") == ["name"]
    assert await absent(root, "datasets/org/name")
    assert await absent(root, "datasets/spaces/data")


@pytest.mark.trio
async def test_a_revision_is_part_of_the_name(hub: MemoryHub) -> None:
    root = HubFolder(MemorySource(hub), "1-hub")
    for name, commit in (
        ("name@v1.0", FIRST),
        ("name@feature%2Fx", SECOND),
        ("name@refs%2Fpr%2F1", SECOND),
        (f"name@{FIRST}", FIRST),
        ("name@50%2525", SECOND),
    ):
        assert (await folder(root, f"org/{name}")).attributes()["commit"] == commit
        assert name in await names(root, "org")
    for name in await names(root, "org"):  # what is listed is found, and is the same
        await walk(root, f"org/{name}")
    assert len(await names(root, "org")) == 5


@pytest.mark.trio
@pytest.mark.parametrize(
    "path",
    [
        ".git",
        "org.git",
        "a--b",
        "o" * 97,
        "caf\u00e9",
        "\udcff",
        "org/na me",
        "org/name@",
        "org/name@a b",
        "org/name@a..b",
        "org/name@-x",
        "org/name@\udcff",
        "org/name@nowhere",
        "org/missing",
        "org/.hidden",
        "org/..",
    ],
)
async def test_what_cannot_be_a_repo_is_absent(hub: MemoryHub, path: str) -> None:
    assert await absent(HubFolder(MemorySource(hub), "1-hub"), path)
    asked = [question for question in hub.asked if "nowhere" not in question and "missing" not in question]
    assert asked == []  # the quota is for what may exist


@pytest.mark.trio
async def test_a_repo_is_frozen_when_it_is_first_looked_up(hub: MemoryHub) -> None:
    root = HubFolder(MemorySource(hub), "1-hub")
    before = await folder(root, "org/name")
    hub.commit(MODEL, THIRD, [CONFIG], None, "main")
    assert (await folder(root, "org/name")).key == before.key
    assert (await folder(HubFolder(MemorySource(hub), "2-hub"), "org/name")).attributes()["commit"] == THIRD


@pytest.mark.trio
async def test_an_unreachable_hub_is_not_an_absent_repo(hub: MemoryHub) -> None:
    root = HubFolder(MemorySource(hub), "1-hub")
    hub.failure = Unavailable("https://hub.example does not answer.")
    with pytest.raises(Unavailable):
        await walk(root, "org/name")
    hub.failure = Denied("A bad token.")
    with pytest.raises(Denied):
        await walk(root, "org/name")
    hub.failure = None
    assert await names(root, "org/name")


# The hub-cache view --------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_hub_cache_view_is_what_hf_libraries_read(hub: MemoryHub) -> None:
    root = hub_cache(hub)
    assert await names(root) == [REPO]
    assert await names(root, REPO) == [".no_exist", "blobs", "refs", "snapshots", "trees"]
    assert await names(root, f"{REPO}/refs") == ["main"]
    assert await text(root, f"{REPO}/refs/main") == FIRST.encode()
    assert await names(root, f"{REPO}/snapshots") == [FIRST]
    assert await names(root, f"{REPO}/snapshots/{FIRST}") == ["config.json", "model.safetensors", "onnx"]
    assert await names(root, f"{REPO}/trees") == [f"{FIRST}.json"]
    assert await names(root, f"{REPO}/.no_exist") == [FIRST]
    assert CONFIG.blob
    assert WEIGHTS.blob
    assert ONNX.blob
    assert await names(root, f"{REPO}/blobs") == sorted([CONFIG.blob.hex, WEIGHTS.blob.hex, ONNX.blob.hex])
    assert (await folder(root, REPO)).attributes() == {"repo": "org/name"}
    assert (await folder(root, f"{REPO}/snapshots/{FIRST}")).attributes()["commit"] == FIRST
    assert await absent(root, f"{REPO}/locks")
    assert await absent(root, "models--org--other")
    assert await absent(root, "version.txt")


@pytest.mark.trio
@pytest.mark.parametrize("path", ["config.json", "model.safetensors", "onnx/fp16/model.onnx"])
async def test_every_link_leads_to_its_blob(hub: MemoryHub, path: str) -> None:
    root = hub_cache(hub)
    link = await walk(root, f"{REPO}/snapshots/{FIRST}/{path}")
    assert isinstance(link, LinkNode)
    target = posixpath.normpath(posixpath.join(REPO, "snapshots", FIRST, posixpath.dirname(path), link.target))
    assert target.startswith(f"{REPO}/blobs/")
    blob = await walk(root, target)
    assert isinstance(blob, BlobNode)
    assert blob.provenance.entry == hub.trees[MODEL, FIRST].files[path]


@pytest.mark.trio
async def test_refs_follow_the_hub_and_snapshots_stay(hub: MemoryHub) -> None:
    root = hub_cache(hub)
    assert await text(root, f"{REPO}/refs/main") == FIRST.encode()
    hub.commit(MODEL, THIRD, [CONFIG, lfs("new.bin", b"new")], None, "main")
    assert await text(root, f"{REPO}/refs/main") == THIRD.encode()
    assert await names(root, f"{REPO}/snapshots") == [FIRST, THIRD]
    assert await names(root, f"{REPO}/snapshots/{FIRST}") == ["config.json", "model.safetensors", "onnx"]
    assert await names(root, f"{REPO}/snapshots/{THIRD}") == ["config.json", "new.bin"]
    assert len(await names(root, f"{REPO}/blobs")) == 4  # config.json is one blob in both


@pytest.mark.trio
async def test_refs_with_slashes_lie_in_folders(hub: MemoryHub) -> None:
    root = hub_cache(hub)
    assert await text(root, f"{REPO}/refs/refs/pr/1") == SECOND.encode()
    assert await absent(root, f"{REPO}/refs/refs/pr/2")
    assert await absent(root, f"{REPO}/refs/refs/nothing")
    assert await absent(root, f"{REPO}/refs/feature/x")  # nobody can say which folders the hub's branches make


@pytest.mark.trio
@pytest.mark.parametrize("revision", ["v1.0", "feature/x", "refs/pr/1"])
async def test_the_mounted_revision_is_listed(hub: MemoryHub, revision: str) -> None:
    root = hub_cache(hub, revision)
    path = f"{REPO}/refs"
    for part in revision.split("/"):
        assert await names(root, path) == [part]
        path += f"/{part}"
    assert await text(root, path) == hub.refs[MODEL, revision].encode()
    assert await names(root, f"{REPO}/snapshots") == [hub.refs[MODEL, revision]]


@pytest.mark.trio
async def test_a_mounted_commit_has_no_ref(hub: MemoryHub) -> None:
    root = hub_cache(hub, SECOND)
    assert await names(root, f"{REPO}/refs") == []
    assert await names(root, f"{REPO}/snapshots") == [SECOND]
    assert await text(root, f"{REPO}/refs/main") == FIRST.encode()


@pytest.mark.trio
async def test_a_ref_that_is_gone_from_the_hub_is_gone_from_the_listing(hub: MemoryHub) -> None:
    root = hub_cache(hub, "v1.0")
    await walk(root, REPO)
    del hub.refs[MODEL, "v1.0"]
    assert await names(root, f"{REPO}/refs") == []
    assert await names(root, f"{REPO}/snapshots") == [FIRST]


@pytest.mark.trio
async def test_any_commit_is_found_by_its_name(hub: MemoryHub) -> None:
    root = hub_cache(hub)
    assert await names(root, f"{REPO}/snapshots/{SECOND}") == ["config.json", "model.safetensors"]
    assert await names(root, f"{REPO}/snapshots") == [FIRST, SECOND]
    assert await absent(root, f"{REPO}/snapshots/{THIRD}")
    assert await absent(root, f"{REPO}/snapshots/main")
    assert await absent(root, f"{REPO}/snapshots/{FIRST[:12]}")
    assert await absent(root, f"{REPO}/snapshots/{'A' * 40}")


@pytest.mark.trio
async def test_trees_are_what_huggingface_hub_writes(hub: MemoryHub) -> None:
    root = hub_cache(hub)
    assert WEIGHTS.blob
    assert CONFIG.blob
    tree = json.loads(await text(root, f"{REPO}/trees/{FIRST}.json"))
    assert tree["format_version"] == 1
    assert set(tree["files"]) == {"config.json", "model.safetensors", "onnx/fp16/model.onnx"}
    assert tree["files"]["config.json"] == {"size": 2, "blob_id": CONFIG.blob.hex}
    assert tree["files"]["model.safetensors"] == {
        "size": 7,
        "blob_id": WEIGHTS.git_oid,
        "lfs_sha256": WEIGHTS.blob.hex,
        "lfs_size": 7,
    }
    assert await absent(root, f"{REPO}/trees/{FIRST}")
    assert await absent(root, f"{REPO}/trees/main.json")


@pytest.mark.trio
async def test_a_git_file_whose_object_id_the_hub_does_not_repeat_is_no_lfs_file(hub: MemoryHub) -> None:
    bare = type(CONFIG)(CONFIG.path, CONFIG.size, CONFIG.blob)
    hub.commit(MODEL, THIRD, [bare], None)
    tree = json.loads(await text(hub_cache(hub), f"{REPO}/trees/{THIRD}.json"))
    assert "lfs_sha256" not in tree["files"]["config.json"]


@pytest.mark.trio
async def test_absent_names_are_there_as_empty_files(hub: MemoryHub) -> None:
    """So a library that probes for them asks the hub nothing."""
    root = hub_cache(hub)
    absences = f"{REPO}/.no_exist/{FIRST}"
    assert await text(root, f"{absences}/added_tokens.json") == b""
    assert await text(root, f"{absences}/onnx/config.json") == b""
    assert await text(root, f"{absences}/onnx/fp16/model.onnx_data") == b""
    assert await absent(root, f"{absences}/config.json")
    assert await absent(root, f"{absences}/onnx/fp16/model.onnx")
    assert await names(root, absences) == []
    assert await absent(root, f"{REPO}/.no_exist/main")


@pytest.mark.trio
async def test_hidden_files_are_linked_by_their_object_id(hub: MemoryHub) -> None:
    hub.commit(MODEL, THIRD, [hidden("a"), hidden("b")], None)
    root = hub_cache(hub)
    link = await walk(root, f"{REPO}/snapshots/{THIRD}/a")
    assert isinstance(link, LinkNode)
    assert link.target == f"../../blobs/hidden-{hidden('a').git_oid}"
    assert len(await names(root, f"{REPO}/blobs")) == 2


@pytest.mark.trio
async def test_the_whole_hub_in_the_hub_cache_layout(hub: MemoryHub) -> None:
    hub.commit(DATASET, THIRD, [plain("train.csv", b"1")], None)
    root = HubCacheFolder(MemorySource(hub), "1-hub")
    assert await names(root) == []
    assert await names(root, f"datasets--org--data/snapshots/{THIRD}") == ["train.csv"]
    assert await names(root, f"{REPO}/snapshots") == [FIRST]
    assert await names(root) == ["datasets--org--data", REPO]
    for name in (
        "models--org--missing",
        "models--org",
        "models--",
        "things--org--name",
        "org",
        ".locks",
        "\udcff--a--b",
    ):
        assert await absent(root, name)
    assert await absent(root, "models--org--name--x")


@pytest.mark.trio
async def test_two_first_lookups_at_once_find_the_same_repo(hub: MemoryHub) -> None:
    root = HubCacheFolder(MemorySource(hub), "1-hub")
    found: list[Node] = []

    async def look_up() -> None:
        found.append(await root.child(REPO))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(look_up)
    assert len({id(node) for node in found}) == 1
    assert await names(root, f"{REPO}/snapshots") == [FIRST]


@pytest.mark.trio
async def test_a_branch_that_moves_between_two_first_lookups_is_frozen_once(hub: MemoryHub) -> None:
    root = HubCacheFolder(MemorySource(hub), "1-hub")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(root.child, REPO)
        await trio.lowlevel.checkpoint()
        hub.commit(MODEL, THIRD, [CONFIG], None, "main")
        nursery.start_soon(root.child, REPO)
    assert len(await names(root, f"{REPO}/snapshots")) == 1


@pytest.mark.trio
async def test_two_repos_share_the_inode_of_a_blob(hub: MemoryHub) -> None:
    hub.commit(OTHER, THIRD, [lfs("copy.bin", b"weights")], None)
    root = HubCacheFolder(MemorySource(hub), "1-hub")
    assert WEIGHTS.blob
    await walk(root, f"{REPO}/snapshots")
    here = await walk(root, f"{REPO}/blobs/{WEIGHTS.blob.hex}")
    there = await walk(root, f"models--org--other/blobs/{WEIGHTS.blob.hex}")
    assert here.key == there.key
