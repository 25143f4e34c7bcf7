"""A kubelet as a CSI driver meets it, here and only here: it finds the driver by its registration socket, and plays publish requests.

    kubelet = Kubelet(folder)                 # what is /var/lib/kubelet elsewhere
    kubelet.register("csi.manta.dev")
    volume = inline(Pod("serve-0"), "model", {"model": "org/name"})
    kubelet.set_up(volume)                    # as for a pod that starts
    kubelet.tear_down(volume)

What it sends and in which order is what kubelet 1.36 does (pkg/volume/csi/csi_mounter.go, csi_client.go, pkg/kubelet/pluginmanager): a
connection for every call, two minutes for its answer; the parent of the target made and the target not; the target's directory removed
after a final error and after an unpublish, and where the driver left it mounted, not. What no driver can tell, such as events, is left
out. It looks into mountinfo and never into a volume. Needs grpcio. Any thread may use it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc

from manta.errors import Unavailable
from manta.testing import scratch
from manta.testing.csi import method

RPC_TIMEOUT_S = 120.0
"""csiTimeout of csi_plugin.go: every call of a volume has it."""
REGISTRATION_TIMEOUT_S = 10.0
"""For GetInfo and NotifyRegistrationStatus."""
POLL_S = 0.02

NON_FINAL = {"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
"""After these a kubelet holds the volume for perhaps mounted, and tries again; after any other, for not mounted (isFinalError)."""

CONTEXT = "csi.storage.k8s.io/"

_CHANNEL_OPTIONS = (
    # As a kubelet's connections: one for each call, which fails at once where nobody listens.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
)


class Refused(Exception):
    """A call that was answered with an error, or not at all: `code` is the name of its gRPC status, such as "PERMISSION_DENIED"."""

    def __init__(self, call: str, code: str, details: str) -> None:
        super().__init__(f"{call}: {code}: {details}")
        self.code = code
        self.details = details

    @property
    def final(self) -> bool:
        """Whether the kubelet now takes it that nothing is mounted."""
        return self.code not in NON_FINAL


@dataclass(frozen=True, slots=True)
class Pod:
    name: str
    namespace: str = "default"
    uid: str = field(default_factory=lambda: str(uuid.uuid4()))
    service_account: str = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A volume of a pod whose driver is ours. Made by `inline` and `persistent`."""

    pod: Pod
    name: str
    """In the target's path: the volume's name in the pod's spec, the PV's name otherwise."""
    volume_id: str
    attributes: Mapping[str, str]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    ephemeral: bool = True
    access_mode: str = "SINGLE_NODE_WRITER"
    readonly: bool = False
    mount_options: tuple[str, ...] = ()


def inline(
    pod: Pod,
    name: str,
    attributes: Mapping[str, str],
    secrets: Mapping[str, str] | None = None,
    *,
    readonly: bool = False,
) -> Volume:
    """`csi:` in the pod's own volumes. `secrets` is the content of nodePublishSecretRef."""
    handle = hashlib.sha256(f"{pod.uid}{name}".encode()).hexdigest()
    return Volume(
        pod=pod,
        name=name,
        volume_id=f"csi-{handle}",
        attributes=dict(attributes),
        secrets=dict(secrets or {}),
        readonly=readonly,
    )


def persistent(
    pod: Pod,
    name: str,
    handle: str,
    attributes: Mapping[str, str],
    secrets: Mapping[str, str] | None = None,
    *,
    access_mode: str = "MULTI_NODE_READER_ONLY",
    readonly: bool = False,
    mount_options: tuple[str, ...] = (),
) -> Volume:
    """A static PV of that name; `handle` is its volumeHandle. `readonly` is the claim's in the pod, not the access mode's."""
    return Volume(
        pod=pod,
        name=name,
        volume_id=handle,
        attributes=dict(attributes),
        secrets=dict(secrets or {}),
        ephemeral=False,
        access_mode=access_mode,
        readonly=readonly,
        mount_options=mount_options,
    )


@dataclass(frozen=True, slots=True)
class Registration:
    """A driver that has registered, as the kubelet knows it."""

    name: str
    endpoint: str
    versions: tuple[str, ...]
    node_id: str
    volumes_max: int
    """Volumes the driver wants on the node at most; 0: no bound."""


@dataclass(frozen=True, slots=True)
class Usage:
    """NodeGetVolumeStats of one unit: "BYTES" or "INODES"."""

    available: int
    total: int
    used: int


