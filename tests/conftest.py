"""Options of the whole test suite; pytest takes them from here alone."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-sessions", action="store_true", help="run the tests marked above_fuse with every FUSE session too"
    )
