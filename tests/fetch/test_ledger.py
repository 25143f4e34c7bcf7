"""What came from where: sums, and a bound."""

from __future__ import annotations

from manta.fetch.ledger import BLOBS_MAX, Ledger


def test_sums_stay_when_blobs_are_forgotten_the_one_that_came_longest_ago_first() -> None:
    ledger = Ledger()
    for number in range(BLOBS_MAX):
        ledger.came(str(number), 10, "a", 2, peer=bool(number % 2))
    ledger.came("0", 10, "a", 3, peer=True)
    ledger.came("new", 10, "b", 5, peer=False)
    assert len(ledger.entries) == BLOBS_MAX
    assert "1" not in ledger.entries
    assert (ledger.entries["0"].from_origin, ledger.entries["0"].from_peers) == (2, 3)
    assert ledger.from_origin == BLOBS_MAX + 5
    assert ledger.from_peers == BLOBS_MAX + 3
