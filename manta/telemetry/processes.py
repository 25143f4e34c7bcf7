"""What a process has used, as /proc tells it, here and only here. Linux; no library needed for two numbers."""

from __future__ import annotations

import os
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Usage(NamedTuple):
    """CPU time, user and system, and memory."""

    cpu_s: float
    resident_bytes: int


def usage(pid: int) -> Usage | None:
    """None for a process that is gone. One that has ended and was not waited for still tells its CPU time."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # proc(5): the name in parentheses may hold anything; utime and stime are fields 14 and 15, rss is field 24.
            values = file.read().rpartition(b") ")[2].split()
    except OSError:
        return None
    return Usage((int(values[11]) + int(values[12])) / _TICKS, int(values[21]) * _PAGE_BYTES)
