"""manta.cli.peers: what `manta peers` shows, with what to do about troubles; and the flags that turn a swarm on."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from manta.cli.peers import MAP_COLUMNS, SHOWN, chunk_map
from manta.control.protocol import Cluster, ClusterNode, Flow, PageLink, Peer, Peers, SharedBlob
from tests.cli.conftest import Manta
from tests.cli.fake_daemon import FakeDaemon

ONE, TWO, THREE = ("a3f19db700000001", "a3f19f6e00000002", "a3f1a12500000003")


def shared(holders: list[int], name: str = "org/name/weights.safetensors") -> SharedBlob:
    return SharedBlob("sha256-" + "a" * 64, name, 1_000_000_000, len(holders), 1, holders)


def node(id_: str, number: int) -> ClusterNode:
    return ClusterNode(
        id_, f"10.0.0.{number}:9402", "0.1.0", 0.0, 500_000_000, 5e6, 400_000_000, 300_000_000, 4e6, 3e6, 8, 2, 10**9
    )


def swarm() -> Peers:
    now = time.time()
    return Peers(
        enabled=True,
        node=ONE,
        address="10.0.0.1:9402",
        discovery="dns:manta.default:9402",
        slots=8,
        busy=3,
        origin_bytes=125_000_000,
        peer_bytes=875_000_000,
        given_bytes=900_000_000,
        distinct_bytes=1_000_000_000,
        origin_multiple=0.125,
        members=[
            Peer(TWO, "10.0.0.2:9402", "up", now - 300, 0.00042, "0.1.0", "", 5_000_000, 6_000_000, 1234, 7, 2.5e6, 3.5e6, 1),
            Peer(THREE, "10.0.0.3:9402", "refused", now - 10, 0.0, "", "It signs with another key."),
            Peer("", "10.0.0.4:9402", "down", 0.0, 0.0, "", ""),
        ],
    )  # fmt: skip


def cluster(**changes: object) -> Cluster:
    values: dict[str, object] = {
        "asked": time.time(),
        "nodes": [node(ONE, 1), node(TWO, 2)],
        "silent": ["a3f1a125 at 10.0.0.3:9402 is refused."],
        "not_asked": 0,
        "origin_bytes": 1_000_000_000,
        "distinct_bytes": 980_000_000,
        "origin_multiple": 1.0204,
        "blobs": [shared([2, 2, 1, 0]), shared([2, 2], "org/\x1b[31mred")],
        "blobs_left_out": 3,
        "flows": [Flow(ONE, TWO, 4e6)],
    }
    return Cluster(**{**values, **changes})  # type: ignore[arg-type]


def test_without_a_swarm_it_says_how_to_turn_one_on(manta: Manta, daemon: FakeDaemon) -> None:
    done = manta("peers")
    assert done.code == 0
    assert "No swarm" in done.out
    for words in ("--peers static:HOST:PORT,...", "dns:NAME:PORT", "kubernetes:NAMESPACE/SERVICE", "MANTA_SWARM_KEY"):
        assert words in done.out
    assert manta("peers", "--json").json["enabled"] is False


def test_no_daemon_is_code_3(manta: Manta) -> None:
    assert manta("peers").code == 3


def test_it_shows_the_members_and_what_to_do_about_them(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.peers = swarm()
    done = manta("peers")
    assert done.code == 0
    lines = done.out.splitlines()
    assert f"node     {ONE} at 10.0.0.1:9402, 3 of 8 upload slots in use" in lines
    assert "swarm    dns:manta.default:9402" in lines
    assert "bytes    125 MB from the origin, 875 MB from other nodes, 900 MB to them since the daemon started" in lines
    assert "origin   0.12 bytes for each byte that came to this node (1.0 GB)" in lines
    (up,) = (line for line in lines if line.startswith(TWO))
    assert up.split()[1:9] == ["10.0.0.2:9402", "up", "5", "min", "00", "s", "0.4", "ms"]
    assert up.split()[9:] == ["2.5", "MB/s", "3.5", "MB/s", "5.0", "MB", "6.0", "MB", "1,234", "7", "1"]
    assert any(re.match(r"\(not heard yet\) +10\.0\.0\.4:9402 +down", line) for line in lines)
    troubles = done.out.split("WHAT IS WRONG NOW")[1]
    assert (
        "a3f1a125 at 10.0.0.3:9402 is refused. It signs with another key. Give all nodes the same swarm key" in troubles
    )
    assert "10.0.0.4:9402 is down. It is tried again every 30 s" in troubles
    assert "10.0.0.2" not in troubles
    assert manta("peers", "--json").json["members"][0]["chunks_in"] == 1234
    assert {str(request) for request in daemon.requests} >= {"GET /v1/peers"}
    assert "GET /v1/peers?cluster=1" not in {str(request) for request in daemon.requests}


def test_a_swarm_that_nothing_has_come_of_and_nobody_is_in(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.peers = Peers(
        enabled=True, node=ONE, address="127.0.0.1:9402", problem="The port is taken: choose another (--listen)."
    )
    out = manta("peers").out
    assert "nothing has come since the daemon started" in out
    assert "No other node is known." in out
    assert "The port is taken: choose another (--listen)." in out


def test_the_cluster_is_asked_for_explicitly(manta: Manta, daemon: FakeDaemon) -> None:
    daemon.peers = Peers(enabled=True, node=ONE, cluster=cluster())
    out = manta("peers", "--cluster").out
    assert daemon.asked("GET", r"/v1/peers\?cluster=1")
    for words in (
        "cluster  2 nodes answered, 1 did not",
        "origin   it sent 1.02 copies: 1.0 GB for 980 MB that are different",
        "a3f1a125 at 10.0.0.3:9402 is refused.",
        "org/name/weights.safetensors  1.0 GB  [221.]",
        "0 to 2 of 2",
        "org/?[31mred",
        "and 3 more files",
        "2 of 8",
        "a3f19db7  a3f19f6e  4.0 MB/s",
    ):
        assert words in out, f"{words!r} is not in\n{out}"
    assert manta("peers", "--cluster", "--json").json["cluster"]["origin_multiple"] == 1.0204
    daemon.peers = Peers(
        enabled=True, cluster=cluster(blobs=[shared([1], f"a/b/{n}") for n in range(SHOWN + 2)], not_asked=5)
    )
    out = manta("peers", "--cluster").out
    assert "and 2 more (--verbose shows all)" in out
    assert "5 were not asked" in out
    assert f"a/b/{SHOWN + 1}" in manta("peers", "--cluster", "-v").out


@pytest.mark.parametrize(
    ("holders", "shown"),
    [
        ([0, 1, 9, 10, 64], ".19++"),
        ([3], "3"),
        ([1] * MAP_COLUMNS + [0], "1" * (MAP_COLUMNS - 1) + "."),
        ([2] * 256, "2" * MAP_COLUMNS),
        ([], ""),
    ],
)
def test_a_map_is_as_weak_as_its_weakest_part(holders: list[int], shown: str) -> None:
    assert chunk_map(shared(holders)) == shown


def test_the_page_is_named_and_nothing_else_is_said(manta: Manta, daemon: FakeDaemon) -> None:
    assert manta("peers", "--page").out == "http://127.0.0.1:9402/\n"
    daemon.page = PageLink("https://10.0.0.1:9402/?until=5&mac=abc", time.time() + 600)
    done = manta("peers", "--page", "-v")
    assert done.out == "https://10.0.0.1:9402/?until=5&mac=abc\n"
    assert "for 10 min" in done.err
    assert "mac" not in done.err
    assert manta("peers", "--page", "--json").json["url"].startswith("https://")


def test_the_flags_of_a_swarm_are_settings(manta: Manta, place: Path) -> None:
    from manta.cli.invocation import Invocation
    from manta.cli.main import build_parser
    from manta.cli.render import Console

    for command in (["daemon"], ["mount", "org/name", str(place / "m")]):
        arguments = build_parser().parse_args(
            [*command, "--peers", "static:10.0.0.2:9402", "--listen", "127.0.0.1:9500"]
        )
        loaded = Invocation(arguments, Console()).loaded
        assert (loaded.config.swarm.peers, loaded.config.swarm.listen) == ("static:10.0.0.2:9402", "127.0.0.1:9500")
        assert str(loaded.origins["swarm.peers"]) == "--peers"
        assert str(loaded.origins["swarm.listen"]) == "--listen"
    done = manta("daemon", "--peers", "friends")
    assert done.code == 2
    assert "--peers is 'friends'" in done.err
