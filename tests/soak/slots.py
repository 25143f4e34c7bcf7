"""Mounts that come and go, each with readers that come and go, here and only here. One thread per slot, one per reader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mount.node import Node
from tests.soak import reader
from tests.soak.content import FLIPPED, MOVING, REPOS, File, Truth, files
from tests.soak.weather import LOST, Almanac

READERS = 3
"""Per slot."""

STAY_S = (10.0, 50.0)
"""How long a mount stays."""

READ_SECONDS_MAX = 120.0
"""A reader that has not ended by then hangs: its file needs 2 s, and each of its reads has a deadline of 10 s."""

GONE = {"ENOTCONN", "ECONNABORTED", "ENOENT", "ESTALE", "EIO", "ENODATA"}
"""What readers of a mount see whose daemon was killed, where no keeper has it."""


@dataclass
class Tally:
    """What the readers and mounts of all slots came to. Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    reads: int = 0
    compared: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    excused: int = 0
    mounts: int = 0
    mounts_refused: int = 0
    prefetches: int = 0
    slowest_s: float = 0.0
    streamed_wrong: int = 0
    """Readers that were given altered bytes before these could be known to be wrong: the file was not sealed when they began."""
    findings: list[str] = field(default_factory=list)
    """What must not be, a line each."""

    def find(self, text: str) -> None:
        with self.lock:
            self.findings.append(text)
            print(f"  found: {text}", flush=True)


class Slot:
    """A place for one mount after another."""

    def __init__(
        self, number: int, seed: int, node: Node, truth: Truth, almanac: Almanac, tally: Tally, commits: dict[str, str]
    ) -> None:
        self._number = number
        self._random = random.Random(f"{seed}/{number}")
        self._node = node
        self._truth = truth
        self._almanac = almanac
        self._tally = tally
        self._commits = commits  # sha -> the name of the commit of a moving repo

    def run(self, stop: threading.Event) -> None:
        """Mounts, reads, unmounts, until told to stop."""
        while not stop.is_set():
            repo = self._random.choice(REPOS)
            directory = self._node.directory()
            commit = self._mount(repo, directory)
            if commit is None:
                stop.wait(0.5)
                continue
            leaving = threading.Event()
            readers = [
                threading.Thread(target=self._read_on, args=(repo, commit, directory, leaving, self._random.random()))
                for _ in range(READERS)
            ]
            for thread in readers:
                thread.start()
            over = time.monotonic() + self._random.uniform(*STAY_S)
            while time.monotonic() < over and not stop.is_set() and not leaving.is_set():
                if self._random.random() < 0.1:
                    self._prefetch(repo)
                stop.wait(1.0)
            lazily = self._random.random() < 0.2
            leaving.set()
            if lazily:
                self._unmount(directory, "--lazy")  # readers are in the middle of it
            for thread in readers:
                thread.join()
            if not lazily:
                self._unmount(directory)

    def _mount(self, repo: str, directory: Path) -> str | None:
        """The commit's name; None where it was refused."""
        began = time.monotonic()
        done = self._node.manta("mount", repo, str(directory), "--json", code=None, timeout_s=120)
        with self._tally.lock:
            self._tally.mounts += 1
            self._tally.mounts_refused += done.returncode != 0
        if done.returncode:
            if not self._almanac.excuses(began, time.monotonic()):
                self._tally.find(f"mount of {repo} refused in good weather: {done.stdout.strip()}")
            return None
        return self._commits.get(json.loads(done.stdout)["commit"], "first")

    def _unmount(self, directory: Path, *options: str) -> None:
        began = time.monotonic()
        done = self._node.manta("umount", *options, str(directory), code=None, timeout_s=60)
        if done.returncode and not self._almanac.excuses(began, time.monotonic()):
            self._tally.find(f"umount of {directory} refused in good weather: {done.stderr.strip()}")
            subprocess.run(["umount", "-l", str(directory)], check=False, capture_output=True)
        elif done.returncode:
            subprocess.run(["umount", "-l", str(directory)], check=False, capture_output=True)

    def _prefetch(self, repo: str) -> None:
        """As a person does it; whether it works is the weather's business, and that it ends is ours."""
        began = time.monotonic()
        done = self._node.manta("prefetch", repo, code=None, timeout_s=READ_SECONDS_MAX)
        with self._tally.lock:
            self._tally.prefetches += 1
        if done.returncode and not self._almanac.excuses(began, time.monotonic()):
            self._tally.find(f"prefetch of {repo} failed in good weather: {done.stderr.strip()}")

    def _read_on(self, repo: str, commit: str, directory: Path, leaving: threading.Event, seed: float) -> None:
        rng = random.Random(seed)
        choices = list(files(repo, commit))
        while not leaving.is_set():
            file, kind = rng.choice(choices), rng.choice(reader.KINDS)
            self._read(repo, file, directory / file.path, kind, rng.randrange(1 << 30), leaving)
            leaving.wait(rng.choice([0.0, 0.0, 0.5]))

    def _read(self, repo: str, file: File, path: Path, kind: str, seed: int, leaving: threading.Event) -> None:
        what = f"{kind} read of {repo}/{file.path}"
        began = time.monotonic()
        command = [
            sys.executable,
            "-S",
            "-E",
            "-P",
            reader.__file__,
            kind,
            str(path),
            str(self._truth.of(file)),
            str(seed),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=READ_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            self._tally.find(f"{what} did not end in {READ_SECONDS_MAX:.0f} s")
            return
        ended = time.monotonic()
        seen: dict[str, Any] = json.loads(output) if process.returncode == 0 else {}
        error = seen.get("error") or ("" if seen else "SIGBUS" if process.returncode == -7 else errors.strip()[-200:])
        lost = error in LOST and self._node.survives
        excused = leaving.is_set() or (self._almanac.excuses(began, ended) and not lost)
        tally = self._tally
        with tally.lock:
            tally.reads += 1
            tally.compared += seen.get("compared", 0)
            tally.slowest_s = max(tally.slowest_s, seen.get("slowest_s", 0.0))
            if error:
                tally.errors[error] += 1
                tally.excused += excused
        if error and not excused:
            tally.find(f"{what}: {error} {'whatever the weather' if lost else 'in good weather'}")
        if seen.get("wrong"):
            if repo == FLIPPED and seen["state"] != "sealed":
                with tally.lock:
                    tally.streamed_wrong += 1
            else:
                tally.find(f"{what}: WRONG BYTES at {seen['wrong']} ({seen['state']} when it began)")
        if error in GONE and not self._node.survives and not path.parent.is_mount():
            leaving.set()  # the daemon was killed: this mount is no more


def commits_of(hub_files: Callable[[str, str], Any]) -> dict[str, str]:
    """The names of the moving repos' commits, by sha."""
    return {hub_files(repo, name).commit: name for repo in MOVING for name in ("first", "second")}
