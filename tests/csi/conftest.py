"""Fixtures of the CSI driver's tests: a kubelet's directory, from which every mount is gone afterwards, and a daemon that is faked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manta.control.binding import mounts, unbind
from manta.errors import MantaError
from tests.csi.fake_daemon import FakeDaemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="bind mounts need root")


def detach_below(directory: Path) -> None:
    """Ends every mount below a directory, as far as there are any."""
    for _ in range(64):
        found = [entry.directory for entry in mounts() if entry.directory.startswith(f"{directory}/")]
        if not found:
            return
        for mounted in found:
            with suppress(MantaError):
                unbind(mounted, lazy=True)


@pytest.fixture
def kubelet_dir() -> Iterator[Path]:
    """With a short path: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="kubelet-") as directory:
        resolved = Path(directory).resolve()
        yield resolved
        detach_below(resolved)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    models = tmp_path.resolve() / "models"
    models.mkdir()
    with FakeDaemon(tmp_path / "run" / "control.sock", source_root=models) as fake:
        yield fake
