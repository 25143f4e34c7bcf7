"""manta.telemetry.metrics: what Prometheus' own parser makes of them, names and labels by its rules, numbers that only grow."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from manta.telemetry.metrics import Metrics, SwarmState, Volume
from manta.wire.peering import MemberState
from tests.telemetry.scrape import STATE, samples

LABELS = {
    "version", "python", "fuse", "outcome", "source", "result", "reason", "request", "kind", "role", "le", "state", "node",
    "namespace", "pod", "repo",
}  # fmt: skip
"""None names a file, a host or a process: those have no bound. `node` has one (NODES_MAX), pods and repos have (VOLUMES_MAX)."""


def test_names_helps_units_and_labels_follow_the_conventions() -> None:
    state = replace(STATE, volumes=[Volume("default", "server-0", "org/name", 10)])
    families = list(text_string_to_metric_families(Metrics().rendered(state).decode()))
    assert len(families) > 40
    for family in families:
        assert re.fullmatch(r"(manta|process)_[a-z_]+", family.name), family.name
        assert family.documentation.rstrip().endswith("."), family.name
        assert family.type in {"counter", "gauge", "histogram"}, family.name
        assert not re.search(r"milli|micro|kilo|mega|_ms|_mb|_count$", family.name), f"{family.name}: base units only"
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, family.name


def test_every_counter_is_there_from_the_start_with_zero() -> None:
    values = samples(Metrics())
    for name in (
        "manta_reads_total{outcome=hit}",
        "manta_reads_total{outcome=unavailable}",
        "manta_read_bytes_total{source=origin}",
        "manta_cache_chunk_requests_total{result=miss}",
        "manta_fetched_bytes_total{source=origin}",
        "manta_fetched_bytes_total{source=peer}",
        "manta_pulls_total{outcome=corrupt}",
        "manta_peer_given_chunks_total",
        "manta_peer_given_bytes_total{node=other}",
        "manta_peer_received_bytes_total{node=other}",
        "manta_peer_refusals_total{reason=auth}",
        "manta_fetches_total{outcome=throttled}",
        "manta_retries_total{reason=corrupt}",
        "manta_hedges_total{outcome=won}",
        "manta_errors_total{reason=denied}",
        "manta_throttles_total{request=bytes}",
        "manta_throttle_seconds_total",
        "manta_cache_evicted_bytes_total{reason=floor}",
        "manta_seals_total{outcome=mismatch}",
        "manta_worker_restarts_total{role=fetch}",
        "manta_read_wait_seconds_count{outcome=ok}",
        "manta_fetch_first_byte_seconds_count",
    ):
        assert values[name] == 0, name


def test_what_is_now_is_shown_as_given() -> None:
    values = samples(Metrics())
    assert values["manta_cache_bytes"] == 1000
    assert values["manta_cache_limit_bytes"] == 5000
    assert values["manta_cache_disk_free_bytes"] == 7000
    assert values["manta_connections_in_use"] == 3
    assert values["manta_reads_waiting"] == 6
    assert values["manta_hub_quota_remaining{kind=resolvers}"] == 7
    assert values["manta_hub_quota_limit{kind=api}"] == 500
    assert "manta_hub_quota_limit{kind=resolvers}" not in values
    silent = samples(Metrics(), replace(STATE, disk_free=None))["manta_cache_disk_free_bytes"]
    assert math.isnan(silent), "a disk that does not answer is not full"


def test_a_swarm_is_shown_as_given_and_none_as_nothing() -> None:
    states: list[MemberState] = ["up", "up", "down"]
    values = samples(Metrics(), replace(STATE, swarm=SwarmState(states, 8, 3, 0.125)))
    assert values["manta_peer_members{state=up}"] == 2
    assert values["manta_peer_members{state=down}"] == 1
    assert values["manta_peer_members{state=refused}"] == 0
    assert (values["manta_peer_upload_slots"], values["manta_peer_upload_slots_in_use"]) == (8, 3)
    assert values["manta_origin_multiple_ratio"] == 0.125
    alone = samples(Metrics())
    assert alone["manta_peer_members{state=up}"] == alone["manta_peer_upload_slots"] == 0
    assert math.isnan(alone["manta_origin_multiple_ratio"])


def test_the_series_of_a_volume_go_with_it() -> None:
    metrics = Metrics()
    volumes = [Volume("default", "server-0", "org/name", 1000, 500, 2.5, 3), Volume("other", 'po"d', "", 7)]
    values = samples(metrics, replace(STATE, volumes=volumes, volumes_total=600))
    labels = "{namespace=default,pod=server-0,repo=org/name}"
    assert values["manta_volumes"] == 600
    assert values[f"manta_volume_bytes{labels}"] == 1000
    assert values[f"manta_volume_cached_bytes{labels}"] == 500
    assert values[f"manta_volume_bytes_per_second{labels}"] == 2.5
    assert values[f"manta_volume_reads_waiting{labels}"] == 3
    later = samples(metrics, replace(STATE, volumes=volumes[1:], volumes_total=1))
    assert [name for name in later if name.startswith("manta_volume_bytes{")] == [
        'manta_volume_bytes{namespace=other,pod=po"d,repo=}'
    ]


def test_the_tally_of_reads_is_taken_over_once() -> None:
    metrics = Metrics()
    metrics.tally.hits += 3
    metrics.tally.chunks_found += 4
    metrics.tally.page_cache_bytes += 100
    metrics.tally.disk_bytes += 10
    metrics.tally.origin_bytes += 1
    for _ in range(2):
        values = samples(metrics)
        assert values["manta_reads_total{outcome=hit}"] == 3
        assert values["manta_cache_chunk_requests_total{result=hit}"] == 4
        assert values["manta_read_bytes_total{source=page_cache}"] == 100
        assert values["manta_read_bytes_total{source=disk}"] == 10
        assert values["manta_read_bytes_total{source=origin}"] == 1
    metrics.tally.hits += 1
    assert samples(metrics)["manta_reads_total{outcome=hit}"] == 4
    assert metrics.tally.bytes == 111


def test_a_workers_cpu_time_is_counted_beyond_its_end() -> None:
    metrics = Metrics()
    name = "manta_worker_cpu_seconds_total{role=fetch}"
    child = subprocess.Popen(
        [sys.executable, "-c", "sum(range(5_000_000)); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    state = replace(STATE, workers=[("fetch", child.pid)])
    first = samples(metrics, state)
    assert first["manta_workers{role=fetch}"] == 1
    child.communicate(b"\n")
    # `communicate` has waited for it: what was seen stays.
    assert samples(metrics, state)[name] >= first[name]
    other = subprocess.Popen([sys.executable, "-c", "sum(range(5_000_000))"])
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    before = samples(metrics)[name]
    metrics.worker_ended("fetch", other.pid)
    other.wait()
    values = samples(metrics)
    assert values[name] > before
    assert values["manta_worker_restarts_total{role=fetch}"] == 1
    assert values["manta_workers{role=fetch}"] == 0


def test_throttled_questions_to_the_hub_are_counted_by_their_number() -> None:
    metrics = Metrics()
    for throttles, shown in ((2, 2), (2, 2), (5, 5)):
        values = samples(metrics, replace(STATE, hub_throttles=throttles))
        assert values["manta_throttles_total{request=metadata}"] == shown


def test_two_daemons_in_one_process_do_not_meet() -> None:
    one, other = Metrics(), Metrics()
    one.tally.hits += 1
    one.announce("pyfuse3")
    assert samples(one)["manta_reads_total{outcome=hit}"] == 1
    assert samples(other)["manta_reads_total{outcome=hit}"] == 0
    assert any(name.startswith("manta_build_info{fuse=pyfuse3,python=3.") for name in samples(one))
