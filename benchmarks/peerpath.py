"""The `peerpath` benchmark, here and only here; run by `benchmarks.__main__`.

What it costs to give bytes to another node, with no limit but this machine: one file from a node that has it, over loopback.

Rounds of: nginx that sends the warm node's cache file by sendfile, to curl that drops it, and to curl that writes it to the disk; one
fetch worker that pulls it from the warm node, chunk by chunk, checks digests and writes it (no daemon, no reader); and a cold node whose
mount is read. All of it is in one network namespace, the file in the page cache where it comes from, and the disk is idle when each
begins. CPU time of whoever gives is told apart from that of whoever takes. In the cold node's is all that a node does: it verifies sha256
too, and delivers to a reader.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import readers, rig
from benchmarks.pulling import hello, puller
from benchmarks.report import GIGABYTE, Chart, Goal, Report, Row, median, ratio
from benchmarks.rig import READER_TIMEOUT_S, REPO, SLOWDOWN_MAX, UNLIMITED_RATE, say, seeded_tensors
from benchmarks.sampler import Sampler
from manta.config import parse_size
from manta.errors import Corrupt, Unavailable
from manta.swarm import auth
from manta.testing import netns, scratch
from manta.testing.cluster import KEY, SWARM_PORT, Node, set_key
from manta.testing.hub import HubProcess, HubSpec, RepoSpec
from manta.testing.reading import Reading

SUMMARY = "one file from a warm node to a cold one over loopback: GB/s and CPU time, beside nginx and curl"
PROGRAMS = ("nginx", "curl", "ip", "tc", "nsenter")

NAME = "model.safetensors"
NGINX_PORT = 8080
START_TIMEOUT_S = 20.0
END_TIMEOUT_S = 10.0

DROPPED = "nginx, curl to /dev/null"
WRITTEN = "nginx, curl to a file"
WORKER = "warm node, one worker"
MOUNT = "warm node, cold node's mount"
WAYS = {"nginx": (DROPPED, WRITTEN), "worker": (WORKER,), "mount": (MOUNT,)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=rig.file_size, default=parse_size("2GiB"), help="of the file (default: 2GiB)")
    parser.add_argument(
        "--rate", type=rig.link_rate, default=0, help="bits per second to outside; loopback has none (default: 0)"
    )
    parser.add_argument("--rounds", type=rig.count, default=3, help="of everything (default: 3)")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="what to measure (default: all)"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path("/var/tmp"), help="where cache directories go (default: /var/tmp)"
    )


@dataclass(frozen=True, slots=True)
class _Passage:
    """The file once from one to the other."""

    seconds: float
    giver_cpu_s: float
    taker_cpu_s: float
    reader_cpu_s: float
    origin_bytes: int


def run(options: argparse.Namespace) -> Report:
    report = Report("peerpath")
    found: dict[str, list[_Passage]] = {way: [] for name in options.ways for way in WAYS[name]}
    spec = HubSpec(repos=[RepoSpec(id=REPO, files={NAME: seeded_tensors(NAME, options.size)})])
    with (
        netns.namespace(options.rate) as place,
        scratch.scratch(options.scratch) as folder,
        HubProcess(spec, prefix=place.command([]), host=place.address) as hub,
        _Path(place, folder, hub) as path,
    ):
        measures: dict[str, Callable[[], _Passage]] = {
            DROPPED: lambda: path.curl(Path("/dev/null")),
            WRITTEN: lambda: path.curl(folder / "curled"),
            WORKER: path.worker,
            MOUNT: path.mount,
        }
        for number in range(options.rounds):
            for way in list(found) if number % 2 == 0 else list(found)[::-1]:
                found[way].append(measures[way]())
                last = found[way][-1]
                say(f"{way}: {path.size / last.seconds / GIGABYTE:.2f} GB/s")
                report.runs.append({"round": number, "way": way, **_document(last, path.size)})
        size = path.size
    report.table = [_row(way, passages, size) for way, passages in found.items()]
    if passages := found.get(MOUNT):
        report.goals = [Goal("bytes from the origin for the cold node", sum(p.origin_bytes for p in passages), "==", 0)]
    report.chart = Chart(
        f"{size / 2**30:.3g} GiB over loopback",
        "GB/s",
        [(way, median([size / each.seconds / GIGABYTE for each in passages])) for way, passages in found.items()],
    )
    return report


def _document(passage: _Passage, size: int) -> dict[str, object]:
    return {
        "seconds": passage.seconds,
        "bytes": size,
        "giver_cpu_s": round(passage.giver_cpu_s, 3),
        "taker_cpu_s": round(passage.taker_cpu_s, 3),
        "reader_cpu_s": round(passage.reader_cpu_s, 3),
        "origin_bytes": passage.origin_bytes,
    }


def _row(way: str, passages: list[_Passage], size: int) -> Row:
    """Medians over the rounds."""
    gigabytes = size / GIGABYTE
    return {
        "what": way,
        "GB/s": median([ratio(gigabytes, each.seconds) for each in passages]),
        "giver CPU-s/GB": median([each.giver_cpu_s / gigabytes for each in passages]),
        "taker CPU-s/GB": median([each.taker_cpu_s / gigabytes for each in passages]),
        "reader CPU-s/GB": median([each.reader_cpu_s / gigabytes for each in passages]),
    }


class _Path:
    """A warm node, nginx beside it with the same file, and what takes it from either."""

    def __init__(self, place: netns.Namespace, folder: Path, hub: HubProcess) -> None:
        self._place = place
        self._folder = folder
        self._hub = hub
        self._fact = hub.files(REPO).files[NAME]
        self.size = self._fact.size
        self._timeout_s = READER_TIMEOUT_S + SLOWDOWN_MAX * self.size * 8 / UNLIMITED_RATE
        self._cold = 0
        self._stack = ExitStack()

    def __enter__(self) -> _Path:
        with ExitStack() as stack:
            self._warm = self._node("warm", SWARM_PORT)
            stack.callback(self._warm.kill)
            self._warm.start()
            self._read(self._warm)
            (self._data,) = self._warm.cache.glob("blobs/*/*.data")
            self._nginx = stack.enter_context(_nginx(self._place, self._folder, self._data.parent))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _node(self, name: str, port: int) -> Node:
        peers = ",".join(f"{self._place.address}:{number}" for number in (SWARM_PORT, SWARM_PORT + 1))
        folder = self._folder / name
        settings = {
            "swarm.peers": f"static:{peers}",
            "swarm.listen": f"{self._place.address}:{port}",
            "swarm.key_file": str(folder / "key"),
        }
        node = Node(self._place, folder, self._hub.endpoint, settings)
        set_key(node, KEY)
        return node

    # -- the ways -------------------------------------------------------------------------------------------------------

    def curl(self, target: Path) -> _Passage:
        self._prepare()
        url = f"http://{self._place.address}:{NGINX_PORT}/{self._data.name}"
        command = ["curl", "--silent", "--show-error", "--fail", "--output", str(target), url]
        program = [sys.executable, "-S", "-E", "-P", readers.__file__, "download", str(target), "--", *command]
        with Sampler({"giver": lambda: [self._nginx]}, shares_of=()) as sampler:
            done = subprocess.run(
                self._place.command(program), capture_output=True, check=False, timeout=self._timeout_s, cwd="/"
            )
        if done.returncode:
            raise Unavailable(f"curl did not get {url}: {done.stderr.decode(errors='replace').strip()}")
        told = json.loads(done.stdout)
        if target != Path("/dev/null"):
            if told["bytes"] != self.size:
                raise Corrupt(f"curl got {told['bytes']} bytes of {url}, which has {self.size}")
            target.unlink()
        return _Passage(told["ended"] - told["began"], sampler.usage("giver").cpu_s, told["cpu_s"], 0.0, 0)

    def worker(self) -> _Passage:
        giver = hello(f"{self._place.address}:{SWARM_PORT}", auth.parse_keys(KEY))
        target = self._folder / "pulled"
        self._prepare()
        with puller(self._place) as taker:
            groups: Mapping[str, Callable[[], list[int]]] = {
                "giver": lambda: [self._warm.pid],
                "taker": lambda: [taker.pid],
            }
            with Sampler(groups, shares_of=()) as sampler:
                seconds = taker.pull(giver, f"sha256-{self._fact.sha256}", self.size, target)
        same = subprocess.run(["cmp", "--silent", str(target), str(self._data)], check=False, timeout=self._timeout_s)
        if same.returncode:
            raise Corrupt("The worker's file is not the warm node's.")
        target.unlink()
        return _Passage(seconds, sampler.usage("giver").cpu_s, sampler.usage("taker").cpu_s, 0.0, 0)

    def mount(self) -> _Passage:
        self._cold += 1
        node = self._node(f"cold{self._cold}", SWARM_PORT + 1)
        try:
            node.start()
            self._prepare()
            passage = self._read(node)
            node.stop()
        finally:
            node.kill()
        shutil.rmtree(node.folder)
        return passage

    def _read(self, node: Node) -> _Passage:
        """The file through a node's mount, until the node has sealed it."""
        directory = node.mount(REPO)
        self._hub.reset(content=False)
        groups: Mapping[str, Callable[[], list[int]]] = {
            "giver": lambda: [self._warm.pid] if node is not self._warm else [],
            "taker": lambda: [node.pid],
        }
        with (
            Reading(node.folder, [directory / NAME]) as reading,
            Sampler(groups, shares_of=()) as sampler,
        ):
            reading.go()
            found = reading.result(self._timeout_s)
            deadline = time.monotonic() + self._timeout_s
            while not all(blob.sealed for blob in node.client.cache().blobs):
                if time.monotonic() > deadline:
                    raise Unavailable(f"The file was not sealed in time.{node.log()}")
                time.sleep(0.1)
        if found.error or list(found.digests.values()) != [self._fact.sha256]:
            raise Corrupt(f"A reader of {directory / NAME} got other bytes than the hub has: {found.error}{node.log()}")
        cpu = {name: sampler.usage(name).cpu_s for name in groups}
        sent = self._hub.blob_traffic(REPO, NAME).sent
        return _Passage(found.seconds, cpu["giver"], cpu["taker"], found.cpu_s, sent)

    def _prepare(self) -> None:
        """The disk has written what it had to, and the warm node's file is in the page cache."""
        rig.drop_page_cache()
        subprocess.run(["cat", str(self._data)], stdout=subprocess.DEVNULL, check=True, timeout=self._timeout_s)


@contextmanager
def _nginx(place: netns.Namespace, folder: Path, root: Path) -> Iterator[int]:
    """nginx with one worker that serves the files in `root`; its master's pid."""
    text = f"""
        daemon off;
        user root;
        worker_processes 1;
        pid {folder}/nginx.pid;
        error_log stderr;
        events {{ worker_connections 64; }}
        http {{
            access_log off;
            sendfile on;
            tcp_nopush on;
            server {{ listen {place.address}:{NGINX_PORT}; location / {{ root {root}; }} }}
        }}
    """
    configuration = folder / "nginx.conf"
    configuration.write_text(text)
    command = ["nginx", "-c", str(configuration), "-p", str(folder), "-e", "stderr"]
    with (folder / "nginx.err").open("wb") as errors:
        process = subprocess.Popen(
            place.command(command), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=dict(os.environ)
        )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((place.address, NGINX_PORT), timeout=1.0):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise Unavailable(f"nginx did not start: {(folder / 'nginx.err').read_text()[-1000:]}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(END_TIMEOUT_S)
