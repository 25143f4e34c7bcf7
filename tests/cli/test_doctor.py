"""manta.cli.doctor: each check on a machine and a configuration made for it."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from manta.cli import doctor as module
from manta.cli.doctor import Machine
from manta.config import CacheConfig, Config, HubConfig
from manta.control.binding import Answer, MountEntry
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon


@pytest.fixture
def machine(place: Path) -> Machine:
    (place / "status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    (place / "fuse.conf").write_text("# user_allow_other\n")
    return Machine(Path("/dev/null"), place / "fuse.conf", place / "status", "6.18.44", 0, (3, 11, 7))


@contextmanager
def hub(status: int, body: bytes = b"") -> Iterator[tuple[str, list[str | None]]]:
    """A hub that gives one answer, and the Authorization headers it saw."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/api/whoami-v2"
            seen.append(self.headers.get("Authorization"))
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_check_has_a_name_and_says_what_to_do(machine: Machine, config: Config, manta: Manta) -> None:
    with hub(401) as (endpoint, _):
        done = manta("doctor", "--endpoint", endpoint, "--json")
    checks = done.json["checks"]
    assert [check["name"] for check in checks] == [
        "configuration",
        "python",
        "fuse device",
        "kernel",
        "libfuse",
        "fusermount3",
        "privileges",
        "other users",
        "open files",
        "mounts",
        "cache directory",
        "cached reads",
        "runtime directory",
        "daemon",
        "hub",
        "token",
    ]
    for check in checks:
        assert check["level"] == "ok" or check["advice"] or check["name"] == "token", check
    assert done.json["healthy"] == (done.code == 0) == (not any(check["level"] == "fail" for check in checks))


def test_the_report_for_a_person(manta: Manta) -> None:
    done = manta("doctor", "--endpoint", "http://127.0.0.1:1")
    assert done.code == 1
    lines = done.out.splitlines()
    (index,) = [n for n, line in enumerate(lines) if line.startswith("FAIL  hub")]
    assert "cannot be reached" in lines[index]
    assert "HF_ENDPOINT" in lines[index + 1]
    assert "hub" in lines[-1]
    assert lines[-1].startswith("Manta cannot work here yet: ")


