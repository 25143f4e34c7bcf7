"""Who owns a chunk: rendezvous hashing over the members, here and only here. Pure.

Every node ranks the members for a chunk by a hash of both; the first is the owner, who alone reads it from the origin, unless few members
share evenly (`owners`). A member that comes or goes changes the owners of its own share only, with few members of a few more: where one
comes, the owner before is now second, and is asked before the origin.
Used by `manta.swarm.choice`, the daemon's questions to the hub (a key of any text has an owner too), and the simulator.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

EVEN_MEMBERS_MAX = 64
"""Up to so many nodes own a blob's chunks evenly. That takes a hash for each pair of node and chunk: 64 nodes and a file of 5 GB are
40,000, 20 ms. With more nodes than a file has chunks nobody has many anyway."""


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


def owners(nodes: Iterable[str], blob: str, chunk: int, first: int = 0) -> dict[int, list[str]]:
    """Of `chunk`, and of those that are given out together with it: the `first` (0: all) nodes to ask, the owner before all others.

    Up to EVEN_MEMBERS_MAX nodes share a blob evenly: of as many chunks in a row as there are nodes each owns one, the first of its ranking
    that has none of them yet. By rank alone one of 8 nodes has 8 of 32 chunks, where 4 would be its share, and all wait for it: the slowest
    took 1.53 times the bound instead of 1.35 (simulated, docs/swarm-simulation.md).
    """
    all_ = list(nodes)
    if len(all_) > EVEN_MEMBERS_MAX:
        return {chunk: ranking(all_, chunk_key(blob, chunk), first)}
    begin = chunk - chunk % len(all_)
    free, found = set(all_), {}
    for each in range(begin, begin + len(all_)):
        ranked = ranking(all_, chunk_key(blob, each))
        owner_ = next(node for node in ranked if node in free)
        free.discard(owner_)
        found[each] = [owner_, *(node for node in ranked if node != owner_)][: first or None]
    return found


def owned(nodes: Iterable[str], me: str, blob: str, chunks: Iterable[int]) -> list[int]:
    """Those of `chunks` that `me` owns among `nodes` (`me` may be left out of them), in their order.

    With many nodes it compares with each other one only as long as `me` leads: about 1 + ln N scores a chunk on average, not N.
    """
    others = [node for node in nodes if node != me]
    mine = []
    known: dict[int, list[str]] = {}
    for chunk in chunks:
        if len(others) < EVEN_MEMBERS_MAX:
            if chunk not in known:
                known = owners([*others, me], blob, chunk, 1)
            if known[chunk][0] == me:
                mine.append(chunk)
            continue
        key = chunk_key(blob, chunk)
        own = score(me, key), me
        if all((score(other, key), other) < own for other in others):
            mine.append(chunk)
    return mine
