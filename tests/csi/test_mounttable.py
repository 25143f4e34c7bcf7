"""mountinfo as the driver asks it, and what it does at a target."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from manta.control.binding import bind
from manta.errors import InUse, Invalid, MantaError, Unavailable
from manta_csi import mounttable
from manta_csi.mounttable import Attempt, MountTable, Place, clear_target, is_gone, is_shared, make_target
from tests.csi.conftest import needs_root

TEXT = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:47 / /run/manta/abc/root rw,nosuid shared:5 - fuse.manta manta:abc rw
31 22 0:40 / /var/lib/kubelet/pods/1/tmp rw shared:6 - tmpfs tmpfs rw
32 22 0:47 /2-org--name /var/lib/kubelet/pods/1/mount ro,nosuid shared:7 - fuse.manta manta:abc rw
33 22 0:46 /1-old /var/lib/kubelet/pods/2/mount ro - fuse.manta manta:abc rw
34 33 0:47 /3-new /var/lib/kubelet/pods/2/mount ro - fuse.manta manta:abc rw
35 22 0:47 /4-x /var/lib/kubelet/pods/with\040space/mount ro - fuse.manta manta:abc rw
""".strip()


def test_the_topmost_mount_of_a_directory() -> None:
    table = MountTable(TEXT)
    assert (top := table.at("/var/lib/kubelet/pods/2/mount")) is not None
    assert top.root == "/3-new"
    assert table.at("/var/lib/kubelet/pods/2") is None
    assert (spaced := table.at("/var/lib/kubelet/pods/with space/mount")) is not None
    assert spaced.root == "/4-x"


def test_the_place_that_a_path_shows() -> None:
    table = MountTable(TEXT)
    assert table.place("/run/manta/abc/root/2-org--name") == Place("0:47", "/2-org--name")
    assert table.place("/var/lib/kubelet/pods/1/mount/sub") == Place("0:47", "/2-org--name/sub")
    assert table.place("/run/manta/abc/rootless") == Place("8:1", "/run/manta/abc/rootless")
    assert table.place("/") == Place("8:1", "/")


def test_ours_below_a_directory() -> None:
    assert sorted(MountTable(TEXT).ours_below("/var/lib/kubelet")) == [
        "/var/lib/kubelet/pods/1/mount",
        "/var/lib/kubelet/pods/2/mount",
        "/var/lib/kubelet/pods/with space/mount",
    ]


def test_whether_mounts_are_seen_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(TEXT)
    monkeypatch.setattr(mounttable, "MOUNTINFO", tmp_path / "mountinfo")
    assert is_shared("/var/lib/kubelet")
    assert not is_shared("/var/lib/kubelet/pods/2/mount")


def test_a_target_is_a_plain_directory(tmp_path: Path) -> None:
    target = tmp_path.resolve() / "pods" / "1" / "mount"
    make_target(str(target))
    make_target(str(target))
    assert target.is_dir()
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").write_text("")
    for odd in ("link", "link/below", "file"):
        with pytest.raises(Invalid, match="plain path"):
            make_target(str(tmp_path.resolve() / odd))
    with pytest.raises(Unavailable, match="could not be made"):
        make_target(str(tmp_path.resolve() / "file" / "below"))


def test_what_is_in_a_target_s_directory_is_never_removed(tmp_path: Path) -> None:
    target = tmp_path / "mount"
    clear_target(str(target), known=True)
    target.mkdir()
    (target / "file").write_text("somebody's")
    clear_target(str(target), known=False)
    with pytest.raises(MantaError, match="not an empty directory"):
        clear_target(str(target), known=True)
    (target / "file").unlink()
    clear_target(str(target), known=True)
    assert is_gone(str(target))


@needs_root
def test_show_and_clear(kubelet_dir: Path, tmp_path: Path) -> None:
    source, other, target = tmp_path.resolve() / "a", tmp_path.resolve() / "b", str(kubelet_dir / "mount")
    for directory in (source, other):
        directory.mkdir()
        (directory / "name").write_text(directory.name)
    Attempt(str(source), target)()
    Attempt(str(source), target)()
    entry = MountTable.read().at(target)
    assert entry is not None
    assert {"ro", "nosuid", "nodev"} <= entry.options
    assert (kubelet_dir / "mount/name").read_text() == "a"
    Attempt(str(other), target)()  # as after a daemon that has started anew
    assert (kubelet_dir / "mount/name").read_text() == "b"
    bind(str(source), target)
    with pytest.raises(InUse, match="another filesystem"):
        clear_target(target, known=False)
    with (kubelet_dir / "mount/name").open() as held:
        clear_target(target, known=True)
        assert held.read() == "a"
    assert is_gone(target)


@needs_root
def test_a_source_that_cannot_be_seen_is_no_final_error(kubelet_dir: Path) -> None:
    with pytest.raises(Unavailable, match="HostToContainer"):
        Attempt("/nonexistent/source", str(kubelet_dir / "mount"))()


@needs_root
def test_an_attempt_that_was_given_up_leaves_no_mount(
    kubelet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    entered, release = threading.Event(), threading.Event()

    def slow(source: str, directory: str) -> None:
        entered.set()
        release.wait(30)
        bind(source, directory)

    monkeypatch.setattr(mounttable, "bind", slow)
    attempt = Attempt(str(tmp_path / "source"), str(kubelet_dir / "mount"))
    thread = threading.Thread(target=attempt)
    thread.start()
    assert entered.wait(10)
    attempt.give_up()
    release.set()
    thread.join(10)
    assert attempt.ended.is_set()
    assert MountTable.read().at(str(kubelet_dir / "mount")) is None
