"""Who the other nodes might be: `swarm.peers` turned into addresses, again and again; here and only here. asyncio.

Whether a node is there, and which, `manta.swarm.members` finds out by asking; our own address may be among those found. What was found last
stays while it cannot be looked up: a name server that is away takes no member with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from manta.config import ListenAddress, parse_address, parse_peers

LOOKUP_EVERY_SECONDS = 5.0
"""A headless Service's records live for 5 to 30 s."""

LOOKUP_SECONDS_MAX = 4.0

TROUBLE_AFTER_SECONDS = 15.0
"""A look-up that fails for this long is said."""

Found = Callable[[frozenset[str]], None]
Troubled = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    """Where a pod finds its right to ask the Kubernetes API: the variables KUBERNETES_SERVICE_*, and the folder with ca.crt and token."""

    folder: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)


async def discover(peers: str, found: Found, trouble: Troubled, account: ServiceAccount | None = None) -> None:
    """Calls `found` with all addresses (HOST:PORT) whenever they are others; `trouble` with a sentence when that does not work, and with ""
    while it does. Until it is cancelled. `peers` is what `swarm.peers` says; raises ValueError where it is nothing that may be said there.
    """
    kind, names = parse_peers(peers)
    if kind == "dns":
        await resolve(names[0], found, trouble)
    elif kind == "kubernetes":
        from manta.swarm.kubernetes import watch_service

        namespace, service = names
        await watch_service(namespace, service, found, trouble, account or ServiceAccount())
    else:
        found(frozenset(str(parse_address(name)) for name in names))
        await asyncio.Event().wait()


async def resolve(
    name: str,
    found: Found,
    trouble: Troubled,
    *,
    every_s: float = LOOKUP_EVERY_SECONDS,
    deadline_s: float = LOOKUP_SECONDS_MAX,
    trouble_after_s: float = TROUBLE_AFTER_SECONDS,
) -> None:
    """Looks `name` (NAME:PORT) up every `every_s`, for IPv4 and IPv6 addresses. A name without any is nobody yet."""
    named = parse_address(name)
    if named is None or named.path:
        raise ValueError(f"{name} is no NAME:PORT")
    last: frozenset[str] | None = None
    well_at = time.monotonic()
    looking: asyncio.Future[frozenset[str]] | None = None
    try:
        while True:
            # A look-up is a thread, which nothing ends: while one hangs, no other is begun.
            looking = looking or asyncio.ensure_future(_look_up(named))
            done, _ = await asyncio.wait([looking], timeout=deadline_s)
            problem = f"no answer within {deadline_s:g} s"
            if done:
                try:
                    addresses = looking.result()
                    problem = ""
                except OSError as error:
                    problem = error.strerror or str(error)
                looking = None
            if not problem:
                well_at = time.monotonic()
                trouble("")
                if addresses != last:
                    last = addresses
                    found(addresses)
            elif time.monotonic() - well_at >= trouble_after_s:
                trouble(
                    f"The members' name {named.host} (swarm.peers) cannot be looked up: {problem}. Those known stay."
                )
            await asyncio.sleep(every_s)
    finally:
        if looking is not None:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await looking


async def _look_up(named: ListenAddress) -> frozenset[str]:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    try:
        answers = await loop.getaddrinfo(named.host, named.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in {socket.EAI_NONAME, socket.EAI_NODATA}:
            return frozenset()
        raise
    except UnicodeError as error:
        raise OSError(f"it is no host name ({error})") from error
    return frozenset(str(ListenAddress(str(sockaddr[0]), named.port)) for *_, sockaddr in answers)
