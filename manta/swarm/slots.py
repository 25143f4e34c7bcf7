"""Whom a node serves now, and whom it sends elsewhere. Pure: used by the peer server, and by the simulator.

An upload link that serves a few at a time finishes each of them soon, and each that is done serves others: the chunk spreads like a tree.
One that serves everybody at once finishes nobody before the last. So there is a bound, and who is beyond it hears who has had the chunk
lately and may have time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

SLOTS = 8
"""Uploads at a time. Half of them may be one asker's where others wait."""

RECENT_CHUNKS_MAX = 4096
RECENT_HOLDERS_MAX = 8
"""Whom a chunk was given to lately: 32 GiB of chunks, about 1 MB of memory."""


class Slots:
    """`limit` uploads at a time. `acquire` before each, `release` after it."""

    def __init__(self, limit: int = SLOTS) -> None:
        if limit < 1:
            raise ValueError(f"at least 1 slot, not {limit}")
        self.limit = limit
        self._used: Counter[str] = Counter()
        self._busy = 0

    @property
    def busy(self) -> int:
        return self._busy

    def acquire(self, node: str) -> bool:
        """Takes a slot for `node`. False where there is none, or the last ones are not for one who has half of them."""
        if self._busy >= self.limit or (self._used[node] >= max(1, self.limit // 2)):
            return False
        self._used[node] += 1
        self._busy += 1
        return True

    def release(self, node: str) -> None:
        self._used[node] -= 1
        if self._used[node] <= 0:
            del self._used[node]
        self._busy -= 1


class Recipients:
    """Who was given which chunk lately: the nodes to name where there is no slot."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[tuple[str, int], OrderedDict[str, None]] = OrderedDict()

    def given(self, blob: str, chunk: int, node: str) -> None:
        """`node` has got all of the chunk."""
        nodes = self._nodes.setdefault((blob, chunk), OrderedDict())
        self._nodes.move_to_end((blob, chunk))
        nodes[node] = None
        nodes.move_to_end(node)
        if len(nodes) > RECENT_HOLDERS_MAX:
            nodes.popitem(last=False)
        if len(self._nodes) > RECENT_CHUNKS_MAX:
            self._nodes.popitem(last=False)

    def holders(self, blob: str, chunk: int, asker: str) -> list[str]:
        """The nodes that have it, who got it last first; not `asker`."""
        return [node for node in reversed(self._nodes.get((blob, chunk), ())) if node != asker]
