"""manta.telemetry.logs: both formats, the bound on repetitions, and what must never be in a log."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from manta.telemetry.logs import REPEATS_MAX, REPEATS_SECONDS, JsonFormatter, RepeatLimit, TextFormatter, redacted
from manta.telemetry.logs import fields as said

SIGNED = "https://cdn.example/repos/a/b?X-Amz-Signature=deadbeef&Expires=99"


def record(
    message: str = "order %d given", *arguments: object, level: int = logging.INFO, **values: object
) -> logging.LogRecord:
    made = logging.LogRecord("manta.fetch.fetcher", level, __file__, 1, message, arguments, None)
    made.__dict__.update(said(**values))
    return made


def test_json_is_one_object_with_the_fields_beside_the_message() -> None:
    line = JsonFormatter().format(
        record("order %d given\n", 7, read="r1-2", reads=["r1-2", "r1-3"], seconds=0.123456789)
    )
    assert "\n" not in line
    document = json.loads(line)
    assert document.pop("time").endswith("+00:00")
    assert document == {
        "level": "info",
        "component": "fetch.fetcher",
        "message": "order 7 given\n",
        "read": "r1-2",
        "reads": ["r1-2", "r1-3"],
        "seconds": 0.123457,
    }


def test_json_holds_the_traceback_and_what_json_has_no_type_for() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        made = record("failed", path=b"\xff", level=logging.ERROR)
        made.exc_info = sys.exc_info()
    document = json.loads(JsonFormatter().format(made))
    assert "ValueError: no" in document["exception"]
    assert document["path"] == "b'\\xff'"


def test_text_has_the_fields_in_brackets_for_a_persons_eye_and_grep() -> None:
    line = TextFormatter().format(
        record("order %d given", 7, read="r1-2", reads=["a", "b"], file="my file", seconds=1.5)
    )
    assert line.endswith(' INFO fetch.fetcher: order 7 given [read=r1-2 reads=a,b file="my file" seconds=1.500]')
    assert TextFormatter().format(record("left")).endswith(" INFO fetch.fetcher: left")


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_no_query_and_no_token_gets_into_a_line(formatter: logging.Formatter) -> None:
    line = formatter.format(
        record(f"asked {SIGNED} with Bearer abc.defghij", url=SIGNED, token="hf_" + "abcDEF123" * 4)
    )
    for secret in ("deadbeef", "Expires", "abc", "DEF"):
        assert secret not in line
    assert "https://cdn.example/repos/a/b?..." in line


def test_plain_text_and_plain_urls_stay() -> None:
    for text in ("Is it there? Yes.", "http://127.0.0.1:8000/api/models/a/b", "org/hf_model", "the bearer of bad news"):
        assert redacted(text) == text


def test_repetitions_are_bounded_and_their_number_is_told() -> None:
    now = 0.0
    limit = RepeatLimit(lambda: now)
    passed = [limit.filter(record("chunk %d failed", n)) for n in range(100)]
    assert passed == [True] * REPEATS_MAX + [False] * (100 - REPEATS_MAX)
    assert limit.filter(record("something else")), "each kind has its own bound"
    now = REPEATS_SECONDS
    late = record("chunk %d failed", 100, read="r1")
    assert limit.filter(late)
    assert late.__dict__["fields"] == {"read": "r1", "left_out": 100 - REPEATS_MAX}
    again = record("chunk %d failed", 101)
    assert limit.filter(again)
    assert "left_out" not in again.__dict__["fields"]


def test_the_bound_on_repetitions_does_not_grow_with_what_a_library_writes() -> None:
    limit = RepeatLimit(lambda: 0.0)
    for number in range(2000):
        assert limit.filter(record(f"unique {number}"))
    assert len(limit._windows) <= 512


CONFIGURED = """
import logging, sys, warnings
from manta.telemetry.logs import configure
configure(sys.argv[1], "json")
logging.getLogger("manta.x").debug("ours in detail")
for n in range(8): logging.getLogger("manta.x").info("ours %d", n)
logging.getLogger("httpx2").info("HTTP Request: GET https://hub/?token=1")
logging.getLogger("asyncio").warning("theirs")
logging.getLogger("manta.x").info("name %s", "\\udcff")
warnings.warn("careful")
"""


@pytest.mark.parametrize(("level", "ours"), [("debug", 9), ("info", REPEATS_MAX), ("warning", 0)])
def test_levels_are_ours_and_libraries_only_warn(level: str, ours: int) -> None:
    """In a process of its own: it takes over the root logger."""
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURED, level], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    messages = [line["message"] for line in lines]
    assert sum(message.startswith("ours") for message in messages) == ours
    assert "theirs" in messages
    assert any("careful" in message for message in messages)
    assert not any("HTTP Request" in message for message in messages)
    assert ("name \udcff" in messages) is (level != "warning")
