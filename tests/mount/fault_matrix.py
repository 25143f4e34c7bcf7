"""The fault matrix as a document: rows to Markdown, and back to what identifies each. Pure. Used by `test_faults`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

HEAD = """\
# Fault matrix

What a reader and a person see of each fault of the test hub, as the tests saw it. Written by the tests themselves; do not edit:

    MANTA_FAULT_MATRIX=docs/fault-matrix.md .venv/bin/pytest tests/mount/test_faults.py

Each fault strikes every request of one file ("always"), or a few of them and then the hub is well ("once"), at one place:

- body: the CDN, when it is asked for a range of the file;
- location: the hub, when it is asked where the file's bytes are;
- metadata: the hub, when it is asked for a revision or a tree;
- repo: the repo itself changes while it is mounted, and later changes back. What was cached was readable all the time.

Read with short deadlines: fetch.stall_s = {stall:g}, fetch.read_timeout_s = {patience:g}, hub.timeout_s = {hub:g}. "Reader" is what
`sha256sum` of the file got, in turn, until it got the right bytes or the fault proved permanent. "Person" is the sentence in `manta status`
and in the log, without its advice; a dash: nothing to tell. "Within" is when the reader had its bytes or its error (the kernel asks twice
for a page that fails). "Requests" are those that the hub got for the file, the first included.

"Wrong bytes while they streamed": bytes are served as they arrive, before the digest of the whole can be known. The promise is about what
is known to be wrong: from then on no reader gets a byte of that blob before the whole of it has been verified (`fetch/quarantine.py`).

"""

COLUMNS = ("where", "fault", "struck", "reader", "person", "within", "requests")
BOUNDS_S = (1, 3, 10, 30, 60)
"""Times are told as the smallest of these that was enough, so that two runs write much the same."""


@dataclass(frozen=True)
class Row:
    where: str
    fault: str
    mode: str
    saw: Sequence[str]
    sentence: str
    recovery_s: float
    requests: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.where, self.fault, self.mode


def document(rows: Sequence[Row], *, stall_s: float, patience_s: float, hub_s: float) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    return HEAD.format(stall=stall_s, patience=patience_s, hub=hub_s) + "\n".join(lines) + "\n"


def keys(text: str) -> list[tuple[str, str, str]]:
    """What identifies each row of a document."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return [(row[0], row[1], row[2]) for row in cells[1:]]


def _cells(row: Row) -> list[str]:
    within = next((f"{bound} s" for bound in BOUNDS_S if row.recovery_s <= bound), f"{row.recovery_s:.0f} s")
    return [*row.key, _in_turn(row.saw), _shortened(row), within, _roughly(row.requests)]


def _in_turn(saw: Sequence[str]) -> str:
    """Each thing once, in the order it was first seen: how often a reader asked in between is chance."""
    return ", then ".join(dict.fromkeys(saw))


def _shortened(row: Row) -> str:
    """The sentence without addresses, digests in full, and advice."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", "the hub", row.sentence)
    text = text.replace("127.0.0.1", "the CDN" if row.where == "body" else "the hub").replace("|", "/")
    text = re.sub(r"([0-9a-f]{8})[0-9a-f]{32,}", r"\1…", text)
    text = re.split(r"\. (?:Try|Check|The file|What came|Ask)|: (?:try|check|ask) |; they were", text)[0].rstrip(".")
    return text or "–"


def _roughly(requests: int) -> str:
    return str(requests) if requests <= 8 else "more than 8"
