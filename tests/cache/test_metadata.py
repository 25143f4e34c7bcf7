from __future__ import annotations

import os
from pathlib import Path

import lz4.frame
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.cache import metadata as module
from manta.cache.metadata import MetadataStore, decode_snapshot
from manta.errors import CacheBroken, Invalid, NoSpace
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry, Snapshot
from tests.cache.conftest import blob_id

REPO = RepoId(RepoKind.MODEL, "org/name")
OTHER = RepoId(RepoKind.DATASET, "org/name")
COMMIT, LATER = Commit("ab" * 20), Commit("01" * 20)
TREE = Snapshot.of(
    REPO,
    COMMIT,
    [
        FileEntry("config.json", 570, BlobId(BlobAlgorithm.GIT_SHA1, "0c" * 20), "0c" * 20),
        FileEntry("sub/größe 模型.safetensors", 5 << 40, blob_id(b"x"), "ab" * 20),
        FileEntry("hidden.bin", 0, None),
    ],
    gated=True,
    private=True,
)


@pytest.fixture
def store(tmp_path: Path) -> MetadataStore:
    return MetadataStore(tmp_path)


def test_a_snapshot_comes_back_as_it_was(store: MetadataStore) -> None:
    assert store.snapshot(REPO, COMMIT) is None
    store.save_snapshot(TREE)
    loaded = store.snapshot(REPO, COMMIT)
    assert loaded == TREE
    assert loaded is not None
    assert list(loaded.files) == list(TREE.files)
    assert store.snapshot(OTHER, COMMIT) is None


def test_a_snapshot_is_replaced_when_more_of_it_can_be_seen(store: MetadataStore) -> None:
    store.save_snapshot(TREE)
    seen = Snapshot.of(REPO, COMMIT, [FileEntry("hidden.bin", 0, blob_id(b""))])
    store.save_snapshot(seen)
    assert store.snapshot(REPO, COMMIT) == seen


def test_refs_come_back_with_their_time(store: MetadataStore) -> None:
    assert store.ref(REPO, "main") is None
    store.save_ref(REPO, "main", COMMIT, 100.25)
    store.save_ref(REPO, "refs/pr/1", LATER, 5)
    assert store.ref(REPO, "main") == (COMMIT, 100.25)
    assert store.refs(REPO) == {"main": (COMMIT, 100.25), "refs/pr/1": (LATER, 5.0)}
    store.save_ref(REPO, "main", LATER, 101)
    assert store.ref(REPO, "main") == (LATER, 101.0)
    assert store.refs(OTHER) == {}


def test_what_is_stored_is_listed_and_forgotten(store: MetadataStore, tmp_path: Path) -> None:
    assert store.repos() == []
    store.save_snapshot(TREE)
    store.save_snapshot(Snapshot.of(REPO, LATER, []))
    os.utime(tmp_path / "models--org--name" / "trees" / f"{LATER}.json.lz4", ns=(1, 1))
    store.save_ref(OTHER, "main", COMMIT, 1)
    (tmp_path / "models--org--name" / "trees" / f"{LATER}.json.lz4.tmp").touch()  # left over from a crash
    (tmp_path / "somebody's").mkdir()
    assert store.repos() == [OTHER, REPO]
    assert store.snapshots(REPO) == [LATER, COMMIT]
    store.forget(REPO)
    store.forget(REPO)
    assert store.repos() == [OTHER]
    assert store.snapshots(REPO) == []
    assert store.snapshot(REPO, COMMIT) is None
    assert store.ref(OTHER, "main") == (COMMIT, 1.0)


@pytest.mark.parametrize(
    "revision", ["..", ".", "../../../etc/passwd", "a/b", "/etc", "~", "x" * 300, "模" * 100, "\0"]
)
def test_no_revision_leaves_its_folder(store: MetadataStore, tmp_path: Path, revision: str) -> None:
    store.save_ref(REPO, revision, COMMIT, 1)
    assert store.ref(REPO, revision) == (COMMIT, 1.0)
    assert store.refs(REPO) == {revision: (COMMIT, 1.0)}
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.parent for p in files] == [tmp_path / "models--org--name" / "refs"]
    assert not files[0].name.startswith(".")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, max_size=4))
def test_different_revisions_never_share_a_file(tmp_path_factory: pytest.TempPathFactory, revisions: list[str]) -> None:
    store = MetadataStore(tmp_path_factory.mktemp("meta"))
    for when, revision in enumerate(revisions):
        store.save_ref(REPO, revision, COMMIT, when)
    assert store.refs(REPO) == {revision: (COMMIT, float(when)) for when, revision in enumerate(revisions)}


