"""The kubelet that the driver's tests use, with a plugin that answers what the test says, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from manta.errors import Unavailable
from manta.testing.csi import message, method
from manta.testing.kubelet import Kubelet, Pod, Refused, inline, persistent

NAME = "csi.example.org"


class Plugin:
    """It answers as a driver that mounts nothing. `refusal`: the status of the next publish."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "plugins" / "csi.sock"
        self.info = {"type": "CSIPlugin", "name": NAME, "endpoint": str(self.socket), "supported_versions": ["1.0.0"]}
        self.refusal: grpc.StatusCode | None = None
        self.asked: list[tuple[str, Any]] = []
        self.hold = threading.Event()
        self.hold.set()
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((_Handler(self),))
        for path in (self.socket, folder / "plugins_registry" / f"{NAME}-reg.sock"):
            path.unlink(missing_ok=True)
            self._server.add_insecure_port(f"unix:{path}")
        self._server.start()

    def close(self) -> None:
        self.hold.set()
        self._server.stop(None).wait(10)

    def answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append((name, request))
        if name == "GetInfo":
            return message("pluginregistration.PluginInfo")(**self.info)
        if name == "NotifyRegistrationStatus":
            return message("pluginregistration.RegistrationStatusResponse")()
        if name == "NodeGetInfo":
            return message("csi.v1.NodeGetInfoResponse")(node_id="node-1", max_volumes_per_node=7)
        if name == "NodePublishVolume":
            self.hold.wait(20)
            Path(request.target_path).mkdir(exist_ok=True)
            if self.refusal:
                context.abort(self.refusal, "not today")
        if name == "NodeGetVolumeStats":
            usage = [
                {"unit": "BYTES", "available": 1, "total": 3, "used": 2},
                {"unit": "INODES", "total": 5, "used": 5},
            ]
            return message("csi.v1.NodeGetVolumeStatsResponse")(usage=usage)
        return message(f"csi.v1.{name}Response")()

    def last(self, name: str) -> Any:
        return [request for asked, request in self.asked if asked == name][-1]


class _Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        name = handler_call_details.method.rpartition("/")[2]
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._plugin.answer(name, request, context),
            request_deserializer=method(name).request.FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )


@pytest.fixture
def kubelet(tmp_path: Path) -> Kubelet:
    return Kubelet(tmp_path)


@pytest.fixture
def plugin(kubelet: Kubelet) -> Iterator[Plugin]:
    plugin = Plugin(kubelet.folder)
    yield plugin
    plugin.close()


def test_a_plugin_is_found_and_told_that_it_is_registered(kubelet: Kubelet, plugin: Plugin) -> None:
    found = kubelet.register(NAME)
    assert (found.node_id, found.volumes_max, found.versions) == ("node-1", 7, ("1.0.0",))
    assert [name for name, _ in plugin.asked] == ["GetInfo", "NodeGetInfo", "NotifyRegistrationStatus"]
    assert plugin.last("NotifyRegistrationStatus").plugin_registered


@pytest.mark.parametrize("wrong", [{"type": "DevicePlugin"}, {"supported_versions": ["0.3.0"]}])
def test_a_plugin_that_a_kubelet_would_not_take_is_told_why(
    kubelet: Kubelet, plugin: Plugin, wrong: dict[str, Any]
) -> None:
    plugin.info |= wrong
    with pytest.raises(Refused):
        kubelet.register(NAME)
    status = plugin.last("NotifyRegistrationStatus")
    assert not status.plugin_registered
    assert status.error


def test_no_plugin_is_an_error_in_time(kubelet: Kubelet) -> None:
    with pytest.raises(Unavailable, match="did not register"):
        kubelet.register(NAME, timeout_s=0.1)


def test_what_a_publish_has(kubelet: Kubelet, plugin: Plugin) -> None:
    kubelet.register(NAME)
    pod = Pod("serve-0", "team", service_account="loader")
    volume = inline(pod, "model", {"model": "org/name"}, {"token": "hf_secret"})
    target = kubelet.set_up(volume)
    sent = plugin.last("NodePublishVolume")
    assert sent.target_path == str(target) == f"{kubelet.folder}/pods/{pod.uid}/volumes/kubernetes.io~csi/model/mount"
    assert sent.volume_id == volume.volume_id
    assert len(sent.volume_id) == len("csi-") + 64
    assert dict(sent.secrets) == {"token": "hf_secret"}
    assert sent.volume_capability.HasField("mount")
    assert sent.volume_capability.access_mode.mode == 1
    assert dict(sent.volume_context) == {
        "model": "org/name",
        "csi.storage.k8s.io/pod.name": "serve-0",
        "csi.storage.k8s.io/pod.namespace": "team",
        "csi.storage.k8s.io/pod.uid": pod.uid,
        "csi.storage.k8s.io/serviceAccount.name": "loader",
        "csi.storage.k8s.io/ephemeral": "true",
    }
    assert "hf_secret" not in repr(volume)
    assert kubelet.stats(volume)["BYTES"].total == 3
    kubelet.tear_down(volume)
    assert not target.parent.exists()
    assert plugin.last("NodeUnpublishVolume").volume_id == volume.volume_id


def test_a_persistent_volume_says_so(kubelet: Kubelet, plugin: Plugin) -> None:
    kubelet.register(NAME)
    kubelet.set_up(persistent(Pod("a"), "pv-1", "handle", {"model": "org/name"}, mount_options=("noatime",)))
    sent = plugin.last("NodePublishVolume")
    assert sent.volume_id == "handle"
    assert sent.volume_capability.access_mode.mode == 3
    assert list(sent.volume_capability.mount.mount_flags) == ["noatime"]
    assert sent.volume_context["csi.storage.k8s.io/ephemeral"] == "false"


@pytest.mark.parametrize(
    ("code", "stays"), [(grpc.StatusCode.PERMISSION_DENIED, False), (grpc.StatusCode.UNAVAILABLE, True)]
)
def test_after_a_final_error_the_target_goes(
    kubelet: Kubelet, plugin: Plugin, code: grpc.StatusCode, stays: bool
) -> None:
    kubelet.register(NAME)
    plugin.refusal = code
    volume = inline(Pod("a"), "model", {})
    with pytest.raises(Refused, match="not today") as refused:
        kubelet.set_up(volume)
    assert refused.value.code == code.name
    assert refused.value.final is not stays
    assert kubelet.target(volume).exists() is stays


def test_a_call_under_way_can_be_cancelled(kubelet: Kubelet, plugin: Plugin) -> None:
    kubelet.register(NAME)
    plugin.hold.clear()
    call = kubelet.begin_set_up(inline(Pod("a"), "model", {}))
    assert not call.done()
    call.cancel()
    with pytest.raises(Refused) as refused:
        call.result()
    assert refused.value.code == "CANCELLED"


def test_calls_after_the_driver_came_back_reach_the_new_one(kubelet: Kubelet, plugin: Plugin) -> None:
    kubelet.register(NAME)
    plugin.close()
    volume = inline(Pod("a"), "model", {})
    with pytest.raises(Refused) as refused:
        kubelet.set_up(volume)
    assert refused.value.code == "UNAVAILABLE"
    second = Plugin(kubelet.folder)
    try:
        assert kubelet.restart().node_id == "node-1"
        kubelet.set_up(volume)
    finally:
        second.close()
