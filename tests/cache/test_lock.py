from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manta.cache.lock import DirectoryLock
from manta.errors import CacheBroken, InUse

HOLDER = """
import subprocess, sys
from pathlib import Path
from manta.cache.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
# A worker that outlives the daemon: it must not keep the lock, although nobody closed descriptors for it.
child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_second_daemon_is_refused_with_the_pid_and_what_to_do(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "lock")
    with pytest.raises(InUse) as caught:
        DirectoryLock(tmp_path / "lock")
    assert f"in use by the daemon with pid {os.getpid()}" in caught.value.message
    assert "another cache directory" in caught.value.message
    lock.release()
    lock.release()
    DirectoryLock(tmp_path / "lock").release()


def test_the_lock_ends_with_the_process_however_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(InUse, match=f"pid {holder.pid}"):
                DirectoryLock(path)
            holder.kill()
            holder.wait()
            DirectoryLock(path).release()
        finally:
            os.kill(worker, 9)
            holder.kill()


def test_a_lock_file_with_nonsense_in_it_still_locks(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"\xff not a pid, and longer than any pid could ever be")
    lock = DirectoryLock(path)
    assert path.read_text() == f"{os.getpid()}\n"
    path.write_bytes(b"")
    with pytest.raises(InUse, match="another daemon"):
        DirectoryLock(path)
    lock.release()


def test_a_directory_that_is_gone_is_a_broken_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheBroken):
        DirectoryLock(tmp_path / "gone" / "lock")
