"""The control API over a real unix socket: every route, every error, and clients that misbehave."""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import trio

from manta.control import http, protocol
from manta.control.client import Client
from manta.control.http import Answer
from manta.control.protocol import (
    BODY_BYTES_MAX,
    Blob,
    Bound,
    CacheListing,
    CacheSelection,
    GcRequest,
    Job,
    Mount,
    MountRequest,
    PageLink,
    Peers,
    PrefetchRequest,
    Publication,
    Removal,
    Status,
    VerifyRequest,
)
from manta.control.server import ControlServer
from manta.errors import BY_CODE, Absent, Corrupt, Denied, Invalid, MantaError, NoSpace, Throttled, Unavailable

T = TypeVar("T")

MOUNT = Mount("1-a--b", "a/b", "main", "1" * 40, "tree", "/run/root/1-a--b", "/mnt", 3, 100, 10, False, ["größe"])
PUBLICATIONS = [Publication("a", "1-a--b", "/mnt", protocol.Pod("u-1", "server-0", "größe"))]
JOB = Job("7", "prefetch", "running", "a/b@1", 3, 1, 100, 10, 5.0, [])
BLOB = Blob("sha256-" + "0" * 64, 10, 5, False, True, False, 1.5, ["a/b@1/größe"])
LISTING = CacheListing([BLOB], 5, 0)
RUNNING = protocol.Running("1", 2, 3.0)
REMOVAL = Removal([BLOB], 5, ["a/c is pinned."])
STATUS = Status(
    version="1",
    pid=2,
    started=3.0,
    cache_dir="/cache",
    runtime_dir="/run",
    endpoint="https://hub.example",
    offline=False,
    fuse="pyfuse3",
    ephemeral=True,
    mounts=[MOUNT],
    transfers=[],
    cache_bytes=5,
    cache_limit=0,
    disk_free=6,
    origin_rate=7.5,
    origin_bytes=8,
    read_bytes=9,
    workers=2,
    errors=[],
)

PEERS = Peers(enabled=True, node="0" * 16, origin_multiple=0.5)
CLUSTER = Peers(enabled=True, cluster=protocol.Cluster(1.0, [], ["größe is down."], 0, 5, 4, 1.25, [], 0, []))
PAGE = PageLink("http://10.0.0.1:9402/?q", 5.0)

METRICS = Answer(200, "text/plain; version=0.0.4", b"manta_mounts 1.0\n")


