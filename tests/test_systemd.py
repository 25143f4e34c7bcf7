"""deploy/systemd/manta.service: what it says, and that systemd does it: where it is installed, it is booted in namespaces of its own.

There it runs the shipped unit with a toy in the place of the daemon, which deposits with the daemon's own `Keeping`, and is killed.
"""

from __future__ import annotations

import configparser
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from manta import keeper
from manta.operations.watchdog import END_SECONDS_MAX

ROOT = Path(__file__).parents[1]
UNIT = ROOT / "deploy/systemd/manta.service"
MOUNT = ROOT / "deploy/systemd/manta-mount@.service"
BINARY = Path("/usr/lib/systemd/systemd")
TIMEOUT_S = 60.0

NEEDS_MOUNT_NAMESPACE = {
    "PrivateTmp",
    "PrivateDevices",
    "PrivateMounts",
    "ProtectSystem",
    "ProtectHome",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectProc",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "InaccessiblePaths",
    "TemporaryFileSystem",
    "BindPaths",
    "MountFlags",
    "RootDirectory",
    "DynamicUser",
}
"""In one, what the daemon mounts is seen by itself alone (systemd.exec(5))."""


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def seconds(text: str) -> float:
    return float(text[:-2]) / 1000 if text.endswith("ms") else float(text.removesuffix("s"))


def test_systemd_is_a_keeper_with_the_rules_of_our_own(unit: configparser.ConfigParser) -> None:
    service, limits = unit["Service"], unit["Unit"]
    assert int(service["FileDescriptorStoreMax"]) == keeper.FDS_MAX
    assert service["FileDescriptorStorePreserve"] == "restart"
    assert service["Restart"] == "on-failure"
    assert int(service["RestartForceExitStatus"]) == keeper.RESTART
    assert seconds(service["RestartSec"]) == keeper.PAUSE_S
    assert (int(limits["StartLimitBurst"]), seconds(limits["StartLimitIntervalSec"])) == (
        keeper.CRASHES_MAX,
        keeper.CRASHES_S,
    )
    assert seconds(service["TimeoutStartSec"]) == keeper.GIVE_UP_S / 2
    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "main", "mixed")


