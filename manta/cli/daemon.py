"""`manta daemon`: runs the daemon in this process, under systemd or Kubernetes, or started by `manta mount`."""

from __future__ import annotations

import os

import manta
from manta.cli.invocation import Invocation


def run(invocation: Invocation) -> int:
    config = invocation.config
    if invocation.arguments.ephemeral:
        _leave_directory()
    from manta import daemon

    return daemon.run(config, ephemeral=invocation.arguments.ephemeral, ready_fd=invocation.arguments.ready_fd)


def _leave_directory() -> None:
    """A daemon outlives the command that started it, whose directory must stay unmountable and removable.

    The workers must still find this package where it was found by a relative path: in a checkout that is not installed.
    """
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    package = os.path.dirname(os.path.dirname(os.path.abspath(manta.__file__)))
    if package == os.getcwd():
        path.append(package)
    if path:
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.chdir("/")
