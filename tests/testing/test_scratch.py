"""manta.testing.scratch: a run's folder goes with everything that hangs on it, also when its owner was killed or its mount is wedged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from manta.testing import scratch

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout
    with process.stdout as lines:
        lines.readline()
    return process


def test_the_folder_and_its_files_go(tmp_path: Path) -> None:
    with scratch.scratch(tmp_path) as folder:
        (folder / "cache").mkdir()
        (folder / "cache" / "blob").write_bytes(b"x")
        assert os.environ[scratch.MARKER] == str(folder)
    assert list(tmp_path.iterdir()) == []
    assert scratch.MARKER not in os.environ


def test_one_within_another_leaves_the_outer_one_as_it_was(tmp_path: Path) -> None:
    with scratch.scratch(tmp_path) as outer:
        with scratch.scratch(tmp_path) as inner:
            assert os.environ[scratch.MARKER] == str(inner)
        assert os.environ[scratch.MARKER] == str(outer)
        assert list(tmp_path.iterdir()) == [outer]


def test_an_exception_removes_it_too(tmp_path: Path) -> None:
    def fail() -> None:
        with scratch.scratch(tmp_path):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_processes_started_meanwhile_are_ended_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "END_TIMEOUT_S", 0.5)
    bystander = start("import time; print('up', flush=True); time.sleep(60)")
    try:
        with scratch.scratch(tmp_path) as folder:
            obedient = start("import time; print('up', flush=True); time.sleep(60)")
            stubborn = start(STUBBORN)
            assert sorted(scratch.processes(folder)) == sorted([obedient.pid, stubborn.pid])
        assert obedient.wait(timeout=10) == -signal.SIGTERM
        assert stubborn.wait(timeout=10) == -signal.SIGKILL
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait(timeout=10)


PHOENIX = """
import os, select, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code, other, lives = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def another():
    return subprocess.Popen([sys.executable, "-c", code, code, str(os.getpid()), str(lives - 1)]).pid
other = other or another()
print("up", flush=True)
while lives:
    select.select([os.pidfd_open(other)], [], [], 20)
    other = another()
"""
"""Two that start each other anew, as a keeper and its daemon do, but not for ever."""


def test_processes_that_start_each_other_anew_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "END_TIMEOUT_S", 0.5)
    with scratch.scratch(tmp_path) as folder:
        command = [sys.executable, "-c", PHOENIX, PHOENIX, "0", "5"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
            assert first.stdout
            assert first.stdout.readline() == first.stdout.readline() == b"up\n"
            assert len(scratch.processes(folder)) == 2
            scratch.remove(folder)
        assert scratch.processes(folder) == []


def test_only_folders_of_dead_owners_are_swept(tmp_path: Path) -> None:
    alive = tmp_path / f"manta-scratch-{os.getpid()}-{scratch.start_time(os.getpid())}-abc"
    dead = tmp_path / f"manta-scratch-{os.getpid()}-1-abc"  # the pid lives, but started at another time
    other = tmp_path / "somebody's"
    for folder in (alive, dead, other):
        folder.mkdir()
        (folder / "file").write_text("")
    assert scratch.sweep(tmp_path) == [dead]
    assert sorted(tmp_path.iterdir()) == sorted([alive, other])


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
from pathlib import Path
from manta.testing import scratch
with scratch.scratch(Path({str(tmp_path)!r})) as folder:
    (folder / "file").write_text("")
    print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert owner.stdout
    with owner.stdout as lines:
        orphan = int(lines.readline())
    owner.kill()
    owner.wait(timeout=10)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch.scratch(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
        assert scratch.await_end([orphan], 5) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_mounts_below_it_are_unmounted(tmp_path: Path) -> None:
    with scratch.scratch(tmp_path) as folder:
        for name in ("one", "two with a blank"):
            (folder / name).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", str(folder / name)], check=True)
        assert scratch.mounts(folder) == [folder / "one", folder / "two with a blank"]
        assert [kind for point, _, kind in scratch.mountinfo() if point == folder / "one"] == ["tmpfs"]
        assert scratch.fuse_devices(folder) == set()
    assert scratch.mounts(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root and /dev/fuse")
def test_a_wedged_mount_is_aborted_and_its_readers_are_freed(tmp_path: Path) -> None:
    failures: list[OSError] = []

    def look(path: Path) -> None:
        try:
            path.stat()
        except OSError as error:
            failures.append(error)

    fuse = os.open("/dev/fuse", os.O_RDWR)
    try:
        with scratch.scratch(tmp_path) as folder:
            point = folder / "mount"
            point.mkdir()
            options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0"
            # Without the helper: mount.fuse would look for a program to serve it.
            command = ["mount", "-i", "-t", "fuse", "-o", options, "none", str(point)]
            subprocess.run(command, pass_fds=(fuse,), check=True)
            assert len(scratch.fuse_devices(folder)) == 1
            reader = threading.Thread(target=look, args=(point / "file",), daemon=True)
            reader.start()  # nobody ever answers what it asks
    finally:
        os.close(fuse)
    reader.join(timeout=10)
    assert not reader.is_alive()
    assert failures
    assert list(tmp_path.iterdir()) == []
