"""The daemon ends within its bound whatever hangs, and leaves no mount, no process and no reader in the kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from manta.control.binding import mounts
from manta.operations.watchdog import END_SECONDS_MAX
from manta.testing.hub import HubProcess, faults
from manta.testing.hub.standard import MODEL
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE
from tests.mount.node import Node, background, run, wait_for_end, wait_until

SLACK_S = 5.0
"""For a machine that does other things."""

BLOCKED_IN = {
    "read": "import sys; open(sys.argv[1] + '/weights.bin', 'rb').read()",
    "mmap": "import mmap, sys; f = open(sys.argv[1] + '/weights.bin', 'rb');"
    " print(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[30_000_000])",
    "listing": "import os, sys; os.listdir(sys.argv[2] + '/manta/names')",
    "open": "import sys; open(sys.argv[2] + '/manta/names/a.txt')",
}


def state(pid: int) -> str:
    """R, S, D ... or Z."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def left(node: Node) -> list[str]:
    return [entry.directory for entry in mounts() if entry.directory.startswith(f"{node.path}/")]


@pytest.fixture
def blocked(hub: HubProcess, node: Node) -> Iterator[list[subprocess.Popen[str]]]:
    """A process that waits in each kind of call, behind a hub that says nothing."""
    directory, whole = node.mount(BIG), node.mount()
    hub.add_fault(faults.Stall(seconds=120), origin="cdn")
    hub.add_fault(faults.Delay(seconds=120), origin="hub", kind="info")
    with ExitStack() as stack:
        waiting = [
            stack.enter_context(background(sys.executable, "-c", script, directory, whole))
            for script in BLOCKED_IN.values()
        ]
        hub.wait_for(1, origin="cdn")
        hub.wait_for(1, origin="hub", kind="info", repo="manta/names")
        wait_until(lambda: all(state(process.pid) in "DS" for process in waiting))
        yield waiting


def assert_freed(blocked: list[subprocess.Popen[str]]) -> None:
    for process in blocked:
        process.wait(timeout=10)
    assert all(process.returncode for process in blocked), "each got an error, or SIGBUS for its mapping"


def test_readers_that_wait_do_not_keep_the_daemon(node: Node, blocked: list[subprocess.Popen[str]]) -> None:
    pids = [node.daemon(), *node.workers()]
    began = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    for pid in pids:
        wait_for_end(pid, END_SECONDS_MAX + SLACK_S)
    assert time.monotonic() - began < END_SECONDS_MAX + SLACK_S
    assert_freed(blocked)
    assert not left(node)


def test_a_second_signal_makes_it_faster(node: Node, blocked: list[subprocess.Popen[str]]) -> None:
    pids = [node.daemon(), *node.workers()]
    began = time.monotonic()
    os.kill(pids[0], signal.SIGTERM)
    wait_until(lambda: "stopping: SIGTERM" in node.log())
    os.kill(pids[0], signal.SIGINT)
    for pid in pids:
        wait_for_end(pid, 10)
    assert time.monotonic() - began < 4.5, "readers are given 5 s after one signal"
    assert_freed(blocked)
    assert not left(node)


def test_a_daemon_that_is_killed_leaves_nobody_waiting(
    hub: HubProcess, node: Node, blocked: list[subprocess.Popen[str]]
) -> None:
    """Readers get an error and the next daemon cleans up; or, where a keeper has the filesystem, the next daemon answers them."""
    pids = [node.daemon(), *node.workers()]
    hub.clear_faults()
    os.kill(pids[0], signal.SIGKILL)
    for pid in pids:
        wait_for_end(pid)
    if node.survives:
        for process in blocked:
            assert process.wait(timeout=30) == 0
        return
    assert_freed(blocked)
    assert left(node), "nobody was there to unmount"
    directory = node.mount(MODEL)
    assert "hidden_size" in run('cat "$1/config.json"', directory)
    assert [entry for entry in left(node) if "/mnt" in entry] == [str(directory)]


