"""The driver as a process: both sockets, what goes over them, what it logs, its kills and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from manta.control.binding import unbind
from manta_csi.proto import csi_pb2, csi_pb2_grpc, registration_pb2, registration_pb2_grpc
from tests.csi.conftest import needs_root
from tests.csi.fake_daemon import FakeDaemon

pytestmark = needs_root

TOKEN = "hf_" + "q" * 34
ACCOUNT = "eyJ" + "a" * 60
ANSWER_S = 30.0


@dataclass
class Driver:
    """The command line of a driver, and its process while there is one."""

    kubelet_dir: Path
    control: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.kubelet_dir / "plugins/csi.manta.dev/csi.sock"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "manta_csi", *arguments, f"--kubelet-dir={self.kubelet_dir}"]

    @contextmanager
    def running(self, *options: str) -> Iterator[csi_pb2_grpc.NodeStub]:
        with self.log.open("ab") as log:
            command = self.command(
                "serve", f"--control-socket={self.control}", "--node-id=n", "--log-level=debug", *options
            )
            self.process = subprocess.Popen(
                command, stderr=log, env={**os.environ, "GRPC_TRACE": "all", "GRPC_VERBOSITY": "DEBUG"}
            )
        try:
            with grpc.insecure_channel(f"unix:{self.socket}") as channel:
                ready = grpc.channel_ready_future(channel)
                while self.process.poll() is None:
                    with suppress(grpc.FutureTimeoutError):
                        ready.result(0.5)
                        break
                assert self.process.poll() is None, self.log.read_text()
                yield csi_pb2_grpc.NodeStub(channel)
        finally:
            self.process.kill()
            self.process.wait(ANSWER_S)

    def ended(self) -> int:
        assert self.process is not None
        return self.process.wait(ANSWER_S)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=ANSWER_S, check=False)

    def target(self, pod: str = "1") -> str:
        return str(self.kubelet_dir / "pods" / pod / "mount")

    def publication(self, pod: str = "1", *, secret: str = "", **attributes: str) -> csi_pb2.NodePublishVolumeRequest:
        return csi_pb2.NodePublishVolumeRequest(
            volume_id=f"csi-{pod}",
            target_path=self.target(pod),
            volume_capability=csi_pb2.VolumeCapability(
                mount=csi_pb2.VolumeCapability.MountVolume(),
                access_mode=csi_pb2.VolumeCapability.AccessMode(
                    mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
                ),
            ),
            volume_context={"model": "org/name", "csi.storage.k8s.io/pod.uid": "u", **attributes},
            secrets={"token": secret} if secret else {},
        )

    def end(self, pod: str = "1") -> csi_pb2.NodeUnpublishVolumeRequest:
        return csi_pb2.NodeUnpublishVolumeRequest(volume_id=f"csi-{pod}", target_path=self.target(pod))


@pytest.fixture
def driver(kubelet_dir: Path, daemon: FakeDaemon, tmp_path: Path) -> Driver:
    return Driver(kubelet_dir, daemon.socket_path, tmp_path / "csi.log")


@contextmanager
def refused(code: grpc.StatusCode, sentence: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as failure:
        yield
    assert failure.value.code() == code
    assert sentence in (failure.value.details() or "")


def test_a_volume_s_life_through_kills_of_the_driver(driver: Driver, daemon: FakeDaemon) -> None:
    stats = csi_pb2.NodeGetVolumeStatsRequest(volume_id="csi-1", volume_path=driver.target())
    with driver.running() as node:
        node.NodePublishVolume(driver.publication(secret=TOKEN), timeout=ANSWER_S)
        assert Path(driver.target(), "config.json").read_text() == "org/name"
    with driver.running() as node:  # after a SIGKILL: its socket and state file were left
        node.NodePublishVolume(driver.publication(secret=TOKEN), timeout=ANSWER_S)
        with refused(grpc.StatusCode.ALREADY_EXISTS, "other arguments"):
            node.NodePublishVolume(driver.publication(pin="true"), timeout=ANSWER_S)
        assert node.NodeGetVolumeStats(stats, timeout=ANSWER_S).usage[0].used == 500
    Path(driver.kubelet_dir, "plugins/csi.manta.dev/publications.json").write_bytes(b"\0" * 100)
    unbind(driver.target(), lazy=True)
    with driver.running() as node:
        for _ in range(2):
            node.NodeUnpublishVolume(driver.end(), timeout=ANSWER_S)
        with refused(grpc.StatusCode.NOT_FOUND, "not published"):
            node.NodeGetVolumeStats(stats, timeout=ANSWER_S)
    assert not Path(driver.target()).exists()
    assert daemon.publications == {}
    assert daemon.made == 1


def test_nothing_of_a_token_is_logged(driver: Driver, daemon: FakeDaemon) -> None:
    daemon.rights["org/gated"] = set()
    account = {"csi.storage.k8s.io/serviceAccount.tokens": ACCOUNT}
    with driver.running() as node:
        node.NodePublishVolume(driver.publication(secret=TOKEN, **account), timeout=ANSWER_S)
        for odd in ({"model": "org/gated"}, {"token": TOKEN}, {"pin": TOKEN}):
            with pytest.raises(grpc.RpcError) as failure:
                node.NodePublishVolume(driver.publication("2", secret=TOKEN, **{**account, **odd}), timeout=ANSWER_S)
            assert TOKEN not in (failure.value.details() or "")
    written = driver.log.read_text()
    assert "NodePublishVolume" in written
    assert TOKEN not in written
    assert ACCOUNT not in written
    assert ACCOUNT not in str([request.body for request in daemon.requests])


def test_registration_and_probes_and_the_end(driver: Driver, daemon: FakeDaemon) -> None:
    registry = driver.kubelet_dir / "plugins_registry/csi.manta.dev-reg.sock"
    assert driver.run("probe").returncode == 1
    driver.socket.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(driver.socket))
    with driver.running() as node, grpc.insecure_channel(f"unix:{registry}") as channel:
        kubelet = registration_pb2_grpc.RegistrationStub(channel)
        told = kubelet.GetInfo(registration_pb2.InfoRequest(), timeout=ANSWER_S, wait_for_ready=True)
        assert (told.type, told.name, told.endpoint) == ("CSIPlugin", "csi.manta.dev", str(driver.socket))
        assert list(told.supported_versions) == ["1.0.0"]
        kubelet.NotifyRegistrationStatus(registration_pb2.RegistrationStatus(plugin_registered=True), timeout=ANSWER_S)
        assert node.NodeGetInfo(csi_pb2.NodeGetInfoRequest(), timeout=ANSWER_S).node_id == "n"
        capabilities = node.NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest(), timeout=ANSWER_S).capabilities
        assert [capability.rpc.type for capability in capabilities] == [2, 4]
        with refused(grpc.StatusCode.UNIMPLEMENTED, "without staging"):
            node.NodeStageVolume(csi_pb2.NodeStageVolumeRequest(volume_id="v"), timeout=ANSWER_S)
        for volume, field in (("", "volume_id"), ("v", "target_path")):
            with refused(grpc.StatusCode.INVALID_ARGUMENT, f"has no {field}"):
                node.NodePublishVolume(csi_pb2.NodePublishVolumeRequest(volume_id=volume), timeout=ANSWER_S)
            with refused(grpc.StatusCode.INVALID_ARGUMENT, f"has no {field}"):
                node.NodeUnpublishVolume(csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume), timeout=ANSWER_S)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "has no volume_capability"):
            node.NodePublishVolume(
                csi_pb2.NodePublishVolumeRequest(volume_id="v", target_path=driver.target()), timeout=ANSWER_S
            )
        assert driver.run("probe", "--ready").returncode == 0
        daemon.__exit__()
        assert driver.run("probe").returncode == 0
        not_ready = driver.run("probe", "--ready")
        assert (not_ready.returncode, "daemon behind it does not" in not_ready.stderr) == (1, True)
        with refused(grpc.StatusCode.UNAVAILABLE, "No Manta daemon answers"):
            node.NodePublishVolume(driver.publication(), timeout=ANSWER_S)
        with grpc.insecure_channel(f"unix:{driver.socket}") as plain, refused(grpc.StatusCode.UNIMPLEMENTED, ""):
            csi_pb2_grpc.ControllerStub(plain).CreateVolume(csi_pb2.CreateVolumeRequest(name="a"), timeout=ANSWER_S)
        assert driver.process is not None
        driver.process.send_signal(signal.SIGTERM)
        assert driver.ended() == 0
    assert not registry.exists()
    assert not driver.socket.exists()
    assert "the kubelet has registered" in driver.log.read_text()


def test_a_call_under_way_is_ended_before_the_driver(driver: Driver, daemon: FakeDaemon) -> None:
    began, go = threading.Event(), threading.Event()

    def hold(request: object) -> None:
        if str(request).startswith("PUT"):
            began.set()
            go.wait(ANSWER_S)

    daemon.on_request = hold
    with driver.running() as node, ThreadPoolExecutor(1) as pool:
        publish = pool.submit(node.NodePublishVolume, driver.publication(), timeout=ANSWER_S)
        assert began.wait(ANSWER_S)
        assert driver.process is not None
        driver.process.send_signal(signal.SIGTERM)
        go.set()
        publish.result(ANSWER_S)
        assert driver.ended() == 0
    assert Path(driver.target(), "config.json").exists()


def test_the_controller_of_csi_sanity(driver: Driver) -> None:
    with (
        driver.running("--test-controller", "--registration-socket=none"),
        grpc.insecure_channel(f"unix:{driver.socket}") as channel,
    ):
        identity, controller = csi_pb2_grpc.IdentityStub(channel), csi_pb2_grpc.ControllerStub(channel)
        [plugin] = identity.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest(), timeout=ANSWER_S).capabilities
        assert plugin.service.type == csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE
        mode = [driver.publication().volume_capability]
        create = csi_pb2.CreateVolumeRequest(
            name="a",
            volume_capabilities=mode,
            parameters={"model": "org/name"},
            capacity_range=csi_pb2.CapacityRange(required_bytes=10),
        )
        volume = controller.CreateVolume(create, timeout=ANSWER_S).volume
        assert controller.CreateVolume(create, timeout=ANSWER_S).volume == volume
        assert dict(volume.volume_context) == {"model": "org/name"}
        create.capacity_range.required_bytes = 20
        with refused(grpc.StatusCode.ALREADY_EXISTS, "another capacity"):
            controller.CreateVolume(create, timeout=ANSWER_S)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "has no name"):
            controller.CreateVolume(csi_pb2.CreateVolumeRequest(), timeout=ANSWER_S)
        validate = csi_pb2.ValidateVolumeCapabilitiesRequest(volume_id=volume.volume_id, volume_capabilities=mode)
        assert controller.ValidateVolumeCapabilities(validate, timeout=ANSWER_S).confirmed.volume_capabilities
        for _ in range(2):
            controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume.volume_id), timeout=ANSWER_S)
        with refused(grpc.StatusCode.NOT_FOUND, "no volume"):
            controller.ValidateVolumeCapabilities(validate, timeout=ANSWER_S)
    assert not (driver.kubelet_dir / "plugins_registry").exists()


def test_wrong_options(driver: Driver) -> None:
    wrong = driver.run("--token-policy=both")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "manta-csi: --token-policy is 'both': expected secret or node.\n",
    )
