"""How bytes get from the hub to readers: lazily, once, as they arrive, and again after something died."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from manta.testing.hub import HubProcess, faults
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE, true_digest
from tests.mount.node import Node, python, run, wait_for_end, wait_until

MIB = 1024 * 1024

READ_AT = """
import hashlib, json, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print(json.dumps(hashlib.sha256(os.pread(fd, int(sys.argv[3]), int(sys.argv[2]))).hexdigest()))
"""

STATE = 'import json, os, sys; print(json.dumps(os.getxattr(sys.argv[1], "user.manta.state").decode()))'


def reader(path: Path) -> subprocess.Popen[str]:
    """A process that reads the whole file and prints its sha256."""
    return subprocess.Popen(["sha256sum", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_opening_and_listing_fetch_nothing(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    run('ls -lR "$1"; stat "$1/$2"; exec 3< "$1/$2"; exec 3<&-', directory, BIG_FILE)
    assert hub.blob_traffic(BIG, BIG_FILE).sent == 0


def test_many_readers_cause_one_fetch(hub: HubProcess, node: Node) -> None:
    hub.set_latency(0.02)
    directory = node.mount(BIG)
    readers = [reader(directory / BIG_FILE) for _ in range(6)]
    digests = {r.communicate(timeout=60)[0].split()[0] for r in readers}
    assert digests == {hub.files(BIG).files[BIG_FILE].sha256}
    traffic = hub.blob_traffic(BIG, BIG_FILE)
    assert (traffic.sent, traffic.repeated) == (BIG_SIZE, 0)
    assert hub.stats().kinds["resolve"] <= 2  # the weights once, and nothing else was read
    assert hub.stats().violations == []


def test_a_reader_is_served_while_its_chunk_is_still_coming(hub: HubProcess, node: Node) -> None:
    """The chunk stalls after the bytes the reader wants; the reader must not notice."""
    directory = node.mount(BIG)
    at = 19 * MIB + 123
    # The reader's range request begins at its byte: 1 MiB further the body stops for longer than the reader waits.
    hub.add_fault(faults.Stall(after_bytes=1 * MIB, seconds=30), origin="cdn", file=BIG_FILE)
    assert python(READ_AT, directory / BIG_FILE, at, 4096, timeout_s=8) == true_digest(at, at + 4096)
    hub.clear_faults()


def test_random_reads_drag_no_windows(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_FETCH_FILL"] = "false"
    directory = node.mount(BIG)
    for at in (50 * MIB, 10 * MIB, 30 * MIB):
        assert python(READ_AT, directory / BIG_FILE, at, 4096) == true_digest(at, at + 4096)
    wait_until(lambda: not node.status()["transfers"])
    assert hub.blob_traffic(BIG, BIG_FILE).sent <= 3 * 8 * MIB


def test_what_was_read_from_is_completed_and_sealed(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    assert python(READ_AT, directory / BIG_FILE, 0, 10) == true_digest(0, 10)
    wait_until(lambda: python(STATE, directory / BIG_FILE) == "sealed")
    assert hub.blob_traffic(BIG, BIG_FILE).repeated == 0


def test_a_second_mount_fetches_nothing(hub: HubProcess, node: Node) -> None:
    digest = hub.files(BIG).files[BIG_FILE].sha256
    assert run('sha256sum "$1/$2"', node.mount(BIG), BIG_FILE).split()[0] == digest
    node.unmount_all()
    sent = hub.blob_traffic(BIG, BIG_FILE).sent
    assert run('sha256sum "$1/$2"', node.mount(BIG), BIG_FILE).split()[0] == digest
    assert hub.blob_traffic(BIG, BIG_FILE).sent == sent


def test_killed_workers_lose_nothing(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(30 * MIB)
    directory = node.mount(BIG)
    reading = reader(directory / BIG_FILE)
    for share in (0.2, 0.5, 0.8):
        wait_until(lambda share=share: node.status()["cache_bytes"] >= share * BIG_SIZE - 8 * MIB)  # type: ignore[misc]
        for pid in node.workers():
            os.kill(pid, signal.SIGKILL)
    assert reading.communicate(timeout=60)[0].split()[0] == hub.files(BIG).files[BIG_FILE].sha256


def test_a_killed_daemon_leaves_what_it_had_for_the_next(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(10 * MIB)
    directory = node.mount(BIG)
    reading = reader(directory / BIG_FILE)
    wait_until(lambda: node.status()["cache_bytes"] >= 16 * MIB)
    daemon, workers = node.daemon(), node.workers()
    os.kill(daemon, signal.SIGKILL)
    for pid in (daemon, *workers):
        wait_for_end(pid)
    had = hub.blob_traffic(BIG, BIG_FILE)
    hub.set_bandwidth(None)
    read, error = reading.communicate(timeout=60)
    if node.survives:
        assert read.split()[0] == hub.files(BIG).files[BIG_FILE].sha256, error
    else:
        assert reading.returncode != 0
        # Mounted again at the same, now dead, directory.
        node.manta("mount", BIG, str(directory))
    assert run('sha256sum "$1/$2"', directory, BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256
    traffic = hub.blob_traffic(BIG, BIG_FILE)
    assert traffic.sent - had.sent <= BIG_SIZE - 16 * MIB
    assert traffic.repeated <= 9 * 8 * MIB  # chunks that were under way when it died


def test_signed_urls_are_asked_for_again_before_they_expire(hub: HubProcess, node: Node) -> None:
    """Every third request to the CDN finds its URL refused; the reader sees nothing of it."""
    hub.add_fault(faults.Fail(status=403, body="xml"), origin="cdn", file=BIG_FILE, probability=0.3, seed=7)
    directory = node.mount(BIG)
    assert run('sha256sum "$1/$2"', directory, BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256


def test_a_flipped_byte_never_ends_in_a_sealed_blob(hub: HubProcess, node: Node) -> None:
    hub.add_fault(faults.Flip(offset=20 * MIB), origin="cdn", file=BIG_FILE, range=(20 * MIB, 20 * MIB + 1), times=1)
    directory = node.mount(BIG)
    run('cat "$1/$2" > /dev/null', directory, BIG_FILE)
    wait_until(lambda: bool(node.status()["errors"]))
    assert "digest" in node.status()["errors"][0]
    blob = f"sha256-{hub.files(BIG).files[BIG_FILE].sha256}"
    wait_until(lambda: any(b["id"] == blob and b["sealed"] for b in node.json("cache", "ls")["blobs"]))


def test_latency_of_a_small_read_is_two_round_trips(hub: HubProcess, node: Node) -> None:
    """Counted in requests, not in seconds: one for the location, one for the range that has the byte first."""
    node.environment["MANTA_FETCH_FILL"] = "false"
    directory = node.mount(BIG)
    before = len(hub.log())
    assert python(READ_AT, directory / BIG_FILE, 33 * MIB, 4096) == true_digest(33 * MIB, 33 * MIB + 4096)
    requests = [entry for entry in hub.log()[before:] if entry.path.endswith(BIG_FILE) or "cdn" in entry.origin]
    assert [entry.origin for entry in requests][:2] == ["hub", "cdn"]
    assert sum(entry.origin == "hub" for entry in requests) == 1
