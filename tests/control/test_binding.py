"""manta.control.binding: reading mountinfo, real bind mounts of a tmpfs, FUSE mounts whose daemon is dead or silent."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manta.control import binding
from manta.control.binding import Answer, bind, holders, locate, mounted_at, mounts, probe, unbind
from manta.errors import Absent, Denied, InUse, MantaError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root here")


@pytest.fixture
def place() -> Iterator[Path]:
    """A scratch directory; whatever is mounted below it afterwards is detached."""
    with tempfile.TemporaryDirectory(prefix="manta-binding-", ignore_cleanup_errors=True) as folder:
        path = Path(os.path.realpath(folder))
        yield path
        for entry in reversed(mounts()):
            if entry.directory.startswith(f"{path}/"):
                with suppress(MantaError):
                    unbind(entry.directory, lazy=True)


@pytest.fixture
def source(place: Path) -> Path:
    """A tmpfs with one file, standing for the daemon's mount."""
    directory = place / "source"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "manta-test", str(directory)], check=True)
    (directory / "file").write_text("content")
    return directory


@pytest.fixture
def target(place: Path) -> Path:
    directory = place / "tar get"
    directory.mkdir()
    return directory


@pytest.fixture
def abandoned(place: Path) -> Iterator[tuple[Path, int]]:
    """A FUSE mount of Manta's kind that nobody serves, and the descriptor whose closing kills it."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    directory = place / "fuse"
    directory.mkdir()
    descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"manta:test", os.fsencode(directory), b"fuse.manta", ctypes.c_ulong(0), options):
        os.close(descriptor)
        pytest.skip(f"FUSE cannot be mounted here: {os.strerror(ctypes.get_errno())}")
    yield directory, descriptor
    with suppress(OSError):
        os.close(descriptor)


MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
43 27 0:40 / /run/manta/2e35/root ro,nosuid shared:3 master:1 - fuse.manta manta:2e35 ro,user_id=0
44 27 0:40 /1-org--name /mnt/a\040b\134c ro,nosuid,nodev - fuse.manta manta:2e35 ro,user_id=0
45 27 0:41 / /mnt/other rw - fuse.sshfs host:/x rw
46 27 0:42 / /mnt/plain rw - fuse manta rw
47 27 0:43 / /mnt/a\040b\134c rw - tmpfs none rw
48 27 0:44 / /mnt/nothing rw - tmpfs  rw
"""


def test_mountinfo_is_read_as_the_kernel_writes_it() -> None:
    entries = mounts(MOUNTINFO)
    assert [entry.is_manta for entry in entries] == [False, True, True, False, True, False, False]
    bound = entries[2]
    assert bound.directory == "/mnt/a b\\c"
    assert (bound.id, bound.parent, bound.device, bound.root) == (44, 27, "0:40", "/1-org--name")
    assert (bound.fstype, bound.source) == ("fuse.manta", "manta:2e35")
    assert bound.options == {"ro", "nosuid", "nodev"}
    assert mounted_at("/mnt/a b\\c", entries) == entries[5]  # the topmost
    assert mounted_at("/mnt", entries) is None


def test_locate_resolves_links_and_relative_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    monkeypatch.chdir(place)
    assert locate("link") == locate("real/../link/") == str(place / "real")
    assert locate("link/new") == str(place / "real/new")
    assert locate("/") == "/"


def test_a_plain_directory_answers(place: Path) -> None:
    assert probe(str(place)) is Answer.ALIVE


def test_holders_are_found_by_what_they_hold(place: Path) -> None:
    (place / "file").write_bytes(b"x" * 4096)
    waiting = "import sys; print('ready', flush=True); sys.stdin.read()"
    scripts = {
        "open": f"file = open({str(place / 'file')!r}); {waiting}",
        "working directory": f"import os; os.chdir({str(place)!r}); {waiting}",
        "mapped": f"import mmap; f = open({str(place / 'file')!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); f.close();"
        f" import os; [os.close(n) for n in range(3, 20) if os.path.exists(f'/proc/self/fd/{{n}}')]; {waiting}",
    }
    assert holders(str(place)) == []
    for how, script in scripts.items():
        with subprocess.Popen(
            [sys.executable, "-IS", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            (found,) = holders(str(place))
            assert (found.pid, found.how) == (child.pid, how)
            assert found.command.startswith("python")
            assert child.stdin is not None
            child.stdin.close()


@needs_root
def test_a_binding_is_read_only_and_goes_without_a_trace(source: Path, target: Path) -> None:
    bind(str(source), str(target))
    assert (target / "file").read_text() == "content"
    with pytest.raises(OSError, match="Read-only"):
        (target / "new").touch()
    (source / "new").touch()  # the source itself stays as it was
    entry = mounted_at(locate(target))
    assert entry is not None
    assert {"ro", "nosuid", "nodev"} <= entry.options
    unbind(str(target))
    assert mounted_at(str(target)) is None
    assert list(target.iterdir()) == []
    assert (source / "file").exists()


@needs_root
def test_a_part_of_a_filesystem_can_be_bound(source: Path, target: Path) -> None:
    (source / "part").mkdir()
    (source / "part/inner").touch()
    bind(str(source / "part"), str(target))
    entry = mounted_at(str(target))
    assert entry is not None
    assert entry.root == "/part"
    assert [p.name for p in target.iterdir()] == ["inner"]


@needs_root
def test_what_is_in_use_is_let_go_lazily(source: Path, target: Path) -> None:
    bind(str(source), str(target))
    with (target / "file").open() as file:
        with pytest.raises(InUse):
            unbind(str(target))
        unbind(str(target), lazy=True)
        assert mounted_at(str(target)) is None
        assert file.read() == "content"


@needs_root
def test_errors_say_what_was_asked(place: Path, target: Path) -> None:
    with pytest.raises(Absent, match="does not exist"):
        bind(str(place / "nowhere"), str(target))
    with pytest.raises(Absent, match="nothing is mounted"):
        unbind(str(target))
    with pytest.raises(Absent, match="nothing is mounted"):
        unbind(str(place / "nowhere"))


@needs_root
def test_a_binding_that_cannot_be_made_read_only_is_taken_back(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = binding._mount

    def refusing(what: str, where: str, flags: int) -> None:
        if flags & binding._MS_REMOUNT:
            raise Denied("No.")
        mount(what, where, flags)

    monkeypatch.setattr(binding, "_mount", refusing)
    with pytest.raises(Denied):
        bind(str(source), str(target))
    assert mounted_at(str(target)) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root is permitted")
def test_without_root_a_binding_is_refused(place: Path, target: Path) -> None:
    with pytest.raises(Denied, match="needs root"):
        bind(str(place), str(target))


@needs_root
def test_a_dead_mount_is_told_from_a_silent_one(abandoned: tuple[Path, int]) -> None:
    directory, descriptor = abandoned
    entry = mounted_at(str(directory))
    assert entry is not None
    assert entry.is_manta
    assert probe(str(directory), timeout_s=0.3) is Answer.SILENT
    # None of these may touch the mount, or they would hang as the probe's child did.
    assert locate(directory) == str(directory)
    assert all(holder.command != "pytest" for holder in holders(str(directory)))
    os.close(descriptor)
    assert probe(str(directory)) is Answer.DEAD
    unbind(str(directory))
    assert mounted_at(str(directory)) is None
