"""`manta-csi`: serves, or asks a driver whether it lives (`manta-csi probe`, for a container's probes)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from manta.errors import MantaError
from manta_csi import logs
from manta_csi.settings import Probing, read

GRPC_DEBUGGING = ("GRPC_TRACE", "GRPC_VERBOSITY")
"""gRPC's own traces show what goes over the wire, secrets included, so they are not to be had here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 after SIGTERM, 1 when the driver could not serve or did not answer, 2 for wrong options."""
    try:
        settings = read(sys.argv[1:] if arguments is None else arguments)
    except MantaError as error:
        print(f"manta-csi: {error.message}", file=sys.stderr)
        return 2
    for name in GRPC_DEBUGGING:
        os.environ.pop(name, None)
    from manta_csi import server  # after that: grpc reads its variables once

    if isinstance(settings, Probing):
        wrong = asyncio.run(server.probe(settings.endpoint, ready=settings.ready, timeout_s=settings.timeout_s))
        if wrong:
            print(f"manta-csi: {wrong}", file=sys.stderr)
        return 1 if wrong else 0
    logs.configure(settings.log_level, settings.log_format)
    try:
        asyncio.run(server.serve(settings))
    except MantaError as error:
        print(f"manta-csi: {error.message}", file=sys.stderr)
        return 1
    return 0
