"""The committed stubs are those of the .proto files, and the wire has the specification's numbers."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from manta_csi.proto import csi_pb2

DRIVER = Path(__file__).parents[2] / "csi-driver"
PINNED = {"grpcio-tools": "1.85.1", "mypy-protobuf": "5.1.0"}


def test_the_stubs_are_current(tmp_path: Path) -> None:
    for package, version in PINNED.items():
        try:
            there = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if there != version:
            pytest.skip(f"{package} {there} is here, and the stubs are made with {version}")
    subprocess.run([sys.executable, DRIVER / "stubs.py", tmp_path], check=True, timeout=60, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "manta_csi/proto").iterdir()}
    kept = {path.name: path.read_bytes() for path in (DRIVER / "manta_csi/proto").glob("*_pb2*")}
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == [], "run `make proto`"


def test_a_publish_request_has_the_numbers_of_the_specification() -> None:
    request = csi_pb2.NodePublishVolumeRequest(
        volume_id="v",
        target_path="/t",
        readonly=True,
        secrets={"a": "b"},
        volume_context={"c": "d"},
        volume_capability=csi_pb2.VolumeCapability(
            mount=csi_pb2.VolumeCapability.MountVolume(),
            access_mode=csi_pb2.VolumeCapability.AccessMode(
                mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
            ),
        ),
    )
    assert request.SerializeToString(deterministic=True) == (
        b"\x0a\x01v"
        b"\x22\x02/t"
        b"\x2a\x06\x12\x00\x1a\x02\x08\x01"
        b"\x30\x01"
        b"\x3a\x06\x0a\x01a\x12\x01b"
        b"\x42\x06\x0a\x01c\x12\x01d"
    )
