"""What is open outlives the daemon: killed alone, with its workers, with its keeper, again and again, and replaced by `manta restart`.

Readers are processes that compare every byte. What must never be, in any of it: an error where a daemon comes back, wrong bytes, and a
process that waits in the kernel for somebody who will not come.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from manta import keeper
from manta.config import load
from manta.control.binding import mounts, unbind
from manta.testing import scratch
from manta.testing.hub import HubProcess
from manta.testing.hub.standard import GATED, MANY, MANY_COUNT, MODEL, READER_TOKEN
from tests.mount.conftest import BIG, BIG_FILE, BIG_SIZE, true_digest
from tests.mount.holder import Holder
from tests.mount.node import Node, background, python, run, send, wait_for_end, wait_until
from tests.soak import reader

pytestmark = pytest.mark.only("kernel")

MIB = 1024 * 1024
SHELF = MANY_COUNT // 7
"""Entries of one folder of MANY: more than fit one reply of the kernel's protocol."""


class Readers:
    """One of each kind, in the middle of a file; `conclude` waits for them and says what they saw."""

    def __init__(self, running: list[subprocess.Popen[str]]) -> None:
        self._running = running

    @property
    def over(self) -> bool:
        return all(process.poll() is not None for process in self._running)

    def conclude(self) -> None:
        """Each got the true bytes and nothing else."""
        for process in self._running:
            out, error = process.communicate(timeout=60)
            assert process.returncode == 0, f"ended with {process.returncode}: {error}"
            seen = json.loads(out)
            assert (seen["error"], seen["wrong"]) == ("", []), seen
            assert seen["compared"] > 0


@contextmanager
def reading(path: Path, truth: Path, kinds: tuple[str, ...] = reader.KINDS) -> Iterator[Readers]:
    with ExitStack() as stack:
        yield Readers(
            [
                stack.enter_context(
                    background(sys.executable, "-S", "-E", "-P", reader.__file__, kind, path, truth, f"survival {kind}")
                )
                for kind in kinds
            ]
        )


def kill(node: Node, *others: int) -> None:
    """Kills the daemon, and others in the same moment, and waits for the next one."""
    [daemon] = node.daemons()
    doomed = [daemon, *others]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in doomed:
            send(pid, number)
    for pid in doomed:
        wait_for_end(pid)
    wait_until(lambda: len(node.daemons()) == 1)


def serving(node: Node) -> dict[str, Any]:
    """`manta status` of whichever daemon there is, as soon as it answers."""
    answers: list[dict[str, Any]] = []

    def ask() -> bool:
        done = node.manta("status", "--json", code=None)
        if done.returncode == 0:
            answers.append(json.loads(done.stdout))
        return done.returncode == 0

    wait_until(ask)
    return answers[-1]


# Reads -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whom", ["daemon", "daemon and workers"])
def test_cold_reads_survive_kills(hub: HubProcess, node: Node, truth: Path, whom: str) -> None:
    hub.set_bandwidth(25 * MIB)
    directory = node.mount(BIG)
    before = serving(node)
    with reading(directory / BIG_FILE, truth) as readers:
        for share in (0.1, 0.4, 0.7):
            wait_until(lambda share=share: hub.blob_traffic(BIG, BIG_FILE).sent >= share * BIG_SIZE)  # type: ignore[misc]
            kill(node, *(node.processes_of("manta.worker") if whom == "daemon and workers" else ()))
        hub.set_bandwidth(None)
        readers.conclude()
    after = serving(node)
    assert after["pid"] != before["pid"]
    # The same mount, and not a new one at the same place.
    assert [(m["id"], m["directory"], m["commit"]) for m in after["mounts"]] == [
        (m["id"], m["directory"], m["commit"]) for m in before["mounts"]
    ]
    traffic = hub.blob_traffic(BIG, BIG_FILE)
    assert traffic.unique == BIG_SIZE
    assert traffic.repeated <= 3 * 16 * 8 * MIB, "of each life, what was under way"


def test_warm_reads_through_the_daemon_survive_kills(node: Node, truth: Path) -> None:
    """Kept from the backing file and from the page cache, so that every read is a request."""
    node.environment["MANTA_FUSE_WITHOUT"] = "passthrough"
    directory = node.mount(BIG)
    run('cat "$1" > /dev/null', directory / BIG_FILE)
    endless = 'while :; do dd if="$1" iflag=direct bs=1M status=none | cmp - "$2" || exit 1; done'
    with ExitStack() as stack:
        loops = [
            stack.enter_context(background("bash", "-c", endless, "-", directory / BIG_FILE, truth)) for _ in range(2)
        ]
        readers = stack.enter_context(reading(directory / BIG_FILE, truth))
        for _ in range(3):
            shown = serving(node)["read_bytes"]
            wait_until(lambda shown=shown: serving(node)["read_bytes"] > shown)  # type: ignore[misc]
            kill(node)
        readers.conclude()
        serving(node)
        assert all(loop.poll() is None for loop in loops), "an endless one ended"


