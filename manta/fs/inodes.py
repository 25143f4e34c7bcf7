"""Inode numbers, and which node the kernel means by one, here and only here.

Numbers are derived from the node's key, so the next daemon gives the same. Nodes are kept while the kernel remembers them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from manta.fs.nodes import Folder, Node

ROOT = 1


def inode_number(key: str, attempt: int = 0) -> int:
    """63 bits of the key's hash, never 0 or ROOT. `attempt` gives another number where two keys collide (once in 10^9 at 10^5 nodes)."""
    digest = hashlib.blake2b(f"{attempt}:{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return max(int.from_bytes(digest, "big") >> 1, ROOT + 1)


@dataclass(slots=True)
class _Known:
    node: Node
    lookups: int


class InodeTable:
    """The nodes that the kernel may name. `root` is ROOT and is never forgotten."""

    def __init__(self, root: Folder) -> None:
        self._known: dict[int, _Known] = {ROOT: _Known(root, 1)}

    def __len__(self) -> int:
        return len(self._known)

    def number(self, node: Node) -> int:
        """The inode number that `node` has or would get."""
        attempt = 0
        while True:
            number = inode_number(node.key, attempt)
            known = self._known.get(number)
            if known is None or known.node.key == node.key:
                return number
            attempt += 1

    def look_up(self, node: Node) -> int:
        """The kernel learns of `node`: its number, with one more lookup to forget."""
        number = self.number(node)
        self.told(node, number)
        return number

    def told(self, node: Node, number: int) -> None:
        """As `look_up`, of a node whose `number` is known."""
        known = self._known.get(number)
        if known is None:
            self._known[number] = _Known(node, 1)
        else:
            known.node = node  # the same content, perhaps under a newer name or right
            known.lookups += 1

    def __getitem__(self, number: int) -> Node:
        """Raises KeyError for a number that was forgotten or never given."""
        return self._known[number].node

    def forget(self, number: int, lookups: int) -> None:
        """The kernel forgets `lookups` lookups. Unknown numbers are tolerated: an earlier daemon may have given them."""
        known = self._known.get(number)
        if known is None or number == ROOT:
            return
        known.lookups -= lookups
        if known.lookups <= 0:
            del self._known[number]

    def clear(self) -> None:
        """The kernel is gone: it remembers nothing but the root."""
        self._known = {ROOT: self._known[ROOT]}
