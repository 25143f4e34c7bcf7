"""Network namespaces for tests and benchmarks, here and only here: a place for a process at the far end of a link of known rate.

A namespace is joined to this one by a veth pair, and what is sent from inside it passes a token bucket (tc tbf). The hub runs inside
and its readers outside, so the link limits the bytes that come and leaves requests alone. Used by `benchmarks` and by tests marked netns.
Needs CAP_SYS_ADMIN and CAP_NET_ADMIN (root), and ip, tc and nsenter; `obstacle` says what is missing.

    with namespace(rate=GIGABIT) as far:
        server = far.popen([sys.executable, "-m", "http.server", "--bind", far.address])

Nothing stays behind: the end of the `with`, an exception and SIGTERM remove the namespace and end what runs in it. Names carry the
owner's pid and start time, so what a killed owner left is known for sure and goes when the next namespace is made (`sweep`).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_network
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from manta.errors import Denied, MantaError, Unavailable

GIGABIT = 1_000_000_000
"""Bits per second of a node's usual network card, and of the link in the project's goals."""

SUBNETS = ip_network("198.18.0.0/15")
"""Each namespace takes a /30 of this. RFC 2544 sets it aside for benchmarks of network gear, so unlike 10/8 and 192.168/16 it is no
site's own network, nor a cluster's."""

SUBNET_COUNT = SUBNETS.num_addresses // 4

BURST_BYTES = 256 * 1024
"""What the bucket holds. Between namespaces a TCP sender's packets are not cut to the MTU: one is up to 64 KiB (GSO), and tbf cuts a
packet larger than its bucket into its segments, which costs CPU on both sides. Four packets go whole, and the 2 ms that 256 KiB are at
1 Gbit/s is what a transfer may gain at its start: below 1 % from 32 MiB on."""

QUEUE_S = 0.020
"""How long a packet may wait in front of the bucket before it is dropped: what a switch port of 1 Gbit/s buffers (2.5 MB). Measured with
buckets of 32 to 256 KiB and queues of 8 to 33 ms, with bbr and with reno: one connection and eight got the same rate, 0.4 % spread."""

MTU = 1500
SEGMENT_PAYLOAD = 1448
SEGMENT_BYTES = 1514
"""The bucket counts Ethernet frames: of 1514 bytes 1448 are payload (14 Ethernet, 20 IP, 32 TCP with timestamps). So 1 Gbit/s carries
119.6 MB/s of an HTTP body; seen: 119.6."""

COMMAND_TIMEOUT_S = 20
END_TIMEOUT_S = 3
"""How long a process in the namespace may take from SIGTERM to its end before SIGKILL."""

_LOCK = Path("/run/manta-netns.lock")
_NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"manta-(\d+)-(\d+)-(\d+)")
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21


def payload_rate(rate: int) -> float:
    """Bytes per second of TCP payload that a link of `rate` bits per second carries."""
    return rate / 8 * SEGMENT_PAYLOAD / SEGMENT_BYTES


def obstacle() -> str:
    """Why no namespace can be made here, a sentence that says what to do; empty where one can."""
    absent = [program for program in ("ip", "tc", "nsenter") if shutil.which(program) is None]
    if absent:
        return f"network namespaces need {', '.join(absent)}: apt-get install iproute2 util-linux"
    capabilities = int(_status_field("CapEff"), 16)
    if not all(capabilities >> bit & 1 for bit in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN)):
        return "network namespaces need CAP_NET_ADMIN and CAP_SYS_ADMIN: run as root"
    return ""


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    host_address: str
    """This side's end of the link."""
    address: str
    """The far end: what a server inside binds to and its clients outside connect to."""
    rate: int
    """Bits per second from inside to outside, frames included; 0 is no limit."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` to be run inside. nsenter and not `ip netns exec`, which also makes a mount namespace: that would keep FUSE mounts busy.

        It execs `argv`, so the process keeps its pid.
        """
        return ["nsenter", f"--net={_NAMESPACES / self.name}", "--", *argv]

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdin: int | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process inside. It is ended and waited for with the namespace, if not before."""
        process = subprocess.Popen(self.command(argv), env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        self.started.append(process)
        return process


@contextmanager
def namespace(rate: int = 0) -> Iterator[Namespace]:
    """A namespace behind a link of `rate` bits per second (0: unlimited), gone at the end. First sweeps what killed owners left."""
    if reason := obstacle():
        raise Denied(reason)
    with ExitStack() as stack:
        stack.enter_context(_termination_unwinds())
        with _LOCK.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            sweep()
            subnet = _free_subnet(os.getpid())
            name = f"manta-{os.getpid()}-{_start_time(os.getpid())}-{subnet}"
            stack.callback(_remove, name, subnet)
            made = _build(name, subnet, rate)
        stack.callback(_wait, made)
        yield made


def sweep() -> list[str]:
    """Removes the namespaces whose owners are gone, and returns their names."""
    removed = []
    for name in _names():
        match = _NAME.fullmatch(name)
        if match and _start_time(int(match[1])) != int(match[2]):
            _remove(name, int(match[3]))
            removed.append(name)
    return removed


def _build(name: str, subnet: int, rate: int) -> Namespace:
    here, there = _addresses(subnet)
    outer, inner = _interface(subnet), "eth0"
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", outer, "mtu", str(MTU), "type", "veth", "peer", "name", inner, "netns", name)
    _run("ip", "address", "add", f"{here}/30", "dev", outer)
    _run("ip", "link", "set", outer, "up")
    _run("ip", "-n", name, "address", "add", f"{there}/30", "dev", inner)
    _run("ip", "-n", name, "link", "set", inner, "mtu", str(MTU), "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    if rate:
        bucket = ["rate", f"{rate}bit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_S * 1000:g}ms"]
        _run("tc", "-n", name, "qdisc", "add", "dev", inner, "root", "tbf", *bucket)
    return Namespace(name, str(here), str(there), rate)


def _wait(made: Namespace) -> None:
    """Ends what runs in the namespace and waits for our own children among it, so that they are no zombies."""
    _end_processes(made.name)
    for process in made.started:
        process.terminate()  # one that was just started may not have entered it yet
        process.wait(timeout=END_TIMEOUT_S)


def _remove(name: str, subnet: int) -> None:
    """Takes everything of `name` away, whatever of it exists. Signals wait until it is done: half a removal is a leak."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        _end_processes(name)
        # The link by name: deleting a namespace frees its devices only once its last socket is gone, some time later.
        _run("ip", "link", "delete", _interface(subnet), check=False)
        if name in _names():
            _run("ip", "netns", "delete", name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_processes(name: str) -> None:
    """Ends whatever runs in the namespace, politely first: each process hears each signal once, also one that enters meanwhile."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_TIMEOUT_S
        told: set[int] = set()
        while (pids := set(_pids(name))) and time.monotonic() < deadline:
            for pid in pids - told:
                _signal(pid, signum)
            told |= pids
            time.sleep(0.02)


def _pids(name: str) -> list[int]:
    """Processes inside that still run. A zombie has no namespace any more, so one that nobody waited for is not counted."""
    if name not in _names():
        return []
    return [int(pid) for pid in _run("ip", "netns", "pids", name, check=False).split()]


def _signal(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def _names() -> list[str]:
    try:
        return [entry.name for entry in _NAMESPACES.iterdir()]
    except FileNotFoundError:
        return []


def _interface(subnet: int) -> str:
    return f"manta{subnet}"


def _addresses(subnet: int) -> tuple[IPv4Address, IPv4Address]:
    base = IPv4Address(int(SUBNETS.network_address) + 4 * subnet)
    return base + 1, base + 2


def _free_subnet(first: int) -> int:
    """The next subnet from `first` on that no interface here uses, whoever made it. The caller holds the lock."""
    taken = {
        (int(address) - int(SUBNETS.network_address)) // 4
        for text in re.findall(r"inet (\d+\.\d+\.\d+\.\d+)", _run("ip", "-4", "-o", "address"))
        if (address := IPv4Address(text)) in SUBNETS
    }
    named = {int(match[3]) for name in _names() if (match := _NAME.fullmatch(name))}
    for offset in range(SUBNET_COUNT):
        subnet = (first + offset) % SUBNET_COUNT
        if subnet not in taken | named:
            return subnet
    raise Unavailable(f"all {SUBNET_COUNT} subnets of {SUBNETS} are in use")


def _start_time(pid: int) -> int:
    """When the process started, in ticks since boot: with the pid it names a process for good. -1 where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return int(stat.rpartition(")")[2].split()[19])


def _status_field(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise MantaError(f"/proc/self/status has no {name}")


def _run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if check and done.returncode:
        raise MantaError(f"{' '.join(argv)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process by SystemExit, so that the `with` blocks end, unless the program handles them itself."""
    signals = [signum for signum in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        signals = []  # only the main thread may set handlers; its owner sees to them

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + signum)

    for signum in signals:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in signals:
            signal.signal(signum, signal.SIG_DFL)
