"""The policy's tables, kept once for all nodes instead of once for each, here and only here.

`manta.swarm.choice.Choice` keeps a record of every member and ranks all of them for every chunk: little for one node, too much for ten
thousand in one process. `SharedChoice` decides as it does, call for call (tests/simulation/test_roster.py), and differs in where the
tables are: a record begins to exist when it is written to, and the ranking of a subset is the ranking of all without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar, overload

from manta.swarm.choice import _RANKED, Choice, _Member
from manta.swarm.ownership import EVEN_MEMBERS_MAX, chunk_key, ranking

T = TypeVar("T")


class Roster:
    """All nodes that there may ever be."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.places = {name: place for place, name in enumerate(self.names)}
        self._rankings: dict[tuple[str, int], list[str]] = {}

    def ranked(self, blob: str, chunk: int) -> list[str]:
        """All of them by rank."""
        known = self._rankings.get((blob, chunk))
        if known is None:
            known = self._rankings[blob, chunk] = ranking(self.names, chunk_key(blob, chunk))
        return known


class _Members(dict[str, _Member]):
    """All of the roster but `me` and `hidden`; holds the records that anything was written to."""

    def __init__(self, roster: Roster, me: str) -> None:
        super().__init__()
        self._roster = roster
        self.me = me
        self.hidden: set[str] = set()

    def __contains__(self, node: object) -> bool:
        return node in self._roster.places and node not in self.hidden and node != self.me

    def __missing__(self, node: str) -> _Member:
        if node not in self:
            raise KeyError(node)
        record = self[node] = _Member()
        return record

    @overload
    def get(self, node: str, default: None = None, /) -> _Member | None: ...
    @overload
    def get(self, node: str, default: _Member, /) -> _Member: ...
    @overload
    def get(self, node: str, default: T, /) -> _Member | T: ...
    def get(self, node: str, default: object = None, /) -> object:
        try:
            return self[node]  # not dict.get: that one looks at what is stored, and most is not
        except KeyError:
            return default

    def __len__(self) -> int:
        return len(self._roster.names) - 1 - len(self.hidden)

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[str]:
        return (node for node in self._roster.names if node in self)


class SharedChoice(Choice):
    """A `Choice` whose members are all of `roster` but those that `hide` names."""

    def __init__(self, me: str, downloads: int, roster: Roster) -> None:
        super().__init__(me, downloads)
        self._roster = roster
        self._table = self._members = _Members(roster, me)
        self._by_chunk: dict[tuple[str, int], dict[str, None]] = {}

    def follow(self, blobs: Iterable[str], now: float) -> None:
        super().follow(blobs, now)
        self._by_chunk = {key: nodes for key, nodes in self._by_chunk.items() if key[0] in self._followed}

    def presence(self, node: str, blob: str, have: bytes) -> None:
        before = int.from_bytes(self._have.get(blob, {}).get(node, b""), "little")
        super().presence(node, blob, have)
        if self._have.get(blob, {}).get(node) is have:
            self._index(node, blob, before, int.from_bytes(have, "little"))

    def _index(self, node: str, blob: str, before: int, after: int) -> None:
        """Who has a chunk is asked far more often than it changes."""
        changed = before ^ after
        while changed:
            bit = changed & -changed
            changed ^= bit
            nodes = self._by_chunk.setdefault((blob, bit.bit_length() - 1), {})
            if after & bit:
                nodes[node] = None
            else:
                nodes.pop(node, None)

    def holders(self, blob: str, chunk: int) -> list[str]:
        found = list(self._by_chunk.get((blob, chunk), ()))
        hints = self._hints.get((blob, chunk))
        return found if hints is None else [*found, *(node for node in hints.holders if node not in found)]

    def _lacking(self, node: str, blob: str, chunk: int, until: float) -> None:
        super()._lacking(node, blob, chunk, until)
        self._by_chunk.get((blob, chunk), {}).pop(node, None)

    @property
    def others(self) -> int:
        """How many members there are."""
        return len(self._table)

    @property
    def hidden(self) -> set[str]:
        """Those of the roster that are no members now; not to be written to."""
        return self._table.hidden

    def suspect(self, node: str, missing: bool) -> None:
        """`node` did not answer the last time, or did."""
        if node in self._table:
            self._table[node].suspect = missing

    def hide(self, node: str) -> None:
        """`node` is no member any more."""
        if node in self._table:
            if (record := self._table.pop(node, None)) is not None:
                self._gone[node] = record
            self._table.hidden.add(node)
            for blob, have in self._have.items():
                self._index(node, blob, int.from_bytes(have.pop(node, b""), "little"), 0)
            self._rankings.clear()
            self.epoch += 1

    def show(self, node: str) -> None:
        """`node` is a member again."""
        if node in self._table.hidden:
            self._table.hidden.discard(node)
            if node in self._gone:
                self._table[node] = self._gone.pop(node)
            self._rankings.clear()
            self.epoch += 1

    def set_members(self, nodes: Iterable[str]) -> None:
        wanted = set(nodes)
        for node in self._roster.names:
            if node in wanted:
                self.show(node)
            else:
                self.hide(node)

    def _ranked(self, blob: str, chunk: int) -> list[str]:
        if len(self._table) + 1 <= EVEN_MEMBERS_MAX:
            return super()._ranked(blob, chunk)
        known = self._rankings.get((blob, chunk))
        if known is None:
            here = (n for n in self._roster.ranked(blob, chunk) if n == self.me or n not in self._table.hidden)
            known = self._rankings[blob, chunk] = list(islice(here, _RANKED))
        return known

    def owned(self, blob: str, chunks: Iterable[int]) -> list[int]:
        if len(self._table) + 1 <= EVEN_MEMBERS_MAX:
            return super().owned(blob, chunks)
        return [chunk for chunk in chunks if self._ranked(blob, chunk)[0] == self.me]