class Call:
    """A call under way."""

    def __init__(self, name: str, channel: grpc.Channel, future: Any) -> None:
        self._name = name
        self._channel = channel
        self._future = future
        self._began = time.monotonic()
        self._ended = math.nan
        future.add_done_callback(self._end)

    def _end(self, _: object) -> None:
        """In a thread of grpc's."""
        self._ended = time.monotonic()

    @property
    def seconds(self) -> float:
        """From the request to the answer; NaN before."""
        return self._ended - self._began

    def result(self) -> Any:
        """The answer's message. Raises Refused."""
        try:
            return self._future.result()
        except grpc.FutureCancelledError:
            raise Refused(self._name, "CANCELLED", "cancelled by the kubelet") from None
        except grpc.RpcError:
            # The future is the call itself, and knows its status.
            raise Refused(self._name, self._future.code().name, self._future.details() or "") from None
        finally:
            if math.isnan(self._ended):
                self._end(None)  # the answer was here before the thread had come to it
            self._channel.close()

    def done(self) -> bool:
        return bool(self._future.done())

    def cancel(self) -> None:
        self._future.cancel()


class Kubelet:
    """`folder` is its root directory: /var/lib/kubelet, or a directory of a test. The parts that a kubelet makes are made.

    `pid` is a process whose mount namespace is the node's; None: this process's own is.
    """

    def __init__(self, folder: Path, *, pid: int | None = None) -> None:
        self.folder = folder
        self._pid = pid
        self.registry = folder / "plugins_registry"
        for directory, mode in (
            (folder, 0o755),
            (self.registry, 0o750),
            (folder / "plugins", 0o750),
            (folder / "pods", 0o750),
        ):
            directory.mkdir(mode=mode, parents=True, exist_ok=True)
        self._registration: Registration | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """A kubelet that ends leaves everything as it is."""
        self._registration = None

    # -- registration -------------------------------------------------------------------------------------------------

    @property
    def registration(self) -> Registration:
        if self._registration is None:
            raise Unavailable("No driver has registered with this kubelet.")
        return self._registration

    def register(self, driver: str, *, timeout_s: float = 30.0) -> Registration:
        """Waits for the driver's socket in plugins_registry and registers it: GetInfo, NodeGetInfo, NotifyRegistrationStatus.

        Raises Unavailable where none registers in time, with what the last attempt met. What the kubelet would not take (another type, no
        version 1) it tells the plugin, and raises Refused.
        """
        deadline = time.monotonic() + timeout_s
        met = "no socket appeared"
        while time.monotonic() < deadline:
            for path in sorted(self.registry.iterdir()):
                if path.name.startswith(".") or not path.is_socket():
                    continue  # as the kubelet's plugin watcher
                try:
                    info = self.call_at(path, "GetInfo", timeout_s=REGISTRATION_TIMEOUT_S)
                except Refused as refused:
                    met = f"{path.name}: {refused}"
                    continue
                if info.name == driver:
                    self._registration = self._take(path, info)
                    return self._registration
                met = f"{path.name} is of {info.name!r}"
            time.sleep(POLL_S)
        raise Unavailable(f"{driver} did not register in {self.registry} within {timeout_s:g} s: {met}.")

    def _take(self, socket: Path, info: Any) -> Registration:
        problem = ""
        node: Any = None
        if info.type != "CSIPlugin":
            problem = f"no handler registered for plugin type: {info.type}"
        elif not any(version.removeprefix("v").startswith("1.") for version in info.supported_versions):
            problem = f"versions {list(info.supported_versions)}: none of them is supported"
        else:
            try:
                node = self.call_at(info.endpoint, "NodeGetInfo")
            except Refused as refused:
                problem = f"error getting CSI node info: {refused}"
        status = {"plugin_registered": not problem, "error": problem}
        self.call_at(socket, "NotifyRegistrationStatus", status, timeout_s=REGISTRATION_TIMEOUT_S)
        if problem:
            raise Refused("registration", "INVALID_ARGUMENT", problem)
        return Registration(
            info.name, info.endpoint, tuple(info.supported_versions), node.node_id, node.max_volumes_per_node
        )

    def restart(self, *, timeout_s: float = 30.0) -> Registration:
        """A new kubelet on the same directory: it knows nothing, and registers what it finds."""
        name = self.registration.name
        self._registration = None
        return self.register(name, timeout_s=timeout_s)

    # -- calls --------------------------------------------------------------------------------------------------------

    def begin(self, name: str, fields: Mapping[str, Any] | None = None, *, timeout_s: float = RPC_TIMEOUT_S) -> Call:
        """A call of the registered driver, with whatever fields: also those that no kubelet would send."""
        return _begin(self.registration.endpoint, name, fields, timeout_s)

    def call(self, name: str, fields: Mapping[str, Any] | None = None, *, timeout_s: float = RPC_TIMEOUT_S) -> Any:
        """As `begin`, and waits for the answer. Raises Refused."""
        return self.begin(name, fields, timeout_s=timeout_s).result()

    def call_at(
        self,
        endpoint: Path | str,
        name: str,
        fields: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> Any:
        """A call of whoever listens at that socket."""
        return _begin(str(endpoint), name, fields, timeout_s).result()

    # -- volumes ------------------------------------------------------------------------------------------------------

    def target(self, volume: Volume) -> Path:
        """Where the pod's runtime finds the volume."""
        name = volume.name.replace("/", "~")
        return self.folder / "pods" / volume.pod.uid / "volumes" / "kubernetes.io~csi" / name / "mount"

    def publish_fields(self, volume: Volume, **changes: Any) -> dict[str, Any]:
        """NodePublishVolumeRequest of that volume; `changes` are fields to send instead (None: left out)."""
        pod = volume.pod
        context = {
            **volume.attributes,
            f"{CONTEXT}pod.name": pod.name,
            f"{CONTEXT}pod.namespace": pod.namespace,
            f"{CONTEXT}pod.uid": pod.uid,
            f"{CONTEXT}serviceAccount.name": pod.service_account,
            f"{CONTEXT}ephemeral": "true" if volume.ephemeral else "false",
        }
        fields: dict[str, Any] = {
            "volume_id": volume.volume_id,
            "target_path": str(self.target(volume)),
            "readonly": volume.readonly,
            "volume_capability": {
                "mount": {"mount_flags": list(volume.mount_options)},
                "access_mode": {"mode": volume.access_mode},
            },
            "secrets": dict(volume.secrets),
            "volume_context": context,
            **changes,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def make_parent(self, volume: Volume) -> None:
        """What a kubelet makes before it asks for a publish: everything above the target, and its note of the volume."""
        parent = self.target(volume).parent
        parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        note = {
            "specVolID": volume.name,
            "volumeHandle": volume.volume_id,
            "driverName": self.registration.name,
            "volumeLifecycleMode": "Ephemeral" if volume.ephemeral else "Persistent",
        }
        (parent / "vol_data.json").write_text(json.dumps(note))

    def begin_set_up(self, volume: Volume, **changes: Any) -> Call:
        """The first part of `set_up`, for many at once. What a failure leaves is for `settle`."""
        self.make_parent(volume)
        return self.begin("NodePublishVolume", self.publish_fields(volume, **changes))

    def set_up(self, volume: Volume, **changes: Any) -> Path:
        """Publishes it as for a pod that starts; the target. Raises Refused; after a final error the target is taken away."""
        try:
            self.begin_set_up(volume, **changes).result()
        except Refused as refused:
            if refused.final:
                self.settle(volume)
            raise
        return self.target(volume)

    def republish(self, volume: Volume, **changes: Any) -> None:
        """What requiresRepublish does every few seconds: the same request once more, and nothing is taken away after an error."""
        self.call("NodePublishVolume", self.publish_fields(volume, **changes))

    def begin_tear_down(self, volume: Volume, *, timeout_s: float = RPC_TIMEOUT_S) -> Call:
        """The first part of `tear_down`, for many at once; `settle` is the other."""
        fields = {"volume_id": volume.volume_id, "target_path": str(self.target(volume))}
        return self.begin("NodeUnpublishVolume", fields, timeout_s=timeout_s)

    def tear_down(self, volume: Volume, *, timeout_s: float = RPC_TIMEOUT_S) -> None:
        """Unpublishes it as for a pod that has ended. Raises Refused, and the kubelet would try again."""
        self.begin_tear_down(volume, timeout_s=timeout_s).result()
        self.settle(volume)

    def settle(self, volume: Volume) -> None:
        """Removes the target's directory and the kubelet's note, unless something is mounted there (removeMountDir).

        Raises OSError where the directory has something in it: a kubelet deletes nothing below a target.
        """
        target = self.target(volume)
        if self.mounted(target):
            return
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(target)
        (target.parent / "vol_data.json").unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(target.parent)

    def stats(self, volume: Volume) -> dict[str, Usage]:
        """NodeGetVolumeStats, by unit: "BYTES", "INODES". Raises Refused."""
        fields = {"volume_id": volume.volume_id, "volume_path": str(self.target(volume))}
        answer = self.call("NodeGetVolumeStats", fields)
        units = {1: "BYTES", 2: "INODES"}
        return {units[part.unit]: Usage(part.available, part.total, part.used) for part in answer.usage}

    @contextmanager
    def volume(self, volume: Volume, **changes: Any) -> Iterator[Path]:
        """Published as long as this lasts."""
        try:
            yield self.set_up(volume, **changes)
        finally:
            self.tear_down(volume)

    def mounted(self, target: Path) -> int:
        """How many mounts there are on exactly this directory, one above the other."""
        return sum(point == target for point, _, _ in scratch.mountinfo(self._pid))

    def mounts(self) -> list[Path]:
        """The targets that have something mounted, one entry for each mount."""
        folder = self.folder / "pods"
        return [point for point, _, _ in scratch.mountinfo(self._pid) if point.is_relative_to(folder)]


def _begin(endpoint: str, name: str, fields: Mapping[str, Any] | None, timeout_s: float) -> Call:
    how = method(name)
    request = how.request(**(fields or {}))
    channel = grpc.insecure_channel(f"unix:{endpoint.removeprefix('unix://')}", options=_CHANNEL_OPTIONS)
    ask = channel.unary_unary(how.path, request_serializer=how.encode, response_deserializer=how.decode)
    return Call(name, channel, ask.future(request, timeout=timeout_s))
