"""Reads of a sealed blob go to its file in the cache and never to the daemon; and where they cannot, everything works as before.

That the daemon is not asked is shown by stopping it: who reads on without it reads from the kernel, and what the kernel has in its page
cache of a file is dropped before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manta.testing.hub import HubProcess, faults
from manta.testing.hub.standard import MODEL
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE, true_digest
from tests.mount.holder import Holder
from tests.mount.node import Node, python, run, wait_until

pytestmark = pytest.mark.only("kernel")

MIB = 1024 * 1024
PAGE = 4096

STATE = 'import json, os, sys; print(json.dumps(os.getxattr(sys.argv[1], "user.manta.state").decode()))'


SMALL = {"MANTA_FUSE_COMPLETE_AT_OPEN": "64MiB"}
"""So that BIG_FILE is a small one."""


def seal(path: Path) -> None:
    """Reads the whole file and waits until its blob is sealed."""
    run('cat "$1" > /dev/null', path)
    wait_until(lambda: python(STATE, path) == "sealed")


@contextmanager
def stopped(node: Node) -> Iterator[None]:
    """The daemon and its keeper do nothing meanwhile. Only those who ask nothing of them may be told to do something."""
    pids = [*node.keepers(), *node.daemons()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def backing(hub: HubProcess, node: Node) -> Path:
    digest = hub.files(BIG).files[BIG_FILE].sha256
    return node.cache / "blobs" / digest[:2] / f"sha256-{digest}.data"


def is_native(node: Node, holder: Holder, name: str) -> bool:
    """Whether what it has open is read from the backing file."""
    with stopped(node):
        holder.do("forget_pages", name)
        holder.tell("digest", name, 8 * MIB, 12 * MIB)
        try:
            holder.answer(timeout_s=3)
            return True
        except TimeoutError:
            pass
    holder.answer()
    return False


# Sealed files ------------------------------------------------------------------------------------------------------------


def test_reads_and_mappings_of_a_sealed_file_never_reach_the_daemon(node: Node) -> None:
    directory = node.mount(BIG)
    seal(directory / BIG_FILE)
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        before = node.status()["read_bytes"]
        with stopped(node):
            holder.do("forget_pages", "weights")
            assert holder.do("digest", "weights", 0, BIG_SIZE, timeout_s=20) == true_digest(0, BIG_SIZE)
            holder.do("map", "mapped", "weights")
            holder.do("forget_pages", "weights")
            assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE, timeout_s=20) == true_digest(0, BIG_SIZE)
        assert node.status()["read_bytes"] == before


def test_the_page_cache_has_it_once(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    seal(directory / BIG_FILE)
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        holder.do("open", "backing", backing(hub, node))
        holder.do("map", "mapped", "weights")
        assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("pages", "backing") >= BIG_SIZE // PAGE
        assert holder.do("pages", "weights") <= 1, "of the mount's own file"


def test_a_file_that_is_sealed_while_it_is_open_is_native_for_the_next_who_opens_it(
    hub: HubProcess, node: Node
) -> None:
    hub.set_bandwidth(30 * MIB)
    directory = node.mount(BIG)
    with Holder() as early, Holder() as late:
        inode = early.do("open", "weights", directory / BIG_FILE)
        early.do("map", "mapped", "weights")
        assert early.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        seal(directory / BIG_FILE)
        assert late.do("open", "weights", directory / BIG_FILE) == inode
        assert is_native(node, late, "weights")
        # Who had it open reads on as it began, by both ways, and is the same file to anyone who compares.
        assert not is_native(node, early, "weights")
        assert early.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert early.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert early.do("stat", directory / BIG_FILE) == late.do("stat", directory / BIG_FILE) == [inode, BIG_SIZE]
        # Opened by a magic link there is no name that could lead elsewhere: the file as it is.
        assert early.do("open_again", "linked", "weights") == inode
        assert early.do("digest", "linked", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert late.do("open_again", "linked", "weights") == inode
        assert is_native(node, late, "linked")
        early.do("close", "weights")
        early.do("close", "linked")
        assert early.do("open", "anew", directory / BIG_FILE) == inode
        assert late.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
    with Holder() as later:
        assert later.do("open", "weights", directory / BIG_FILE) == inode
        assert is_native(node, later, "weights")


def test_a_small_file_is_native_from_its_first_read(node: Node) -> None:
    node.environment |= SMALL
    directory = node.mount(BIG)
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        with stopped(node):
            assert holder.do("digest", "weights", 0, BIG_SIZE, timeout_s=20) == true_digest(0, BIG_SIZE)


def test_a_small_file_that_does_not_come_opens_all_the_same(hub: HubProcess, node: Node) -> None:
    """Its reader hears what is wrong when it reads; and it is whole when the hub is."""
    node.environment |= SMALL | {"MANTA_FETCH_READ_TIMEOUT_S": "4", "MANTA_FETCH_STALL_S": "1"}
    directory = node.mount(BIG)
    hub.add_fault(faults.Stall(after_bytes=0, seconds=120), origin="cdn", file=BIG_FILE)
    with Holder() as holder:
        inode = holder.do("open", "weights", directory / BIG_FILE)
        with pytest.raises(OSError, match="Input/output error"):
            holder.do("digest", "weights", 0, MIB)
        hub.clear_faults()
        wait_until(lambda: digest(holder, "weights") == true_digest(0, MIB))
        assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("stat", directory / BIG_FILE)[0] == inode


def digest(holder: Holder, name: str) -> object:
    try:
        return holder.do("digest", name, 0, MIB)
    except OSError:
        return None


def test_no_open_fails_whenever_the_blob_is_sealed(hub: HubProcess, node: Node) -> None:
    """Many who open, read, reopen by name and by link, and close, from before the first byte until after the seal."""
    script = """
