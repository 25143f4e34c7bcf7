"""The real daemon and its keeper, as `manta daemon` and `manta mount` start them: signals, kills, and that nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL
from tests.mount.conftest import BIG, BIG_FILE
from tests.mount.node import Node, background, run, wait_for_end, wait_until

pytestmark = pytest.mark.only("kernel")


def keeper_of(node: Node) -> int:
    return int(node.status()["keeper"].removeprefix("pid ").split(",")[0])


def serving(node: Node) -> bool:
    return node.manta("status", code=None).returncode == 0


@pytest.fixture
def foreground(node: Node) -> Iterator[subprocess.Popen[str]]:
    """`manta daemon`, which serves."""
    with background(sys.executable, "-m", "manta", "daemon", env=node.environment) as process:
        wait_until(lambda: serving(node))
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_manta_daemon_is_the_keeper_and_ends_in_order(
    node: Node, foreground: subprocess.Popen[str], number: signal.Signals
) -> None:
    daemon = node.daemon()
    assert keeper_of(node) == foreground.pid
    assert os.getsid(daemon) == daemon, "Ctrl-C reaches it once: through the keeper"
    foreground.send_signal(number)
    assert foreground.wait(timeout=20) == 0
    assert node.processes() == []
    assert list((node.path / "run").glob("*/*.sock")) == list((node.path / "run").glob("*/keep.*")) == []


def test_a_killed_keeper_is_replaced_and_the_next_one_can_be_told_to_end(
    node: Node, foreground: subprocess.Popen[str]
) -> None:
    daemon = node.daemon()
    foreground.kill()
    foreground.wait(timeout=20)
    wait_until(lambda: node.status()["keeper"].startswith("pid ") and keeper_of(node) != foreground.pid)
    second = keeper_of(node)
    assert node.daemon() == daemon
    assert node.status()["problems"] == []
    os.kill(second, signal.SIGTERM)
    for pid in (daemon, second):
        wait_for_end(pid)
    assert node.processes() == []


def test_restart_without_mounts_is_another_daemon(node: Node, foreground: subprocess.Popen[str]) -> None:
    before = node.daemon()
    said = node.json("restart")
    assert said["from"]["pid"] == before
    assert said["to"]["pid"] == node.daemon() != before
    assert keeper_of(node) == foreground.pid
    foreground.terminate()
    assert foreground.wait(timeout=20) == 0


def test_a_second_daemon_is_refused_and_disturbs_nothing(node: Node, foreground: subprocess.Popen[str]) -> None:
    done = node.manta("daemon", code=None)
    assert done.returncode == 1
    assert "ERROR" in done.stderr
    assert [path.name for path in (node.path / "run").glob("*/keep.*")] == [f"keep.{foreground.pid}"]
    node.json("restart")
    foreground.terminate()
    assert foreground.wait(timeout=20) == 0


def test_a_mount_keeps_its_directory_free_and_its_keeper_leaves_with_it(node: Node) -> None:
    directory = node.mount(MODEL)
    keeper = keeper_of(node)
    assert Path(f"/proc/{keeper}/cwd").readlink() == Path(f"/proc/{node.daemon()}/cwd").readlink() == Path("/")
    node.manta("umount", str(directory))
    wait_for_end(keeper)
    assert list((node.path / "run").glob("*/keep.*")) == []


READER = """
import hashlib, os, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    print("open", flush=True)
    for line in sys.stdin:
        os.lseek(file.fileno(), 0, 0)
        digest = hashlib.file_digest(file, "sha256")
        print(digest.hexdigest(), flush=True)
"""


def test_an_open_file_outlives_keepers_and_daemons_that_are_killed_in_turn(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    expected = hub.files(BIG).files[BIG_FILE].sha256
    if "pid" not in node.status()["keeper"] or node.status()["survival_refusal"]:
        pytest.skip(f"mounts do not survive here: {node.status()['survival_refusal']}")
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(directory / BIG_FILE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        try:
            assert reader.stdout.readline() == "open\n"
            for _ in range(2):
                keeper, daemon = keeper_of(node), node.daemon()
                os.kill(keeper, signal.SIGKILL)
                wait_until(lambda keeper=keeper: f"pid {keeper}," not in node.status()["keeper"])  # type: ignore[misc]
                wait_until(lambda: "fuse, journal" in node.status()["keeper"])
                assert node.daemon() == daemon
                os.kill(daemon, signal.SIGKILL)
                reader.stdin.write("again\n")
                reader.stdin.flush()
                assert reader.stdout.readline() == f"{expected}\n"
                wait_until(lambda: serving(node))
                assert node.daemon() != daemon
            said = node.json("restart")
            assert said["to"]["pid"] == node.daemon() != said["from"]["pid"]
            reader.stdin.write("again\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == f"{expected}\n"
        finally:
            reader.kill()


def test_an_unkept_daemon_says_so(node: Node) -> None:
    with background(sys.executable, "-m", "manta", "daemon", "--unkept", env=node.environment) as process:
        wait_until(lambda: serving(node))
        assert node.daemon() == process.pid
        assert "mounts end with the daemon" in node.status()["keeper"]
        refused = node.manta("restart", code=6)
        assert "no keeper" in refused.stderr
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_who_mounts_while_there_is_no_daemon_waits_for_the_next_one(hub: HubProcess, node: Node) -> None:
    """A rival started by `manta mount` would detach what the keeper holds."""
    first = node.mount(MODEL)
    daemon, keeper = node.daemon(), keeper_of(node)
    os.kill(keeper, signal.SIGSTOP)  # so that it does not start the next one at once
    try:
        os.kill(daemon, signal.SIGKILL)
        second = node.directory()
        with background(sys.executable, "-m", "manta", "mount", BIG, str(second), env=node.environment) as mounting:
            with pytest.raises(subprocess.TimeoutExpired):
                mounting.wait(timeout=2)
            os.kill(keeper, signal.SIGCONT)
            output, errors = mounting.communicate(timeout=40)
            assert mounting.returncode == 0, output + errors
    finally:
        os.kill(keeper, signal.SIGCONT)
    assert keeper_of(node) == keeper
    assert sorted(m["directory"] for m in node.status()["mounts"]) == sorted([str(first), str(second)])
    run('cat "$1/config.json"', first)


def test_a_rival_daemon_is_refused_while_the_mounts_wait_for_the_next_one(node: Node) -> None:
    directory = node.mount(MODEL)
    daemon, keeper = node.daemon(), keeper_of(node)
    os.kill(keeper, signal.SIGSTOP)
    try:
        os.kill(daemon, signal.SIGKILL)
        wait_for_end(daemon)
        done = node.manta("daemon", "--unkept", code=1)
        assert "is held for a daemon that its keeper is starting" in done.stderr
    finally:
        os.kill(keeper, signal.SIGCONT)
    wait_until(lambda: serving(node))
    run('cat "$1/config.json"', directory)
