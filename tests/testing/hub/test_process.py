"""HubProcess: starting, steering, and never outliving whoever started it."""

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest

from manta.testing.hub import (
    Bytes,
    CommitSpec,
    Disk,
    Generated,
    GeneratedContent,
    HubError,
    HubProcess,
    HubSpec,
    RepoSpec,
    Text,
    faults,
)
from manta.testing.hub.admin import SettingsUpdate
from manta.testing.hub.standard import MODEL
from tests.testing.hub.conftest import fetch

SMALL = HubSpec(repos=[RepoSpec(id="org/name", files={"a.bin": Generated("a", 3_000_000), "b.txt": Bytes(b"b")})])


def _gone(pid: int) -> bool:
    """Whether a process has ended (a zombie whose parent does not care counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while not _gone(pid):
        assert time.monotonic() < deadline, "the hub outlived its parent"
        time.sleep(0.02)


def test_it_ends_with_its_context() -> None:
    with HubProcess(SMALL) as hub:
        pid = hub.pid
        assert fetch(f"{hub.endpoint}/api/models/org/name").status == 200
    assert _gone(pid)


def test_it_dies_with_a_killed_parent() -> None:
    code = """
import sys, time
from manta.testing.hub import HubProcess, HubSpec
hub = HubProcess(HubSpec())
hub.start()
print(hub.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not _gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _wait_gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_on_signals_with_a_transfer_in_flight(number: signal.Signals) -> None:
    with HubProcess(SMALL) as hub:
        hub.add_fault(faults.Stall(seconds=60), origin="cdn")
        url = fetch(f"{hub.endpoint}/org/name/resolve/main/a.bin").headers["location"]

        def read() -> None:
            with pytest.raises(OSError):
                fetch(url)

        reader = threading.Thread(target=read)
        reader.start()
        hub.wait_for(origin="cdn")
        os.kill(hub.pid, number)
        _wait_gone(hub.pid)
        reader.join(10)
        with pytest.raises(HubError, match="does not answer"):
            hub.stats()


def test_it_does_not_finish_hashing_when_its_parent_leaves() -> None:
    endless = HubSpec(repos=[RepoSpec(id="a/b", files={"x.bin": Generated("x", 1 << 44)})])  # hours of sha256
    began = time.monotonic()
    with pytest.raises(HubError, match="timed out"), HubProcess(endless, start_timeout_s=0.1):
        pass
    command = [sys.executable, "-m", "manta.testing.hub", "--spec", "-", "--until-eof"]
    spec = msgspec.json.encode(endless) + b"\n"
    assert subprocess.run(command, input=spec, timeout=30, check=False, capture_output=True).returncode == 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (HubSpec(repos=[RepoSpec(id="a/b", files={"x": Disk("/no/such/file")})]), "No such file"),
        (HubSpec(repos=[RepoSpec(id="a/b", files={"../x": Text("")})]), "not a path inside a repo"),
        (HubSpec(repos=[RepoSpec(id="a/b", branches={"main": "nope"})]), "refs to commits"),
        (HubSpec(repos=[RepoSpec(id="a/b", commits=[CommitSpec(name="x", base="y")])]), "not before it"),
        (HubSpec(folders=["/no/such/folder"]), "not a folder"),
    ],
)
def test_a_bad_spec_is_explained(spec: HubSpec, message: str) -> None:
    with pytest.raises(HubError, match=message), HubProcess(spec):
        pass


def test_a_port_in_use_is_explained(hub: HubProcess) -> None:
    port = int(hub.endpoint.rpartition(":")[2])
    with pytest.raises(HubError, match="address already in use"), HubProcess(SMALL, port=port):
        pass


def test_help_tells_what_to_do() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "manta.testing.hub", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "HF_ENDPOINT" in text
    assert "/_hub/faults" in text


def test_the_admin_api_is_on_the_hub_port_only(hub: HubProcess) -> None:
    assert fetch(f"{hub.endpoint}/_hub/stats").json()["violations"] == []
    rule = {"origin": "hub", "kind": "info", "action": {"fault": "fail", "status": 500}}
    fetch(f"{hub.endpoint}/_hub/faults", method="POST", body=json.dumps(rule).encode())
    assert fetch(f"{hub.endpoint}/api/models/{MODEL}").status == 500
    assert fetch(f"{hub.endpoint}/_hub/faults", method="POST", body=b'{"action": 1}').status == 400
    assert fetch(f"{hub.endpoint}/_hub/nonsense").status == 404
    assert fetch(f"{hub.cdn_endpoint}/_hub/stats").status == 403


