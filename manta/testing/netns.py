"""Network namespaces for tests and benchmarks, here and only here: a place for a process at the far end of a link of known rate.

A namespace is joined to this one by a veth pair, and what is sent from inside it passes a token bucket (tc tbf). The hub runs inside and
its readers outside, so the link limits the bytes that come and leaves requests alone. Used by `benchmarks` and by tests marked netns;
`cluster_net` builds a switch with many links of the same parts. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN (root), and ip, tc and nsenter;
`obstacle` says what is missing.

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

DEVICE = "eth0"
"""The one device of a namespace, besides loopback."""

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
_NAME = re.compile(r"manta-(\d+)-(\d+)-(\w+)")
"""Owner's pid, its start time, and what it is: here the number of its subnet."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A namespace that exists, and how processes get into it."""

    name: str
    address: str
    """What a server inside binds to, and what others reach it at."""
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

    def end(self) -> None:
        """Ends what runs inside and waits for our own children among it, so that they are no zombies."""
        _end_processes(self.name)
        for process in self.started:
            process.terminate()  # one that was just started may not have entered it yet
            process.wait(timeout=END_TIMEOUT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace(Place):
    """A place at the far end of a link to this namespace."""

    host_address: str
    """This side's end of the link."""
    rate: int
    """Bits per second from inside to outside, frames included; 0 is no limit."""


@contextmanager
def namespace(rate: int = 0) -> Iterator[Namespace]:
    """A namespace behind a link of `rate` bits per second (0: unlimited), gone at the end. First sweeps what killed owners left."""
    with ExitStack() as stack:
        stack.enter_context(termination_unwinds())
        with making():
            subnet = _free_subnet(os.getpid())
            name = owned_name(str(subnet))
            stack.callback(remove, name)
            made = _build(name, subnet, rate)
        stack.callback(made.end)
        yield made


@contextmanager
def making() -> Iterator[None]:
    """The lock under which namespaces are made, here and by other processes; what killed owners left is swept first.

    Raises Denied where none can be made.
    """
    if reason := obstacle():
        raise Denied(reason)
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep()
        yield


def owned_name(what: str) -> str:
    """The name of a namespace of this process. `what` tells it from the others: letters and digits."""
    return f"manta-{os.getpid()}-{_start_time(os.getpid())}-{what}"


def sweep() -> list[str]:
    """Removes the namespaces whose owners are gone, and returns their names."""
    removed = []
    for name in _names():
        match = _NAME.fullmatch(name)
        if match and _start_time(int(match[1])) != int(match[2]):
            remove(name)
            removed.append(name)
    return removed


def _build(name: str, subnet: int, rate: int) -> Namespace:
    here, there = _addresses(subnet)
    outer = f"manta{subnet}"
    run("ip", "netns", "add", name)
    run("ip", "link", "add", outer, "mtu", str(MTU), "type", "veth", "peer", "name", DEVICE, "netns", name)
    run("ip", "address", "add", f"{here}/30", "dev", outer)
    run("ip", "link", "set", outer, "up")
    connect(name, f"{there}/30")
    limit(name, DEVICE, rate)
    return Namespace(name=name, address=str(there), host_address=str(here), rate=rate)


def connect(name: str, address: str) -> None:
    """Gives the namespace's end of its link an address (with prefix length) and takes it and loopback up."""
    run("ip", "-n", name, "address", "add", address, "dev", DEVICE)
    run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")
    run("ip", "-n", name, "link", "set", "lo", "up")


def limit(name: str, device: str, rate: int) -> None:
    """What the namespace sends by `device` goes at `rate` bits per second from now on; 0: without limit."""
    if rate:
        bucket = ["rate", f"{rate}bit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_S * 1000:g}ms"]
        run("tc", "-n", name, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)
    else:
        run("tc", "-n", name, "qdisc", "delete", "dev", device, "root", check=False)  # there may be none


def remove(name: str) -> None:
    """Takes everything of `name` away, whatever of it exists. Signals wait until it is done: half a removal is a leak."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        _end_processes(name)
        if name in _names():
            # The link by itself: deleting a namespace frees its devices only once its last socket is gone, some time later.
            run("ip", "-n", name, "link", "delete", DEVICE, check=False)
            run("ip", "netns", "delete", name)
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
    return [int(pid) for pid in run("ip", "netns", "pids", name, check=False).split()]


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


def _addresses(subnet: int) -> tuple[IPv4Address, IPv4Address]:
    base = IPv4Address(int(SUBNETS.network_address) + 4 * subnet)
    return base + 1, base + 2


def _free_subnet(first: int) -> int:
    """The next subnet from `first` on that no interface here uses, whoever made it. The caller holds the lock."""
    taken = {
        (int(address) - int(SUBNETS.network_address)) // 4
        for text in re.findall(r"inet (\d+\.\d+\.\d+\.\d+)", run("ip", "-4", "-o", "address"))
        if (address := IPv4Address(text)) in SUBNETS
    }
    named = {int(match[3]) for name in _names() if (match := _NAME.fullmatch(name)) and match[3].isdigit()}
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


def run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if check and done.returncode:
        raise MantaError(f"{' '.join(argv)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


@contextmanager
def termination_unwinds() -> Iterator[None]:
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
