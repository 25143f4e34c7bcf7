"""The part of the Kubernetes API that membership uses: listing and watching EndpointSlices, over TLS, with a service account.

As the real one: resource versions grow with each change, a list comes in pages, a watch is JSON lines from a version on, with bookmarks
where they are asked for, and ends after its time; a version that is forgotten is 410, either as the answer or as an event. What a slice
does not have is `null`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import trustme
from aiohttp import web

from manta.swarm.discovery import ServiceAccount

TOKEN = "token-of-the-service-account"
Slice = dict[str, Any]


def endpoint(address: str, **conditions: bool | None) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "nodeName": "some-node"}


def port(number: int, name: str | None = "peer", protocol: str | None = "TCP") -> dict[str, Any]:
    return {"port": number, "name": name, "protocol": protocol, "appProtocol": None}


class FakeKubernetes:
    """`async with FakeKubernetes(folder)`; `account` is the service account that a pod has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.version = 100
        self.oldest = 0
        """Changes up to this version are forgotten."""
        self.gone_as_event = True
        self.refuse: int | None = None
        """The status that every request is answered with."""
        self.silent = False
        """Watches hear of nothing, not even their end."""
        self.bookmarks = 0
        self.page_size = 0
        """At most so many slices a page, whatever was asked for."""
        self.lists: list[dict[str, str]] = []
        self.watches: list[dict[str, str]] = []
        """The queries that came."""
        self.tokens: list[str] = []
        self.port = 0
        self._slices: dict[str, Slice] = {}
        self._changes: list[tuple[int, str, Slice]] = []
        self._open: set[web.StreamResponse] = set()
        self._changed = asyncio.Event()
        self._ended = 0
        self._runner: web.AppRunner | None = None
        authority = trustme.CA()
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(self._tls)
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        (folder / "token").write_text(TOKEN)

    @property
    def account(self) -> ServiceAccount:
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}
        return ServiceAccount(self.folder, environment)

    async def __aenter__(self) -> FakeKubernetes:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            self.cut()
            await runner.cleanup()

    # What happens in the cluster -----------------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        endpoints: list[dict[str, Any]] | None,
        ports: list[dict[str, Any]] | None = None,
        *,
        namespace: str = "ai",
        service: str = "manta",
    ) -> None:
        self.version += 1
        kind = "MODIFIED" if name in self._slices else "ADDED"
        self._slices[name] = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "addressType": "IPv4",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "resourceVersion": str(self.version),
                "labels": {"kubernetes.io/service-name": service},
            },
            "endpoints": endpoints,
            "ports": [port(9402)] if ports is None else ports,
        }
        self._change(kind, self._slices[name])

    def delete(self, name: str) -> None:
        self.version += 1
        gone = self._slices.pop(name)
        gone["metadata"] = {**gone["metadata"], "resourceVersion": str(self.version)}
        self._change("DELETED", gone)

    def forget(self) -> None:
        """Compacts: no watch can begin at a version before this one."""
        self.version += 1
        self.oldest = self.version
        self._changes.clear()

    def bookmark(self) -> None:
        self.version += 1
        self.bookmarks += 1
        marked = {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"}
        marked_metadata = {"metadata": {"resourceVersion": str(self.version), "creationTimestamp": None}}
        self._change("BOOKMARK", marked | marked_metadata)

    def end_watches(self) -> None:
        """As after timeoutSeconds."""
        self._ended += 1
        self._changed.set()

    def cut(self) -> None:
        for response in list(self._open):
            if response._req is not None and response._req.transport is not None:
                response._req.transport.abort()

    def _change(self, kind: str, about: Slice) -> None:
        self._changes.append((self.version, kind, about))
        self._changed.set()

    # What is asked -----------------------------------------------------------------------------------------------------

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.tokens.append(request.headers.get("Authorization", ""))
        if self.refuse is not None:
            return _status(self.refuse)
        if self.tokens[-1] != f"Bearer {(self.folder / 'token').read_text()}":
            return _status(401)
        query = dict(request.query)
        if query.get("watch", "").lower() == "true":
            self.watches.append(query)
            return await self._watch(request, query)
        self.lists.append(query)
        matching = [one for one in self._slices.values() if self._matches(request, one)]
        first = int(query.get("continue", "0"))
        size = min(int(query.get("limit", "500")), self.page_size or 500)
        more = str(first + size) if first + size < len(matching) else ""
        return web.json_response(
            {
                "kind": "EndpointSliceList",
                "apiVersion": "discovery.k8s.io/v1",
                "metadata": {"resourceVersion": str(self.version), **({"continue": more} if more else {})},
                "items": matching[first : first + size],
            }
        )

    @staticmethod
    def _matches(request: web.Request, one: Slice) -> bool:
        label, _, service = request.query["labelSelector"].partition("=")
        metadata = one["metadata"]
        return bool(
            metadata["namespace"] == request.match_info["namespace"] and metadata["labels"].get(label) == service
        )

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        at = int(query["resourceVersion"])
        if at < self.oldest and not self.gone_as_event:
            return _status(410)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if at < self.oldest:
            await _line(response, "ERROR", _status_body(410))
            return response
        ended = self._ended
        self._open.add(response)
        try:
            while True:
                self._changed.clear()
                for version, kind, about in [] if self.silent else list(self._changes):
                    wanted = "allowWatchBookmarks" in query if kind == "BOOKMARK" else self._matches(request, about)
                    if version > at and wanted:
                        await _line(response, kind, about)
                        at = version
                if self._ended != ended:
                    return response
                await self._changed.wait()
        finally:
            self._open.discard(response)


async def _line(response: web.StreamResponse, kind: str, about: Slice) -> None:
    await response.write(json.dumps({"type": kind, "object": about}).encode() + b"\n")


def _status_body(code: int) -> Slice:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "what the API says",
        "reason": "Reason",
        "code": code,
    }


def _status(code: int) -> web.Response:
    return web.json_response(_status_body(code), status=code)
