"""benchmarks.survive: which reads a kill may have held up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import witnesses
from benchmarks.survive import Reads


@pytest.fixture
def reads(tmp_path: Path) -> Reads:
    """Ten reads, one per second from 100 on, of half a second but for the one at 104, which takes its whole second; then a torn record."""
    log = tmp_path / "log"
    records = [witnesses.RECORD.pack(100.0 + at, 1.0 if at == 4 else 0.5) for at in range(10)]
    log.write_bytes(b"".join(records) + b"torn")
    return Reads.of(log)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (90.0, 95.0, []),
        (90.0, 100.1, [0]),
        (102.2, 102.3, [2]),
        (102.6, 102.9, []),
        (102.6, 105.1, [3, 4, 5]),
        (104.9, 104.95, [4]),
        (109.6, 200.0, []),
    ],
)
def test_those_that_were_under_way(reads: Reads, start: float, end: float, expected: list[int]) -> None:
    assert list(reads.during(start, end)) == expected


def test_a_reader_that_never_began_has_no_reads(tmp_path: Path) -> None:
    assert list(Reads.of(tmp_path / "none").during(0.0, 1e9)) == []
