"""The latest sentences about what went wrong: bounded, each once, each with its repo."""

from __future__ import annotations

from manta.errors import Denied, NoSpace, Unavailable
from manta.fetch.sources import Provenance
from manta.model.ids import Commit, RepoId
from manta.operations.failures import RECENT_MAX, RECENT_PER_MOUNT, Failures
from tests.fs.fakes import ACCESS, FIRST, MODEL, OTHER, SECOND, plain


def of(repo: RepoId = MODEL, commit: Commit = FIRST) -> Provenance:
    return Provenance(repo, commit, plain("a", b""), ACCESS)


def test_each_sentence_is_kept_once_and_the_newest_is_last() -> None:
    failures = Failures()
    failures.add(of(), Unavailable("slow"))
    failures.add(of(), Denied("no"))
    failures.add(of(), Unavailable("slow"))
    assert failures.all() == ["no", "slow"]


def test_they_belong_to_their_repo_and_commit() -> None:
    failures = Failures()
    failures.add(of(), Unavailable("one"))
    failures.add(of(commit=SECOND), Unavailable("two"))
    failures.add(of(OTHER), Unavailable("three"))
    failures.add_general(NoSpace("full"))
    assert failures.of({(MODEL, FIRST)}) == ["one"]
    assert failures.of({(MODEL, FIRST), (OTHER, FIRST)}) == ["one", "three"]
    assert failures.of(set()) == []
    assert failures.all() == ["one", "two", "three", "full"]


def test_what_a_repo_has_already_is_not_said_again_in_general() -> None:
    failures = Failures()
    failures.add(of(), Unavailable("slow"))
    failures.add_general(Unavailable("slow"))
    failures.add_general(Unavailable("stuck"))
    failures.add_general(Unavailable("stuck"))
    assert failures.all() == ["slow", "stuck"]


def test_they_are_bounded() -> None:
    failures = Failures()
    for n in range(1000):
        failures.add(of(), Unavailable(f"failure {n}"))
    assert failures.all() == [f"failure {n}" for n in range(1000 - RECENT_MAX, 1000)]
    assert failures.of({(MODEL, FIRST)}) == [f"failure {n}" for n in range(1000 - RECENT_PER_MOUNT, 1000)]


def test_a_noisy_repo_does_not_drown_the_others_at_once() -> None:
    failures = Failures()
    failures.add(of(OTHER), Unavailable("quiet"))
    for n in range(2 * RECENT_MAX):
        failures.add(of(), Unavailable(f"noise {n}"))
    assert failures.of({(OTHER, FIRST)}) == ["quiet"]
