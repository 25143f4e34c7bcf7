"""What a Prometheus server would get of some metrics, here and only here: for every test that counts."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from manta.telemetry.metrics import Metrics, QuotaLeft, State

STATE = State(
    cache_bytes=1000,
    cache_limit=5000,
    disk_free=7000,
    connections_allowed=8,
    connections_in_use=3,
    open_files=4,
    known_inodes=5,
    mounts=1,
    transfers=2,
    reads_waiting=6,
    hub_throttles=0,
    quotas=[QuotaLeft("api", 499, 500), QuotaLeft("resolvers", 7, None)],
    workers=[],
)


def samples(metrics: Metrics, state: State = STATE) -> dict[str, float]:
    """All values by NAME{label=value,...}, as a scraper gets them."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.rendered(state).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
