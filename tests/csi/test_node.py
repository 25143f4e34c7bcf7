"""What a request must have, and how stats are told."""

from __future__ import annotations

import pytest

from manta.control.protocol import Mount
from manta.errors import Invalid
from manta_csi.node import access_of, statistics
from manta_csi.proto import csi_pb2

Mode = csi_pb2.VolumeCapability.AccessMode


def capability(*flags: str, mode: int = 1, block: bool = False) -> csi_pb2.VolumeCapability:
    made = csi_pb2.VolumeCapability()
    if block:
        made.block.SetInParent()
    else:
        made.mount.SetInParent()
        made.mount.mount_flags.extend(flags)
    made.access_mode.mode = mode  # type: ignore[assignment]  # a number that a later version may send
    return made


@pytest.mark.parametrize("mode", range(1, 8))
def test_every_access_mode_is_fine(mode: int) -> None:
    assert access_of(capability("ro,nosuid", "nodev", mode=mode)) == mode


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (csi_pb2.VolumeCapability(access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)), "access_type"),
        (capability(block=True), "not Block"),
        (capability(mode=0), "access mode is unknown"),
        (capability(mode=77), "access mode is unknown"),
        (capability("rw"), "no mount option 'rw'; allowed are noatime"),
        (capability("ro,suid"), "no mount option 'suid'"),
    ],
)
def test_what_cannot_be_mounted(odd: csi_pb2.VolumeCapability, message: str) -> None:
    with pytest.raises(Invalid, match=message):
        access_of(odd)


def mount(**changes: object) -> Mount:
    values = {
        "id": "1",
        "target": "org/name",
        "revision": "main",
        "commit": "",
        "view": "tree",
        "source": "/s",
        "directory": "/d",
    }
    numbers = {"files": 3, "size": 1000, "cached": 250, "stale": False, "errors": []}
    return Mount(**{**values, **numbers, **changes})  # type: ignore[arg-type]


def test_stats() -> None:
    found = statistics(mount(), "")
    assert [(u.unit, u.total, u.used, u.available) for u in found.usage] == [(1, 1000, 250, 750), (2, 3, 3, 0)]
    assert not found.volume_condition.abnormal
    # A blob that several files show is cached once.
    assert statistics(mount(cached=5000), "").usage[0].available == 0


def test_stats_of_a_dead_volume_have_usage_too() -> None:
    found = statistics(None, "The daemon is gone.")
    assert [(u.unit, u.total) for u in found.usage] == [(1, 0), (2, 0)]
    assert (found.volume_condition.abnormal, found.volume_condition.message) == (True, "The daemon is gone.")
