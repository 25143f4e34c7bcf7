"""manta.cli.mount: what is asked of the daemon, what is refused before, real bind mounts, and that failures leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from manta.cli import mount as module
from manta.config import Config
from manta.control.binding import Answer, bind, mounted_at, mounts, unbind
from manta.errors import Absent, MantaError, Unavailable
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import COMMIT, FakeDaemon

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root here")


@pytest.fixture
def where(place: Path) -> Iterator[Path]:
    """Where the tests mount; whatever is mounted in the scratch directory afterwards is detached."""
    yield place / "here"
    for entry in reversed(mounts()):
        if entry.directory.startswith(f"{place}/"):
            with suppress(MantaError):
                unbind(entry.directory, lazy=True)


@pytest.fixture
def bound(daemon: FakeDaemon, place: Path, where: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    """The fake daemon with a tmpfs to bind, which looks like a mount of Manta's."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root here")
    source = place / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "manta-test", str(source)], check=True)
    (source / "config.json").write_text("{}")
    daemon.direct = False
    daemon.source_root = source
    monkeypatch.setattr(
        "manta.control.binding.MountEntry.is_manta", property(lambda entry: entry.source == "manta-test")
    )
    return daemon


def asked(daemon: FakeDaemon) -> list[str]:
    return [str(request) for request in daemon.requests if request.path != "/v1/status"]


