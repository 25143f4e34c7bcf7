"""What the daemon answers about the swarm: `manta peers`, its metrics, and the status page's data. Here and only here.

`PeerState` is where it comes from (`manta.fetch.swarm`). What this node knows is told at once; what the others know they are asked, at
most once in REPORTS_SECONDS however many pages are open. All that other nodes say may be wrong, by mistake or on purpose: it is bounded
and made printable before it goes on. Belongs to the trio thread; long sums run in another.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from manta.config import SwarmConfig, parse_address
from manta.control.protocol import (
    Cluster,
    ClusterNode,
    Flow,
    PageLink,
    Peer,
    Peers,
    SharedBlob,
    Swarm,
)
from manta.errors import Absent, MantaError
from manta.model.extents import CHUNK_SIZE
from manta.swarm.protocol import BLOB_BYTES_MAX, BlobReport, Exchange, Report
from manta.telemetry.metrics import SwarmState
from manta.wire.peering import Member

REPORT_SECONDS = 2.0
"""How long a member has to say what it has done. It answers from memory; who takes longer is named as silent."""

REPORTS_SECONDS = 1.0
"""What the members said is good for this long. The page asks every second."""

ASKED_MAX = 64
"""Members that are asked. Below 255: holders are counted in bytes."""

BLOBS_MAX = 4096
CHUNKS_MAX = 4_000_000
"""Of one answer: 32 TiB, 4 MB of counts."""

BLOBS_SHOWN = 64
CELLS_MAX = 256
"""Per blob: 2 GiB to a chunk each; a page shows about as many side by side."""

FLOWS_SHOWN = 256
EXCHANGES_MAX = 1024
"""That are read of one report."""

TEXT_CHARACTERS_MAX = 400
BYTES_MAX = 2**56
"""That a node is believed to have moved, and the bytes per second: sums of them stay numbers that JSON can hold."""

PAGE_LINK_SECONDS = 600.0

_EXPANDED = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
"""A byte of a bitmap as eight bytes, 0 or 1: with them bitmaps are added as numbers."""


class PeerState(Protocol):
    """What the swarm's driver in the daemon knows."""

    node: str
    slots: int

    @property
    def address(self) -> str:
        """HOST:PORT."""
        ...

    @property
    def problem(self) -> str:
        """What does not work, a sentence; "" where all does."""
        ...

    @property
    def busy(self) -> int: ...

    def members(self) -> list[Member]: ...
    def exchanges(self) -> list[Exchange]: ...
    def report(self) -> Report: ...
    async def ask_report(self, node: str) -> Report: ...


