"""Every fault of the test hub against a real mount with real readers: the right bytes, or in bounded time an errno and a sentence.

The cases are in `fault_cases`. They run side by side on one daemon, each with a file of its own, before the first test looks at what came
of them. With MANTA_FAULT_MATRIX=FILE in the environment the table of what was seen is written there (docs/fault-matrix.md).
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from manta.control.client import Client
from manta.testing.hub import (
    CommitSpec,
    FileSpec,
    Generated,
    GeneratedContent,
    HubProcess,
    HubSpec,
    RepoSpec,
    Text,
    UserSpec,
    changes,
)
from manta.testing.hub.routes import Kind
from manta.testing.hub.traffic import LogEntry
from tests.mount import fault_matrix
from tests.mount.fault_cases import (
    CACHED,
    CHANGE_CASES,
    COLD,
    FINE,
    HUB_TIMEOUT_S,
    NODE_CASES,
    NODE_REPO,
    PATIENCE_S,
    READER,
    READER_TOKEN,
    RUNS,
    SIZE,
    STALL_S,
    TWO_CHUNKS,
    UNTIMED,
    Case,
    ChangeCase,
    Mode,
    NodeCase,
    Outcome,
)
from tests.mount.node import Node, needs_fuse, wait_until

pytestmark = pytest.mark.above_fuse  # `test_fault_mixes` has faults by each session

CONFIG = "{}\n"

BOUND_S = 2 * PATIENCE_S + 15
"""No read may take longer. The kernel asks a second time for a page that readahead did not get; the rest is for a loaded machine."""

REQUESTS_MAX = 60
"""For one reader of one file: eleven attempts, each of which may be led in circles five times before it is given up."""

RECOVERY_S = 40.0
"""Within this a file is readable again, once its fault is over."""

MATRIX = Path(__file__).parents[2] / "docs/fault-matrix.md"

PAUSE = "the origin asks for a pause"
"""What the log says when the node has heard of one."""

_NAMES = {os.strerror(number): name for number, name in errno.errorcode.items()}


@dataclass(frozen=True)
class Reading:
    """What one reader got: `digest` of all bytes, or the name of the errno."""

    digest: str
    errno: str
    seconds: float


def read(path: Path) -> Reading:
    """Reads the whole file in a process of its own."""
    began = time.monotonic()
    done = subprocess.run(
        ["sha256sum", str(path)], capture_output=True, text=True, timeout=BOUND_S + 30, check=False, env={"LC_ALL": "C"}
    )
    seconds = time.monotonic() - began
    if done.returncode == 0:
        return Reading(done.stdout.split()[0].removeprefix("\\"), "", seconds)
    return Reading("", _NAMES[done.stderr.strip().rpartition(": ")[2]], seconds)


@dataclass
class Seen:
    """What came of a case: each reading in turn, what `manta status` said of it, and the requests at the hub that it took."""

    truth: str
    readings: list[Reading] = field(default_factory=list)
    sentence: str = ""
    requests: int = 0
    recovery_s: float = 0.0

    @property
    def right(self) -> list[bool]:
        return [reading.digest == self.truth for reading in self.readings]

    def read_until_right(self, path: Path, bound_s: float = RECOVERY_S) -> None:
        began = time.monotonic()
        while not self.right or not self.right[-1]:
            if self.readings:
                time.sleep(0.2)
            self.readings.append(read(path))
            self.recovery_s = time.monotonic() - began
            if self.recovery_s > bound_s:
                return


class Ear:
    """Asks for `manta status` again and again and keeps every sentence in it: a person may look at any time."""

    def __init__(self, node: Node) -> None:
        self.sentences: dict[str, None] = {}
        [socket] = (node.path / "run").glob("*/control.sock")
        self._client = Client(socket)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Ear:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _listen(self) -> None:
        last = False
        while not last:
            last = self._done.wait(0.1)
            status = self._client.status()
            for sentences in (status.errors, *(mount.errors for mount in status.mounts)):
                self.sentences |= dict.fromkeys(sentences)

    def about(self, *names: str) -> str:
        """The last sentence that has all of `names` in it; "" for none."""
        return next((s for s in reversed(self.sentences) if all(name in s for name in names)), "")


def content(repo: str, path: str) -> Generated:
    return Generated(f"{repo}/{path}", TWO_CHUNKS if path in _LARGE else SIZE)


_LARGE = {case.path(mode) for case, mode in RUNS if case.size == TWO_CHUNKS}


def true_digest(repo: str, path: str) -> str:
    if path == "config.json":
        return hashlib.sha256(CONFIG.encode()).hexdigest()
    spec, digest = content(repo, path), hashlib.sha256()
    for piece in GeneratedContent(spec.seed, spec.size).pieces():
        digest.update(piece)
    return digest.hexdigest()


def _spec() -> HubSpec:
    files: dict[str, dict[str, FileSpec]] = {}
    for case, mode in RUNS:
        repo, path = case.repo(mode), case.path(mode)
        files.setdefault(repo, {})[path] = Text(CONFIG) if path == "config.json" else content(repo, path)
    for node_case in (*NODE_CASES, UNTIMED):
        for path in (node_case.path, *neighbours(node_case)):
            files.setdefault(NODE_REPO, {})[path] = content(NODE_REPO, path)
    repos = [RepoSpec(id=repo, files=each) for repo, each in files.items()]
    for change in CHANGE_CASES:
        first = CommitSpec(name="first", files={path: content(change.repo, path) for path in (CACHED, COLD)})
        second = CommitSpec(name="second", base="first", files={"config.json": Text(CONFIG)}, removed=[COLD])
        private = isinstance(change.change, changes.RevokeAccess)
        repos.append(RepoSpec(id=change.repo, commits=[first, second], branches={"main": "first"}, private=private))
    access = [change.repo for change in CHANGE_CASES if isinstance(change.change, changes.RevokeAccess)]
    return HubSpec(repos=repos, users=[UserSpec(name=READER, token=READER_TOKEN, access=access)])


def neighbours(case: NodeCase) -> list[str]:
    """Files that nobody else reads and that are wanted while the node pauses."""
    return [f"beside-{number}-{case.path}" for number in range(3)]


@pytest.fixture(scope="module")
def faulty_hub() -> Iterator[HubProcess]:
    with HubProcess(_spec()) as hub:
        yield hub


def faulty_node(hub: HubProcess) -> Node:
    return Node(
        hub.endpoint,
        {
            "MANTA_FETCH_READ_TIMEOUT_S": str(PATIENCE_S),
            "MANTA_FETCH_STALL_S": str(STALL_S),
            "MANTA_HUB_TIMEOUT_S": str(HUB_TIMEOUT_S),
            "MANTA_FETCH_CONNECTIONS": "64",
            "MANTA_FETCH_WORKERS": "1",
            "MANTA_DAEMON_LOG_LEVEL": "debug",  # where records that repeat are not limited: here all goes wrong at once
        },
    )


@dataclass
class Results:
    """What came of every case."""

    cases: dict[tuple[Case, Mode], Seen] = field(default_factory=dict)
    nodes: dict[NodeCase, Seen] = field(default_factory=dict)
    changes: dict[ChangeCase, Seen] = field(default_factory=dict)
    during_pause: dict[NodeCase, list[LogEntry]] = field(default_factory=dict)
    log: str = ""
    violations: Sequence[str] = ()


@pytest.fixture(scope="module")
def results(faulty_hub: HubProcess) -> Results:
    """Runs everything, and writes the matrix where it was asked for."""
    if reason := needs_fuse():
        pytest.skip(reason)
    results = Results()
    with faulty_node(faulty_hub) as node, faulty_node(faulty_hub) as other, ThreadPoolExecutor() as pool:
        untimed = pool.submit(_run_node_case, faulty_hub, other, other.mount(NODE_REPO), UNTIMED, results)
        _run_cases(faulty_hub, node, results)
        untimed.result()
        directory = node.mount(NODE_REPO)
        for case in NODE_CASES:
            _run_node_case(faulty_hub, node, directory, case, results)
        _run_changes(faulty_hub, node, results)
        results.log = "".join(path.read_text() for path in (node.path / "run").glob("*/daemon.log"))
        results.violations = faulty_hub.stats().violations
    if target := os.environ.get("MANTA_FAULT_MATRIX"):
        Path(target).write_text(
            fault_matrix.document(_rows(results), stall_s=STALL_S, patience_s=PATIENCE_S, hub_s=HUB_TIMEOUT_S)
        )
    return results


def _run_cases(hub: HubProcess, node: Node, results: Results) -> None:
    whole_hub = node.mount()
    directories: dict[str, Path] = {}
    for case, mode in RUNS:
        repo = case.repo(mode)
        if repo not in directories:
            directories[repo] = whole_hub / repo if case.where == "metadata" else node.mount(repo)
        results.cases[case, mode] = Seen(true_digest(repo, case.path(mode)))
        hub.add_fault(case.action, **case.rule(mode))

    def run(case: Case, mode: Mode) -> None:
        seen, path = results.cases[case, mode], directories[case.repo(mode)] / case.path(mode)
        if mode == "once":
            seen.read_until_right(path)
            return
        seen.readings.append(read(path))
        while not case.strict and not seen.readings[-1].errno and len(seen.readings) < 100:
            time.sleep(0.1)  # what streams before the digest is known
            seen.readings.append(read(path))
        seen.recovery_s = seen.readings[-1].seconds

    with Ear(node) as ear, ThreadPoolExecutor(len(results.cases)) as pool:
        for done in [pool.submit(run, case, mode) for case, mode in results.cases]:
            done.result()
    log = hub.log()
    for (case, mode), seen in results.cases.items():
        repo, path = case.repo(mode), case.path(mode)
        seen.sentence = ear.about(repo) if case.where == "metadata" else ear.about(repo, path)
        if case.always.words == "private" and not seen.sentence:
            seen.sentence = ear.about(f"{repo} does not exist")  # what a hub says without a word on the file
        seen.requests = sum(e.repo == repo and (case.where == "metadata" or e.file == path) for e in log)
    hub.clear_faults()


def _run_node_case(hub: HubProcess, node: Node, directory: Path, case: NodeCase, results: Results) -> None:
    """One file is struck; others are read from then on, and nobody may ask the hub while the node pauses."""
    seen = results.nodes[case] = Seen(true_digest(NODE_REPO, case.path))
    place = {"origin": "hub", "kind": "resolve"} if case.where == "location" else {"origin": "cdn"}
    hub.add_fault(case.action, file=case.path, times=1, **place)
    after = max((entry.number for entry in hub.log()), default=0)
    pauses = node.log(whole=True).count(PAUSE)
    with Ear(node) as ear, ThreadPoolExecutor() as pool:
        struck = pool.submit(seen.read_until_right, directory / case.path)
        kind: Kind = "resolve" if case.where == "location" else "blob"
        [entry] = hub.wait_for(kind=kind, file=case.path, finished=True, after=after)[:1]
        if case.pause_s:
            wait_until(lambda: node.log(whole=True).count(PAUSE) > pauses)
        known = time.time()
        beside = [pool.submit(read, directory / path) for path in neighbours(case)]
        struck.result()
        for path, done in zip(neighbours(case), beside, strict=True):
            if not case.first.errno:
                assert done.result().digest == true_digest(NODE_REPO, path), (case.name, path)
    seen.sentence = ear.about(f"/{case.path}")
    ours = [e for e in hub.log(after) if e.file in (case.path, *neighbours(case))]
    over = entry.started + entry.duration_s
    # Nothing where the node has heard of it so late that it is over: a loaded machine proves nothing.
    paused = [
        e for e in ours if e.origin == entry.origin
    ]  # a pause of the CDN's does not keep files from learning where they are
    results.during_pause[case] = [e for e in paused if known < e.started < over + case.pause_s]
    seen.requests = sum(e.file == case.path for e in ours)


def _run_changes(hub: HubProcess, node: Node, results: Results) -> None:
    whole_hub = node.directory()
    node.manta("mount", str(whole_hub), token=READER_TOKEN)
    for case in CHANGE_CASES:
        assert read(whole_hub / case.repo / CACHED).digest == true_digest(case.repo, CACHED)
        hub.apply(case.change)

    def run(case: ChangeCase) -> None:
        seen = results.changes[case] = Seen(true_digest(case.repo, COLD))
        assert read(whole_hub / case.repo / CACHED).digest == true_digest(case.repo, CACHED), case.name
        seen.readings.append(read(whole_hub / case.repo / COLD))
        hub.apply(case.undo)
        seen.read_until_right(whole_hub / case.repo / COLD)

    after = max(entry.number for entry in hub.log())
    with Ear(node) as ear, ThreadPoolExecutor(len(CHANGE_CASES)) as pool:
        for done in [pool.submit(run, case) for case in CHANGE_CASES]:
            done.result()
    for case, seen in results.changes.items():
        seen.sentence = ear.about(case.repo)
        seen.requests = sum(e.file == COLD and e.repo.startswith(case.repo) for e in hub.log(after))


def _rows(results: Results) -> list[fault_matrix.Row]:
    def row(where: str, fault: str, mode: str, seen: Seen) -> fault_matrix.Row:
        saw = [
            reading.errno or ("the right bytes" if right else "wrong bytes while they streamed")
            for reading, right in zip(seen.readings, seen.right, strict=True)
        ]
        return fault_matrix.Row(where, fault, mode, saw, seen.sentence, seen.recovery_s, seen.requests)

    return [
        *(row(case.where, case.name, mode, seen) for (case, mode), seen in results.cases.items()),
        *(row(case.where, case.name, "once", seen) for case, seen in results.nodes.items()),
        *(row("repo", case.name, "undone later", seen) for case, seen in results.changes.items()),
    ]


# What must come of it -----------------------------------------------------------------------------------------------------------


def assert_as_told(outcome: Outcome, reading: Reading, seen: Seen, log: str) -> None:
    """That a reader saw what it should, and that a person can find out why."""
    assert reading.seconds < BOUND_S
    assert reading.errno == outcome.errno, seen
    if outcome.words:
        assert re.search(outcome.words, seen.sentence), seen.sentence
        assert seen.sentence.rstrip().endswith("."), seen.sentence
        assert seen.sentence in log
    if not outcome.errno:
        assert reading.digest == seen.truth


@pytest.mark.parametrize(("case", "mode"), [pytest.param(c, m, id=f"{c.where}: {c.name}, {m}") for c, m in RUNS])
def test_each_fault_alone(results: Results, case: Case, mode: Mode) -> None:
    seen = results.cases[case, mode]
    outcome = case.once if mode == "once" else case.always
    if case.strict:
        assert not any(r.digest and not right for r, right in zip(seen.readings, seen.right, strict=True)), (
            "wrong bytes"
        )
        # Struck once, the fault may be over before the kernel asks the second time for a page that failed.
        told = FINE if mode == "once" and seen.right[0] else outcome
        assert_as_told(told, seen.readings[0], seen, results.log)
    if mode == "once":
        assert seen.right[-1], seen
    elif not case.strict:
        assert_as_told(outcome, seen.readings[-1], seen, results.log)
    assert seen.requests <= REQUESTS_MAX, "asking is bounded"


@pytest.mark.parametrize("case", [*NODE_CASES, UNTIMED], ids=lambda case: f"{case.where}: {case.name}")
def test_faults_of_the_whole_node(results: Results, case: NodeCase) -> None:
    seen = results.nodes[case]
    assert seen.readings[0].errno == case.first.errno, seen
    assert seen.right[-1]
    assert results.during_pause[case] == [], "the origin asked for a pause, and every file must keep to it"
    assert seen.requests <= 20


@pytest.mark.parametrize("case", CHANGE_CASES, ids=lambda case: case.name)
def test_a_repo_that_changes_under_a_mount(results: Results, case: ChangeCase) -> None:
    seen = results.changes[case]
    assert_as_told(case.fetch, seen.readings[0], seen, results.log)
    assert seen.right[-1], seen


def test_the_matrix_in_the_docs_has_these_cases() -> None:
    """Its rows, not its figures: those are what one run saw."""
    rows = [
        *((case.where, case.name, mode) for case, mode in RUNS),
        *((case.where, case.name, "once") for case in (*NODE_CASES, UNTIMED)),
        *(("repo", case.name, "undone later") for case in CHANGE_CASES),
    ]
    assert sorted(fault_matrix.keys(MATRIX.read_text())) == sorted(rows), "write it anew; its head says how"


def test_no_token_went_astray(results: Results) -> None:
    assert not results.violations
    assert READER_TOKEN not in results.log
