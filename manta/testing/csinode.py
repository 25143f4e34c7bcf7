"""A node of Kubernetes with Manta on it, in namespaces of its own, here and only here: daemon, driver, kubelet, pods; a keeper, if asked.

    with CsiNode(hub.endpoint) as node:
        volume = inline(Pod("serve-0"), "model", {"model": "org/name"})
        node.kubelet.set_up(volume)
        pod = node.pod(volume)                    # a container that sees the volume and nothing else of the node
        pod.run("cat", str(node.models / "config.json"))

The containers have the volumes that the chart gives them, with the same propagation: the daemon its cache and, Bidirectional, the runtime
directory; the driver the runtime directory HostToContainer and the kubelet's Bidirectional; the keeper its socket's directory; a pod just
the target of its volume, bound as a runtime binds it: private. Each may be killed and started again, in any order. This process sees the
node's files and sockets and none of its mounts (see `pods`). Used by the driver's tests, by `benchmarks.publish` and by
`docs/csi-transcript.py`. Needs root, /dev/fuse, grpcio and the driver (csi-driver/).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from manta.config import CacheConfig, Config, DaemonConfig
from manta.control.client import Client
from manta.errors import MantaError, Unavailable
from manta.testing import pods, scratch
from manta.testing.kubelet import Kubelet, Volume

REPOSITORY = Path(__file__).parents[2]
DRIVER = REPOSITORY / "csi-driver"
"""Beside the package, which it is no part of."""

DRIVER_NAME = "csi.manta.dev"
START_TIMEOUT_S = 60.0
POLL_S = 0.02
LOG_LINES = 40


def obstacle() -> str:
    """Why no such node can be made here, a sentence; empty where one can."""
    if reason := pods.obstacle():
        return reason
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    if not (DRIVER / "manta_csi").is_dir():
        return f"the CSI driver is not in {DRIVER}"
    return ""


class CsiNode:
    """All of it runs as long as the `with` lasts. `token` is the node's own for the hub."""

    def __init__(
        self,
        endpoint: str,
        *,
        token: str = "",
        keeper: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._kept = keeper
        self._environment = dict(environment or {})
        self._stack = ExitStack()
        self._logs: dict[str, IO[bytes]] = {}
        self._pods: list[pods.Container] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.host = stack.enter_context(pods.node())
            self.folder = self.host.folder
            self.cache = self.host.directory("cache")
            self.runtime = self.host.directory("run")
            self.models = self.folder / "models"
            """Where a pod has its volume."""
            self._home = self.host.directory("home")
            self.kubelet = Kubelet(self.host.directory("kubelet"), pid=self.host.pid)
            config = Config(cache=CacheConfig(dir=self.cache), daemon=DaemonConfig(runtime_dir=self.runtime))
            self.control = config.socket_path
            self.client = Client(self.control)
            if self._kept:
                self.start_keeper()
            self.start_daemon()
            self.start_driver()
            self.kubelet.register(DRIVER_NAME)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log_tails(), file=sys.stderr)
        self._stack.close()
        for log in self._logs.values():
            log.close()

    # -- containers ---------------------------------------------------------------------------------------------------

    def start_keeper(self) -> None:
        """The DaemonSet manta-keeper."""
        command = [
            sys.executable,
            "-S",
            "-P",
            str(REPOSITORY / "manta/keepstore.py"),
            "--socket",
            str(self.keeper_socket),
        ]
        self.keeper_socket.parent.mkdir(exist_ok=True)
        self.keeper = self._start("keeper", command, [pods.Volume(self.keeper_socket.parent)])

    @property
    def keeper_socket(self) -> Path:
        return self.runtime / "keeper" / "keeper.sock"

    def start_daemon(self, *, wait: bool = True) -> None:
        """The container `daemon`; by default until it answers."""
        command = [sys.executable, "-m", "manta", "daemon", *([] if self._kept else ["--unkept"])]
        volumes = [pods.Volume(self.cache), pods.Volume(self._home), pods.Volume(self.runtime, "Bidirectional")]
        self.daemon = self._start("daemon", command, volumes)
        if wait:
            self.wait_for_daemon()

    def wait_for_keeping(self) -> None:
        """Until the keeper that there is has what the next daemon needs: from then on the daemon may be killed."""

        def keeps() -> bool:
            # Asked of the keeper itself: a daemon may not have noticed yet that the one before is gone.
            held = [link for pid in self.processes(self.keeper) for link in scratch.open_files(pid)]
            # The device of a container that is gone has lost the folders above it.
            deposited = any(Path(link).name == "fuse" for link in held) and any("memfd:" in link for link in held)
            return deposited and not self.client.status().survival_refusal

        self.wait_until(keeps, "the keeper has not got the daemon's descriptors")

    def wait_for_daemon(self) -> None:
        def answers() -> bool:
            with contextlib.suppress(MantaError):
                self.client.status(timeout_s=5.0)
                return True
            return False

        self.wait_until(answers, "the daemon did not answer")

    def start_driver(self, *arguments: str) -> None:
        """The container `csi`, with more arguments. It is there when the kubelet can register it."""
        kubelet = self.kubelet.folder
        command = [sys.executable, "-m", "manta_csi", "serve", "--kubelet-dir", str(kubelet)]
        command += ["--driver-name", DRIVER_NAME, "--control-socket", str(self.control), "--node-id", "node-1"]
        command += ["--log-level", "debug", *arguments]
        volumes = [pods.Volume(self.runtime, "HostToContainer"), pods.Volume(kubelet, "Bidirectional")]
        self.driver = self._start("csi", command, volumes)

    def restart_driver(self) -> None:
        """Killed, started, registered."""
        self.driver.kill()
        self.start_driver()
        self.kubelet.restart()

    def restart_daemon(self) -> None:
        self.daemon.kill()
        self.start_daemon()

    def pod(self, *volumes: Volume) -> pods.Container:
        """A container with its volumes at `models`, or at `models`/NAME where there are several. It runs until `end_pods`."""
        at = {v.name: self.models if len(volumes) == 1 else self.models / v.name for v in volumes}
        mounts = [pods.Volume(self.kubelet.target(v), "None", at[v.name]) for v in volumes]
        pod = self.host.container(volumes[0].pod.name, volumes=mounts)
        self._pods.append(pod)
        return pod

    def end_pods(self) -> None:
        for pod in self._pods:
            pod.kill()
        self._pods.clear()

    def _start(self, name: str, command: list[str], volumes: list[pods.Volume]) -> pods.Container:
        if name not in self._logs:
            self._logs[name] = (self.folder.parent / f"{name}.log").open("ab", buffering=0)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MANTA_", "HF_", "HUGGING"))}
        environment = {
            **kept,
            "HOME": str(self._home),
            "PYTHONPATH": f"{REPOSITORY}:{DRIVER}",
            "HF_ENDPOINT": self._endpoint,
            "HF_HOME": str(self._home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MANTA_CONFIG": "/dev/null",
            "MANTA_CACHE_DIR": str(self.cache),
            "MANTA_DAEMON_RUNTIME_DIR": str(self.runtime),
            **({"MANTA_DAEMON_KEEPER": str(self.keeper_socket)} if self._kept else {}),
            **({"HF_TOKEN": self._token} if self._token and name == "daemon" else {}),
            **self._environment,
        }
        log = self._logs[name]
        return self.host.container(name, command, volumes, env=environment, stdout=log, stderr=log)

    # -- what is so ---------------------------------------------------------------------------------------------------

    def logs(self, name: str) -> str:
        """All that the containers of this name have said: "daemon", "csi" or "keeper"."""
        texts = [(self.folder.parent / f"{name}.log").read_text(errors="replace")]
        if name == "daemon":
            texts += [path.read_text(errors="replace") for path in sorted(self.runtime.glob("*/daemon.log*"))]
        return "".join(texts)

    def log_tails(self) -> str:
        """The ends of all logs, for the message of a failure: they go with the node."""
        tails = [f"{name}:\n" + "\n".join(self.logs(name).splitlines()[-LOG_LINES:]) for name in self._logs]
        return "\n".join(tails)

    def processes(self, container: pods.Container) -> list[int]:
        """Those of a container, by the pids that this process knows them by."""
        space = os.readlink(f"/proc/{container.pid}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "ns/pid") == space:
                    found.append(int(process.name))
        return sorted(found)

    def wait_until(self, condition: Callable[[], bool], problem: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Polls. Raises Unavailable with `problem` and the logs' ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise Unavailable(f"{problem} within {timeout_s:g} s.\n{self.log_tails()}")
            time.sleep(POLL_S)
