"""A repo that moves, is renamed, turns gated or private, or vanishes while it is mounted, and a token that is revoked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from manta.testing.hub import (
    CommitSpec,
    FileSpec,
    Generated,
    HubProcess,
    HubSpec,
    RepoSpec,
    Text,
    UserSpec,
    changes,
    faults,
)
from manta.testing.hub.changes import Change
from tests.mount.node import Node, background, run, wait_until

pytestmark = pytest.mark.above_fuse

MIB = 1024 * 1024
REPO, TWIN, OTHER = "manta/moving", "manta/twin", "manta/other"
TOKEN, NEXT_TOKEN = "hf_movingreader", "hf_movingreadersnext"  # of the test hub only
SHARED, SHARED_SIZE = Generated("shared", 20 * MIB + 3), 20 * MIB + 3


@pytest.fixture(scope="module")
def moving_hub() -> Iterator[HubProcess]:
    first: dict[str, FileSpec] = {"config.json": Text("first"), "weights.bin": SHARED, "old.bin": Generated("old", MIB)}
    second: dict[str, FileSpec] = {
        "config.json": Text("second"),
        "weights.bin": SHARED,
        "new.bin": Generated("new", MIB),
    }
    spec = HubSpec(
        users=[
            UserSpec(name="reader", token=TOKEN, access=[REPO]),
            UserSpec(name="successor", token=NEXT_TOKEN, access=[REPO]),
        ],
        repos=[
            RepoSpec(
                id=REPO,
                commits=[CommitSpec(files=first, name="first"), CommitSpec(files=second, name="second")],
                branches={"main": "first", "second": "second"},
            ),
            RepoSpec(id=TWIN, files={"copy/weights.bin": SHARED}),
            RepoSpec(id=OTHER, files={"file.bin": Generated("other", MIB)}),
        ],
    )
    with HubProcess(spec) as hub:
        yield hub


@pytest.fixture
def hub(moving_hub: HubProcess) -> Iterator[HubProcess]:
    yield moving_hub
    moving_hub.reset()


@pytest.fixture
def node(hub: HubProcess) -> Iterator[Node]:
    # Only what is read is fetched, so that what is not in the cache is known.
    with Node(hub.endpoint, {"MANTA_FETCH_FILL": "false"}) as node:
        yield node


def digest(hub: HubProcess, repo: str, file: str, revision: str = "main") -> str:
    return hub.files(repo, revision).files[file].sha256


def test_a_mount_shows_one_commit_whatever_the_branch_does_meanwhile(hub: HubProcess, node: Node) -> None:
    """The branch moves between the answer about the tree and the first question for a file."""
    hub.add_fault(faults.Mutate(then=changes.MoveBranch(repo=REPO, to="second")), kind="tree", repo=REPO, times=1)
    before = node.mount(REPO)
    assert run('ls "$1"', before).split() == ["config.json", "old.bin", "weights.bin"]
    assert run('cat "$1/config.json"', before) == "first"
    assert run('sha256sum "$1/weights.bin"', before).split()[0] == digest(hub, REPO, "weights.bin")
    # A mount from now on has the new commit, and what did not change is not fetched again.
    after = node.mount(REPO)
    assert run('cat "$1/config.json"', after) == "second"
    assert run('ls "$1"', after).split() == ["config.json", "new.bin", "weights.bin"]
    assert run('sha256sum "$1/weights.bin"', after).split()[0] == digest(hub, REPO, "weights.bin")
    assert hub.blob_traffic(REPO, "weights.bin").sent == SHARED_SIZE
    assert run('cat "$1/config.json"', before) == "first"
    assert [mount["directory"] for mount in node.status()["mounts"]] == [str(before), str(after)]
    # One of them goes, the other stays.
    node.manta("umount", str(before))
    assert run('cat "$1/config.json"', after) == "second"
    assert [mount["directory"] for mount in node.status()["mounts"]] == [str(after)]


def test_a_branch_that_is_deleted_in_mid_read_is_read_to_its_end(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(10 * MIB)
    directory = node.mount(REPO)
    with background("sha256sum", directory / "weights.bin") as reading:
        wait_until(lambda: node.status()["origin_bytes"] > MIB)
        hub.apply(changes.DeleteBranch(repo=REPO))
        hub.set_bandwidth(None)
        assert reading.communicate(timeout=60)[0].split()[0] == digest(hub, REPO, "weights.bin", "second")
    assert run('wc -c < "$1/old.bin"', directory).strip() == str(MIB), "by its commit, which is there"
    refused = node.manta("mount", REPO, str(node.directory()), code=None)
    assert refused.returncode not in {0, 2}
    assert "no revision 'main'" in refused.stderr


@pytest.mark.parametrize(
    ("change", "back", "errno", "words"),
    [
        (changes.SetGated(repo=REPO), changes.SetGated(repo=REPO, gated=False), "Permission denied", "is gated"),
        (changes.SetPrivate(repo=REPO), changes.SetPrivate(repo=REPO, private=False), "No such file", "private"),
        (changes.SetDeleted(repo=REPO), changes.SetDeleted(repo=REPO, deleted=False), "No such file", "not exist"),
    ],
    ids=["gated", "private", "deleted"],
)
def test_a_repo_that_may_not_be_read_any_more(
    hub: HubProcess, node: Node, change: Change, back: Change, errno: str, words: str
) -> None:
    directory, other = node.mount(REPO), node.mount(OTHER)
    weights = run('sha256sum "$1/weights.bin"; cat "$1/config.json"', directory)
    hub.apply(change)
    assert errno in run('cat "$1/old.bin" > /dev/null', directory, code=1)
    [sentence] = node.status()["mounts"][0]["errors"]
    assert REPO in sentence
    assert words in sentence
    assert run('sha256sum "$1/weights.bin"; cat "$1/config.json"', directory) == weights
    assert run('ls "$1"', directory).split() == ["config.json", "old.bin", "weights.bin"]
    assert run('sha256sum "$1/file.bin"', other).split()[0] == digest(hub, OTHER, "file.bin")
    assert node.status()["mounts"][1]["errors"] == []
    hub.apply(back)
    assert run('sha256sum "$1/old.bin"', directory).split()[0] == digest(hub, REPO, "old.bin")


def test_a_token_that_is_revoked(hub: HubProcess, node: Node) -> None:
    hub.apply(changes.SetGated(repo=REPO))
    directory = node.mount(REPO, token=TOKEN)
    assert run('cat "$1/config.json"', directory) == "first"
    hub.apply(changes.RevokeToken(token=TOKEN))
    assert "Permission denied" in run('cat "$1/old.bin" > /dev/null', directory, code=1)
    [sentence] = node.status()["mounts"][0]["errors"]
    assert "does not accept the token" in sentence
    assert TOKEN not in sentence
    assert run('cat "$1/config.json"', directory) == "first"
    hub.reset()
    assert run('sha256sum "$1/old.bin"', directory).split()[0] == digest(hub, REPO, "old.bin")
    assert TOKEN not in node.log()


def test_a_mount_follows_whoever_logs_in_anew(hub: HubProcess, node: Node) -> None:
    hub.apply(changes.SetGated(repo=REPO))
    saved = node.path / "home/hf/token"
    saved.parent.mkdir(parents=True)
    saved.write_text(TOKEN)
    directory = node.mount(REPO)
    assert run('cat "$1/config.json"', directory) == "first"
    hub.apply(changes.RevokeToken(token=TOKEN))
    assert "Permission denied" in run('cat "$1/old.bin" > /dev/null', directory, code=1)
    saved.write_text(NEXT_TOKEN)
    wait_until(lambda: digest(hub, REPO, "old.bin") in run('sha256sum "$1/old.bin"', directory, code=None))
    assert "hf_" not in node.log()


def test_a_repo_that_is_renamed_is_read_on(hub: HubProcess, node: Node) -> None:
    directory = node.mount(REPO)
    run('cat "$1/config.json"', directory)
    hub.apply(changes.Rename(repo=REPO, to="manta/renamed"))
    assert run('sha256sum "$1/weights.bin"', directory).split()[0] == digest(hub, "manta/renamed", "weights.bin")
    for name in (REPO, "manta/renamed"):
        assert run('cat "$1/config.json"; wc -c < "$1/old.bin"', node.mount(name)) == f"first{MIB}\n"
    assert hub.blob_traffic("manta/renamed", "weights.bin").sent == SHARED_SIZE


def test_what_another_mounted_repo_has_too_is_had_from_there(hub: HubProcess, node: Node) -> None:
    directory, twin = node.mount(REPO), node.mount(TWIN)
    hub.apply(changes.SetDeleted(repo=REPO))
    assert run('sha256sum "$1/weights.bin"', directory).split()[0] == digest(hub, TWIN, "copy/weights.bin")
    assert run('sha256sum "$1/copy/weights.bin"', twin).split()[0] == digest(hub, TWIN, "copy/weights.bin")
    assert hub.blob_traffic(TWIN, "copy/weights.bin").sent == SHARED_SIZE
    assert "No such file" in run('cat "$1/old.bin" > /dev/null', directory, code=1), "nobody else has that"
