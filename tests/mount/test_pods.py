"""Mounts outlive the containers that made them: daemon and keeper in pods of their own, killed and replaced in any order under a reader.

Each container has its own mount and pid namespace, as Kubernetes makes them (`manta.testing.pods`). The mount is made by a third container,
which stands for the CSI driver: it binds below the kubelet's directory what it sees of the daemon's filesystem.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manta.testing import pods
from manta.testing.hub import HubProcess
from manta.testing.pods import Container, Volume
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE, true_digest
from tests.mount.holder import Holder
from tests.mount.node import TIMEOUT_S, background
from tests.soak import reader

pytestmark = [
    pytest.mark.only("kernel"),
    pytest.mark.skipif(bool(pods.obstacle()), reason=pods.obstacle() or "possible"),
]

MIB = 1024 * 1024
MANTA = [sys.executable, "-m", "manta"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


class Site:
    """A node with keeper, daemon and driver, and the pods that use them."""

    def __init__(self, host: pods.Node, endpoint: str) -> None:
        self.host = host
        self.run, self.cache = host.directory("run"), host.directory("cache")
        self.kubelet = host.directory("kubelet")
        self.socket = host.directory("run/keeper") / "keeper.sock"
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "MANTA_CACHE_DIR": str(self.cache),
            "MANTA_CONFIG": "/dev/null",
            "MANTA_DAEMON_KEEPER": str(self.socket),
            "MANTA_DAEMON_RUNTIME_DIR": str(self.run),
            "MANTA_FETCH_FILL": "false",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self.log = host.folder / "log"
        self.driver = host.container(
            "csi",
            volumes=[Volume(self.run, "HostToContainer"), Volume(self.kubelet, "Bidirectional")],
        )

    def _container(self, name: str, *argv: str, volumes: list[Volume]) -> Container:
        with self.log.open("ab") as log:
            return self.host.container(
                name, [*MANTA, *argv], volumes, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def start_keeper(self, *options: str) -> Container:
        return self._container("keeper", "keeper", *options, volumes=[Volume(self.socket.parent)])

    def start_daemon(self) -> Container:
        return self._container("daemon", "daemon", volumes=[Volume(self.run, "Bidirectional"), Volume(self.cache)])

    def manta(self, *arguments: str) -> str:
        return self.driver.run(*MANTA, *arguments, env=self.environment)

    def status(self) -> dict[str, Any] | None:
        """None while no daemon answers."""
        said = self.driver.run(*MANTA, "status", "--json", env=self.environment, check=False)
        found = json.loads(said) if said.strip() else {}
        return found if "pid" in found else None

    def serving(self, *, kept: bool = True) -> dict[str, Any]:
        """The status of the daemon that there is, once it serves, and is kept."""
        seen: list[dict[str, Any]] = []

        def is_there() -> bool:
            status = self.status()
            if status is not None and (not kept or not status["survival_refusal"]):
                seen.append(status)
            return bool(seen)

        until(is_there)
        return seen[-1]

    def publish(self, pod: str) -> Path:
        """Where the volume of a pod is on the node."""
        target = self.host.directory(f"kubelet/pods/{pod}") / "mount"
        self.manta("mount", BIG, str(target))
        return target

    def start_pod(self, name: str, target: Path) -> tuple[Container, Path]:
        """A pod with that volume, and where it has it."""
        at = self.host.folder / "models"
        return self.host.container(name, volumes=[Volume(target, "HostToContainer", at)]), at / BIG_FILE

    def roots(self) -> list[Path]:
        """The daemon's filesystem, as the node sees it: one, whatever happened."""
        return [point for point in self.host.mounts() if point.is_relative_to(self.run)]


@pytest.fixture
def site(hub: HubProcess) -> Iterator[Site]:
    with pods.node() as host:
        made = Site(host, hub.endpoint)
        try:
            yield made
        finally:
            print(made.log.read_text(errors="replace")[-8000:] if made.log.exists() else "")  # shown where a test fails


@contextmanager
def reading(pod: Container, path: Path, truth: Path, kind: str) -> Iterator[Callable[[], None]]:
    """A process of the pod in the middle of the file; what is given waits for its end, and that it saw the true bytes and no error."""
    command = pod.command(
        [sys.executable, "-S", "-E", "-P", reader.__file__, kind, str(path), str(truth), f"pods {kind}"]
    )
    with background(*command) as process:

        def conclude() -> None:
            out, error = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, error
            seen = json.loads(out)
            assert (seen["error"], seen["wrong"]) == ("", []), seen
            assert seen["compared"] > 0

        yield conclude


def python_in(pod: Container) -> list[str]:
    return pod.command([sys.executable])


def test_the_daemon_s_container_is_killed_and_replaced_under_a_reader(hub: HubProcess, site: Site, truth: Path) -> None:
    keeper, daemon = site.start_keeper(), site.start_daemon()
    before = site.serving()
    assert before["keeper"] == f"{site.socket}, holds fuse, journal"
    target = site.publish("a")
    pod, path = site.start_pod("reader", target)
    roots = site.roots()
    assert len(roots) == 1
    hub.set_bandwidth(25 * MIB)
    with reading(pod, path, truth, "sequential") as conclude, reading(pod, path, truth, "mapped") as conclude_mapped:
        for share in (0.2, 0.6):
            until(lambda share=share: hub.blob_traffic(BIG, BIG_FILE).sent >= share * BIG_SIZE)  # type: ignore[misc]
            daemon.kill()
            assert site.roots() == roots, "it stays where it is while nobody serves it"
            daemon = site.start_daemon()
        hub.set_bandwidth(None)
        conclude()
        conclude_mapped()
    after = site.serving()
    assert after["started"] > before["started"]
    assert "taken over" in after["fuse_why"]
    assert [mount["directory"] for mount in after["mounts"]] == [str(target)]
    assert site.roots() == roots, "no second one"
    assert keeper.process.poll() is None
    # And what comes now works as ever: another pod, and the end of the first.
    other, again = site.start_pod("other", site.publish("b"))
    with Holder(python_in(other)) as holder:
        holder.do("open", "weights", again)
        assert holder.do("digest", "weights", 5, 10 * MIB) == true_digest(5, 10 * MIB)
    site.driver.run("umount", str(target))
    assert target not in site.host.mounts()


