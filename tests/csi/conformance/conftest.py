"""What the conformance suite runs against. Every test sees the driver from outside: its sockets, its mounts, its logs.

`alone`: the driver as a plain process without a daemon. It needs no rights and answers everything that is decided from the request alone.
`node`: a real daemon with a local hub and real mounts, each in its own container (manta.testing.csinode); skipped where that cannot be
made. One for a module: a test that kills something starts it again, and one whose volumes are still there at its end has failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import pytest

from manta.control.binding import MountEntry, mounts
from manta.errors import Unavailable
from manta.testing import csinode
from manta.testing.csinode import DRIVER, DRIVER_NAME, REPOSITORY, CsiNode
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, Text, UserSpec
from manta.testing.hub.files import FileSpec
from manta.testing.hub.spec import CommitSpec
from manta.testing.kubelet import Kubelet, Pod, Refused, Volume, inline

MODEL = "org/model"
"""Public: two commits, of which `v1` is the first."""
GATED = "org/gated"
PRIVATE = "org/private"
BIG = "org/big"
BIG_FILE = "weights.bin"
BIG_SIZE = 48 * 1024 * 1024 + 333
MANY = tuple(f"org/many-{number:02d}" for number in range(50))

READER, STRANGER, WRONG = "hf_podreader", "hf_podstranger", "hf_nobodys"
NODE_TOKEN = "hf_nodeitself"
"""May read everything, and is the node's: no pod may read by it unless the driver is told so."""

SECRETS = (READER, STRANGER, WRONG, NODE_TOKEN)


def spec() -> HubSpec:
    config: dict[str, FileSpec] = {"config.json": Text('{"model_type": "bert"}')}
    restricted = {**config, "weights.bin": Generated("restricted", 300_000)}
    temporary = [UserSpec(name=f"temporary-{n}", token=temporary_token(n), access=[GATED, PRIVATE]) for n in range(8)]
    return HubSpec(
        repos=[
            RepoSpec(
                id=MODEL,
                commits=[
                    CommitSpec(name="first", files={**config, "weights.bin": Generated("model", 2_000_000)}),
                    CommitSpec(name="second", base="first", files={"sub/folder/tokenizer.json": Text("{}")}),
                ],
                branches={"main": "second"},
                tags={"v1": "first"},
            ),
            RepoSpec(id=GATED, files=restricted, gated="manual"),
            RepoSpec(id=PRIVATE, files=restricted, private=True),
            RepoSpec(id=BIG, files={**config, BIG_FILE: Generated("big", BIG_SIZE)}),
            *(RepoSpec(id=name, files={**config, "name.txt": Text(name)}) for name in MANY),
        ],
        users=[
            UserSpec(name="reader", token=READER, access=[GATED, PRIVATE]),
            UserSpec(name="stranger", token=STRANGER),
            UserSpec(name="node", token=NODE_TOKEN, access=[GATED, PRIVATE]),
            *temporary,
        ],
    )


def temporary_token(number: int) -> str:
    """Of user `temporary-NUMBER`: one for each test that takes it away."""
    return f"hf_temporary{number}"


@pytest.fixture(scope="session")
def hub_process() -> Iterator[HubProcess]:
    with HubProcess(spec()) as hub:
        yield hub


@pytest.fixture
def hub(hub_process: HubProcess) -> Iterator[HubProcess]:
    """The hub as its spec says, without faults."""
    yield hub_process
    hub_process.reset()


def outcome(call: Callable[[], object]) -> str:
    """The name of the status that a call was answered with."""
    try:
        call()
    except Refused as refused:
        return refused.code
    return "OK"


