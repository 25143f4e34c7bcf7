"""Who owns a chunk: rendezvous hashing over the members, here and only here. Pure.

Every node ranks the members for a chunk by a hash of both; the first is the owner, who alone reads it from the origin. A member that
comes or goes changes the owners of its own share only: where one comes, the owner before is now second, and is asked
before the origin.
Used by `manta.swarm.choice`, the daemon's questions to the hub (a key of any text has an owner too), and the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash


def score(node: str, key: str) -> int:
    """How `node` ranks for `key`: larger is first. 64 bits, the same on every machine."""
    return xxhash.xxh3_64_intdigest(f"{node}\0{key}".encode())


def chunk_key(blob: str, chunk: int) -> str:
    """What a chunk is ranked by."""
    return f"{blob}/{chunk}"


def ranking(nodes: Iterable[str], key: str, first: int = 0) -> list[str]:
    """The `first` (0: all) of `nodes` by rank for `key`, the owner first. Ties, which one in 2**64 has, go by name."""
    ranked = sorted(nodes, key=lambda node: (score(node, key), node), reverse=True)
    return ranked[:first] if first else ranked


def owner(nodes: Iterable[str], key: str) -> str | None:
    """The first of the ranking; None where there is no node."""
    return max(nodes, key=lambda node: (score(node, key), node), default=None)


def owned(nodes: Iterable[str], me: str, blob: str, chunks: Iterable[int]) -> list[int]:
    """Those of `chunks` that `me` owns among `nodes` (`me` may be left out of them), in their order.

    Compares with each other node only as long as `me` leads: about 1 + ln N scores a chunk on average, not N.
    """
    others = [node for node in nodes if node != me]
    mine = []
    for chunk in chunks:
        key = chunk_key(blob, chunk)
        own = score(me, key), me
        if all((score(other, key), other) < own for other in others):
            mine.append(chunk)
    return mine
