"""A Controller service for csi-sanity, and for nothing else: volumes that exist in memory, so that its node specs run against this plugin.

Served with --test-controller only. A real cluster has inline volumes and static PersistentVolumes, and no provisioner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from manta.errors import Conflict, Invalid, NoSpace
from manta_csi.answers import answer
from manta_csi.node import access_of, check_given
from manta_csi.proto import csi_pb2, csi_pb2_grpc
from manta_csi.refusals import Unknown

if TYPE_CHECKING:
    from manta_csi.proto.csi_pb2_grpc import _ServicerContext as Context

VOLUMES_MAX = 10_000
NAME_BYTES_MAX = 128
"""CSI's bound on a field."""


class Controller(csi_pb2_grpc.ControllerServicer):
    def __init__(self) -> None:
        self._volumes: dict[str, csi_pb2.Volume] = {}

    async def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: Context
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        rpc = csi_pb2.ControllerServiceCapability.RPC
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[csi_pb2.ControllerServiceCapability(rpc=rpc(type=rpc.CREATE_DELETE_VOLUME))]
        )

    async def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: Context
    ) -> csi_pb2.CreateVolumeResponse:
        async def create() -> csi_pb2.CreateVolumeResponse:
            check_given("name", request.name)
            check_given("volume_capabilities", request.volume_capabilities)
            if len(request.name.encode()) > NAME_BYTES_MAX:
                raise Invalid(f"The volume's name is longer than {NAME_BYTES_MAX} bytes.")
            for capability in request.volume_capabilities:
                access_of(capability)
            limits = request.capacity_range
            known = self._volumes.get(f"test-{request.name}")
            if known is None:
                if len(self._volumes) >= VOLUMES_MAX:
                    raise NoSpace(f"There are {VOLUMES_MAX} volumes already.")
                known = csi_pb2.Volume(
                    volume_id=f"test-{request.name}",
                    capacity_bytes=max(limits.required_bytes, 0),
                    volume_context=request.parameters,
                )
                self._volumes[known.volume_id] = known
            elif known.capacity_bytes < limits.required_bytes or 0 < limits.limit_bytes < known.capacity_bytes:
                raise Conflict(f"The volume {request.name} exists with another capacity.")
            return csi_pb2.CreateVolumeResponse(volume=known)

        return await answer(context, "CreateVolume", create())

    async def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: Context
    ) -> csi_pb2.DeleteVolumeResponse:
        async def delete() -> csi_pb2.DeleteVolumeResponse:
            check_given("volume_id", request.volume_id)
            self._volumes.pop(request.volume_id, None)
            return csi_pb2.DeleteVolumeResponse()

        return await answer(context, "DeleteVolume", delete(), volume=request.volume_id)

    async def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: Context
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        async def validate() -> csi_pb2.ValidateVolumeCapabilitiesResponse:
            check_given("volume_id", request.volume_id)
            check_given("volume_capabilities", request.volume_capabilities)
            if request.volume_id not in self._volumes:
                raise Unknown(f"There is no volume {request.volume_id[:100]!r}.")
            try:
                for capability in request.volume_capabilities:
                    access_of(capability)
            except Invalid as error:
                return csi_pb2.ValidateVolumeCapabilitiesResponse(message=error.message)
            return csi_pb2.ValidateVolumeCapabilitiesResponse(
                confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
                    volume_context=request.volume_context,
                    volume_capabilities=request.volume_capabilities,
                    parameters=request.parameters,
                )
            )

        return await answer(context, "ValidateVolumeCapabilities", validate(), volume=request.volume_id)
