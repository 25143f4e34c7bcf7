"""CPU time and memory of groups of processes while something runs, here and only here. Used by `benchmarks.rig`.

A thread reads /proc at `INTERVAL_S`. A group is what its roots (asked for anew each time, so that workers which start late count) and
their descendants are. A process that ends between two looks counts up to the last one. Two measures of memory: the sum of the peaks
that the kernel kept of each process (VmHWM: exact, yet counts shared pages once per process and adds peaks of different moments), and
the peak of the sums of proportional shares (PSS: shares counted once, yet only as often as looked).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL_S = 0.2
"""Five looks a second: a peak that lasts as long as a chunk on a 1 Gbit/s link (67 ms) three times over is seen."""

SHARE_MAX = 0.05
"""The sampler rests long enough to take at most this share of one core: reading smaps_rollup costs in proportion to what is mapped."""

JOIN_TIMEOUT_S = 10

KEEPER = "keeper.py"
"""The file that keepers run: they are named by it, whatever their arguments."""

_TICKS = os.sysconf("SC_CLK_TCK")

Roots = Callable[[], Iterable[int]]


@dataclass(slots=True)
class ProcessUsage:
    pid: int
    role: str
    """The command line, shortened: what the process is."""
    cpu_s: float
    """User and system time since the sampler first looked (all of it for a process that started later)."""
    rss_peak: int
    """VmHWM: bytes, since the process started."""


@dataclass(slots=True)
class GroupUsage:
    processes: list[ProcessUsage] = field(default_factory=list)
    pss_peak: int = 0
    """Bytes: the largest sum seen at one time; 0 where nobody wanted it."""

    @property
    def cpu_s(self) -> float:
        return sum(process.cpu_s for process in self.processes)

    @property
    def rss_peak(self) -> int:
        """Bytes: the sum of every process's own peak."""
        return sum(process.rss_peak for process in self.processes)

    def document(self) -> dict[str, object]:
        return {
            "cpu_s": round(self.cpu_s, 3),
            "rss_peak": self.rss_peak,
            "pss_peak": self.pss_peak,
            "processes": [
                {"pid": each.pid, "role": each.role, "cpu_s": round(each.cpu_s, 3), "rss_peak": each.rss_peak}
                for each in self.processes
            ],
        }


class Sampler:
    """Samples from `with` on until its end, where it takes a last look; so the processes should still be there then."""

    def __init__(self, groups: Mapping[str, Roots], *, shares_of: Collection[str]) -> None:
        """`shares_of`: the groups whose PSS is wanted. Finding it walks all that a process maps, which a large mmap's reader feels."""
        self._groups = groups
        self._shares_of = shares_of
        self._base: dict[tuple[int, int], float] = {}
        self._seen: dict[str, dict[tuple[int, int], ProcessUsage]] = {name: {} for name in groups}
        self._pss: dict[str, int] = dict.fromkeys(groups, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._machine_base = self._machine_end = 0.0

    def __enter__(self) -> Self:
        self._machine_base = _machine_busy_s()
        self._look(first=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(JOIN_TIMEOUT_S)
        self._look()
        self._machine_end = _machine_busy_s()

    def usage(self, group: str) -> GroupUsage:
        return GroupUsage(list(self._seen[group].values()), self._pss[group])

    @property
    def others_cpu_s(self) -> float:
        """CPU time that the rest of the machine took meanwhile, the sampler and the kernel's own threads included: how noisy it was."""
        ours = sum(self.usage(name).cpu_s for name in self._groups)
        return max(0.0, self._machine_end - self._machine_base - ours)

    def _run(self) -> None:
        rest_s = INTERVAL_S
        while not self._stop.wait(rest_s):
            began = time.monotonic()
            self._look()
            rest_s = max(INTERVAL_S, (time.monotonic() - began) / SHARE_MAX)

    def _look(self, *, first: bool = False) -> None:
        for name, roots in self._groups.items():
            shares = 0
            for pid in descendants(roots()):
                found = _read(pid, share=name in self._shares_of)
                if found is None:
                    continue  # it ended meanwhile
                key, cpu_s, rss_peak, pss = found
                if first:
                    self._base[key] = cpu_s
                known = self._seen[name].get(key)
                # A process that was seen on its way into exec had no command line yet.
                what = (known.role if known else "") or role(command_line(pid))
                self._seen[name][key] = ProcessUsage(pid, what, cpu_s - self._base.get(key, 0.0), rss_peak)
                shares += pss
            self._pss[name] = max(self._pss[name], shares)


def descendants(roots: Iterable[int]) -> list[int]:
    """The roots and all processes below them, each once."""
    found: dict[int, None] = {}
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid in found:
            continue
        found[pid] = None
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            for task in tasks:
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process or one of its threads has just ended; its children were adopted or are gone too
    return list(found)


def _read(pid: int, *, share: bool) -> tuple[tuple[int, int], float, int, int] | None:
    """(identity, CPU seconds, VmHWM, PSS) of a process, sizes in bytes; None where it is gone or a zombie, which has no memory."""
    folder = Path(f"/proc/{pid}")
    try:
        stat = (folder / "stat").read_text().rpartition(")")[2].split()
        rss_peak = _kib(folder / "status", "VmHWM:")
        pss = _kib(folder / "smaps_rollup", "Pss:") if share else 0
    except (FileNotFoundError, ProcessLookupError):
        return None
    if rss_peak is None or pss is None:
        return None
    return (pid, int(stat[19])), (int(stat[11]) + int(stat[12])) / _TICKS, rss_peak, pss


def _kib(path: Path, name: str) -> int | None:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def role(words: Sequence[str]) -> str:
    """A command line less the interpreter, flags and folders: "manta.worker fetch" of "/x/python -S -m manta.worker fetch 13"."""
    if words and "python" in Path(words[0]).name:
        words = list(dropwhile(lambda word: word.startswith("-") and word != "-c", words[1:]))
    if not words:
        return ""
    if Path(words[0]).name == KEEPER:
        return "keeper"
    kept = [Path(words[0]).name, *(word for word in words[1:2] if words[0] == "-c" or not word.startswith("-"))]
    return " ".join(" ".join(kept).split())[:80]


def command_line(pid: int) -> list[str]:
    """Empty where there is no such process, and of a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def machine_times() -> tuple[float, float]:
    """Seconds of all cores together since boot: idle, and all. Waiting for a disk is idle; what the host gave to others is not."""
    with Path("/proc/stat").open() as lines:
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(int, lines.readline().split()[1:])
    return (idle + iowait) / _TICKS, (user + nice + system + idle + iowait + irq + softirq + steal) / _TICKS


def _machine_busy_s() -> float:
    """CPU seconds that all cores have worked since boot."""
    with Path("/proc/stat").open() as lines:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = (int(word) for word in lines.readline().split()[1:])
    return (user + nice + system + irq + softirq) / _TICKS
