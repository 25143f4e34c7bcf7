"""Who the other nodes might be, from Kubernetes: the EndpointSlices of a Service, listed and watched; here and only here. asyncio.

Used by `manta.swarm.discovery`. The client is kubernetes_asyncio (the extra `kubernetes`), imported when it is needed: it takes 40 MB and
half a second. Of its answers only what is named here is read, as plain JSON: its models refuse `endpoints: null`, which is how the API
writes an EndpointSlice of nobody.

A list gives all slices and a version; a watch from that version tells what changes, for WATCH_SECONDS, and is followed by one from
the last version heard of. Where the API has forgotten the version (410 Gone), it is listed anew. While the API cannot be asked, what was
known stays.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import msgspec

from manta.config import ListenAddress
from manta.swarm.roster import PROBLEM_CHARACTERS_MAX, printable

if TYPE_CHECKING:
    from kubernetes_asyncio.client import Configuration, DiscoveryV1Api

    from manta.swarm.discovery import ServiceAccount

PORT_NAME = "peer"
SERVICE_LABEL = "kubernetes.io/service-name"

WATCH_SECONDS = 300
"""How long a watch is asked to last, and by chance up to half as long again: so not all nodes come back at once. client-go: 5 to 10 min."""

SILENCE_SECONDS = 120.0
"""A watch that says nothing for so long is begun again, from where it was: the API sends a bookmark about once a minute."""

LIST_SECONDS = 10.0
SLICES_PER_PAGE = 500
"""A slice has 100 endpoints usually, 1000 at most."""

RETRY_SECONDS_MIN = 1.0
RETRY_SECONDS_MAX = 30.0
TROUBLE_AFTER_SECONDS = 15.0
"""An API that is away for this long is said; a refusal at once."""


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    name: str = ""
    resource_version: str = ""
    continue_: str | None = msgspec.field(name="continue", default=None)


class _Conditions(msgspec.Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None


class _Endpoint(msgspec.Struct, frozen=True):
    addresses: list[str] | None = None
    conditions: _Conditions | None = None


class _Port(msgspec.Struct, frozen=True):
    name: str | None = None
    port: int | None = None
    protocol: str | None = None


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of a discovery.k8s.io/v1 EndpointSlice."""

    metadata: _Metadata
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None

    def addresses(self) -> set[str]:
        """HOST:PORT of the endpoints that serve: those that end (terminating) too, as long as they do. At the port named PORT_NAME where
        there are several TCP ports; nobody where there is none."""
        port = self.peer_port
        return {
            str(ListenAddress(endpoint.addresses[0], port))  # the meaning of any others is undefined
            for endpoint in self.endpoints or []
            if port is not None and endpoint.addresses and _serves(endpoint.conditions or _Conditions())
        }

    @property
    def peer_port(self) -> int | None:
        ports = [port for port in self.ports or [] if port.port and port.protocol in {None, "", "TCP"}]
        named = [port for port in ports if port.name == PORT_NAME] or (ports if len(ports) == 1 else [])
        return named[0].port if named else None


class _SliceList(msgspec.Struct, frozen=True):
    metadata: _Metadata
    items: list[EndpointSlice] | None = None


class _Marked(msgspec.Struct, frozen=True):
    """What a bookmark carries: an object without anything but its version."""

    metadata: _Metadata


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct, frozen=True):
    code: int = 0
    message: str = ""


def _serves(conditions: _Conditions) -> bool:
    """By the API's rules: unknown readiness counts as ready, and serving as readiness says where it does not say itself."""
    ready = conditions.ready is not False
    return ready or bool(conditions.serving)


class _Gone(Exception):
    """The API does not know the version any more."""


