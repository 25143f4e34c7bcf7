"""The hub as a server: its three listening ports and the life of a request. asyncio and aiohttp live here.

For each request: log it, wait out the latency, strike faults, let answers.py answer, send. One process, one
event loop, no other thread touches its state (folders are scanned in threads, their results taken over on
the loop). Used by process.py and the command line; the admin API is in admin.py.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from urllib.parse import parse_qs, unquote

from aiohttp import web

from manta.testing.hub.admin import AdminRequest, answer_admin
from manta.testing.hub.answers import Answers, Policy, error
from manta.testing.hub.changes import apply_change
from manta.testing.hub.content import ContentChangedError
from manta.testing.hub.delivery import ClientGoneError, patient_sleep, reset, send_body
from manta.testing.hub.faults import Action, BlackHole, FaultBook, Mutate, Refuse, Scene, Subject, spoil
from manta.testing.hub.limits import Bandwidth, QuotaLedger, Quotas
from manta.testing.hub.reply import Reply, Request
from manta.testing.hub.repository import Catalogue
from manta.testing.hub.routes import ORIGINS, Origin, Route, parse_route
from manta.testing.hub.traffic import Ledger, LogEntry, Stats

# Only paths-info and the admin API take bodies; 32 MiB holds the paths of the largest repo several times.
_BODY_MAX = 32 << 20

# How long a closing server waits for requests in flight before it drops them.
_GRACE_S = 0.2

Refresh = Callable[[Route], Awaitable[None]]


class HubServer:
    """A hub about one catalogue.

    `admin` opens /_hub/ and fault injection. `refresh` is awaited before a request is answered, so that a
    source can bring the catalogue up to date. `finished` is told of every request that is over.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        policy: Policy | None = None,
        quotas: Quotas | None = None,
        latency_s: float = 0.0,
        bandwidth: float | None = None,
        log_max: int = 10_000,
        admin: bool = True,
        refresh: Refresh | None = None,
        finished: Callable[[LogEntry], None] | None = None,
    ) -> None:
        self.catalogue = catalogue
        self.quotas = QuotaLedger(quotas)
        self.answers = Answers(catalogue, policy=policy or Policy(), quotas=self.quotas, now=time.time)
        self.faults = FaultBook()
        self.ledger = Ledger(log_max)
        self.bandwidth = Bandwidth(bandwidth)
        self.latency_s: dict[Origin, float] = dict.fromkeys(ORIGINS, latency_s)
        self._initial = (bandwidth, latency_s, self.answers.policy, self.quotas.quotas)
        self._admin = admin
        self._refresh = refresh
        self._finished = finished
        self._restore = catalogue.checkpoint()
        self._listeners: dict[Origin, asyncio.Server] = {}
        self._black_holes: dict[Origin, ExitStack] = {}
        self._handlers: dict[Origin, web.Server] = {}
        self._admin_listener: asyncio.AbstractServer | None = None
        self._admin_handler: web.Server | None = None
        self._host = ""
        self._tls: ssl.SSLContext | None = None
        self._progress = asyncio.Event()
        self._reopening: set[asyncio.Task[None]] = set()

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self, host: str, ports: Mapping[Origin, int], tls: ssl.SSLContext | None = None) -> None:
        """Listen on the given ports (0: any free one). Raises OSError when a port cannot be had."""
        self._host, self._tls = host, tls
        for origin, port in ports.items():
            self._handlers[origin] = web.Server(self._handler(origin), access_log=None)
            self.answers.ports[origin] = port
            await self.open(origin)

    async def start_admin_socket(self, path: str) -> None:
        """Serve the admin API on a unix socket too: it stays reachable when ports are refused or far away."""
        self._admin_handler = web.Server(self._handler("hub"), access_log=None)
        self._admin_listener = await asyncio.get_running_loop().create_unix_server(self._admin_handler, path)

    async def close(self) -> None:
        """Stop listening and drop every connection."""
        for task in self._reopening:
            task.cancel()
        for origin in list(self._listeners):
            await self.refuse(origin)
        for black_hole in self._black_holes.values():
            black_hole.close()
        if self._admin_listener is not None and self._admin_handler is not None:
            self._admin_listener.close()
            await self._admin_handler.shutdown(_GRACE_S)
        for handler in self._handlers.values():
            await handler.shutdown(_GRACE_S)

    async def open(self, origin: Origin) -> None:
        """Accept connections at an origin, at the port it always had."""
        if origin in self._listeners:
            return
        if (black_hole := self._black_holes.pop(origin, None)) is not None:
            black_hole.close()
        listener = await asyncio.get_running_loop().create_server(
            self._handlers[origin],
            self._host,
            self.answers.ports[origin],
            ssl=self._tls,
            backlog=1024,
            reuse_address=True,
        )
        self.answers.ports[origin] = listener.sockets[0].getsockname()[1]
        self._listeners[origin] = listener

    async def refuse(self, origin: Origin) -> None:
        """Close an origin's listener and reset its connections: new ones are refused until `open`."""
        listener = self._listeners.pop(origin, None)
        if listener is None:
            return
        listener.close()
        for connection in self._handlers[origin].connections:
            reset(connection.transport)

    async def swallow(self, origin: Origin) -> None:
        """As `refuse`, but new connections are neither taken nor refused until `open`: their SYNs go unanswered."""
        await self.refuse(origin)
        if origin in self._black_holes:
            return
        stack = self._black_holes[origin] = ExitStack()
        address = (self._host, self.answers.ports[origin])
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = stack.enter_context(socket.socket(family))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(0)
        # With a backlog of 0 the kernel holds one connection for whoever accepts, which is nobody; it ignores the SYNs of all others.
        filler = stack.enter_context(socket.socket(family))
        filler.connect(address)

    def reset(self, *, content: bool = True) -> None:
        """Back to the start: no faults, no traffic, first settings; and, unless told, first content."""
        self.faults.clear()
        self.ledger.clear()
        bandwidth, latency_s, self.answers.policy, quotas = self._initial
        self.bandwidth.rate = bandwidth
        self.latency_s = dict.fromkeys(ORIGINS, latency_s)
        self.quotas.quotas = quotas
        self.quotas.clear()
        if content:
            self._restore()

    def stats(self) -> Stats:
        """What has been counted since the start or the last reset."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return self.ledger.stats(cpu_s=usage.ru_utime + usage.ru_stime, peak_rss=usage.ru_maxrss * 1024)

    async def progress(self) -> None:
        """Wait until a request begins or ends."""
        await self._progress.wait()

    # -- requests -----------------------------------------------------------------------------------------

    def _handler(self, origin: Origin) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        async def handle(http: web.BaseRequest) -> web.StreamResponse:
            return await self._handle(origin, http)

        return handle

    async def _handle(self, origin: Origin, http: web.BaseRequest) -> web.StreamResponse:
        raw_path, _, raw_query = http.raw_path.partition("?")
        route = parse_route(origin, raw_path)
        if route.kind == "admin" and self._admin:
            return await self._serve_admin(http, route)
        body = await _read_body(http)
        request = Request(
            origin=origin,
            method=http.method,
            raw_path=raw_path,
            raw_query=raw_query,
            query=parse_qs(raw_query, keep_blank_values=True),
            headers={name.lower(): value for name, value in http.headers.items()},
            scheme=http.scheme,
            host=http.host,
            client=http.remote or "",
            body=body,
        )
        repo, files = self.answers.files_of(route)
        entry = LogEntry(
            number=self.ledger.next_number(),
            started=time.time(),
            origin=origin,
            method=http.method,
            path=unquote(raw_path),
            kind=route.kind,
            repo=repo,
            file=files[0] if files else "",
            range=request.headers.get("range", ""),
            client=request.client,
            user_agent=request.headers.get("user-agent", ""),
            authorized="authorization" in request.headers,
        )
        self.ledger.begin(entry)
        self._tell()
        clock = time.monotonic()
        try:
            return await self._serve(http, request, route, Subject(request, route, entry.path, repo, files), entry)
        finally:
            self.ledger.end(entry, time.monotonic() - clock)
            self._tell()
            if self._finished is not None:
                self._finished(entry)

    async def _serve(
        self, http: web.BaseRequest, request: Request, route: Route, subject: Subject, entry: LogEntry
    ) -> web.StreamResponse:
        try:
            if self.latency_s[request.origin]:
                await patient_sleep(http, self.latency_s[request.origin])
            if self._refresh is not None:
                await self._refresh(route)
            actions = self.faults.strike(subject)
            entry.faults = [str(type(action).__struct_config__.tag) for action in actions]
            reply = self._answer(request, route, actions)
            await self._strike_port(request.origin, actions)
            return await self._send(http, reply, entry)
        except ClientGoneError:
            entry.aborted = True
            return web.Response(status=499)  # goes nowhere: the connection is closed

    def _answer(self, request: Request, route: Route, actions: list[Action]) -> Reply:
        mutations = [action for action in actions if isinstance(action, Mutate)]
        for mutation in mutations:
            if mutation.when == "before":
                apply_change(self.catalogue, mutation.then)
        reply = self.answers.answer(request, route)
        for mutation in mutations:
            if mutation.when == "after":
                apply_change(self.catalogue, mutation.then)
        scene = Scene(request, self.answers.base_url, self._expired_url(request, route), time.time())
        for action in actions:
            reply = spoil(reply, action, scene)
        return reply

    def _expired_url(self, request: Request, route: Route) -> Callable[[int], str | None]:
        def sign(ago_s: int) -> str | None:
            repo = self.catalogue.repo(route.repo_type, route.repo_id)
            commit = None if repo is None else repo.commit(route.revision)
            blob = None if commit is None else commit.tree.files.get(route.path)
            if repo is None or blob is None or not blob.sha256 or route.kind != "resolve":
                return None
            return self.answers.signed_url(request, repo, blob.sha256, route.path, int(time.time()) - ago_s)

        return sign

    async def _strike_port(self, origin: Origin, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Refuse | BlackHole):
                await (self.refuse if isinstance(action, Refuse) else self.swallow)(origin)
                task = asyncio.create_task(self._reopen(origin, action.seconds))
                self._reopening.add(task)
                task.add_done_callback(self._reopening.discard)

    async def _reopen(self, origin: Origin, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.open(origin)

    async def _send(self, http: web.BaseRequest, reply: Reply, entry: LogEntry) -> web.StreamResponse:
        if reply.pace.delay_s:
            await patient_sleep(http, reply.pace.delay_s)
        if reply.pace.reset_before_headers:
            reset(http.transport)
            raise ClientGoneError("cut by a fault")
        with ExitStack() as stack:
            try:
                spans = stack.enter_context(reply.content.opened())
            except ContentChangedError as changed:
                reply = error(404, f"Entry not found: {changed}", "EntryNotFound")
                spans = stack.enter_context(reply.content.opened())
            entry.status = reply.status
            response = web.StreamResponse(status=reply.status, headers=reply.headers)
            response.content_length = reply.length
            try:
                await response.prepare(http)
                if http.method != "HEAD":
                    if reply.blob:
                        self.ledger.sending(reply.blob, reply.size, entry.file)
                    await send_body(
                        http,
                        response,
                        reply,
                        spans,
                        self.bandwidth,
                        lambda start, stop: self.ledger.sent(entry, reply.blob, start, stop),
                    )
                await response.write_eof()
            except ConnectionError as gone:
                raise ClientGoneError(str(gone)) from gone
            except ClientGoneError:
                entry.aborted = True
                response.force_close()
            return response

    async def _serve_admin(self, http: web.BaseRequest, route: Route) -> web.StreamResponse:
        body = await _read_body(http)
        query = {name: values[-1] for name, values in parse_qs(http.raw_path.partition("?")[2]).items()}
        reply = await answer_admin(self, AdminRequest(http.method, route.path, query, body))
        return web.Response(status=reply.status, headers=reply.headers, body=reply.content.read())

    def _tell(self) -> None:
        """Wake everyone who waits for progress."""
        self._progress.set()
        self._progress = asyncio.Event()


async def _read_body(http: web.BaseRequest) -> bytes:
    """The whole body of a request; raises 413 when it is too long to be meant."""
    pieces: list[bytes] = []
    length = 0
    async for piece in http.content.iter_any():
        pieces.append(piece)
        length += len(piece)
        if length > _BODY_MAX:
            raise web.HTTPRequestEntityTooLarge(max_size=_BODY_MAX, actual_size=length)
    return b"".join(pieces)
