"""manta.cli.frame: what one frame of `manta top` shows, and that it fits whatever screen there is."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from manta.cli.frame import clean, columns, cut, frame, host, shortened
from manta.control.protocol import FileTransfer, Mount, Quota, Source, Status, Swarm

NOW = 1_000_000.0
MOUNT = Mount(
    "1", "org/name", "main", "0123456789abcdef" * 2 + "01234567", "tree", "/run/x", "/models/org-name", 3, 2000, 500, False, [], 1e6
)  # fmt: skip


def file(name: str = "org/name/weights.safetensors", **changes: Any) -> FileTransfer:
    values = {"size": 100_000_000, "cached": 25_000_000, "rate": 5e6, "waiting": 2, "source": "https://cdn.example:443"}
    return FileTransfer("sha256-x", name, **{**values, **changes})


def status(**changes: Any) -> Status:
    values: dict[str, Any] = {
        "version": "0.1.0", "pid": 7, "started": NOW - 65, "cache_dir": "/cache", "runtime_dir": "/run",
        "endpoint": "https://hub.example", "offline": False, "fuse": "pyfuse3", "ephemeral": True, "mounts": [MOUNT],
        "transfers": [file()], "cache_bytes": 2_500_000, "cache_limit": 10_000_000, "disk_free": 50_000_000_000,
        "origin_rate": 5e6, "origin_bytes": 3_000_000, "read_bytes": 4_000_000, "workers": 3, "errors": ["The hub was gone."],
        "sources": [Source("https://cdn.example:443", 5e6, 3_000_000, 8, 3, 0.0)], "quotas": [Quota("api", 499, 500, 130)],
        "connections_allowed": 8, "connections_in_use": 6, "reads_waiting": 2, "open_files": 4,
    }  # fmt: skip
    return Status(**{**values, **changes})


def text(seen: Status, width: int = 160, height: int | None = None, **more: Any) -> str:
    return "\n".join(line.text for line in frame(seen, now=NOW, width=width, height=height, **more))


def test_a_frame_shows_everything_that_goes_on() -> None:
    shown = text(status(), read_rate=7e6)
    for words in (
        "manta 0.1.0, pid 7, up 1 min 05 s, https://hub.example",
        "5.0 MB/s on 6 connections of 8, 3.0 MB in all",
        "7.0 MB/s, 4 open files, 2 reads waiting, 4.0 MB in all",
        "2.5 MB of 10.0 MB [###.........] 25%, 50.0 GB free",
        "api 499 of 500 (new in 2 min 10 s)",
        "/models/org-name  org/name  0123456789ab  500 B of 2.0 kB  25%  1.0 MB/s",
        "org/name/weights.safetensors  [###.........]  25%  5.0 MB/s  15 s  2 reads  cdn.example",
        "The hub was gone.",
    ):
        assert words in shown, f"{words!r} is not in\n{shown}"
    assert "MB/s, 4 open" not in text(status()), "no rate is known from one look"


def test_an_idle_daemon_has_no_empty_tables() -> None:
    shown = text(status(mounts=[], transfers=[], sources=[], errors=[], quotas=[], cache_limit=0))
    assert len(shown.splitlines()) == 5
    assert "the hub has told of none" in shown


def test_what_needs_a_look_stands_out() -> None:
    seen = status(
        transfers=[file("fine"), file("stuck", rate=0.0), file("idle", rate=0.0, waiting=0)],
        sources=[Source("http://cdn.example:80", 0, 0, 0, 1, NOW + 12)],
        quotas=[Quota("resolvers", 20, 500, 9)],
        mounts=[msgspec.structs.replace(MOUNT, stale=True)],
        problems=["Disk full: nothing is fetched."],
    )
    styles = {
        line.text.split()[0]: line.style for line in frame(seen, now=NOW, width=120, trouble="No daemon.") if line.text
    }
    assert styles["stuck"] == "warning"
    assert styles["fine"] == styles["idle"] == "plain"
    assert styles["cdn.example"] == styles["quota"] == styles["/models/org-name"] == "warning"
    assert styles["No"] == styles["The"] == styles["Disk"] == "error"
    assert "asked for a pause of 12 s more" in text(seen)


def test_other_nodes_are_sources_too_and_one_that_is_gone_stands_out() -> None:
    swarm = Swarm("0" * 16, "10.0.0.1:9402", 7, 7, 1.5e6, 2.5e6, 3_000_000, 4_000_000, 8, 2)
    sources = [Source("10.0.0.2:9402", 1.5e6, 3_000_000, 4, 0, 0.0, "0123456789abcdef")]
    shown = text(status(swarm=swarm, sources=sources))
    assert (
        "peers     7 of 7 up, 1.5 MB/s from them, 2.5 MB/s to them on 2 of 8 slots, 3.0 MB and 4.0 MB in all" in shown
    )
    assert "peer 01234567 10.0.0.2:9402  1.5 MB/s  3.0 MB  " in shown
    for up, style in ((7, "plain"), (6, "warning")):
        lines = frame(status(swarm=msgspec.structs.replace(swarm, up=up)), now=NOW, width=120)
        assert [line.style for line in lines if line.text.startswith("peers")] == [style]
    assert "peers" not in text(status())


def test_files_that_somebody_waits_for_come_first() -> None:
    files = [file("c", waiting=0, rate=1.0), file("b", waiting=0, rate=9.0), file("a", waiting=1, rate=0.0)]
    shown = text(status(transfers=files))
    assert shown.index("\na ") < shown.index("\nb ") < shown.index("\nc ")


def test_a_long_list_leaves_room_for_the_others_and_says_how_much_is_hidden() -> None:
    seen = status(
        transfers=[file(f"org/name/file{n:03}") for n in range(200)], errors=[f"Error {n}." for n in range(16)]
    )
    shown = text(seen, height=30)
    assert len(shown.splitlines()) <= 30
    assert "of 200)" in shown
    for words in ("/models/org-name", "cdn.example", "Error 15."):
        assert words in shown
    assert "of 200)" not in text(seen), "without a screen there is no end"


@pytest.mark.parametrize("seed", range(40))
def test_no_frame_is_larger_than_its_screen(seed: int) -> None:
    chance = random.Random(seed)
    names = ["f", "org/name/" + "x" * 300, "模型/权重.bin", "e\u0301te\u0301", "\x1b[31mred\r\nline\x07"]
    seen = status(
        transfers=[file(chance.choice(names), waiting=chance.randrange(3)) for _ in range(chance.randrange(30))],
        mounts=[MOUNT] * chance.randrange(10),
        errors=[chance.choice(names) for _ in range(chance.randrange(10))],
        sources=[Source("https://cdn.example:443", 1, 1, 1, 1, 0.0)] * chance.randrange(5),
    )
    width, height = chance.randint(1, 200), chance.randint(1, 60)
    lines = frame(seen, now=NOW, width=width, height=height, trouble=chance.choice(["", "No daemon."]))
    assert len(lines) <= height
    for line in lines:
        assert columns(line.text) <= width
        assert line.text.isprintable(), "a name from a hub must not move the cursor"


def test_columns_of_less_use_go_before_the_name_is_cut_short() -> None:
    name = "org/name/model-00001-of-00030.safetensors"
    seen = status(transfers=[file(name)])
    assert name in text(seen, width=100)
    narrow = text(seen, width=50).split("FILE IN FLIGHT")[1].split("SOURCE")[0]
    assert "org/name/...00030.safetensors" in narrow
    for words in ("cdn.example", "####", "WAITING"):
        assert words not in narrow
    assert "25%" in narrow


def test_texts_are_cut_by_columns_and_not_by_characters() -> None:
    assert (cut("abc", 5), cut("abc", 2), cut("模型", 3)) == ("abc", "ab", "模")
    assert shortened("org/name/weights", 12) == "org...eights"
    assert columns(shortened("模" * 20, 15)) <= 15
    assert clean("a\tb\x1b") == "a?b?"


def test_an_origin_is_shown_without_what_goes_without_saying() -> None:
    assert [host(o) for o in ("https://cdn:443", "http://hub:80", "http://127.0.0.1:8000", "https://x:80", "")] == [
        "cdn", "hub", "127.0.0.1:8000", "x:80", "",
    ]  # fmt: skip
