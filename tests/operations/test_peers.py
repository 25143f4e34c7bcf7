"""manta.operations.peers: sums over nodes, what is told of each, and other nodes that are slow, silent or lie."""

from __future__ import annotations

import json
import time

import msgspec
import pytest
import trio

from manta.config import SwarmConfig
from manta.control.protocol import Peers
from manta.errors import Absent, Invalid, Unavailable
from manta.model.extents import CHUNK_SIZE
from manta.operations.peers import (
    ASKED_MAX,
    BLOBS_SHOWN,
    BYTES_MAX,
    CELLS_MAX,
    CHUNKS_MAX,
    FLOWS_SHOWN,
    PAGE_LINK_SECONDS,
    REPORT_SECONDS,
    REPORTS_SECONDS,
    TEXT_CHARACTERS_MAX,
    PeerView,
    Sums,
    multiple,
)
from manta.swarm.protocol import Exchange, Report
from tests.operations.peer_state import (
    NOW,
    FakePeerState,
    bitmap,
    blob,
    busy_swarm,
    member,
    node_id,
    report,
)

CONFIG = SwarmConfig(peers="static:10.0.0.1:9402,10.0.0.2:9402")
SIZE = 4 * CHUNK_SIZE


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def summed(*reports: Report) -> Sums:
    sums = Sums()
    for number, each in enumerate(reports, 1):
        sums.add(node_id(number), each)
    return sums


# Sums --------------------------------------------------------------------------------------------------------------------


