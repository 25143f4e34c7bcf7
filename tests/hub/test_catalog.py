from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock, wait_all_tasks_blocked

from manta.cache.metadata import MetadataStore
from manta.config import HubConfig
from manta.errors import Absent, CacheBroken, Corrupt, Denied, MantaError, Throttled, Unavailable, Unreachable
from manta.hub import catalog as module
from manta.hub.catalog import (
    ABSENT_S,
    BACKSTOP_S,
    CURRENT_S,
    DENIED_S,
    DISK_S,
    GRANT_S,
    UNAVAILABLE_S,
    Catalog,
    Resolution,
)
from manta.hub.circuit import PATIENCE_S, PROBE_S
from manta.hub.huggingface import HuggingFaceHub
from manta.hub.origin import POD, Access, Origin
from manta.model.ids import Commit, RepoId, RepoKind
from manta.model.snapshot import Snapshot
from manta.testing.hub import CommitSpec, HubProcess, HubSpec, RepoSpec, Text
from tests.hub.fake_origin import FakeOrigin, commit, entry

REPO = RepoId(RepoKind.MODEL, "org/name")
A, B, C = commit("a"), commit("b"), commit("c")
ANONYMOUS, MEMBER, STRANGER = Access.anonymous(), Access("hf_member"), Access("hf_stranger")
DOWN = Unavailable("The hub is down.")


class MemoryStore:
    """A store in memory that can fail."""

    def __init__(self) -> None:
        self.trees: dict[tuple[RepoId, Commit], Snapshot] = {}
        self.named: dict[tuple[RepoId, str], tuple[Commit, float]] = {}
        self.failure: Exception | None = None
        self.writes = 0

    def _touch(self) -> None:
        if self.failure is not None:
            raise self.failure

    def save_snapshot(self, snapshot: Snapshot) -> None:
        self._touch()
        self.writes += 1
        self.trees[snapshot.repo, snapshot.commit] = replace(snapshot)  # a disk hands out no object that it was given

    def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        self._touch()
        return self.trees.get((repo, commit))

    def mark(self, repo: RepoId, *, gated: bool, private: bool) -> None:
        self._touch()
        for (of, at), tree in self.trees.items():
            if of == repo:
                self.trees[of, at] = replace(tree, gated=gated, private=private)

    def save_ref(self, repo: RepoId, revision: str, commit: Commit, when: float) -> None:
        self._touch()
        self.writes += 1
        self.named[repo, revision] = (commit, when)

    def ref(self, repo: RepoId, revision: str) -> tuple[Commit, float] | None:
        self._touch()
        return self.named.get((repo, revision))


@pytest.fixture
def origin() -> FakeOrigin:
    origin = FakeOrigin()
    origin.add(REPO, "main", A, [entry("config.json"), entry("weights/model.bin", "2")])
    return origin


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def catalog(origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, mock_clock: MockClock) -> Catalog:
    return Catalog(origin, store, nursery, clock=lambda: 1000.0)


def test_the_fake_is_an_origin(origin: FakeOrigin) -> None:
    _: Origin = origin


# Revisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_the_origins_word_is_taken_and_kept(catalog: Catalog, origin: FakeOrigin, store: MemoryStore) -> None:
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)
    assert store.named == {(REPO, "main"): (A, 1000.0)}


@pytest.mark.trio
async def test_the_default_branch_is_main(catalog: Catalog, origin: FakeOrigin, store: MemoryStore) -> None:
    assert await catalog.resolve(REPO, None, ANONYMOUS) == await catalog.current(REPO, "main", ANONYMOUS)
    assert list(store.named) == [(REPO, "main")]
    assert len(origin.asked) == 1