class ScriptedService:
    """Answers each call with a fixed value, or raises `error`; `calls` is what was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.status_answer = STATUS
        self.answer = trio.Event()
        """Calls wait for it."""
        self.answer.set()
        self.entered = trio.Event()
        self.abandoned = 0
        """Calls that were cancelled."""

    async def _say(self, value: T, *call: object) -> T:
        self.calls.append(call)
        self.entered.set()
        try:
            await self.answer.wait()
        except trio.Cancelled:
            self.abandoned += 1
            raise
        if self.error is not None:
            raise self.error
        return value

    async def status(self) -> Status:
        return await self._say(self.status_answer, "status")

    async def mount(self, request: MountRequest) -> Mount:
        return await self._say(MOUNT, "mount", request)

    async def bound(self, mount_id: str, bound: Bound) -> Mount:
        return await self._say(MOUNT, "bound", mount_id, bound)

    async def unmount(self, mount_id: str) -> Mount:
        return await self._say(MOUNT, "unmount", mount_id)

    async def publications(self) -> list[Publication]:
        return await self._say(PUBLICATIONS, "publications")

    async def publish(self, name: str, request: MountRequest) -> Mount:
        return await self._say(MOUNT, "publish", name, request)

    async def publication(self, name: str) -> Mount:
        return await self._say(MOUNT, "publication", name)

    async def publication_bound(self, name: str, bound: Bound) -> Mount:
        return await self._say(MOUNT, "publication_bound", name, bound)

    async def unpublish(self, name: str) -> Mount:
        return await self._say(MOUNT, "unpublish", name)

    async def prefetch(self, request: PrefetchRequest) -> Job:
        return await self._say(JOB, "prefetch", request)

    async def job(self, job_id: str) -> Job:
        return await self._say(JOB, "job", job_id)

    async def cancel_job(self, job_id: str) -> Job:
        return await self._say(JOB, "cancel", job_id)

    async def cache(self) -> CacheListing:
        return await self._say(LISTING, "cache")

    async def verify(self, request: VerifyRequest) -> Job:
        return await self._say(JOB, "verify", request)

    async def pin(self, selection: CacheSelection) -> CacheListing:
        return await self._say(LISTING, "pin", selection)

    async def unpin(self, selection: CacheSelection) -> CacheListing:
        return await self._say(LISTING, "unpin", selection)

    async def remove(self, selection: CacheSelection) -> Removal:
        return await self._say(REMOVAL, "remove", selection)

    async def collect(self, request: GcRequest) -> Removal:
        return await self._say(REMOVAL, "collect", request)

    async def shut_down(self) -> Status:
        return await self._say(STATUS, "shut_down")

    async def restart(self) -> protocol.Running:
        return await self._say(RUNNING, "restart")

    async def peers(self) -> Peers:
        return await self._say(PEERS, "peers")

    async def cluster(self) -> Peers:
        return await self._say(CLUSTER, "cluster")

    async def page(self) -> PageLink:
        return await self._say(PAGE, "page")

    async def metrics(self) -> Answer:
        return await self._say(METRICS, "metrics")


class Running:
    def __init__(self, service: ScriptedService, control: ControlServer, path: Path, listener: trio.SocketListener):
        self.service = service
        self.control = control
        self.path = path
        self.listener = listener
        self.client = Client(path)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_unix_socket(str(self.path))

    async def say(self, request: bytes) -> bytes:
        """What the server answers to `request`, until it closes."""
        async with await self.connect() as stream:
            with suppress(trio.BrokenResourceError):  # it has answered before it read all
                await stream.send_all(request)
            answer = bytearray()
            with suppress(trio.BrokenResourceError):
                while part := await stream.receive_some(65536):
                    answer += part
            return bytes(answer)

    async def ask(self, call: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(call)


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    service = ScriptedService()
    path = tmp_path / "control.sock"
    control = ControlServer(service, path)
    async with trio.open_nursery() as nursery:
        listener = await control.listen()
        nursery.start_soon(control.serve, listener)
        yield Running(service, control, path, listener)
        nursery.cancel_scope.cancel()


REQUEST = MountRequest("a/b", "/mnt", "hub-cache", "hf_secret")
SELECTION = CacheSelection(["a/b", "größe"])
CALLS: list[tuple[Callable[[Client], object], object, tuple[object, ...]]] = [
    (lambda c: c.status(), STATUS, ("status",)),
    (lambda c: c.mount(REQUEST), MOUNT, ("mount", REQUEST)),
    (lambda c: c.bound("1-a--b", "/mnt"), MOUNT, ("bound", "1-a--b", Bound("/mnt"))),
    (lambda c: c.unmount("1-a--b"), MOUNT, ("unmount", "1-a--b")),
    (lambda c: c.publications(), PUBLICATIONS, ("publications",)),
    (lambda c: c.publish("a", REQUEST), MOUNT, ("publish", "a", REQUEST)),
    (lambda c: c.publication("a"), MOUNT, ("publication", "a")),
    (lambda c: c.publication_bound("a", "/mnt"), MOUNT, ("publication_bound", "a", Bound("/mnt"))),
    (lambda c: c.unpublish("a"), MOUNT, ("unpublish", "a")),
    (lambda c: c.prefetch(PrefetchRequest("a/b", "hf_x")), JOB, ("prefetch", PrefetchRequest("a/b", "hf_x"))),
    (lambda c: c.job("7"), JOB, ("job", "7")),
    (lambda c: c.cancel("7"), JOB, ("cancel", "7")),
    (lambda c: c.cache(), LISTING, ("cache",)),
    (lambda c: c.verify(VerifyRequest()), JOB, ("verify", VerifyRequest())),
    (lambda c: c.pin(SELECTION), LISTING, ("pin", SELECTION)),
    (lambda c: c.unpin(SELECTION), LISTING, ("unpin", SELECTION)),
    (lambda c: c.remove(SELECTION), REMOVAL, ("remove", SELECTION)),
    (lambda c: c.collect(GcRequest(5, dry_run=True)), REMOVAL, ("collect", GcRequest(5, dry_run=True))),
    (lambda c: c.shutdown(), STATUS, ("shut_down",)),
    (lambda c: c.restart(), RUNNING, ("restart",)),
    (lambda c: c.peers(), PEERS, ("peers",)),
    (lambda c: c.peers(cluster=True), CLUSTER, ("cluster",)),
    (lambda c: c.page(), PAGE, ("page",)),
]


@pytest.mark.trio
async def test_every_call_of_the_client_reaches_the_service_and_its_answer_comes_back(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        for call, answer, asked in CALLS:
            assert await r.ask(lambda call=call: call(r.client)) == answer  # type: ignore[misc]
            assert r.service.calls.pop() == asked
        assert r.service.calls == []


@pytest.mark.trio
async def test_metrics_are_served_as_they_are(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        answer = await r.say(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"content-type: text/plain; version=0.0.4\r\n" in answer
        assert answer.endswith(b"\r\n\r\nmanta_mounts 1.0\n")
        assert r.service.calls == [("metrics",)]


@pytest.mark.trio
async def test_which_daemon_answers_is_part_of_its_status(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        assert await r.ask(r.client.running) == RUNNING
        assert r.service.calls == [("status",)]


def test_the_client_has_a_call_for_every_route(tmp_path: Path) -> None:
    assert len(ControlServer(ScriptedService(), tmp_path / "s")._routes) == len(CALLS)


@pytest.mark.trio
async def test_every_error_arrives_as_it_was_raised(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        for kind in BY_CODE.values():
            r.service.error = kind("Say what happened, and what to do.")
            with pytest.raises(kind, match=r"^Say what happened, and what to do\.$") as caught:
                await r.ask(r.client.status)
            assert type(caught.value) is kind


@pytest.mark.trio
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Invalid("x"), 400),
        (Denied("x"), 403),
        (Absent("x"), 404),
        (NoSpace("x"), 507),
        (Unavailable("x"), 503),
        (Throttled("x", 3.0), 503),
        (Corrupt("x"), 500),
        (MantaError("x"), 500),
    ],
)
async def test_errors_have_the_http_status_that_fits(tmp_path: Path, error: MantaError, status: int) -> None:
    async with running(tmp_path) as r:
        r.service.error = error
        answer = await r.say(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert msgspec.json.decode(answer.partition(b"\r\n\r\n")[2]) == {"code": error.code, "message": "x"}


@pytest.mark.trio
@pytest.mark.parametrize("error", [RuntimeError("hf_secret"), KeyError("x"), ExceptionGroup("g", [ValueError("x")])])
async def test_what_nobody_foresaw_is_an_answer_too(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as r:
        r.service.error = error
        with pytest.raises(MantaError, match=rf"The daemon failed \({type(error).__name__}\); its log") as caught:
            await r.ask(r.client.status)
        assert "secret" not in caught.value.message
        assert "unforeseen" in caplog.text
        r.service.error = None
        assert await r.ask(r.client.status) == STATUS


@pytest.mark.trio
async def test_an_answer_that_json_cannot_carry_does_not_end_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as r:
        r.service.status_answer = msgspec.structs.replace(STATUS, cache_dir="/cache/\udcff")
        with pytest.raises(MantaError, match="UnicodeEncodeError"):
            await r.ask(r.client.status)
        assert await r.ask(r.client.cache) == LISTING


@pytest.mark.trio
@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", "/"), ("GET", "/v1/mounts"), ("POST", "/v1/status"), ("GET", "/v1/status?x=1"), ("PUT", "/v2/x"),
     ("DELETE", "/v1/mounts/a/b"), ("GET", "/v1/jobs/")],
)  # fmt: skip
async def test_what_the_api_does_not_have_is_absent(tmp_path: Path, method: str, target: str) -> None:
    async with running(tmp_path) as r:
        answer = await r.say(f"{method} {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"may be of another version" in answer
        assert r.service.calls == []


def post(target: str, body: bytes, length: int | None = None) -> bytes:
    return (
        f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode()
        + body
    )


@pytest.mark.trio
@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"target": 5}', b'{"view": "other"}', b"\xff", b'{"token": ["hf_secret"]}', b"null"]
)
async def test_a_body_that_is_no_request_is_refused_with_what_is_wrong(tmp_path: Path, body: bytes) -> None:
    async with running(tmp_path) as r:
        answer = await r.say(post("/v1/mounts", body))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"The request is not what POST /v1/mounts takes" in answer
        assert b"hf_secret" not in answer
        assert r.service.calls == []


@pytest.mark.trio
async def test_a_missing_body_means_the_defaults(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        assert (await r.say(post("/v1/cache/gc", b""))).startswith(b"HTTP/1.1 200 ")
        assert r.service.calls == [("collect", GcRequest())]


@pytest.mark.trio
async def test_a_body_in_pieces_is_put_together(tmp_path: Path) -> None:
    async with running(tmp_path) as r, await r.connect() as stream:
        head, _, body = post("/v1/mounts", b'{"target": "a/b"}').partition(b"\r\n\r\n")
        for part in (head[:10], head[10:] + b"\r\n\r", b"\n", body[:3], body[3:]):
            await stream.send_all(part)
            await trio.testing.wait_all_tasks_blocked()
        assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 200 ")
        assert r.service.calls == [("mount", MountRequest("a/b"))]


@pytest.mark.trio
async def test_a_body_that_is_too_large_is_refused_without_being_kept(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        answer = await r.say(post("/v1/mounts", b" " * (BODY_BYTES_MAX + 1)))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"larger than 16777216 bytes" in answer
        assert (await r.ask(r.client.status)) == STATUS
        assert r.service.calls == [("status",)]


@pytest.mark.trio
@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01 this is TLS\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /v1/status HTTP/1.1\r\n\r\n",  # no Host
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"POST /v1/mounts HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"HEAD /v1/status HTTP/1.1\r\nHost: x\r\n\r\n",  # its answer could say nothing
        b"",
    ],
)
async def test_what_is_no_request_is_cut_off_and_nobody_else_notices(tmp_path: Path, nonsense: bytes) -> None:
    async with running(tmp_path) as r:
        async with await r.connect() as stream:
            await stream.send_all(nonsense)
            await stream.send_eof()
            with suppress(trio.BrokenResourceError):  # closed with bytes of ours unread
                assert await stream.receive_some(65536) == b""
        assert await r.ask(r.client.status) == STATUS
        assert r.service.calls == [("status",)]
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 0


@pytest.mark.trio
@pytest.mark.parametrize("sent", [b"", b"GET /v1/sta", post("/v1/mounts", b'{"target"', 1000)])
async def test_a_client_that_does_not_ask_is_cut_off(
    tmp_path: Path, sent: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(tmp_path) as r, await r.connect() as stream:
        await stream.send_all(sent)
        began = trio.current_time()
        with suppress(trio.BrokenResourceError):
            assert await stream.receive_some(65536) == b""
        assert trio.current_time() - began == pytest.approx(http.ASK_SECONDS_MAX)
        assert r.service.calls == []


@pytest.mark.trio
async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with running(tmp_path) as r:
        r.service.status_answer = msgspec.structs.replace(STATUS, errors=["x" * 8_000_000])
        async with await r.connect() as stream:
            await stream.send_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
            await trio.sleep(http.ASK_SECONDS_MAX - 1)
            assert r.control.connected == 1
            await trio.sleep(2)
            assert r.control.connected == 0


@pytest.mark.trio
async def test_a_service_may_take_its_time(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The hub may be slow; only asking and reading have a deadline here."""
    async with running(tmp_path) as r, await r.connect() as stream:
        r.service.answer = trio.Event()
        await stream.send_all(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.sleep(10 * http.ASK_SECONDS_MAX)
        r.service.answer.set()
        assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.trio
async def test_a_client_that_goes_away_gets_what_it_asked_for_done(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        r.service.answer = trio.Event()
        async with await r.connect() as stream:
            await stream.send_all(post("/v1/prefetch", b'{"target": "a/b"}'))
            await r.service.entered.wait()
        assert r.control.connected == 1  # a daemon does not leave meanwhile
        r.service.answer.set()
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 0
        assert await r.ask(r.client.status) == STATUS


@pytest.mark.trio
async def test_clients_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(http, "REFUSALS_MAX", 2)
    async with running(tmp_path) as r:
        held = [await r.connect() for _ in range(3)]
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 3
        with pytest.raises(Unavailable, match=r"3 requests at a time.*try again soon"):
            await r.ask(r.client.status)
        assert r.service.calls == []
        held += [await r.connect() for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked()
        assert await r.say(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        for stream in held:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert await r.ask(r.client.status) == STATUS


@pytest.mark.trio
@pytest.mark.parametrize("target", ["/v1/mounts", "/v1/prefetch"])
async def test_what_waits_for_the_hub_ends_with_its_client(
    tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(tmp_path) as r:
        r.service.answer = trio.Event()
        stream = await r.connect()
        await stream.send_all(post(target, b'{"target": "a/b"}'))
        await r.service.entered.wait()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 0
        assert r.service.abandoned == 1
        assert [(x.levelname, x.getMessage().partition(":")[0]) for x in caplog.records] == [
            ("INFO", "a client left before its answer")
        ]
        r.service.answer.set()
        assert await r.ask(r.client.status) == STATUS


@pytest.mark.trio
async def test_what_changes_the_cache_is_done_to_its_end(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        r.service.answer = trio.Event()
        stream = await r.connect()
        await stream.send_all(post("/v1/cache/rm", b'{"names": ["a/b"]}'))
        await r.service.entered.wait()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 1
        r.service.answer.set()
        await trio.testing.wait_all_tasks_blocked()
        assert r.control.connected == 0
        assert r.service.abandoned == 0


@pytest.mark.trio
async def test_many_clients_at_once_are_all_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as r:
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await r.ask(r.client.cache))

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert answers == [LISTING] * 20


@pytest.mark.trio
async def test_the_socket_is_the_owners_and_takes_the_place_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    first = await ControlServer(ScriptedService(), path).listen()
    await first.aclose()  # its file stays, as after a crash
    async with running(tmp_path) as r:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert await r.ask(r.client.status) == STATUS


@pytest.mark.trio
async def test_serving_ends_with_the_listener(tmp_path: Path) -> None:
    """The daemon closes it when it leaves: that is no failure."""
    control = ControlServer(ScriptedService(), tmp_path / "control.sock")
    listener = await control.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(control.serve, listener)
        await trio.testing.wait_all_tasks_blocked()
        await listener.aclose()


@pytest.mark.trio
async def test_tokens_are_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(tmp_path) as r:
        for error in (None, RuntimeError("failed"), Invalid("no")):
            r.service.error = error
            await r.say(post("/v1/mounts", msgspec.json.encode(REQUEST)))
            await r.say(post("/v1/mounts", msgspec.json.encode(REQUEST) + b"garbage"))
    assert not re.search("hf_secret", caplog.text)
