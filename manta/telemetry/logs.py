"""How log records look and which are written, here and only here: the formatters, the bound on repetitions, what is blotted out.

`manta.daemon` calls `configure` once. Records come from the standard library's loggers; what a record says beside its message is its
fields: ``log.debug("read waits", extra=fields(read="r3f9a-17", offset=0))``. Any thread may log.

Levels: *error* is for what the operator must look at, *warning* for what a reader or an operator suffers from, *info* for what happens now
and then (mounts, retries, seals, slow reads), *debug* for each step of each read that waits. What the cache answers is not logged at all.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

REPEATS_MAX = 5
REPEATS_SECONDS = 10.0
"""Records of one kind (logger and message template) that are written per so many seconds. A hub that is down fails eight orders a second
for hours; the first few say all of it, and the metrics count the rest."""

KINDS_MAX = 512
"""Kinds of records followed. The code has about a hundred; a library that writes its values into the template must not grow this."""

_QUERY = re.compile(r"(\bhttps?://[^\s\"'<>?\\]+)\?[^\s\"'<>\\]*")
_TOKEN = re.compile(r"\b(hf_(?=\w{20})|[Bb]earer (?=\S{8}))[\w.~+/=-]+")  # a repo may be called hf_model


def fields(**values: object) -> dict[str, Any]:
    """The `extra` of a log call: what the record says beside its message. Values are text, numbers, or lists of those."""
    return {"fields": values}


def redacted(text: str) -> str:
    """`text` without the queries of URLs, which sign them, and without tokens.

    The last line of defence: nothing of that kind is given to a log on purpose, but a library's exception may hold what it was given.
    """
    return _TOKEN.sub(r"\1...", _QUERY.sub(r"\1?...", text))


def _component(record: logging.LogRecord) -> str:
    return record.name.removeprefix("manta.")


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, "fields", {})
    return found


class TextFormatter(logging.Formatter):
    """One line for a person: time, level, component, message, and the fields as [name=value ...]."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(component)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the standard library's name
        record.component = _component(record)
        shown = " ".join(f"{name}={_plain(value)}" for name, value in _fields_of(record).items())
        return super().formatMessage(record) + (f" [{shown}]" if shown else "")

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ",".join(map(_plain, value))
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or not text.isprintable() else text


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, component, message, then the fields, and the exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "component": _component(record),
            "message": record.getMessage(),
        }
        document |= {name: round(v, 6) if isinstance(v, float) else v for name, v in _fields_of(record).items()}
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return redacted(json.dumps(document, ensure_ascii=False, default=str))


class RepeatLimit(logging.Filter):
    """Lets REPEATS_MAX records of a kind pass per REPEATS_SECONDS. The first after a gap tells how many were left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, object], tuple[float, int]] = {}  # when it began, how many came

    def filter(self, record: logging.LogRecord) -> bool:
        # Within the handler's lock. The template, not the text: the same failure names another chunk each time.
        kind, now = (record.name, record.msg), self._clock()
        began, count = self._windows.get(kind, (now, 0))
        if now - began >= REPEATS_SECONDS:
            if count > REPEATS_MAX:
                record.fields = {**_fields_of(record), "left_out": count - REPEATS_MAX}
            began, count = now, 0
        self._windows.pop(kind, None)
        self._windows[kind] = began, count + 1  # the one that came last is forgotten last
        if len(self._windows) > KINDS_MAX:
            del self._windows[next(iter(self._windows))]
        return count < REPEATS_MAX


def configure(level: str, form: LogFormat) -> None:
    """Sends this process's log to stderr: Manta's records from `level` (debug, info, warning, error) on, libraries' from warning on.

    Libraries log requests with their URLs and headers below that. At debug somebody follows something, so nothing is left out.
    """
    # backslashreplace, as stderr has it by default: a file's name may be no text, and its escape is JSON's own.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    if level != "debug":
        handler.addFilter(RepeatLimit())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("manta").setLevel(level.upper())
    logging.captureWarnings(capture=True)
