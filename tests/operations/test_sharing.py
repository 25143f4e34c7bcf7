"""What members are answered: chunks that are really where they say, and of the hub what everybody may know."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import msgspec
import pytest
import trio

from manta.cache.metadata import decode_snapshot
from manta.errors import Absent, Denied, Invalid, MantaError, Throttled, Unavailable
from manta.fetch.fetcher import Fetcher
from manta.fetch.ledger import Ledger
from manta.fetch.sources import Provenance
from manta.fetch.swarm import Answer, Swarm
from manta.hub.origin import Location
from manta.model.ids import BlobId
from manta.model.snapshot import Snapshot
from manta.operations import sharing as module
from manta.operations.sharing import Sharing
from manta.swarm.protocol import (
    ANSWER_BYTES_MAX,
    LocationRequest,
    Report,
    Resolved,
    ResolveRequest,
    SharedLocation,
    TreeRequest,
    decode,
    encode,
)
from manta.telemetry.meter import Meter
from manta.wire.peering import Asked, PullAsked
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, blob_of, content, lfs
from tests.operations.node import Node, node

A, ME = "a" * 16, "0" * 16
BIG = content(3 * CHUNK + 7, seed=1)
BLOB = blob_of(BIG)
PRIVATE = content(CHUNK, seed=2)
pytestmark = [pytest.mark.trio, pytest.mark.timeout(30)]


@dataclass
class FakeSwarm:
    """Who owns what, and whether everybody may ask."""

    node: str = ME
    address: str = "127.0.0.1:9402"
    slots: int = 8
    busy: int = 2
    problem: str = ""
    public_only: bool = False
    owned_by: str | None = None
    ledger: Ledger = field(default_factory=Ledger)

    def owner(self, key: str) -> str | None:
        return self.owned_by

    def members(self) -> list[object]:
        return []

    def exchanges(self) -> list[object]:
        return []

    async def ask_report(self, node: str) -> Report:
        raise Unavailable("Nobody is there.")


class FakeFetcher:
    """What was supplied and located."""

    def __init__(self) -> None:
        self.supplied: list[tuple[Provenance, int, bool]] = []
        self.located: list[Provenance] = []
        self.location = Location("https://cdn/x?sig=secret", {"accept-encoding": "identity"}, time.time() + 100.0)
        self.asking = ""
        self.origin_meter = Meter()

    def comes_from(self, blob: BlobId, chunk: int) -> str:
        return self.asking

    async def supply(self, provenance: Provenance, chunk: int, *, urgent: bool) -> None:
        self.supplied.append((provenance, chunk, urgent))

    async def locate(self, provenance: Provenance) -> Location:
        self.located.append(provenance)
        return self.location


class World:
    def __init__(self, n: Node) -> None:
        self.node = n
        self.hub = n.hub
        self.swarm = FakeSwarm()
        self.fetcher = FakeFetcher()
        self.mounted: list[Snapshot] = []
        self.sharing = Sharing(
            cast(Swarm, self.swarm),
            cast(Fetcher, self.fetcher),
            n.store,
            n.catalog,
            n.metadata,
            lambda: ACCESS,
            lambda: self.mounted,
            "0.1",
            1000.0,
        )

    async def ask(self, what: str, body: bytes = b"") -> Answer:
        return await self.sharing.answer(Asked(1, A, what, body))

    async def pull(self, **changes: object) -> Answer:
        place = {"kind": "models", "repo": "org/name", "commit": FIRST, "path": "big.bin", "urgent": False}
        asked = {"blob": str(BLOB), "size": len(BIG), "chunk": 2, **place, **changes}
        return await self.ask("pull", msgspec.msgpack.encode(PullAsked(**asked)))  # type: ignore[arg-type]

    async def refusal(self, what: str, body: bytes) -> MantaError:
        with pytest.raises(MantaError) as refused:
            await self.ask(what, body)
        assert "hf_secret" not in refused.value.message
        return refused.value


@asynccontextmanager
async def sharing(directory: Path) -> AsyncIterator[World]:
    """org/name is public, org/other is private; the node may see both."""
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.lfs("big.bin", BIG), hub.lfs("sub/small.bin", b"x")], None, "main")
    secret = hub.lfs("secret.bin", PRIVATE)
    hub.commit(OTHER, SECOND, [secret], None, "main")
    hub.trees[OTHER, SECOND] = Snapshot.of(OTHER, SECOND, [secret], private=True)
    async with node(directory, hub) as n:
        yield World(n)


def resolve(repo: str, revision: str = "main", *, known: bool = False, kind: str = "models") -> bytes:
    return encode(ResolveRequest(kind=kind, repo=repo, revision=revision, known=known))


def tree(repo: str, commit: str) -> bytes:
    return encode(TreeRequest(kind="models", repo=repo, commit=commit))


def location(repo: str = "org/name", commit: str = FIRST, path: str = "big.bin", data: bytes = BIG) -> bytes:
    blob = str(blob_of(data))
    return encode(LocationRequest(kind="models", repo=repo, commit=commit, path=path, blob=blob, size=len(data)))


# Chunks --------------------------------------------------------------------------------------------------------------


async def test_a_chunk_is_fetched_on_a_members_behalf(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        assert await world.pull(urgent=True) == Answer(200)
        [(provenance, chunk, urgent)] = world.fetcher.supplied
        assert (str(provenance), provenance.access, chunk, urgent) == ("org/name/big.bin", ACCESS, 2, True)
        assert provenance.entry == world.hub.trees[MODEL, FIRST].files["big.bin"]


async def test_a_pull_of_what_is_being_asked_of_the_asker_is_refused(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        world.fetcher.asking = A
        with pytest.raises(Unavailable, match="is being asked of the node that asks for it"):
            await world.pull()
        world.fetcher.asking = "b" * 16
        assert await world.pull() == Answer(200)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"path": "../../etc/passwd"}, Absent),
        ({"path": "/big.bin"}, Absent),
        ({"path": ""}, Absent),
        ({"path": "x" * 60_000}, Absent),
        ({"path": "sub/small.bin"}, Absent),
        ({"size": len(BIG) + 1}, Absent),
        ({"size": -1}, Absent),
        ({"blob": str(blob_of(b"another"))}, Absent),
        ({"blob": "sha256-../.."}, Invalid),
        ({"commit": "main"}, Invalid),
        ({"commit": "../" * 13 + "x"}, Invalid),
        ({"commit": SECOND}, Absent),
        ({"repo": "org/nothing"}, Absent),
        ({"repo": "../etc"}, Invalid),
        ({"repo": "org/name/x"}, Invalid),
        ({"kind": "cars"}, Invalid),
    ],
)
async def test_nothing_is_made_for_what_a_member_makes_up(
    tmp_path: Path, changes: dict[str, object], error: type[MantaError]
) -> None:
    async with sharing(tmp_path) as world:
        with pytest.raises(error) as refused:
            await world.pull(**changes)
        assert len(refused.value.message) < 1000
        assert world.fetcher.supplied == []
        assert world.node.store.listing() == []


async def test_a_private_chunk_goes_to_who_knows_its_digest_unless_only_public_ones_are_shared(tmp_path: Path) -> None:
    place = {"repo": "org/other", "commit": SECOND, "path": "secret.bin", "chunk": 0}
    place |= {"blob": str(blob_of(PRIVATE)), "size": len(PRIVATE)}
    async with sharing(tmp_path) as world:
        assert await world.pull(**place) == Answer(200)
        world.swarm.public_only = True
        with pytest.raises(Absent) as private:
            await world.pull(**place)
        with pytest.raises(Absent) as nothing:
            await world.pull(**{**place, "repo": "org/none1"})
        assert private.value.message == nothing.value.message.replace("none1", "other")
        assert await world.pull() == Answer(200)
        assert len(world.fetcher.supplied) == 2


async def test_a_tree_that_does_not_come_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> Snapshot:
        await trio.sleep_forever()
        raise AssertionError

    async with sharing(tmp_path) as world:
        monkeypatch.setattr(module, "PLACE_SECONDS", 0.01)
        monkeypatch.setattr(world.hub, "snapshot", never)
        with pytest.raises(Unavailable, match="did not come within"):
            await world.pull()


async def test_only_blobs_of_public_repos_are_public(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        public, private = str(BLOB).encode(), str(blob_of(PRIVATE)).encode()
        assert isinstance(await world.refusal("public", public), Denied)
        await world.node.fetch("org/name")
        await world.node.fetch("org/other")
        assert await world.ask("public", public) == Answer(200)
        assert isinstance(await world.refusal("public", private), Denied)
        world.mounted = [world.hub.trees[OTHER, SECOND]]
        assert isinstance(await world.refusal("public", private), Denied)
        world.mounted.append(Snapshot.of(MODEL, SECOND, [lfs("same.bin", PRIVATE)]))
        assert await world.ask("public", private) == Answer(200)
        assert isinstance(await world.refusal("public", b"\xff../"), Invalid)


async def test_trees_are_not_looked_through_for_what_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with sharing(tmp_path) as world:

        def read(*_: object) -> list[object]:
            raise AssertionError

        monkeypatch.setattr(world.node.metadata, "repos", read)
        assert isinstance(await world.refusal("public", str(blob_of(b"made up")).encode()), Denied)


# What the hub said ---------------------------------------------------------------------------------------------------


async def test_what_a_revision_names_is_told_and_costs_the_hub_one_question(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        for _ in range(5):
            told = decode((await world.ask("resolve", resolve("org/name"))).body, Resolved)
            assert told.commit == FIRST
        assert world.hub.asked == ["resolve org/name@main", "snapshot org/name@1"]


async def test_who_does_not_ask_the_hub_for_all_says_so(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        world.swarm.owned_by = "b" * 16
        for what, body in (("resolve", resolve("org/name")), ("location", location())):
            assert isinstance(await world.refusal(what, body), Absent)
        assert world.hub.asked == []
        assert world.fetcher.located == []


@pytest.mark.parametrize("known", [False, True])
async def test_of_private_repos_nothing_is_told_not_even_that_they_are_there(tmp_path: Path, known: bool) -> None:
    async with sharing(tmp_path) as world:
        await world.node.fetch("org/other")
        world.node.metadata.save_ref(OTHER, "main", SECOND, 1.0)
        there = await world.refusal("resolve", resolve("org/other", known=known))
        nothing = await world.refusal("resolve", resolve("org/none1", known=known))
        assert isinstance(there, Absent)
        assert type(there) is type(nothing)
        assert there.message == nothing.message.replace("none1", "other")
        there, nothing = [await world.refusal("tree", tree(repo, SECOND)) for repo in ("org/other", "org/none1")]
        assert (type(there), there.message) == (type(nothing), nothing.message.replace("none1", "other"))
        there, nothing = [
            await world.refusal("location", location(repo, SECOND, "secret.bin", PRIVATE))
            for repo in ("org/other", "org/none1")
        ]
        assert (type(there), there.message) == (type(nothing), nothing.message.replace("none1", "other"))
        assert world.fetcher.located == []


async def test_what_is_known_is_told_without_the_hub(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        await world.node.fetch("org/name")
        world.hub.asked.clear()
        world.hub.failure = Unavailable("Down.")
        world.swarm.owned_by = "b" * 16  # whoever asks the hub: this one remembers
        told = decode((await world.ask("resolve", resolve("org/name", known=True))).body, Resolved)
        assert told.commit == FIRST
        assert told.age_s >= 0
        assert isinstance(await world.refusal("resolve", resolve("org/name", "v9", known=True)), Absent)
        assert world.hub.asked == []


async def test_a_stale_revision_is_not_told_as_a_present_one(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        world.node.metadata.save_ref(MODEL, "main", FIRST, 1.0)
        world.hub.failure = Throttled("Slow down.", 9.0)
        assert isinstance(await world.refusal("resolve", resolve("org/name")), Unavailable)


@pytest.mark.parametrize(
    "body",
    [
        resolve("org/name", "x" * 2000),
        resolve("org/name", "../x"),
        resolve("org/name", "a b"),
        resolve("../x"),
        resolve("org/name", kind="cars"),
        b"",
        b"\xc1garbage",
    ],
)
async def test_what_is_no_question_is_invalid(tmp_path: Path, body: bytes) -> None:
    async with sharing(tmp_path) as world:
        error = await world.refusal("resolve", body)
        assert isinstance(error, Invalid)
        assert world.hub.asked == []


async def test_a_tree_is_told_by_descriptor_as_it_is_stored(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        assert isinstance(await world.refusal("tree", tree("org/name", FIRST)), Absent)
        assert world.hub.asked == []  # nobody is asked on: two nodes would ask each other
        await world.node.fetch("org/name")
        answer = await world.ask("tree", tree("org/name", FIRST))
        assert answer.fd is not None
        data = os.pread(answer.fd, 1_000_000, 0)
        os.close(answer.fd)
        assert decode_snapshot(data, MODEL, FIRST) == world.hub.trees[MODEL, FIRST]
        assert isinstance(await world.refusal("tree", tree("org/name", "../../../x")), Invalid)


async def test_a_public_location_is_told_without_what_opens_more(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        shared = decode((await world.ask("location", location())).body, SharedLocation)
        assert shared.url == "https://cdn/x?sig=secret"
        assert 90 < shared.expires_s <= 100
        for header in ("authorization", "Authorization"):
            world.fetcher.location = Location("https://hub/x", {header: "Bearer hf_secret"})
            assert isinstance(await world.refusal("location", location()), Denied)


async def test_what_nobody_asks_is_refused(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        assert isinstance(await world.refusal("shell" * 100, b""), Invalid)


# The report ----------------------------------------------------------------------------------------------------------


async def report(world: World) -> Report:
    answer = await world.ask("report")
    if answer.fd is None:
        return decode(answer.body, Report)
    try:
        return decode(os.pread(answer.fd, ANSWER_BYTES_MAX, 0), Report)
    finally:
        os.close(answer.fd)


async def test_the_report_says_what_is_here_and_where_from(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        await world.node.fetch("org/name")
        world.swarm.ledger.came(str(BLOB), len(BIG), "org/name/big.bin", 100, peer=False)
        world.swarm.ledger.came(str(BLOB), len(BIG), "org/name/big.bin", 50, peer=True)
        world.swarm.ledger.came("sha256-" + "0" * 64, 5, "org/gone", 5, peer=True)
        told = await report(world)
        assert (told.node, told.from_origin, told.from_peers, told.busy) == (ME, 100, 55, 2)
        gone, big = told.blobs
        assert (gone.name, gone.have) == ("org/gone", b"")
        assert (big.size, big.from_origin, big.from_peers) == (len(BIG), 100, 50)
        assert big.have[0] & 1


async def test_the_report_is_bounded(tmp_path: Path) -> None:
    async with sharing(tmp_path) as world:
        for number in range(2000):
            world.swarm.ledger.came(f"sha256-{number:064x}", 1, "n" * 200, 1, peer=True)
        told = await report(world)
        assert len(told.blobs) == module.REPORTED_MAX
        assert told.blobs[0].blob == f"sha256-{1999:064x}"
        assert told.from_peers == 2000
