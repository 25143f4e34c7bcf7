"""A cluster of real nodes on one machine, here and only here: daemons, FUSE mounts and a cache each, and a hub as their origin.

    with Cluster.set_up(spec, 4, rate=200_000_000) as cluster, cluster.nodes(4, swarm=True) as nodes:
        found = cluster.read(nodes, "org/name")           # all at once, every byte compared
        cluster.origin_bytes("org/name"), cluster.size("org/name")
        cluster.net.cut(nodes[1].host); nodes[2].kill(); nodes[2].start()

A node is what `manta daemon` makes of it: keeper, daemon, workers, peer process, in the node's network namespace behind its link; but in
this mount namespace, so that what it mounts is seen here. Commands (`manta mount`) run in its namespace too. Nothing here touches a
mount: readers are processes of their own (`manta.testing.reading`). At the end, however it comes, everything is ended, unmounted and
removed; what a killed owner left goes when the next one begins (`scratch`, `netns`).

Used by tests marked netns and by benchmarks. Needs root; `obstacle` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self, TypeVar

from manta.config import CacheConfig, Config, DaemonConfig, variable
from manta.control.client import Client
from manta.errors import Corrupt, MantaError, Unavailable
from manta.testing import netns, scratch
from manta.testing.cluster_net import Host, Network, network
from manta.testing.hub import HubProcess, HubSpec
from manta.testing.reading import Found, Reading

_T = TypeVar("_T")

REPOSITORY = Path(__file__).resolve().parents[2]

SWARM_PORT = 9402
KEY = "the key of a cluster that exists for a test only"

START_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 60.0
MEMBERS_TIMEOUT_S = 60.0
"""A member that did not answer is tried again every 30 s or sooner."""
END_TIMEOUT_S = 15.0
"""A daemon's own bound for its end is 10 s."""
READ_TIMEOUT_S = 120.0
STATUS_TIMEOUT_S = 2.0
POLL_S = 0.05
KILL_ROUNDS = 5
"""What a keeper or a daemon started while the others were being stopped goes in the next round."""
QUIET_S = 0.2
LOG_CHARACTERS = 4000

_RUNTIME = variable("daemon.runtime_dir")


def obstacle() -> str:
    """Why no cluster can be made here, a sentence; empty where one can."""
    if reason := netns.obstacle():
        return reason
    return "" if os.access("/dev/fuse", os.R_OK | os.W_OK) else "mounting needs /dev/fuse: load the kernel module fuse"