SLOW_DISK = {
    "sync": """
sync = os.fdatasync
def fdatasync(fd):
    hang_at(fd, ".data")
    sync(fd)
os.fdatasync = fdatasync
""",
    "map": """
write = os.pwrite
def pwrite(fd, data, at):
    if at:
        hang_at(fd, ".map")
    return write(fd, data, at)
os.pwrite = pwrite
""",
}
HANG = """
import os, time
def hang_at(fd, suffix):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(suffix):
        open(os.path.dirname(__file__) + "/hangs", "w")
        time.sleep(120)
"""
"""What a cache disk that hangs looks like from the daemon: syncs in a thread, chunk maps in the main one."""


@pytest.mark.parametrize("call", SLOW_DISK)
def test_a_disk_that_hangs_does_not_keep_the_daemon(hub: HubProcess, node: Node, call: str) -> None:
    site = node.path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(HANG + SLOW_DISK[call])
    fast = node.environment["PYTHONPATH"]
    node.environment["PYTHONPATH"] = f"{site}:{fast}"
    directory = node.mount(BIG)
    pids = [node.daemon(), *node.workers()]
    with background("sha256sum", directory / BIG_FILE):
        wait_until((site / "hangs").exists)
        os.kill(pids[0], signal.SIGTERM)
        wait_until(lambda: "stopping: SIGTERM" in node.log())
        os.kill(pids[0], signal.SIGTERM)
        for pid in pids:
            wait_for_end(pid, END_SECONDS_MAX + SLACK_S)
    assert not left(node)
    assert "finished chunks stay" in node.log()
    node.environment["PYTHONPATH"] = fast
    sent = hub.blob_traffic(BIG, BIG_FILE).sent
    again = node.mount(BIG)
    assert run('sha256sum "$1"', again / BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256
    if call == "sync":
        assert hub.blob_traffic(BIG, BIG_FILE).sent == sent == BIG_SIZE, "every chunk was finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_daemon_that_was_told_to_end_ends_well(node: Node, number: signal.Signals) -> None:
    with background(sys.executable, "-m", "manta", "daemon", env=node.environment) as daemon:
        wait_until(lambda: node.manta("status", code=None).returncode == 0)
        directory = node.mount(MODEL)
        with background("sleep", "60", cwd=directory):
            daemon.send_signal(number)
            wait_until(lambda: "stopping" in node.manta("status", code=None).stderr or not left(node))
            daemon.send_signal(number)
            assert daemon.wait(timeout=END_SECONDS_MAX + SLACK_S) == 0
    assert not left(node)


def test_a_foreground_mount_whose_process_is_killed_stays_until_it_is_unmounted(node: Node) -> None:
    directory = node.directory()
    command = [sys.executable, "-m", "manta", "mount", "--foreground", MODEL, directory]
    with background(*command, env=node.environment) as foreground:
        wait_until(lambda: str(directory) in left(node))
        wait_until(lambda: node.status()["mounts"] != [])
        foreground.kill()
        foreground.wait(timeout=10)
    assert "hidden_size" in run('cat "$1/config.json"', directory)
    pids = node.processes()
    node.manta("umount", str(directory))
    for pid in pids:
        wait_for_end(pid)
    assert not left(node)


def test_a_foreground_mount_whose_terminal_is_closed_ends(node: Node) -> None:
    directory = node.directory()
    command = [sys.executable, "-m", "manta", "mount", "--foreground", MODEL, directory]
    with background(*command, env=node.environment) as foreground:
        wait_until(lambda: str(directory) in left(node))
        foreground.send_signal(signal.SIGHUP)
        foreground.wait(timeout=20)
    for pid in node.processes():
        wait_for_end(pid)
    assert not left(node)


def test_ctrl_c_while_the_hub_says_nothing_leaves_nothing(hub: HubProcess, node: Node) -> None:
    hub.add_fault(faults.Delay(seconds=120), origin="hub")
    directory = node.directory()
    with background(sys.executable, "-m", "manta", "mount", MODEL, directory, env=node.environment) as mounting:
        hub.wait_for(1, origin="hub")
        mounting.send_signal(signal.SIGINT)
        mounting.wait(timeout=10)
    # The daemon that it started has nothing to do, and does not wait for the hub's answer first.
    for pid in node.processes():
        wait_for_end(pid, 15)
    assert not left(node)