@pytest.mark.parametrize("commit", ["", "main", "../" * 13 + "x", "AB" * 20, "ab" * 20 + "/"])
def test_what_is_no_commit_never_becomes_a_path(store: MetadataStore, tmp_path: Path, commit: str) -> None:
    with pytest.raises(Invalid):
        store.snapshot(REPO, Commit(commit))
    with pytest.raises(Invalid):
        store.save_ref(REPO, "main", Commit(commit), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_with_any_flipped_bit_is_none_and_is_removed(
    store: MetadataStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")  # thousands of warnings, one per case
    store.save_snapshot(TREE)
    path = tmp_path / "models--org--name" / "trees" / f"{COMMIT}.json.lz4"
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
            loaded = store.snapshot(REPO, COMMIT)
            assert loaded is None or loaded == TREE  # a few bits of the frame's header mean nothing to the reader
            assert path.exists() == (loaded is not None)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert store.snapshot(REPO, COMMIT) is None
        assert not path.exists()


def test_a_tree_under_another_name_is_damaged(store: MetadataStore, tmp_path: Path) -> None:
    store.save_snapshot(TREE)
    trees = tmp_path / "models--org--name" / "trees"
    (trees / f"{COMMIT}.json.lz4").rename(trees / f"{LATER}.json.lz4")
    assert store.snapshot(REPO, LATER) is None
    assert store.snapshots(REPO) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        b"\xff",
        b'{"version":9,"revision":"main","commit":"' + b"ab" * 20 + b'","when":1}',
        b'{"version":1,"revision":"main","commit":"../x","when":1}',
        b'{"version":1,"revision":"other","commit":"' + b"ab" * 20 + b'","when":1}',
    ],
)
def test_a_damaged_ref_is_none_and_is_removed(
    store: MetadataStore, tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_ref(REPO, "main", COMMIT, 1)
    path = tmp_path / "models--org--name" / "refs" / "main.json"
    path.write_bytes(data)
    assert store.ref(REPO, "main") is None
    assert not path.exists()
    assert str(path) in caplog.text


def test_a_full_disk_leaves_what_was_stored(small_disk: Path) -> None:
    store = MetadataStore(small_disk)
    store.save_ref(REPO, "main", COMMIT, 1)
    with (small_disk / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space"):
        ballast.write(bytes(2 << 20))
    many = [FileEntry(f"{n}.bin", n, blob_id(b"%d" % n)) for n in range(1000)]
    with pytest.raises(NoSpace):
        store.save_snapshot(Snapshot.of(REPO, COMMIT, many))
    assert store.snapshot(REPO, COMMIT) is None
    assert store.ref(REPO, "main") == (COMMIT, 1.0)


def test_a_broken_disk_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "refs" / "main.json").mkdir(parents=True)
    (tmp_path / "models--org--name" / "trees").touch()
    store = MetadataStore(tmp_path)
    with pytest.raises(CacheBroken):
        store.ref(REPO, "main")
    with pytest.raises(CacheBroken):
        store.snapshots(REPO)
    with pytest.raises(CacheBroken):
        store.save_snapshot(TREE)


def told(plain: bytes) -> bytes:
    return bytes(lz4.frame.compress(plain, content_checksum=True, store_size=False))


def test_what_is_stored_is_what_nodes_tell_each_other(store: MetadataStore) -> None:
    assert store.encoded(REPO, COMMIT) is None
    store.save_snapshot(TREE)
    data = store.encoded(REPO, COMMIT)
    assert data is not None
    assert decode_snapshot(data, REPO, COMMIT) == TREE
    for repo, commit in ((OTHER, COMMIT), (REPO, LATER)):
        with pytest.raises(Invalid):
            decode_snapshot(data, repo, commit)


def test_a_bomb_is_not_unpacked_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TREE_BYTES_MAX", 1 << 20)
    bomb = told(b" " * (64 << 20))
    assert len(bomb) < 1 << 20
    with pytest.raises(Invalid):
        decode_snapshot(bomb, REPO, COMMIT)


@pytest.mark.parametrize(
    "plain",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"version":1,"repo":"org/name","commit":"%s","gated":false,"private":false,"files":[["a",1e999,"",""]]}'
        % COMMIT.encode(),
        b'{"version":1,"repo":"org/name","commit":"%s","gated":false,"private":false,"files":[["a",-1,"",""]]}'
        % COMMIT.encode(),
        b'{"version":1,"repo":"org/name","commit":"%s","gated":false,"private":false,"files":[["a",%d,"",""]]}'
        % (COMMIT.encode(), 1 << 63),
        b'{"version":1,"repo":"org/name","commit":"%s","gated":false,"private":false,"files":[["a",1,"sha256-..",""]]}'
        % COMMIT.encode(),
        msgspec.json.encode(
            {"version": 2, "repo": "org/name", "commit": COMMIT, "gated": 0, "private": 0, "files": []}
        ),
        b"\xff\xfe",
    ],
)
def test_what_is_no_tree_is_invalid_and_nothing_else(plain: bytes) -> None:
    with pytest.raises(Invalid):
        decode_snapshot(told(plain), REPO, COMMIT)


@given(st.binary(max_size=200))
def test_noise_is_no_tree(noise: bytes) -> None:
    with pytest.raises(Invalid):
        decode_snapshot(noise, REPO, COMMIT)


def test_what_a_repo_is_by_now_holds_for_all_its_trees_and_for_no_others(tmp_path: Path) -> None:
    store = MetadataStore(tmp_path)
    repo, other = RepoId(RepoKind.MODEL, "org/marked"), RepoId(RepoKind.MODEL, "org/other")
    commits = [Commit(letter * 40) for letter in "ab"]
    for of in (repo, other):
        for commit in commits:
            store.save_snapshot(Snapshot.of(of, commit, [FileEntry("x", 3, None, "1" * 40)]))
    store.mark(repo, gated=False, private=True)
    for commit in commits:
        marked, unmarked = MetadataStore(tmp_path).snapshot(repo, commit), store.snapshot(other, commit)
        assert marked is not None
        assert unmarked is not None
        assert (marked.gated, marked.private, list(marked.files)) == (False, True, ["x"])
        assert not unmarked.private