class Refused(Exception):
    """The API answered `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"it answered {status}: {message}")
        self.status = status


async def watch_service(
    namespace: str,
    service: str,
    found: Callable[[frozenset[str]], None],
    trouble: Callable[[str], None],
    account: ServiceAccount,
    *,
    retry_s: float = RETRY_SECONDS_MIN,
    trouble_after_s: float = TROUBLE_AFTER_SECONDS,
    silence_s: float = SILENCE_SECONDS,
) -> None:
    """`discovery.discover` for NAMESPACE/SERVICE."""
    try:
        await asyncio.to_thread(import_module, "kubernetes_asyncio")
    except ImportError:
        trouble(
            "Members are to be found by Kubernetes (swarm.peers), for which kubernetes_asyncio is missing:"
            " install manta[kubernetes]."
        )
        await asyncio.Event().wait()
    slices = Slices(namespace, service, silence_s)
    last: frozenset[str] | None = None
    well_at, failures = time.monotonic(), 0
    while True:
        try:
            async for addresses in slices.follow(account):
                well_at, failures = time.monotonic(), 0
                trouble(slices.problem)
                if addresses != last:
                    last = addresses
                    found(addresses)
        except Exception as error:
            # A client that is not ours, and a service account that may be missing or broken: nothing of it may end the process.
            sentence = _refusal(error, namespace, service)
            if sentence or time.monotonic() - well_at >= trouble_after_s:
                trouble(
                    sentence or f"The Kubernetes API cannot be asked for members ({_clause(error)}). Those known stay."
                )
        failures += 1
        doubled = min(retry_s * 2 ** min(failures - 1, 16), RETRY_SECONDS_MAX)
        await asyncio.sleep(doubled * (0.5 + random.random() / 2))


class Slices:
    """The EndpointSlices of one Service, as last heard."""

    def __init__(self, namespace: str, service: str, silence_s: float = SILENCE_SECONDS) -> None:
        self._namespace = namespace
        self._service = service
        self._silence_s = silence_s
        self._slices: dict[str, EndpointSlice] = {}
        self._version = ""

    @property
    def addresses(self) -> frozenset[str]:
        return frozenset().union(*(one.addresses() for one in self._slices.values()))

    @property
    def problem(self) -> str:
        """Why nobody is found although there are endpoints; "" where that is not so."""
        peopled = [one for one in self._slices.values() if one.endpoints]
        if not peopled or any(one.peer_port for one in peopled):
            return ""
        return (
            f"The Service {self._namespace}/{self._service} has no port named {PORT_NAME!r}, and not just one:"
            " give the port on which Manta listens that name."
        )

    async def follow(self, account: ServiceAccount) -> AsyncIterator[frozenset[str]]:
        """All addresses, at first and whenever something was heard. Goes on from where it was; ends when the API ends a watch at once.

        Raises Refused, and whatever the client raises when the API is away.
        """
        from kubernetes_asyncio.client import ApiClient, DiscoveryV1Api

        async with ApiClient(_configuration(account)) as client:
            api = DiscoveryV1Api(client)
            while True:
                if not self._version:
                    await self._list(api)
                    yield self.addresses
                began = time.monotonic()
                try:
                    async with aclosing(self._watch(api)) as heard:
                        async for _ in heard:
                            yield self.addresses
                except _Gone:
                    self._version = ""
                if time.monotonic() - began < RETRY_SECONDS_MIN:
                    return

    async def _list(self, api: DiscoveryV1Api) -> None:
        slices: dict[str, EndpointSlice] = {}
        more: dict[str, Any] = {}
        while True:
            response = await self._request(
                api, _request_timeout=aiohttp.ClientTimeout(total=LIST_SECONDS), limit=SLICES_PER_PAGE, **more
            )
            async with response:
                body = await response.read()
            _check(response.status, body)
            page = msgspec.json.decode(body, type=_SliceList)
            slices |= {one.metadata.name: one for one in page.items or []}
            if not page.metadata.continue_:
                break
            more = {"_continue": page.metadata.continue_}
        self._slices, self._version = slices, page.metadata.resource_version

    async def _watch(self, api: DiscoveryV1Api) -> AsyncGenerator[None]:
        """Takes in what the API tells, for WATCH_SECONDS; says when the watch has begun, and after each change."""
        lasts_s = int(WATCH_SECONDS * (1 + random.random() / 2))
        silence = aiohttp.ClientTimeout(total=None, sock_connect=LIST_SECONDS, sock_read=self._silence_s)
        response = await self._request(
            api,
            watch=True,
            resource_version=self._version,
            allow_watch_bookmarks=True,
            timeout_seconds=lasts_s,
            _request_timeout=silence,
        )
        async with response:
            if response.status != 200:
                _check(response.status, await response.read())
            yield
            while True:
                try:
                    line = await response.content.readline()
                except aiohttp.SocketTimeoutError:
                    return
                if not line:
                    return
                if self._take(line):
                    yield

    async def _request(self, api: DiscoveryV1Api, **options: Any) -> aiohttp.ClientResponse:
        selector = f"{SERVICE_LABEL}={self._service}"
        return cast(
            aiohttp.ClientResponse,  # that is what there is without _preload_content
            await api.list_namespaced_endpoint_slice(
                self._namespace, label_selector=selector, _preload_content=False, **options
            ),
        )

    def _take(self, line: bytes) -> bool:
        """One event of a watch. True where slices changed; raises _Gone and Refused."""
        event = msgspec.json.decode(line, type=_Event)
        if event.type == "ERROR":
            _check(msgspec.json.decode(event.object, type=_Status).code or 500, event.object)
        known = event.type in {"ADDED", "MODIFIED", "DELETED"}
        if known:
            one = msgspec.json.decode(event.object, type=EndpointSlice)
            if event.type == "DELETED":
                self._slices.pop(one.metadata.name, None)
            else:
                self._slices[one.metadata.name] = one
            self._version = one.metadata.resource_version
        elif event.type == "BOOKMARK":
            self._version = msgspec.json.decode(event.object, type=_Marked).metadata.resource_version
        return known


def _configuration(account: ServiceAccount) -> Configuration:
    """Read anew for each connection: the token changes about hourly, the authority now and then."""
    from kubernetes_asyncio.client import Configuration
    from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader

    configured = Configuration()
    loader = InClusterConfigLoader(
        str(account.folder / "token"), str(account.folder / "ca.crt"), environ=dict(account.environment)
    )
    loader.load_and_set(configured)
    return configured


def _check(status: int, body: bytes | msgspec.Raw) -> None:
    """Raises _Gone or Refused for what is no answer of status 200."""
    if status == 200:
        return
    if status == 410:
        raise _Gone
    try:
        message = msgspec.json.decode(body, type=_Status).message
    except msgspec.MsgspecError:
        message = ""
    raise Refused(status, message)


def _refusal(error: Exception, namespace: str, service: str) -> str:
    """The sentence for what does not pass by itself; "" for what may."""
    from kubernetes_asyncio.config import ConfigException

    if isinstance(error, ConfigException):
        return (
            f"Members are to be found by Kubernetes (swarm.peers), but this is no pod with a service account ({_clause(error)}):"
            " name them by static: or dns: instead, or give the pod one."
        )
    if not isinstance(error, Refused):
        return ""
    match error.status:
        case 403:
            return (
                f"The Kubernetes API does not let this pod find the members of {namespace}/{service} (403): give its service account"
                f" a Role in namespace {namespace} with the verbs list and watch on endpointslices in the API group discovery.k8s.io."
            )
        case 401:
            return "The Kubernetes API does not take the token of this pod's service account (401)."
        case 404:
            return "The Kubernetes API knows no discovery.k8s.io/v1 (404): Kubernetes 1.21 or newer is needed."
    return ""


def _clause(error: Exception) -> str:
    return printable(str(error) or type(error).__name__, PROBLEM_CHARACTERS_MAX).rstrip(". ")
