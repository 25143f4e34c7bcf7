"""Folders as hubs: layout, commits that follow the files, and files that change underneath."""

import asyncio
import os
from pathlib import Path

import pytest

from manta.testing.hub.content import ContentChangedError
from manta.testing.hub.digest_index import DigestIndex
from manta.testing.hub.folder import COMMITS_MAX, FolderSource, find_repos
from manta.testing.hub.repository import Catalogue, Repository
from manta.testing.hub.routes import Route

INFO = Route("info", "model", "org/name")


def _write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    _write(folder, **{"org/name/config.json": "{}", "org/name/sub/model.safetensors": "weights"})
    return folder


@pytest.fixture
def source(root: Path) -> tuple[FolderSource, Catalogue]:
    catalogue = Catalogue()
    return FolderSource(str(root), catalogue, DigestIndex(), rescan_s=0), catalogue


def _repo(source: tuple[FolderSource, Catalogue], route: Route = INFO) -> Repository | None:
    asyncio.run(source[0].refresh(route))
    return source[1].repo(route.repo_type, route.repo_id)


def _commit(source: tuple[FolderSource, Catalogue]) -> str:
    repo = _repo(source)
    assert repo is not None
    return repo.refs.branches["main"]


def test_layout(tmp_path: Path) -> None:
    _write(
        tmp_path,
        **{
            "org/one/config.json": "",
            "org/two/deep/x.txt": "",
            "ownerless/config.json": "",
            "datasets/org/data/train.csv": "",
            "spaces/org/app/app.py": "",
            "bad name/x/config.json": "",
            ".cache/org/x/config.json": "",
        },
    )
    assert set(find_repos(str(tmp_path))) == {
        ("model", "org/one"),
        ("model", "org/two"),
        ("model", "ownerless"),
        ("dataset", "org/data"),
        ("space", "org/app"),
    }


def test_a_folder_that_is_itself_a_model(root: Path) -> None:
    assert find_repos(str(root / "org" / "name")) == {("model", "local/name"): str(root / "org" / "name")}


def test_commits_follow_the_files_alone(root: Path, source: tuple[FolderSource, Catalogue], tmp_path: Path) -> None:
    first = _commit(source)
    assert _commit(source) == first
    copy = tmp_path / "elsewhere"
    _write(copy, **{"org/name/config.json": "{}", "org/name/sub/model.safetensors": "weights"})
    assert _commit((FolderSource(str(copy), catalogue := Catalogue(), DigestIndex()), catalogue)) == first
    os.utime(root / "org/name/config.json", (1, 1))
    assert _commit(source) == first


def test_changed_files_make_a_new_commit(root: Path, source: tuple[FolderSource, Catalogue]) -> None:
    first = _commit(source)
    _write(root, **{"org/name/config.json": '{"a": 1}', "org/name/new.txt": "new"})
    second = _commit(source)
    repo = _repo(source)
    assert repo is not None
    assert second != first
    assert set(repo.commits[second].tree.files) == {"config.json", "new.txt", "sub/model.safetensors"}
    old = repo.commits[first].tree.files
    assert old["sub/model.safetensors"].content.read() == b"weights"
    with pytest.raises(ContentChangedError):
        old["config.json"].content.read()


def test_a_frozen_commit_does_not_look_at_the_folder(root: Path, source: tuple[FolderSource, Catalogue]) -> None:
    first = _commit(source)
    _write(root, **{"org/name/new.txt": "new"})
    repo = _repo(source, Route("resolve", "model", "org/name", first, "config.json"))
    assert repo is not None
    assert repo.refs.branches["main"] == first


def test_repos_come_and_go(root: Path, source: tuple[FolderSource, Catalogue]) -> None:
    later = Route("info", "model", "org/later")
    assert _repo(source, later) is None
    _write(root, **{"org/later/config.json": "{}"})
    assert _repo(source, later) is not None
    (root / "org/later/config.json").unlink()
    (root / "org/later").rmdir()
    assert _repo(source, later) is None


def test_names_outside_the_folder_cannot_be_asked_for(root: Path, source: tuple[FolderSource, Catalogue]) -> None:
    _write(root.parent, **{"secret/name/config.json": "{}"})
    assert _repo(source, Route("info", "model", "../secret/name")) is None
    assert _repo(source, Route("info", "model", "..")) is None


def test_links_to_files_are_followed_and_broken_ones_left_out(
    root: Path, source: tuple[FolderSource, Catalogue]
) -> None:
    target = root.parent / "blob"
    target.write_text("linked")
    (root / "org/name/link.txt").symlink_to(target)
    (root / "org/name/broken.txt").symlink_to(root / "nowhere")
    _write(root, **{"org/name/.git/HEAD": "x", "org/name/.cache/huggingface/x": "x", "org/name/.gitattributes": "x"})
    repo = _repo(source)
    assert repo is not None
    commit = repo.commit("main")
    assert commit is not None
    assert set(commit.tree.files) == {".gitattributes", "config.json", "link.txt", "sub/model.safetensors"}
    assert commit.tree.files["link.txt"].content.read() == b"linked"


def test_old_commits_are_forgotten(root: Path, source: tuple[FolderSource, Catalogue]) -> None:
    for number in range(COMMITS_MAX + 3):
        _write(root, **{"org/name/config.json": str(number)})
        _commit(source)
    repo = _repo(source)
    assert repo is not None
    assert len(repo.commits) == COMMITS_MAX
    assert repo.commit("main") is not None


def test_it_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        FolderSource(str(tmp_path / "nowhere"), Catalogue(), DigestIndex())
