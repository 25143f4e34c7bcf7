"""The worker's HTTP client against the real local hub: each way in which an answer can be wrong has its reason, and no byte is told of that
is not in the cache file at its place."""

from __future__ import annotations

import asyncio
import email.utils
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from yarl import URL

from manta.cache.digests import chunk_digest
from manta.model.extents import Extent, ExtentSet
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec, faults
from manta.wire.messages import Fetch, Fetched, Locate, Located
from manta.worker import origin as module
from manta.worker.failure import OrderFailed
from manta.worker.origin import THROTTLED_SECONDS, OriginClient, retry_after_s
from tests.worker.conftest import FILE, REPO, SIZE, TOKEN

T = TypeVar("T")
START, END = 1_000_000, 2_000_000
"""The chunk that is ordered where a test does not need another."""


def run(work: Callable[[OriginClient], Awaitable[T]]) -> T:
    async def main() -> T:
        client = OriginClient()
        try:
            async with asyncio.timeout(30):
                return await work(client)
        finally:
            client.close()

    return asyncio.run(main())


def hub_url(hub: HubProcess, file: str = FILE, repo: str = REPO) -> str:
    return f"{hub.endpoint}/{repo}/resolve/{hub.files(repo).commit}/{file}"


def locate(url: str, headers: dict[str, str] | None = None, deadline_s: float = 10.0) -> Located:
    return run(lambda client: client.locate(Locate(5, url, headers or {}, deadline_s)))


@pytest.fixture
def url(hub: HubProcess) -> str:
    """The signed URL of FILE."""
    return locate(hub_url(hub)).headers["location"]


@dataclass
class Outcome:
    """What became of one order, and what it told of."""

    extents: ExtentSet = field(default_factory=ExtentSet)
    reports: list[tuple[int, int]] = field(default_factory=list)
    fetched: Fetched | None = None
    failure: OrderFailed | None = None

    @property
    def reason(self) -> str:
        return self.failure.reason if self.failure is not None else ""

    @property
    def message(self) -> str:
        return self.failure.message if self.failure is not None else ""


@pytest.fixture
def attempt(cache_fd: int, data: bytes) -> Callable[..., Outcome]:
    def attempt(
        url: str,
        start: int = START,
        end: int = END,
        extents: list[tuple[int, int]] | None = None,
        headers: dict[str, str] | None = None,
        stall_s: float = 10.0,
        blob_size: int = SIZE,
        true: bytes = data,
        believe: bool = False,
        last: bool = True,
        watched: bool = True,
    ) -> Outcome:
        """One order. Checks each report against the true bytes unless `believe`."""
        outcome = Outcome()
        wanted = [(start, end)] if extents is None else extents
        order = Fetch(6, url, headers or {}, start, end, wanted, blob_size, stall_s, last, watched)

        def told(at: int, upto: int) -> None:
            assert start <= at < upto <= end
            assert believe or os.pread(cache_fd, upto - at, at) == true[at:upto]
            outcome.extents.add(Extent(at, upto))
            outcome.reports.append((at, upto))

        async def work(client: OriginClient) -> None:
            try:
                outcome.fetched = await client.fetch(order, cache_fd, told)
            except OrderFailed as e:
                outcome.failure = e

        run(work)
        if outcome.failure is not None:
            assert "?" not in outcome.message
            assert "ignature" not in outcome.message
            assert TOKEN not in outcome.message
        return outcome

    return attempt


# What goes well ----------------------------------------------------------------------------------------------------------


def test_a_range_comes_into_the_file_with_its_digest(hub: HubProcess, url: str, attempt: Any, data: bytes) -> None:
    outcome = attempt(url)
    assert outcome.fetched.digest == chunk_digest(data[START:END])
    assert outcome.fetched.order == 6
    assert outcome.extents.covers(Extent(START, END))
    assert hub.blob_traffic(REPO, FILE).sent == END - START


def test_extents_come_in_the_order_asked_for(url: str, attempt: Any, data: bytes) -> None:
    outcome = attempt(url, extents=[(1_600_000, END), (START, 1_600_000)])
    assert outcome.fetched.digest == chunk_digest(data[START:END])
    assert outcome.reports[0][0] == 1_600_000
    starts = [at for at, _ in outcome.reports]
    assert starts.index(START) == sum(1 for at in starts if at >= 1_600_000)


