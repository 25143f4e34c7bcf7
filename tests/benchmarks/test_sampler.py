"""benchmarks.sampler: what it says of processes whose CPU time and memory are known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks import sampler
from benchmarks.sampler import Sampler, descendants, role

BUSY = """
import sys, time
memory = bytearray(int(sys.argv[1]))
memory[::4096] = bytes(len(memory[::4096])) if memory else b""
sys.stdin.readline()
began = time.process_time()
while time.process_time() - began < float(sys.argv[2]):
    pass
print("done", flush=True)
sys.stdin.readline()
"""

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
print(child.pid, flush=True)
sys.exit(child.wait())
"""


@contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, *argv]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.write(b"go\n")
    process.stdin.flush()


def line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    return process.stdout.readline().strip()


def test_cpu_time_and_memory_of_a_process() -> None:
    with running("-c", BUSY, str(64 << 20), "0.4") as process:
        with Sampler({"busy": lambda: [process.pid]}, shares_of={"busy"}) as watching:
            go(process)
            assert line(process) == b"done"
        usage = watching.usage("busy")
    assert usage.cpu_s >= 0.4 - 2 / os.sysconf("SC_CLK_TCK")
    assert usage.rss_peak >= 64 << 20
    assert 64 << 20 <= usage.pss_peak <= usage.rss_peak
    (only,) = usage.processes
    assert only.pid == process.pid
    assert only.role.startswith("-c")


def test_what_a_process_did_before_does_not_count() -> None:
    with running("-c", BUSY, "0", "0.4") as process:
        go(process)
        assert line(process) == b"done"
        with Sampler({"busy": lambda: [process.pid]}, shares_of=()) as watching:
            pass
        usage = watching.usage("busy")
    assert usage.cpu_s < 0.2
    assert usage.pss_peak == 0  # not asked for


def test_a_group_is_a_root_and_its_descendants() -> None:
    with running("-c", PARENT, BUSY, "0", "0.3") as parent:
        child = int(line(parent))
        assert set(descendants([parent.pid])) == {parent.pid, child}
        with Sampler({"both": lambda: [parent.pid]}, shares_of=()) as watching:
            go(parent)  # the child has inherited its standard input
            assert line(parent) == b"done"
        usage = watching.usage("both")
        go(parent)
        assert parent.wait(timeout=10) == 0
    assert {process.pid for process in usage.processes} == {parent.pid, child}
    assert usage.cpu_s >= 0.3 - 2 / os.sysconf("SC_CLK_TCK")
    document = usage.document()
    assert document["rss_peak"] == usage.rss_peak


def test_a_process_that_starts_late_counts_from_its_start_and_keeps_counting_when_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.02)
    pids: list[int] = []
    with Sampler({"late": lambda: pids}, shares_of=()) as watching:
        with running("-c", BUSY, "0", "0.5") as process:
            pids.append(process.pid)
            go(process)
            assert line(process) == b"done"
        process.wait(timeout=10)
    assert watching.usage("late").cpu_s >= 0.2  # up to the last look before its end


def test_a_process_that_is_not_there_is_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait(timeout=10)
    with Sampler({"none": lambda: [gone.pid]}, shares_of={"none"}) as watching:
        pass
    assert watching.usage("none").processes == []
    assert watching.others_cpu_s >= 0


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/x/bin/python3", "-S", "-E", "/y/readers.py", "random", "/z"], "readers.py random"),
        (["/x/bin/python", "-m", "manta.worker", "fetch", "13"], "manta.worker fetch"),
        (["/usr/bin/curl", "--silent", "http://x"], "curl"),
        (["/x/bin/python", "-S", "/z/manta/keeper.py", "daemon", "--cache-dir", "/c"], "keeper"),
        (["python"], ""),
        ([], ""),
    ],
)
def test_the_role_is_what_tells_processes_apart(words: list[str], shown: str) -> None:
    assert role(words) == shown