def test_a_direct_mount_is_the_daemons_own(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    done = manta("mount", "hf://org/name@v1.0", where)
    assert done.code == 0, done.err
    assert done.out == (
        f"{where} shows org/name@v1.0 at {COMMIT[:12]}: 2 files, 2.0 kB. Unmount it with: manta umount {where}\n"
    )
    assert asked(daemon) == ["POST /v1/mounts"]
    assert daemon.requests[-1].body == {
        "target": "org/name@v1.0",
        "directory": str(where),
        "view": "tree",
        "token": "",
        "anonymous": False,
        "prefetch": "none",
        "pin": False,
        "pod": None,
    }
    assert where.is_dir()


def test_the_whole_hub_and_a_revision_by_option(manta: Manta, daemon: FakeDaemon, where: Path, place: Path) -> None:
    assert "any repo, as ORG/NAME below it" in manta("mount", where).out
    assert manta("mount", "org/name/sub", place / "b", "--revision", "feature/x", "-q").out == ""
    assert [r.body["target"] for r in daemon.asked("POST", "/v1/mounts")] == ["", "org/name@feature%2Fx/sub"]


def test_the_callers_token_goes_to_the_daemon_and_nowhere_else(
    manta: Manta, daemon: FakeDaemon, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = manta("mount", "org/name", where, "-v")
    assert daemon.asked("POST", "/v1/mounts")[0].body["token"] == "hf_secret"
    assert "hf_secret" not in done.out + done.err
    assert "the hub token comes from HF_TOKEN" in done.err


def test_json_is_the_mount(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    document = manta("mount", "org/name", where, "--json").json
    assert (document["directory"], document["commit"]) == (str(where), COMMIT)


@pytest.mark.parametrize(
    ("name", "words"), [("a/b", "name the repo and a directory"), ("file", "not a directory"), ("full", "--nonempty")]
)
def test_a_directory_that_cannot_be_mounted_on_is_refused_before_anything_starts(
    manta: Manta, daemon: FakeDaemon, place: Path, name: str, words: str
) -> None:
    (place / "file").touch()
    (place / "full").mkdir()
    (place / "full/x").touch()
    done = manta("mount", "org/name", place / name)
    assert done.code == 2
    assert words in done.err
    assert daemon.requests == []


def test_a_full_directory_is_hidden_when_asked_for(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    where.mkdir()
    (where / "x").touch()
    assert manta("mount", "org/name", where, "--nonempty").code == 0


def test_mantas_own_directories_are_never_mounted_on(
    manta: Manta, daemon: FakeDaemon, place: Path, config: Config
) -> None:
    for directory in (place, place / "cache", place / "cache/deeper", config.instance_dir, place / "run"):
        done = manta("mount", "org/name", directory, "--nonempty")
        assert done.code == 2
        assert "cannot be mounted on" in done.err
    assert not (place / "cache").exists()


def test_another_hub_or_mode_than_the_daemons_is_an_error(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    done = manta("mount", "org/name", where, "--endpoint", "http://other")
    assert done.code == 6
    assert "--endpoint asks for the hub http://other, and the running daemon uses https://huggingface.co" in done.err
    done = manta("mount", "org/name", where, "--offline")
    assert done.code == 6
    assert "offline mode, and the running daemon is online" in done.err
    assert asked(daemon) == []
    assert not where.exists()
    daemon.endpoint = "http://other/"
    assert manta("mount", "org/name", where, "--endpoint", "http://other").code == 0


def test_settings_that_a_running_daemon_cannot_take_are_said(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    done = manta("mount", "org/name", where, "--set", "fetch.workers=4")
    assert done.code == 0
    assert "already running and keeps its own settings: --set fetch.workers has no effect" in done.err


def test_what_the_daemon_refuses_leaves_nothing(manta: Manta, daemon: FakeDaemon, where: Path) -> None:
    daemon.refusals["POST /v1/mounts"] = [Absent("There is no repo org/name.")]
    done = manta("mount", "org/name", where)
    assert (done.code, done.err) == (4, "manta: There is no repo org/name.\n")
    assert not where.exists()


@needs_root
def test_a_mount_is_bound_read_only_and_announced(manta: Manta, bound: FakeDaemon, where: Path) -> None:
    done = manta("mount", "org/name", where)
    assert done.code == 0, done.err
    assert (where / "config.json").read_text() == "{}"
    assert asked(bound) == ["POST /v1/mounts", "POST /v1/mounts/1/bound"]
    entry = mounted_at(str(where))
    assert entry is not None
    assert "ro" in entry.options
    again = manta("mount", "org/name", where)
    assert again.code == 6
    assert "already mounted. It shows org/name." in again.err
    done = manta("umount", where)
    assert (done.code, done.out) == (0, f"{where} is unmounted.\n")
    assert asked(bound)[-1] == "DELETE /v1/mounts/1"
    assert mounted_at(str(where)) is None
    assert where.is_dir()


@needs_root
@pytest.mark.parametrize("fails", ["bind", "bound", "probe"])
def test_a_failure_half_way_is_undone(
    manta: Manta, bound: FakeDaemon, where: Path, place: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    if fails == "bind":
        bound.source_root = place / "nowhere"
    elif fails == "bound":
        bound.refusals["POST /v1/mounts/1/bound"] = [Unavailable("Too late.")]
    else:
        monkeypatch.setattr(module, "probe", lambda _: Answer.SILENT)
    done = manta("mount", "org/name", where)
    assert done.code in {3, 4}
    assert done.err.count("\n") == 1
    assert asked(bound)[-1] == "DELETE /v1/mounts/1"
    assert bound.mounts == {}
    assert mounted_at(str(where)) is None
    assert not where.exists()


@needs_root
def test_a_mountpoint_of_something_else_is_neither_mounted_on_nor_unmounted(
    manta: Manta, daemon: FakeDaemon, where: Path, place: Path
) -> None:
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "other", str(where)], check=True)
    done = manta("mount", "org/name", where)
    assert done.code == 6
    assert "already a mountpoint (other, tmpfs)" in done.err
    done = manta("umount", where)
    assert done.code == 2
    assert "no mount of Manta's but of other (tmpfs)" in done.err


@needs_root
def test_a_dead_mount_is_replaced_and_a_silent_one_is_not(
    manta: Manta, bound: FakeDaemon, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where.mkdir()
    bind(str(bound.source_root), str(where))
    monkeypatch.setattr(module, "probe", lambda _: Answer.SILENT)
    done = manta("mount", "org/name", where)
    assert done.code == 6
    assert "umount --lazy" in done.err
    answers = iter([Answer.DEAD, Answer.ALIVE])
    monkeypatch.setattr(module, "probe", lambda _: next(answers))
    assert manta("mount", "org/name", where).code == 0
    assert mounted_at(str(where)) is not None
    unbind(str(where))  # one mount, not one on the other
    assert mounted_at(str(where)) is None


# Unmounting ----------------------------------------------------------------------------------------------------------


def test_what_is_not_mounted_cannot_be_unmounted(manta: Manta, place: Path) -> None:
    done = manta("umount", place)
    assert done.code == 4
    assert "Nothing is mounted" in done.err


@needs_root
def test_a_busy_mount_names_who_uses_it(manta: Manta, bound: FakeDaemon, where: Path) -> None:
    assert manta("mount", "org/name", where).code == 0
    with (where / "config.json").open() as file:
        done = manta("umount", where)
        assert done.code == 6
        assert f"(pid {os.getpid()}, open)" in done.err
        assert f"manta umount --lazy {where}" in done.err
        assert len(bound.mounts) == 1
        assert manta("umount", "--lazy", where, "--json").json["unmounted"]
        assert file.read() == "{}"
    assert bound.mounts == {}


@needs_root
def test_a_dead_busy_mount_goes_without_asking_for_more(
    manta: Manta, bound: FakeDaemon, where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert manta("mount", "org/name", where).code == 0
    monkeypatch.setattr(module, "probe", lambda _: Answer.DEAD)
    with (where / "config.json").open():
        assert manta("umount", where).code == 0


@needs_root
def test_unmounting_needs_no_daemon_and_clears_what_a_dead_one_left(
    manta: Manta, bound: FakeDaemon, where: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert manta("mount", "org/name", where).code == 0
    config.mount_root.mkdir()
    bind(str(bound.source_root), str(config.mount_root))
    unbind(str(bound.source_root), lazy=True)
    bound.__exit__()
    monkeypatch.setattr(module, "probe", lambda _: Answer.DEAD)
    try:
        assert manta("umount", where).code == 0
        assert mounted_at(str(where)) is None
        assert mounted_at(str(config.mount_root)) is None
    finally:
        bound.__enter__()


# Foreground ----------------------------------------------------------------------------------------------------------


def foreground(where: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "manta", "mount", "-f", "org/name", str(where)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert "shows org/name" in child.stdout.readline()
    assert "Ctrl-C" in child.stdout.readline()
    return child


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_foreground_mount_ends_with_a_signal(bound: FakeDaemon, where: Path, number: signal.Signals) -> None:
    with foreground(where) as child:
        assert mounted_at(str(where)) is not None
        child.send_signal(number)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")
    assert mounted_at(str(where)) is None
    assert bound.mounts == {}
    assert not where.exists()


@needs_root
def test_a_foreground_mount_ends_when_somebody_unmounts_it(bound: FakeDaemon, where: Path) -> None:
    with foreground(where) as child:
        unbind(str(where))
        out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")
    assert "was unmounted" in out


@needs_root
def test_a_foreground_mount_tells_when_its_daemon_dies(bound: FakeDaemon, where: Path) -> None:
    with foreground(where) as child:
        bound.__exit__()
        try:
            _, err = child.communicate(timeout=20)
        finally:
            bound.__enter__()
    assert child.returncode == 3
    assert "is gone, so it was unmounted" in err
    assert mounted_at(str(where)) is None
