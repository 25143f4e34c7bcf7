"""`python -m tests.soak --minutes 20 --seed 7`: prints a line each minute and a summary; exit code 1 where anything was found."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manta.testing.hub import HubProcess
from tests.mount.node import SESSION, SESSIONS, Node, needs_fuse
from tests.soak.content import Truth, spec
from tests.soak.slots import Slot, Tally, commits_of
from tests.soak.watch import Watch
from tests.soak.weather import Weather

SLOTS = 3
CACHE_SIZE = "230MB"
"""Little more than half of what the hub holds, so that what is not mounted goes; and room for what the three mounts show and one that is
just ending: what is mounted is never evicted, and readers of more than fits get ENOSPC."""

FINDINGS_SHOWN = 40


class Soak:
    """Everything that runs. `scratch` is where the true bytes and the cache go."""

    def __init__(self, hub: HubProcess, node: Node, truth: Truth, seed: int) -> None:
        self.tally = Tally()
        self.weather = Weather(hub, node, seed)
        self.watch = Watch(node, self.tally)
        self._hub = hub
        commits = commits_of(hub.files)
        self._slots = [
            Slot(number, seed, node, truth, self.weather.almanac, self.tally, commits) for number in range(SLOTS)
        ]
        self.began = time.monotonic()

    @contextmanager
    def running(self, *, weather: bool = True) -> Iterator[None]:
        """Runs in threads; at the end the hub is well again, and everything is unmounted."""
        stop = threading.Event()
        jobs = [self.watch.run, *(slot.run for slot in self._slots), *([self.weather.run] if weather else [])]
        threads = [threading.Thread(target=self._guarded, args=(job, stop)) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            self.watch.conclude()
            self.tally.findings += self._hub.stats().violations

    def _guarded(self, job: object, stop: threading.Event) -> None:
        assert callable(job)
        try:
            job(stop)
        except Exception as e:
            self.tally.find(f"the soak itself failed: {type(e).__name__}: {e}")
            raise

    def line(self) -> str:
        """How it stands."""
        tally, almanac = self.tally, self.weather.almanac
        weather = "good" if almanac.since is None else "bad"
        return (
            f"{(time.monotonic() - self.began) / 60:5.1f} min, {weather:4} weather: {tally.reads} reads, {tally.compared / 1e9:.2f} GB"
            f" compared, {sum(tally.errors.values())} errors ({tally.excused} excused), {tally.mounts} mounts,"
            f" {len(almanac.kills)} daemon kills, {len(tally.findings)} findings"
        )

    def summary(self) -> str:
        tally, almanac, watch = self.tally, self.weather.almanac, self.watch
        rows = [
            ("bytes compared", f"{tally.compared:,} in {tally.reads} reads"),
            ("wrong bytes", f"{sum('WRONG BYTES' in finding for finding in tally.findings)} reads"),
            ("altered on the way", f"{tally.streamed_wrong} reads, of the repo whose bytes are altered, before it was sealed"),
            ("errors", f"{_counts(tally.errors)}; {tally.excused} of {sum(tally.errors.values())} excused"),
            ("mounts", f"{tally.mounts}, {tally.mounts_refused} refused; {tally.prefetches} prefetches"),
            ("weather", _counts(almanac.counts)),
            ("bad spells", f"{len(almanac.bad)}, {sum(end - start for start, end in almanac.bad):.0f} s"),
            ("daemons", f"{len(watch.daemons)}"),
            ("slowest read", f"{tally.slowest_s:.1f} s"),
            ("peak memory", ", ".join(f"{role} {rss / 1e6:.0f} MB" for role, rss in sorted(watch.rss_max.items()))),
            ("most descriptors", ", ".join(f"{role} {count}" for role, count in sorted(watch.fds_max.items()))),
            ("findings", str(len(tally.findings))),
        ]  # fmt: skip
        lines = [f"{name:18} {text}" for name, text in rows]
        return "\n".join(lines + [f"  {finding}" for finding in tally.findings[:FINDINGS_SHOWN]])


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


@contextmanager
def soak(seed: int, folder: Path, session: str) -> Iterator[Soak]:
    """A soak with its hub and its node, which serves by the FUSE `session`; `folder` must not exist and goes at the end.

    Raises AssertionError where something stays behind.
    """
    folder.mkdir()
    try:
        truth = Truth(folder / "truth")
        settings = {
            SESSION: session,
            "MANTA_CACHE_SIZE": CACHE_SIZE,
            "MANTA_CACHE_FREE_SPACE_FLOOR": "1MB",
            "MANTA_FETCH_STALL_S": "2",
            "MANTA_FETCH_READ_TIMEOUT_S": "8",
            "MANTA_HUB_TIMEOUT_S": "4",
        }
        with HubProcess(spec()) as hub, Node(hub.endpoint, settings) as node:
            yield Soak(hub, node, truth, seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-log", type=Path, metavar="FILE", help="write the daemons' log there at the end")
    parser.add_argument("--fuse", choices=SESSIONS, default=SESSIONS[0], help="the FUSE session; %(default)s")
    options = parser.parse_args(arguments)
    if reason := needs_fuse():
        print(reason, file=sys.stderr)
        return 2
    with soak(options.seed, Path(tempfile.mkdtemp(prefix="manta-soak-")) / "run", options.fuse) as running:
        with running.running():
            over = time.monotonic() + 60 * options.minutes
            while (left := over - time.monotonic()) > 0:
                time.sleep(min(60.0, left))
                print(running.line(), flush=True)
        if options.keep_log:
            options.keep_log.write_text(running.watch.node.log(whole=True))
        print(running.summary(), flush=True)
    return 1 if running.tally.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
