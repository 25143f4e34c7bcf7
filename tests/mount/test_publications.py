"""Volumes by a name, through the real daemon: whose right it is, what is read after kills and restarts, what status and metrics say."""

from __future__ import annotations

import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from manta.control.client import Client
from manta.control.protocol import Mount, MountRequest, Pod
from manta.errors import Absent, Conflict, Denied, NotRunning, Unavailable
from manta.testing.hub import HubProcess, changes
from manta.testing.hub.standard import GATED, MODEL, PRIVATE, READER_TOKEN, SHARDED, STRANGER_TOKEN
from tests.mount.node import Node, python, run, send, wait_for_end, wait_until
from tests.mount.test_observability import scrape

pytestmark = pytest.mark.only("kernel")

POD = Pod("3c9f0b52-6a4f-4c55-a3ff-2a7e5f9f6a01", "server-0", "default", "csi-1")
WEIGHTS = "model.safetensors"


class Volumes:
    """The CSI driver's part, against the daemon of `node`, which a mount of its own keeps."""

    def __init__(self, node: Node) -> None:
        self.node = node
        node.mount(MODEL)
        [self.socket] = (node.path / "run").glob("*/control.sock")
        self.client = Client(self.socket)

    def request(self, target: str, token: str = "", directory: str = "/pods/model", **changes: object) -> MountRequest:
        return MountRequest(target, directory, token=token, anonymous=not token, pod=POD, **changes)  # type: ignore[arg-type]

    def publish(self, name: str, target: str, token: str = "", **changes: object) -> Mount:
        """Published at a directory of this namespace."""
        directory = self.node.directory()
        mount = self.client.publish(name, self.request(target, token, str(directory), **changes))
        run('mount --bind -o ro "$1" "$2"', mount.source, directory)
        return self.client.publication_bound(name, str(directory))

    def kill(self) -> None:
        """Kills the daemon, and waits for the next one to serve."""
        [daemon] = self.node.daemons()
        send(daemon, signal.SIGKILL)
        wait_for_end(daemon)
        wait_until(self.answers)

    def answers(self) -> bool:
        with suppress(NotRunning, Unavailable):
            return bool(self.client.running().pid)
        return False


@contextmanager
def pod(source: str, directory: Path) -> Iterator[Callable[[str], str]]:
    """A process with `source` bound to `directory` in a mount namespace of its own. What it is given, a name, it reads there, and says the
    file's digest."""
    script = 'mount --bind -o ro "$1" "$2" && while read -r name; do sha256sum "$2/$name"; done'
    command = ["unshare", "--mount", "--propagation", "private", "bash", "-c", script, "-", source, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read(name: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], 30.0)
            assert ready, "the pod's read hangs"
            return process.stdout.readline().split(" ")[0]

        try:
            yield read
        finally:
            process.kill()


def digest(path: Path) -> str:
    return run('sha256sum "$1"', path).split()[0]


@pytest.fixture
def volumes(node: Node) -> Volumes:
    return Volumes(node)


def test_a_cached_model_is_not_there_for_a_pod_that_may_not_read_it(hub: HubProcess, volumes: Volumes) -> None:
    client = volumes.client
    for name, repo in (("private", PRIVATE), ("gated", GATED)):
        mount = volumes.publish(name, repo, READER_TOKEN)
        assert digest(Path(mount.directory) / WEIGHTS) == hub.files(repo).files[WEIGHTS].sha256
    for token in ("", STRANGER_TOKEN):
        with pytest.raises(Absent) as absent:
            client.publish("x", volumes.request(PRIVATE, token))
        with pytest.raises(Denied) as denied:
            client.publish("x", volumes.request(GATED, token))
        for error in (absent.value, denied.value):
            assert "secret" in error.message
            assert "hf auth login" not in error.message
            assert "hf_test" not in error.message
        assert f"{hub.endpoint}/{GATED}" in denied.value.message
    with pytest.raises(Denied, match=r"does not accept the token in the volume's secret.*expired"):
        client.publish("x", volumes.request(GATED, "hf_wrong"))
    with pytest.raises(Conflict, match="already with target"):
        client.publish("private", volumes.request(GATED, READER_TOKEN, mount.directory))
    assert {p.name for p in client.publications()} == {"private", "gated"}
    assert "hf_test" not in volumes.node.log(whole=True)


