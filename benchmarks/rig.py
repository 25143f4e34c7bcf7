"""What a benchmark runs on, here and only here: the hub in its namespace behind the link, fresh mounts, curl, readers, page cache.

    with Rig.set_up(options, {"model.safetensors": 2 << 30}) as rig:
        direct = rig.download("model.safetensors")
        with rig.mounted() as mount:
            found = rig.read(mount, [["sequential", str(mount.file("model.safetensors")), "--block", "4194304"]])

Manta is driven as a person drives it: `python -m manta mount` and `umount`, settings by flags and environment. All that is started dies
with the rig (see manta.testing.scratch and netns). Every wait has a deadline; a reader that passes its own gets its mount aborted.

Used by every benchmark.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from benchmarks import readers
from benchmarks.origin import file_url
from benchmarks.report import MEGABYTE, ratio
from benchmarks.sampler import GroupUsage, ProcessUsage, Sampler, command_line, role
from manta.config import CacheConfig, Config, DaemonConfig, parse_size
from manta.control.client import Client
from manta.control.protocol import PrefetchRequest
from manta.errors import Corrupt, Invalid, MantaError, Unavailable
from manta.testing import netns, scratch
from manta.testing.hub import HubProcess, HubSpec, RepoSpec, Safetensors, Settings, Tensor, Text
from manta.testing.hub.files import read_spec
from manta.testing.hub.traffic import BlobTraffic

REPOSITORY = Path(__file__).resolve().parent.parent
REPO = "bench/model"
ANCHOR = "bench/anchor"
"""A repo of one small file: what keeps a daemon from leaving between two mounts, if that is wanted."""

FILE_SIZE_MIN = 1024 * 1024
"""A benchmark of less measures nothing but its own start."""

TENSOR_ROWS_MAX = 8192
TENSOR_COLUMNS = 4096
"""Half-precision tensors of at most 64 MiB, as a 7B model's projections are."""

COMMAND_TIMEOUT_S = 60
READER_TIMEOUT_S = 60
SLOWDOWN_MAX = 4
"""A reader may take READER_TIMEOUT_S and this many times what the link needs: far beyond every goal, and not for ever."""
UNLIMITED_RATE = 400_000_000
"""Bits per second that a deadline assumes where the link has no limit: a slow disk's."""

QUIET_S = 0.15
"""The hub is idle when it has had no request in flight for this long: longer than the daemon may ponder between two."""
QUIET_TIMEOUT_S = 60
PREFETCH_TIMEOUT_S = 300
LOG_LINES = 40
"""Of each log, that an error shows."""
EXIT_TIMEOUT_S = 20
"""How long an ephemeral daemon may take to exit after its last umount."""

BOTH = "both"
"""Of --fuse: one session and then the other, in the same run."""
SESSIONS = ("kernel", "pyfuse3")

_READER = (sys.executable, "-S", "-E", "-P", readers.__file__)

CURL_REPORT = '{"seconds": %{time_total}, "first_byte_s": %{time_starttransfer}, "bytes": %{size_download}}'


def rig_options(
    parser: argparse.ArgumentParser,
    *,
    size: str,
    rate: int = netns.GIGABIT,
    fuse: Sequence[str] = ("auto", *SESSIONS),
) -> None:
    """The options of every benchmark that runs on a rig, with its own defaults of bytes and bits per second.

    `fuse`: the sessions that it can be run with, its default first.
    """
    parser.add_argument("--size", type=file_size, default=parse_size(size), help=f"of a file (default: {size})")
    parser.add_argument(
        "--rate",
        type=link_rate,
        default=rate,
        help=f"bits per second of the hub's link, 0: no limit (default: {rate:g})",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("/var/tmp"),
        help="where cache directories go: on the disk to be measured (default: /var/tmp)",
    )
    parser.add_argument(
        "--fuse", choices=fuse, default=fuse[0], help=f"the mounts' session with the kernel (default: {fuse[0]})"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="a setting of the mounts' daemons"
    )


