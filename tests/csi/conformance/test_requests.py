"""What the CSI specification says of requests by themselves, with a driver that has no daemon: nothing here may depend on one.

The names begin with those of csi-sanity's node specs where it has one: "should fail when no volume id is provided".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from manta.testing.csi import ACCESS_MODES
from manta.testing.csinode import DRIVER_NAME
from manta.testing.kubelet import Kubelet, Pod, Refused, inline, persistent
from tests.csi.conformance.conftest import Alone, outcome

GOOD = ("model", "revision", "subfolder", "view", "prefetch", "pin")
MOUNT = {"mount": {}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}


def publish_fields(alone: Alone, attributes: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    volume = inline(Pod("serve-0"), "model", {"model": "org/model"} if attributes is None else attributes)
    alone.kubelet.make_parent(volume)
    return alone.kubelet.publish_fields(volume, **changes)


# Identity -----------------------------------------------------------------------------------------------------------


def test_get_plugin_info_should_return_appropriate_information(alone: Alone) -> None:
    info = alone.kubelet.call("GetPluginInfo")
    assert info.name == DRIVER_NAME
    assert re.fullmatch(r"[a-z0-9A-Z]([-.a-z0-9A-Z]{0,61}[a-zA-Z])", info.name)
    assert info.vendor_version


def test_get_plugin_capabilities_has_no_controller(alone: Alone) -> None:
    assert list(alone.kubelet.call("GetPluginCapabilities").capabilities) == []


def test_probe_should_answer_without_a_daemon(alone: Alone) -> None:
    """An error, or ready, would have the container restarted or used: neither helps before the daemon is there."""
    answer = alone.kubelet.call("Probe")
    assert answer.HasField("ready")
    assert not answer.ready.value


# Node ---------------------------------------------------------------------------------------------------------------


def test_node_get_capabilities_should_return_appropriate_capabilities(alone: Alone) -> None:
    capabilities = alone.kubelet.call("NodeGetCapabilities").capabilities
    assert {capability.rpc.type for capability in capabilities} == {2, 4}, "GET_VOLUME_STATS and VOLUME_CONDITION"


def test_node_get_info_should_return_appropriate_values(alone: Alone) -> None:
    info = alone.kubelet.call("NodeGetInfo")
    assert info.node_id == "node-1"
    assert info.max_volumes_per_node >= 0
    assert not info.HasField("accessible_topology")


def test_what_is_not_offered_is_unimplemented(alone: Alone) -> None:
    assert alone.refusal("NodeStageVolume", {"volume_id": "a", "staging_target_path": "/tmp"}).code == "UNIMPLEMENTED"


def test_a_kubelet_that_starts_anew_finds_the_driver_again(alone: Alone) -> None:
    before = alone.kubelet.registration
    assert alone.kubelet.restart() == before
    assert before.endpoint == str(alone.kubelet.folder / "plugins" / DRIVER_NAME / "csi.sock")


def test_the_sockets_are_for_root_alone(alone: Alone) -> None:
    for path in (Path(alone.kubelet.registration.endpoint), *alone.kubelet.registry.iterdir()):
        assert os.stat(path).st_mode & 0o077 == 0, path


@pytest.mark.parametrize("field", ["volume_id", "target_path", "volume_capability"])
def test_node_publish_volume_should_fail_when_no_field_is_provided(alone: Alone, field: str) -> None:
    refused = alone.refusal("NodePublishVolume", publish_fields(alone, **{field: None}))
    assert refused.code == "INVALID_ARGUMENT"
    assert field.replace("_", " ") in refused.details.replace("_", " ")


@pytest.mark.parametrize(
    "capability",
    [
        pytest.param({"block": {}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}, id="block"),
        pytest.param({"access_mode": {"mode": "SINGLE_NODE_WRITER"}}, id="no access type"),
        pytest.param({"mount": {}}, id="no access mode"),
        pytest.param({"mount": {}, "access_mode": {"mode": 0}}, id="unknown access mode"),
        pytest.param({"mount": {}, "access_mode": {"mode": 99}}, id="access mode of a later version"),
    ],
)
def test_node_publish_volume_should_fail_for_capabilities_that_it_cannot_have(
    alone: Alone, capability: dict[str, Any]
) -> None:
    refused = alone.refusal("NodePublishVolume", publish_fields(alone, volume_capability=capability))
    assert refused.code == "INVALID_ARGUMENT"


@pytest.mark.parametrize("mode", ACCESS_MODES)
def test_every_access_mode_of_a_filesystem_is_taken(alone: Alone, mode: str) -> None:
    """What is missing is the daemon, which is the first thing after the request's own faults."""
    capability = {"mount": {}, "access_mode": {"mode": mode}}
    assert alone.refusal("NodePublishVolume", publish_fields(alone, volume_capability=capability)).code in {
        "UNAVAILABLE",
        *(["INVALID_ARGUMENT"] if "WRITER" in mode and mode != "SINGLE_NODE_WRITER" else []),
    }


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({}, id="no model"),
        pytest.param({"model": ""}, id="empty model"),
        pytest.param({"model": "../../etc"}, id="path"),
        pytest.param({"model": "org/model/../../x"}, id="folder out of it"),
        pytest.param({"model": "org/model\n"}, id="line end"),
        pytest.param({"model": "org/model", "subfolder": "../other"}, id="subfolder out of it"),
        pytest.param({"model": "org/model", "view": "everything"}, id="view"),
        pytest.param({"model": "org/model", "prefetch": "all"}, id="prefetch"),
        pytest.param({"model": "org/model", "pin": "maybe"}, id="pin"),
        pytest.param({"model": "org/model", "revision": "a b"}, id="revision with a blank"),
        pytest.param({"model": "https://evil.example/org/model"}, id="URL"),
    ],
)
def test_attributes_that_cannot_be_are_refused(alone: Alone, attributes: dict[str, str]) -> None:
    refused = alone.refusal("NodePublishVolume", publish_fields(alone, attributes))
    assert refused.code == "INVALID_ARGUMENT"
    assert len(refused.details) > 20, "a sentence"


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "endpoint",
        "cacheDir",
        "cache_dir",
        "HF_TOKEN",
        "mountOptions",
        "command",
        "Model",
        "modelName",
        "csi.storage.k8s.io",
        "",
    ],
)
def test_unknown_and_dangerous_attributes_are_refused_with_the_good_ones(alone: Alone, name: str) -> None:
    refused = alone.refusal("NodePublishVolume", publish_fields(alone, {"model": "org/model", name: "hf_verysecret"}))
    assert refused.code == "INVALID_ARGUMENT"
    assert all(good in refused.details for good in GOOD)
    assert "hf_verysecret" not in refused.details, "somebody may have put a token there"
    assert "hf_verysecret" not in alone.log.read_text()


