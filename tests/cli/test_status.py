"""manta.cli.status: what `manta status` and `manta config` show."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from manta.control.protocol import FileTransfer, Pod, Swarm
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import COMMIT, FakeDaemon


def test_no_daemon_is_code_3_with_what_to_do(manta: Manta, place: Path) -> None:
    done = manta("status")
    assert done.code == 3
    assert f"No Manta daemon runs for the cache directory {place / 'cache'}" in done.err
    assert manta("status", "--json").json["error"]["code"] == "not_running"


def test_status_shows_what_the_daemon_knows(manta: Manta, daemon: FakeDaemon, place: Path) -> None:
    assert "Nothing is mounted" in manta("status").out
    manta("mount", "org/name@v1", place / "here")
    daemon.transfers = [FileTransfer("sha256-x", f"org/name/file{n}", 1000, 250) for n in range(12)]
    daemon.errors = ["The hub was gone."]
    daemon.problems = ["The disk of the cache has 1 MB free."]
    out = manta("status").out
    for words in (
        "https://huggingface.co",
        "2.5 MB of 10.0 MB",
        "1.5 MB/s now, 3.0 MB since",
        "ends with its last mount",
        str(place / "here"),
        "org/name@v1",
        COMMIT[:12],
        "500 B of 2.0 kB",
        "25%",
        "org/name/file9",
        "and 2 more",
        "The hub was gone.",
        "WHAT IS WRONG NOW",
        "The disk of the cache has 1 MB free.",
    ):
        assert words in out, words
    assert "org/name/file11" in manta("status", "-v").out
    document = manta("status", "--json").json
    assert document["mounts"][0]["commit"] == COMMIT
    assert document["transfers"][0]["cached"] == 250


def test_a_pods_volumes_are_shown_by_its_uid_and_its_name(manta: Manta, daemon: FakeDaemon, place: Path) -> None:
    for name in ("here", "there"):
        manta("mount", "org/name", place / name)
    daemon.transfers = [FileTransfer("sha256-x", f"org/{repo}/file", 1000, 250) for repo in ("name", "names")]
    pod = Pod("0a1b", "server-0", "default", "csi-1")
    daemon.mounts["2"] = msgspec.structs.replace(daemon.mounts["2"], pod=pod, publication="p", errors=["Refused."])
    out = manta("status").out
    for words in (str(place / "here"), "pod default/server-0", "READS THAT FAILED IN pod default/server-0"):
        assert words in out
    for asked in ("0a1b", "default/server-0"):
        document = manta("status", "--json", "--pod", asked).json
        assert [mount["id"] for mount in document["mounts"]] == ["2"]
        assert document["mounts"][0]["pod"]["uid"] == "0a1b"
        assert [transfer["name"] for transfer in document["transfers"]] == ["org/name/file"]
    done = manta("status", "--pod", "default/server")
    assert done.code != 0
    assert "No pod default/server has a volume of Manta on this node" in done.err


def test_what_other_nodes_give_is_said(manta: Manta, daemon: FakeDaemon) -> None:
    assert "peers" not in manta("status").out
    daemon.swarm = Swarm("0" * 16, "10.0.0.1:9402", 7, 6, 1.5e6, 2.5e6, 3_000_000, 4_000_000, 8, 2)
    out = manta("status").out
    assert "peers    6 of 7 other nodes up; 1.5 MB/s from them and 2.5 MB/s to them now, 3.0 MB and 4.0 MB since" in out


def test_offline_and_stale_are_said(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.offline = True
    assert "offline" in manta("status").out


def test_config_shows_each_value_and_its_origin(manta: Manta, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror")
    (place / "c.toml").write_text("[fetch]\nworkers = 7")
    arguments = ("config", "--config", place / "c.toml", "--set", "cache.size=5GiB", "--offline")
    rows = {line.split()[0]: line.split()[1:] for line in manta(*arguments).out.splitlines()[1:]}
    assert rows["hub.endpoint"] == ["http://mirror", "HF_ENDPOINT", "MANTA_HUB_ENDPOINT"]
    assert rows["fetch.workers"] == ["7", str(place / "c.toml"), "MANTA_FETCH_WORKERS"]
    assert rows["cache.size"] == [str(5 * 1024**3), "--set", "cache.size", "MANTA_CACHE_SIZE"]
    assert rows["hub.offline"] == ["true", "--offline", "MANTA_HUB_OFFLINE"]
    assert rows["fetch.stall_s"][1] == "default"
    document = manta(*arguments, "--json").json
    assert document["fetch.workers"]["value"] == 7
    assert document["fetch.workers"]["origin"] == "file"
    assert document["cache.dir"]["value"] == str(place / "cache")
