"""Repos: ids as git computes them, the LFS rule, refs, and who may read."""

import subprocess
from pathlib import Path

import pytest

from manta.testing.hub.content import BytesContent, GeneratedContent
from manta.testing.hub.repository import (
    Blob,
    Catalogue,
    Commit,
    Folder,
    Repository,
    Tree,
    User,
    is_lfs,
    make_blob,
    make_commit,
)


def _tree(**files: str) -> Tree:
    return Tree({path: make_blob(path, BytesContent(text.encode())) for path, text in files.items()})


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [
        ("config.json", 500, False),
        ("config.json", 10 << 20, True),
        ("config.json", (10 << 20) - 1, False),
        ("model.safetensors", 8, True),
        ("sub/dir/weights.bin", 1, True),
        ("empty.safetensors", 0, False),
        ("model.safetensors.index.json", 100, False),
        ("runs/events.out.tfevents.123", 100, True),
    ],
)
def test_lfs_rule(path: str, size: int, expected: bool) -> None:
    assert is_lfs(path, size) is expected


def test_git_computes_the_same_tree_id(tmp_path: Path) -> None:
    files = {
        "README.md": b"hello\n",
        "a/b.txt": b"1",
        "a-b.txt": b"2",
        "a.txt": b"3",
        "a/c/d.json": b"{}",
        "ünï cödé/ß.txt": b"4",
    }
    tree = Tree({path: make_blob(path, BytesContent(data)) for path, data in files.items()})
    for path, data in files.items():
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    written = subprocess.run(["git", "-C", str(tmp_path), "write-tree"], check=True, capture_output=True, text=True)
    assert tree.oid == written.stdout.strip()


def test_an_lfs_blob_has_the_git_id_of_its_pointer() -> None:
    blob = make_blob("model.safetensors", GeneratedContent("x", 1000))
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{blob.sha256}\nsize 1000\n"
    assert blob.pointer_size == len(pointer)
    assert blob.oid == make_blob("pointer.txt", BytesContent(pointer.encode())).oid
    assert blob.id == blob.sha256


def test_tree_lists_folders_and_files_in_order() -> None:
    tree = _tree(**{"b.txt": "b", "a/x/1": "1", "a/y": "2"})
    assert [path for path, _ in tree.children("") or []] == ["a", "b.txt"]
    assert [path for path, _ in tree.children("a") or []] == ["a/x", "a/y"]
    assert [path for path, _ in tree.walk("") or []] == ["a", "a/x", "a/x/1", "a/y", "b.txt"]
    assert [path for path, _ in tree.walk("a/x") or []] == ["a/x/1"]
    assert tree.children("b.txt") is None
    assert tree.walk("nowhere") is None
    assert isinstance(tree.entry("a/x"), Folder)
    assert isinstance(tree.entry("a/y"), Blob)
    assert tree.entry("") is None


@pytest.mark.parametrize("path", ["", "/etc/passwd", "a//b", "../up", "a/./b"])
def test_paths_must_lie_inside_the_repo(path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside a repo"):
        _tree(**{path: "x"})


def test_a_path_cannot_be_file_and_folder() -> None:
    with pytest.raises(ValueError, match="both a file and a folder"):
        _tree(**{"a": "file", "a/b": "file in folder"})


def _repo(**changes: object) -> tuple[Repository, Commit, Commit]:
    first = make_commit(_tree(a="1"), "first")
    second = make_commit(_tree(a="2"), "second", parent=first.id)
    repo = Repository("model", "org/name")
    repo.add(first)
    repo.add(second, branch="main")
    repo.refs.tags["v1"] = first.id
    repo.refs.pulls["1"] = first.id
    repo.refs.converts["parquet"] = first.id
    return repo, first, second


def test_revisions_resolve() -> None:
    repo, first, second = _repo()
    for name in ("v1", "refs/tags/v1", "refs/pr/1", "refs/convert/parquet", first.id):
        assert repo.commit(name) is first
    for name in ("main", "refs/heads/main", second.id):
        assert repo.commit(name) is second
    for name in ("1", "parquet", "nope", "refs/pr/2", "0" * 40):
        assert repo.commit(name) is None
    assert repo.history(second) == [second, first]


def test_commit_ids_depend_on_tree_title_and_parent_only() -> None:
    assert make_commit(_tree(a="1"), "t").id == make_commit(_tree(a="1"), "t").id
    ids = {
        make_commit(_tree(a="1"), "t").id,
        make_commit(_tree(a="2"), "t").id,
        make_commit(_tree(a="1"), "u").id,
        make_commit(_tree(a="1"), "t", parent="0" * 40).id,
    }
    assert len(ids) == 4


def test_who_may_read() -> None:
    repo, _, _ = _repo()
    assert User("org", "t").may_read(repo)
    assert User("x", "t", {"org/name"}).may_read(repo)
    assert User("x", "t", {"org"}).may_read(repo)
    assert not User("x", "t", {"org/other"}).may_read(repo)
    assert not User("x", "t", {""}).may_read(Repository("model", "ownerless"))


def test_forgetting_a_commit_forgets_its_lfs_objects_only() -> None:
    shared = make_blob("shared.bin", GeneratedContent("s", 10))
    old = make_blob("old.bin", GeneratedContent("o", 10))
    repo = Repository("model", "org/name")
    first = make_commit(Tree({"shared.bin": shared, "old.bin": old}), "first")
    repo.add(first)
    repo.add(make_commit(Tree({"renamed.bin": shared}), "second"), branch="main")
    assert repo.paths_of(shared.sha256) == ("shared.bin", "renamed.bin")
    repo.forget(first.id)
    assert repo.lfs_blob(old.sha256) is None
    assert repo.lfs_blob(shared.sha256) is shared
    assert repo.paths_of(shared.sha256) == ("renamed.bin",)


def test_checkpoint_restores_refs_names_rights_and_users() -> None:
    repo, first, second = _repo()
    catalogue = Catalogue([repo], [User("u", "token", {"org/name"})])
    restore = catalogue.checkpoint()
    for _ in range(2):
        repo.refs.branches["main"] = first.id
        repo.private, repo.gated, repo.deleted = True, "auto", True
        catalogue.rename(repo, "org/new")
        catalogue.users.clear()
        restore()
        assert catalogue.repo("model", "org/name") is repo
        assert catalogue.repo_by_key(repo.key) is repo
        assert catalogue.repo("model", "org/new") is None
        assert not catalogue.renamed
        assert repo.commit("main") is second
        assert [repo.private, repo.gated] == [False, False]
        assert catalogue.users["token"].access == {"org/name"}
        catalogue.users["token"].access.clear()
