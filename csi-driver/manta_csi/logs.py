"""How the driver's log records look, here and only here; and the last line of defence against tokens in them."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime

_TOKEN = re.compile(r"\b(hf_(?=\w{20})|[Bb]earer (?=\S{8})|eyJ(?=[\w-]{20}))[\w.~+/=-]+")


def fields(**values: object) -> dict[str, object]:
    """The `extra` of a log call: what the record says beside its message."""
    return {"fields": values}


def redacted(text: str) -> str:
    """`text` without tokens of the Hub and JWTs. Nothing of that kind is given to a log on purpose."""
    return _TOKEN.sub(r"\1...", text)


class _Formatter(logging.Formatter):
    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        component = record.name.removeprefix("manta_csi.")
        values: dict[str, object] = getattr(record, "fields", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            said = {
                "time": when,
                "level": record.levelname.lower(),
                "component": component,
                "message": record.getMessage(),
            }
            return redacted(json.dumps({**values, **said, **({"trace": trace} if trace else {})}, default=str))
        shown = " ".join(f"{name}={value}" for name, value in values.items() if value != "")
        line = f"{when} {record.levelname} {component}: {record.getMessage()}{f' [{shown}]' if shown else ''}"
        return redacted("\n".join([line, trace] if trace else [line]))


def configure(level: str, style: str) -> None:
    """Records of this level and above go to stderr. Of the libraries only warnings: grpc's own debug records may hold requests."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json=style == "json"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("manta_csi").setLevel(level.upper())
