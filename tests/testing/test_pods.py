"""manta.testing.pods: volumes propagate as Kubernetes says, containers end with their namespaces, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manta.errors import MantaError, Unavailable
from manta.testing import pods, scratch
from manta.testing.pods import Node, Volume

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(pods.obstacle()), reason=pods.obstacle() or "possible")]

OWNER = """
import sys, time
from manta.testing import pods

with pods.node() as host:
    run = host.directory("run")
    made = host.container("c", volumes=[pods.Volume(run, "Bidirectional")])
    made.run("mount", "-t", "tmpfs", "deep", str(run))
    print(host.folder, made.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def host() -> Iterator[Node]:
    with pods.node() as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def test_mounts_propagate_as_the_volumes_say(host: Node) -> None:
    run = host.directory("run")
    maker, listener, stranger = (
        host.container(kind, volumes=[Volume(run, kind)]) for kind in ("Bidirectional", "HostToContainer", "None")
    )
    inner = host.directory("run/inner")
    maker.run("mount", "-t", "tmpfs", "inner", str(inner))
    maker.run("touch", f"{inner}/here")
    assert inner in host.mounts()
    assert listener.run("ls", str(inner)) == "here\n"
    assert stranger.run("ls", str(inner)) == ""
    assert list(inner.iterdir()) == [], "nor does this process see it"
    # Nobody hears of what a slave mounts.
    outer = host.directory("run/outer")
    listener.run("mount", "-t", "tmpfs", "outer", str(outer))
    assert outer not in host.mounts()
    # A container that comes later finds what is mounted, and may take it away for all.
    later = host.container("later", volumes=[Volume(run, "Bidirectional")])
    assert later.run("ls", str(inner)) == "here\n"
    later.run("umount", str(inner))
    assert inner not in host.mounts()
    assert listener.run("ls", str(inner)) == ""


def test_a_container_has_its_volumes_and_nothing_else_of_the_host(host: Node) -> None:
    shown, hidden = host.directory("shown"), host.directory("hidden")
    (shown / "file").touch()
    at = host.folder / "models"
    made = host.container("c", volumes=[Volume(shown, at=at)])
    assert made.run("ls", str(host.folder)) == "models\n"
    assert made.run("ls", str(at)) == "file\n"
    assert not made.run("ls", str(hidden), check=False)
    made.run("touch", f"{at}/more")
    assert (shown / "more").exists()
    assert host.mounts() == []


def test_a_killed_container_takes_all_its_processes_along_and_leaves_its_mounts_on_the_host(host: Node) -> None:
    run = host.directory("run")
    made = host.container("c", volumes=[Volume(run, "Bidirectional")])
    made.run("mount", "-t", "tmpfs", "kept", str(host.directory("run/kept")))
    beside = made.popen(["sleep", "60"])
    until(lambda: "sleep 60" in made.run("ps", "-e", "-o", "args"))
    made.kill()
    assert beside.wait(timeout=20) != 0
    assert made.wait() == 128 + signal.SIGKILL
    assert host.mounts() == [run / "kept"]


def test_the_command_is_process_1_and_its_end_the_containers(host: Node) -> None:
    heard, volumes = host.folder / "run/heard", [Volume(host.directory("run"))]
    made = host.container(
        "c", ["bash", "-c", 'trap "exit 7" TERM; touch "$0"; while :; do sleep 0.01; done', str(heard)], volumes
    )
    until(heard.exists)
    assert "trap" in made.run("cat", "/proc/1/cmdline")
    assert made.run("readlink", "/proc/1/ns/mnt") != host.run("readlink", "/proc/self/ns/mnt")
    made.signal(signal.SIGTERM)
    assert made.wait() == 7


def test_what_cannot_be_is_a_sentence(host: Node) -> None:
    with pytest.raises(Unavailable, match=r"container c could not be set up: .*nowhere"):
        host.container("c", volumes=[Volume(host.folder / "nowhere")])
    with pytest.raises(MantaError, match="exit code 1"):
        host.run("false")


def test_nothing_stays_behind() -> None:
    with pods.node() as host:
        made = host.container("c", volumes=[Volume(host.directory("run"), "Bidirectional")])
        made.run("mount", "-t", "tmpfs", "deep", str(host.folder / "run"))
        beside = [made.popen(["sleep", "60"]), subprocess.Popen(host.command(["sleep", "60"]))]
    assert all(process.wait(timeout=20) for process in beside)
    assert made.process.returncode != 0
    assert not host.folder.exists()
    assert not [point for point, _, _ in scratch.mountinfo() if point.is_relative_to(host.folder.parent)]


def test_a_killed_owner_leaves_nothing_but_a_folder_that_the_next_one_sweeps() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        with owner.stdout as lines:
            folder, pid = lines.readline().split()
    finally:
        owner.kill()
        owner.wait()
    until(lambda: not Path(f"/proc/{pid}").exists() or _state(int(pid)) == "Z")
    with pods.node():
        assert not Path(folder).parent.exists()
    assert not os.path.exists(f"/proc/{pid}") or _state(int(pid)) == "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