class PeerView:
    """What is seen of the swarm: nothing without `state`. `signed` makes the query of a link to the page that is good until then, in
    seconds since the epoch."""

    def __init__(
        self,
        config: SwarmConfig,
        state: PeerState | None = None,
        signed: Callable[[float], str] = lambda _until: "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._state = state
        self._signed = signed
        self._clock = clock
        self._asking = trio.Lock()
        self._cluster: Cluster | None = None

    @property
    def problem(self) -> str:
        return self._state.problem if self._state is not None else ""

    # What this node knows --------------------------------------------------------------------------------------------

    def here(self) -> Peers:
        """Without asking anybody."""
        state = self._state
        if state is None:
            return Peers(enabled=False)
        report = state.report()
        own = Sums()
        own.add(state.node, report)
        distinct = own.distinct_bytes
        return Peers(
            enabled=True,
            node=state.node,
            address=state.address,
            discovery=self._config.peers,
            problem=state.problem,
            slots=state.slots,
            busy=state.busy,
            origin_bytes=report.from_origin,
            peer_bytes=report.from_peers,
            given_bytes=report.to_peers,
            distinct_bytes=distinct,
            origin_multiple=multiple(report.from_origin, distinct),
            members=described(state.members(), state.exchanges()),
        )

    def summary(self) -> Swarm | None:
        """For `manta status` and `manta top`, which ask every second. None without a swarm."""
        state = self._state
        if state is None:
            return None
        members, exchanges = state.members(), state.exchanges()
        return Swarm(
            node=state.node,
            address=state.address,
            members=len(members),
            up=sum(member.state == "up" for member in members),
            rate_in=sum(exchange.rate_in for exchange in exchanges),
            rate_out=sum(exchange.rate_out for exchange in exchanges),
            bytes_in=sum(exchange.bytes_in for exchange in exchanges),
            bytes_out=sum(exchange.bytes_out for exchange in exchanges),
            slots=state.slots,
            busy=state.busy,
        )

    def for_metrics(self) -> SwarmState | None:
        state = self._state
        if state is None:
            return None
        report, own = state.report(), Sums()
        own.add(state.node, report)
        return SwarmState(
            members=[member.state for member in state.members()],
            slots=state.slots,
            busy=state.busy,
            origin_multiple=multiple(report.from_origin, own.distinct_bytes),
        )

    # What all know ---------------------------------------------------------------------------------------------------

    async def cluster(self) -> Peers:
        """With what the other nodes say. Those that do not answer in REPORT_SECONDS are named."""
        if self._state is None:
            return Peers(enabled=False)
        async with self._asking:
            known = self._cluster
            if known is None or not 0 <= self._clock() - known.asked < REPORTS_SECONDS:
                known = self._cluster = await self._ask(self._state)
        return msgspec.structs.replace(self.here(), cluster=known)

    async def _ask(self, state: PeerState) -> Cluster:
        asked = self._clock()
        # Who is down is not waited for by every page; who is suspect may just be slow.
        members = sorted(state.members(), key=lambda m: (m.address, m.node))
        to_ask = [member for member in members if member.node and member.state in {"up", "suspect"}]
        others = [member for member in members if not member.node or member.state in {"down", "refused"}]
        silent = {_called(m): f"{_called(m)} is {m.state}. {_text(m.problem)}".rstrip() for m in others[:ASKED_MAX]}
        sums = Sums()
        sums.add(state.node, state.report())
        adding = trio.Lock()

        async def ask(member: Member) -> None:
            try:
                with trio.fail_after(REPORT_SECONDS):
                    report = await state.ask_report(member.node)
            except trio.TooSlowError:
                silent[_called(member)] = f"{_called(member)} did not say what it has done within {REPORT_SECONDS:g} s."
            except MantaError as e:
                silent[_called(member)] = f"{_called(member)} was not heard: {_text(e.message)}"
            else:
                async with adding:  # a thread at a time: the sums are one
                    await trio.to_thread.run_sync(sums.add, member.node, report)

        async with trio.open_nursery() as nursery:
            for member in to_ask[:ASKED_MAX]:
                nursery.start_soon(ask, member)
        return await trio.to_thread.run_sync(
            sums.cluster, asked, [silent[name] for name in sorted(silent)], len(to_ask[ASKED_MAX:])
        )

    # The page --------------------------------------------------------------------------------------------------------

    async def page_json(self) -> bytes:
        """The body of page.json: `Peers` with its cluster. Numbers that are none are null."""
        return msgspec.json.encode(await self.cluster())

    def page(self) -> PageLink:
        """Raises Absent without a swarm."""
        state = self._state
        if state is None:
            raise Absent(
                "There is no status page: this node shares chunks with nobody. Start the daemon with --peers (swarm.peers,"
                " MANTA_SWARM_PEERS); `manta peers` says how."
            )
        address = parse_address(state.address)
        assert address is not None
        scheme = "https" if self._config.tls_certificate else "http"
        host = _reached_at(address.host, [member.address for member in state.members()])
        url = f"{scheme}://{address._replace(host=host)}/"
        if _is_loopback(address.host):
            return PageLink(url, 0.0)
        until = self._clock() + PAGE_LINK_SECONDS
        return PageLink(f"{url}?{self._signed(until)}", until)


def described(members: Iterable[Member], exchanges: Iterable[Exchange]) -> list[Peer]:
    """The members with what was exchanged with each, by address; then those that are members no more and with whom something was."""
    by_node = {exchange.node: exchange for exchange in exchanges}
    there = [
        _peer(member, by_node.pop(member.node, None) if member.node else None)
        for member in sorted(members, key=lambda m: (m.address, m.node))
    ]
    gone = [
        _peer(Member(node, "", "down", 0.0, problem="It is no member any more."), exchange)
        for node, exchange in sorted(by_node.items())
    ]
    return there + gone


def _peer(member: Member, exchange: Exchange | None) -> Peer:
    seen = exchange or Exchange(node=member.node)
    return Peer(
        node=member.node,
        address=member.address,
        state=member.state,
        since=member.since,
        rtt_s=member.rtt_s,
        version=_text(member.version),
        problem=_text(member.problem),
        bytes_in=seen.bytes_in,
        bytes_out=seen.bytes_out,
        chunks_in=seen.chunks_in,
        chunks_out=seen.chunks_out,
        rate_in=seen.rate_in,
        rate_out=seen.rate_out,
        failures=seen.failures,
    )


# Sums over nodes ---------------------------------------------------------------------------------------------------------


def multiple(origin_bytes: int, distinct_bytes: int) -> float | None:
    """How many times the origin sent each of these bytes, on average."""
    return origin_bytes / distinct_bytes if distinct_bytes > 0 else None


@dataclass(slots=True)
class _Blob:
    size: int
    chunks: int
    name: str
    counts: int = 0
    """Who has each chunk: the count of chunk N is byte N of this number. Adding numbers adds all counts at once."""
    came: int = 0
    """Bytes that came for it to any node since its daemon's start."""

    def holders(self) -> bytes:
        return self.counts.to_bytes(self.chunks, "little")


@dataclass(slots=True)
class Sums:
    """Adds up what nodes say of themselves. Pure. The first that names a blob says how large it is: this node itself goes first."""

    nodes: list[ClusterNode] = field(default_factory=list)
    _blobs: dict[str, _Blob] = field(default_factory=dict)
    _chunks: int = 0
    _left_out: set[str] = field(default_factory=set)
    _received: dict[tuple[str, str], float] = field(default_factory=dict)
    _sent: dict[tuple[str, str], float] = field(default_factory=dict)

    def add(self, node: str, report: Report) -> None:
        """What `node` says: under the id by which it was asked, whatever it calls itself."""
        exchanges = report.exchanges[:EXCHANGES_MAX]
        self.nodes.append(
            ClusterNode(
                node=node,
                address=_text(report.address),
                version=_text(report.version),
                started=_number(report.started),
                origin_bytes=_count(report.from_origin),
                origin_rate=_number(report.origin_rate),
                bytes_in=_count(report.from_peers),
                bytes_out=_count(report.to_peers),
                rate_in=sum(_number(exchange.rate_in) for exchange in exchanges),
                rate_out=sum(_number(exchange.rate_out) for exchange in exchanges),
                slots=_count(report.slots),
                busy=_count(report.busy),
                cache_bytes=_count(report.cache_bytes),
            )
        )
        for exchange in exchanges:
            other = _text(exchange.node)
            self._received[other, node] = _number(exchange.rate_in)
            self._sent[node, other] = _number(exchange.rate_out)
        for seen in {told.blob: told for told in report.blobs}.values():  # one that a node names twice counts once
            self._add_blob(seen)

    def _add_blob(self, told: BlobReport) -> None:
        known = self._blobs.get(told.blob)
        if known is None:
            chunks = -(-told.size // CHUNK_SIZE)
            fits = 0 < told.size <= BLOB_BYTES_MAX and self._chunks + chunks <= CHUNKS_MAX
            if not fits or len(self._blobs) >= BLOBS_MAX:
                if len(self._left_out) < BLOBS_MAX:
                    self._left_out.add(_text(told.blob))
                return
            self._chunks += chunks
            known = self._blobs[told.blob] = _Blob(told.size, chunks, _text(told.name))
        if told.size != known.size or len(told.have) > -(-known.chunks // 8):
            return  # it speaks of something else
        have = b"".join(map(_EXPANDED.__getitem__, told.have))[: known.chunks]
        known.counts += int.from_bytes(have, "little")
        known.came += _count(told.from_origin) + _count(told.from_peers)

    @property
    def distinct_bytes(self) -> int:
        """Bytes that came to somebody since the start and that somebody has: each counts once. Never more than came, for a cache that
        was half full at the start."""
        return sum(min(_held_bytes(blob), blob.came) for blob in self._blobs.values() if blob.came)

    def cluster(self, asked: float, silent: list[str], not_asked: int) -> Cluster:
        origin_bytes, distinct = sum(node.origin_bytes for node in self.nodes), self.distinct_bytes
        # What came lately says more than what has long been there, what is large more than what is small.
        ranked = sorted(self._blobs.items(), key=lambda item: (not item[1].came, -item[1].size, item[0]))
        shown = sorted(ranked[:BLOBS_SHOWN], key=lambda item: (item[1].name, item[0]))
        return Cluster(
            asked=asked,
            nodes=sorted(self.nodes, key=lambda node: (node.address, node.node)),
            silent=silent,
            not_asked=not_asked,
            origin_bytes=origin_bytes,
            distinct_bytes=distinct,
            origin_multiple=multiple(origin_bytes, distinct),
            blobs=[_shared(id_, blob) for id_, blob in shown],
            blobs_left_out=len(ranked) - len(shown) + len(self._left_out),
            flows=self._flows(),
        )

    def _flows(self) -> list[Flow]:
        """By the receiver's word where it gave one: what was sent and is lost has not flowed."""
        told = {node.node for node in self.nodes}
        rates = {way: rate for way, rate in self._sent.items() if way[1] not in told} | self._received
        flows = [Flow(sender, receiver, rate) for (sender, receiver), rate in rates.items() if rate > 0]
        return sorted(flows, key=lambda flow: (-flow.rate, flow.sender, flow.receiver))[:FLOWS_SHOWN]


def _held_bytes(blob: _Blob) -> int:
    holders = blob.holders()
    held = (blob.chunks - holders.count(0)) * CHUNK_SIZE
    # The last chunk is shorter than the others.
    return held - (blob.chunks * CHUNK_SIZE - blob.size if holders[-1] else 0)


def _shared(id_: str, blob: _Blob) -> SharedBlob:
    holders, per_cell = blob.holders(), -(-blob.chunks // CELLS_MAX)
    cells = [min(holders[at : at + per_cell]) for at in range(0, blob.chunks, per_cell)]
    return SharedBlob(_text(id_), blob.name, blob.size, blob.chunks, per_cell, cells)


def _text(said: str) -> str:
    """A text of another node, for people: on one line, and of a bounded length."""
    return "".join(c if c.isprintable() else "?" for c in said[:TEXT_CHARACTERS_MAX])


def _number(said: float) -> float:
    return min(said, float(BYTES_MAX)) if math.isfinite(said) and said > 0 else 0.0


def _count(said: int) -> int:
    return min(max(0, said), BYTES_MAX)


# Addresses ---------------------------------------------------------------------------------------------------------------


def _called(member: Member) -> str:
    return f"{member.node[:8]} at {member.address}" if member.node else member.address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reached_at(host: str, members: Sequence[str]) -> str:
    """A host for a link: where the server listens at all addresses of this machine, the one that leads to another member."""
    try:
        listening = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not listening.is_unspecified:
        return host
    for member in members:
        with contextlib.suppress(ValueError, OSError):
            address = parse_address(member)
            assert address is not None
            family = socket.AF_INET6 if ipaddress.ip_address(address.host).version == 6 else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as way:
                way.connect((address.host, address.port))  # sends nothing: the kernel only looks up the route
                return str(way.getsockname()[0])
    return socket.gethostname()
