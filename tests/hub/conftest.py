from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hub.scripted_hub import ScriptedHub, scripted_hub


@pytest.fixture
def hub() -> Iterator[ScriptedHub]:
    with scripted_hub() as scripted:
        yield scripted
