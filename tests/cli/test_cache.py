"""manta.cli.cache: listing, verifying, pinning, removing."""

from __future__ import annotations

import pytest

from manta.cli import prefetch
from manta.control.protocol import CacheListing, Removal
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon, blob, job


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "POLL_S", 0.0)


def test_ls(manta: Manta, daemon: FakeDaemon) -> None:
    assert "is empty" in manta("cache", "ls").out
    daemon.listing = CacheListing(
        [
            blob("b.bin", cached=250, sealed=False, in_use=True, pinned=True, last_used=1.0),
            blob("a.bin", names=["org/name@0123/a.bin", "org/copy@4567/a.bin"]),
            blob(names=[]),
        ],
        2250,
        5000,
    )
    lines = manta("cache", "ls").out.splitlines()
    assert "(of no stored commit)" in lines[1]
    assert "org/name@0123/a.bin (+1)" in lines[2]
    assert "250 B of 1.0 kB" in lines[3]
    assert "25%" in lines[3]
    assert "partial, pinned, in use" in lines[3]
    assert lines[-1].startswith("3 blobs, 2.2 kB of at most 5.0 kB in ")
    assert "a" * 64 in manta("cache", "ls", "-v").out
    assert len(manta("cache", "ls", "--json").json["blobs"]) == 3


def test_verify(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.jobs = [job("running", 0, name="cache", kind="verify"), job("done", 1000, name="cache", kind="verify")]
    done = manta("cache", "verify")
    assert done.code == 0, done.err
    assert daemon.asked("POST", "/v1/cache/verify")[0].body == {"names": [], "full": False, "repair": False}
    assert done.out.startswith("2 blobs, 1.0 kB in ")
    assert "all match their digests" in done.out


def test_verify_says_what_is_damaged_and_what_became_of_it(manta: Manta, daemon: FakeDaemon) -> None:
    found = "org/name/a: chunk 1 of 2 does not match its digest. It is not served any more."
    daemon.jobs = [job("failed", 1000, name="cache", kind="verify", problems=[found], damaged=1)]
    done = manta("cache", "verify", "org/name")
    assert done.code == 1
    assert found in done.err
    assert done.err.endswith(": 1 damaged chunk\n")
    daemon.jobs = [job("failed", 1000, name="cache", kind="verify", problems=[found], damaged=3, repaired=2)]
    done = manta("cache", "verify", "--full", "--repair", "org/name", "--json")
    assert (done.code, done.json["damaged"], done.json["repaired"]) == (1, 3, 2)
    assert daemon.requests[-1].body == {"names": ["org/name"], "full": True, "repair": True}
    assert "3 damaged chunks, 2 of them fetched anew" in done.err
    daemon.jobs = [job("failed", 1000, name="cache", kind="verify", problems=["a could not be verified: it hung."])]
    assert "1 blob could not be verified" in manta("cache", "verify").err
    daemon.jobs = [job("cancelled", 500, name="cache", kind="verify")]
    done = manta("cache", "verify")
    assert (done.code, "somebody else cancelled it" in done.err) == (1, True)


def test_pin_and_unpin(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.listing = CacheListing([blob(pinned=True)], 1000, 0)
    assert manta("cache", "pin", "org/name", "sha256-x").out == "1 blob, 1.0 kB: pinned.\n"
    assert daemon.requests[-1].body == {"names": ["org/name", "sha256-x"]}
    assert "no longer pinned" in manta("cache", "unpin").out
    assert daemon.requests[-1].body == {"names": []}
    assert manta("cache", "pin").code == 2


def test_rm_says_what_it_kept(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.removal = Removal([blob("a")], 1000, ["b is pinned."])
    done = manta("cache", "rm", "org/name")
    assert done.code == 1
    assert "1 blob removed, 1.0 kB." in done.out
    assert done.err == "manta: b is pinned.\n"
    daemon.removal = Removal([], 0, [])
    assert manta("cache", "rm", "org/name", "--json").json == {"removed": [], "freed": 0, "kept": []}
    assert manta("cache", "rm").code == 2


def test_gc(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.removal = Removal([blob("a")], 1000, [])
    assert "would be removed" in manta("cache", "gc", "--size", "5GiB", "--dry-run").out
    assert daemon.requests[-1].body == {"size": 5 * 1024**3, "dry_run": True}
    assert manta("cache", "gc").code == 0
    assert daemon.requests[-1].body == {"size": -1, "dry_run": False}
