"""manta.telemetry.processes: what /proc tells about a process that runs, that has ended, and that is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from manta.telemetry.processes import usage


def test_this_process_has_used_what_its_clock_says() -> None:
    found = usage(os.getpid())
    assert found is not None
    assert abs(found.cpu_s - time.process_time()) < 1.0
    assert found.resident_bytes > 5_000_000


def test_one_that_ended_tells_its_cpu_time_until_it_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "sum(range(3_000_000))"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = usage(child.pid)
    assert found is not None
    assert found.cpu_s > 0
    child.wait()
    assert usage(child.pid) is None
