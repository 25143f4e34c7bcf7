"""`manta doctor`: whether this machine can run Manta, check by check, each with what was found and what to do.

A check is a function that returns a `Check` and raises nothing; `CHECKS` is their list. Checks look and never change anything.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from manta.cli.invocation import Invocation
from manta.cli.render import size
from manta.config import Config, Loaded, find_token
from manta.control.binding import Answer, mounts, probe
from manta.control.client import connect
from manta.errors import MantaError, NotRunning

Level = Literal["ok", "warn", "fail"]

HUB_S = 10.0
DISK_FREE_MIN = 5 * 1000**3
"""Below this a warning: even a small language model in 16 bit is larger."""
FILES_MIN = 1024
"""Open files a daemon needs: 512 for connections, workers and the cache files in use, and as many cache files that it keeps open."""

_CAP_SYS_ADMIN = 21
_MARK = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
# Filesystems whose files can go away, stall, or lack holes: the cache is a set of sparse files on a disk of this machine.
_POOR_FILESYSTEMS = {
    "tmpfs": "it is memory, and empty after a restart",
    "ramfs": "it is memory, and empty after a restart",
    "nfs": "it is on the network",
    "nfs4": "it is on the network",
    "cifs": "it is on the network",
    "9p": "it is on the network or the host",
    "overlay": "kernel passthrough reads need a filesystem below it, such as ext4 or xfs",
    "vfat": "it has no sparse files",
    "exfat": "it has no sparse files",
}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the checks look: the real machine, or a test's."""

    fuse_device: Path = Path("/dev/fuse")
    fuse_conf: Path = Path("/etc/fuse.conf")
    proc_status: Path = Path("/proc/self/status")
    release: str = field(default_factory=lambda: os.uname().release)
    user_id: int = field(default_factory=os.geteuid)
    python: tuple[int, ...] = sys.version_info[:3]


def doctor(invocation: Invocation) -> int:
    console = invocation.console
    loaded: Loaded | None = None
    try:
        loaded = invocation.loaded
        found = [Check("configuration", "ok", _sources(loaded))]
    except MantaError as error:
        found = [Check("configuration", "fail", error.message, "Correct it; the checks that need it were left out.")]
    found += examine(loaded, Machine())
    console.document({"checks": [asdict(check) for check in found], "healthy": not _failed(found)})
    width = max(len(check.name) for check in found)
    for check in found:
        console.say(f"{_MARK[check.level]}  {check.name:<{width}}  {check.found}")
        if check.advice and check.level != "ok":
            console.say(f"{'':{width + 8}}{check.advice}")
    failed = _failed(found)
    warned = [check.name for check in found if check.level == "warn"]
    console.say("")
    if failed:
        console.say(f"Manta cannot work here yet: {', '.join(failed)}.")
    else:
        console.say("Manta can work here." + (f" Worth a look: {', '.join(warned)}." if warned else ""))
    return 1 if failed else 0


def examine(loaded: Loaded | None, machine: Machine) -> list[Check]:
    """All checks in order; without a configuration, those that need none."""
    found = [check(machine) for check in MACHINE_CHECKS]
    if loaded is not None:
        found += [check(loaded.config) for check in CONFIG_CHECKS]
    return found


def _failed(found: list[Check]) -> list[str]:
    return [check.name for check in found if check.level == "fail"]


def _sources(loaded: Loaded) -> str:
    names = dict.fromkeys(origin.name for origin in loaded.origins.values() if origin.name)
    return f"from {', '.join(names)}" if names else "defaults"


# The machine ---------------------------------------------------------------------------------------------------------


def _python(machine: Machine) -> Check:
    version = ".".join(map(str, machine.python))
    if machine.python < (3, 11):
        return Check("python", "fail", version, "Manta needs Python 3.11 or newer.")
    return Check("python", "ok", f"{version} ({sys.executable})")


