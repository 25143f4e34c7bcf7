"""Traffic: coverage is exact, and counters tell sent, unique and repeated bytes apart."""

from hypothesis import given
from hypothesis import strategies as st

from manta.testing.hub import traffic
from manta.testing.hub.traffic import Coverage, Ledger, LogEntry

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=20)


@given(RANGES)
def test_coverage_counts_every_byte(ranges: list[tuple[int, int]]) -> None:
    coverage = Coverage()
    counts = [0] * 60
    for start, stop in ranges:
        coverage.add(start, stop)
        for at in range(start, stop):
            counts[at] += 1
    told = [0] * 60
    for start, stop, times in coverage.intervals():
        assert times > 0
        told[start:stop] = [times] * (stop - start)
    assert told == counts


def test_pieces_of_one_sending_keep_no_edges() -> None:
    coverage = Coverage()
    for start in range(0, 1_000_000, 1000):
        coverage.add(start, start + 1000)
    assert coverage.intervals() == [(0, 1_000_000, 1)]


def test_coverage_has_a_bound() -> None:
    coverage = Coverage()
    for start in range(0, 2 * traffic.EDGES_MAX + 4, 4):
        coverage.add(start, start + 1)
    assert not coverage.complete


def _entry(number: int = 1, **values: object) -> LogEntry:
    fields: dict[str, object] = {
        "number": number,
        "started": 0.0,
        "origin": "cdn",
        "method": "GET",
        "path": "/x",
        "kind": "blob",
        "repo": "org/name",
        "file": "m.bin",
        "range": "",
        "client": "127.0.0.1",
        "user_agent": "",
        "authorized": False,
    }
    return LogEntry(**(fields | values))  # type: ignore[arg-type]


def test_blob_counters() -> None:
    ledger = Ledger()
    entry = _entry()
    ledger.begin(entry)
    ledger.sending("id", 100, "m.bin")
    ledger.sent(entry, "id", 0, 60)
    ledger.sent(entry, "id", 40, 100)
    ledger.sent(entry, "id", 40, 50)
    assert ledger.stats(cpu_s=0, peak_rss=0).origins["cdn"].in_flight == 1
    ledger.end(entry, 0.5)
    stats = ledger.stats(cpu_s=0, peak_rss=0)
    blob = stats.blobs["id"]
    assert (blob.sent, blob.unique, blob.repeated, blob.most, blob.requests) == (130, 100, 30, 3, 1)
    assert stats.origins["cdn"].in_flight == 0
    assert stats.origins["cdn"].sent == entry.sent == 130
    assert ledger.coverage("id") == [(0, 40, 1), (40, 50, 3), (50, 60, 2), (60, 100, 1)]


def test_bytes_past_the_end_of_a_blob_are_sent_but_cover_nothing() -> None:
    ledger = Ledger()
    entry = _entry()
    ledger.sending("id", 10, "m.bin")
    ledger.sent(entry, "id", 0, 15)
    blob = ledger.stats(cpu_s=0, peak_rss=0).blobs["id"]
    assert (blob.sent, blob.unique) == (15, 10)


def test_authorization_beyond_the_hub_is_a_violation() -> None:
    ledger = Ledger()
    ledger.begin(_entry(1, origin="hub", authorized=True))
    ledger.begin(_entry(2, origin="cdn", authorized=False))
    assert ledger.violations == []
    ledger.begin(_entry(3, origin="other", authorized=True))
    assert ledger.violations == ["request 3: Authorization reached other: /x"]


def test_the_log_keeps_the_newest() -> None:
    ledger = Ledger(log_max=3)
    for _ in range(5):
        ledger.begin(_entry(ledger.next_number()))
    assert [entry.number for entry in ledger.log] == [3, 4, 5]
    assert ledger.stats(cpu_s=0, peak_rss=0).origins["cdn"].requests == 5
