"""CSI's Node service: what a request must have before anything is done, and how what was found is told.

Volumes are published without a staging step, so the methods of staging and growing are UNIMPLEMENTED.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc

from manta.control.protocol import Mount
from manta.errors import Invalid
from manta_csi.answers import answer
from manta_csi.proto import csi_pb2, csi_pb2_grpc
from manta_csi.publisher import Publisher, Request, target_of
from manta_csi.refusals import Unknown

if TYPE_CHECKING:
    from manta_csi.proto.csi_pb2_grpc import _ServicerContext as Context

VOLUME_ID_CHARACTERS_MAX = 1024

MOUNT_OPTIONS = {"ro", "nosuid", "nodev", "noatime"}
"""What a PersistentVolume's mountOptions may ask for: what every volume is anyway."""

_Capability = csi_pb2.NodeServiceCapability
_Mode = csi_pb2.VolumeCapability.AccessMode.Mode
_Unit = csi_pb2.VolumeUsage.Unit


class Node(csi_pb2_grpc.NodeServicer):
    def __init__(self, publisher: Publisher, node_id: str, kubelet_dir: Path) -> None:
        self._publisher = publisher
        self._node_id = node_id
        self._kubelet_dir = kubelet_dir
        self._real_dir = Path(kubelet_dir.resolve())

    async def NodeGetInfo(self, request: csi_pb2.NodeGetInfoRequest, context: Context) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._node_id)

    async def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: Context
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        kinds = (_Capability.RPC.GET_VOLUME_STATS, _Capability.RPC.VOLUME_CONDITION)
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[_Capability(rpc=_Capability.RPC(type=kind)) for kind in kinds]
        )

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: Context
    ) -> csi_pb2.NodePublishVolumeResponse:
        async def publish() -> csi_pb2.NodePublishVolumeResponse:
            checked = self._checked(request)
            await self._publisher.run(self._publisher.publish(checked))
            return csi_pb2.NodePublishVolumeResponse()

        return await answer(
            context, "NodePublishVolume", publish(), volume=request.volume_id, target=request.target_path
        )

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: Context
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        async def unpublish() -> csi_pb2.NodeUnpublishVolumeResponse:
            _check_volume(request.volume_id)
            check_given("target_path", request.target_path)
            try:
                target = self._target(request.target_path)
            except Invalid:
                return csi_pb2.NodeUnpublishVolumeResponse()  # nothing of ours can be there
            await self._publisher.run(self._publisher.unpublish(request.volume_id, target))
            return csi_pb2.NodeUnpublishVolumeResponse()

        return await answer(
            context, "NodeUnpublishVolume", unpublish(), volume=request.volume_id, target=request.target_path
        )

    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: Context
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        async def stats() -> csi_pb2.NodeGetVolumeStatsResponse:
            _check_volume(request.volume_id)
            check_given("volume_path", request.volume_path)
            try:
                target = self._target(request.volume_path)
            except Invalid as error:
                raise Unknown(
                    f"The volume {request.volume_id} is not published at {request.volume_path[:200]!r}."
                ) from error
            return statistics(*await self._publisher.look(request.volume_id, target))

        return await answer(
            context, "NodeGetVolumeStats", stats(), volume=request.volume_id, target=request.volume_path
        )

    async def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: Context
    ) -> csi_pb2.NodeStageVolumeResponse:
        await _unimplemented(context)

    async def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: Context
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        await _unimplemented(context)

    async def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, context: Context
    ) -> csi_pb2.NodeExpandVolumeResponse:
        await _unimplemented(context)

    def _target(self, path: str) -> str:
        return target_of(path, self._kubelet_dir, self._real_dir)

    def _checked(self, request: csi_pb2.NodePublishVolumeRequest) -> Request:
        """Raises Invalid for what no later version would take either: it is final also to a republish."""
        _check_volume(request.volume_id)
        check_given("target_path", request.target_path)
        if not request.HasField("volume_capability"):
            _missing("volume_capability")
        return Request(
            request.volume_id,
            self._target(request.target_path),
            request.readonly,
            access_of(request.volume_capability),
            request.volume_context,
            request.secrets,
        )


def access_of(capability: csi_pb2.VolumeCapability) -> int:
    """The access mode's number. Raises Invalid for what cannot be mounted. Every mode is fine: a volume is read-only in each."""
    kind = capability.WhichOneof("access_type")
    if kind == "block":
        raise Invalid("Manta's volumes are directories of files: volumeMode must be Filesystem, not Block.")
    if kind is None:
        _missing("volume_capability.access_type")
    mode = capability.access_mode.mode
    if mode == _Mode.UNKNOWN or mode not in _Mode.values():
        raise Invalid("The request's access mode is unknown: ReadOnlyMany is the one that fits Manta's volumes.")
    odd = sorted({option for flag in capability.mount.mount_flags for option in flag.split(",")} - MOUNT_OPTIONS)
    if odd:
        raise Invalid(
            f"Manta's volumes take no mount option {odd[0][:64]!a}; allowed are {', '.join(sorted(MOUNT_OPTIONS))}."
        )
    return int(mode)


def statistics(mount: Mount | None, problem: str) -> csi_pb2.NodeGetVolumeStatsResponse:
    """Of the bytes, used are those in the node's cache, and available those that have still to come."""
    size, cached, files = (mount.size, min(mount.cached, mount.size), mount.files) if mount else (0, 0, 0)
    usage = csi_pb2.VolumeUsage
    return csi_pb2.NodeGetVolumeStatsResponse(
        usage=[
            usage(unit=_Unit.BYTES, total=size, used=cached, available=size - cached),
            usage(unit=_Unit.INODES, total=files, used=files, available=0),
        ],
        volume_condition=csi_pb2.VolumeCondition(
            abnormal=bool(problem), message=problem[:1000] or "The volume can be read."
        ),
    )


def _check_volume(volume: str) -> None:
    check_given("volume_id", volume)
    if len(volume) > VOLUME_ID_CHARACTERS_MAX or not volume.isprintable():
        raise Invalid(f"The volume_id is no name: expected at most {VOLUME_ID_CHARACTERS_MAX} printable characters.")


def check_given(name: str, value: object) -> None:
    """Raises Invalid where a field that CSI requires is empty. For `manta_csi.controller` too."""
    if not value:
        _missing(name)


def _missing(name: str) -> NoReturn:
    raise Invalid(f"The request has no {name}, which CSI requires.")


async def _unimplemented(context: Context) -> NoReturn:
    await context.abort(
        grpc.StatusCode.UNIMPLEMENTED, "Manta publishes volumes without staging them, and a model's volume cannot grow."
    )
