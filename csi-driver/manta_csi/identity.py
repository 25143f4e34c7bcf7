"""CSI's Identity service: who the driver is, and whether the daemon behind it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.wrappers_pb2 import BoolValue

import manta
from manta_csi.daemon import Daemon
from manta_csi.proto import csi_pb2, csi_pb2_grpc

if TYPE_CHECKING:
    from manta_csi.proto.csi_pb2_grpc import _ServicerContext as Context


class Identity(csi_pb2_grpc.IdentityServicer):
    def __init__(self, daemon: Daemon, driver_name: str, *, controller: bool) -> None:
        self._daemon = daemon
        self._driver_name = driver_name
        self._controller = controller

    async def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: Context
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=self._driver_name, vendor_version=manta.__version__)

    async def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: Context
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        kinds = [csi_pb2.PluginCapability.Service.CONTROLLER_SERVICE] if self._controller else []
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[
                csi_pb2.PluginCapability(service=csi_pb2.PluginCapability.Service(type=kind)) for kind in kinds
            ]
        )

    async def Probe(self, request: csi_pb2.ProbeRequest, context: Context) -> csi_pb2.ProbeResponse:
        """Always answered: that the daemon is away is no reason to restart the driver, which unpublishes without it."""
        return csi_pb2.ProbeResponse(ready=BoolValue(value=await self._daemon.answers()))
