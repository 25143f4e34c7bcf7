"""Without root: one mount per daemon through fusermount3, in a mount namespace of its own.

The user is 65534 with one capability, to read files: the interpreter of this machine may lie in root's home. /dev/fuse is shadowed by a
node that everybody may open, as udev makes it on ordinary hosts; both are gone with the namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess
from manta.testing.hub.standard import MODEL
from tests.mount.node import SESSION, Node

USER = "65534"

SETUP = f"""
set -e
mknod "$1/fuse" c 10 229
chmod 666 "$1/fuse"
mount --bind "$1/fuse" /dev/fuse
chown -R {USER}:{USER} "$1"
exec setpriv --reuid {USER} --regid {USER} --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search bash -c "$2" - "$1"
"""

SCENARIO = """
cd /tmp
manta mount "$MODEL" "$1/one" >&2 || exit 10
sha256sum "$1/one/model.safetensors" | cut -d' ' -f1
manta mount "$MODEL" "$1/two" 2>&1 && exit 11
touch "$1/one/new" 2>&1 && exit 12
manta status --json
manta umount "$1/one" >&2 || exit 13
manta mount "$MODEL" "$1/two" >&2 || exit 14
fusermount3 -u "$1/two" || exit 15
ls -A "$1/two" | wc -l
for attempt in $(seq 100); do ls "$1"/run/*/control.sock >/dev/null 2>&1 || break; sleep 0.1; done
grep -c "fuse.manta $1" /proc/mounts
exit 0
"""


@pytest.mark.skipif(
    not shutil.which("setpriv") or not shutil.which("fusermount3"), reason="needs setpriv and fusermount3"
)
def test_one_mount_at_a_time_through_fusermount(hub: HubProcess, node: Node) -> None:
    if node.session == "kernel":
        node.environment[SESSION] = "auto"  # which takes the other one here: the kernel session is root's
    for name in ("one", "two"):
        (node.path / name).mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", SETUP, "-", str(node.path), SCENARIO],
        env=node.environment | {"PATH": path, "MODEL": MODEL},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr + node.log()
    digest, refusal, readonly, status, left, mounted = done.stdout.splitlines()
    assert digest == hub.files(MODEL).files["model.safetensors"].sha256
    assert "Without root" in refusal
    assert "--cache-dir" in refusal
    assert "Read-only file system" in readonly
    assert json.loads(status)["fuse"] == "pyfuse3"
    [mount] = json.loads(status)["mounts"]
    assert mount["source"] == mount["directory"] == f"{node.path}/one"
    assert (left, mounted) == ("0", "0")