def file_size(text: str) -> int:
    """FILE_SIZE_MIN or more; an option's type."""
    try:
        size = parse_size(text)
    except Invalid as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if size < FILE_SIZE_MIN:
        raise argparse.ArgumentTypeError(f"{text} is too little: at least {FILE_SIZE_MIN} bytes")
    return size


def link_rate(text: str) -> int:
    """Bits per second, also as 1e9; an option's type."""
    rate = float(text)
    if not 0 <= rate < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a rate")
    return int(rate)


def count(text: str) -> int:
    """One or more; an option's type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few: at least 1")
    return number


@dataclass(frozen=True, slots=True)
class Mount:
    directory: Path
    cache: Path
    daemon: int
    """The daemon's pid."""
    keeper: int
    """The pid of the keeper that started the daemon; 0 where nothing keeps it."""
    session: str
    """What the daemon calls its session with the kernel."""
    client: Client

    def data(self) -> Path:
        """The cache's file of the only blob that it has."""
        (path,) = self.cache.glob("blobs/*/*.data")
        return path

    def file(self, name: str) -> Path:
        return self.directory / name


@dataclass(frozen=True, slots=True)
class Measurement:
    """What readers found that ran side by side. Times in seconds, from the first one's start to the last one's end."""

    seconds: float
    first_byte_s: float
    """NaN where the program does not tell."""
    size: int
    """Bytes that one of them read: the file's."""
    digests: list[str]
    """One per reader; none from curl."""
    usage: dict[str, GroupUsage]
    """By group: manta (absent without a mount), hub, reader."""
    others_cpu_s: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return ratio(self.size, self.seconds)

    def document(self) -> dict[str, object]:
        known = {} if math.isnan(self.first_byte_s) else {"first_byte_s": self.first_byte_s}
        return {
            "seconds": self.seconds,
            **known,
            "bytes": self.size,
            "rate": self.rate,
            "usage": {name: usage.document() for name, usage in self.usage.items()},
            "others_cpu_s": round(self.others_cpu_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Probe:
    seconds: float
    open_s: float
    """The part of `seconds` that open() took."""
    digest: str


class Rig:
    """One hub with one repo, REPO, and everything around it. Made by `set_up`."""

    def __init__(
        self,
        folder: Path,
        link: netns.Namespace,
        hub: HubProcess,
        specs: Mapping[str, Safetensors],
        session: str,
        settings: Sequence[str],
    ) -> None:
        self.folder = folder
        self.hub = hub
        self.link = link
        self.specs = specs
        self._session = session
        self._settings = settings
        self.facts = hub.files(REPO).files
        self._digests: dict[tuple[str, int], str] = {}
        self._mounts = 0

    @classmethod
    @contextmanager
    def set_up(
        cls,
        options: argparse.Namespace,
        sizes: Mapping[str, int],
        *,
        latency_s: float = 0.0,
        tls: bool = False,
        rows_max: int = TENSOR_ROWS_MAX,
    ) -> Iterator[Self]:
        """A rig whose hub holds safetensors files of about `sizes` bytes (exactly that much of tensors), by name.

        `tls`: it speaks HTTPS, and every process that is started here is told of its certificate (SSL_CERT_FILE).
        `rows_max`: of each tensor, of 8 KiB.
        """
        specs = {name: seeded_tensors(name, size, rows_max) for name, size in sizes.items()}
        repos = [RepoSpec(id=REPO, files=dict(specs)), RepoSpec(id=ANCHOR, files={"README.md": Text("It holds.\n")})]
        spec = HubSpec(repos=repos, settings=Settings(latency_s=latency_s))
        with (
            scratch.scratch(options.scratch) as folder,
            netns.namespace(options.rate) as link,
            _certified(folder, link.address) if tls else contextlib.nullcontext() as certificate,
            HubProcess(spec, prefix=link.command([]), host=link.address, tls=certificate) as hub,
        ):
            yield cls(folder, link, hub, specs, options.fuse, options.set)

    @property
    def endpoint(self) -> str:
        return self.hub.endpoint

    # -- what runs ----------------------------------------------------------------------------------------------------

    def download(self, name: str) -> Measurement:
        """One plain download by curl to /dev/null."""
        drop_page_cache()
        self.hub.reset(content=False)
        url = file_url(self.endpoint, REPO, name)
        command = ["curl", "--silent", "--show-error", "--fail", "--location", "--output", "/dev/null"]
        if authority := os.environ.get("SSL_CERT_FILE"):
            command += ["--cacert", authority]
        command.append("--write-out")
        size = self.facts[name].size
        (result,), usage, others_s = self._run([[*command, CURL_REPORT, url]], None, size, os.environ, {})
        if result["bytes"] != size:
            raise Corrupt(f"curl got {result['bytes']} bytes of {url}, which has {size}")
        found = Measurement(result["seconds"], result["first_byte_s"], size, [], usage, others_s)
        say(f"curl: {found.rate / MEGABYTE:.1f} MB/s")
        return found

    def read(
        self,
        mount: Mount | None,
        programs: Sequence[Sequence[str]],
        servers: Mapping[str, int] | None = None,
        *,
        settled: bool = True,
    ) -> Measurement:
        """Runs programs of readers.py side by side; the rest as of `measure`."""
        return self.measure([[*_READER, *program] for program in programs], mount, None, servers, settled=settled)

    def ask(self, mount: Mount | None, program: Sequence[str]) -> tuple[dict[str, Any], float]:
        """Runs one program of readers.py; what it found, and the CPU seconds of all Manta processes meanwhile."""
        (result,), usage, _ = self._run([[*_READER, *program]], mount, 0, os.environ, {})
        say(f"{program[0]}: {result['ended'] - result['began']:.3f} s")
        return result, usage["manta"].cpu_s if mount is not None else 0.0

    def requests(self) -> dict[str, int]:
        """Requests that the hub has had since the mount began, by kind: "info", "tree", "resolve", "blob"."""
        return {str(kind): number for kind, number in self.hub.stats().kinds.items()}

    def measure(
        self,
        commands: Sequence[Sequence[str]],
        mount: Mount | None = None,
        environ: Mapping[str, str] | None = None,
        servers: Mapping[str, int] | None = None,
        *,
        settled: bool = True,
    ) -> Measurement:
        """Runs commands side by side that print what readers.py prints. With a mount, until the daemon is done with their files too.

        `servers`: pids of others whose usage counts, by the name of their group. `settled`: where everything is cached there is
        nothing to wait for; neither to ask the daemon nor to look at its memory leaves CPU time and readers as they are.
        """
        size = max(fact.size for fact in self.facts.values())
        results, usage, others_s = self._run(
            commands, mount, size, os.environ if environ is None else environ, servers or {}, settled=settled
        )
        began = min(result["began"] for result in results)
        found = Measurement(
            max(result["ended"] for result in results) - began,
            min(result.get("first", math.nan) for result in results) - began,
            max(result.get("bytes", 0) for result in results),
            [result["digest"] for result in results if "digest" in result],
            usage,
            others_s,
        )
        rate = f", {found.rate / MEGABYTE:.1f} MB/s" if found.size else ""
        say(f"{role(commands[0])}: {found.seconds:.2f} s{rate}")
        return found

    @contextmanager
    def prober(self, length: int) -> Iterator[Callable[[Path, int], Probe]]:
        """A running reader that opens a file and reads `length` bytes at an offset each time it is called."""
        command = [*_READER, "probe", "--length", str(length)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdin
        assert process.stdout
        asked, answered = process.stdin, process.stdout

        def probe(path: Path, offset: int) -> Probe:
            asked.write(f"{offset} {path}\n")
            answer = json.loads(read_line(process, READER_TIMEOUT_S))
            if answer["bytes"] != length:
                raise Corrupt(f"{path} gave {answer['bytes']} bytes at {offset} where {length} were asked for")
            found = Probe(answer["ended"] - answer["began"], answer["opened"] - answer["began"], answer["digest"])
            say(f"{path.name} at {offset}: {1000 * found.seconds:.1f} ms, open {1000 * found.open_s:.1f} ms")
            return found

        try:
            yield probe
        finally:
            with contextlib.suppress(BrokenPipeError):
                asked.close()
            try:
                process.wait(EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()  # it ends when its mount is aborted, by the scratch folder's removal at the latest
            answered.close()

    @contextmanager
    def mounted(self, cache: Path | None = None, *, session: str = "", target: str = REPO) -> Iterator[Mount]:
        """REPO mounted by a daemon of its own, page cache dropped and the hub's counters at zero.

        With a fresh cache directory that goes afterwards, unless one is given. At the end: unmounted, the daemon and its keeper gone. Where
        an exception ends it, the scratch folder's removal does that in its own, faster way, also to a daemon that does not answer.
        `session`: another than --fuse says. Raises MantaError where the daemon has another than the one asked for.
        """
        used = cache or self.folder / f"cache-{self._mounts + 1}"
        config = Config(cache=CacheConfig(dir=used), daemon=DaemonConfig(runtime_dir=self.folder / "run"))
        client = Client(config.socket_path)
        with self.bound(target, used, session or self._session) as directory:
            status = client.status()
            if (wanted := session or self._session) not in ("auto", status.fuse):
                raise MantaError(f"the mount was to be served by the {wanted} session, and {status.fuse} serves it")
            mount = Mount(directory, used, status.pid, self.keeper_of(status.pid), status.fuse, client)
            yield mount
            last = client.status().pid  # a benchmark may have had it restarted
        left = [pid for pid in (last, mount.keeper) if pid]
        if scratch.await_end(left, EXIT_TIMEOUT_S):
            raise Unavailable(f"the daemon or its keeper ({left}) still runs {EXIT_TIMEOUT_S} s after its last umount")
        if cache is None:
            shutil.rmtree(used)

    @contextmanager
    def bound(self, target: str, cache: Path, session: str = "auto") -> Iterator[Path]:
        """`target` mounted on a directory of its own by the cache directory's daemon, which is started where none runs.

        The page cache is dropped before, and the hub's counters are at zero. At the end it is unmounted, unless by an exception.
        """
        self._mounts += 1
        directory = self.folder / f"mount-{self._mounts}"
        directory.mkdir()
        drop_page_cache()
        self.hub.reset(content=False)
        where = ["--cache-dir", str(cache)]
        settings = [word for setting in self._settings for word in ("--set", setting)]
        self.manta("mount", target, str(directory), *where, "--endpoint", self.endpoint, "--fuse", session, *settings)
        yield directory
        self.manta("umount", str(directory), *where)

    def prefetch(self, mount: Mount, target: str = REPO) -> None:
        """Until all of it is cached and sealed."""
        job = mount.client.prefetch(PrefetchRequest(target))
        deadline = time.monotonic() + PREFETCH_TIMEOUT_S
        while job.state == "running" and time.monotonic() < deadline:
            time.sleep(0.1)
            job = mount.client.job(job.id)
        if job.state != "done":
            raise Unavailable(
                f"{target} could not be prefetched in {PREFETCH_TIMEOUT_S} s ({job.state}): {job.problems[:1]}"
            )
        self._await_idle(mount, deadline)

    def write(self, name: str, path: Path) -> None:
        """The hub's file in a file of the disk: the same bytes, written in order."""
        with path.open("wb") as file:
            file.writelines(read_spec(self.specs[name]).pieces())
            file.flush()
            os.fsync(file.fileno())

    # -- what is so ---------------------------------------------------------------------------------------------------

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.facts[name].size

    def traffic(self, name: str) -> BlobTraffic:
        """What the hub has sent of a file since the mount or download began."""
        return self.hub.blob_traffic(REPO, name)

    def sending_s(self) -> float:
        """Seconds from the first to the last byte of files that the hub sent since the mount began; beyond it, the link was idle."""
        sent = [entry for entry in self.hub.log() if entry.kind == "blob" and entry.duration_s >= 0]
        if not sent:
            return math.nan
        return max(entry.started + entry.duration_s for entry in sent) - min(entry.started for entry in sent)

    def check_digest(self, found: Measurement, name: str, *, block: int = 0) -> None:
        """Raises Corrupt unless every reader got the file's bytes. `block`: the digest is of blocks (readers.blocks_digest)."""
        wanted = self.facts[name].sha256 if block == 0 else self._blocks_digest(name, block)
        if found.digests.count(wanted) != len(found.digests) or not found.digests:
            raise Corrupt(f"a reader of {name} got other bytes than the hub has: {found.digests} and not {wanted}")

    def await_quiet(self) -> None:
        """Waits until the hub has been idle for QUIET_S."""
        deadline = time.monotonic() + QUIET_TIMEOUT_S
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < QUIET_S:
            if any(traffic.in_flight for traffic in self.hub.stats().origins.values()):
                quiet_since = time.monotonic()
            if time.monotonic() > deadline:
                raise Unavailable(f"the hub was still answering requests after {QUIET_TIMEOUT_S} s")
            time.sleep(QUIET_S / 5)

    def _blocks_digest(self, name: str, block: int) -> str:
        if (name, block) not in self._digests:
            content = read_spec(self.specs[name])
            starts = range(0, content.size, block)
            blocks = (content.read(start, min(start + block, content.size)) for start in starts)
            self._digests[name, block] = readers.blocks_digest(blocks)
        return self._digests[name, block]

    # -- processes ----------------------------------------------------------------------------------------------------

    def keeper_of(self, daemon: int) -> int:
        """The pid of the keeper that started this daemon; 0 where none did."""
        parent = scratch.parent(daemon)
        return parent if role(command_line(parent)) == "keeper" else 0

    def keepers(self) -> list[int]:
        """The pids of all keepers of this run."""
        return [pid for pid in scratch.processes(self.folder) if role(command_line(pid)) == "keeper"]

    def manta(self, *arguments: str) -> None:
        """Runs the manta command. Raises with what it said when it fails, and with the daemon's log's end."""
        command = [sys.executable, "-m", "manta", *arguments]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MANTA_", "HF_", "HUGGING"))}
        environ = {
            **kept,
            "MANTA_CONFIG": "/dev/null",
            "MANTA_DAEMON_RUNTIME_DIR": str(self.folder / "run"),
            "HF_HOME": str(self.folder / "hf"),
        }
        try:
            done = subprocess.run(
                command,
                env=environ,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(
                f"manta {' '.join(arguments)} did not return within {COMMAND_TIMEOUT_S} s{self.logs()}"
            ) from None
        if done.returncode:
            raise MantaError(
                f"manta {' '.join(arguments)} exited with {done.returncode}: {done.stderr.strip()}{self.logs()}"
            )

    def logs(self) -> str:
        """The ends of the daemons' logs, to be put behind a sentence: they are gone with the scratch folder."""
        tails = [
            f"\n{path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-LOG_LINES:])
            for path in (self.folder / "run").glob("*/*.log")
        ]
        return "".join(tails)

    def _run(
        self,
        commands: Sequence[Sequence[str]],
        mount: Mount | None,
        size: int,
        environ: Mapping[str, str],
        servers: Mapping[str, int],
        *,
        settled: bool = True,
    ) -> tuple[list[dict[str, Any]], dict[str, GroupUsage], float]:
        """Runs commands side by side, each of which prints one JSON object; them, usage by group, the rest of the machine's CPU."""
        rate = (self.link.rate or UNLIMITED_RATE) / 8
        deadline = time.monotonic() + READER_TIMEOUT_S + SLOWDOWN_MAX * size / rate
        processes: list[subprocess.Popen[str]] = []
        groups: dict[str, Callable[[], list[int]]] = {
            "hub": lambda: [self.hub.pid],
            "reader": lambda: [process.pid for process in processes],
        }
        for name, pid in servers.items():
            groups[name] = partial(list, [pid])
        if mount is not None:
            groups["manta"] = partial(list, [pid for pid in (mount.keeper, mount.daemon) if pid])
        try:
            with Sampler(groups, shares_of={"manta", "hub"} if settled else ()) as sampler:
                processes.extend(start(command, environ) for command in commands)
                results = [self._result(process, deadline) for process in processes]
                if mount is not None and settled:
                    self._await_idle(mount, deadline)
        finally:
            self.stop(processes)
        usage = {name: sampler.usage(name) for name in groups}
        told = [
            ProcessUsage(process.pid, role(command), result["cpu_s"], result["rss_peak"])
            for process, command, result in zip(processes, commands, results, strict=True)
            if "cpu_s" in result
        ]
        if told:  # what a reader knows of itself is exact; of curl there is what was sampled
            usage["reader"] = GroupUsage(told)
        return results, usage, sampler.others_cpu_s

    def _result(self, process: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
        what = " ".join(str(word) for word in process.args[-6:]) if isinstance(process.args, list) else ""
        try:
            output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{what} did not end in time{self.logs()}") from None
        if process.returncode:
            raise Unavailable(f"{what} exited with {process.returncode}: {errors.strip()}{self.logs()}")
        result: dict[str, Any] = json.loads(output)
        return result

    def _await_idle(self, mount: Mount, deadline: float) -> None:
        """Until the daemon fetches nothing more and has verified what is complete: that work belongs to the read that caused it."""
        while mount.client.status().transfers or any(
            blob.cached == blob.size and not blob.sealed for blob in mount.client.cache().blobs
        ):
            if time.monotonic() > deadline:
                raise Unavailable(f"the daemon was still fetching long after the read{self.logs()}")
            time.sleep(0.1)

    def stop(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        """Ends readers that still run. One that waits for a mount only ends once the mount is aborted."""
        running = [process for process in processes if process.poll() is None]
        if running:
            for device in scratch.fuse_devices(self.folder):
                scratch.abort(device)
        for process in running:
            process.kill()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=EXIT_TIMEOUT_S)


def seeded_tensors(seed: str, size: int, rows_max: int = TENSOR_ROWS_MAX) -> Safetensors:
    """A safetensors file with `size` bytes of half-precision tensors; the last one takes what does not fill a row."""
    tensors: list[Tensor] = []
    elements = size // 2
    while elements:
        rows = min(rows_max, elements // TENSOR_COLUMNS)
        shape = [rows, TENSOR_COLUMNS] if rows else [elements]
        tensors.append(Tensor(f"model.layers.{len(tensors)}.weight", "F16", shape))
        elements -= rows * TENSOR_COLUMNS if rows else elements
    return Safetensors(seed, tensors)


@contextmanager
def _certified(folder: Path, address: str) -> Iterator[tuple[Path, Path]]:
    """A certificate for `address` and its key; as long as this lasts, OpenSSL's and Go's programs trust it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += [
        "-days",
        "2",
        "-subj",
        "/CN=hub",
        "-addext",
        f"subjectAltName=IP:{address}",
        "-keyout",
        str(key),
        "-out",
        str(certificate),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S)
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = str(certificate)
    try:
        yield certificate, key
    finally:
        del os.environ["SSL_CERT_FILE"]
        if before is not None:
            os.environ["SSL_CERT_FILE"] = before


def start(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=dict(environ),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def drop_page_cache() -> None:
    """Writes out what is dirty, which cannot be dropped, and drops what the kernel caches: pages, dentries, inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    """One line of a process's output. Raises Unavailable where none comes in time."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    line = process.stdout.readline() if ready else ""
    if not line:
        raise Unavailable(f"a reader gave no answer within {timeout_s:g} s")
    return line


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)
