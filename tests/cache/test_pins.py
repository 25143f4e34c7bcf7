from __future__ import annotations

import json
from pathlib import Path

import pytest

from manta.cache.pins import Pins
from manta.errors import CacheBroken, NoSpace
from tests.cache.conftest import blob_id

A, B, C = blob_id(b"a"), blob_id(b"b"), blob_id(b"c")


def test_pins_survive(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    pins = Pins(path)
    assert A not in pins
    pins.add("org/model", [A, B], 12.5)
    again = Pins(path)
    assert A in again
    assert C not in again
    pin = again.pins["org/model"]
    assert (pin.name, pin.blobs, pin.since) == ("org/model", frozenset({A, B}), 12.5)
    assert again.problem is None


def test_a_blob_stays_pinned_until_its_last_pin_is_dropped(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "pins.json")
    pins.add("one", [A, B], 1)
    pins.add("two", [B, C], 2)
    dropped = pins.drop("one")
    assert dropped is not None
    assert dropped.blobs == {A, B}
    assert [blob in pins for blob in (A, B, C)] == [False, True, True]
    assert pins.drop("one") is None
    assert [blob in Pins(tmp_path / "pins.json") for blob in (A, B, C)] == [False, True, True]


def test_pinning_again_replaces_what_was_meant(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "pins.json")
    pins.add("org/model", [A], 1)
    pins.add("org/model", [B], 2)
    assert [blob in pins for blob in (A, B)] == [False, True]


def test_a_view_of_the_pins_does_not_change_under_its_reader(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "pins.json")
    pins.add("one", [A], 1)
    before = pins.pins
    pins.add("two", [B], 2)
    assert list(before) == ["one"]


GOOD = {"version": 1, "pins": [{"name": "x", "since": 1, "blobs": [str(A)]}]}
DAMAGED = [
    b"",
    b"\0" * 100,
    b"\xff\xfe",
    b"[]",
    json.dumps(GOOD).encode()[:-2],
    json.dumps({**GOOD, "version": 2}).encode(),
    json.dumps({**GOOD, "pins": [{"name": "x", "since": 1, "blobs": ["sha256-../../etc"]}]}).encode(),
    json.dumps({**GOOD, "pins": [{"name": "\ud800", "since": 1, "blobs": []}]}).encode()[:-3],
]


@pytest.mark.parametrize("data", DAMAGED)
def test_a_damaged_file_pins_everything_until_someone_pins_again(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pins.json"
    path.write_bytes(data)
    Pins(path)
    pins = Pins(path)  # and a restart does not forget it
    assert C in pins
    problem = pins.problem or "none"
    assert str(path) in problem
    assert problem in caplog.text
    assert not pins.pins
    pins.add("org/model", [A], 1)
    assert pins.problem is None
    assert [blob in pins for blob in (A, C)] == [True, False]
    assert (tmp_path / "pins.json.damaged").read_bytes() == data
    assert [blob in Pins(path) for blob in (A, C)] == [True, False]


def test_unpinning_ends_the_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    path.write_bytes(b"{")
    pins = Pins(path)
    path.unlink()
    assert pins.drop("org/model") is None
    assert A not in pins
    assert not Pins(path).pins


def test_a_full_disk_changes_no_pin(small_disk: Path) -> None:
    pins = Pins(small_disk / "pins.json")
    pins.add("one", [A], 1)
    with (small_disk / "ballast").open("wb") as ballast, pytest.raises(OSError, match="No space"):
        ballast.write(bytes(2 << 20))
    with pytest.raises(NoSpace):
        pins.add("two", [blob_id(b"%d" % n) for n in range(1000)], 2)
    assert list(pins.pins) == ["one"]
    assert list(Pins(small_disk / "pins.json").pins) == ["one"]


def test_a_broken_disk_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "pins.json").mkdir()
    with pytest.raises(CacheBroken, match="Reading the pins"):
        Pins(tmp_path / "pins.json")