def test_a_part_of_a_chunk_has_no_digest(url: str, attempt: Any) -> None:
    outcome = attempt(url, extents=[(START + 1000, START + 5000)], last=False)
    assert outcome.fetched is not None
    assert outcome.fetched.digest == b""
    assert outcome.extents.covers(Extent(START + 1000, START + 5000))


@pytest.mark.parametrize("fault", [None, faults.Stall(after_bytes=1_500_000, seconds=0.6)], ids=["fast", "pausing"])
def test_bytes_that_nobody_waits_for_come_all_the_same(
    hub: HubProcess, url: str, attempt: Any, data: bytes, fault: Any
) -> None:
    """Fast ones are gathered by the kernel, also when the sender pauses in the midst of it; the connection is good for the next order."""
    hub.set_bandwidth(10e6)
    if fault is not None:
        hub.add_fault(fault, origin="cdn")
    outcome = attempt(url, start=0, end=SIZE, watched=False, stall_s=2.0)
    assert outcome.fetched is not None, outcome.message
    assert outcome.fetched.digest == chunk_digest(data)
    assert len(outcome.reports) <= 5


def test_bytes_over_tls_are_gathered_too(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, attempt: Any, data: bytes
) -> None:
    """TLS holds a part of what has come back: the last of them must not wait for more."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    spec = HubSpec(repos=[RepoSpec(id=REPO, files={FILE: Generated(seed="one", size=SIZE)})])
    with HubProcess(spec, tls=certificate) as hub:
        url = locate(hub_url(hub)).headers["location"]
        assert url.startswith("https:")
        for fault in (None, faults.Stall(after_bytes=1_500_000, seconds=0.3)):
            if fault is not None:
                hub.add_fault(fault, origin="cdn")
            outcome = attempt(url, start=0, end=SIZE, watched=False, stall_s=2.0)
            assert outcome.fetched is not None, outcome.message
            assert outcome.fetched.digest == chunk_digest(data)


def test_what_is_there_already_is_not_asked_for(
    hub: HubProcess, url: str, attempt: Any, data: bytes, cache_fd: int
) -> None:
    os.pwrite(cache_fd, data[1_300_000:1_700_000], 1_300_000)
    outcome = attempt(url, extents=[(1_700_000, END), (START, 1_300_000)])
    assert outcome.fetched.digest == chunk_digest(data[START:END])
    assert hub.blob_traffic(REPO, FILE).sent == 600_000
    assert not outcome.extents.covers(Extent(1_300_000, 1_300_001))


def test_a_chunk_that_is_all_there_asks_nothing(hub: HubProcess, attempt: Any, data: bytes, cache_fd: int) -> None:
    os.pwrite(cache_fd, data[START:END], START)
    assert attempt("http://nobody.invalid/", extents=[]).fetched.digest == chunk_digest(data[START:END])


def test_the_hubs_own_url_leads_to_the_bytes_and_the_token_stays_there(hub: HubProcess, attempt: Any) -> None:
    outcome = attempt(hub_url(hub), headers={"authorization": f"Bearer {TOKEN}"})
    assert outcome.fetched is not None
    log = hub.log()
    assert [(entry.origin, entry.authorized) for entry in log] == [("hub", True), ("cdn", False)]
    assert hub.stats().violations == []


def test_a_redirect_to_another_origin_is_followed_without_the_token(hub: HubProcess, url: str, attempt: Any) -> None:
    hub.add_fault(faults.Redirect(to="other"), origin="cdn")
    assert attempt(url, headers={"authorization": f"Bearer {TOKEN}"}).fetched is not None
    assert [entry.authorized for entry in hub.log() if entry.origin == "other"] == [False]


def test_a_git_file_comes_from_the_hub_itself(hub: HubProcess, cache_fd: int, attempt: Any) -> None:
    found = locate(hub_url(hub, "config.txt"))
    assert found.status == 200
    assert attempt(found.url, 0, 5000, blob_size=5000, believe=True).fetched is not None


def test_a_connection_is_used_again(hub: HubProcess, url: str, cache_fd: int) -> None:
    async def work(client: OriginClient) -> None:
        for at in range(0, 500_000, 100_000):
            order = Fetch(1, url, {}, at, at + 100_000, [(at, at + 100_000)], SIZE, 10.0)
            await client.fetch(order, cache_fd, lambda *_: None)

    run(work)
    assert len({entry.client for entry in hub.log() if entry.origin == "cdn"}) == 1


def test_a_whole_file_instead_of_its_beginning_is_good_enough(url: str, hub: HubProcess, attempt: Any) -> None:
    hub.add_fault(faults.IgnoreRange(), origin="cdn")
    assert attempt(url, 0, END).fetched is not None
    assert attempt(url, 0, SIZE).fetched is not None


# What goes wrong ---------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[faults.Action, str, str, int]] = {
    # what the hub does, the reason, some of the message, bytes that must have been told of
    "short 206": (faults.ShortRange(missing=1000), "unavailable", "after 999000 of 1000000 bytes", 999_000),
    "over-long": (faults.TooLong(extra=10), "corrupt", f"sent 1000010 bytes as bytes {START}-{END - 1}", 0),
    "moved Content-Range": (faults.WrongRange(shift=1), "corrupt", "answered bytes 1000001-", 0),
    "moved back Content-Range": (faults.WrongRange(shift=-1), "corrupt", "answered bytes 999999-", 0),
    "no Content-Range": (faults.Headers(remove=["Content-Range"]), "unavailable", "without a Content-Range", 0),
    "nonsense Content-Range": (
        faults.Headers(put={"Content-Range": f"bytes {'9' * 5000}-1/2"}),
        "unavailable",
        "without a Content-Range",
        0,
    ),
    "empty Content-Range": (
        faults.Headers(put={"Content-Range": f"bytes {START}-{START - 1}/{SIZE}"}),
        "corrupt",
        "answered bytes",
        0,
    ),
    "another file's size": (
        faults.Headers(put={"Content-Range": f"bytes {START}-{END - 1}/{SIZE + 1}"}),
        "corrupt",
        "the hub says 3000017",
        0,
    ),
    "a body beyond its Content-Range": (
        faults.Headers(put={"Content-Range": f"bytes {START}-{START + 9}/{SIZE}"}),
        "corrupt",
        f"sent 1000000 bytes as bytes {START}-{START + 9}",
        0,
    ),
    "compressed": (faults.Headers(put={"Content-Encoding": "gzip"}), "unavailable", "compressed", 0),
    "200 ignoring Range": (faults.IgnoreRange(), "unavailable", "ignores Range", 0),
    "truncated": (faults.Truncate(after_bytes=400_000), "unavailable", "before the body was complete", 400_000),
    "reset": (faults.Reset(after_bytes=400_000), "unavailable", "", 0),
    "reset before headers": (faults.Reset(before_headers=True), "unavailable", "", 0),
    "403": (faults.Fail(status=403, body="xml"), "denied", "answered 403 Forbidden", 0),
    "401": (faults.Fail(status=401), "denied", "answered 401", 0),
    "404": (faults.Fail(status=404, body="html"), "absent", "answered 404 Not Found", 0),
    "410": (faults.Fail(status=410, body="empty"), "absent", "410", 0),
    "416": (faults.Fail(status=416), "corrupt", "416", 0),
    "408": (faults.Fail(status=408), "unavailable", "408", 0),
    "500": (faults.Fail(status=500, body="html"), "unavailable", "500 Internal Server Error", 0),
    "503": (faults.Fail(status=503), "unavailable", "503", 0),
    "599": (faults.Fail(status=599), "unavailable", "answered 599", 0),
    "a web page": (faults.Fail(status=200, body="html"), "unavailable", "", 0),
    "redirects in circles": (faults.RedirectLoop(), "unavailable", "redirects in a loop", 0),
    "a redirect to nowhere": (
        faults.Headers(put={"Location": "ftp://elsewhere/x?Signature=1"}),
        "unavailable",
        "",
        0,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_answer_has_its_reason(hub: HubProcess, url: str, attempt: Any, name: str) -> None:
    action, reason, message, told = FAULTS[name]
    hub.add_fault(action, origin="cdn")
    if name == "a redirect to nowhere":
        hub.clear_faults()
        hub.add_fault(faults.Fail(status=302, body="empty"), origin="cdn")
        hub.add_fault(action, origin="cdn")
    outcome = attempt(url)
    assert outcome.fetched is None
    assert outcome.reason == reason
    assert message in outcome.message
    assert len(outcome.extents) >= told
    # And the next order for what is missing makes it whole.
    hub.clear_faults()
    missing = [(gap.start, gap.end) for gap in outcome.extents.gaps(Extent(START, END))]
    if reason == "corrupt":
        missing = [(START, END)]
    assert attempt(url, extents=missing).fetched is not None


def test_a_web_page_at_the_start_of_a_file_is_not_taken_for_it(hub: HubProcess, url: str, attempt: Any) -> None:
    hub.add_fault(faults.Fail(status=200, body="html"), origin="cdn")
    outcome = attempt(url, 0, END)
    assert outcome.reason == "unavailable"
    assert "bytes for a file of 3000017" in outcome.message
    assert outcome.reports == []


def test_a_stall_ends_the_order_and_keeps_what_came(hub: HubProcess, url: str, attempt: Any) -> None:
    hub.add_fault(faults.Stall(after_bytes=300_001, seconds=60), origin="cdn")
    outcome = attempt(url, stall_s=0.3)
    assert outcome.reason == "unavailable"
    assert "sent nothing for 0.3 s" in outcome.message
    assert outcome.extents.gaps(Extent(START, END)) == [Extent(START + 300_001, END)]


def test_an_origin_that_does_not_answer_ends_the_order(hub: HubProcess, url: str, attempt: Any) -> None:
    hub.add_fault(faults.Delay(seconds=60), origin="cdn")
    outcome = attempt(url, stall_s=0.3)
    assert (outcome.reason, outcome.reports) == ("unavailable", [])


def test_slow_redirects_together_have_one_deadline(
    hub: HubProcess, url: str, attempt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS_MAX", 0.2)
    hub.add_fault(faults.Delay(seconds=0.25), origin="cdn")
    hub.add_fault(faults.RedirectLoop(), origin="cdn")
    outcome = attempt(url, stall_s=0.3)
    assert outcome.reason == "unavailable"
    assert "loop" not in outcome.message
    assert len([entry for entry in hub.log() if entry.origin == "cdn"]) < module.REDIRECTS_MAX


def test_bytes_before_a_pause_are_told_of_while_it_lasts(cache_fd: int, data: bytes) -> None:
    """The sender pauses after a burst of less than what progress is thinned to."""

    async def work() -> None:
        first, second = asyncio.Event(), asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99999/{SIZE}\r\nContent-Length: 100000\r\n\r\n"
            writer.write(head.encode() + data[:10_000])
            await first.wait()
            writer.write(data[10_000:20_000])
            await second.wait()
            writer.close()

        def progress(_at: int, upto: int) -> None:
            (first if upto <= 10_000 else second).set()

        client = OriginClient()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        try:
            async with asyncio.timeout(20):
                with pytest.raises(OrderFailed, match="before the body was complete"):
                    await client.fetch(Fetch(1, url, {}, 0, 100_000, [(0, 100_000)], SIZE, 60.0), cache_fd, progress)
        finally:
            client.close()
            server.close()
        assert os.pread(cache_fd, 20_000, 0) == data[:20_000]

    asyncio.run(work())


@pytest.mark.parametrize("action", [faults.Flip(offset=1_500_000), faults.WrongRange(shift=8, body=True)])
def test_wrong_bytes_under_right_headers_are_for_a_digest_to_see(
    hub: HubProcess, url: str, attempt: Any, data: bytes, action: faults.Action
) -> None:
    hub.add_fault(action, origin="cdn")
    outcome = attempt(url, believe=True)
    assert outcome.fetched is not None
    assert outcome.fetched.digest != chunk_digest(data[START:END])


@pytest.mark.parametrize("form", ["ratelimit", "retry-after", "http-date", "none"])
def test_a_429_tells_how_long_to_wait(hub: HubProcess, url: str, attempt: Any, form: Any) -> None:
    hub.add_fault(faults.TooMany(form=form, seconds=30), origin="cdn")
    outcome = attempt(url)
    assert (outcome.reason, outcome.failure.status) == ("throttled", 429)
    low, high = {"ratelimit": (31, 31), "retry-after": (30, 30), "http-date": (20, 31)}.get(
        form, (THROTTLED_SECONDS, THROTTLED_SECONDS)
    )
    assert low <= outcome.failure.retry_after_s <= high


def test_an_expired_url_is_denied(hub: HubProcess, attempt: Any) -> None:
    hub.add_fault(faults.ExpiredUrl(ago_s=60), origin="hub", kind="resolve")
    assert attempt(locate(hub_url(hub)).headers["location"]).reason == "denied"


def test_an_origin_that_is_down_is_named(hub: HubProcess, url: str, attempt: Any) -> None:
    hub.set_listening("cdn", accept=False)
    try:
        outcome = attempt(url)
    finally:
        hub.set_listening("cdn", accept=True)
    assert outcome.reason == "unavailable"
    assert "127.0.0.1 cannot be reached" in outcome.message


def test_a_host_without_an_address_is_named(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", unknown)
    outcome = attempt("http://nobody.invalid/x?Signature=1")
    assert outcome.reason == "unavailable"
    assert "nobody.invalid cannot be found" in outcome.message


def test_a_name_lookup_that_hangs_ends_the_order(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", hang)
    monkeypatch.setattr(module, "CONNECT_SECONDS_MAX", 0.1)
    outcome = attempt("http://nobody.invalid/x?Signature=1")
    assert outcome.reason == "unavailable"
    assert "nobody.invalid took no connection" in outcome.message


def test_what_is_no_http_is_named(attempt: Any) -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 smtp.example ESMTP\r\n")
        await writer.drain()
        writer.close()

    async def work() -> tuple[str, str]:
        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        client = OriginClient()
        port = server.sockets[0].getsockname()[1]
        order = Fetch(1, f"http://127.0.0.1:{port}/?Signature=1", {}, 0, 10, [(0, 10)], 10, 10.0)
        try:
            await client.fetch(order, -1, lambda *_: None)
        except OrderFailed as e:
            return e.reason, e.message
        finally:
            client.close()
            server.close()
        return "", ""

    reason, message = asyncio.run(work())
    assert reason == "unavailable"
    assert "not HTTP" in message
    assert "Signature" not in message


def test_a_body_of_no_announced_length_ends_where_it_should(cache_fd: int, data: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99999/{SIZE}\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode() + b"186a1\r\n" + data[:100_001] + b"\r\n0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = OriginClient()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        try:
            async with asyncio.timeout(20):
                with pytest.raises(OrderFailed, match="more bytes than asked for"):
                    await client.fetch(
                        Fetch(1, url, {}, 0, 100_000, [(0, 100_000)], SIZE, 10.0), cache_fd, lambda *_: None
                    )
        finally:
            client.close()
            server.close()

    asyncio.run(work())


def test_no_cookie_of_one_order_goes_with_another(hub: HubProcess) -> None:
    cookies: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        cookies.extend(line for line in head.lower().split(b"\r\n") if line.startswith(b"cookie"))
        writer.write(b"HTTP/1.1 404 N\r\nSet-Cookie: session=of-a-token; Path=/\r\nContent-Length: 0\r\n\r\n")
        writer.write(b"")
        await writer.drain()
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = OriginClient()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        try:
            for _ in range(2):
                await client.locate(Locate(1, url, {}, 10.0))
        finally:
            client.close()
            server.close()

    asyncio.run(work())
    assert cookies == []


def test_a_full_disk_ends_the_order(url: str) -> None:
    async def work(client: OriginClient) -> OrderFailed:
        order = Fetch(1, url, {}, 0, 10, [(0, 10)], SIZE, 10.0)
        with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OrderFailed) as failed:
            await client.fetch(order, full.fileno(), lambda *_: None)
        return failed.value

    assert run(work).reason == "no_space"


def test_a_server_does_not_choose_the_words(attempt: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 http://x/?Signature=1 \x1b[31m\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def work() -> str:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        client = OriginClient()
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        try:
            await client.fetch(Fetch(1, url, {}, 0, 10, [(0, 10)], 10, 10.0), -1, lambda *_: None)
        except OrderFailed as e:
            return e.message
        finally:
            client.close()
            server.close()
        return ""

    message = asyncio.run(work())
    assert message.startswith("127.0.0.1 ")
    assert "Signature" not in message
    assert "\x1b" not in message


def test_encryption_is_not_given_up_by_a_redirect() -> None:
    onward = module._onward
    https, http = URL("https://hub/a"), URL("http://hub/a?Signature=1")
    with pytest.raises(OrderFailed, match="not encrypted") as failed:
        onward({}, https, http)
    assert "Signature" not in failed.value.message
    headers = {"Authorization": "Bearer t", "x": "y"}
    assert onward(headers, https, URL("https://hub/b")) == headers
    for elsewhere in ("https://hub:8443/a", "https://cdn.hub/a"):
        assert onward(headers, https, URL(elsewhere)) == {"x": "y"}


# Locations ---------------------------------------------------------------------------------------------------------------


def test_a_location_on_another_origin_is_told_and_not_asked(hub: HubProcess) -> None:
    found = locate(hub_url(hub), {"authorization": f"Bearer {TOKEN}"})
    assert found.status == 302
    assert found.url == hub_url(hub)
    assert found.headers["location"].startswith(hub.cdn_endpoint)
    assert found.headers["x-linked-size"] == str(SIZE)
    assert found.headers["x-repo-commit"] == hub.files(REPO).commit
    assert email.utils.parsedate_to_datetime(found.headers["date"])  # tells how wrong this machine's clock is
    assert [entry.origin for entry in hub.log()] == ["hub"]


def test_redirects_on_the_hub_are_followed_with_the_token(hub: HubProcess) -> None:
    found = locate(hub_url(hub, "config.txt"), {"authorization": f"Bearer {TOKEN}"})
    assert found.status == 200
    assert "/api/resolve-cache/" in found.url
    assert [(entry.origin, entry.authorized) for entry in hub.log()] == [("hub", True), ("hub", True)]


@pytest.mark.parametrize(("status", "code"), [(401, ""), (404, ""), (503, "")])
def test_any_status_is_an_answer(hub: HubProcess, status: int, code: str) -> None:
    hub.add_fault(faults.Fail(status=status), origin="hub", kind="resolve")
    assert locate(hub_url(hub)).status == status


def test_a_429_is_an_answer_with_its_headers(hub: HubProcess) -> None:
    hub.add_fault(faults.TooMany(form="ratelimit", seconds=7), origin="hub", kind="resolve")
    found = locate(hub_url(hub))
    assert found.status == 429
    assert "t=7" in found.headers["ratelimit"]


def test_a_hub_that_redirects_in_circles_is_named(hub: HubProcess) -> None:
    hub.add_fault(faults.RedirectLoop(), origin="hub", kind="resolve")
    with pytest.raises(OrderFailed, match="redirects in a loop") as failed:
        locate(hub_url(hub))
    assert failed.value.reason == "unavailable"


def test_a_hub_that_does_not_answer_in_time_is_named(hub: HubProcess) -> None:
    hub.add_fault(faults.Delay(seconds=60), origin="hub", kind="resolve")
    with pytest.raises(OrderFailed, match="did not answer within 0 s") as failed:
        locate(hub_url(hub), deadline_s=0.2)
    assert failed.value.reason == "unavailable"


def test_a_hub_that_is_down_is_named(hub: HubProcess) -> None:
    url = hub_url(hub)
    hub.set_listening("hub", accept=False)
    try:
        with pytest.raises(OrderFailed, match="cannot be reached") as failed:
            locate(url)
    finally:
        hub.set_listening("hub", accept=True)
    assert failed.value.reason == "unavailable"


# How long to wait --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"RateLimit": '"resolvers";r=0;t=41'}, 42.0),
        ({"RateLimit": '"resolvers";r=3;t=41'}, None),
        ({"RateLimit": '"resolvers";r=03;t=41', "Retry-After": "5"}, 5.0),
        ({"RateLimit": '"resolvers";r=0;t=41', "Retry-After": "5"}, 42.0),
        ({"RateLimit": "r=0;t="}, None),
        ({"Retry-After": " 7 "}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "-3"}, None),
        ({"Retry-After": "9" * 400}, module.RETRY_AFTER_SECONDS_MAX),
        ({"Retry-After": "²"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], wait: float | None) -> None:
    assert retry_after_s(headers, time.time()) == wait


def test_retry_after_a_date() -> None:
    now = 1_800_000_000.0
    assert retry_after_s({"Retry-After": email.utils.formatdate(now + 25, usegmt=True)}, now) == 25
