from __future__ import annotations

import pytest

from manta.errors import Corrupt
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import Contents, FileEntry, Snapshot

REPO = RepoId(RepoKind.MODEL, "org/name")
COMMIT = Commit("ab" * 20)
BLOB = BlobId(BlobAlgorithm.SHA256, "cd" * 32)


def snapshot(*paths: str) -> Snapshot:
    return Snapshot.of(REPO, COMMIT, [FileEntry(path, 10, BLOB) for path in paths])


def test_folders_have_their_children_in_byte_order() -> None:
    tree = snapshot("b.txt", "a/z", "a/é", "a/B", "a/b/c", "Z").folders
    assert list(tree) == ["", "a", "a/b"]
    assert list(tree[""]) == ["Z", "a", "b.txt"]
    assert list(tree["a"]) == ["B", "b", "z", "é"]
    assert tree[""]["a"] is None
    assert tree["a"]["b"] is None
    assert tree["a/b"]["c"] == FileEntry("a/b/c", 10, BLOB)


def test_an_empty_repo_is_an_empty_folder() -> None:
    assert snapshot().folders == {"": {}}
    assert snapshot().contents == Contents(0, 0, {})


@pytest.mark.parametrize("path", ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b"])
def test_a_tree_with_an_impossible_path_is_corrupt(path: str) -> None:
    with pytest.raises(Corrupt, match="not a path"):
        _ = snapshot("ok", path).folders


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c")])
def test_a_file_that_is_a_folder_too_is_corrupt(paths: tuple[str, str]) -> None:
    with pytest.raises(Corrupt):
        _ = snapshot(*paths).folders


def test_below_a_subfolder() -> None:
    tree = snapshot("a/b", "a/c/d", "ab/c", "a.txt")
    assert [f.path for f in tree.below("a")] == ["a/b", "a/c/d"]
    assert [f.path for f in tree.below("a/c")] == ["a/c/d"]
    assert len(list(tree.below(""))) == 4
    assert list(tree.below("a/nothing")) == []


def test_files_are_summed_up_by_folder() -> None:
    tree = snapshot("a/b", "a/c/d", "ab/c", "a.txt")
    assert tree.contents == Contents(4, 40, {BLOB: 4})
    assert tree.contents_of("a") == Contents(2, 20, {BLOB: 2})


def test_a_snapshot_cannot_be_changed() -> None:
    tree = snapshot("a")
    with pytest.raises(TypeError):
        tree.files["b"] = tree.files["a"]  # type: ignore[index]
