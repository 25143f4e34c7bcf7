"""`manta keeper`: becomes the keeper of a daemon that somebody else starts, a process of the standard library alone."""

from __future__ import annotations

import os

from manta import keepstore
from manta.cli.invocation import Invocation
from manta.errors import Invalid


def run(invocation: Invocation) -> int:
    path, seconds = invocation.config.daemon.keeper, invocation.arguments.give_up_after
    if not path:
        raise Invalid(
            "Nothing says where the keeper listens: name its socket with --keeper or MANTA_DAEMON_KEEPER, as for the daemon."
        )
    if seconds is None:
        seconds = keepstore.GIVE_UP_S
    if not 0 < seconds <= keepstore.GIVE_UP_S_MAX:
        raise Invalid(f"--give-up-after is {seconds:g}: expected seconds, up to {keepstore.GIVE_UP_S_MAX:g}.")
    command = keepstore.command_line(path, seconds)
    os.execv(command[0], command)
