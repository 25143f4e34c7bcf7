from __future__ import annotations

from pathlib import Path

import pytest

from manta.cache.layout import Layout, blob_of, node_id
from manta.errors import CacheBroken, Invalid
from manta.model.ids import BlobAlgorithm, BlobId

BLOB = BlobId(BlobAlgorithm.GIT_SHA1, "3f" * 20)


def prepared(directory: Path) -> Layout:
    layout = Layout(directory)
    layout.claim()
    layout.prepare()
    return layout


def test_a_new_cache_is_closed_to_others_and_tagged_for_backup_tools(tmp_path: Path) -> None:
    layout = prepared(tmp_path / "a" / "cache")
    for path in (layout.directory, layout.blobs, layout.meta):
        assert path.stat().st_mode & 0o777 == 0o700
    assert layout.tag.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert layout.version.read_text() == "1\n"


def test_an_empty_directory_becomes_one_and_is_closed(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o755)
    (directory / "lost+found").mkdir()
    prepared(directory)
    prepared(directory)
    assert directory.stat().st_mode & 0o777 == 0o700


def test_somebodys_directory_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    tmp_path.chmod(0o755)
    with pytest.raises(Invalid, match="is no Manta cache and is not empty"):
        Layout(tmp_path).claim()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_daemon_killed_while_it_made_the_cache_is_no_obstacle(tmp_path: Path) -> None:
    layout = prepared(tmp_path)
    layout.version.rename(tmp_path / "version.tmp")
    layout.lock.touch()
    prepared(tmp_path)
    assert layout.version.read_text() == "1\n"


def test_a_cache_of_a_newer_manta_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path).version.write_text("2\n")
    with pytest.raises(Invalid, match=r"newer Manta \(format 2; this one knows 1\)"):
        Layout(tmp_path).claim()


@pytest.mark.parametrize("text", ["", "one", "\0\0"])
def test_a_damaged_version_is_an_error_that_says_what_to_do(tmp_path: Path, text: str) -> None:
    prepared(tmp_path).version.write_text(text)
    with pytest.raises(CacheBroken, match="should hold the number 1"):
        Layout(tmp_path).claim()


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheBroken):
        Layout(tmp_path / "file").claim()
    with pytest.raises(CacheBroken):
        Layout(tmp_path / "file" / "below").claim()


def test_files_of_a_blob_are_known_by_name(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert layout.data(BLOB) == tmp_path / "blobs" / "3f" / f"git-{BLOB.hex}.data"
    assert blob_of(layout.data(BLOB).name) == (BLOB, ".data")
    assert blob_of(layout.map(BLOB).name) == (BLOB, ".map")
    for name in ("", ".", "notes.txt", "git-3f.data", "x" + layout.data(BLOB).name):
        assert blob_of(name) is None


def test_a_node_keeps_its_id_with_its_cache(tmp_path: Path) -> None:
    layout, other = prepared(tmp_path / "a"), prepared(tmp_path / "b")
    made = node_id(layout)
    assert len(made) == 16
    assert int(made, 16) >= 0
    assert node_id(layout) == made
    assert node_id(other) != made
    Layout(layout.directory).claim()
    assert node_id(prepared(tmp_path / "a")) == made


@pytest.mark.parametrize("damage", [b"", b"short\n", b"../../../../../../", b"0123456789ABCDEF\n", b"\xff" * 16])
def test_a_damaged_id_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    layout = prepared(tmp_path)
    layout.node.write_bytes(damage)
    made = node_id(layout)
    assert len(made) == 16
    assert node_id(layout) == made


def test_an_id_that_cannot_be_read_is_an_error_of_the_cache(tmp_path: Path) -> None:
    layout = prepared(tmp_path)
    layout.node.mkdir()
    with pytest.raises(CacheBroken):
        node_id(layout)