def _fuse_device(machine: Machine) -> Check:
    name, device = "fuse device", machine.fuse_device
    try:
        mode = device.stat().st_mode
    except OSError:
        return Check(
            name,
            "fail",
            f"{device} does not exist",
            "Load the module (modprobe fuse). In a container: docker run --device /dev/fuse --cap-add SYS_ADMIN.",
        )
    if not stat.S_ISCHR(mode):
        return Check(name, "fail", f"{device} is no device", "Remove it and make it anew: mknod /dev/fuse c 10 229.")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        advice = "Let this user open it (chmod 0666 /dev/fuse), or in a container allow the device: --device /dev/fuse."
        return Check(name, "fail", f"{device} cannot be opened: {error.strerror}", advice)
    return Check(name, "ok", f"{device} opens")


def _kernel(machine: Machine) -> Check:
    match = re.match(r"(\d+)\.(\d+)", machine.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < (4, 18):
        return Check("kernel", "fail", machine.release, "Manta needs Linux 4.18 or newer.")
    if version < (6, 9):
        advice = "It works; 6.9 and newer can also read cached files without the daemon (passthrough)."
        return Check("kernel", "warn", f"{machine.release}, without FUSE passthrough", advice)
    return Check("kernel", "ok", f"{machine.release}, with FUSE passthrough and re-sent requests")


def _pyfuse3(_: Machine) -> Check:
    try:
        import pyfuse3
    except ImportError as error:
        advice = "Install libfuse (apt-get install fuse3 libfuse3-dev pkg-config gcc), then pip install pyfuse3."
        return Check("libfuse", "fail", f"pyfuse3 cannot be imported: {error}", advice)
    return Check(
        "libfuse", "ok", f"pyfuse3 {importlib.metadata.version('pyfuse3')} from {Path(pyfuse3.__file__).parent}"
    )


def _fusermount(machine: Machine) -> Check:
    name, path = "fusermount3", shutil.which("fusermount3")
    needed: Level = "ok" if machine.user_id == 0 else "fail"
    if path is None:
        found = "not installed" + (", and root needs none" if machine.user_id == 0 else "")
        return Check(name, needed, found, "Users other than root need it: apt-get install fuse3.")
    if not os.stat(path).st_mode & stat.S_ISUID:
        found = f"{path} is not set-uid" + (", and root needs none" if machine.user_id == 0 else "")
        return Check(name, needed, found, f"Users other than root need it set-uid: chmod u+s {path}, as root.")
    return Check(name, "ok", f"{path}, {_version(path)}")


def _version(program: str) -> str:
    """What it prints for --version: that of the installed libfuse, which has no other way to ask."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=HUB_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "version unknown"
    return (done.stdout.strip().splitlines() or ["version unknown"])[0].replace("fusermount3 version:", "libfuse")


def _privileges(machine: Machine) -> Check:
    if machine.user_id != 0:
        return Check(
            "privileges",
            "warn",
            f"user {machine.user_id}, not root",
            "One mount per cache directory, through fusermount3. Root can have any number, for all users.",
        )
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(machine.proc_status), re.MULTILINE)
    if capabilities is None or not int(capabilities[1], 16) >> _CAP_SYS_ADMIN & 1:
        advice = "Mounting needs it. In a container: --cap-add SYS_ADMIN (Kubernetes: privileged: true)."
        return Check("privileges", "fail", "root without CAP_SYS_ADMIN", advice)
    return Check("privileges", "ok", "root with CAP_SYS_ADMIN")


def _allow_other(machine: Machine) -> Check:
    if machine.user_id == 0:
        return Check("other users", "ok", "root's mounts are readable by all users")
    if re.search(r"^\s*user_allow_other\s*$", _read(machine.fuse_conf), re.MULTILINE):
        return Check("other users", "ok", f"user_allow_other is set in {machine.fuse_conf}")
    advice = f"To let other users read your mounts, root adds the line user_allow_other to {machine.fuse_conf}."
    return Check("other users", "ok", f"your mounts are readable by you only. {advice}")


def _open_files(_: Machine) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # -1 is RLIM_INFINITY.
    if hard != resource.RLIM_INFINITY and hard < FILES_MIN:
        return Check("open files", "warn", f"at most {hard}", f"Raise the limit to {FILES_MIN} or more (ulimit -Hn).")
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    return Check("open files", "ok", f"{shown[0]}, up to {shown[1]}")


def _stale_mounts(_: Machine) -> Check:
    ours = {entry.directory: probe(entry.directory) for entry in mounts() if entry.is_manta}
    dead = [directory for directory, answer in ours.items() if answer is Answer.DEAD]
    silent = [directory for directory, answer in ours.items() if answer is Answer.SILENT]
    if dead:
        advice = f"Free them: manta umount {dead[-1]}. (A new daemon of the same cache directory does so too.)"
        return Check("mounts", "warn", f"{len(dead)} of {len(ours)} have no daemon any more: {', '.join(dead)}", advice)
    if silent:
        advice = f"Free them: manta umount --lazy {silent[0]}"
        return Check("mounts", "warn", f"do not answer: {', '.join(silent)}", advice)
    return Check("mounts", "ok", f"{len(ours)} of Manta's, all answer" if ours else "none of Manta's")


MACHINE_CHECKS: tuple[Callable[[Machine], Check], ...] = (
    _python,
    _fuse_device,
    _kernel,
    _pyfuse3,
    _fusermount,
    _privileges,
    _allow_other,
    _open_files,
    _stale_mounts,
)


# What the configuration names ----------------------------------------------------------------------------------------


def _cache_directory(config: Config) -> Check:
    directory = config.cache.dir
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    missing = "" if there == directory else " (will be created)"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        advice = "Choose another with --cache-dir or MANTA_CACHE_DIR, or let this user write there."
        return Check("cache directory", "fail", f"{directory} cannot be written: {there} refuses", advice)
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    kind = _filesystem(there)
    found = f"{directory}{missing}: {size(free)} free, {kind}"
    if free <= config.cache.free_space_floor:
        advice = (
            "Nothing would be cached: Manta leaves cache.free_space_floor bytes free. Free some space, or lower it."
        )
        return Check("cache directory", "fail", found, advice)
    if kind in _POOR_FILESYSTEMS:
        return Check(
            "cache directory", "warn", found, f"{kind.capitalize()} is a poor place: {_POOR_FILESYSTEMS[kind]}."
        )
    if free < DISK_FREE_MIN:
        return Check("cache directory", "warn", found, "That is less than most models take.")
    return Check("cache directory", "ok", found)


def _runtime_directory(config: Config) -> Check:
    try:
        path = config.socket_path
    except MantaError as error:
        return Check("runtime directory", "fail", error.message, "Choose a shorter --runtime-dir.")
    folder = config.daemon.runtime_dir
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "Choose another with --runtime-dir or MANTA_DAEMON_RUNTIME_DIR."
        return Check("runtime directory", "fail", f"{folder} cannot be written: {there} refuses", advice)
    return Check("runtime directory", "ok", str(path.parent))


def _daemon(config: Config) -> Check:
    try:
        seen = connect(config).status()
    except NotRunning:
        return Check("daemon", "ok", f"none runs for {config.cache.dir}; `manta mount` starts one")
    except MantaError as error:
        return Check("daemon", "fail", error.message, f"Its log: {config.log_path}")
    survival = f"mounts end with it: {seen.survival_refusal}" if seen.survival_refusal else "mounts outlive it"
    found = f"pid {seen.pid}, version {seen.version}, {len(seen.mounts)} mounts, {seen.fuse} session, {survival}"
    if seen.errors:
        return Check("daemon", "warn", f"{found}; latest error: {seen.errors[-1]}", f"Its log: {config.log_path}")
    return Check("daemon", "ok", found)


def _hub(config: Config) -> Check:
    name, endpoint = "hub", config.hub.endpoint
    if config.hub.offline:
        advice = "Only what is cached can be mounted. Unset HF_HUB_OFFLINE (or hub.offline) to reach the hub."
        return Check(name, "warn", "offline mode is on: the hub is not asked", advice)
    started = time.monotonic()
    try:
        _ask_hub(endpoint, "")
    except OSError as error:
        reason = getattr(error, "reason", error)
        advice = "Check the network, a proxy (HTTPS_PROXY) or the endpoint (--endpoint, HF_ENDPOINT)."
        return Check(name, "fail", f"{endpoint} cannot be reached: {reason}", advice)
    return Check(name, "ok", f"{endpoint} answers after {1000 * (time.monotonic() - started):.0f} ms")


def _token(config: Config) -> Check:
    name, token = "token", find_token()
    if token is None:
        return Check(
            name, "ok", "none: public repos only. `hf auth login` or HF_TOKEN gives access to your own and gated ones"
        )
    if config.hub.offline:
        return Check(name, "ok", f"from {token.origin}; not checked in offline mode")
    try:
        status, body = _ask_hub(config.hub.endpoint, token.value)
    except (OSError, ValueError) as error:
        return Check(name, "warn", f"from {token.origin}; not checked: {getattr(error, 'reason', error)}")
    if status == 401:
        advice = "It was revoked or mistyped: `hf auth login` anew, or correct HF_TOKEN. Public repos may be refused with it too."
        return Check(name, "fail", f"from {token.origin}: {config.hub.endpoint} does not accept it", advice)
    if status != 200:
        return Check(name, "warn", f"from {token.origin}; the hub could not check it (HTTP {status})")
    try:
        user = str(json.loads(body).get("name", ""))
    except (ValueError, AttributeError):
        user = ""
    return Check(name, "ok", f"from {token.origin}, accepted{f' as {user}' if user else ''}")


def _native_reads(config: Config) -> Check:
    """Tried for a moment, on a mount of its own: what the kernel says depends on itself, on privileges and on the cache's filesystem."""
    name = "cached reads"
    if os.geteuid() != 0 or config.fuse.session == "pyfuse3":
        why = "fuse.session is pyfuse3" if config.fuse.session == "pyfuse3" else "only root can have the kernel session"
        return Check(name, "ok", f"through the daemon: {why}")
    if "passthrough" in config.fuse.without:
        return Check(name, "ok", "through the daemon: fuse.without turns passthrough off")
    from manta.fuse.device import try_backing

    directory = config.cache.dir.absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        refusal = try_backing(there)
    except (MantaError, OSError) as error:
        return Check(name, "ok", f"not tried: {error.message if isinstance(error, MantaError) else error.strerror}")
    if refusal:
        advice = (
            "It works, and warm reads cost the daemon's time: use Linux 6.9 or newer, with the cache on ext4 or xfs."
        )
        return Check(name, "warn", f"through the daemon: {refusal}", advice)
    return Check(name, "ok", f"by the kernel itself, at the speed of {there}'s disk (passthrough)")


CONFIG_CHECKS: tuple[Callable[[Config], Check], ...] = (
    _cache_directory,
    _native_reads,
    _runtime_directory,
    _daemon,
    _hub,
    _token,
)


def _ask_hub(endpoint: str, token: str) -> tuple[int, bytes]:
    """Who the hub thinks we are. Any HTTP answer means that it is there; raises OSError when there is none."""
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class NoRedirect(HTTPRedirectHandler):
        # A redirect would carry the token to wherever it points.
        def redirect_request(self, *_: object) -> None:
            return None

    headers = {"User-Agent": "manta-doctor", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        with build_opener(NoRedirect).open(
            Request(f"{endpoint}/api/whoami-v2", headers=headers), timeout=HUB_S
        ) as answer:
            return int(answer.status), bytes(answer.read(65536))
    except HTTPError as error:
        with error:
            return error.code, b""


def _filesystem(path: Path) -> str:
    """The type of the filesystem that `path` is on: that of the longest mountpoint above it."""
    real = os.path.realpath(path)
    above = [e for e in mounts() if os.path.commonpath((e.directory, real)) == e.directory]
    return max(above, key=lambda entry: len(entry.directory)).fstype if above else "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