class Node:
    """One node. Made by `Cluster.nodes`; `kill`, `start` and so on are for whoever has it."""

    def __init__(self, place: netns.Place, folder: Path, endpoint: str, settings: Mapping[str, str]) -> None:
        """`settings`: by SECTION.FIELD, as text."""
        self.place = place
        self.folder = folder
        self.cache = folder / "cache"
        self.config = Config(cache=CacheConfig(dir=self.cache), daemon=DaemonConfig(runtime_dir=folder / "run"))
        self.settings = dict(settings)
        """Changes count from the next start on."""
        self._endpoint = endpoint
        self._process: subprocess.Popen[bytes] | None = None
        self._mounts = 0
        (folder / "home").mkdir(parents=True)

    @property
    def client(self) -> Client:
        return Client(self.config.socket_path)

    @property
    def pid(self) -> int:
        """Of the process that was started: a keeper, whose descendants are all the others as long as nobody killed it; 0 without one."""
        return self._process.pid if self._process is not None else 0

    # -- life -----------------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts it and waits until it answers."""
        self.begin()
        self.await_ready()

    def begin(self) -> None:
        """Starts it."""
        assert self._process is None
        with (self.folder / "daemon.out").open("ab") as output:
            self._process = subprocess.Popen(
                self.place.command([sys.executable, "-m", "manta", "daemon"]),
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def await_ready(self) -> None:
        """Until the daemon answers, also one that follows a killed one. Raises Unavailable where it does not in START_TIMEOUT_S."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(MantaError):
                self.client.running(timeout_s=STATUS_TIMEOUT_S)
                return
            if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"The daemon of {self.folder.name} did not start.{self.log()}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """As if the machine were gone: all its processes at once by SIGKILL, and its mounts with them. What it has cached stays."""
        for _ in range(KILL_ROUNDS):
            alive = self.processes()
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped before, so that none starts another in its stead
                for pid in alive:
                    _send(pid, number)
            if not scratch.await_end(alive, END_TIMEOUT_S) and not self.processes():
                break
        self._reap()
        scratch.detach(self.folder)

    def strike(self) -> None:
        """Kills daemon, workers and peer process by SIGKILL, and leaves the keeper, which starts the next daemon: mounts live on."""
        for pid in self.processes():
            if not _is_keeper(pid):
                _send(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends it in order. Raises Unavailable where something of it still runs after END_TIMEOUT_S."""
        if self._process is None:
            return
        for point in reversed(scratch.mounts(self.folder)):
            if point.parent == self.folder:  # what was asked for; the daemon unmounts its own
                subprocess.run(
                    ["umount", str(point)], capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False, cwd="/"
                )
        with contextlib.suppress(MantaError):  # it may be dead already
            self.client.shutdown()
        left = scratch.await_end(self.processes(), END_TIMEOUT_S)
        self.kill()
        if left:
            raise Unavailable(f"{self.folder.name} still ran {END_TIMEOUT_S:g} s after it was told to end.{self.log()}")

    def empty(self) -> None:
        """Takes its cache away. Only while it does not run."""
        assert self._process is None
        shutil.rmtree(self.cache, ignore_errors=True)

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait(END_TIMEOUT_S)

    # -- use ------------------------------------------------------------------------------------------------------------------------

    def mount(self, target: str) -> Path:
        """A fresh directory that shows `target`."""
        self._mounts += 1
        directory = self.folder / f"mount-{self._mounts}"
        self.manta("mount", target, str(directory))
        return directory

    def manta(self, *arguments: str) -> str:
        """What the manta command says on standard output. Raises with what it said when it fails."""
        done = subprocess.run(
            self.place.command([sys.executable, "-m", "manta", *arguments]),
            env=self._environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip()
            raise MantaError(f"manta {' '.join(arguments)} exited with {done.returncode}: {said}{self.log()}")
        return done.stdout

    def processes(self) -> list[int]:
        """Keeper, daemon, workers, peer process and commands, told by their environment."""
        return scratch.processes_with(_RUNTIME, str(self.config.daemon.runtime_dir))

    def log(self) -> str:
        """The ends of its logs, to be put behind a sentence: they go with the cluster."""
        paths = [self.config.log_path, self.folder / "daemon.out"]
        return "".join(
            f"\n{path}:\n{path.read_text(errors='replace')[-LOG_CHARACTERS:]}" for path in paths if path.exists()
        )

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MANTA_", "HF_", "HUGGING"))}
        given = {
            "cache.dir": str(self.cache),
            "daemon.runtime_dir": str(self.config.daemon.runtime_dir),
            "hub.endpoint": self._endpoint,
        }
        return {
            **kept,
            "HOME": str(self.folder / "home"),
            "HF_HOME": str(self.folder / "home/hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "MANTA_CONFIG": "/dev/null",
            "PYTHONPATH": str(REPOSITORY),
            **{variable(key): value for key, value in (given | self.settings).items()},
        }


class Cluster:
    """A network with a hub in it, and nodes that come and go. Made by `set_up`."""

    def __init__(self, folder: Path, net: Network, hub: HubProcess) -> None:
        self.folder = folder
        self.net = net
        self.hub = hub
        self._sets = 0

    @classmethod
    @contextmanager
    def set_up(
        cls, spec: HubSpec, hosts: int, *, rate: int = 0, origin_rate: int = 0, base: Path = Path("/var/tmp")
    ) -> Iterator[Self]:
        """Room for `hosts` nodes behind links of `rate` bits per second (0: no limit), and the hub behind one of `origin_rate`.

        `base` is where caches lie. Raises Denied where no cluster can be made.
        """
        with (
            network(hosts, rate=rate, origin_rate=origin_rate) as net,
            scratch.scratch(base) as folder,
            HubProcess(spec, prefix=net.origin.command([]), host=net.origin.address) as hub,
        ):
            yield cls(folder, net, hub)

    # -- nodes ----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def nodes(
        self, count: int, *, swarm: bool, settings: Mapping[str, str] | None = None, start: bool = True
    ) -> Iterator[list[Node]]:
        """`count` nodes with empty caches on the first hosts. At the end they are ended, and their folders go.

        `swarm`: each knows the addresses of all (its own among them, as one list for all would have it) and the key. `settings`: more of
        them, by SECTION.FIELD.
        """
        self._sets += 1
        folder = self.folder / f"s{self._sets}"
        hosts = self.net.nodes[:count]
        made = [
            Node(
                host,
                folder / f"n{number}",
                self.hub.endpoint,
                {**(_swarm(host, hosts, folder / f"n{number}") if swarm else {}), **(settings or {})},
            )
            for number, host in enumerate(hosts, 1)
        ]
        try:
            if swarm:
                for node in made:
                    set_key(node, KEY)
            if start:
                start_all(made)
            yield made
        except BaseException:
            for node in made:
                node.kill()
            raise
        else:
            each(made, Node.stop)
        shutil.rmtree(folder, ignore_errors=True)

    # -- reading --------------------------------------------------------------------------------------------------------------------

    def read(self, nodes: Sequence[Node], repo: str, *, timeout_s: float = READ_TIMEOUT_S) -> list[Found]:
        """Mounts `repo` on each node, reads all of its files on all of them at once, and compares every byte.

        Raises Unavailable where a reader did not end in time or got an error, Corrupt where it got other bytes.
        """
        with self.readings(nodes, repo) as readings:
            deadline = time.monotonic() + timeout_s
            for reading in readings:
                reading.go()
            found = [reading.result(deadline - time.monotonic()) for reading in readings]
        for node, each_found in zip(nodes, found, strict=True):
            self.check(repo, each_found, node)
        return found

    @contextmanager
    def readings(self, nodes: Sequence[Node], repo: str) -> Iterator[list[Reading]]:
        """A reader of `repo` for each node, mounted and ready to `go`."""
        directories = each(nodes, lambda node: node.mount(repo))
        with ExitStack() as stack:
            yield [
                stack.enter_context(self.reading(node, repo, directory))
                for node, directory in zip(nodes, directories, strict=True)
            ]

    def reading(self, node: Node, repo: str, directory: Path, *names: str) -> Reading:
        """A reader of `names` (none: all files, in order of their names) of `repo`, which is mounted at `directory`."""
        return Reading(node.folder, [directory / name for name in names or sorted(self.hub.files(repo).files)])

    def check(self, repo: str, found: Found, node: Node) -> None:
        """Raises Unavailable where a reader of `repo` did not get all of it, Corrupt where it got other bytes than the hub has."""
        if found.error:
            raise Unavailable(f"A reader got an error: {found.error}.{node.log()}")
        facts = self.hub.files(repo).files
        wanted = {name: fact.sha256 for name, fact in facts.items() if fact.sha256}
        got = set(found.digests.items())
        wrong = [
            name
            for name, digest in wanted.items()
            if not any(path.endswith(f"/{name}") and read == digest for path, read in got)
        ]
        if wrong or found.bytes != self.size(repo):
            raise Corrupt(
                f"A reader on {node.folder.name} got other bytes than the hub has: {wrong}, {found.bytes} bytes."
            )

    # -- counting -------------------------------------------------------------------------------------------------------------------

    def size(self, repo: str) -> int:
        """Bytes of all files of `repo`."""
        return sum(fact.size for fact in self.hub.files(repo).files.values())

    def origin_bytes(self, repo: str) -> int:
        """Bytes of bodies of the repo's files that the hub has sent since its counters were reset."""
        blobs = {fact.blob for fact in self.hub.files(repo).files.values()}
        return sum(traffic.sent for blob, traffic in self.hub.stats().blobs.items() if blob in blobs)

    def await_quiet(self, timeout_s: float = 30.0) -> None:
        """Until the hub has sent nothing for QUIET_S: what is under way when the last reader ends is counted too."""
        deadline = time.monotonic() + timeout_s
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_S:
            if any(traffic.in_flight for traffic in self.hub.stats().origins.values()):
                quiet_since = time.monotonic()
            if time.monotonic() > deadline:
                raise Unavailable(f"The hub was still answering requests after {timeout_s:g} s.")
            time.sleep(QUIET_S / 5)


def _swarm(host: Host, hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    addresses = ",".join(f"{each.address}:{SWARM_PORT}" for each in hosts)
    return {
        "swarm.peers": f"static:{addresses}",
        "swarm.listen": f"{host.address}:{SWARM_PORT}",
        "swarm.key_file": str(folder / "key"),
    }


def await_members(nodes: Sequence[Node]) -> None:
    """Until each knows all the others to be up. Raises Unavailable where that takes longer than MEMBERS_TIMEOUT_S."""
    deadline = time.monotonic() + MEMBERS_TIMEOUT_S
    for node in nodes:
        while sum(member.state == "up" for member in node.client.peers().members) < len(nodes) - 1:
            if time.monotonic() > deadline:
                raise Unavailable(f"{node.folder.name} did not find all the others.{node.log()}")
            time.sleep(POLL_S)


def set_key(node: Node, key: str) -> None:
    """The key of the cluster as this node knows it, from its next start on (or when it reads its key file again)."""
    path = node.folder / "key"
    path.touch(mode=0o600)
    path.write_text(f"{key}\n")


def start_all(nodes: Sequence[Node]) -> None:
    """Starts them side by side."""
    for node in nodes:
        node.begin()
    for node in nodes:
        node.await_ready()


def each(nodes: Sequence[Node], action: Callable[[Node], _T]) -> list[_T]:
    """`action` of each node, side by side."""
    with ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
        return list(pool.map(action, nodes))


def _is_keeper(pid: int) -> bool:
    return any(word.endswith(b"/manta/keeper.py") for word in scratch.command_line(pid).split(b"\0"))


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
