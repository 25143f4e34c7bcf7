"""Requests that nobody would write: each is answered with a status that the specification has, and the driver goes on.

Without a daemon, so whatever is right about a request ends as UNAVAILABLE. Longer: HYPOTHESIS_PROFILE is pytest's --hypothesis-profile.
"""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manta.testing.csi import ACCESS_MODES, method
from manta.testing.kubelet import CONTEXT
from tests.csi.conformance.conftest import Alone, outcome

EXPECTED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "ABORTED", "ALREADY_EXISTS", "PERMISSION_DENIED"}
"""INTERNAL and UNKNOWN are what an exception that nobody expected becomes."""

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
_NAMES = st.sampled_from(
    ["model", "revision", "subfolder", "view", "prefetch", "pin", f"{CONTEXT}pod.uid", f"{CONTEXT}x"]
)
_VALUES = _TEXT | st.sampled_from(
    ["org/model", "tree", "true", "background", "../..", "a/b@c/d", "main", "\x00", "org/model@main/sub", "a" * 5000]
)
_PATHS = st.sampled_from(
    [
        "{k}/pods/u/volumes/kubernetes.io~csi/v/mount",
        "{k}/pods/u",
        "{k}",
        "/",
        "",
        "x",
        "{k}/../x",
        "{k}/pods/\x00",
        "{k}/pods//a/./b/../c",
    ]
)
_CAPABILITIES = st.fixed_dictionaries(
    {},
    optional={
        "mount": st.fixed_dictionaries({}, optional={"fs_type": _TEXT, "mount_flags": st.lists(_TEXT, max_size=3)}),
        "access_mode": st.builds(lambda mode: {"mode": mode}, st.sampled_from(ACCESS_MODES) | st.integers(0, 20)),
    },
)
_PUBLISH = st.fixed_dictionaries(
    {},
    optional={
        "volume_id": _TEXT | st.just("csi-" + "a" * 64),
        "target_path": _PATHS,
        "staging_target_path": _TEXT,
        "readonly": st.booleans(),
        "volume_capability": _CAPABILITIES,
        "secrets": st.dictionaries(_TEXT | st.sampled_from(["token", "HF_TOKEN"]), _TEXT, max_size=3),
        "volume_context": st.dictionaries(_NAMES | _TEXT, _VALUES, max_size=5),
        "publish_context": st.dictionaries(_TEXT, _TEXT, max_size=2),
    },
)


def ask(alone: Alone, name: str, fields: dict[str, Any]) -> str:
    for key in ("target_path", "volume_path"):
        if key in fields:
            fields = {**fields, key: fields[key].format(k=alone.kubelet.folder)}
    return outcome(lambda: alone.kubelet.call(name, fields, timeout_s=30.0))


@SETTINGS
@given(fields=_PUBLISH)
def test_any_publish_is_answered(alone: Alone, fields: dict[str, Any]) -> None:
    assert ask(alone, "NodePublishVolume", fields) in EXPECTED - {"OK"}
    assert not alone.ended


@SETTINGS
@given(volume_id=_TEXT, path=_PATHS)
def test_any_unpublish_and_any_look_is_answered(alone: Alone, volume_id: str, path: str) -> None:
    assert ask(alone, "NodeUnpublishVolume", {"volume_id": volume_id, "target_path": path}) in EXPECTED
    assert ask(alone, "NodeGetVolumeStats", {"volume_id": volume_id, "volume_path": path}) in EXPECTED - {"OK"}
    assert alone.kubelet.folder.is_dir()
    assert not alone.ended


@SETTINGS
@given(body=st.binary(max_size=200))
def test_bytes_that_are_no_message_end_no_driver(alone: Alone, body: bytes) -> None:
    endpoint = alone.kubelet.registration.endpoint
    with grpc.insecure_channel(f"unix:{endpoint}") as channel:
        ask = channel.unary_unary(method("NodePublishVolume").path, None, None)
        with pytest.raises(grpc.RpcError):
            ask(body, timeout=30)
    assert alone.kubelet.call("NodeGetInfo").node_id
    assert not alone.ended


def test_afterwards_nothing_is_left(alone: Alone) -> None:
    assert alone.kubelet.mounts() == []
    assert "manta_csi/" not in alone.log.read_text(errors="replace"), (
        "of a traceback: grpc logs its own for bytes that are no message"
    )
