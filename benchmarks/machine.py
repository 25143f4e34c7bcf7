"""What this machine is and which code this is, and the programs a benchmark needs, here and only here. Used by `benchmarks.__main__`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.report import Cell
from manta.errors import Absent
from manta.testing.scratch import mountinfo

PACKAGES = {
    "curl": "curl",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
    "fusermount3": "fuse3",
    "aria2c": "aria2",
    "rclone": "rclone",
    "openssl": "openssl",
    "nginx": "nginx-light",
}
"""The Debian package of each program that a benchmark may ask for."""

APT_TIMEOUT_S = 300
GIT_TIMEOUT_S = 20


def describe(folder: Path) -> dict[str, Cell]:
    """What a reader of the figures needs to judge them. `folder` is where the cache lies."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_field(Path("/proc/meminfo"), "MemTotal").split()[0]) * 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cache_filesystem": filesystem(folder),
    }


def filesystem(folder: Path) -> str:
    """The type of the filesystem that holds `folder`."""
    where = folder.resolve()
    holding = [(point, kind) for point, _, kind in mountinfo() if where.is_relative_to(point)]
    # Of mounts on the same point the last one counts, which is the one that max() must see last.
    return max(enumerate(holding), key=lambda entry: (len(entry[1][0].parts), entry[0]))[1][1] if holding else "unknown"


def commit(repository: Path) -> str:
    """The commit that is checked out, "+changes" where the working tree differs; empty outside of git."""
    try:
        head = _git(repository, "rev-parse", "HEAD").strip()
        changed = _git(repository, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head}+changes" if changed else head


def require(programs: Iterable[str]) -> None:
    """Makes sure that `programs` are there: installs their packages as root where apt-get is, else raises Absent naming them."""
    missing = [program for program in programs if shutil.which(program) is None]
    if not missing:
        return
    packages = sorted({PACKAGES[program] for program in missing})
    wanted = f"This benchmark needs {', '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Absent(
            f"{wanted}: install {' '.join(packages)} (apt-get install {' '.join(packages)}), then run it again."
        )
    print(f"installing {' '.join(packages)}", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages],
    ):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False
        )
        if done.returncode:
            raise Absent(f"{wanted}, and {' '.join(command)} failed: {done.stderr.strip()}")


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", "-C", str(repository), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S).stdout


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
