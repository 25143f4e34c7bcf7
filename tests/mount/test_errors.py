"""Every way a mount or a read goes wrong: a sentence for the person, the right errno for the reader, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from manta.control.binding import mounts
from manta.testing.hub import HubProcess, faults
from manta.testing.hub.standard import GATED, MODEL, PRIVATE, READER_TOKEN, STRANGER_TOKEN
from tests.mount.conftest import BIG, BIG_FILE
from tests.mount.node import Node, run, wait_until

MIB = 1024 * 1024


def refused(node: Node, *arguments: str, token: str = "") -> str:
    """What `manta mount` says when it refuses; checks that it left nothing."""
    directory = node.directory()
    done = node.manta("mount", *arguments, str(directory), code=None, token=token)
    assert done.returncode not in {0, 2}
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert directory.exists()
    assert not any(entry.directory == str(directory) for entry in mounts())
    return done.stderr


@pytest.mark.above_fuse
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("manta/no-such-repo", ["manta/no-such-repo", "does not exist", "HF_TOKEN"]),
        (f"{MODEL}@no-such-branch", ["no-such-branch"]),
        (f"{MODEL}@" + "0" * 40, ["0000000"]),
        (f"{MODEL}/no/such/folder", ["no/such/folder"]),
        (GATED, [GATED, "gated", "hf auth login"]),
        (PRIVATE, [PRIVATE, "HF_TOKEN"]),
    ],
)
def test_what_the_hub_does_not_show(node: Node, target: str, words: list[str]) -> None:
    sentence = refused(node, target)
    assert all(word in sentence for word in words), sentence


@pytest.mark.above_fuse
def test_a_token_that_is_wrong_and_one_without_rights(node: Node) -> None:
    assert "token" in refused(node, GATED, token="hf_thisisnotatoken")
    assert "access" in refused(node, GATED, token=STRANGER_TOKEN)
    assert "hf_" not in node.log()


@pytest.mark.parametrize("repo", [GATED, PRIVATE])
def test_the_right_token_opens_it(hub: HubProcess, node: Node, repo: str) -> None:
    directory = node.mount(repo, token=READER_TOKEN)
    assert (
        run('sha256sum "$1/model.safetensors"', directory).split()[0]
        == hub.files(repo).files["model.safetensors"].sha256
    )
    assert READER_TOKEN not in node.log()
    assert READER_TOKEN not in json.dumps(node.status())
    assert not run('grep -r "$1" "$2" || true', READER_TOKEN, node.path / "cache")
    assert hub.stats().violations == []


@pytest.mark.above_fuse
def test_a_target_that_makes_no_sense(node: Node) -> None:
    for target in ("no-slash", "a/b/../c", "a//b", "org/na me"):
        done = node.manta("mount", target, str(node.directory()), code=None)
        assert done.returncode in {1, 2}
        assert "Traceback" not in done.stderr


@pytest.mark.above_fuse
def test_the_hub_cannot_be_reached(node: Node) -> None:
    node.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"  # discard: nothing listens
    sentence = refused(node, MODEL)
    assert "127.0.0.1:9" in sentence


def test_offline_shows_what_is_cached_and_refuses_the_rest(hub: HubProcess, node: Node) -> None:
    first = node.mount(MODEL)
    run('cat "$1/config.json"', first)
    node.unmount_all()
    node.environment["HF_HUB_OFFLINE"] = "1"
    directory = node.mount(MODEL)
    assert "hidden_size" in run('cat "$1/config.json"', directory)
    assert "Input/output error" in run('cat "$1/model.safetensors"', directory, code=1)
    assert any("offline" in sentence for sentence in node.status()["errors"])
    assert "offline" in refused(node, BIG)


def test_the_hub_dies_during_a_read(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_FETCH_READ_TIMEOUT_S"] = "2"
    directory = node.mount(BIG)
    run('head -c 1000 "$1/config.json"', directory)
    hub.set_listening("hub", accept=False)
    hub.set_listening("cdn", accept=False)
    assert "Input/output error" in run('cat "$1/$2" > /dev/null', directory, BIG_FILE, code=1)
    sentences = node.status()["mounts"][0]["errors"]
    assert sentences
    assert all(BIG_FILE in sentence for sentence in sentences)
    # What is cached stays readable, and the rest comes back by itself.
    assert run('cat "$1/config.json"', directory) == "{}"
    hub.set_listening("hub", accept=True)
    hub.set_listening("cdn", accept=True)
    assert run('sha256sum "$1/$2"', directory, BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256


def test_a_stalled_file_fails_alone(hub: HubProcess, node: Node) -> None:
    node.environment |= {"MANTA_FETCH_READ_TIMEOUT_S": "2", "MANTA_FETCH_STALL_S": "1"}
    hub.add_fault(faults.Stall(seconds=60), origin="cdn", file=BIG_FILE)
    directory, other = node.mount(BIG), node.mount(MODEL)
    stalled = subprocess.Popen(
        ["cat", str(directory / BIG_FILE)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: hub.stats().kinds.get("blob", 0) > 0)
    assert "hidden_size" in run('cat "$1/config.json"; cat "$1/model.safetensors" > /dev/null', other, timeout_s=10)
    assert "Input/output error" in stalled.communicate(timeout=30)[1]


def test_a_full_disk(hub: HubProcess, node: Node) -> None:
    """The reader of what does not fit gets ENOSPC; what is there stays, and others go on reading."""
    node.cache.mkdir()
    run('mount -t tmpfs -o size=24m manta-test "$1"', node.cache)
    try:
        directory, other = node.mount(BIG), node.mount(MODEL)
        run('cat "$1/config.json"', other)
        assert "No space left on device" in run('cat "$1/$2" > /dev/null', directory, BIG_FILE, code=1)
        assert any("nothing cached may go" in sentence for sentence in node.status()["problems"])
        assert "hidden_size" in run('cat "$1/config.json"', other)
    finally:
        node.unmount_all()
        run('umount "$1"', node.cache)


def test_directories_that_cannot_be_mounted_on(node: Node) -> None:
    occupied = node.directory()
    (occupied / "file").write_text("x")
    done = node.manta("mount", MODEL, str(occupied), code=None)
    assert done.returncode != 0
    assert "not empty" in done.stderr
    directory = node.mount(MODEL)
    done = node.manta("mount", MODEL, str(directory), code=None)
    assert done.returncode != 0
    assert "already" in done.stderr
    file = node.path / "file"
    file.write_text("x")
    done = node.manta("mount", MODEL, str(file), code=None)
    assert done.returncode != 0
    assert "not a directory" in done.stderr


@pytest.mark.above_fuse
def test_two_daemons_on_one_cache_are_refused(node: Node) -> None:
    node.mount(MODEL)
    with Node(node.environment["HF_ENDPOINT"], {"MANTA_CACHE_DIR": str(node.cache)}) as second:
        done = second.manta("mount", MODEL, str(second.directory()), code=None, timeout_s=60)
    assert done.returncode != 0
    assert str(node.daemon()) in done.stderr
    assert str(node.cache) in done.stderr


def test_no_fuse_device(node: Node) -> None:
    """In a mount namespace of its own, where /dev/fuse is not there."""
    directory = node.directory()
    script = 'mount --bind /dev/null /dev/fuse && exec python -m manta mount "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "-", MODEL, str(directory)],
        env=node.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode != 0
    assert "/dev/fuse" in done.stderr
    assert done.stderr.count("\n") == 1


def test_root_that_may_not_mount(node: Node) -> None:
    """As in a container without CAP_SYS_ADMIN."""
    directory = node.directory()
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m", "manta", "mount", MODEL, str(directory)],
        env=node.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 5
    assert "CAP_SYS_ADMIN" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(directory.iterdir())
