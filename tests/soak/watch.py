"""Looks at the node from outside while the soak runs: memory, descriptors, stuck processes, and what its log complains of."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.mount.node import Node
from tests.soak.slots import Tally

LOOK_S = 2.0

STUCK_LOOKS = 10
"""Looks in a row in which one process may be in uninterruptible sleep: a slow disk holds one for seconds, a deadlock for good."""

DAEMON_RSS_MAX = 400_000_000
DAEMON_FDS_MAX = 400
KEEPER_RSS_MAX = 40_000_000

_COMPLAINT = re.compile(r"Traceback|unforeseen|ERROR|CRITICAL|never retrieved|RuntimeWarning|Exception ignored")

EXPECTED = re.compile(r"its bytes have the digest|was silent for|did not start in")
"""Complaints that the weather is to blame for: altered bytes, frozen workers."""


@dataclass
class Watch:
    """Call `run` in a thread."""

    node: Node
    tally: Tally
    rss_max: Counter[str] = field(default_factory=Counter)
    fds_max: Counter[str] = field(default_factory=Counter)
    daemons: set[int] = field(default_factory=set)
    _stuck: Counter[int] = field(default_factory=Counter)
    _read: dict[Path, int] = field(default_factory=dict)

    def run(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        daemons, keepers = set(self.node.daemons()), set(self.node.keepers())
        self.daemons |= daemons
        stuck: Counter[int] = Counter()
        for pid in self.node.processes():
            role = "daemon" if pid in daemons else "keeper" if pid in keepers else "worker"
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                fds = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            except OSError:
                continue  # it has ended
            rss = re.search(r"VmRSS:\s+(\d+) kB", status)
            self.rss_max[role] = max(self.rss_max[role], int(rss[1]) * 1024 if rss else 0)
            self.fds_max[role] = max(self.fds_max[role], fds)
            if re.search(r"State:\s+D", status):
                stuck[pid] = self._stuck[pid] + 1
                if stuck[pid] == STUCK_LOOKS:
                    self.tally.find(f"process {pid} ({role}) is in D state for {STUCK_LOOKS * LOOK_S:.0f} s")
        self._stuck = stuck
        self._look_at_logs()

    def conclude(self) -> None:
        """Says what is more than it should be."""
        self.look()
        if self.rss_max["daemon"] > DAEMON_RSS_MAX:
            self.tally.find(f"the daemon had {self.rss_max['daemon'] / 1e6:.0f} MB of memory")
        if self.rss_max["keeper"] > KEEPER_RSS_MAX:
            self.tally.find(f"the keeper had {self.rss_max['keeper'] / 1e6:.0f} MB of memory")
        if self.fds_max["daemon"] > DAEMON_FDS_MAX:
            self.tally.find(f"the daemon had {self.fds_max['daemon']} descriptors open")

    def _look_at_logs(self) -> None:
        for log in (self.node.path / "run").glob("*/daemon.log*"):
            # It is moved aside when it is large: what is shorter than it was is another file.
            size = log.stat().st_size
            at = self._read.get(log, 0)
            with log.open(errors="replace") as lines:
                lines.seek(at if at <= size else 0)
                for line in lines:
                    if _COMPLAINT.search(line) and not EXPECTED.search(line):
                        self.tally.find(f"log ({time.strftime('%H:%M:%S')}): {line.strip()[:300]}")
                self._read[log] = lines.tell() if lines.seekable() else size
