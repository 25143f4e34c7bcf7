"""What is written where in /sys, on a /sys of the test's own; the real one is the mount suite's."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from manta.fuse import kernel_settings
from manta.fuse.kernel_settings import BACKGROUND_MAX, abort, apply

DEVICE = "0:77"


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys with one FUSE mount. Nothing is mounted, whoever runs the test."""
    root = tmp_path / "root"
    bdi, connection = root / f"sys/class/bdi/{DEVICE}", root / "sys/fs/fuse/connections/77"
    for folder, names in (
        (bdi, ["read_ahead_kb"]),
        (connection, ["max_background", "congestion_threshold", "abort"]),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("before")
    monkeypatch.setattr(kernel_settings, "Path", lambda path: root / str(path).lstrip("/"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return root / "sys"


def test_readahead_and_queues_are_set(sys: Path, tmp_path: Path) -> None:
    assert apply(DEVICE, 4096, tmp_path)
    assert (sys / f"class/bdi/{DEVICE}/read_ahead_kb").read_text() == "4096"
    connection = sys / "fs/fuse/connections/77"
    assert int((connection / "max_background").read_text()) == BACKGROUND_MAX
    assert 0 < int((connection / "congestion_threshold").read_text()) < BACKGROUND_MAX
    assert (connection / "abort").read_text() == "before"


def test_what_is_not_permitted_stays_and_is_said(sys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (sys / f"class/bdi/{DEVICE}/read_ahead_kb").unlink()
    (sys / f"class/bdi/{DEVICE}/read_ahead_kb").mkdir()  # root may write any file, and no directory
    assert not apply(DEVICE, 4096, tmp_path)
    assert "read_ahead_kb stays as it is: Is a directory" in caplog.text
    assert (sys / "fs/fuse/connections/77/max_background").read_text() == str(BACKGROUND_MAX)


def test_a_mount_that_is_gone_is_no_failure(sys: Path, tmp_path: Path) -> None:
    assert not apply("0:78", 4096, tmp_path)
    assert not abort("0:78", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


def test_a_connection_is_aborted(sys: Path, tmp_path: Path) -> None:
    assert abort(DEVICE, tmp_path)
    assert (sys / "fs/fuse/connections/77/abort").read_text() == "1"


def test_where_fusectl_is_not_mounted_nothing_is_left_behind(
    sys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root it is mounted for the moment; where even that is refused, the settings stay as they are."""

    class Libc:
        def mount(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: Libc())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert not apply("0:78", 4096, scratch)
    assert list(scratch.iterdir()) == []
