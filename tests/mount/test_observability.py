"""What an operator sees of a real daemon: a read followed through the log, metrics by a real client, and no secret anywhere."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from manta.testing.hub import HubProcess, faults
from manta.testing.hub.standard import MODEL, READER_TOKEN
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE
from tests.mount.node import Node, run, wait_until


def records(node: Node) -> list[dict[str, Any]]:
    """The daemon's log. libfuse writes past the log, and nothing else does."""
    lines = [line for path in (node.path / "run").glob("*/daemon.log") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if not line.startswith("fuse: ")]


def about(read: str, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in log if read == record.get("read") or read in record.get("reads", ())]


def scrape(*address: str) -> dict[str, float]:
    """What curl gets, by Prometheus' own parser, without labels that do not matter here."""
    done = subprocess.run(
        ["curl", "-sS", "--max-time", "20", *address], capture_output=True, text=True, check=True, timeout=30
    )
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(done.stdout)
        for sample in family.samples
    }


def test_one_read_is_followed_end_to_end_and_no_secret_is_told(hub: HubProcess, node: Node) -> None:
    node.environment |= {"MANTA_DAEMON_LOG_LEVEL": "debug", "MANTA_DAEMON_LOG_FORMAT": "json"}
    # For the first reader's order, and so that a new location is asked for.
    hub.add_fault(faults.Fail(status=403), origin="cdn", file=BIG_FILE, range=(0, 1), times=1)
    directory = node.mount(BIG, token=READER_TOKEN)
    run('sha256sum "$1"', directory / BIG_FILE)
    socket = next((node.path / "run").glob("*/control.sock"))
    metrics = scrape("--unix-socket", str(socket), "http://manta/metrics")
    log = records(node)

    followed = about(log[[r["message"] for r in log].index("read waits")]["read"], log)
    steps = [record["message"].partition(":")[0] for record in followed]
    assert steps[:4] == ["read waits", "location asked", "location answered", "order given"]
    assert steps[-1] == "read answered"
    assert steps.count("order failed") == 1
    assert steps.count("location asked") == 2
    assert "first byte" in steps
    assert followed[0]["file"] == f"{BIG}/{BIG_FILE}"
    assert followed[0]["opened_by"] > 0
    assert all({"time", "level", "component"} <= set(record) for record in log)
    assert followed[-1]["outcome"] == "ok"

    assert metrics["manta_cache_bytes"] == BIG_SIZE
    # On a loaded machine an order may be hedged, and what has come of both is counted.
    assert BIG_SIZE <= metrics["manta_fetched_bytes_total origin"] < 1.5 * BIG_SIZE
    delivered = sum(metrics[f"manta_read_bytes_total {source}"] for source in ("page_cache", "disk", "origin"))
    # The kernel asks once more for pages that it took back before the reader had them, where memory is short.
    assert BIG_SIZE <= delivered < 1.5 * BIG_SIZE
    assert metrics["manta_fetches_total denied"] == metrics["manta_retries_total denied"] == 1
    assert metrics["manta_read_wait_seconds_count ok"] == metrics["manta_reads_total waited"] > 0
    assert metrics["manta_hub_quota_remaining resolvers"] > 0, "told with the locations"
    assert metrics["manta_worker_resident_memory_bytes fetch"] > 1_000_000
    assert metrics["process_resident_memory_bytes"] > 1_000_000

    text = json.dumps(log)
    secrets = [READER_TOKEN, "Bearer", "Signature=", "Policy=", "Expires="]
    assert [secret for secret in secrets if secret in text] == []
    assert "?" not in "".join(str(record.get("host", "")) + str(record.get("source", "")) for record in log)


def test_what_the_cache_answers_is_not_logged_and_a_load_is_a_few_lines(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_DAEMON_LOG_FORMAT"] = "json"
    directory = node.mount(BIG)
    for _ in range(2):
        run('sha256sum "$1"', directory / BIG_FILE)
    wait_until(lambda: any(record["message"].startswith("sealed") for record in records(node)))
    assert len(records(node)) < 10


def test_metrics_have_an_address_of_their_own_where_told_to(hub: HubProcess, node: Node, tmp_path: Path) -> None:
    path = f"{node.path}/metrics.sock"
    node.environment["MANTA_DAEMON_METRICS"] = f"unix:{path}"
    node.mount(MODEL)
    metrics = scrape("--unix-socket", path, "http://manta/metrics")
    assert (metrics["manta_mounts"], metrics["manta_workers fetch"]) == (1, 2)
    # Another daemon that is told to use the same address says so, and serves all the same.
    second = Node(hub.endpoint, {"MANTA_DAEMON_METRICS": f"unix:{path}"})
    with second:
        second.mount(MODEL)
        assert any("another program listens there" in error for error in second.status()["errors"])
    assert scrape("--unix-socket", path, "http://manta/metrics")["manta_mounts"] == 1


def test_a_killed_worker_is_counted_and_top_shows_what_goes_on(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(5_000_000)
    directory = node.mount(BIG)
    reader = subprocess.Popen(["sha256sum", str(directory / BIG_FILE)], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: bool(node.status()["transfers"]) and node.status()["origin_rate"] > 0)
        frame = node.manta("top", "--once").stdout
        for words in (str(directory), f"{BIG}/{BIG_FILE}", hub.cdn_endpoint.removeprefix("http://"), "resolvers"):
            assert words in frame, frame
        socket = next((node.path / "run").glob("*/control.sock"))
        run("kill -9 $1", node.workers()[0])
        wait_until(
            lambda: (
                sum(
                    value
                    for name, value in scrape("--unix-socket", str(socket), "http://manta/metrics").items()
                    if name.startswith("manta_worker_restarts_total")
                )
                == 1
            )
        )
    finally:
        hub.set_bandwidth(None)
        reader.kill()
        reader.wait()
