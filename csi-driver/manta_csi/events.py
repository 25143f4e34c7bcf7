"""Kubernetes Events on pods about the loading of their models, behind --events, here and only here.

What a publish refuses is shown by the kubelet already, as an event of its own. These tell what comes after it: how far a model has come,
that nothing has come for long, that reads fail. `due` decides, pure; `Announcer` asks the daemon and posts. An event that cannot be
posted is lost: nothing depends on it. Needs the extra `events`, and the right to create events."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Literal

from manta.control.protocol import Mount, Pod
from manta.errors import MantaError, Unavailable
from manta_csi.daemon import Daemon
from manta_csi.logs import redacted

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Between two looks at the daemon's status."""

STEPS = (25, 50, 75)
"""Percent of a volume's bytes in the cache at which an event says so; a model that was there from the start says nothing."""

SLOW_S = 60.0
"""Without a byte, while reads wait."""

EVENTS_MAX = 8
"""Per volume. A pod's list of events is short, and others need it too."""

VOLUMES_MAX = 1024
POST_S = 5.0
MESSAGE_CHARACTERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Event:
    pod: Pod
    kind: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Told:
    """What has been said of a volume."""

    step: int
    cached: int
    since: float
    """When `cached` last changed, on the caller's clock."""
    error: str = ""
    slow: bool = False
    events: int = 0


def due(mount: Mount, told: Told | None, *, reading: bool, now: float) -> tuple[Told, Event | None]:
    """The event to post about a mount, if any, and what is remembered then. `reading`: somebody waits for its bytes."""
    assert mount.pod is not None
    percent = 100 if mount.size == 0 else min(100, 100 * mount.cached // mount.size)
    step = max((s for s in (0, *STEPS, 100) if percent >= s), default=0)
    if told is None:
        return Told(step, mount.cached, now), None
    moved = mount.cached != told.cached
    after = replace(
        told, step=max(step, told.step), cached=mount.cached, since=now if moved or not reading else told.since
    )
    if told.events >= EVENTS_MAX:
        return after, None
    error = mount.errors[-1] if mount.errors else ""
    event: Event | None = None
    if error and error != told.error:
        after = replace(after, error=error)
        event = Event(mount.pod, "Warning", "ModelReadFailed", error)
    elif reading and not moved and now - told.since >= SLOW_S and not told.slow:
        after = replace(after, slow=True)
        message = f"{mount.target} waits: nothing has come for {now - told.since:.0f} s; `manta status` on the node says from where."
        event = Event(mount.pod, "Warning", "ModelSlow", message)
    elif step > told.step:
        after = replace(after, slow=False)
        said = f"{mount.target}: {_gigabytes(mount.cached)} of {_gigabytes(mount.size)} are on the node"
        if percent >= 100:
            event = Event(mount.pod, "Normal", "ModelLoaded", f"{said}.")
        else:
            event = Event(mount.pod, "Normal", "ModelLoading", f"{said} ({percent} %), {_gigabytes(mount.rate)}/s now.")
    return (replace(after, events=told.events + 1), event) if event else (after, None)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Announcer:
    """Belongs to the event loop. Raises Unavailable at once where the extra is not installed."""

    def __init__(self, daemon: Daemon, driver_name: str, node: str) -> None:
        try:
            from kubernetes_asyncio import client, config
            from kubernetes_asyncio.config import incluster_config
        except ImportError as error:
            raise Unavailable(
                "--events needs kubernetes_asyncio: install manta-csi[events], or leave it out."
            ) from error
        self._client: ModuleType = client
        self._load: Callable[[], None] = incluster_config.load_incluster_config
        self._not_in_a_pod: type[Exception] = config.ConfigException
        self._daemon = daemon
        self._driver_name = driver_name
        self._node = node
        self._told: dict[str, Told] = {}

    async def run(self) -> None:
        try:
            self._load()
        except self._not_in_a_pod as error:
            log.error("no events are posted: the driver does not run in a pod with a service account (%s)", error)
            return
        async with self._client.ApiClient() as api:
            events = self._client.CoreV1Api(api)
            while True:
                for event in await self._look():
                    await self._post(events, event)
                await asyncio.sleep(LOOK_S)

    async def _look(self) -> Sequence[Event]:
        try:
            status = await self._daemon.status()
        except MantaError:
            return []  # the reconciliation says so
        waiting = {transfer.name.partition("@")[0] for transfer in status.transfers if transfer.waiting}
        found: list[Event] = []
        told: dict[str, Told] = {}
        for mount in status.mounts[:VOLUMES_MAX]:
            if mount.pod is None or not mount.publication:
                continue
            reading = any(name.startswith(mount.target.partition("@")[0]) for name in waiting)
            told[mount.publication], event = due(
                mount, self._told.get(mount.publication), reading=reading, now=time.monotonic()
            )
            if event is not None:
                found.append(event)
        self._told = told
        return found

    async def _post(self, events: Any, event: Event) -> None:
        try:
            await events.create_namespaced_event(event.pod.namespace, self.body(event), _request_timeout=POST_S)
        except Exception as error:  # whatever a client library raises: an event is not worth the driver
            log.warning("an event could not be posted: %s", type(error).__name__)

    def body(self, event: Event) -> Mapping[str, object]:
        """The Event object, of core/v1."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{event.pod.name[:200]}.{uuid.uuid4().hex[:16]}", "namespace": event.pod.namespace},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": event.pod.name,
                "namespace": event.pod.namespace,
                "uid": event.pod.uid,
            },
            "type": event.kind,
            "reason": event.reason,
            "message": redacted(event.message)[:MESSAGE_CHARACTERS_MAX],
            "source": {"component": self._driver_name, "host": self._node},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
