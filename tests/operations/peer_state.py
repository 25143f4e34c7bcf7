"""A swarm for tests: what the daemon's driver would know of it, without one. Here and only here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from manta.errors import MantaError, Unavailable
from manta.model.extents import CHUNK_SIZE
from manta.swarm.protocol import BlobReport, Exchange, Report
from manta.wire.peering import Member

NOW = 1_800_000_000.0
MIB = 1024**2
GIB = 1024**3


def node_id(number: int) -> str:
    return f"{0xA3F19C00 + 0x1B7 * number:08x}{number:08x}"


def member(number: int, state: str = "up", **changes: object) -> Member:
    values: dict[str, object] = {
        "node": node_id(number),
        "address": f"10.0.0.{number}:9402",
        "state": state,
        "since": NOW - 100 * number,
        "rtt_s": 0.0004 + 0.0001 * number,
        "version": "0.1.0",
    }
    return Member(**{**values, **changes})  # type: ignore[arg-type]


def bitmap(chunks: int, has: Callable[[int], bool] = lambda _chunk: True) -> bytes:
    """A bit for each chunk that `has` says is there."""
    bits = "".join("01"[has(chunk)] for chunk in reversed(range(chunks)))
    return int(bits, 2).to_bytes(-(-chunks // 8), "little")


def blob(
    name: str = "org/name/weights.safetensors",
    size: int = 4 * CHUNK_SIZE,
    have: bytes = b"\x0f",
    origin: int = 0,
    peers: int = 0,
    *,
    id: str = "",  # noqa: A002
) -> BlobReport:
    known = id or f"sha256-{sum(name.encode()):064x}"
    return BlobReport(blob=known, size=size, name=name, have=have, from_origin=origin, from_peers=peers)


def report(number: int, *blobs: BlobReport, **changes: object) -> Report:
    values: dict[str, object] = {
        "node": node_id(number),
        "address": f"10.0.0.{number}:9402",
        "version": "0.1.0",
        "started": NOW - 4000,
        "from_origin": sum(each.from_origin for each in blobs),
        "from_peers": sum(each.from_peers for each in blobs),
        "to_peers": 0,
        "blobs": list(blobs),
        "slots": 8,
        "busy": 0,
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class FakePeerState:
    """Node 1 of a swarm. `others` are what the members answer: a report, an error, or nothing at all (None)."""

    known: list[Member] = field(default_factory=list)
    own: Report = field(default_factory=lambda: report(1))
    exchanged: list[Exchange] = field(default_factory=list)
    others: dict[str, Report | MantaError | None] = field(default_factory=dict)
    node: str = node_id(1)
    address: str = "127.0.0.1:9402"
    problem: str = ""
    slots: int = 8
    busy: int = 3
    asked: list[str] = field(default_factory=list)

    def members(self) -> list[Member]:
        return self.known

    def exchanges(self) -> list[Exchange]:
        return self.exchanged

    def report(self) -> Report:
        return self.own

    async def ask_report(self, node: str) -> Report:
        self.asked.append(node)
        await trio.lowlevel.checkpoint()
        answer = self.others.get(node, Unavailable("It has closed the connection."))
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, MantaError):
            raise answer
        assert answer is not None
        return answer


def busy_swarm() -> FakePeerState:
    """Eight nodes that share two models, with a third that all have, one node that is down and one that is slow to say anything."""
    shards = [f"meta-llama/Llama-3.1-70B-Instruct/model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    chunks = 4 * GIB // CHUNK_SIZE

    def holds(number: int, shard: int) -> Callable[[int], bool]:
        # What a node owns it has first, from the front; then what others had first. Node 7 owns nothing any more.
        share, owned_to = {8: 0}.get(number, number), chunks - 80 * shard
        reach = (9 - shard) * chunks // 9 - 23 * number
        return lambda chunk: (
            chunk < owned_to and (chunk % 7 == share or chunk < reach - 61 * ((chunk // 37 + number) % 5))
        )

    def has(number: int) -> list[BlobReport]:
        found = []
        for shard, name in enumerate(shards):
            have = bitmap(chunks, holds(number, shard))
            bits = int.from_bytes(have, "little").bit_count()
            own = (chunks - 80 * shard) // 7 + 1
            found.append(
                blob(name, 4 * GIB, have, own * CHUNK_SIZE, (bits - own) * CHUNK_SIZE, id=f"sha256-{shard + 1:064x}")
            )
        small = 548 * MIB
        found.append(
            blob("openai-community/gpt2/model.safetensors", small, bitmap(69), small // 7, small - small // 7, id=f"sha256-{77:064x}")
        )  # fmt: skip
        text = "datasets/HuggingFaceFW/fineweb-edu/data/train-00000-of-00014.parquet"
        if number in {2, 5}:
            found.append(
                blob(
                    text,
                    2 * GIB,
                    bitmap(256, lambda c: c < 90 * number // 2),
                    45 * number * MIB * 4,
                    0,
                    id=f"sha256-{88:064x}",
                )
            )
        return found

    def between(number: int) -> list[Exchange]:
        found = []
        for other in range(1, 9):
            if other in {number, 7} or number == 7:
                continue
            weight = (number * 5 + other * 3) % 7
            back = (other * 5 + number * 3) % 7
            found.append(
                Exchange(
                    node=node_id(other),
                    bytes_in=weight * 300 * MIB,
                    chunks_in=weight * 37,
                    bytes_out=back * 300 * MIB,
                    chunks_out=back * 37,
                    rate_in=weight * 21e6,
                    rate_out=back * 21e6,
                    failures=2 if other == 4 else 0,
                )
            )
        return found

    def said(number: int) -> Report:
        exchanges = between(number)
        return report(
            number,
            *has(number),
            exchanges=exchanges,
            to_peers=sum(e.bytes_out for e in exchanges),
            origin_rate=31e6 + number * 2e6,
            busy=sum(e.rate_out > 0 for e in exchanges),
            cache_bytes=11 * GIB + number * 300 * MIB,
        )

    down = "It does not answer at 10.0.0.7:9402 (connection refused)."
    members = [member(number) for number in range(2, 9)]
    members[5] = member(7, "down", problem=down, rtt_s=0.0)
    members[4] = member(6, "suspect", since=NOW - 2, problem="It did not answer within 1 s.")
    return FakePeerState(
        known=members,
        own=said(1),
        exchanged=between(1),
        others={node_id(number): said(number) for number in (2, 3, 4, 5, 6, 8)},
        busy=5,
    )
