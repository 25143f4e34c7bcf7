"""How the kubelet hears of the driver: its plugin registration service, which the driver serves by itself, without a sidecar.

The kubelet watches a directory for sockets, asks each GetInfo, and tells whether it took the plugin. It asks again as long as the socket
is there.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from manta_csi.logs import fields
from manta_csi.proto import registration_pb2, registration_pb2_grpc

if TYPE_CHECKING:
    from manta_csi.proto.registration_pb2_grpc import _ServicerContext as Context

log = logging.getLogger(__name__)

VERSIONS = ("1.0.0",)
"""Of CSI, as the kubelet compares them."""


class Registration(registration_pb2_grpc.RegistrationServicer):
    def __init__(self, driver_name: str, endpoint: Path) -> None:
        self._driver_name = driver_name
        self._endpoint = endpoint
        self.registered: bool | None = None
        """None before the kubelet has said anything."""

    async def GetInfo(self, request: registration_pb2.InfoRequest, context: Context) -> registration_pb2.PluginInfo:
        return registration_pb2.PluginInfo(
            type="CSIPlugin", name=self._driver_name, endpoint=str(self._endpoint), supported_versions=VERSIONS
        )

    async def NotifyRegistrationStatus(
        self, request: registration_pb2.RegistrationStatus, context: Context
    ) -> registration_pb2.RegistrationStatusResponse:
        self.registered = request.plugin_registered
        if request.plugin_registered:
            log.info("the kubelet has registered %s", self._driver_name)
        else:
            log.error(
                "the kubelet did not register %s; it tries again while the socket is there",
                self._driver_name,
                extra=fields(reason=ascii(request.error[:500])),
            )
        return registration_pb2.RegistrationStatusResponse()
