"""What many open files, many names and many waiting readers cost the daemon: bounded, and never its answers to others.

At CI's size by default; MANTA_TEST_FULL=1 runs it at full size (10,000 files open, 200,000 names, 3,000 readers) and takes minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manta.testing.hub import FileSpec, Generated, HubProcess, HubSpec, RepoSpec, Text, faults
from tests.mount.node import Node, python, run, wait_until

FULL = os.environ.get("MANTA_TEST_FULL") == "1"
NAMES, OPEN, READ, READERS = (199_000, 10_000, 10_000, 3000) if FULL else (20_000, 2000, 200, 700)
"""Names looked up, files open at once, files of them that are read, readers that wait at once."""

MANY, WEIGHTS = "bounds/many", "bounds/weights"
FOLDERS = 20

MIB = 1024 * 1024

pytestmark = pytest.mark.timeout(1800 if FULL else 180)

LAZY = {"MANTA_FUSE_COMPLETE_AT_OPEN": "0"}
"""So that it is reads and not opens that the origin is asked for, as with large files."""

OPEN_AND_READ = """
import json, os, resource, sys
top, opened, read = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names)[:opened]
files = [os.open(path, os.O_RDONLY) for path in paths]
right = sum(os.pread(fd, 100, 0) == os.path.basename(path).encode() for fd, path in zip(files[:read], paths))
print(json.dumps(right), flush=True)
sys.stdin.readline()
"""

WAIT = """
import os, sys, threading
top, readers = sys.argv[1], int(sys.argv[2])
threading.stack_size(65536)
fds = [os.open(f"{top}/part-{number:04}.bin", os.O_RDONLY) for number in range(readers)]
threads = [threading.Thread(target=os.pread, args=(fd, 4096, 0), daemon=True) for fd in fds]
for thread in threads:
    thread.start()
print("reading", flush=True)
sys.stdin.readline()
os._exit(0)
"""


@pytest.fixture(scope="module")
def crowded() -> Iterator[HubProcess]:
    names = [f"shelf-{at % FOLDERS:02}/part-{at:06}.json" for at in range(NAMES)]
    many: dict[str, FileSpec] = {name: Text(name.rpartition("/")[2]) for name in names}
    weights: dict[str, FileSpec] = {f"part-{at:04}.bin": Generated(f"part {at}", 20_000) for at in range(READERS)}
    spec = HubSpec(
        repos=[
            RepoSpec(id=MANY, files=many),
            RepoSpec(id=WEIGHTS, files={**weights, "cached.bin": Generated("cached", 3 * MIB)}),
        ]
    )
    with HubProcess(spec) as hub:
        yield hub


def mount_within(node: Node, files: int, target: str) -> Path:
    """Mounts by a daemon that may have this many files open and cannot raise it."""
    directory = node.directory()
    mount = [sys.executable, "-m", "manta", "mount", target, str(directory)]
    limited = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "limited", *mount]
    subprocess.run(limited, env=node.environment, check=True, capture_output=True, timeout=60)
    return directory


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Bytes resident."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python script that says a line when it is ready and ends with a line of input."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    try:
        yield process
        process.communicate("\n", timeout=60)
    finally:
        process.kill()
        process.wait(60)


def test_files_open_at_once_take_a_bounded_number_of_descriptors(crowded: HubProcess) -> None:
    """The daemon may have 600 descriptors, of which cache files get 88: each file that is read has two, a data file and a map."""
    with Node(crowded.endpoint, LAZY) as node:
        directory = mount_within(node, 600, MANY)
        daemon = node.daemon()
        idle, before = descriptors(daemon), memory(daemon)
        with child(OPEN_AND_READ, directory, OPEN, READ) as reader:
            assert reader.stdout is not None
            assert int(reader.stdout.readline()) == READ
            assert descriptors(daemon) <= 600
            # The daemon is there for others, and can still open what it needs.
            assert node.status()["mounts"][0]["files"] == NAMES
            assert run('cat "$1"/shelf-00/part-000000.json', directory) == "part-000000.json"
            held = (memory(daemon) - before) / OPEN
            print(
                f"{held:.0f} bytes of memory for each of {OPEN} open files, {READ} of them read, after a walk of {NAMES} names"
            )
        wait_until(lambda: descriptors(daemon) <= idle + 2)


def test_opening_files_costs_the_hub_and_the_cache_nothing(crowded: HubProcess) -> None:
    with Node(crowded.endpoint, LAZY) as node:
        directory = node.mount(MANY)
        before = sum(crowded.stats().kinds.values())
        with child(OPEN_AND_READ, directory, OPEN, 0) as reader:
            assert reader.stdout is not None
            reader.stdout.readline()
        assert sum(crowded.stats().kinds.values()) == before
        assert node.json("cache", "ls")["blobs"] == []


def test_names_that_were_looked_up_are_forgotten(crowded: HubProcess) -> None:
    """A second mount of the same names, and a third, take the memory that the first one gave back."""
    with Node(crowded.endpoint) as node:
        node.mount(WEIGHTS)  # keeps the daemon
        daemon = node.daemon()
        walk = 'find "$1" -type f -size +0 | wc -l; umount "$1"'
        sizes = []
        for _ in range(3):
            assert int(run(walk, node.mount(MANY), timeout_s=120)) == NAMES
            wait_until(lambda: len(node.status()["mounts"]) == 1)
            sizes.append(memory(daemon))
        print(f"{sizes[0] / 1e6:.0f}, {sizes[1] / 1e6:.0f}, {sizes[2] / 1e6:.0f} MB after each of three walks")
        # A tenth of what the names take, were they kept: 800 bytes each.
        assert sizes[2] - sizes[1] <= NAMES * 80 + 4_000_000


def test_readers_that_wait_for_a_stalled_hub_leave_room_for_others(crowded: HubProcess) -> None:
    environment = LAZY | {
        "MANTA_FETCH_READ_TIMEOUT_S": "60",
        "MANTA_FETCH_STALL_S": "20",
        "MANTA_FETCH_FILL": "false",
        "MANTA_FUSE_WITHOUT": "passthrough",  # the daemon is to be asked for what is cached
    }
    with Node(crowded.endpoint, environment) as node:
        directory = node.mount(WEIGHTS)
        run('cat "$1/cached.bin" > /dev/null', directory)
        shown = node.status()["read_bytes"]
        crowded.add_fault(faults.Stall(after_bytes=0, seconds=600), origin="cdn", file="part-*")
        with child(WAIT, directory, READERS) as readers:
            assert readers.stdout is not None
            assert readers.stdout.readline() == "reading\n"
            crowded.wait_for(1, origin="cdn")
            # Direct: the kernel has the file in memory.
            read = 'dd if="$1/cached.bin" of=/dev/null bs=1M iflag=direct 2>&1 | tail -1; ls -l "$1" | wc -l'
            assert run(read, directory, timeout_s=20).splitlines()[-1] == str(READERS + 2)
            assert node.status()["read_bytes"] >= shown + 3 * MIB
            print(f"{memory(node.daemon()) / 1e6:.0f} MB with {READERS} readers waiting")
        crowded.reset()
        assert (
            python(
                "import os, sys; print(len(os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 8192)))",
                directory / "cached.bin",
            )
            == 4096
        )
