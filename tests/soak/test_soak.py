"""The soak runs: a few seconds of good and bad weather, and nothing found."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.mount.node import SESSIONS, needs_fuse
from tests.soak.__main__ import soak

REASON = needs_fuse()


@pytest.mark.fuse
@pytest.mark.skipif(bool(REASON), reason=REASON or "it can run")
@pytest.mark.parametrize("session", SESSIONS)
def test_a_few_seconds_of_it(tmp_path: Path, session: str) -> None:
    with soak(3, tmp_path / "soak", session) as running:
        with running.running(weather=False):
            time.sleep(3)
            running.weather.storm(3.0)
            time.sleep(1)
        assert running.tally.findings == []
        assert running.tally.compared > 0
        assert "bytes compared" in running.summary()
