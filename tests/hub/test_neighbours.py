"""What other nodes know of the hub: the hub is asked once for all, and what members tell is looked at before it is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from manta.cache.metadata import MetadataStore, decode_snapshot
from manta.errors import Denied, MantaError, Throttled, Unavailable, Unreachable
from manta.hub.catalog import Catalog
from manta.hub.circuit import Circuit
from manta.hub.neighbours import Neighbours
from manta.hub.origin import Access
from manta.model.ids import Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry, Snapshot
from manta.swarm.protocol import Resolved, ResolveRequest, TreeRequest, decode, encode
from tests.hub.fake_origin import FakeOrigin, commit, entry

REPO = RepoId(RepoKind.MODEL, "org/name")
OTHER = RepoId(RepoKind.MODEL, "org/other")
A, B = commit("a"), commit("b")
ACCESS = Access("hf_secret")
DOWN = Unreachable("The hub is down.")
pytestmark = pytest.mark.trio


class Owner:
    """The member who asks the hub: what it tells (an error: raises it), and what it was asked. `away`: it is this node itself."""

    def __init__(self) -> None:
        self.tells: dict[str, bytes | MantaError] = {}
        self.any_tells: dict[str, bytes | MantaError] = {}
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []

    async def ask(self, what: str, key: str, body: bytes) -> bytes | None:
        return self._tell(self.tells, what, key, body)

    async def ask_any(self, what: str, key: str, body: bytes) -> bytes | None:
        return self._tell(self.any_tells, f"any {what}", key, body)

    def _tell(self, tells: dict[str, bytes | MantaError], what: str, key: str, body: bytes) -> bytes | None:
        self.asked.append((what, key))
        self.bodies.append(body)
        told = tells.get(what.removeprefix("any "))
        if isinstance(told, MantaError):
            raise told
        return told


def stored(directory: Path, snapshot: Snapshot) -> bytes:
    """A tree as nodes tell each other."""
    store = MetadataStore(directory)
    directory.mkdir(exist_ok=True)
    store.save_snapshot(snapshot)
    data = store.encoded(snapshot.repo, snapshot.commit)
    assert data is not None
    return data


def tree(at: Commit = A, repo: RepoId = REPO, **flags: bool) -> Snapshot:
    return Snapshot.of(repo, at, [entry("config.json"), entry("weights/model.bin", "2")], **flags)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def neighbours(owner: Owner) -> Neighbours:
    return Neighbours(owner.ask, owner.ask_any, decode_snapshot)


class Net:
    def __init__(self, directory: Path, owner: Owner, nursery: trio.Nursery) -> None:
        self.owner = owner
        self.origin = FakeOrigin()
        self.origin.add(REPO, "main", A, tree().files.values())
        self.directory = directory / "meta"
        self.directory.mkdir()
        self.store = MetadataStore(self.directory)
        self.circuit = Circuit(self.origin.endpoint)
        self.nursery = nursery
        self.catalog = self.make()

    def make(self, *, offline: bool = False) -> Catalog:
        return Catalog(
            self.origin,
            self.store,
            self.nursery,
            owner=ACCESS,
            circuit=self.circuit,
            offline=offline,
            neighbours=Neighbours(self.owner.ask, self.owner.ask_any, decode_snapshot),
        )


@pytest.fixture
async def net(tmp_path: Path, owner: Owner, nursery: trio.Nursery, mock_clock: MockClock) -> Net:
    return Net(tmp_path, owner, nursery)


# What members tell ---------------------------------------------------------------------------------------------------


async def test_the_one_who_asks_the_hub_for_all_is_asked(neighbours: Neighbours, owner: Owner) -> None:
    owner.tells["resolve"] = encode(Resolved(commit=A))
    assert await neighbours.resolve(REPO, "main") == A
    owner.any_tells["resolve"] = encode(Resolved(commit=B))
    assert await neighbours.remembered(REPO, "main") == B
    assert owner.asked == [("resolve", "resolve/org/name"), ("any resolve", "resolve/org/name")]
    asked = [decode(body, ResolveRequest) for body in owner.bodies]
    assert [(a.kind, a.repo, a.revision, a.known) for a in asked] == [
        ("models", "org/name", "main", False),
        ("models", "org/name", "main", True),
    ]
    assert not any(b"hf_" in body for body in owner.bodies)


@pytest.mark.parametrize(
    "told", [b"", b"garbage", encode(Resolved(commit="main")), encode(Resolved(commit="../" * 20))]
)
async def test_what_is_no_commit_is_not_taken(neighbours: Neighbours, owner: Owner, told: bytes) -> None:
    owner.tells["resolve"] = owner.any_tells["resolve"] = told
    assert await neighbours.resolve(REPO, "main") is None
    assert await neighbours.remembered(REPO, "main") is None


async def test_a_told_tree_is_taken(neighbours: Neighbours, owner: Owner, tmp_path: Path) -> None:
    owner.tells["tree"] = stored(tmp_path, tree())
    assert await neighbours.tree(REPO, A) == tree()
    assert decode(owner.bodies[0], TreeRequest).commit == A
    assert await neighbours.tree(REPO, A, anybody=True) is None
    assert [what for what, _ in owner.asked] == ["tree", "any tree"]


@pytest.mark.parametrize(
    "snapshot",
    [
        tree(B),
        tree(repo=OTHER),
        tree(private=True),
        tree(gated=True),
        Snapshot.of(REPO, A, [FileEntry("hidden.bin", 3, None)]),
        Snapshot.of(REPO, A, [FileEntry("../../etc/passwd", 3, entry("x").blob)]),
        Snapshot.of(REPO, A, [FileEntry("a\0b", 3, entry("x").blob)]),
        Snapshot.of(REPO, A, [FileEntry("a", 3, entry("x").blob), FileEntry("a/b", 3, entry("x").blob)]),
        Snapshot.of(REPO, A, [FileEntry("negative", -3, entry("x").blob)]),
        Snapshot.of(REPO, A, [FileEntry("huge", 1 << 62, entry("x").blob)]),
    ],
    ids=["commit", "repo", "private", "gated", "hidden", "path", "nul", "both", "negative", "huge"],
)
async def test_a_tree_that_is_not_to_be_told_or_shown_is_not_used(
    neighbours: Neighbours, owner: Owner, tmp_path: Path, snapshot: Snapshot
) -> None:
    data = stored(tmp_path, snapshot)
    owner.tells["tree"] = data
    assert await neighbours.tree(REPO, A) is None


async def test_a_damaged_tree_is_not_used(neighbours: Neighbours, owner: Owner, tmp_path: Path) -> None:
    data = stored(tmp_path, tree())
    for damaged in (b"", b"x", data[:-1], data + b"x", data[:50] + b"\0" + data[51:]):
        owner.tells["tree"] = damaged
        assert await neighbours.tree(REPO, A) is None


# In the catalog ------------------------------------------------------------------------------------------------------


async def test_what_is_told_costs_the_hub_nothing_and_is_kept(net: Net, tmp_path: Path) -> None:
    net.owner.tells = {"resolve": encode(Resolved(commit=A)), "tree": stored(tmp_path / "told", tree())}
    assert (await net.catalog.resolve(REPO, "main", ACCESS)).commit == A
    assert await net.catalog.snapshot(REPO, A, ACCESS) == tree()
    assert net.origin.asked == []
    assert net.store.snapshot(REPO, A) == tree()
    ref = net.store.ref(REPO, "main")
    assert ref is not None
    assert ref[0] == A


async def test_the_hub_is_asked_where_members_do_not_tell(net: Net) -> None:
    assert (await net.catalog.resolve(REPO, "main", ACCESS)).commit == A
    assert await net.catalog.snapshot(REPO, A, ACCESS) == tree()
    assert net.origin.asked == ["resolve org/name@main", "snapshot org/name@a"]
    assert [what for what, _ in net.owner.asked] == ["resolve", "tree"]


async def test_an_unchanged_revision_is_not_written_each_time(net: Net, mock_clock: MockClock) -> None:
    net.owner.tells["resolve"] = encode(Resolved(commit=A))
    writes = []
    save = net.store.save_ref
    net.store.save_ref = lambda *told: (writes.append(told), save(*told))[1]  # type: ignore[method-assign, func-returns-value]
    for _ in range(5):
        await net.catalog.resolve(REPO, "main", ACCESS)
        mock_clock.jump(60)
    await net.catalog.resolve(REPO, A, ACCESS)
    assert [told[:2] for told in writes] == [(REPO, "main")]


async def test_the_owners_pause_leaves_what_is_stored_usable(net: Net) -> None:
    net.store.save_ref(REPO, "main", B, 1.0)
    net.owner.tells["resolve"] = Throttled("The hub asked for a pause.", 60.0)
    resolution = await net.catalog.resolve(REPO, "main", ACCESS)
    assert (resolution.commit, resolution.stale) == (B, True)
    assert net.origin.asked == []


async def test_hub_away_what_any_member_knows_mounts(net: Net, tmp_path: Path) -> None:
    net.origin.failure = DOWN
    net.owner.any_tells = {"resolve": encode(Resolved(commit=A)), "tree": stored(tmp_path / "told", tree())}
    resolution = await net.catalog.resolve(REPO, "main", ACCESS)
    assert (resolution.commit, resolution.stale) == (A, True)
    assert await net.catalog.snapshot(REPO, A, ACCESS) == tree()
    assert net.store.snapshot(REPO, A) == tree()


async def test_offline_members_are_asked_and_the_hub_is_not(net: Net, tmp_path: Path) -> None:
    catalog = net.make(offline=True)
    net.owner.any_tells = {"resolve": encode(Resolved(commit=A)), "tree": stored(tmp_path / "told", tree())}
    assert (await catalog.resolve(REPO, "main", ACCESS)).commit == A
    assert await catalog.snapshot(REPO, A, ACCESS) == tree()
    with pytest.raises(Unavailable, match="offline mode is on"):
        await catalog.snapshot(REPO, B, ACCESS)
    assert net.origin.asked == []


async def test_a_members_answer_does_not_close_the_hubs_circuit(net: Net, tmp_path: Path) -> None:
    net.circuit.failed(0.0, trio.current_time(), "It was silent.")
    net.circuit.failed(0.0, trio.current_time(), "It was silent.")
    was = (net.circuit.open, net.circuit.reason)
    net.owner.tells = {"resolve": encode(Resolved(commit=A)), "tree": stored(tmp_path / "told", tree())}
    net.owner.any_tells = net.owner.tells
    await net.catalog.resolve(REPO, "main", ACCESS)
    await net.catalog.snapshot(REPO, A, ACCESS)
    assert (net.circuit.open, net.circuit.reason) == was
    assert net.origin.asked == []


async def test_members_are_asked_once_where_nobody_knows(net: Net) -> None:
    net.origin.failure = DOWN
    with pytest.raises(Unavailable):
        await net.catalog.snapshot(REPO, A, ACCESS)
    assert [what for what, _ in net.owner.asked].count("any tree") == 1


async def test_a_private_tree_that_is_stored_is_never_asked_of_members(net: Net) -> None:
    net.origin.private.add(REPO)
    shown = await net.catalog.snapshot(REPO, A, ACCESS)
    assert shown.private
    net.owner.asked.clear()
    net.origin.failure = Denied("No.")
    with pytest.raises(Denied):
        await net.catalog.snapshot(REPO, A, Access("hf_other"))
    assert net.owner.asked == []