def test_what_kubernetes_adds_is_taken(alone: Alone) -> None:
    context = {
        "model": "org/model",
        "csi.storage.k8s.io/serviceAccount.tokens": '{"":{"token":"eyJsecret"}}',
        "csi.storage.k8s.io/something.later": "1",
    }
    assert alone.refusal("NodePublishVolume", publish_fields(alone, context)).code == "UNAVAILABLE"
    assert "eyJsecret" not in alone.log.read_text()


@pytest.mark.parametrize("secrets", [{"password": "hf_verysecret"}, {"token": "hf_very secret\n\r"}])
def test_a_secret_without_a_usable_token_is_refused_and_not_repeated(alone: Alone, secrets: dict[str, str]) -> None:
    refused = alone.refusal("NodePublishVolume", publish_fields(alone, secrets=secrets))
    assert refused.code == "INVALID_ARGUMENT"
    assert "hf_very" not in refused.details + alone.log.read_text()
    assert "token" in refused.details


@pytest.mark.parametrize(
    "target", ["relative/path", "/etc", "/", "{kubelet}/pods/../../outside/mount", "{kubelet}/../outside/mount", "a\0b"]
)
def test_targets_outside_of_the_kubelets_directory_are_refused_and_not_touched(alone: Alone, target: str) -> None:
    outside = alone.kubelet.folder.parent / "outside/mount"
    outside.mkdir(parents=True, exist_ok=True)
    path = target.format(kubelet=alone.kubelet.folder)
    assert alone.refusal("NodePublishVolume", publish_fields(alone, target_path=path)).code == "INVALID_ARGUMENT"
    unpublish = {"volume_id": "a", "target_path": path}
    # A kubelet asks again and again until it is done, so nothing to do may be done.
    assert outcome(lambda: alone.kubelet.call("NodeUnpublishVolume", unpublish)) in {"OK", "INVALID_ARGUMENT"}
    assert outside.is_dir()


def test_without_a_daemon_a_publish_is_unavailable_and_says_so(alone: Alone) -> None:
    volume = inline(Pod("serve-0"), "model", {"model": "org/model"})
    with pytest.raises(Refused) as refused:
        alone.kubelet.set_up(volume)
    assert refused.value.code == "UNAVAILABLE"
    assert "daemon" in refused.value.details.lower()
    assert not alone.kubelet.mounted(alone.kubelet.target(volume))
    alone.kubelet.tear_down(volume)
    assert not alone.kubelet.target(volume).parent.exists()


@pytest.mark.parametrize("field", ["volume_id", "target_path"])
def test_node_unpublish_volume_should_fail_when_no_field_is_provided(alone: Alone, field: str) -> None:
    fields = {"volume_id": "a", "target_path": str(alone.kubelet.folder / "pods/a/mount")}
    del fields[field]
    assert alone.refusal("NodeUnpublishVolume", fields).code == "INVALID_ARGUMENT"


def test_node_unpublish_volume_of_what_was_never_published_is_done(alone: Alone) -> None:
    kubelet = alone.kubelet
    for volume in (inline(Pod("a"), "model", {}), persistent(Pod("a"), "pv", "handle", {})):
        kubelet.tear_down(volume)  # not even its parent exists
        kubelet.make_parent(volume)
        kubelet.target(volume).mkdir()
        kubelet.tear_down(volume)
        assert not kubelet.target(volume).parent.exists()


@pytest.mark.parametrize("field", ["volume_id", "volume_path"])
def test_node_get_volume_stats_should_fail_when_no_field_is_provided(alone: Alone, field: str) -> None:
    fields = {"volume_id": "a", "volume_path": "some/path"}
    del fields[field]
    assert alone.refusal("NodeGetVolumeStats", fields).code == "INVALID_ARGUMENT"


def test_node_get_volume_stats_should_fail_when_volume_is_not_found(alone: Alone) -> None:
    for path in ("some/path", str(alone.kubelet.folder / "pods/a/volumes/kubernetes.io~csi/b/mount")):
        assert alone.refusal("NodeGetVolumeStats", {"volume_id": "a", "volume_path": path}).code == "NOT_FOUND"


def test_a_call_that_nobody_knows_is_unimplemented(alone: Alone) -> None:
    kubelet: Kubelet = alone.kubelet
    with pytest.raises(Refused) as refused:
        kubelet.call_at(kubelet.registration.endpoint, "NodeStageVolume", {"volume_id": "a"})
    assert refused.value.code == "UNIMPLEMENTED"
