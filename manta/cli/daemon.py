"""`manta daemon`: runs the daemon in this process, where somebody else starts the next one (systemd, a keeper, a container runtime); or
becomes its keeper, with the daemon as its child."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from manta import keeper
from manta.cli.invocation import Invocation
from manta.control.client import is_kept


def run(invocation: Invocation) -> int:
    config, arguments = invocation.config, invocation.arguments
    # A descriptor to be told on is what a program gives that has decided about the keeper itself.
    if is_kept(config) and arguments.ready_fd is None and not arguments.unkept and not os.environ.get("NOTIFY_SOCKET"):
        command = [sys.executable, *sys.orig_argv[1:]]
        command = keeper.command_line(str(config.make_instance_dir()), command)
        os.execv(command[0], command)
    from manta import daemon

    if arguments.unkept:
        config = replace(config, daemon=replace(config.daemon, keeper=""))
    return daemon.run(config, ephemeral=arguments.ephemeral, ready_fd=arguments.ready_fd)
