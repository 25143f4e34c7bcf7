"""`manta daemon`: runs the daemon in this process, under systemd or Kubernetes, or started by `manta mount`."""

from __future__ import annotations

import os

from manta.cli.invocation import Invocation


def run(invocation: Invocation) -> int:
    config = invocation.config
    if invocation.arguments.ephemeral:
        # It outlives the command that started it, whose directory must stay unmountable and removable.
        os.chdir("/")
    from manta import daemon

    return daemon.run(config, ephemeral=invocation.arguments.ephemeral, ready_fd=invocation.arguments.ready_fd)
