"""Faults over real HTTP: what a client sees on its socket when a rule strikes."""

import http.client
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from manta.testing.hub import HubError, HubProcess, changes, faults
from manta.testing.hub.standard import MODEL, NAMES, READER_TOKEN
from tests.testing.hub.conftest import Client, fetch

WEIGHTS = "model.safetensors"


def _resolve_url(hub: HubProcess, file: str = WEIGHTS) -> str:
    return f"{hub.endpoint}/{MODEL}/resolve/main/{file}"


@pytest.fixture
def blob_url(hub: HubProcess) -> str:
    """A signed URL of a 3 MiB file."""
    return fetch(_resolve_url(hub)).headers["location"]


@pytest.fixture
def truth(hub: HubProcess, blob_url: str) -> bytes:
    return fetch(blob_url).body


def _read_until_error(url: str) -> tuple[bytes, str]:
    """The body as far as it came, and the name of what ended it."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=20) as connection:
        connection.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = b""
        try:
            while piece := connection.recv(1 << 16):
                received += piece
            ending = "closed"
        except ConnectionResetError:
            ending = "reset"
    return received.partition(b"\r\n\r\n")[2], ending


def test_truncated(hub: HubProcess, blob_url: str, truth: bytes) -> None:
    hub.add_fault(faults.Truncate(after_bytes=100_000), origin="cdn")
    assert _read_until_error(blob_url) == (truth[:100_000], "closed")
    with pytest.raises(http.client.IncompleteRead):
        fetch(blob_url)
    assert hub.log()[-1].aborted


def test_reset(hub: HubProcess, blob_url: str) -> None:
    hub.add_fault(faults.Reset(after_bytes=0), origin="cdn")
    body, ending = _read_until_error(blob_url)
    assert ending == "reset"
    assert body == b""


def test_reset_before_headers(hub: HubProcess) -> None:
    hub.add_fault(faults.Reset(before_headers=True), kind="resolve")
    with pytest.raises(ConnectionResetError):
        fetch(_resolve_url(hub))
    assert hub.log()[-1].aborted


def test_stall_and_go_on(hub: HubProcess, blob_url: str, truth: bytes) -> None:
    hub.add_fault(faults.Stall(after_bytes=1000, seconds=0.4), origin="cdn")
    began = time.monotonic()
    assert fetch(blob_url).body == truth
    assert time.monotonic() - began >= 0.4


def test_a_stalled_reply_ends_when_its_client_leaves(hub: HubProcess, blob_url: str) -> None:
    hub.add_fault(faults.Stall(after_bytes=1000, seconds=60), origin="cdn")
    parts = urlsplit(blob_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    connection.request("GET", f"{parts.path}?{parts.query}")
    response = connection.getresponse()
    assert len(response.read(1000)) == 1000
    connection.close()
    response.close()
    (entry,) = hub.wait_for(origin="cdn", finished=True, timeout_s=10)
    assert entry.aborted
    assert entry.sent == 1000


def test_drip(hub: HubProcess, blob_url: str, truth: bytes) -> None:
    hub.add_fault(faults.Drip(bytes_per_second=100_000, after_bytes=1000), origin="cdn")
    began = time.monotonic()
    assert fetch(blob_url, range_="bytes=0-40999").body == truth[:41_000]
    assert time.monotonic() - began >= 0.35


def test_a_black_hole_answers_no_connection_and_closes_again(hub: HubProcess, blob_url: str) -> None:
    hub.add_fault(faults.BlackHole(seconds=0.6), origin="cdn", times=1)
    with pytest.raises(ConnectionError):
        fetch(blob_url)
    parts = urlsplit(blob_url)
    with pytest.raises(TimeoutError):
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=0.2)
    deadline = time.monotonic() + 10
    while True:
        try:
            assert fetch(blob_url).status == 200
        except OSError:
            assert time.monotonic() < deadline
        else:
            break


def test_refused_port_opens_again(hub: HubProcess, blob_url: str) -> None:
    hub.add_fault(faults.Refuse(seconds=0.3), origin="cdn", times=1)
    with pytest.raises(ConnectionResetError):
        fetch(blob_url)
    refused = 0
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert fetch(blob_url, range_="bytes=0-0").status == 206
            break
        except ConnectionRefusedError:
            refused += 1
            time.sleep(0.01)
    assert refused > 0


def test_a_port_can_be_closed_and_opened(hub: HubProcess, blob_url: str) -> None:
    hub.set_listening("cdn", accept=False)
    with pytest.raises(ConnectionRefusedError):
        fetch(blob_url)
    hub.set_listening("hub", accept=False)
    with pytest.raises(ConnectionRefusedError):
        fetch(_resolve_url(hub))
    hub.set_listening("hub", accept=True)
    hub.set_listening("cdn", accept=True)
    assert fetch(blob_url, range_="bytes=0-0").status == 206


@pytest.mark.parametrize(
    ("action", "status", "length", "header"),
    [
        (faults.ShortRange(missing=40), 206, 60, "bytes 1000-1059/"),
        (faults.IgnoreRange(), 200, None, None),
        (faults.WrongRange(shift=1), 206, 100, "bytes 1001-1100/"),
        (faults.TooLong(extra=7), 206, 107, "bytes 1000-1099/"),
        (faults.Fail(status=403, body="xml"), 403, None, None),
        (faults.Fail(status=200, body="html"), 200, None, None),
        (faults.TooMany(form="retry-after", seconds=3), 429, None, None),
    ],
)
def test_wrong_answers(
    hub: HubProcess, blob_url: str, action: faults.Action, status: int, length: int | None, header: str | None
) -> None:
    hub.add_fault(action, origin="cdn", range="any", times=1)
    bad = fetch(blob_url, range_="bytes=1000-1099")
    assert bad.status == status
    assert length is None or len(bad.body) == length
    assert header is None or bad.headers["content-range"].startswith(header)
    good = fetch(blob_url, range_="bytes=1000-1099")
    assert (good.status, len(good.body)) == (206, 100)


def test_flipped_byte(hub: HubProcess, blob_url: str, truth: bytes) -> None:
    hub.add_fault(faults.Flip(offset=2_000_000), file="*.safetensors")
    bad = fetch(blob_url).body
    assert [at for at, (one, other) in enumerate(zip(bad, truth, strict=True)) if one != other] == [2_000_000]
    assert fetch(blob_url, range_="bytes=0-99").body == truth[:100]


@pytest.mark.parametrize("name", ["X-Repo-Commit", "X-Linked-Size", "X-Linked-ETag"])
def test_headers_of_resolve(hub: HubProcess, name: str) -> None:
    hub.add_fault(faults.Headers(remove=[name]), kind="resolve", times=1)
    hub.add_fault(faults.Headers(put={name: "wrong"}), kind="resolve", skip=1)
    assert name.lower() not in fetch(_resolve_url(hub)).headers
    assert fetch(_resolve_url(hub)).headers[name.lower()] == "wrong"


def test_expired_url(hub: HubProcess) -> None:
    hub.add_fault(faults.ExpiredUrl(), kind="resolve", times=1)
    assert fetch(fetch(_resolve_url(hub)).headers["location"]).status == 403
    assert fetch(fetch(_resolve_url(hub)).headers["location"], range_="bytes=0-0").status == 206


def test_redirects(hub: HubProcess, blob_url: str) -> None:
    hub.add_fault(faults.RedirectLoop(), kind="resolve")
    assert fetch(_resolve_url(hub)).headers["location"] == f"/{MODEL}/resolve/main/{WEIGHTS}"
    hub.add_fault(faults.Redirect(to="other"), origin="cdn")
    away = fetch(blob_url).headers["location"]
    assert away.startswith(hub.other_endpoint)
    assert fetch(away, range_="bytes=0-0").status == 206


def test_branch_moves_between_info_and_tree(hub: HubProcess) -> None:
    hub.add_fault(faults.Mutate(then=changes.MoveBranch(repo=MODEL, to="first")), kind="info", times=1)
    info = fetch(f"{hub.endpoint}/api/models/{MODEL}").json()
    assert info["sha"] == hub.files(MODEL, "second").commit
    assert fetch(_resolve_url(hub)).headers["x-repo-commit"] == hub.files(MODEL, "first").commit


def test_access_is_revoked_before_a_request(hub: HubProcess) -> None:
    change = changes.RevokeToken(token=READER_TOKEN)
    hub.add_fault(faults.Mutate(then=change, when="before"), kind="resolve", skip=1, times=1)
    assert fetch(_resolve_url(hub), token=READER_TOKEN).status == 302
    assert fetch(_resolve_url(hub), token=READER_TOKEN).status == 401


def test_latency_comes_before_the_first_byte(hub: HubProcess, blob_url: str) -> None:
    hub.set_latency({"cdn": 0.2})
    began = time.monotonic()
    fetch(blob_url, range_="bytes=0-0")
    assert time.monotonic() - began >= 0.2
    hub.set_latency(0)


def test_bandwidth_is_shared(hub: HubProcess, blob_url: str) -> None:
    hub.set_bandwidth(5e6)
    began = time.monotonic()
    assert len(fetch(blob_url, range_="bytes=0-1999999").body) == 2_000_000
    took = time.monotonic() - began
    assert took >= 0.35
    hub.set_bandwidth(None)


def test_mistakes_in_rules_are_told(hub: HubProcess) -> None:
    with pytest.raises(HubError, match="path_regex"):
        hub.add_fault(faults.Reset(), path_regex="(")
    with pytest.raises(HubError, match="no commit or revision"):
        hub.move_branch(MODEL, "nowhere")
    with pytest.raises(HubError, match="no fault rule"):
        hub.remove_fault(4711)
    assert hub.faults() == []


def test_faults_are_logged_and_counted(hub: HubProcess) -> None:
    id_ = hub.add_fault(faults.Fail(status=500), kind="resolve", skip=1)
    for _ in range(3):
        fetch(_resolve_url(hub))
    assert [entry.faults for entry in hub.log()] == [[], ["fail"], ["fail"]]
    (state,) = hub.faults()
    assert (state.id, state.seen, state.struck) == (id_, 3, 2)


@pytest.mark.parametrize(
    ("action", "conditions"),
    [
        (faults.Truncate(after_bytes=1_000_000), {"origin": "cdn"}),
        (faults.TooMany(form="ratelimit", seconds=0), {"kind": "tree"}),
        (faults.Fail(status=408, body="empty"), {"origin": "cdn"}),
    ],
)
def test_huggingface_hub_recovers(
    hub: HubProcess, client: Client, action: faults.Action, conditions: dict[str, Any]
) -> None:
    hub.add_fault(action, times=1, **conditions)
    code = f"""
import hashlib
from huggingface_hub import snapshot_download
folder = snapshot_download({MODEL!r})
result = hashlib.file_digest(open(folder + "/{WEIGHTS}", "rb"), "sha256").hexdigest()
"""
    assert client(code) == hub.files(MODEL).files[WEIGHTS].sha256
    assert hub.faults()[0].struck == 1


def test_a_range_of_an_awkward_name_can_be_picked(hub: HubProcess) -> None:
    hub.add_fault(faults.Fail(status=500), file="ünïcödé/*", method="GET")
    assert (
        fetch(f"{hub.endpoint}/{NAMES}/resolve/main/%C3%BCn%C3%AFc%C3%B6d%C3%A9/poids%20%C3%A9t%C3%A9.bin").status
        == 500
    )
    assert fetch(f"{hub.endpoint}/{NAMES}/resolve/main/a.txt").status == 307
