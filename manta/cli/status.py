"""`manta status`: what one daemon serves, fetches and complains about. `manta config`: the settings in effect and their origins."""

from __future__ import annotations

import time

import msgspec

from manta.cli.invocation import Invocation
from manta.cli.render import Console, duration, mounted_on, plural, rate, share, size, table
from manta.config import allowed, items, variable
from manta.control.protocol import FileTransfer, Mount, Status
from manta.errors import Absent
from manta.model.ids import parse_target

TRANSFERS_SHOWN = 10


def status(invocation: Invocation) -> int:
    console = invocation.console
    seen = invocation.connect().status()
    if invocation.arguments.pod:
        seen = _of_pod(seen, invocation.arguments.pod)
    console.document(seen)
    _say_daemon(console, seen)
    if seen.problems:
        console.say("", "WHAT IS WRONG NOW", *(f"  {sentence}" for sentence in seen.problems))
    _say_mounts(console, seen.mounts)
    _say_transfers(console, seen.transfers)
    if seen.errors:
        console.say("", "LATEST ERRORS", *(f"  {sentence}" for sentence in seen.errors))
    return 0


def _of_pod(seen: Status, asked: str) -> Status:
    """With the volumes of that pod alone: its uid, or NAMESPACE/NAME. Raises Absent where it has none."""
    mounts = [
        mount
        for mount in seen.mounts
        if mount.pod is not None and asked in {mount.pod.uid, f"{mount.pod.namespace}/{mount.pod.name}"}
    ]
    if not mounts:
        raise Absent(
            f"No pod {asked} has a volume of Manta on this node. A pod is named by its uid or NAMESPACE/NAME; `manta status` shows those"
            " that have volumes here."
        )
    repos = {str(parse_target(mount.target).repo) for mount in mounts if mount.target}
    whole = any(not mount.target for mount in mounts)
    transfers = [t for t in seen.transfers if whole or any(t.name.startswith(f"{repo}/") for repo in repos)]
    return msgspec.structs.replace(seen, mounts=mounts, transfers=transfers)


def _say_daemon(console: Console, seen: Status) -> None:
    limit = f" of {size(seen.cache_limit)}" if seen.cache_limit else ""
    leaves = ", ends with its last mount" if seen.ephemeral else ""
    up = duration(max(0.0, time.time() - seen.started))
    workers = plural(seen.workers, "worker")
    console.say(
        f"daemon   {seen.version}, pid {seen.pid}, up {up}, {workers}{leaves}",
        *_fuse(seen),
        f"hub      {seen.endpoint}{' (offline: only what is cached)' if seen.offline else ''}",
        f"cache    {seen.cache_dir}: {size(seen.cache_bytes)}{limit}, {size(seen.disk_free)} free on its disk",
        f"origin   {rate(seen.origin_rate)} now, {size(seen.origin_bytes)} since the daemon started",
        *_swarm(seen),
        f"readers  {size(seen.read_bytes)} since the daemon started, beside what the kernel served by itself",
    )


def _swarm(seen: Status) -> list[str]:
    """What other nodes give and take; `manta peers` has more."""
    swarm = seen.swarm
    if swarm is None:
        return []
    who = f"{swarm.up} of {plural(swarm.members, 'other node')} up"
    now = f"{rate(swarm.rate_in)} from them and {rate(swarm.rate_out)} to them now"
    return [f"peers    {who}; {now}, {size(swarm.bytes_in)} and {size(swarm.bytes_out)} since the daemon started"]


def _fuse(seen: Status) -> list[str]:
    """Which session it is, and what it can do."""
    if not seen.fuse:
        return []
    native = f"through the daemon: {seen.native_refusal}" if seen.native_refusal else "by the kernel itself"
    survival = (
        f"end with it: {seen.survival_refusal}" if seen.survival_refusal else f"outlive it (keeper: {seen.keeper})"
    )
    return [
        f"fuse     {seen.fuse} session ({seen.fuse_why})",
        f"         complete files are read {native}",
        f"         mounts {survival}",
    ]


def _say_mounts(console: Console, mounts: list[Mount]) -> None:
    if not mounts:
        console.say("", "Nothing is mounted. `manta mount ORG/NAME DIR` mounts a repo.")
        return
    rows = [
        (
            mounted_on(mount),
            mount.target or "(whole hub)",
            f"{mount.commit[:12] or '-'}{' (stale)' if mount.stale else ''}",
            mount.view,
            str(mount.files),
            f"{size(mount.cached)} of {size(mount.size)}",
            share(mount.cached, mount.size) if mount.size else "",
        )
        for mount in mounts
    ]
    console.say("", *table(("MOUNTED ON", "TARGET", "COMMIT", "VIEW", ">FILES", ">CACHED", ">"), rows))
    for mount in mounts:
        if mount.errors:
            console.say(
                "", f"READS THAT FAILED IN {mounted_on(mount)}", *(f"  {sentence}" for sentence in mount.errors)
            )


def _say_transfers(console: Console, transfers: list[FileTransfer]) -> None:
    if not transfers:
        return
    shown = transfers if console.verbosity >= 1 else transfers[:TRANSFERS_SHOWN]
    rows = [
        (transfer.name, f"{size(transfer.cached)} of {size(transfer.size)}", share(transfer.cached, transfer.size))
        for transfer in shown
    ]
    console.say("", *table(("FETCHING", ">CACHED", ">"), rows))
    if len(shown) < len(transfers):
        console.say(f"and {len(transfers) - len(shown)} more (--verbose shows all)")


def config(invocation: Invocation) -> int:
    loaded, console = invocation.loaded, invocation.console
    console.document(
        {
            key: {
                "value": value if isinstance(value, bool | int | float) else str(value),
                "origin": loaded.origins[key].kind,
                "from": loaded.origins[key].name,
                "variable": variable(key),
                "allowed": allowed(key),
            }
            for key, value in items(loaded.config)
        }
    )
    rows = [
        (key, str(value).lower() if isinstance(value, bool) else str(value), str(loaded.origins[key]), variable(key))
        for key, value in items(loaded.config)
    ]
    console.say(*table(("SETTING", "VALUE", "FROM", "VARIABLE"), rows))
    return 0
