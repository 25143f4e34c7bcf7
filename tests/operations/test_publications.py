"""Publications: who may not have one, the same one again and again, and what of them outlives the daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from manta.control.protocol import MountRequest, Pod, Publication
from manta.errors import Absent, Conflict, Denied, InUse, Invalid, MantaError, Unavailable
from manta.fetch.sources import Provenance
from manta.fs.journal import Journal
from manta.fs.nodes import BlobNode, Folder
from manta.hub.catalog import ABSENT_S, DENIED_S, GRANT_S
from manta.hub.identity import Identity
from manta.hub.origin import Access
from manta.operations import publications as module
from manta.operations import volumes as volumes_module
from manta.operations.mounts import BIND_SECONDS_MAX, Mounted, Mounts
from manta.operations.warming import Warming
from manta.telemetry.metrics import Volume
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, content
from tests.operations.node import Node, node

POD = Pod("0a1b", "server-0", "default", "csi-1")
WEIGHTS = content(3 * CHUNK)
ALLOWED, STRANGER = "hf_allowed", "hf_stranger"


def wanted(target: str = "org/name", token: str = "", **changes: Any) -> MountRequest:
    request = MountRequest(target, "/pods/0a1b/model", token=token, anonymous=not token, pod=POD)
    return msgspec.structs.replace(request, **changes)


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.plain("config.json", b"{}"), hub.lfs("model.bin", WEIGHTS)], None, "main")
    hub.commit(OTHER, SECOND, [hub.lfs("copy.bin", WEIGHTS)], None, "main")
    return hub


async def cached(n: Node, hub: MemoryHub, *, gated: bool) -> None:
    """Every byte of MODEL is in the cache, and another pod has it mounted."""
    (hub.gated if gated else hub.private)[MODEL] = {ALLOWED, ACCESS.token}
    await n.publications.publish("theirs", wanted(token=ALLOWED, directory="/pods/theirs"))
    await n.fetch("org/name")


# Who may not -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("token", ["", STRANGER])
@pytest.mark.parametrize("revision", ["", f"@{FIRST}"])
@pytest.mark.trio
async def test_a_cached_model_that_another_pod_has_mounted_is_not_there_for_who_may_not_read_it(
    tmp_path: Path, hub: MemoryHub, gated: bool, token: str, revision: str, mock_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        await cached(n, hub, gated=gated)
        with pytest.raises(Denied if gated else Absent):
            await n.publications.publish("mine", wanted(f"org/name{revision}", token))
        assert [p.name for p in n.publications] == ["theirs"]
        # Nor with the hub away, where nothing tells that it is there.
        hub.failure = Unavailable("https://hub.example does not answer.")
        mock_clock.jump(max(GRANT_S, DENIED_S, ABSENT_S))
        with pytest.raises(Unavailable) as caught:
            await n.publications.publish("mine", wanted(f"org/name{revision}", token))
        with pytest.raises(Unavailable) as unknown:
            await n.publications.publish("mine", wanted("org/never-heard-of", token))
        assert caught.value.message == unknown.value.message
        assert [p.name for p in n.publications] == ["theirs"]


@pytest.mark.trio
async def test_a_pod_without_a_secret_never_asks_with_the_daemons_token(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        hub.gated[MODEL] = {ACCESS.token}
        with pytest.raises(Denied, match="nodePublishSecretRef"):
            await n.publications.publish("a", wanted())
        mounted = await n.publications.publish("b", wanted("org/other"))
        transfer = n.blobs.open(await file_of(mounted, "copy.bin"))
        await transfer.complete()
        n.blobs.close(transfer)
        assert set(hub.tokens) == {""}


@pytest.mark.trio
async def test_where_the_driver_says_so_the_daemons_token_counts(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        hub.private[MODEL] = {ACCESS.token}
        await n.publications.publish("a", wanted(anonymous=False))
        hub.private[MODEL].clear()
        n.catalog._grants._answers.clear()  # a minute later
        n.catalog._heard._answers.clear()
        with pytest.raises(Absent):
            await n.publications.publish("b", wanted(anonymous=False))


@pytest.mark.trio
async def test_a_token_and_anonymous_at_once_is_refused(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        with pytest.raises(Invalid, match="anonymous"):
            await n.publications.publish("a", wanted(token=ALLOWED, anonymous=True))


@pytest.mark.trio
async def test_a_token_is_used_for_its_mount_and_not_after_it(tmp_path: Path, hub: MemoryHub) -> None:
    """Another pod has the same bytes by a public repo: nothing is asked for it with a token of a pod that is gone."""
    async with node(tmp_path, hub) as n:
        hub.private[MODEL] = {ALLOWED}
        theirs = await n.publications.publish("theirs", wanted(token=ALLOWED))
        mine = await n.publications.publish("mine", wanted("org/other"))
        place = await file_of(theirs, "model.bin")
        transfer = n.blobs.open(place)
        await transfer.ensure(transfer.blob.grid.extent(0), onward=False)
        assert hub.tokens[-1] == ALLOWED
        located = [transfer.sources.location]
        n.mounts.remove(theirs.id)
        n.blobs.fetcher.forget(theirs.scope.access)
        located.append(transfer.sources.location)
        assert [location is None for location in located] == [False, True]
        assert n.identity.is_released(place.access)
        again = n.blobs.open(await file_of(mine, "copy.bin"))
        await again.complete()
        assert hub.tokens[-1] == ""
        n.blobs.close(again)
        n.blobs.close(transfer)
        assert [p.repo for p in n.mounts.provenances(transfer.blob.id)] == [OTHER]


async def file_of(mounted: Mounted, name: str) -> Provenance:
    found = await mounted.root.child(name)
    assert isinstance(found, BlobNode)
    return found.provenance


# Again and again ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_same_again_is_the_same_mount_with_the_new_token(
    tmp_path: Path, hub: MemoryHub, mock_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        hub.gated[MODEL] = {ALLOWED}
        mounted = await n.publications.publish("a", wanted(token=ALLOWED))
        place = await file_of(mounted, "model.bin")
        hub.gated[MODEL] = {"hf_next"}
        assert await n.publications.publish("a", wanted(token="hf_next")) is mounted
        transfer = n.blobs.open(place)  # found before
        await transfer.complete()
        n.blobs.close(transfer)
        assert hub.tokens[-1] == "hf_next"
        assert len(n.mounts) == 1
        assert "hf_" not in str(n.describe(mounted)) + repr(mounted) + str(list(n.publications))
        assert list(n.publications) == [Publication("a", mounted.id, "/pods/0a1b/model", POD)]
        said = n.describe(mounted)
        assert (said.publication, said.pod) == ("a", POD)


@pytest.mark.trio
async def test_two_at_once_are_one_mount(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        made: list[Mounted] = []

        async def publish() -> None:
            made.append(await n.publications.publish("a", wanted()))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(publish)
        assert len({id(mounted) for mounted in made}) == len(n.mounts) == 1
        assert not n.publications._turns


@pytest.mark.parametrize(
    "change", [{"target": "org/other"}, {"directory": "/b"}, {"view": "hub-cache"}, {"prefetch": "background"}, {"pin": True},
               {"pod": Pod("1", "server-0", "default", "csi-1")}]
)  # fmt: skip
@pytest.mark.trio
async def test_another_request_by_the_same_name_is_refused(
    tmp_path: Path, hub: MemoryHub, change: dict[str, Any]
) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.publications.publish("a", wanted(token=ALLOWED))
        with pytest.raises(Conflict, match=rf"already with {next(iter(change))} .*unpublish it first") as caught:
            await n.publications.publish("a", wanted(token=STRANGER, **change))
        assert "hf_" not in caught.value.message
        assert n.identity.latest(mounted.scope.access).token == ALLOWED


@pytest.mark.trio
async def test_a_right_that_is_withdrawn_is_said_and_the_mount_stays(
    tmp_path: Path, hub: MemoryHub, mock_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        hub.private[MODEL] = {ALLOWED}
        mounted = await n.publications.publish("a", wanted(token=ALLOWED))
        n.mounts.bound(mounted.id, "/pods/0a1b/model")
        other = await n.publications.publish("b", wanted(token=ALLOWED, directory="/b"))
        hub.private[MODEL].clear()
        await n.publications.publish("a", wanted(token=ALLOWED))  # remembered
        mock_clock.jump(GRANT_S)
        for _ in range(2):
            with pytest.raises(Denied, match=r"may not be read any more; what is cached"):
                await n.publications.publish("a", wanted(token=ALLOWED))
        [sentence] = n.describe(mounted).errors
        assert "may not be read any more" in sentence
        assert n.describe(other).errors == []
        assert await mounted.root.child("config.json")
        # The hub away is no refusal, and takes none back.
        hub.failure = Unavailable("https://hub.example does not answer.")
        mock_clock.jump(ABSENT_S)
        with pytest.raises(Unavailable):
            await n.publications.publish("a", wanted(token=ALLOWED))
        hub.failure, hub.private[MODEL] = None, {ALLOWED}
        mock_clock.jump(ABSENT_S)
        await n.publications.publish("a", wanted(token=ALLOWED))
        assert n.describe(mounted).errors == []


@pytest.mark.trio
async def test_with_the_hub_away_public_models_go_on_as_stale(
    tmp_path: Path, hub: MemoryHub, mock_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.publications.publish("a", wanted())
        hub.failure = Unavailable("https://hub.example does not answer.")
        mock_clock.jump(3600)
        assert await n.publications.publish("a", wanted()) is mounted
        assert n.describe(await n.publications.publish("b", wanted(token=ALLOWED, directory="/b"))).stale


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 129, "größe"])
@pytest.mark.trio
async def test_what_cannot_be_a_name(tmp_path: Path, hub: MemoryHub, name: str) -> None:
    async with node(tmp_path, hub) as n:
        with pytest.raises(Invalid, match="1 to 128 letters"):
            await n.publications.publish(name, wanted())


@pytest.mark.trio
async def test_there_are_not_too_many_and_none_without_root(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUBLICATIONS_MAX", 1)
    async with node(tmp_path / "a", hub) as n:
        await n.publications.publish("a", wanted())
        with pytest.raises(InUse, match="1 volumes published already") as caught:
            await n.publications.publish("b", wanted())
        assert not isinstance(caught.value, Conflict)
        await n.publications.publish("a", wanted())
    async with node(tmp_path / "b", hub, root=None) as n:
        with pytest.raises(Denied, match="run it as root"):
            await n.publications.publish("a", wanted())


@pytest.mark.trio
async def test_one_that_is_gone_is_made_anew(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.publications.publish("a", wanted())
        n.mounts.remove(n.publications["a"].id)
        with pytest.raises(Absent, match="no publication 'a'"):
            n.publications["a"]
        assert (await n.publications.publish("a", wanted("org/other"))).id != mounted.id


@pytest.mark.trio
async def test_one_that_nobody_binds_ends_and_one_bound_where_we_cannot_see_stays(
    tmp_path: Path, hub: MemoryHub, mock_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        for name in ("unbound", "again", "bound"):
            await n.publications.publish(name, wanted(directory=f"/{name}"))
        n.mounts.bound(n.publications["bound"].id, "/bound")
        mock_clock.jump(BIND_SECONDS_MAX - 1)
        await n.publications.publish("again", wanted(directory="/again"))
        mock_clock.jump(2)
        n.mounts.drop_unbound(set(), trio.current_time())
        assert [p.name for p in n.publications] == ["again", "bound"]
        mock_clock.jump(1e6)
        n.mounts.drop_unbound(set(), trio.current_time())
        assert [p.name for p in n.publications] == ["bound"]


# Pins and prefetch -------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_is_pinned_stays_so_after_the_end(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        mounted = await n.publications.publish("a", wanted(pin=True))
        n.mounts.remove(mounted.id)
        assert set(n.pins.pins) == {"org/name"}
        assert all(entry.blob in n.pins for entry in hub.trees[MODEL, FIRST].files.values())
        await n.housekeeping.unpin(["org/name"])
        with pytest.raises(Invalid, match="whole hub can be neither"):
            await n.publications.publish("b", wanted("", pin=True))


@pytest.mark.trio
async def test_what_cannot_be_pinned_is_not_published(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(tmp_path, hub) as n:

        def refuse(*_: object) -> None:
            raise MantaError("The disk is full.")

        monkeypatch.setattr(n.pins, "add", refuse)
        with pytest.raises(MantaError, match="disk is full"):
            await n.publications.publish("a", wanted(pin=True))
        assert len(n.mounts) == 0


@pytest.mark.trio
async def test_background_fetches_all_of_it_in_spite_of_failures(
    tmp_path: Path, hub: MemoryHub, autojump_clock: MockClock
) -> None:
    async with node(tmp_path, hub) as n, trio.open_nursery() as nursery:
        failed: list[str] = []
        warming = Warming(nursery, n.blobs.fetcher, n.store, lambda _, error: failed.append(error.message))
        hub.private[MODEL] = {ALLOWED}
        mounted = await n.publications.publish("a", wanted(prefetch="background", token=ALLOWED))
        hub.private[MODEL].clear()
        warming.begin(mounted)
        warming.begin(mounted)
        await trio.sleep(1)
        assert n.describe(mounted).cached == 0
        hub.private[MODEL].add(ALLOWED)
        await trio.sleep(30)
        assert n.describe(mounted).cached == n.describe(mounted).size
        assert failed
        warming.end(mounted.id)


@pytest.mark.trio
async def test_the_prefetch_ends_with_its_mount(tmp_path: Path, hub: MemoryHub, autojump_clock: MockClock) -> None:
    async with node(tmp_path, hub) as n, trio.open_nursery() as nursery:
        warming = Warming(nursery, n.blobs.fetcher, n.store, lambda *_: None)
        mounted = await n.publications.publish("a", wanted(prefetch="background"))
        hub.denied |= {mounted.scope.access}
        warming.begin(mounted)
        await trio.sleep(1)
        warming.end(mounted.id)
        warming.end(mounted.id)


@pytest.mark.trio
async def test_only_small_files_of_mounts_that_ask_for_it_are_opened_whole(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        plain = await n.publications.publish("a", wanted())
        place = await file_of(plain, "model.bin")
        assert not n.mounts.opens_whole(place)
        asking = await n.publications.publish("b", wanted("org/other", prefetch="blocking-open"))
        assert n.mounts.opens_whole(place)  # the kernel knows a file by its content
        assert not n.mounts.opens_whole(await file_of(plain, "config.json"))
        n.mounts.remove(asking.id)
        assert not n.mounts.opens_whole(place)


# What the metrics say ------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_volumes_have_series_by_pod_and_repo_and_not_too_many(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volumes_module, "VOLUMES_MAX", 2)
    async with node(tmp_path, hub) as n:
        await n.mount(MountRequest("org/name", "/mine"))  # of no pod
        await n.publications.publish("a", wanted())
        await n.publications.publish("again", wanted("org/name", directory="/again"))
        await n.publications.publish("b", wanted("org/other", directory="/b"))
        await n.publications.publish("c", wanted(directory="/c", pod=Pod("1c", "server-1", "default")))
        blob = hub.trees[OTHER, SECOND].files["copy.bin"].blob
        assert blob is not None
        await n.fetch("org/other")
        size, both = len(WEIGHTS), 2 * (len(WEIGHTS) + 2)
        assert volumes_module.volumes(n.mounts, n.store, [blob], lambda _: 5.0, {blob: 3}) == [
            Volume("default", "server-0", "org/name", both, 2 * size, 10.0, 6),
            Volume("default", "server-0", "org/other", size, size, 5.0, 3),
        ]


# Across daemons ----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_names_tokens_and_prefetch_come_to_the_next_daemon(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        journal = Journal.create()
        mounts = Mounts(n.catalog, n.store, Path("/root"), lambda _: None, journal, n.identity)
        first = module.Publications(mounts, n.identity, n._keep, lambda _: None)
        hub.private[MODEL] = {ALLOWED}
        asked = wanted(token=ALLOWED, prefetch="background", pin=True)
        before = await first.publish("a", asked)
        public = await first.publish("b", wanted("org/other", directory="/b"))
        mounts.bound(before.id, before.directory)
        hub.failure = Unavailable("The hub is not asked for what is taken over.")
        journal_after, recovered = Journal.open(os.dup(journal.fd))
        identity = Identity(ACCESS, lambda: ACCESS)
        hub.latest = identity.latest
        next_mounts = Mounts(n.catalog, n.store, Path("/root"), lambda _: None, None, identity)

        def access(request: MountRequest, name: str) -> Access:
            assert name
            return identity.of_pod(request.token, anonymous=request.anonymous)

        await next_mounts.restore(recovered, access)
        hub.failure = None
        second = module.Publications(next_mounts, identity, n._keep, lambda _: None)
        assert [p.name for p in second] == ["a", "b"]
        after = await second.publish("a", asked)
        assert (after.id, after.commit, after.confirmed) == (before.id, FIRST, True)
        assert after.request == before.request
        assert identity.latest(after.scope.access).token == ALLOWED
        assert after.scope.checked
        assert identity.latest(second["b"].scope.access).is_anonymous
        assert second["b"].id == public.id
        with pytest.raises(Conflict):
            await second.publish("a", wanted("org/other", token=ALLOWED))
        assert isinstance(after.root, Folder)
        for each in (journal, journal_after):
            each.close()
