"""manta.telemetry.events: every record about a read carries its id, levels are as the documentation says, nothing grows."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from manta.errors import Absent, Throttled, Unavailable
from manta.model.extents import Extent
from manta.model.ids import BlobId, parse_blob_id
from manta.telemetry.events import (
    FILES_MAX,
    NAMED_MAX,
    PEERS_MAX,
    SLOW_SECONDS,
    SOURCES_MAX,
    Opener,
    Order,
    ReadWait,
    Telemetry,
)
from manta.telemetry.metrics import NODES_MAX, Metrics
from manta.wire.messages import Failed, Reason
from tests.telemetry.scrape import samples

BLOB = parse_blob_id("sha256-" + "a" * 64)
CDN = "https://cdn.example:443"
HUB = "https://hub.example:443"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def telemetry(clock: Clock, caplog: pytest.LogCaptureFixture) -> Telemetry:
    caplog.set_level(logging.DEBUG, "manta")
    return Telemetry(clock)


def wait(telemetry: Telemetry, first: int = 0, last: int = 0) -> ReadWait:
    """A read that touches chunks `first` to `last` of 100 bytes."""
    extent = Extent(first * 100 + 5, last * 100 + 50)
    return telemetry.read_waits(BLOB, "org/name/file", extent, range(first, last + 1), 1, Opener(11, 42))


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, dict[str, Any]]]:
    """Level, message and fields of each record."""
    return [(r.levelname, r.getMessage(), r.__dict__["fields"]) for r in caplog.records]


def values(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in samples(metrics).items() if value}


def test_one_read_is_followed_from_its_wait_to_its_answer(
    telemetry: Telemetry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    read = wait(telemetry, 2, 3)
    question = telemetry.question(BLOB, "org/name/file", HUB)
    clock.now += 0.25
    question.answered(CDN)
    order = telemetry.order(BLOB, "org/name/file", 2, "demand", CDN)
    order.given([(205, 300), (200, 205)], 9, 4711)
    clock.now += 0.5
    order.came(60)
    order.came(40)
    order.done(0.6, 0.5)
    order.recorded()
    order.ended()
    read.served(145)
    records = told(caplog)
    assert [(level, message) for level, message, _ in records] == [
        ("DEBUG", "read waits"),
        ("DEBUG", "location asked"),
        ("DEBUG", "location answered"),
        ("DEBUG", "order given"),
        ("DEBUG", "first byte"),
        ("DEBUG", "order done"),
        ("DEBUG", "chunk recorded"),
        ("DEBUG", "read answered"),
    ]
    for _, message, said in records:
        assert said.get("read") == read.id or said["reads"] == [read.id], message
    of = {message: said for _, message, said in records}
    assert of["read waits"] | {"read": ""} == {
        "read": "", "file": "org/name/file", "offset": 205, "length": 145, "blob": str(BLOB), "chunks": [2, 3],
        "inode": 11, "opened_by": 42, "under_way": [],
    }  # fmt: skip
    assert (of["location answered"]["seconds"], of["location answered"]["source"]) == (0.25, CDN)
    assert (of["order given"]["order"], of["order given"]["worker"]) == (9, 4711)
    assert of["order given"]["extents"] == ["205-300", "200-205"]
    assert of["first byte"]["seconds"] == 0.5
    assert (of["read answered"]["waited_s"], of["read answered"]["bytes"], of["read answered"]["orders"]) == (
        0.75,
        145,
        1,
    )
    expected = {
        "manta_reads_total{outcome=waited}": 1,
        "manta_read_bytes_total{source=origin}": 145,
        "manta_cache_chunk_requests_total{result=miss}": 1,
        "manta_cache_chunk_requests_total{result=hit}": 1,
        "manta_read_wait_seconds_sum{outcome=ok}": 0.75,
        "manta_fetched_bytes_total{source=origin}": 100,
        "manta_fetches_total{outcome=ok}": 1,
        "manta_fetch_duration_seconds_sum": 0.6,
        "manta_fetch_first_byte_seconds_sum": 0.5,
        "manta_location_requests_total{outcome=ok}": 1,
    }
    assert values(telemetry.metrics).items() >= expected.items()


def test_a_failed_order_names_its_reads_and_the_verdict(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    read = wait(telemetry)
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.given([(0, 100)], 1, 2)
    order.failed(Failed(1, "unavailable", "cdn answered 503", 503), 2, retry=True, pause_s=0.5)
    order.ended()
    level, message, said = told(caplog)[-1]
    assert (level, message) == ("INFO", "order failed: cdn answered 503")
    assert (said["reads"], said["reason"], said["status"], said["attempt"], said["verdict"]) == (
        [read.id], "unavailable", 503, 2, "again in 0.5 s",
    )  # fmt: skip
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.failed(Failed(1, "denied", "no", 403), 3, retry=False, pause_s=0)
    order.ended()
    assert told(caplog)[-1][2]["verdict"] == "given up"
    numbers = values(telemetry.metrics)
    assert numbers["manta_retries_total{reason=unavailable}"] == 1
    assert "manta_retries_total{reason=denied}" not in numbers
    assert numbers["manta_fetches_total{outcome=denied}"] == 1


def test_a_slow_read_is_told_of_at_info_and_a_failed_one_as_a_warning(
    telemetry: Telemetry, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    slow, failed, gone = wait(telemetry), wait(telemetry), wait(telemetry)
    clock.now += SLOW_SECONDS + 1
    slow.served(10)
    failed.failed(Unavailable("It did not come. Try again."))
    gone.failed(KeyboardInterrupt())
    telemetry.read_failed("f", Absent("It is gone."))
    assert [(level, message) for level, message, _ in told(caplog)[3:]] == [
        ("INFO", "read answered"),
        ("WARNING", "read failed: It did not come. Try again."),
        ("DEBUG", "read cancelled"),
        ("WARNING", "read failed: It is gone."),
    ]
    numbers = values(telemetry.metrics)
    for outcome in ("waited", "unavailable", "cancelled", "absent"):
        assert numbers[f"manta_reads_total{{outcome={outcome}}}"] == 1, outcome
    assert numbers["manta_read_wait_seconds_count{outcome=error}"] == 2
    assert telemetry.waiting() == 0


def test_a_read_that_comes_late_names_the_orders_under_way(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    order = telemetry.order(BLOB, "f", 1, "fill", CDN)
    order.given([(100, 200)], 77, 1)
    wait(telemetry, 1, 1).served(5)
    assert told(caplog)[-2][2]["under_way"] == [77]
    assert told(caplog)[-1][2]["orders"] == 1
    wait(telemetry, 2, 2).served(5)
    assert told(caplog)[-2][2]["under_way"] == []
    order.ended()


def test_an_order_for_many_reads_names_some_and_counts_the_rest(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    reads = [wait(telemetry) for _ in range(50)]
    wait(telemetry, 5, 5)
    assert (telemetry.waiting(BLOB), telemetry.waiting()) == (51, 51)
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.given([(0, 100)], 1, 2)
    said = told(caplog)[-1][2]
    assert len(said["reads"]) == NAMED_MAX
    assert set(said["reads"]) <= {read.id for read in reads}
    assert said["reads_more"] == 50 - NAMED_MAX


def test_a_hedge_is_counted_and_told(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    read = wait(telemetry)
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.given([(0, 100)], 1, 2)
    order.hedged(2, 3, 1.5, silent_s=0.5, came=7)
    assert (told(caplog)[-1][0], told(caplog)[-1][2]["by_order"], told(caplog)[-1][2]["reads"]) == (
        "INFO",
        2,
        [read.id],
    )
    ((source, _),) = telemetry.sources()
    assert source.in_flight == 2
    order.hedge_ended("won")
    assert source.in_flight == 1
    order.ended()
    assert source.in_flight == 0
    assert values(telemetry.metrics)["manta_hedges_total{outcome=won}"] == 1


def test_a_hedge_that_no_worker_had_is_counted_and_holds_no_connection(telemetry: Telemetry) -> None:
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.hedge_ended("failed")
    order.ended()
    ((source, _),) = telemetry.sources()
    assert source.in_flight == 0
    assert values(telemetry.metrics)["manta_hedges_total{outcome=failed}"] == 1


def test_a_pause_is_counted_and_told(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    question = telemetry.question(BLOB, "f", HUB)
    question.failed(Throttled("Later.", 30.0))
    telemetry.throttled(HUB, 30.0, "location")
    telemetry.throttled(HUB, 5.0, "bytes")
    assert told(caplog)[-1][0] == "WARNING"
    numbers = values(telemetry.metrics)
    assert numbers["manta_throttle_seconds_total"] == 35
    assert numbers["manta_throttles_total{request=location}"] == 1
    assert numbers["manta_location_requests_total{outcome=throttled}"] == 1
    ((source, _),) = telemetry.sources()
    assert (source.origin, source.failures) == (HUB, 1)


def test_sources_and_files_have_rates_and_are_bounded(telemetry: Telemetry, clock: Clock) -> None:
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    for _ in range(10):
        order.came(1000)
        clock.now += 0.1
    assert telemetry.file_rate(BLOB).bytes_per_second == pytest.approx(10_000, rel=0.2)
    assert telemetry.file_rate(BLOB).origin == CDN
    for number in range(FILES_MAX + SOURCES_MAX):
        other: BlobId = parse_blob_id(f"sha256-{number:064x}")
        telemetry.order(other, "f", 0, "fill", f"https://cdn{number}.example:443").ended()
    sources = telemetry.sources()
    assert len(sources) == SOURCES_MAX
    assert CDN in {source.origin for source, _ in sources}, "it has an order under way"
    assert len(telemetry._files) == FILES_MAX
    order.ended()
    assert not telemetry._orders
    assert not telemetry._waits


NODE = "00000000000000aa"
ADDRESS = "10.0.0.2:9402"


def pull(telemetry: Telemetry, node: str = NODE) -> Order:
    return telemetry.order(BLOB, "f", 0, "demand", ADDRESS, node)


def test_what_comes_from_another_node_is_counted_apart_from_the_origin(telemetry: Telemetry, clock: Clock) -> None:
    order = pull(telemetry)
    for _ in range(10):
        order.came(1000)
        clock.now += 0.1
    order.done(1.0, 0.5)
    order.recorded()
    order.ended()
    assert (
        values(telemetry.metrics).items()
        >= {
            "manta_fetched_bytes_total{source=peer}": 10_000,
            f"manta_peer_received_bytes_total{{node={NODE}}}": 10_000,
            "manta_pulls_total{outcome=ok}": 1,
            "manta_pull_duration_seconds_sum": 1.0,
            "manta_pull_first_byte_seconds_sum": 0.5,
        }.items()
    )
    for of_origin in (
        "manta_fetched_bytes_total{source=origin}",
        "manta_fetches_total{outcome=ok}",
        "manta_fetch_duration_seconds_count",
    ):
        assert of_origin not in values(telemetry.metrics)
    ((peer, rate_in, rate_out),) = telemetry.peers()
    assert (peer.node, peer.origin, peer.chunks, peer.meter.total, peer.in_flight) == (NODE, ADDRESS, 1, 10_000, 0)
    assert rate_in == pytest.approx(10_000, rel=0.2)
    assert rate_out == 0
    assert [(source.origin, rate) for source, rate in telemetry.sources()] == [(ADDRESS, rate_in)]
    assert telemetry.file_rate(BLOB).origin == ADDRESS


def test_a_node_has_failed_where_it_is_blamed(telemetry: Telemetry) -> None:
    """That one is busy, or has not got a chunk, is no failure: who asks knows which is which."""
    outcomes: tuple[Reason, ...] = ("busy", "cancelled", "absent", "corrupt", "unavailable")
    for outcome in outcomes:
        order = pull(telemetry)
        order.failed(Failed(1, outcome, "it said no"), 1, retry=True, pause_s=0)
        if outcome == "corrupt":
            order.blamed()
        order.ended()
    ((peer, _, _),) = telemetry.peers()
    assert peer.failures == 1
    numbers = values(telemetry.metrics)
    for outcome in outcomes:
        assert numbers[f"manta_pulls_total{{outcome={outcome}}}"] == 1
    assert not any("retries" in name or "fetches" in name for name in numbers)


def test_what_goes_to_other_nodes_is_counted_by_node(telemetry: Telemetry, clock: Clock) -> None:
    telemetry.given(NODE, 500, 1)
    clock.now += 1
    telemetry.given(NODE, 500, 2)
    telemetry.refused("busy", 3)
    telemetry.refused("auth", 1)
    assert (
        values(telemetry.metrics).items()
        >= {
            f"manta_peer_given_bytes_total{{node={NODE}}}": 1000,
            "manta_peer_given_chunks_total": 3,
            "manta_peer_refusals_total{reason=busy}": 3,
            "manta_peer_refusals_total{reason=auth}": 1,
        }.items()
    )
    ((peer, rate_in, rate_out),) = telemetry.peers()
    assert (peer.given.total, peer.given_chunks, peer.origin, rate_in) == (1000, 3, "", 0)
    assert rate_out == pytest.approx(500), "each is what was given in the second before"
    assert telemetry.sources() == [], "it has given nothing"


def test_nodes_and_their_labels_are_bounded(telemetry: Telemetry) -> None:
    order = pull(telemetry, "ffff")
    for number in range(PEERS_MAX + 10):
        telemetry.given(f"{number:016x}", 10, 1)
    order.came(7)
    order.ended()
    assert len(telemetry.peers()) == PEERS_MAX
    assert "ffff" in {peer.node for peer, _, _ in telemetry.peers()}, "it had an order under way"
    numbers = values(telemetry.metrics)
    given = {name: value for name, value in numbers.items() if name.startswith("manta_peer_given_bytes")}
    assert len(given) == NODES_MAX
    assert sum(given.values()) == 10 * (PEERS_MAX + 10)
    assert numbers["manta_peer_received_bytes_total{node=ffff}"] == 7
    assert [source.meter.total for source, _ in telemetry.sources()] == [7], "the others gave nothing"
    for number in range(SOURCES_MAX + 5):
        giver = pull(telemetry, f"{number:016x}")
        giver.came(1)
        giver.ended()
    assert len(telemetry.sources()) == SOURCES_MAX


def test_nothing_is_composed_for_a_log_that_is_not_written(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "manta")
    read = wait(telemetry)
    order = telemetry.order(BLOB, "f", 0, "demand", CDN)
    order.given([(0, 100)], 1, 2)
    order.came(5)
    order.done(1, 1)
    order.recorded()
    order.ended()
    read.served(5)
    assert caplog.records == []