class Checked(CsiNode):
    """A node, and what tests ask of it."""

    def volume(self, model: str = MODEL, token: str = "", *, pod: str = "serve-0", **attributes: str) -> Volume:
        """An inline volume of a new pod."""
        return inline(Pod(pod, "team"), "model", {"model": model, **attributes}, {"token": token} if token else None)

    def entries(self, volume: Volume) -> list[MountEntry]:
        """What the node has mounted at the volume's target: one entry, normally."""
        target = str(self.kubelet.target(volume))
        text = Path(f"/proc/{self.host.pid}/mountinfo").read_text(errors="surrogateescape")
        return [entry for entry in mounts(text) if entry.directory == target]

    def published(self, volume: Volume) -> bool:
        """Whether exactly one mount is at its target, read-only."""
        entries = self.entries(volume)
        return len(entries) == 1 and entries[0].is_manta and "ro" in entries[0].options

    def publications(self) -> int:
        return len(self.client.publications())

    def read(self, volume: Volume, name: str = "config.json") -> str:
        """A file of it, as the node sees it."""
        return self.host.run("cat", str(self.kubelet.target(volume) / name))

    def refusal(self, volume: Volume, **changes: object) -> Refused:
        """Of a publish that must be refused, and leave nothing."""
        with pytest.raises(Refused) as refused:
            self.kubelet.set_up(volume, **changes)
        assert self.entries(volume) == []
        return refused.value

    def host_signal(self, pid: int, number: signal.Signals) -> None:
        """To a process of a container, by this process's pid of it."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def gone(self, volume: Volume) -> bool:
        return not self.kubelet.target(volume).parent.exists() and self.entries(volume) == []

    @contextmanager
    def driver_with(self, *arguments: str) -> Iterator[None]:
        """Another driver in its place meanwhile."""
        self.driver.kill()
        self.start_driver(*arguments)
        self.kubelet.restart()
        try:
            yield
        finally:
            self.restart_driver()

    def clean(self) -> None:
        """Nothing is published: neither mounts, nor directories, nor at the daemon."""
        assert self.kubelet.mounts() == []
        self.wait_until(lambda: self.publications() == 0, "the daemon still has publications")


@pytest.fixture(scope="module")
def shared_node(hub_process: HubProcess) -> Iterator[Checked]:
    if reason := csinode.obstacle():
        pytest.skip(reason)
    with Checked(hub_process.endpoint, token=NODE_TOKEN) as node:
        yield node


@pytest.fixture
def node(shared_node: Checked, hub: HubProcess, request: pytest.FixtureRequest) -> Iterator[Checked]:
    yield shared_node
    shared_node.end_pods()
    left = shared_node.kubelet.mounts()
    for target in dict.fromkeys(left):  # a test that failed has not torn down
        shared_node.host.run("umount", "--lazy", str(target), check=False)
    if left:
        print(shared_node.log_tails(), file=sys.stderr)
    assert not left, f"left published: {left}"
    shared_node.clean()


@pytest.fixture
def fresh(hub: HubProcess) -> Iterator[Checked]:
    """A node of one test's own, without a token."""
    if reason := csinode.obstacle():
        pytest.skip(reason)
    with Checked(hub.endpoint) as node:
        yield node


class Alone:
    """The driver without a daemon, and a kubelet of its own."""

    def __init__(self, folder: Path) -> None:
        self.kubelet = Kubelet(folder / "kubelet")
        self._log = (folder / "csi.log").open("wb")
        command = [sys.executable, "-m", "manta_csi", "serve", "--kubelet-dir", str(self.kubelet.folder)]
        command += [
            "--driver-name",
            DRIVER_NAME,
            "--control-socket",
            str(folder / "nobody.sock"),
            "--node-id",
            "node-1",
        ]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MANTA_", "HF_"))}
        environment = {**kept, "PYTHONPATH": f"{REPOSITORY}:{DRIVER}", "MANTA_CONFIG": "/dev/null"}
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, cwd="/"
        )
        self.log = folder / "csi.log"

    def __enter__(self) -> Self:
        try:
            self.kubelet.register(DRIVER_NAME)
        except Unavailable:
            self.close()
            print(self.log.read_text(errors="replace"), file=sys.stderr)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=10)
        self._log.close()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def refusal(self, name: str, fields: object = None) -> Refused:
        with pytest.raises(Refused) as refused:
            self.kubelet.call(name, fields, timeout_s=30.0)  # type: ignore[arg-type]
        return refused.value


@pytest.fixture(scope="package")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    if not (DRIVER / "manta_csi/cli.py").exists():
        pytest.skip(f"the CSI driver is not in {DRIVER}")
    with Alone(tmp_path_factory.mktemp("csi")) as alone:
        yield alone
