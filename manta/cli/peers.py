"""`manta peers`: who the other nodes are, what was exchanged with each, and how often the origin had to send a byte."""

from __future__ import annotations

import time
from collections.abc import Sequence

from manta.cli.frame import clean
from manta.cli.invocation import Invocation
from manta.cli.render import Console, duration, plural, rate, size, table
from manta.control.protocol import Cluster, Peer, Peers, SharedBlob

NO_SWARM = (
    "No swarm: this node shares chunks with nobody. To have it share, start the daemon with --peers:",
    "  --peers static:HOST:PORT,...             these nodes",
    "  --peers dns:NAME:PORT                    all addresses of a name, such as a headless Service",
    "  --peers kubernetes:NAMESPACE/SERVICE     the endpoints of a Service",
    "and --listen HOST:PORT for what the others reach it at; beyond loopback a key is needed (swarm.key_file, MANTA_SWARM_KEY).",
)

ADVICE = {
    "suspect": "It is tried again at once.",
    "down": "It is tried again every 30 s or sooner. Check that its daemon runs (`manta status` there) and that its port can be reached.",
    "refused": "Give all nodes the same swarm key (swarm.key_file), and set their clocks (NTP).",
}

MAP_COLUMNS = 24
"""Of the line that shows who has which part of a file."""

SHOWN = 20
"""Rows of a table of files or flows; --verbose shows all."""


def peers(invocation: Invocation) -> int:
    console, arguments = invocation.console, invocation.arguments
    client = invocation.connect()
    if arguments.page:
        link = client.page()
        console.document(link)
        console.say(link.url)
        if link.expires:
            left = duration(max(0.0, link.expires - time.time()))
            console.note(f"whoever has this link sees the page for {left}; then `manta peers --page` makes another")
        return 0
    seen = client.peers(cluster=arguments.cluster)
    console.document(seen)
    if not seen.enabled:
        console.say(*NO_SWARM)
        return 0
    _say_node(console, seen)
    _say_members(console, seen.members)
    _say_troubles(console, seen)
    if seen.cluster is not None:
        _say_cluster(console, seen.cluster)
    return 0


def copies(multiple: float | None) -> str:
    return "-" if multiple is None else f"{multiple:.2f}"


def _say_node(console: Console, seen: Peers) -> None:
    console.say(
        f"node     {seen.node} at {seen.address}, {seen.busy} of {plural(seen.slots, 'upload slot')} in use",
        f"swarm    {clean(seen.discovery)}",
        f"bytes    {size(seen.origin_bytes)} from the origin, {size(seen.peer_bytes)} from other nodes,"
        f" {size(seen.given_bytes)} to them since the daemon started",
        "origin   nothing has come since the daemon started"
        if seen.origin_multiple is None
        else f"origin   {copies(seen.origin_multiple)} bytes for each byte that came to this node ({size(seen.distinct_bytes)})",
    )


def _say_members(console: Console, members: Sequence[Peer]) -> None:
    if not members:
        console.say("", "No other node is known.")
        return
    now = time.time()
    rows = [
        (
            member.node or "(not heard yet)",
            member.address or "-",
            member.state,
            duration(max(0.0, now - member.since)) if member.since else "-",
            round_trip(member.rtt_s),
            rate(member.rate_in),
            rate(member.rate_out),
            size(member.bytes_in),
            size(member.bytes_out),
            f"{member.chunks_in:,}",
            f"{member.chunks_out:,}",
            f"{member.failures:,}",
        )
        for member in members
    ]
    head = (
        "NODE", "ADDRESS", "STATE", ">SINCE", ">RTT", ">IN NOW", ">OUT NOW", ">IN", ">OUT", ">CHUNKS IN", ">CHUNKS OUT", ">FAILURES",
    )  # fmt: skip
    console.say("", *table(head, rows))


def _say_troubles(console: Console, seen: Peers) -> None:
    sentences = [clean(seen.problem)] if seen.problem else []
    for member in seen.members:
        if member.state != "up":
            called = f"{member.node[:8]} at {member.address}" if member.node else member.address
            problem = f" {clean(member.problem)}" if member.problem else ""
            sentences.append(f"{called or member.node[:8]} is {member.state}.{problem} {ADVICE[member.state]}")
    if sentences:
        console.say("", "WHAT IS WRONG NOW", *(f"  {sentence}" for sentence in sentences))


def _say_cluster(console: Console, cluster: Cluster) -> None:
    console.say(
        "",
        f"cluster  {plural(len(cluster.nodes), 'node')} answered"
        + (f", {len(cluster.silent)} did not" if cluster.silent else "")
        + (f", {cluster.not_asked} were not asked" if cluster.not_asked else ""),
        f"origin   it sent {copies(cluster.origin_multiple)} copies: {size(cluster.origin_bytes)} for"
        f" {size(cluster.distinct_bytes)} that are different",
        *(f"         {clean(sentence)}" for sentence in cluster.silent),
    )
    rows = [
        (
            node.node,
            clean(node.address),
            rate(node.origin_rate),
            rate(node.rate_in),
            rate(node.rate_out),
            size(node.origin_bytes),
            size(node.bytes_in),
            size(node.bytes_out),
            f"{node.busy} of {node.slots}",
            size(node.cache_bytes),
        )
        for node in cluster.nodes
    ]
    head = (
        "NODE", "ADDRESS", ">FROM ORIGIN NOW", ">FROM NODES NOW", ">TO NODES NOW", ">FROM ORIGIN", ">FROM NODES", ">TO NODES", ">SLOTS",
        ">CACHE",
    )  # fmt: skip
    console.say("", *table(head, rows))
    _say_blobs(console, cluster)
    flows = [(flow.sender[:8], clean(flow.receiver[:8]), rate(flow.rate)) for flow in cluster.flows]
    _say_some(console, ("FROM", "TO", ">NOW"), flows)


def _say_blobs(console: Console, cluster: Cluster) -> None:
    nodes = len(cluster.nodes)
    rows = []
    for blob in cluster.blobs:
        least, most = min(blob.holders, default=0), max(blob.holders, default=0)
        of = f"{least}" if least == most else f"{least} to {most}"
        rows.append((clean(blob.name) or blob.blob[:19], size(blob.size), f"[{chunk_map(blob)}]", f"{of} of {nodes}"))
    _say_some(console, ("FILE", ">SIZE", "NODES THAT HAVE EACH PART", ">"), rows)
    if cluster.blobs_left_out:
        console.say(f"and {cluster.blobs_left_out:,} more files")


def _say_some(console: Console, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = rows if console.verbosity >= 1 else rows[:SHOWN]
    if shown:
        console.say("", *table(head, shown))
    if len(shown) < len(rows):
        console.say(f"and {len(rows) - len(shown)} more (--verbose shows all)")


def chunk_map(blob: SharedBlob) -> str:
    """How many nodes have each part of it, from its beginning to its end: '.' none, 1 to 9, '+' more. A part counts as its rarest
    chunk."""
    cells = blob.holders
    width = min(MAP_COLUMNS, len(cells))
    parts = [cells[len(cells) * n // width : len(cells) * (n + 1) // width] for n in range(width)]
    return "".join("." if not (least := min(part)) else str(least) if least < 10 else "+" for part in parts)


def round_trip(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds > 0 else "-"