def test_a_pod_reads_on_in_its_own_namespace_while_daemons_come_and_go(hub: HubProcess, volumes: Volumes) -> None:
    client, request = volumes.client, volumes.request(PRIVATE, READER_TOKEN)
    made = client.publish("a", request)
    with pod(made.source, volumes.node.directory()) as read:
        config = read("config.json")
        client.publication_bound("a", request.directory)
        volumes.kill()
        assert read(WEIGHTS) == hub.files(PRIVATE).files[WEIGHTS].sha256, "by its token, which nobody else has here"
        volumes.node.manta("restart")
        wait_until(volumes.answers)
        assert read("config.json") == config
        again = client.publish("a", request)
        assert (again.id, again.pod, again.publication) == (made.id, POD, "a")
        with pytest.raises(Absent):
            client.publish("b", volumes.request(PRIVATE, STRANGER_TOKEN, "/pods/b"))
        hub.apply(changes.RevokeToken(token=READER_TOKEN))
        assert client.publish("a", request).id == made.id, "a minute's memory"
    assert client.unpublish("a").id == made.id
    with pytest.raises(Absent):
        client.unpublish("a")
    assert client.publications() == []


def test_pods_that_share_a_model_are_independent_of_each_other(hub: HubProcess, volumes: Volumes) -> None:
    """The kernel knows a file by its content, and the daemon where it was found last: in the other pod's volume, which has ended."""
    true = hub.files(GATED).files[WEIGHTS].sha256
    volumes.client.publish("a", volumes.request(GATED, READER_TOKEN, "/pods/a"))
    volumes.client.publish("b", volumes.request(GATED, READER_TOKEN, "/pods/b"))
    for name in ("a", "b"):
        volumes.client.publication_bound(name, f"/pods/{name}")
    with pod(volumes.client.publication("b").source, volumes.node.directory()) as read:
        assert read("config.json")
        assert run('stat "$1"', Path(volumes.client.publication("b").source) / WEIGHTS)
        assert run('stat "$1"', Path(volumes.client.publication("a").source) / WEIGHTS)
        volumes.client.unpublish("a")
        assert read(WEIGHTS) == true
        volumes.kill()
        assert read(WEIGHTS) == true


def test_background_goes_on_after_a_kill(hub: HubProcess, volumes: Volumes) -> None:
    hub.set_bandwidth(20 * 1024 * 1024)
    volumes.publish("a", SHARDED, prefetch="background", pin=True)
    wait_until(lambda: volumes.client.publication("a").cached > 0)
    volumes.kill()
    hub.set_bandwidth(None)
    wait_until(lambda: volumes.client.publication("a").cached == volumes.client.publication("a").size)
    assert volumes.client.publication("a").prefetch == "background"
    assert all(blob.pinned for blob in volumes.client.cache().blobs if any(SHARDED in name for name in blob.names))


def test_a_small_file_is_complete_when_it_is_open(hub: HubProcess, volumes: Volumes) -> None:
    mount = volumes.publish("a", SHARDED, prefetch="blocking-open")
    path = Path(mount.directory) / "model-00002-of-00003.safetensors"
    opened = """
import json, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(json.dumps([int(os.getxattr(sys.argv[1], "user.manta.cached_bytes")), os.fstat(fd).st_size]))
"""
    cached, size = python(opened, path)
    assert cached == size > 8 * 1024 * 1024, "more than is completed at any open"


def test_status_and_metrics_say_which_pod(volumes: Volumes) -> None:
    node = volumes.node
    mount = volumes.publish("a", SHARDED)
    run('head -c 1 "$1"', Path(mount.directory) / "config.json")
    for asked in (POD.uid, "default/server-0"):
        [shown] = node.json("status", "--pod", asked)["mounts"]
        assert (shown["publication"], shown["pod"]["uid"], shown["id"]) == ("a", POD.uid, mount.id)
    assert len(node.status()["mounts"]) == 2
    assert "pod default/server-0" in node.manta("status").stdout
    assert "No pod default/other has a volume" in node.manta("status", "--pod", "default/other", code=None).stderr
    labels = f"default server-0 {SHARDED}"

    def scraped() -> dict[str, float]:
        return scrape("--unix-socket", str(volumes.socket), "http://manta/metrics")

    found = scraped()
    assert found[f"manta_volume_bytes {labels}"] == mount.size
    assert 0 < found[f"manta_volume_cached_bytes {labels}"] <= mount.size
    assert (found["manta_volumes"], found[f"manta_volume_reads_waiting {labels}"]) == (1, 0)
    volumes.client.unpublish("a")
    found = scraped()
    assert found["manta_volumes"] == 0
    assert not any(name.startswith("manta_volume_") for name in found)