import json, os, random, sys
path, seed, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
rng, opens, last = random.Random(seed), 0, 0
while last < 50:
    last += os.getxattr(path, "user.manta.state") == b"sealed"
    fds = [os.open(path, os.O_RDONLY) for _ in range(rng.randrange(1, 4))]
    fds += [os.open(f"/proc/self/fd/{rng.choice(fds)}", os.O_RDONLY)]
    opens += len(fds)
    at = rng.randrange(size - 100)
    assert len({os.pread(fd, 100, at) for fd in fds}) == 1
    assert len({os.fstat(fd).st_ino for fd in fds}) == 1
    for fd in fds:
        os.close(fd)
print(json.dumps(opens))
"""
    hub.set_bandwidth(20 * MIB)
    directory = node.mount(BIG)
    command = [sys.executable, "-c", script, str(directory / BIG_FILE)]
    openers = [
        subprocess.Popen(
            [*command, str(seed), str(BIG_SIZE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in range(6)
    ]
    try:
        for opener in openers:
            out, error = opener.communicate(timeout=90)
            assert opener.returncode == 0, error
            assert int(out) > 100
    finally:
        for opener in openers:
            opener.kill()
            opener.communicate(timeout=30)
    wait_until(lambda: node.status()["open_files"] == 0)


# The cache under native readers ------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_verify_repairs_under_native_readers(hub: HubProcess, node: Node) -> None:
    directory = node.mount(BIG)
    seal(directory / BIG_FILE)
    with Holder() as holder, Holder() as later:
        holder.do("open", "weights", directory / BIG_FILE)
        holder.do("map", "mapped", "weights")
        flip(backing(hub, node), 20 * MIB)
        found = node.manta("cache", "verify", "--repair", code=1)
        assert "1 damaged chunk" in found.stderr
        # Whoever has it open has the right bytes too, and who opens it now.
        assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert later.do("open", "weights", directory / BIG_FILE) == holder.do("stat", directory / BIG_FILE)[0]
        assert later.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        wait_until(lambda: python(STATE, directory / BIG_FILE) == "sealed")
        assert "all match the hub's digests" in node.manta("cache", "verify", "--full").stdout
    with Holder() as fresh:
        fresh.do("open", "weights", directory / BIG_FILE)
        assert is_native(node, fresh, "weights")


def test_what_is_open_natively_is_not_evicted(hub: HubProcess, node: Node) -> None:
    keep = node.mount(MODEL)
    directory = node.mount(BIG)
    seal(directory / BIG_FILE)
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        holder.do("map", "mapped", "weights")
        node.manta("umount", "--lazy", str(directory))
        node.manta("cache", "gc", "--size", "0", code=None)
        assert backing(hub, node).exists()
        holder.do("forget_pages", "weights")
        assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
    wait_until(lambda: node.status()["open_files"] == 0)
    node.manta("cache", "gc", "--size", "0", code=None)
    wait_until(lambda: not backing(hub, node).exists())
    assert "hidden_size" in run('cat "$1/config.json"', keep)


# Without ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["passthrough", "resend"])
def test_a_kernel_that_cannot_do_it(hub: HubProcess, node: Node, feature: str) -> None:
    node.environment["MANTA_FUSE_WITHOUT"] = feature
    directory = node.mount(BIG)
    path = directory / BIG_FILE
    seal(path)
    with Holder() as holder:
        inode = holder.do("open", "weights", path)
        assert is_native(node, holder, "weights") == (feature != "passthrough")
        holder.do("map", "mapped", "weights")
        assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        assert holder.do("stat", path) == [inode, BIG_SIZE]
    status = node.status()
    refused = {"passthrough": "native_refusal", "resend": "survival_refusal"}
    assert {name for name in refused if "fuse.without" in status[refused[name]]} == {feature}
    pids = node.daemons()
    os.kill(pids[0], signal.SIGKILL)
    if feature == "resend":
        node.manta("mount", BIG, str(directory))
    assert run('sha256sum "$1"', path).split()[0] == hub.files(BIG).files[BIG_FILE].sha256
    assert hub.blob_traffic(BIG, BIG_FILE).sent == BIG_SIZE


@contextmanager
def filesystem(node: Node, kind: str) -> Iterator[None]:
    """A tmpfs or an overlay where the cache will be."""
    node.cache.mkdir()
    if kind == "tmpfs":
        run('mount -t tmpfs -o size=400m manta-test "$1"', node.cache)
    else:
        for name in ("lower", "upper", "work"):
            (node.path / name).mkdir()
        layers = f"lowerdir={node.path}/lower,upperdir={node.path}/upper,workdir={node.path}/work"
        run('mount -t overlay -o "$2" manta-test "$1"', node.cache, layers)
    try:
        yield
    finally:
        try:
            node.unmount_all()
        finally:
            run('umount "$1"', node.cache)


@pytest.mark.parametrize("kind", ["tmpfs", "overlay"])
def test_a_cache_on_another_filesystem(hub: HubProcess, node: Node, kind: str) -> None:
    """On tmpfs as on a disk; what the kernel refuses is read as before, and said."""
    with filesystem(node, kind):
        directory = node.mount(BIG)
        seal(directory / BIG_FILE)
        with Holder() as holder:
            inode = holder.do("open", "weights", directory / BIG_FILE)
            assert is_native(node, holder, "weights") == (kind == "tmpfs")
            assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
            holder.do("map", "mapped", "weights")
            assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
            assert holder.do("stat", directory / BIG_FILE) == [inode, BIG_SIZE]
        if kind == "overlay":
            assert "overlay" in node.manta("doctor", code=None).stdout
        assert hub.blob_traffic(BIG, BIG_FILE).sent == BIG_SIZE