def test_an_orderly_end_has_its_time_and_what_is_mounted_is_seen_by_all(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert seconds(service["TimeoutStopSec"]) > END_SECONDS_MAX
    assert not set(service) & NEEDS_MOUNT_NAMESPACE
    assert "CAP_SYS_ADMIN" in service["CapabilityBoundingSet"].split()
    assert service["DeviceAllow"] == "/dev/fuse rw"
    assert service["RuntimeDirectoryPreserve"] == "yes", "the mount is in it"


def test_a_mount_is_made_by_the_daemon_of_the_unit_and_again_with_the_next_one() -> None:
    text = MOUNT.read_text()
    for relation in ("Requires", "PartOf", "After"):
        assert f"\n{relation}=manta.service\n" in text
    assert text.index("EnvironmentFile=-/etc/manta/environment\n") < text.index(
        "EnvironmentFile=/etc/manta/mounts/%i\n"
    )
    assert "Environment" not in {line.partition("=")[0] for line in text.splitlines()}, (
        "tokens are in files of mode 0600"
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
@pytest.mark.parametrize("instance", ["manta.service", "manta-mount@gemma.service"])
def test_systemd_can_read_it(tmp_path: Path, instance: str) -> None:
    for shipped in (UNIT, MOUNT):
        (tmp_path / shipped.name).write_text(
            shipped.read_text().replace("=manta ", "=/bin/true ").replace("=-manta ", "=-/bin/true ")
        )
    path = tmp_path / instance
    if not path.exists():
        path.symlink_to(MOUNT.name)
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False, timeout=60)
    # A key that this version does not know yet is told of, and no mistake.
    said = [
        line for line in done.stderr.splitlines() if "FileDescriptorStorePreserve" not in line and str(tmp_path) in line
    ]
    assert (done.returncode, said) == (0, [])


# The real one --------------------------------------------------------------------------------------------------------

TOY = """
import json, os, signal, sys
import trio
from manta.operations.keeping import Keeping
place = sys.argv[1]

async def main():
    with Keeping.from_environment() as keeping:
        inherited = {name: os.pread(fd, 20, 0).decode() for name, fd in keeping.inherited.items()}
        for name in ("fuse", "journal"):
            fd = keeping.inherited.get(name, -1)
            if fd == -1:
                fd = os.memfd_create(name)
                os.write(fd, name.encode())
            await keeping.deposit(name, fd)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        keeping.ready()
        with open(place + "/lives", "a") as lives:
            lives.write(json.dumps([inherited, keeping.describe(), keeping.problem]) + chr(10))
        await trio.to_thread.run_sync(signal.sigwait, [signal.SIGUSR1])
        return 75

sys.exit(trio.run(main))
"""

BOOT = """
set -e
echo $$ > "$1/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc --propagation private bash -c '
set -e
mount -t proc proc /proc
for at in /run /var/cache; do mount -t tmpfs tmpfs $at; done
mkdir /run/systemd
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
export container=manta SYSTEMD_UNIT_PATH="$1"
exec "$2" --system --unit=manta.service --log-target=console --show-status=no
' - "$2" "$3" < /dev/null
"""


def cgroup2() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            return Path(fields.split()[4])
    return None


def until(condition: Callable[[], bool], said: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"it did not come true in time: {said.read_text(errors='replace')[-2000:]}"
        time.sleep(0.02)


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the toy writes; systemd's units and what it says are there too. Ends with systemd, and all that it runs."""
    groups = cgroup2()
    if os.geteuid() != 0 or not BINARY.exists() or groups is None:
        pytest.skip("needs root, systemd and cgroup2")
    probe = ["unshare", "--pid", "--fork", "--mount", "--cgroup", "mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]
    if subprocess.run(probe, capture_output=True, check=False, timeout=TIMEOUT_S).returncode:
        pytest.skip("no namespaces can be made here")
    with tempfile.TemporaryDirectory(prefix="manta-systemd-", dir="/tmp") as folder:
        place = Path(folder)
        (place / "toy.py").write_text(TOY)
        (place / "units").mkdir()
        text = UNIT.read_text().replace("ExecStart=manta daemon", f"ExecStart={sys.executable} {place}/toy.py {place}")
        text = text.replace("[Unit]\n", "[Unit]\nDefaultDependencies=no\n")
        text = text.replace(
            "[Service]\n",
            f"[Service]\nStandardOutput=append:{place}/said\nStandardError=append:{place}/said\n"
            f"Environment=PYTHONPATH={ROOT}\n",
        )
        (place / "units/manta.service").write_text(text)
        group = groups / place.name
        try:
            group.mkdir()
        except OSError as e:
            pytest.skip(f"no cgroup can be made here: {e.strerror}")
        try:
            with (place / "said").open("wb") as said:
                booted = subprocess.Popen(
                    ["bash", "-c", BOOT, "-", group, place / "units", BINARY], stdout=said, stderr=said
                )
            try:
                yield place
            finally:
                booted.kill()  # and with it process 1 of the namespace, and so everything in it
                booted.wait(timeout=TIMEOUT_S)
        finally:
            until(lambda: _removed(group), place / "said")


def _removed(group: Path) -> bool:
    """Whether the cgroup is gone: the kernel keeps one in which something is still dying."""
    for path in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_what_is_deposited_survives_kills_and_handovers_under_systemd(place: Path) -> None:
    def lives() -> list[Any]:
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in (place / "lives").read_text().splitlines()]
        return []

    def toy() -> int:
        mark = os.fsencode(place / "toy.py")
        for name in os.listdir("/proc"):
            with suppress(OSError):
                if name.isdecimal() and mark in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                    return int(name)
        raise AssertionError("the toy does not run")

    for number, how in enumerate((signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL), 1):
        until(lambda number=number: len(lives()) >= number, place / "said")  # type: ignore[misc]
        os.kill(toy(), how)
    until(lambda: len(lives()) == 4, place / "said")
    first, *others = lives()
    assert first == [{}, "systemd, holds fuse, journal", None]
    assert others == [[{"fuse": "fuse", "journal": "journal"}, "systemd, holds fuse, journal", None]] * 3
