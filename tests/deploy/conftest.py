"""helm, or a reason to skip."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy import helm


@pytest.fixture(scope="session")
def program() -> Path:
    if not helm.PROGRAM.exists():
        pytest.skip(f"{helm.PROGRAM} is not there: .venv/bin/python deploy/helm.py installs it")
    return helm.PROGRAM