def test_wait_for_returns_what_it_waited_for(hub: HubProcess) -> None:
    asker = threading.Timer(0.1, lambda: fetch(f"{hub.endpoint}/api/models/{MODEL}"))
    asker.start()
    (entry,) = hub.wait_for(kind="info", repo=MODEL, finished=True)
    asker.join()
    assert (entry.status, entry.authorized, entry.origin) == (200, False, "hub")
    with pytest.raises(HubError, match="0 of 1 requests"):
        hub.wait_for(kind="tree", timeout_s=0.05)
    with pytest.raises(HubError, match="0 of 1 requests"):
        hub.wait_for(after=entry.number, timeout_s=0.05)


def test_log_entries_tell_what_was_asked(hub: HubProcess) -> None:
    url = f"{hub.endpoint}/{MODEL}/resolve/main/model.safetensors"
    location = fetch(url, headers={"User-Agent": "me"}).headers["location"]
    fetch(location, range_="bytes=5-14")
    resolve, blob = hub.log()
    assert (resolve.kind, resolve.repo, resolve.file, resolve.user_agent) == (
        "resolve",
        MODEL,
        "model.safetensors",
        "me",
    )
    assert (blob.origin, blob.file, blob.range, blob.status, blob.sent) == (
        "cdn",
        "model.safetensors",
        "bytes=5-14",
        206,
        10,
    )
    assert hub.coverage(hub.files(MODEL).files["model.safetensors"].blob) == [(5, 15, 1)]
    assert hub.log(after=resolve.number) == [blob]


def test_reset_brings_everything_back(hub: HubProcess) -> None:
    before = hub.files(MODEL).commit
    hub.move_branch(MODEL, "first")
    hub.add_fault(faults.Reset())
    hub.set_bandwidth(1000)
    hub.update(SettingsUpdate(latency_s=1.0, signed_url_lifetime_s=-1))
    hub.set_listening("cdn", accept=False)
    hub.reset()
    assert hub.files(MODEL).commit == before
    assert (hub.faults(), hub.log()) == ([], [])
    location = fetch(f"{hub.endpoint}/{MODEL}/resolve/main/model.safetensors").headers["location"]
    assert fetch(location, range_="bytes=0-99999").status == 206


def test_a_digest_index_spares_the_next_start_the_hashing(tmp_path: Path) -> None:
    index = tmp_path / "cache" / "index.json"
    with HubProcess(SMALL, index=index) as hub:
        sha256 = hub.files("org/name").files["a.bin"].sha256
    stored = json.loads(index.read_text())
    (key,) = stored["digests"]
    stored["digests"][key] = "0" * 64  # shows that it is read
    index.write_text(json.dumps(stored))
    with HubProcess(SMALL, index=index) as hub:
        assert hub.files("org/name").files["a.bin"].sha256 == "0" * 64 != sha256


def test_disk_files_are_served_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(GeneratedContent("disk", 2_000_000).read())
    spec = HubSpec(repos=[RepoSpec(id="org/name", files={"w.bin": Disk(str(path))})])
    with HubProcess(spec) as hub:
        url = fetch(f"{hub.endpoint}/org/name/resolve/main/w.bin").headers["location"]
        assert fetch(url, range_="bytes=1000000-1000099").body == path.read_bytes()[1_000_000:1_000_100]
        path.write_bytes(b"something else")
        assert fetch(url).status == 404


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(cert))
    with HubProcess(SMALL, tls=(cert, key)) as hub:
        assert hub.endpoint.startswith("https://")
        url = f"{hub.endpoint}/org/name/resolve/main/a.bin"
        with urllib.request.urlopen(url, context=context, timeout=30) as response:
            assert response.url.startswith(hub.cdn_endpoint)
            assert response.read() == GeneratedContent("a", 3_000_000).read()
        assert hub.blob_traffic("org/name", "a.bin").sent == 3_000_000
        hub.add_fault(faults.Truncate(after_bytes=1000), origin="cdn")
        with (
            urllib.request.urlopen(url, context=context, timeout=30) as response,
            pytest.raises((http.client.IncompleteRead, OSError)),
        ):
            response.read()


def test_many_connections_at_once(hub: HubProcess) -> None:
    url = fetch(f"{hub.endpoint}/{MODEL}/resolve/main/model.safetensors").headers["location"]
    size = hub.files(MODEL).files["model.safetensors"].size
    step = size // 32 + 1
    bodies: dict[int, bytes] = {}

    def read(place: int) -> None:
        stop = min(size, (place + 1) * step)
        bodies[place] = fetch(url, range_=f"bytes={place * step}-{stop - 1}").body

    readers = [threading.Thread(target=read, args=(place,)) for place in range(32)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert b"".join(bodies[place] for place in range(32)) == fetch(url).body
    blob = hub.blob_traffic(MODEL, "model.safetensors")
    assert (blob.unique, blob.repeated, blob.most) == (size, size, 2)