def test_a_broken_configuration_is_a_finding_and_not_an_end(manta: Manta, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_FETCH_WORKERS", "many")
    done = manta("doctor", "--json")
    assert done.code == 1
    first = done.json["checks"][0]
    assert (first["name"], first["level"]) == ("configuration", "fail")
    assert "MANTA_FETCH_WORKERS" in first["found"]
    assert "hub" not in [check["name"] for check in done.json["checks"]]


def test_fuse_device(machine: Machine, place: Path) -> None:
    assert module._fuse_device(machine).level == "ok"
    gone = module._fuse_device(replace(machine, fuse_device=place / "gone"))
    assert (gone.level, "does not exist" in gone.found, "modprobe" in gone.advice) == ("fail", True, True)
    (place / "file").touch()
    assert "no device" in module._fuse_device(replace(machine, fuse_device=place / "file")).found


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
def test_fuse_device_that_nobody_serves(machine: Machine, place: Path) -> None:
    os.mknod(place / "device", stat.S_IFCHR | 0o600, os.makedev(10, 254))
    found = module._fuse_device(replace(machine, fuse_device=place / "device"))
    assert (found.level, "cannot be opened" in found.found) == ("fail", True)


@pytest.mark.parametrize(
    ("release", "level"),
    [("6.18.44-x", "ok"), ("6.9.0", "ok"), ("6.8.12", "warn"), ("3.10.0", "fail"), ("odd", "fail")],
)
def test_kernel(machine: Machine, release: str, level: str) -> None:
    assert module._kernel(replace(machine, release=release)).level == level


def test_python(machine: Machine) -> None:
    assert module._python(machine).level == "ok"
    assert module._python(replace(machine, python=(3, 10, 1))).level == "fail"


def test_privileges(machine: Machine, place: Path) -> None:
    assert module._privileges(machine).level == "ok"
    assert module._privileges(replace(machine, user_id=1000)).level == "warn"
    (place / "status").write_text("CapEff:\t00000000a80425fb\n")  # docker's default set
    assert module._privileges(machine).level == "fail"


def test_fusermount_matters_to_users_other_than_root(
    machine: Machine, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = replace(machine, user_id=1000)
    monkeypatch.setenv("PATH", str(place))
    assert module._fusermount(user).level == "fail"
    assert module._fusermount(machine).level == "ok"
    program = place / "fusermount3"
    program.touch(0o755)
    assert "chmod u+s" in module._fusermount(user).advice
    program.chmod(0o4755)
    assert module._fusermount(user).level == "ok"


def test_other_users(machine: Machine, place: Path) -> None:
    user = replace(machine, user_id=1000)
    assert "you only" in module._allow_other(user).found
    (place / "fuse.conf").write_text("user_allow_other\n")
    assert "is set" in module._allow_other(user).found


def test_mounts_without_a_daemon(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [MountEntry(n, 1, "0:9", "/", f"/mnt/{n}", frozenset(), "fuse.manta", "manta:x") for n in range(3)] + [
        MountEntry(9, 1, "0:3", "/", "/proc", frozenset(), "proc", "proc")
    ]
    answers = {"/mnt/0": Answer.ALIVE, "/mnt/1": Answer.ALIVE, "/mnt/2": Answer.ALIVE}
    monkeypatch.setattr(module, "mounts", lambda: entries)
    monkeypatch.setattr(module, "probe", answers.__getitem__)
    assert module._stale_mounts(machine).found == "3 of Manta's, all answer"
    answers["/mnt/1"] = Answer.SILENT
    assert "umount --lazy /mnt/1" in module._stale_mounts(machine).advice
    answers["/mnt/2"] = Answer.DEAD
    assert "1 of 3 have no daemon any more: /mnt/2" in module._stale_mounts(machine).found


def test_cache_directory(config: Config, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_filesystem", lambda _: "ext4")
    found = module._cache_directory(config)
    assert "(will be created)" in found.found
    (place / "file").touch()
    assert module._cache_directory(replace(config, cache=CacheConfig(dir=place / "file"))).level == "fail"
    full = replace(config, cache=replace(config.cache, free_space_floor=1 << 60))
    assert "free_space_floor" in module._cache_directory(full).advice
    monkeypatch.setattr(module, "_filesystem", lambda _: "tmpfs")
    assert "memory" in module._cache_directory(config).advice


def test_the_filesystem_is_that_of_the_nearest_mountpoint() -> None:
    assert module._filesystem(Path("/proc/self")) == "proc"


def test_daemon(config: Config, daemon: FakeDaemon) -> None:
    assert module._daemon(config).level == "ok"
    daemon.errors = ["The hub was gone."]
    assert "The hub was gone." in module._daemon(config).found
    daemon.raw["GET /v1/status"] = b""
    assert module._daemon(config).level == "fail"


def test_hub(config: Config) -> None:
    with hub(401) as (endpoint, seen):
        found = module._hub(replace(config, hub=HubConfig(endpoint)))
        assert (found.level, "answers after" in found.found, seen) == ("ok", True, [None])
    assert module._hub(replace(config, hub=HubConfig(offline=True))).level == "warn"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert module._hub(replace(config, hub=HubConfig(f"http://127.0.0.1:{port}"))).level == "fail"


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (200, "ok", "accepted as reader"),
        (401, "fail", "does not accept"),
        (500, "warn", "HTTP 500"),
        (302, "warn", "HTTP 302"),
    ],
)
def test_token(config: Config, monkeypatch: pytest.MonkeyPatch, status: int, level: str, words: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub(status, json.dumps({"name": "reader"}).encode()) as (endpoint, seen):
        found = module._token(replace(config, hub=HubConfig(endpoint)))
    assert (found.level, seen) == (level, ["Bearer hf_secret"])
    assert words in found.found
    assert "hf_secret" not in found.found + found.advice


def test_no_token_is_fine(config: Config) -> None:
    assert module._token(config).level == "ok"