@pytest.mark.trio
async def test_many_askers_are_one_question(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.hold()
    found: list[Resolution] = []

    async def ask() -> None:
        found.append(await catalog.resolve(REPO, "main", ANONYMOUS))

    async with trio.open_nursery() as askers:
        for _ in range(20):
            askers.start_soon(ask)
        await wait_all_tasks_blocked()
        origin.open.set()
    assert found == [Resolution(A)] * 20
    assert origin.asked == ["resolve org/name@main"]


@pytest.mark.trio
async def test_an_asker_who_leaves_takes_nothing_from_the_others(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.hold()
    found: list[Resolution] = []
    leaver = trio.CancelScope()

    async def leave() -> None:
        with leaver:
            await catalog.resolve(REPO, "main", ANONYMOUS)

    async def stay() -> None:
        found.append(await catalog.resolve(REPO, "main", ANONYMOUS))

    async with trio.open_nursery() as askers:
        askers.start_soon(leave)  # its question, and it leaves
        await wait_all_tasks_blocked()
        askers.start_soon(stay)
        await wait_all_tasks_blocked()
        leaver.cancel()
        await wait_all_tasks_blocked()
        origin.open.set()
    assert found == [Resolution(A)]
    assert len(origin.asked) == 1


@pytest.mark.trio
async def test_each_asker_gets_an_error_of_its_own(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.hold()
    origin.failure = Throttled("Wait.", 7.0)
    errors: list[MantaError] = []

    async def ask() -> None:
        try:
            await catalog.resolve(REPO, "main", ANONYMOUS)
        except MantaError as error:
            errors.append(error)

    async with trio.open_nursery() as askers:
        for _ in range(3):
            askers.start_soon(ask)
        await wait_all_tasks_blocked()
        origin.open.set()
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, Throttled)
        assert (error.message, error.retry_after_s) == ("Wait.", 7.0)


@pytest.mark.trio
async def test_a_silent_origin_is_given_up_at_the_deadline(
    catalog: Catalog, origin: FakeOrigin, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    origin.hold()
    errors: list[Unavailable] = []

    async def ask() -> None:
        with pytest.raises(Unavailable, match="did not answer within 20 s") as caught:
            await catalog.resolve(REPO, "main", ANONYMOUS)
        errors.append(caught.value)

    async with trio.open_nursery() as askers:
        askers.start_soon(ask)
        await wait_all_tasks_blocked()
        mock_clock.jump(20.0)
        await wait_all_tasks_blocked()
        assert not errors, "the adapter's own account may be on its way"
        mock_clock.jump(BACKSTOP_S)
    assert errors


@pytest.mark.trio
async def test_an_unreachable_origin_leaves_what_it_said_last(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    store.named[REPO, "main"] = (B, 1.0)
    origin.failure = DOWN
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(B, stale=True, reason="The hub is down.")
    origin.failure = None
    assert (await catalog.resolve(REPO, "main", ANONYMOUS)).stale, "not asked again at once"
    mock_clock.jump(UNAVAILABLE_S)
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)


@pytest.mark.trio
async def test_an_unreachable_origin_and_nothing_stored_is_unavailable(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.failure = DOWN
    with pytest.raises(Unavailable, match="hub is down"):
        await catalog.resolve(REPO, "main", ANONYMOUS)


@pytest.mark.trio
async def test_an_origin_out_of_reach_costs_the_next_who_ask_little(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    store.named[REPO, "main"] = (B, 1.0)
    origin.hold()  # it takes connections and says nothing
    outcomes: list[Resolution | MantaError] = []

    async def ask(repo: RepoId) -> None:
        try:
            outcomes.append(await catalog.resolve(repo, "main", ANONYMOUS))
        except MantaError as error:
            outcomes.append(error)

    async def after(seconds: float, repo: RepoId) -> Resolution | MantaError:
        async with trio.open_nursery() as asker:
            asker.start_soon(ask, repo)
            await wait_all_tasks_blocked()
            mock_clock.jump(seconds)
        return outcomes[-1]

    why = (
        "https://hub.example did not answer within 20 s when asked for org/name@main: check the network, or try again."
    )
    assert await after(20.0 + BACKSTOP_S, REPO) == Resolution(B, stale=True, reason=why)
    for name in "abcdefgh":
        refused = await after(PATIENCE_S, RepoId(RepoKind.MODEL, f"org/{name}"))
        assert isinstance(refused, Unreachable)
        assert f"org/{name}@main" in refused.message
        assert "did not answer within 20 s" in refused.message
    asked = len(origin.asked)
    assert 4 <= asked <= 8, "probes, now and then"
    # And it comes back by itself.
    origin.open.set()
    mock_clock.jump(max(PROBE_S, UNAVAILABLE_S))
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)
    assert len(origin.asked) == asked + 1, "the probe's answer is the answer"


@pytest.mark.trio
async def test_a_refusal_says_that_the_origin_is_there(
    catalog: Catalog, origin: FakeOrigin, mock_clock: MockClock
) -> None:
    origin.failure = Unreachable("No connection.")
    for _ in range(3):
        with pytest.raises(Unreachable):
            await catalog.resolve(REPO, "main", ANONYMOUS)
        mock_clock.jump(UNAVAILABLE_S)
    origin.failure = Denied("No.")
    with pytest.raises(Denied):
        await catalog.resolve(REPO, "main", ANONYMOUS)
    origin.failure = None
    assert await catalog.resolve(REPO, "main", MEMBER) == Resolution(A)


@pytest.mark.parametrize("error", [Absent("Gone."), Denied("No."), Corrupt("Wrong.")])
@pytest.mark.trio
async def test_a_refusal_is_not_answered_from_the_store(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, error: MantaError
) -> None:
    store.named[REPO, "main"] = (B, 1.0)
    origin.failure = error
    with pytest.raises(type(error), match=error.message):
        await catalog.resolve(REPO, "main", ANONYMOUS)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (Absent("Gone."), ABSENT_S),
        (Denied("No."), DENIED_S),
        (Unavailable("Down."), UNAVAILABLE_S),
        (Throttled("Wait.", 50.0), 50.0),
    ],
)
@pytest.mark.trio
async def test_a_refusal_is_believed_for_a_while(
    catalog: Catalog,
    origin: FakeOrigin,
    store: MemoryStore,
    mock_clock: MockClock,
    error: MantaError,
    seconds: float,
) -> None:
    origin.failure = error
    for _ in range(5):
        with pytest.raises(type(error)):
            await catalog.resolve(REPO, "main", ANONYMOUS)
    assert len(origin.asked) == 1
    origin.failure = None
    assert await catalog.resolve(REPO, "main", MEMBER) == Resolution(A), "another access is another question"
    store.named.clear()
    mock_clock.jump(seconds - 0.1)
    with pytest.raises(type(error)):
        await catalog.resolve(REPO, "main", ANONYMOUS)
    mock_clock.jump(0.1)
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)


@pytest.mark.trio
async def test_what_is_remembered_is_bounded(
    catalog: Catalog, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, store: MemoryStore
) -> None:
    monkeypatch.setattr(module, "ANSWERS_MAX", 8)
    small = Catalog(origin, store, nursery)
    for n in range(50):
        with pytest.raises(Absent):
            await small.resolve(REPO, f"no-{n}", ANONYMOUS)
    with pytest.raises(Absent):
        await small.resolve(REPO, "no-49", ANONYMOUS)
    assert len(origin.asked) == 50
    with pytest.raises(Absent):
        await small.resolve(REPO, "no-0", ANONYMOUS)
    assert len(origin.asked) == 51


@pytest.mark.trio
async def test_too_many_questions_at_once_are_refused(
    catalog: Catalog, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLIGHTS_MAX", 2)
    origin.hold()
    async with trio.open_nursery() as askers:
        for access in (ANONYMOUS, MEMBER):
            askers.start_soon(catalog.resolve, REPO, "main", access)
        await wait_all_tasks_blocked()
        with pytest.raises(Unavailable, match="waiting for an answer"):
            await catalog.resolve(REPO, "another", ANONYMOUS)
        origin.open.set()


@pytest.mark.trio
async def test_current_asks_no_more_often_than_it_must(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    for _ in range(5):
        assert await catalog.current(REPO, "main", ANONYMOUS) == Resolution(A)
    assert len(origin.asked) == 1
    origin.refs[REPO, "main"] = B
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(B), "resolve asks"
    assert await catalog.current(REPO, "main", ANONYMOUS) == Resolution(B), "and current knows"
    origin.refs[REPO, "main"] = C
    mock_clock.jump(CURRENT_S)
    assert await catalog.current(REPO, "main", ANONYMOUS) == Resolution(C)
    assert store.named[REPO, "main"][0] == C


@pytest.mark.trio
async def test_an_unchanged_ref_is_not_written_again(
    catalog: Catalog, store: MemoryStore, mock_clock: MockClock
) -> None:
    for _ in range(10):
        mock_clock.jump(CURRENT_S)
        await catalog.current(REPO, "main", ANONYMOUS)
    assert store.writes == 1
    mock_clock.jump(module.NOTED_S)
    await catalog.current(REPO, "main", ANONYMOUS)
    assert store.writes == 2


@pytest.mark.trio
async def test_a_commit_whose_tree_is_stored_needs_no_hub(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore
) -> None:
    store.trees[REPO, B] = Snapshot.of(REPO, B, [entry("x")])
    assert await catalog.resolve(REPO, B, ANONYMOUS) == Resolution(B)
    assert (await catalog.snapshot(REPO, B, ANONYMOUS)).files.keys() == {"x"}
    assert not origin.asked


@pytest.mark.trio
async def test_a_commit_that_is_not_stored_is_asked_for_and_no_ref(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore
) -> None:
    assert await catalog.resolve(REPO, A, ANONYMOUS) == Resolution(A)
    assert origin.asked == [f"resolve org/name@{A}"]
    assert not store.named


@pytest.mark.trio
async def test_offline_nothing_is_asked(origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery) -> None:
    catalog = Catalog(origin, store, nursery, offline=True)
    for revision in ("main", A):
        with pytest.raises(Unavailable, match=r"offline mode is on.*HF_HUB_OFFLINE"):
            await catalog.resolve(REPO, revision, ANONYMOUS)
    with pytest.raises(Unavailable, match="offline mode is on"):
        await catalog.snapshot(REPO, A, ANONYMOUS)
    store.named[REPO, "main"] = (B, 1.0)
    store.trees[REPO, B] = Snapshot.of(REPO, B, [entry("x")])
    found = await catalog.resolve(REPO, None, ANONYMOUS)
    assert (found.commit, found.stale) == (B, True)
    assert "offline mode" in found.reason
    assert (await catalog.snapshot(REPO, B, ANONYMOUS)).files
    assert not origin.asked


# Trees ---------------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_tree_is_asked_for_once_and_stored(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery
) -> None:
    async with trio.open_nursery() as askers:
        for _ in range(10):
            askers.start_soon(catalog.snapshot, REPO, A, ANONYMOUS)
    first = await catalog.snapshot(REPO, A, MEMBER)
    assert first.files.keys() == {"config.json", "weights/model.bin"}
    assert origin.asked == ["snapshot org/name@a"]
    assert store.trees[REPO, A] == first
    origin.failure = DOWN
    later = Catalog(origin, store, nursery)
    assert await later.snapshot(REPO, A, ANONYMOUS) == first


@pytest.mark.trio
async def test_a_tree_that_no_filesystem_can_show_is_corrupt_and_not_stored(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore
) -> None:
    origin.trees[REPO, A] = [entry("a"), entry("a/b")]
    with pytest.raises(Corrupt):
        await catalog.snapshot(REPO, A, ANONYMOUS)
    assert not store.trees
    store.trees[REPO, A] = Snapshot.of(REPO, A, [entry("../evil")])
    origin.trees[REPO, A] = [entry("fine")]
    with trio.fail_after(5):
        assert (await catalog.snapshot(REPO, A, MEMBER)).files.keys() == {"fine"}


@pytest.mark.trio
async def test_only_so_many_trees_stay_in_memory(
    origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_FILES_MAX", 5)
    catalog = Catalog(origin, store, nursery)
    for letter in "abc":
        origin.trees[REPO, commit(letter)] = [entry(f"{n}") for n in range(2)]
        await catalog.snapshot(REPO, commit(letter), ANONYMOUS)
    store.failure = CacheBroken("The disk is gone.")
    for letter in "bc":
        await catalog.snapshot(REPO, commit(letter), ANONYMOUS)
    assert len(origin.asked) == 3
    await catalog.snapshot(REPO, A, ANONYMOUS)
    assert len(origin.asked) == 4
    origin.trees[REPO, commit("d")] = [entry(f"{n}") for n in range(9)]
    for _ in range(3):
        await catalog.snapshot(REPO, commit("d"), ANONYMOUS)
    assert len(origin.asked) == 5, "one that alone is too large stays while it is the latest"


@pytest.mark.trio
async def test_a_tree_of_many_pages_has_more_time_than_one_question(
    catalog: Catalog, origin: FakeOrigin, mock_clock: MockClock
) -> None:
    """250 pages, each of which had its own deadline, may take a second each."""
    origin.open = trio.Event()
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            assert (await catalog.snapshot(REPO, A, ANONYMOUS)).files

        nursery.start_soon(look)
        await wait_all_tasks_blocked()
        mock_clock.jump(250)
        await wait_all_tasks_blocked()
        origin.open.set()


@pytest.mark.trio
async def test_a_tree_that_somebody_holds_is_never_in_memory_twice(
    origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SNAPSHOT_FILES_MAX", 1)
    catalog = Catalog(origin, store, nursery)
    for letter in "ab":
        origin.trees[REPO, commit(letter)] = [entry(f"{n}") for n in range(2)]
    held = await catalog.snapshot(REPO, A, ANONYMOUS)
    await catalog.snapshot(REPO, commit("b"), ANONYMOUS)
    assert await catalog.snapshot(REPO, A, ANONYMOUS) is held


@pytest.mark.trio
async def test_a_store_that_fails_stops_nothing(
    catalog: Catalog, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = CacheBroken("The disk is gone.")
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)
    assert (await catalog.snapshot(REPO, A, ANONYMOUS)).files
    assert "The disk is gone." in caplog.text


@pytest.mark.trio
async def test_a_disk_that_hangs_stops_nothing_either(
    catalog: Catalog, store: MemoryStore, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, end = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        end.wait(10)

    monkeypatch.setattr(store, "save_ref", hang)
    async with trio.open_nursery() as askers:

        async def ask() -> None:
            assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)

        askers.start_soon(ask)
        await trio.to_thread.run_sync(hangs.wait)
        mock_clock.jump(DISK_S)
    end.set()


@pytest.mark.trio
async def test_a_bug_in_an_adapter_ends_the_question_and_not_the_daemon(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await catalog.resolve(REPO, "main", ANONYMOUS)
    origin.failure = None
    assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(A)


@pytest.mark.trio
async def test_askers_are_told_when_the_daemon_stops(origin: FakeOrigin, store: MemoryStore) -> None:
    origin.hold()
    async with trio.open_nursery() as daemon, trio.open_nursery() as askers:
        catalog = Catalog(origin, store, daemon)

        async def ask() -> None:
            with pytest.raises(Unavailable, match="stopping"):
                await catalog.resolve(REPO, "main", ANONYMOUS)

        askers.start_soon(ask)
        await wait_all_tasks_blocked()
        with trio.CancelScope(shield=True):
            daemon.cancel_scope.cancel()
            await wait_all_tasks_blocked()


# Who may see what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gated(origin: FakeOrigin) -> FakeOrigin:
    origin.members[REPO] = {MEMBER}
    return origin


@pytest.mark.trio
async def test_a_masked_tree_is_given_and_never_stored(
    catalog: Catalog, gated: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    for _ in range(3):
        masked = await catalog.snapshot(REPO, A, ANONYMOUS)
        assert all(file.blob is None for file in masked.files.values())
    denial = catalog.denial(masked, ANONYMOUS)
    assert denial is not None
    assert "https://hub.example/org/name" in denial.message
    assert not store.trees
    assert len(gated.asked) == 1
    gated.members[REPO].add(ANONYMOUS)
    mock_clock.jump(DENIED_S)
    assert catalog.denial(await catalog.snapshot(REPO, A, ANONYMOUS), ANONYMOUS) is None
    assert store.trees


@pytest.mark.trio
async def test_a_stored_gated_tree_is_for_those_whom_the_origin_shows_it(
    catalog: Catalog, gated: FakeOrigin, mock_clock: MockClock
) -> None:
    tree = await catalog.snapshot(REPO, A, MEMBER)
    assert await catalog.snapshot(REPO, A, MEMBER) is tree
    assert len(gated.asked) == 1
    other = await catalog.snapshot(REPO, A, STRANGER)
    assert catalog.denial(other, STRANGER) is not None
    assert await catalog.snapshot(REPO, A, MEMBER) is tree
    gated.members[REPO].remove(MEMBER)
    mock_clock.jump(GRANT_S)
    assert catalog.denial(await catalog.snapshot(REPO, A, MEMBER), MEMBER) is not None


@pytest.mark.trio
async def test_a_repo_that_was_opened_is_stored_as_open(
    catalog: Catalog, gated: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    await catalog.snapshot(REPO, A, MEMBER)
    assert store.trees[REPO, A].gated
    del gated.members[REPO]
    await catalog.snapshot(REPO, A, STRANGER)
    assert not store.trees[REPO, A].gated
    gated.failure = DOWN
    assert (await catalog.snapshot(REPO, A, ANONYMOUS)).files


@pytest.mark.trio
async def test_a_question_for_a_tree_is_not_a_question_for_its_commit(catalog: Catalog, origin: FakeOrigin) -> None:
    origin.failure = DOWN
    with pytest.raises(Unavailable):
        await catalog.snapshot(REPO, A, ANONYMOUS)
    origin.failure = None
    assert await catalog.resolve(REPO, A, ANONYMOUS) == Resolution(A)


@pytest.mark.trio
async def test_a_stored_private_tree_is_refused_to_strangers(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore
) -> None:
    store.trees[REPO, A] = Snapshot.of(REPO, A, [entry("x")], private=True)
    origin.failure = Absent("It does not exist, or the token may not see it.")
    with pytest.raises(Absent):
        await catalog.snapshot(REPO, A, STRANGER)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.trio
async def test_without_a_hub_the_owner_goes_on_and_strangers_wait(
    origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, offline: bool
) -> None:
    catalog = Catalog(origin, store, nursery, offline=offline, owner=MEMBER)
    stored = store.trees[REPO, A] = Snapshot.of(REPO, A, [entry("x")], gated=True)
    origin.failure = DOWN
    assert await catalog.snapshot(REPO, A, MEMBER) == stored
    for access in (STRANGER, ANONYMOUS):
        with pytest.raises(Unavailable, match="private or gated, and whether the token in use may read it"):
            await catalog.snapshot(REPO, A, access)


# A pod's right, asked at each publish ---------------------------------------------------------------------------------


@pytest.fixture
def shown(gated: FakeOrigin, store: MemoryStore) -> FakeOrigin:
    """Everything is stored, as somebody who may read it has left it."""
    store.trees[REPO, A] = Snapshot.of(REPO, A, gated.trees[REPO, A], gated=True)
    return gated


@pytest.mark.parametrize("access", [STRANGER, ANONYMOUS])
@pytest.mark.trio
async def test_who_may_not_read_a_gated_repo_is_refused_with_all_of_it_stored(
    catalog: Catalog, shown: FakeOrigin, access: Access
) -> None:
    await catalog.authorise(REPO, A, MEMBER)
    with pytest.raises(Denied, match=r"https://hub\.example/org/name"):
        await catalog.authorise(REPO, A, access)


@pytest.mark.trio
async def test_a_pod_is_told_which_secret_and_which_page(catalog: Catalog, shown: FakeOrigin) -> None:
    for access, words in (
        (Access("", POD), "name a secret of the pod's namespace"),
        (Access("hf_pods", POD), "accept its conditions or ask for access at"),
    ):
        with pytest.raises(Denied, match=words) as caught:
            await catalog.authorise(REPO, A, access)
        assert "nodePublishSecretRef" in caught.value.message
        assert "hf auth login" not in caught.value.message
        assert "hf_pods" not in caught.value.message


@pytest.mark.trio
async def test_a_repo_that_turned_private_is_refused_also_by_its_commit_and_from_then_on_without_the_origin(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    tree = await catalog.snapshot(REPO, A, ANONYMOUS)
    await catalog.authorise(REPO, A, ANONYMOUS)
    origin.failure = Absent("org/name does not exist, or it is private.")
    await catalog.authorise(REPO, A, ANONYMOUS)  # remembered
    mock_clock.jump(GRANT_S)
    with pytest.raises(Absent, match="private"):
        await catalog.authorise(REPO, A, ANONYMOUS)
    origin.failure = DOWN
    mock_clock.jump(ABSENT_S)
    with pytest.raises(Unavailable):
        await catalog.authorise(REPO, A, ANONYMOUS)
    assert catalog.hidden(tree)
    later = Catalog(origin, store, nursery)
    with pytest.raises(Unavailable):
        await later.authorise(REPO, A, ANONYMOUS)
    # And back.
    origin.failure = None
    mock_clock.jump(UNAVAILABLE_S)
    await later.authorise(REPO, A, ANONYMOUS)
    origin.failure = DOWN
    await Catalog(origin, store, nursery).authorise(REPO, A, ANONYMOUS)


@pytest.mark.trio
async def test_that_a_repo_turned_private_holds_for_its_older_commits(
    catalog: Catalog, origin: FakeOrigin, store: MemoryStore, mock_clock: MockClock
) -> None:
    await catalog.snapshot(REPO, A, ANONYMOUS)
    origin.private.add(REPO)
    origin.add(REPO, "main", B, [entry("new")])
    await catalog.snapshot(REPO, (await catalog.resolve(REPO, "main", MEMBER)).commit, MEMBER)
    assert all(tree.private for tree in store.trees.values())
    origin.failure = DOWN
    mock_clock.jump(GRANT_S)
    with pytest.raises(Unavailable):
        await catalog.authorise(REPO, A, ANONYMOUS)


@pytest.mark.trio
async def test_a_right_is_the_tokens_and_is_remembered_for_a_minute(
    catalog: Catalog, shown: FakeOrigin, mock_clock: MockClock
) -> None:
    await catalog.authorise(REPO, A, MEMBER)
    asked = len(shown.asked)
    for _ in range(3):
        await catalog.authorise(REPO, A, MEMBER)
        await catalog.authorise(REPO, A, Access(MEMBER.token, POD))
    assert len(shown.asked) == asked
    shown.members[REPO].clear()
    mock_clock.jump(60.0)
    with pytest.raises(Denied):
        await catalog.authorise(REPO, A, MEMBER)


@pytest.mark.trio
async def test_what_was_heard_of_a_repo_does_not_prolong_the_minute(
    catalog: Catalog, origin: FakeOrigin, mock_clock: MockClock
) -> None:
    await catalog.snapshot(REPO, A, ANONYMOUS)
    await catalog.resolve(REPO, "main", ANONYMOUS)
    mock_clock.jump(GRANT_S - 1)
    await catalog.authorise(REPO, A, ANONYMOUS)
    origin.failure = Absent("It is private now.")
    mock_clock.jump(1)
    with pytest.raises(Absent):
        await catalog.authorise(REPO, A, ANONYMOUS)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.trio
async def test_without_an_origin_what_is_public_goes_on_and_a_right_only_while_it_is_remembered(
    shown: FakeOrigin, store: MemoryStore, nursery: trio.Nursery, mock_clock: MockClock, offline: bool
) -> None:
    public = RepoId(RepoKind.MODEL, "org/public")
    store.trees[public, B] = Snapshot.of(public, B, [entry("x")])
    catalog = Catalog(shown, store, nursery, offline=offline, owner=MEMBER)
    if not offline:
        await catalog.authorise(REPO, A, MEMBER)
    shown.failure = DOWN
    await catalog.authorise(public, B, ANONYMOUS)
    if not offline:
        await catalog.authorise(REPO, A, MEMBER)
        mock_clock.jump(GRANT_S)
    for access in (MEMBER, STRANGER, ANONYMOUS):  # the owner too: it is a pod that asks
        with pytest.raises(Unavailable):
            await catalog.authorise(REPO, A, access)


@pytest.mark.trio
async def test_many_pods_are_one_question(catalog: Catalog, shown: FakeOrigin) -> None:
    shown.hold()
    async with trio.open_nursery() as pods:
        for _ in range(50):
            pods.start_soon(catalog.authorise, REPO, A, MEMBER)
        await wait_all_tasks_blocked()
        shown.open.set()
    assert shown.asked == ["resolve org/name@None", "read org/name@a/config.json"]


@pytest.mark.trio
async def test_a_new_token_of_the_daemon_is_asked_about_anew(
    shown: FakeOrigin, store: MemoryStore, nursery: trio.Nursery
) -> None:
    latest = {MEMBER: MEMBER}
    catalog = Catalog(shown, store, nursery, owner=MEMBER, latest=lambda access: latest.get(access, access))
    await catalog.authorise(REPO, A, MEMBER)
    shown.members[REPO].clear()
    latest[MEMBER] = STRANGER
    with pytest.raises(Denied):
        await catalog.authorise(REPO, A, MEMBER)


@pytest.mark.trio
async def test_with_the_real_store(
    origin: FakeOrigin, nursery: trio.Nursery, tmp_path: Path, mock_clock: MockClock
) -> None:
    first = Catalog(origin, MetadataStore(tmp_path), nursery)
    tree = await first.snapshot(REPO, (await first.resolve(REPO, None, ANONYMOUS)).commit, ANONYMOUS)
    origin.failure = DOWN
    later = Catalog(origin, MetadataStore(tmp_path), nursery)
    found = await later.resolve(REPO, "main", ANONYMOUS)
    assert (found.commit, found.stale) == (A, True)
    assert await later.snapshot(REPO, A, ANONYMOUS) == tree


@pytest.mark.trio
async def test_with_the_real_adapter_and_the_faithful_hub(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manta.hub.client.RETRY_WAITS_S", (0.01,))
    first, second = (CommitSpec(name=name, files={"config.json": Text(name)}) for name in ("first", "second"))
    spec = HubSpec(repos=[RepoSpec(id="org/name", commits=[first, second], branches={"main": "first"})])
    with HubProcess(spec) as process:
        commits = [Commit(process.files("org/name", name).commit) for name in ("first", "second")]
        origin = HuggingFaceHub(HubConfig(endpoint=process.endpoint))
        catalog = Catalog(origin, MetadataStore(tmp_path), nursery)
        assert await catalog.resolve(REPO, None, ANONYMOUS) == Resolution(commits[0])
        tree = await catalog.snapshot(REPO, commits[0], ANONYMOUS)
        process.move_branch("org/name", "second")
        assert await catalog.current(REPO, "main", ANONYMOUS) == Resolution(commits[0]), "believed for a while"
        with pytest.raises(Absent, match="no revision 'v9'"):
            await catalog.resolve(REPO, "v9", ANONYMOUS)
        assert await catalog.resolve(REPO, "main", ANONYMOUS) == Resolution(commits[1])
        process.set_listening("hub", accept=False)
        stale = await catalog.resolve(REPO, "main", ANONYMOUS)
        assert (stale.commit, stale.stale) == (commits[1], True)
        assert "connection refused" in stale.reason
        later = Catalog(origin, MetadataStore(tmp_path), nursery)
        assert await later.snapshot(REPO, commits[0], ANONYMOUS) == tree
        with pytest.raises(Unavailable, match="HF_ENDPOINT"):
            await later.snapshot(REPO, commits[1], ANONYMOUS)
