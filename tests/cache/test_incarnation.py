"""A life of the host and of a mount: the same as long as both go on, and never the same again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from manta.cache import incarnation as module
from manta.cache.incarnation import incarnation


def test_it_is_the_same_while_host_and_mount_go_on(tmp_path: Path) -> None:
    assert len(incarnation(tmp_path)) == 16
    assert incarnation(tmp_path) == incarnation(tmp_path)


def test_where_the_kernel_does_not_say_everything_is_doubted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_BOOT_ID", tmp_path / "absent")
    assert incarnation(tmp_path) != incarnation(tmp_path)


def test_another_boot_is_another_life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = incarnation(tmp_path)
    (tmp_path / "boot").write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    monkeypatch.setattr(module, "_BOOT_ID", tmp_path / "boot")
    assert incarnation(tmp_path) != now


def test_another_mount_is_another_life(small_disk: Path) -> None:
    if not module._mount_number(small_disk):
        pytest.skip("this kernel numbers no mounts (Linux 6.8 does)")
    before = incarnation(small_disk)
    subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
    try:
        assert incarnation(small_disk) != before
    finally:
        subprocess.run(["umount", small_disk], check=True)
    assert incarnation(small_disk) == before