def test_warm_reads_of_the_backing_file_do_not_notice(node: Node) -> None:
    directory = node.mount(BIG)
    run('cat "$1" > /dev/null', directory / BIG_FILE)
    wait_until(lambda: sealed(directory / BIG_FILE))
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        holder.do("map", "mapped", "weights")
        with node.unattended():
            os.kill(node.daemons()[0], signal.SIGKILL)
            holder.do("forget_pages", "weights")
            assert holder.do("digest", "weights", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
            assert holder.do("digest_mapped", "mapped", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)
        serving(node)
        assert holder.do("digest", "weights", 5, 10 * MIB) == true_digest(5, 10 * MIB)
        holder.do("close", "weights")
        assert holder.do("open", "again", directory / BIG_FILE) == holder.do("stat", directory / BIG_FILE)[0]
        assert holder.do("digest", "again", 0, BIG_SIZE) == true_digest(0, BIG_SIZE)


def sealed(path: Path) -> bool:
    attribute = 'import json, os, sys; print(json.dumps(os.getxattr(sys.argv[1], "user.manta.state").decode()))'
    return bool(python(attribute, path) == "sealed")


def test_restart_replaces_the_daemon_under_readers(hub: HubProcess, node: Node, truth: Path) -> None:
    hub.set_bandwidth(25 * MIB)
    directory = node.mount(BIG)
    [before] = node.daemons()
    with reading(directory / BIG_FILE, truth) as readers:
        for share in (0.2, 0.6):
            wait_until(lambda share=share: hub.blob_traffic(BIG, BIG_FILE).sent >= share * BIG_SIZE)  # type: ignore[misc]
            node.manta("restart")
            # It is said when it is done: the new one serves.
            assert node.status()["pid"] != before
            before = node.status()["pid"]
        hub.set_bandwidth(None)
        readers.conclude()
    assert len(node.daemons()) == 1
    assert "Traceback" not in node.log(whole=True)


def test_a_daemon_that_is_killed_before_it_has_begun_is_followed_by_another(
    hub: HubProcess, node: Node, truth: Path
) -> None:
    hub.set_bandwidth(10 * MIB)
    directory = node.mount(BIG)
    with reading(directory / BIG_FILE, truth, ("sequential", "mapped")) as readers:
        wait_until(lambda: hub.blob_traffic(BIG, BIG_FILE).sent >= 8 * MIB)
        for _ in range(3):
            kill(node)  # the next one, in whatever it is doing
        hub.set_bandwidth(None)
        readers.conclude()


# What is held ------------------------------------------------------------------------------------------------------------


def test_files_folders_mappings_and_a_working_directory_stay_valid(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_FETCH_FILL"] = "false"
    directory, many, model = node.mount(BIG), node.mount(MANY), node.mount(MODEL)
    with Holder() as holder:
        inode = holder.do("open", "weights", directory / BIG_FILE)
        holder.do("map", "mapped", "weights")
        holder.do("open", "place", directory / BIG_FILE, os.O_PATH)
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        assert holder.do("digest_mapped", "mapped", 20 * MIB, 21 * MIB) == true_digest(20 * MIB, 21 * MIB)
        holder.do("scan", "folder", many / "shelf-3")
        begun = holder.do("entries", "folder", 3)
        holder.do("change_directory", model / "tokenizer")
        kill(node)
        # Bytes that nobody had fetched, and bytes that somebody had.
        assert holder.do("digest", "weights", 0, 10 * MIB) == true_digest(0, 10 * MIB)
        assert holder.do("digest_mapped", "mapped", 20 * MIB, 30 * MIB) == true_digest(20 * MIB, 30 * MIB)
        assert holder.do("open_again", "reopened", "place") == inode
        assert holder.do("digest", "reopened", 40 * MIB, BIG_SIZE) == true_digest(40 * MIB, BIG_SIZE)
        listed = begun + holder.do("entries", "folder", 1_000_000)
        assert len(listed) == len(set(listed)) == SHELF
        assert holder.do("list", ".") == ["vocab.txt"]
        assert holder.do("stat", "vocab.txt")[1] > 0
        assert holder.do("stat", "../config.json")[1] > 0
        assert holder.do("stat", directory / BIG_FILE) == [inode, BIG_SIZE]
        for name in ("weights", "place", "reopened"):
            holder.do("close", name)
    wait_until(lambda: node.status()["open_files"] == 0, timeout_s=20)
    # Every way out is as it was: the daemon and its keeper leave with the last mount.
    node.unmount_all()
    assert node.processes() == []


def test_what_a_mount_has_frozen_stays_frozen(hub: HubProcess, node: Node) -> None:
    pinned, whole, view = node.mount(MODEL), node.mount(), node.mount("--view", "hub-cache")
    facts = hub.files(MODEL)
    snapshot = view / f"models--{MODEL.replace('/', '--')}/snapshots/{facts.commit}"
    show = 'cd "$1" && stat -L -c "%n %i %s" config.json README.md tokenizer/vocab.txt && cat README.md'
    before = [run(show, pinned), run(show, whole / MODEL), run(show, snapshot)]
    hub.move_branch(MODEL, "dev")
    kill(node)
    assert [run(show, pinned), run(show, whole / MODEL), run(show, snapshot)] == before
    assert serving(node)["mounts"][0]["commit"] == facts.commit
    # A mount from now on has what the branch is now.
    assert hub.files(MODEL).commit != facts.commit
    node.mount(MODEL)
    assert serving(node)["mounts"][-1]["commit"] == hub.files(MODEL).commit
    assert run(show, pinned) == before[0]


def test_a_mounts_token_outlives_the_daemon_and_is_nowhere_on_the_disk(hub: HubProcess, node: Node) -> None:
    node.environment["MANTA_FETCH_FILL"] = "false"
    directory = node.mount(GATED, token=READER_TOKEN)
    run('cat "$1/config.json"', directory)
    kill(node)
    digest = hub.files(GATED).files["model.safetensors"].sha256
    assert run('sha256sum "$1/model.safetensors"', directory).split()[0] == digest
    assert not run('grep -ra "$1" "$2" --exclude-dir=mnt* --exclude-dir=root || true', READER_TOKEN, node.path)
    for pid in node.processes():
        assert READER_TOKEN.encode() not in scratch.command_line(pid)


def test_questions_that_were_not_answered_are_asked_again(hub: HubProcess, node: Node) -> None:
    """A lookup and a listing that wait for the hub when the daemon dies, as reads do."""
    from manta.testing.hub import faults

    whole = node.mount()
    hub.add_fault(faults.Delay(seconds=120), origin="hub", kind="info", times=1)
    with Holder() as lister, Holder() as opener:
        lister.tell("list", whole / MODEL)
        hub.wait_for(1, origin="hub", kind="info", repo=MODEL)
        opener.tell("stat", whole / MODEL / "config.json")
        kill(node)
        assert "config.json" in lister.answer()
        assert opener.answer()[1] > 0


def test_mounting_and_unmounting_go_on(node: Node) -> None:
    first, second = node.mount(MODEL), node.mount(BIG)
    kill(node)
    third = node.mount(MODEL)
    node.manta("umount", str(first))
    assert [mount["directory"] for mount in node.status()["mounts"]] == [str(second), str(third)]
    # And what is unmounted while nobody serves is found to be gone.
    with node.unattended():
        os.kill(node.daemons()[0], signal.SIGKILL)
        unbind(str(second))
    wait_until(lambda: [mount["directory"] for mount in serving(node)["mounts"]] == [str(third)])
    assert "hidden_size" in run('cat "$1/config.json"', third)


# The keeper --------------------------------------------------------------------------------------------------------------


def test_a_keeper_that_is_killed_is_replaced_and_keeps(hub: HubProcess, node: Node, truth: Path) -> None:
    hub.set_bandwidth(25 * MIB)
    directory = node.mount(BIG)
    [daemon], [keeper] = node.daemons(), node.keepers()
    with reading(directory / BIG_FILE, truth) as readers:
        os.kill(keeper, signal.SIGKILL)
        wait_for_end(keeper)
        wait_until(lambda: len(node.keepers()) == 1)
        assert node.daemons() == [daemon], "it goes on serving"
        wait_until(lambda: kept(node))
        kill(node)
        hub.set_bandwidth(None)
        readers.conclude()
    assert len(node.keepers()) == 1
    node.unmount_all()
    assert node.processes() == []


def kept(node: Node) -> bool:
    """Whether the keeper holds the filesystem's descriptor."""
    return any("/dev/fuse" in scratch.open_files(pid) for pid in node.keepers())


def test_without_keeper_and_daemon_readers_get_an_error_and_mount_recovers(hub: HubProcess, node: Node) -> None:
    hub.set_bandwidth(5 * MIB)
    directory = node.mount(BIG)
    with Holder() as holder, background("cat", directory / BIG_FILE) as waiting:
        holder.do("open", "weights", directory / BIG_FILE)
        hub.wait_for(1, origin="cdn")
        holder.tell("digest", "weights", 0, BIG_SIZE)
        node.kill_all()
        assert errno_of(holder) in {"ENOTCONN", "ECONNABORTED", "EIO"}
        assert waiting.wait(timeout=20) != 0
        holder.tell("open", "again", directory / BIG_FILE)
        assert errno_of(holder) == "ENOTCONN"
    hub.set_bandwidth(None)
    node.manta("mount", BIG, str(directory))
    assert run('sha256sum "$1/$2"', directory, BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256
    assert [entry.directory for entry in mounts() if entry.directory.startswith(f"{node.path}/mnt")] == [str(directory)]


def errno_of(holder: Holder) -> str:
    import errno

    with pytest.raises(OSError) as failure:
        holder.answer()
    return errno.errorcode[failure.value.errno or 0]


def test_a_daemon_that_fails_at_each_start_is_given_up(hub: HubProcess, node: Node) -> None:
    site = node.path / "site"
    site.mkdir()
    node.environment["PYTHONPATH"] = f"{site}:{node.environment['PYTHONPATH']}"
    hub.set_bandwidth(5 * MIB)
    runtime = load(environ=node.environment).config.make_instance_dir()
    command = keeper.command_line(
        str(runtime), [sys.executable, "-m", "manta", "daemon"], "--give-up-after", str(GIVE_UP_S)
    )
    with background(*command, env=node.environment) as keeping:
        serving(node)
        directory = node.mount(BIG)
        with Holder() as holder, background("cat", directory / BIG_FILE) as waiting:
            holder.do("open", "weights", directory / BIG_FILE)
            holder.tell("digest", "weights", 0, BIG_SIZE)
            hub.wait_for(1, origin="cdn")
            (site / "sitecustomize.py").write_text(
                "import os, sys\nif 'daemon' in sys.orig_argv:\n    os.write(2, b'broken\\n')\n    os._exit(3)\n"
            )
            os.kill(node.daemons()[0], signal.SIGKILL)
            assert keeping.wait(timeout=GIVE_UP_S + 20) == 3
            assert errno_of(holder) in {"ENOTCONN", "ECONNABORTED", "EIO"}
            assert waiting.wait(timeout=20) != 0
    assert node.processes() == []
    (site / "sitecustomize.py").unlink()
    hub.set_bandwidth(None)
    node.manta("mount", BIG, str(directory))
    assert run('sha256sum "$1/$2"', directory, BIG_FILE).split()[0] == hub.files(BIG).files[BIG_FILE].sha256


GIVE_UP_S = 5.0
"""The keeper's own is a minute."""


def test_the_hub_is_away_while_the_daemon_is_replaced(hub: HubProcess, node: Node) -> None:
    node.environment |= {
        "MANTA_FETCH_READ_TIMEOUT_S": "5",
        "MANTA_FETCH_STALL_S": "1",
        "MANTA_HUB_TIMEOUT_S": "3",
        "MANTA_FETCH_FILL": "false",
    }
    directory, model = node.mount(BIG), node.mount(MODEL)
    shown = run('sha256sum "$1/config.json" "$1/model.safetensors"', model)
    with Holder() as holder:
        holder.do("open", "weights", directory / BIG_FILE)
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        hub.set_listening("hub", accept=False)
        hub.set_listening("cdn", accept=False)
        kill(node)
        assert run('sha256sum "$1/config.json" "$1/model.safetensors"', model) == shown
        assert holder.do("digest", "weights", 0, MIB) == true_digest(0, MIB)
        holder.tell("digest", "weights", 40 * MIB, 41 * MIB)
        assert errno_of(holder) == "EIO"
        assert any(BIG_FILE in sentence for sentence in serving(node)["mounts"][0]["errors"])
        hub.set_listening("hub", accept=True)
        hub.set_listening("cdn", accept=True)
        expected = true_digest(40 * MIB, 41 * MIB)
        wait_until(lambda: digest_or_none(holder, 40 * MIB, 41 * MIB) == expected)


def digest_or_none(holder: Holder, at: int, end: int) -> object:
    try:
        return holder.do("digest", "weights", at, end)
    except OSError:
        return None
