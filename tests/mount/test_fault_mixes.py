"""Random combinations of faults, by seed: readers of every kind compare every byte, and get the right ones or an errno.

Six seeds; MANTA_FAULT_SEEDS=N in the environment runs N. All run side by side on one node, each on files of its own.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from manta.testing.hub import Generated, GeneratedContent, HubProcess, HubSpec, RepoSpec, faults
from tests.mount.node import Node
from tests.soak import reader
from tests.soak.weather import ACTIONS

SEEDS = range(int(os.environ.get("MANTA_FAULT_SEEDS", "6")))
FILES = {"weights.bin": (17 << 20) + 4321, "small.bin": 700_001}

RULES = 4
"""Faults in force at a time."""

ERRORS = {"", "EIO", "EACCES", "ENOENT", "SIGBUS"}
"""SIGBUS is how a mapped file tells EIO."""

BOUND_S = 120
"""No reader takes longer: it stops at its first error, and each read that fails takes twice its patience."""

LOUD = [(a, c) for a, c in ACTIONS if "repo" not in c and not isinstance(a, faults.Drip | faults.Delay)]
"""Without those that only the digest of the whole can tell (`test_faults` has them), and without those that only take time."""


def repo(seed: int) -> str:
    return f"mix/seed-{seed}"


def read(path: Path, kind: str, truth: Path, seed: str) -> dict[str, Any]:
    command = [sys.executable, "-S", "-E", "-P", reader.__file__, kind, str(path), str(truth), seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    if done.returncode:
        return {"error": "SIGBUS" if done.returncode == -7 else done.stderr, "wrong": [], "compared": 0, "state": ""}
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_random_combinations(tmp_path: Path) -> None:
    files: dict[int, dict[str, Any]] = {}
    for seed in SEEDS:
        files[seed] = {name: Generated(f"{repo(seed)}/{name}", size) for name, size in FILES.items()}
        for name, spec in files[seed].items():
            with (tmp_path / f"{seed}-{name}").open("wb") as truth:
                truth.writelines(GeneratedContent(spec.seed, spec.size).pieces())
    spec = HubSpec(repos=[RepoSpec(id=repo(seed), files=files[seed]) for seed in SEEDS])
    settings = {
        "MANTA_FETCH_STALL_S": "1",
        "MANTA_FETCH_READ_TIMEOUT_S": "5",
        "MANTA_FETCH_CONNECTIONS": "16",
        "MANTA_FETCH_FILL": "false",
    }
    with HubProcess(spec) as hub, Node(hub.endpoint, settings) as node, ThreadPoolExecutor(64) as pool:
        directories = {seed: node.mount(repo(seed)) for seed in SEEDS}
        for seed in SEEDS:
            rng = random.Random(seed)
            for action, conditions in rng.sample(LOUD, RULES):
                share, draw = rng.choice([0.05, 0.2, 0.6]), rng.randrange(1 << 30)
                hub.add_fault(action, **conditions, repo=repo(seed), probability=share, seed=draw)
        readers = {
            (seed, name, kind): pool.submit(
                read, directories[seed] / name, kind, tmp_path / f"{seed}-{name}", f"{seed}{name}{kind}"
            )
            for seed in SEEDS
            for name in FILES
            for kind in reader.KINDS
        }
        prefetches = [pool.submit(node.manta, "prefetch", repo(seed), code=None) for seed in SEEDS]
        seen = {which: future.result() for which, future in readers.items()}
        ended = [prefetch.result() for prefetch in prefetches]
        assert not {which: each["wrong"] for which, each in seen.items() if each["wrong"]}
        assert {each["error"] for each in seen.values()} <= ERRORS, seen
        assert sum(each["compared"] for each in seen.values()) > 0
        assert all("Traceback" not in done.stderr for done in ended)
        # The hub is well again: so is every file, at once or when the node's pause is over.
        hub.clear_faults()
        for seed in SEEDS:
            deadline = time.monotonic() + 60
            while (done := node.manta("prefetch", repo(seed), code=None)).returncode:
                assert time.monotonic() < deadline, done.stderr
            for name in FILES:
                path = directories[seed] / name
                again = read(path, "sequential", tmp_path / f"{seed}-{name}", "again")
                assert (again["error"], again["wrong"], again["state"]) == ("", [], "sealed")
        assert hub.stats().violations == []
