"""`manta restart`: one daemon leaves, another takes over what is mounted. Tells from which version to which."""

from __future__ import annotations

import time

from manta.cli.invocation import Invocation
from manta.cli.render import duration
from manta.control.client import Client
from manta.control.protocol import Running
from manta.errors import Corrupt, NotRunning, Unavailable

HANDOVER_S = 90.0
"""For another daemon to answer: more than the minute after which a keeper gives up one that does not start."""

RETRY_S = 0.1
ANSWER_S = 5.0
"""For one look. A daemon that does not answer it is asked again."""


def restart(invocation: Invocation) -> int:
    console = invocation.console
    client = Client(invocation.config.socket_path)
    try:
        before = client.running()
        _ask(client, before)
    except NotRunning as error:
        raise NotRunning(
            f"No Manta daemon runs for the cache directory {invocation.config.cache.dir}: there is nothing to restart."
        ) from error
    if invocation.arguments.no_wait:
        console.document({"from": before})
        console.tell(f"the daemon (manta {before.version}, pid {before.pid}) hands over to the next one")
        return 0
    began = time.monotonic()
    after = _next(client, before, began + HANDOVER_S)
    seconds = time.monotonic() - began
    console.document({"from": before, "to": after, "seconds": round(seconds, 3)})
    console.tell(
        f"restarted: manta {before.version}, pid {before.pid} -> manta {after.version}, pid {after.pid}, in {duration(seconds)}"
    )
    return 0


def _ask(client: Client, before: Running) -> None:
    """Raises what the daemon says against it. One that leaves in mid-answer has said yes."""
    try:
        client.restart()
    except Unavailable:
        try:
            if _which(client.running(timeout_s=ANSWER_S)) == _which(before):
                raise
        except (NotRunning, Corrupt):
            pass


def _which(daemon: Running) -> tuple[int, float]:
    """Tells one daemon from another."""
    return daemon.pid, daemon.started


def _next(client: Client, before: Running, deadline: float) -> Running:
    """The daemon that answers after `before`. Raises Unavailable when none does in time."""
    problem = "the old one does not leave"
    while time.monotonic() < deadline:
        try:
            found = client.running(timeout_s=ANSWER_S)
            if _which(found) != _which(before):
                return found
        except (NotRunning, Unavailable, Corrupt) as error:
            problem = error.message.rstrip(".")
        time.sleep(RETRY_S)
    raise Unavailable(
        f"The daemon (pid {before.pid}) was asked to hand over, and no other answers after {HANDOVER_S:g} s ({problem})."
        f" The log {client.socket_path.with_name('daemon.log')} has the reason. Where the keeper gave up, `manta mount` mounts anew."
    )
