"""What becomes of a blob that was found wrong: held until it is verified, condemned for a while when it stays wrong. Pure."""

from __future__ import annotations

from manta.errors import Corrupt
from manta.fetch.quarantine import CONDEMNED_SECONDS, SUSPECTS_MAX, Quarantine
from manta.model.ids import BlobAlgorithm, BlobId

WRONG = Corrupt("it is wrong")


def blob(number: int = 0) -> BlobId:
    return BlobId(BlobAlgorithm.SHA256, f"{number:064x}")


def test_it_is_held_until_it_matches() -> None:
    quarantine = Quarantine()
    assert not quarantine.holds(blob())
    assert quarantine.take(blob()), "fetched anew once"
    assert quarantine.holds(blob())
    assert quarantine.verdict(blob(), 0.0) is None
    quarantine.release(blob())
    assert not quarantine.holds(blob())


def test_what_stays_wrong_is_left_alone_for_a_while_and_then_fetched_once_more() -> None:
    quarantine = Quarantine()
    assert quarantine.take(blob())
    assert not quarantine.take(blob())
    quarantine.condemn(blob(), WRONG, 5.0)
    assert quarantine.verdict(blob(), 5.0 + CONDEMNED_SECONDS - 1) is WRONG
    assert quarantine.verdict(blob(), 5.0 + CONDEMNED_SECONDS) is None
    assert quarantine.holds(blob()), "still not believed before it has matched"
    assert quarantine.take(blob())


def test_it_is_bounded() -> None:
    quarantine = Quarantine()
    for number in range(SUSPECTS_MAX + 1):
        quarantine.take(blob(number))
    assert not quarantine.holds(blob(0))
    assert quarantine.holds(blob(1))
