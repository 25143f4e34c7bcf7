"""The daemon is killed at random moments of a load: nothing that was finished is fetched again, and no byte is ever wrong.

Where a keeper has the filesystem, the readers are the same from the first kill to the last, and see no error.

MANTA_TEST_KILLS=50 makes it fifty kills; MANTA_TEST_SEED another run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from contextlib import ExitStack

from manta.cache.store import Store
from manta.control.binding import mounts, unbind
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import parse_blob_id
from manta.testing.hub import Generated, HubProcess, HubSpec, RepoSpec
from tests.mount.node import Node, background, run, wait_for_end, wait_until

KILLS = int(os.environ.get("MANTA_TEST_KILLS", "6"))
SEED = int(os.environ.get("MANTA_TEST_SEED", "1"))
REPO, FILE, CONTENT = "manta/load", "weights.bin", "restart"
MIB = 1024 * 1024
SIZE = KILLS * 48 * MIB + 777
BANDWIDTH = 60 * MIB
"""So slow that a life of the daemon is over before the file is, so fast that it finishes a few chunks."""

LIFE_BYTES_MIN, LIFE_BYTES_MAX = 16 * MIB, 40 * MIB
"""What the hub sends before the next kill: enough for two readers at once to finish a chunk, and less than the file has for each."""

GONE = 7
"""The exit code of a reader whose daemon was killed."""

READER = f"""
import os, random, sys
from manta.testing.hub import GeneratedContent
path, content, size, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
truth, places = GeneratedContent(content, size), list(range(0, size, 1 << 20))
if how != "in order":
    random.Random(how).shuffle(places)
try:
    with open(path, "rb", buffering=0) as file:
        for at in places:
            data = os.pread(file.fileno(), 1 << 20, at)
            if data != truth.read(at, at + len(data)) or not data:
                sys.exit(f"wrong bytes at {{at}}")
except OSError as error:
    print(error)  # ENOTCONN, EIO, ECONNABORTED
    sys.exit({GONE})
"""


def recorded(node: Node, blob: str) -> set[int]:
    """The chunks that the dead daemon had finished."""
    with Store(node.cache) as store:
        known = parse_blob_id(blob)
        if store.find(known) is None:
            return set()
        with store.open_blob(known, SIZE) as opened:
            return {chunk for chunk in range(len(opened.grid)) if opened.has(chunk)}


def sent(hub: HubProcess, blob: str, chunk: int) -> int:
    """How often the most-sent byte of a chunk has left the hub."""
    start, end = chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE
    return max((times for at, upto, times in hub.coverage(blob) if at < end and start < upto), default=0)


def conclude(reading: list[subprocess.Popen[str]], allowed: set[int]) -> None:
    for reader in reading:
        out, error = reader.communicate(timeout=60)
        assert reader.returncode in allowed, out + error
    reading.clear()


def test_a_daemon_that_is_killed_again_and_again_loses_nothing_finished() -> None:
    chance = random.Random(SEED)
    spec = HubSpec(repos=[RepoSpec(id=REPO, files={FILE: Generated(CONTENT, SIZE)})])
    finished: dict[int, int] = {}  # chunk -> how often it had been sent when it was first seen finished
    unfinished = 0
    reading: list[subprocess.Popen[str]] = []
    with HubProcess(spec) as hub, Node(hub.endpoint, {"MANTA_FETCH_CONNECTIONS": "2"}) as node, ExitStack() as stack:
        hub.set_bandwidth(BANDWIDTH)
        facts = hub.files(REPO).files[FILE]
        directory = node.directory()
        for kill in range(KILLS):
            if not reading:  # at the start, and after each kill where they do not survive it
                node.manta("mount", REPO, str(directory))
                command = [sys.executable, "-c", READER, directory / FILE, CONTENT, SIZE]
                reading += [
                    stack.enter_context(background(*command, how, env=node.environment))
                    for how in ("in order", f"seed {SEED} {kill}")
                ]
            # So many bytes later, and not so much time: a loaded machine must not make all its lives too short to finish anything.
            enough = hub.blob_traffic(REPO, FILE).sent + chance.uniform(LIFE_BYTES_MIN, LIFE_BYTES_MAX)
            wait_until(lambda enough=enough: hub.blob_traffic(REPO, FILE).sent >= enough)  # type: ignore[misc]
            with node.unattended():  # for as long as its cache is looked at
                pids = [*node.daemons(), *node.processes_of("manta.worker")]
                os.kill(pids[0], signal.SIGKILL)
                for pid in pids:
                    wait_for_end(pid)
                if not node.survives:
                    conclude(reading, {0, GONE})
                wait_until(lambda: not any(origin.in_flight for origin in hub.stats().origins.values()))
                done = recorded(node, f"sha256-{facts.sha256}")
            assert done >= finished.keys(), "a finished chunk is lost"
            for chunk, times in finished.items():
                assert sent(hub, facts.blob, chunk) == times, (
                    f"kill {kill}: chunk {chunk} was finished and fetched again"
                )
            finished |= {chunk: sent(hub, facts.blob, chunk) for chunk in done - finished.keys()}
            unfinished += sum(
                1 for chunk in range(-(-SIZE // CHUNK_SIZE)) if chunk not in done and sent(hub, facts.blob, chunk)
            )
        assert finished, "no daemon lived long enough to finish anything"
        hub.set_bandwidth(None)
        if node.survives:
            conclude(reading, {0})
        else:
            node.manta("mount", REPO, str(directory))
        assert run('sha256sum "$1"', directory / FILE).split()[0] == facts.sha256
        for chunk, times in finished.items():
            assert sent(hub, facts.blob, chunk) == times
        traffic = hub.blob_traffic(REPO, FILE)
        assert traffic.unique == SIZE
        # At each kill a chunk that is not finished costs itself at most; nothing else is fetched twice.
        assert traffic.repeated <= unfinished * CHUNK_SIZE
        print(
            f"{KILLS} kills, seed {SEED}: {traffic.size / MIB:.0f} MiB, sent again {traffic.repeated / MIB:.1f} MiB"
            f" = {traffic.repeated / KILLS / MIB:.2f} MiB per kill; {len(finished)} chunks were finished before a kill"
        )
        assert not [entry for entry in mounts() if entry.directory.startswith(f"{node.path}/") and not entry.is_manta]
        unbind(str(directory))
