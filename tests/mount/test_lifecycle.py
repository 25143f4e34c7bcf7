"""How mounts and daemons end: every way to unmount, busy mounts, signals; and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from manta.control.binding import mounts
from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL, NAMES
from tests.mount.conftest import BIG, BIG_FILE
from tests.mount.node import Node, background, run, wait_for_end, wait_until


@pytest.mark.parametrize(
    "command", ['python -m manta umount "$1"', 'umount "$1"', 'fusermount3 -u "$1"', 'umount -l "$1"']
)
def test_every_way_to_unmount_ends_the_daemon_and_leaves_nothing(node: Node, command: str) -> None:
    directory = node.mount(MODEL)
    pids = [node.daemon(), *node.workers()]
    environment = node.environment | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", "-c", command, "-", str(directory)], env=environment, check=True, timeout=30, capture_output=True
    )
    for pid in pids:
        wait_for_end(pid)
    assert not [entry for entry in mounts() if entry.directory.startswith(str(node.path))]
    assert not list(directory.iterdir())
    assert not list((node.path / "run").glob("*/control.sock"))


def test_a_busy_mount_is_refused_and_goes_lazily(node: Node) -> None:
    directory = node.mount(MODEL)
    holder = subprocess.Popen(["sleep", "60"], cwd=directory)
    try:
        done = node.manta("umount", str(directory), code=None)
        assert done.returncode != 0
        assert "busy" in done.stderr or "use" in done.stderr
        assert str(holder.pid) in done.stderr
        assert "--lazy" in done.stderr
        node.manta("umount", "--lazy", str(directory))
        assert not [entry for entry in mounts() if entry.directory == str(directory)]
    finally:
        holder.kill()
        holder.wait()


def test_other_mounts_stay_when_one_goes(node: Node) -> None:
    first, second = node.mount(MODEL), node.mount(NAMES)
    daemon = node.daemon()
    node.manta("umount", str(first))
    assert [m["directory"] for m in node.status()["mounts"]] == [str(second)]
    assert "content" in run('cat "$1/a.txt"', second)
    third = node.mount(MODEL)
    assert "hidden_size" in run('cat "$1/config.json"', third)
    assert node.daemon() == daemon


def test_each_signal_ends_everything_even_in_mid_read(hub: HubProcess) -> None:
    """Readers are given their time, by three nodes at once."""
    hub.set_bandwidth(10 * 1024 * 1024)
    with ExitStack() as stack:
        nodes = [stack.enter_context(Node(hub.endpoint)) for _ in range(3)]
        readers = [stack.enter_context(background("sha256sum", node.mount(BIG) / BIG_FILE)) for node in nodes]
        for node in nodes:
            wait_until(lambda node=node: node.status()["origin_bytes"] > 0)  # type: ignore[misc]
        pids = [pid for node in nodes for pid in node.processes()]
        for node, number in zip(nodes, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), strict=True):
            os.kill(node.daemon(), number)
        for pid in pids:
            wait_for_end(pid, timeout_s=10)
        for reader in readers:
            reader.communicate(timeout=10)
        assert not [e for e in mounts() for node in nodes if e.directory.startswith(str(node.path))]


def test_foreground_stays_and_ends_with_its_mount(node: Node) -> None:
    directory = node.directory()
    command = [sys.executable, "-m", "manta", "mount", "--foreground", MODEL, str(directory)]
    foreground = subprocess.Popen(
        command, env=node.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(entry.directory == str(directory) for entry in mounts()))
    assert "hidden_size" in run('cat "$1/config.json"', directory)
    foreground.send_signal(signal.SIGINT)
    foreground.communicate(timeout=20)
    assert not [entry for entry in mounts() if entry.directory == str(directory)]


def test_mounting_again_and_again_grows_nothing(node: Node) -> None:
    keep = node.mount(MODEL)
    for _ in range(5):
        directory = node.mount(NAMES)
        run('cat "$1/a.txt"', directory)
        node.manta("umount", str(directory))
    assert len(node.status()["mounts"]) == 1
    assert len(os.listdir(f"/proc/{node.daemon()}/fd")) < 60
    assert "hidden_size" in run('cat "$1/config.json"', keep)