def test_a_rollout_and_a_restart_keep_what_is_open(hub: HubProcess, site: Site) -> None:
    site.start_keeper()
    daemon = site.start_daemon()
    site.serving()
    pod, path = site.start_pod("reader", site.publish("a"))
    with Holder(python_in(pod)) as holder:
        inode = holder.do("open", "weights", path)
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        # As kubelet ends the container of a pod that is replaced.
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        holder.tell("digest", "weights", 8 * MIB, 9 * MIB)
        daemon = site.start_daemon()
        assert holder.answer() == true_digest(8 * MIB, 9 * MIB)
        before = site.serving()
        restart = site.driver.popen([*MANTA, "restart"], env=site.environment)
        assert daemon.wait() == 75
        site.start_daemon()
        assert restart.wait(timeout=TIMEOUT_S) == 0
        assert site.serving()["started"] > before["started"]
        assert holder.do("digest", "weights", 16 * MIB, 17 * MIB) == true_digest(16 * MIB, 17 * MIB)
        assert holder.do("stat", path) == [inode, BIG_SIZE]


def test_the_end_with_nothing_mounted_leaves_nothing_on_the_node(site: Site) -> None:
    keeper, daemon = site.start_keeper(), site.start_daemon()
    site.serving()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert site.roots() == []
    keeper.signal(signal.SIGTERM)
    assert keeper.wait() == 0
    assert not site.socket.exists()


def test_keeper_then_daemon(hub: HubProcess, site: Site) -> None:
    keeper, daemon = site.start_keeper(), site.start_daemon()
    site.serving()
    pod, path = site.start_pod("reader", site.publish("a"))
    with Holder(python_in(pod)) as holder:
        holder.do("open", "weights", path)
        keeper.kill()
        until(lambda: "No keeper answers" in str(site.serving(kept=False)["problems"]))
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        site.start_keeper()
        assert site.serving()["problems"] == []
        daemon.kill()
        holder.tell("digest", "weights", 8 * MIB, 9 * MIB)
        site.start_daemon()
        assert holder.answer() == true_digest(8 * MIB, 9 * MIB)


def test_daemon_then_keeper(hub: HubProcess, site: Site) -> None:
    """The keeper's pod is replaced while it alone has what is kept: it stays until the next daemon has it."""
    keeper, daemon = site.start_keeper(), site.start_daemon()
    site.serving()
    pod, path = site.start_pod("reader", site.publish("a"))
    with Holder(python_in(pod)) as holder:
        holder.do("open", "weights", path)
        daemon.kill()
        holder.tell("digest", "weights", 0, MIB)
        keeper.signal(signal.SIGTERM)
        daemon = site.start_daemon()
        assert holder.answer() == true_digest(0, MIB)
        assert keeper.wait() == 0
        site.start_keeper()
        site.serving()
        daemon.kill()
        site.start_daemon()
        assert holder.do("digest", "weights", 8 * MIB, 9 * MIB) == true_digest(8 * MIB, 9 * MIB)


def test_both_at_once_end_what_is_mounted_and_a_daemon_begins_anew(hub: HubProcess, site: Site) -> None:
    keeper, daemon = site.start_keeper(), site.start_daemon()
    site.serving()
    target = site.publish("a")
    pod, path = site.start_pod("reader", target)
    roots = site.roots()
    with Holder(python_in(pod)) as holder:
        holder.do("open", "weights", path)
        hub.set_bandwidth(MIB)
        holder.tell("digest", "weights", 0, BIG_SIZE)
        hub.wait_for(1, origin="cdn")
        keeper.kill()
        daemon.kill()
        assert failure_of(holder) in {"ENOTCONN", "ECONNABORTED", "EIO"}
        holder.tell("open", "again", path)
        assert failure_of(holder) == "ENOTCONN"
        hub.set_bandwidth(None)
        assert site.roots() == roots, "the dead one is still there"
        site.start_keeper()
        site.start_daemon()
        fresh = site.serving()
        assert fresh["mounts"] == []
        assert "taken over" not in fresh["fuse_why"]
        assert site.roots() == roots, "in its place"
        assert "which a daemon that died left behind" in site.log.read_text()
        holder.tell("open", "again", path)
        assert failure_of(holder) == "ENOTCONN", "what was bound to the dead one stays dead: its pod is to be replaced"
    other, again = site.start_pod("other", site.publish("b"))
    with Holder(python_in(other)) as holder:
        holder.do("open", "weights", again)
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)


def failure_of(holder: Holder) -> str:
    with pytest.raises(OSError) as failure:
        holder.answer()
    return errno.errorcode[failure.value.errno or 0]


def test_a_keeper_gives_up_a_daemon_that_never_comes(hub: HubProcess, site: Site) -> None:
    site.start_keeper("--give-up-after", "1")
    daemon = site.start_daemon()
    site.serving()
    pod, path = site.start_pod("reader", site.publish("a"))
    with Holder(python_in(pod)) as holder:
        holder.do("open", "weights", path)
        daemon.kill()
        holder.tell("digest", "weights", 0, MIB)
        assert failure_of(holder) in {"ENOTCONN", "ECONNABORTED", "EIO"}