def test_nothing_has_come_is_no_multiple() -> None:
    assert multiple(0, 0) is None
    assert multiple(5, 0) is None
    assert multiple(0, 5) == 0
    assert summed(report(1)).cluster(NOW, [], 0).origin_multiple is None


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
def test_nodes_that_share_everything_cost_the_origin_one_copy(nodes: int) -> None:
    reports = [report(n, blob(origin=SIZE // nodes, peers=SIZE - SIZE // nodes)) for n in range(1, nodes + 1)]
    cluster = summed(*reports).cluster(NOW, [], 0)
    assert cluster.origin_multiple == 1
    assert (cluster.origin_bytes, cluster.distinct_bytes) == (SIZE, SIZE)
    assert summed(reports[0]).distinct_bytes == SIZE
    assert [b.holders for b in cluster.blobs] == [[nodes] * 4]


def test_nodes_that_share_nothing_cost_a_copy_each() -> None:
    reports = [report(n, blob(origin=SIZE)) for n in (1, 2, 3)]
    assert summed(*reports).cluster(NOW, [], 0).origin_multiple == 3


def test_what_was_there_before_is_not_counted_as_come() -> None:
    """Half was in the cache when the daemon started, the other half came from the origin; and a whole one of which nothing came."""
    sums = summed(report(1, blob(origin=SIZE // 2), blob("b", origin=0)))
    assert sums.distinct_bytes == SIZE // 2
    assert sums.cluster(NOW, [], 0).origin_multiple == 1


def test_a_node_that_joins_a_warm_cluster_costs_the_origin_nothing() -> None:
    cluster = summed(report(1, blob()), report(2, blob(peers=SIZE))).cluster(NOW, [], 0)
    assert (cluster.origin_multiple, cluster.distinct_bytes) == (0, SIZE)


def test_the_last_chunk_is_as_long_as_it_is() -> None:
    size = 2 * CHUNK_SIZE + 5
    for have, held in ((b"\x07", size), (b"\x04", 5), (b"\x03", 2 * CHUNK_SIZE), (b"\xff", size)):
        sums = summed(report(1, blob(size=size, have=have, origin=3 * CHUNK_SIZE)))
        assert sums.distinct_bytes == held


def test_bytes_fetched_twice_or_evicted_make_the_multiple_larger() -> None:
    twice = summed(report(1, blob(origin=2 * SIZE))).cluster(NOW, [], 0)
    assert twice.origin_multiple == 2
    evicted = summed(report(1, blob(origin=SIZE), from_origin=3 * SIZE)).cluster(NOW, [], 0)
    assert evicted.origin_multiple == 3, "what left the cache came too"


def test_the_map_has_as_many_holders_as_the_rarest_chunk_of_a_cell() -> None:
    chunks = 2 * CELLS_MAX
    full = blob(size=chunks * CHUNK_SIZE, have=bitmap(chunks))
    odd = blob(size=chunks * CHUNK_SIZE, have=bitmap(chunks, lambda c: c % 2 == 1 or c < 4))
    (shared,) = summed(report(1, full), report(2, odd)).cluster(NOW, [], 0).blobs
    assert (shared.chunks, shared.chunks_per_cell, len(shared.holders)) == (chunks, 2, CELLS_MAX)
    assert shared.holders == [2, 2] + [1] * (CELLS_MAX - 2)
    (uneven,) = summed(report(1, blob(size=(CELLS_MAX + 1) * CHUNK_SIZE, have=b"\x01"))).cluster(NOW, [], 0).blobs
    assert len(uneven.holders) == CELLS_MAX // 2 + 1


def test_flows_are_told_by_those_who_receive() -> None:
    one = report(
        1, exchanges=[Exchange(node=node_id(2), rate_in=5.0, rate_out=3.0), Exchange(node="gone", rate_out=2.0)]
    )
    two = report(2, exchanges=[Exchange(node=node_id(1), rate_in=1.0, rate_out=9.0)])
    flows = summed(one, two).cluster(NOW, [], 0).flows
    assert [(flow.sender, flow.receiver, flow.rate) for flow in flows] == [
        (node_id(2), node_id(1), 5.0),
        (node_id(1), "gone", 2.0),
        (node_id(1), node_id(2), 1.0),
    ]


def test_tables_are_bounded_and_the_rest_is_counted() -> None:
    blobs = [blob(f"a/b/{n:04}", id=f"sha256-{n:064x}", origin=SIZE if n >= 300 else 0) for n in range(5000)]
    exchanges = [Exchange(node=node_id(n), rate_in=float(n)) for n in range(2, 2000)]
    cluster = summed(report(1, *blobs, exchanges=exchanges)).cluster(NOW, [], 0)
    assert len(cluster.blobs) == BLOBS_SHOWN
    assert cluster.blobs_left_out == 5000 - BLOBS_SHOWN
    assert cluster.blobs[0].name == "a/b/0300", "what came lately goes first"
    assert len(cluster.flows) == FLOWS_SHOWN
    assert cluster.flows[0].rate == max(flow.rate for flow in cluster.flows)


@pytest.mark.parametrize(
    "lie",
    [
        blob(size=SIZE + 1, have=b"\x0f", origin=10**18),  # another size than ours
        blob(have=b"\xff" * 100, origin=SIZE),  # more chunks than it has
        blob("c", size=0, have=b""),
        blob("c", size=-5, have=b"\xff"),
        blob("c", size=2**60, have=b"\xff"),
    ],
)
def test_what_cannot_be_is_left_out(lie: object) -> None:
    cluster = summed(report(1, blob(origin=SIZE)), report(2, lie)).cluster(NOW, [], 0)  # type: ignore[arg-type]
    assert [b.holders for b in cluster.blobs] == [[1, 1, 1, 1]]
    assert cluster.distinct_bytes == SIZE


def test_numbers_and_texts_of_others_are_bounded() -> None:
    worst = report(
        2,
        *(blob(f"{n}", size=1 << 43, have=b"", id=f"s{n}") for n in range(10)),
        from_origin=2**63 - 1,
        from_peers=-5,
        origin_rate=float("nan"),
        started=float("inf"),
        address="\x1b[31m\n" + "x" * 5000,
        exchanges=[Exchange(node="\u202e" * 1000, rate_in=1e308, rate_out=-1.0)] * 3,
    )
    cluster = summed(report(1), worst).cluster(NOW, [], 0)
    said = json.loads(msgspec.json.encode(cluster), parse_constant=pytest.fail)
    node = next(node for node in said["nodes"] if node["node"] == node_id(2))
    assert node["origin_bytes"] == BYTES_MAX
    assert (node["bytes_in"], node["origin_rate"], node["started"]) == (0, 0, 0)
    assert node["address"].startswith("?[31m?xxx")
    assert len(node["address"]) == TEXT_CHARACTERS_MAX
    assert said["flows"][0]["sender"] == "?" * TEXT_CHARACTERS_MAX
    assert sum(b["chunks"] for b in said["blobs"]) <= CHUNKS_MAX
    assert msgspec.json.decode(msgspec.json.encode(cluster), type=type(cluster)) == cluster


def test_a_blob_that_a_node_names_twice_counts_once() -> None:
    (shared,) = summed(report(1, blob(), blob())).cluster(NOW, [], 0).blobs
    assert shared.holders == [1, 1, 1, 1]


# What this node says -----------------------------------------------------------------------------------------------------


def test_without_a_swarm_nothing_is_known_and_nothing_fails() -> None:
    view = PeerView(SwarmConfig())
    assert view.here() == Peers(enabled=False)
    assert view.summary() is None
    assert view.for_metrics() is None
    assert view.problem == ""
    assert trio.run(view.cluster) == Peers(enabled=False)
    with pytest.raises(Absent, match="--peers"):
        view.page()


def test_this_node_tells_of_itself_and_of_its_members() -> None:
    state = FakePeerState(
        known=[member(3), member(2, "suspect", problem="It did not answer."), member(4, "down", node="", version="")],
        own=report(1, blob(origin=SIZE // 4, peers=SIZE * 3 // 4), to_peers=7),
        exchanged=[
            Exchange(node=node_id(2), bytes_in=10, chunks_in=1, bytes_out=20, chunks_out=2, rate_in=3.0, rate_out=4.0, failures=5),
            Exchange(node=node_id(9), bytes_in=1),
        ],
        problem="The port is taken.",
    )  # fmt: skip
    view = PeerView(CONFIG, state)
    seen = view.here()
    assert (seen.enabled, seen.node, seen.discovery, seen.problem) == (
        True,
        node_id(1),
        CONFIG.peers,
        "The port is taken.",
    )
    assert (seen.origin_bytes, seen.peer_bytes, seen.given_bytes, seen.distinct_bytes) == (
        SIZE // 4,
        SIZE * 3 // 4,
        7,
        SIZE,
    )
    assert seen.origin_multiple == 0.25
    assert [(p.address, p.state, p.bytes_in, p.failures) for p in seen.members] == [
        ("10.0.0.2:9402", "suspect", 10, 5),
        ("10.0.0.3:9402", "up", 0, 0),
        ("10.0.0.4:9402", "down", 0, 0),
        ("", "down", 1, 0),
    ]
    assert seen.members[3].problem == "It is no member any more."
    assert seen.cluster is None
    short = view.summary()
    assert short is not None
    assert (short.members, short.up, short.rate_in, short.rate_out, short.bytes_in, short.busy) == (
        3,
        1,
        3.0,
        4.0,
        11,
        3,
    )
    metrics = view.for_metrics()
    assert metrics is not None
    assert (sorted(metrics.members), metrics.origin_multiple) == (["down", "suspect", "up"], 0.25)
    assert view.problem == "The port is taken."


# What the others say -----------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_members_are_asked_side_by_side_and_the_silent_are_named(autojump_clock: trio.testing.MockClock) -> None:
    state = FakePeerState(
        known=[
            member(2),
            member(3),
            member(4, "suspect"),
            member(5),
            member(6, "down", problem="Connection refused."),
            member(7, "refused", problem="Another key."),
            member(8, "down", node=""),
        ],
        own=report(1, blob(origin=SIZE // 2, peers=SIZE // 2)),
        others={
            node_id(2): report(2, blob(origin=SIZE // 2, peers=SIZE // 2)),
            node_id(3): None,
            node_id(4): None,
            node_id(5): Invalid("The body is no Report."),
        },
    )
    began = trio.current_time()
    seen = await PeerView(CONFIG, state, clock=lambda: NOW).cluster()
    assert trio.current_time() - began == pytest.approx(REPORT_SECONDS)
    assert sorted(state.asked) == [node_id(n) for n in (2, 3, 4, 5)]
    cluster = seen.cluster
    assert cluster is not None
    assert [node.node for node in cluster.nodes] == [node_id(1), node_id(2)]
    assert cluster.origin_multiple == 1
    assert cluster.silent == [
        "10.0.0.8:9402 is down.",
        f"{node_id(3)[:8]} at 10.0.0.3:9402 did not say what it has done within 2 s.",
        f"{node_id(4)[:8]} at 10.0.0.4:9402 did not say what it has done within 2 s.",
        f"{node_id(5)[:8]} at 10.0.0.5:9402 was not heard: The body is no Report.",
        f"{node_id(6)[:8]} at 10.0.0.6:9402 is down. Connection refused.",
        f"{node_id(7)[:8]} at 10.0.0.7:9402 is refused. Another key.",
    ]


@pytest.mark.trio
async def test_however_many_look_the_members_are_asked_once_a_second() -> None:
    state, clock = FakePeerState(known=[member(2)], others={node_id(2): report(2)}), Clock()
    view = PeerView(CONFIG, state, clock=clock)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(view.page_json)
    assert len(state.asked) == 1
    clock.now += REPORTS_SECONDS
    await view.cluster()
    assert len(state.asked) == 2
    clock.now -= 100  # a clock that is set back keeps nothing for long
    await view.cluster()
    assert len(state.asked) == 3


@pytest.mark.trio
async def test_who_goes_away_while_the_members_are_asked_keeps_nobody_from_asking() -> None:
    state = FakePeerState(known=[member(2)], others={node_id(2): None})
    view = PeerView(CONFIG, state)
    with trio.move_on_after(0) as scope:
        await view.cluster()
    assert scope.cancelled_caught
    state.others[node_id(2)] = report(2)
    seen = await view.cluster()
    assert seen.cluster is not None
    assert len(seen.cluster.nodes) == 2


@pytest.mark.trio
async def test_of_a_large_swarm_some_are_asked() -> None:
    members = [member(n) for n in range(2, ASKED_MAX + 12)]
    state = FakePeerState(known=members, others={m.node: report(0) for m in members})
    cluster = (await PeerView(CONFIG, state).cluster()).cluster
    assert cluster is not None
    assert (len(cluster.nodes), cluster.not_asked) == (ASKED_MAX + 1, 10)


@pytest.mark.trio
async def test_the_page_gets_all_of_it_as_json() -> None:
    said = json.loads(await PeerView(CONFIG, busy_swarm(), clock=lambda: NOW).page_json())
    assert len(said["members"]) == 7
    assert len(said["cluster"]["nodes"]) == 7
    assert said["cluster"]["origin_multiple"] == pytest.approx(1.0, abs=0.02)
    assert len(said["cluster"]["blobs"]) == 7
    assert said["cluster"]["flows"]


# The link to the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:9402", "http://127.0.0.1:9402/"),
        ("[::1]:9402", "http://[::1]:9402/"),
        ("localhost:1", "http://localhost:1/"),
    ],
)
def test_on_this_machine_the_link_needs_no_signature(listen: str, url: str) -> None:
    link = PeerView(CONFIG, FakePeerState(address=listen), lambda until: pytest.fail("signed")).page()
    assert (link.url, link.expires) == (url, 0)


def test_beyond_this_machine_the_link_is_signed_and_ends() -> None:
    state = FakePeerState(address="10.0.0.1:9402", known=[member(2)])
    link = PeerView(CONFIG, state, lambda until: f"until={until:.0f}&mac=abc", lambda: NOW).page()
    assert link.url == f"http://10.0.0.1:9402/?until={NOW + PAGE_LINK_SECONDS:.0f}&mac=abc"
    assert link.expires == NOW + PAGE_LINK_SECONDS
    secure = PeerView(SwarmConfig(peers=CONFIG.peers, tls_certificate="/c.pem"), state, lambda _: "q")
    assert secure.page().url == "https://10.0.0.1:9402/?q"


def test_a_link_to_a_server_at_all_addresses_names_one_that_leads_to_a_member() -> None:
    state = FakePeerState(
        address="0.0.0.0:9402", known=[member(2, address="name.example:1"), member(3, address="127.0.0.1:9")]
    )
    link = PeerView(CONFIG, state, lambda _: "q", time.time).page()
    assert link.url == "http://127.0.0.1:9402/?q"
    alone = PeerView(CONFIG, FakePeerState(address="0.0.0.0:9402"), lambda _: "q").page()
    assert "0.0.0.0" not in alone.url


@pytest.mark.trio
async def test_an_error_of_a_member_is_told_in_its_words() -> None:
    state = FakePeerState(known=[member(2)], others={node_id(2): Unavailable("It has\nclosed the connection.")})
    cluster = (await PeerView(CONFIG, state).cluster()).cluster
    assert cluster is not None
    assert cluster.silent[0].endswith("was not heard: It has?closed the connection.")
