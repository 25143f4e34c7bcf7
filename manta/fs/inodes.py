"""What the kernel calls a node, and which node it means by that, here and only here.

A node has one *number* for good, which stat shows as st_ino, and the kernel names it by a *nodeid*. Both are derived from the node's key,
so the next daemon gives the same. The first nodeid of a node is its number; there are others because FUSE cannot mix files open by copying
and files open natively (their backing file given to the kernel) of one nodeid: where a node is looked up and the nodeid in use has files
open in the other way than the one it needs now, it gets the next.

Nodes are kept while the kernel remembers them, and folders while it remembers anything that was found in them. Of what an earlier daemon
gave, only the place is known (parent and name) until somebody asks for the node. Belongs to the trio thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from manta.errors import Absent
from manta.fs.journal import Journal, NoJournal, RecoveredName
from manta.fs.nodes import Folder, Node

ROOT = 1

NODEIDS_MAX = 64
"""Of one node. Two are in use for as long as blobs stay sealed; each chunk found damaged while readers stay can make one more."""


def inode_number(key: str, attempt: int = 0) -> int:
    """63 bits of the key's hash, never 0 or ROOT. `attempt` gives the key's other nodeids, and another number where two keys collide (once
    in 10^9 at 10^5 nodes)."""
    digest = hashlib.blake2b(f"{attempt}:{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return max(int.from_bytes(digest, "big") >> 1, ROOT + 1)


class Inode:
    """What is known of one nodeid."""

    __slots__ = ("backing", "children", "copying", "lookups", "name", "native", "node", "number", "pages", "parent")

    def __init__(self, node: Node | None, number: int, parent: int, name: bytes, lookups: int) -> None:
        self.node = node
        """None: an earlier daemon gave it, and nobody has asked for it since."""
        self.number = number
        self.parent = parent
        self.name = name
        """Where it was found last."""
        self.lookups = lookups
        self.children = 0
        """Known inodes whose `parent` it is."""
        self.copying = 0
        """Files open whose reads come here."""
        self.native = 0
        """Files open whose reads the kernel serves by itself."""
        self.backing: int | None = None
        """The kernel's number of the backing file, while any is open natively."""
        self.pages = False
        """The kernel may have pages of its own of it."""

    def fits(self, native: bool) -> bool:
        """Whether a file may be opened natively, or else by copying, beside those that are open."""
        return not (self.copying if native else self.native)


class InodeTable:
    """The inodes that the kernel may name. `root` is ROOT and is never forgotten."""

    def __init__(self, root: Folder, journal: Journal | None = None) -> None:
        self._journal = journal or NoJournal()
        self._root = root
        self._known: dict[int, Inode] = {ROOT: Inode(root, ROOT, ROOT, b"", 1)}
        self._others: dict[int, set[int]] = {}
        """By number: the known nodeids that are not the number itself."""
        self._current: dict[int, int] = {}
        """By number: the nodeid that was given last, where that is not the number itself."""

    def __len__(self) -> int:
        return len(self._known)

    def node(self, nodeid: int) -> Node | None:
        """None where it has to be found again, see `place`. Raises Absent for a nodeid that was forgotten or never given."""
        return self[nodeid].node

    def __getitem__(self, nodeid: int) -> Inode:
        """Raises Absent."""
        try:
            return self._known[nodeid]
        except KeyError:
            raise Absent(f"Inode {nodeid} is not known.") from None

    def find(self, nodeid: int) -> Inode | None:
        return self._known.get(nodeid)

    # Names -------------------------------------------------------------------------------------------------------------

    def choose(self, node: Node, *, native: bool = False) -> tuple[int, int]:
        """The nodeid by which the kernel should know `node`, whose next file is to be opened natively or by copying; and its number."""
        key = node.key
        number = self._number(key)
        current = self._current.get(number, number)
        known = self._known.get(current)
        if known is None or known.fits(native):
            return current, number
        for attempt in range(NODEIDS_MAX):
            nodeid = inode_number(key, attempt)
            known = self._known.get(nodeid)
            if known is None or (_is_of(known, key, number) and known.fits(native)):
                return nodeid, number
        return current, number

    def told(self, node: Node, nodeid: int, number: int, parent: int, name: bytes) -> None:
        """The kernel learns of `node` by what `choose` gave, as `name` in `parent`: one more lookup to forget."""
        known = self._known.get(nodeid)
        if known is None:
            self._journal.named(nodeid, number, parent, name)
            self._add(nodeid, Inode(node, number, parent, name, 1))
            self._hold(parent)
        elif known.parent == parent and known.name == name:
            self._journal.looked_up(nodeid)
            known.lookups += 1
        else:
            self._journal.named(nodeid, number, parent, name)
            known.lookups += 1
            self._hold(parent)
            before, known.parent, known.name = known.parent, parent, name
            self._release(before)
        known = self._known[nodeid]
        known.node = node  # the same content, perhaps under a newer name or right
        if nodeid != number:
            self._current[number] = nodeid
        else:
            self._current.pop(number, None)

    def forget(self, nodeid: int, lookups: int) -> None:
        """The kernel forgets `lookups` lookups. Unknown nodeids are tolerated: an earlier daemon may have given them."""
        known = self._known.get(nodeid)
        if known is None or nodeid == ROOT:
            return
        self._journal.forgot(nodeid, lookups)
        known.lookups = max(known.lookups - lookups, 0)
        self._drop_unused(nodeid, known)

    def nodeids(self, key: str) -> list[int]:
        """All by which the kernel may know the node with this key."""
        number = self._number(key)
        return [nodeid for nodeid in (number, *self._others.get(number, ())) if nodeid in self._known]

    def clear(self) -> None:
        """The kernel is gone: it remembers nothing but the root."""
        self._known = {ROOT: Inode(self._root, ROOT, ROOT, b"", 1)}
        self._others.clear()
        self._current.clear()

    # What an earlier daemon gave ---------------------------------------------------------------------------------------

    def recover(self, names: Mapping[int, RecoveredName]) -> None:
        """Takes over what the kernel knows. Before anything else is told."""
        for nodeid, name in names.items():
            if nodeid != ROOT:
                inode = Inode(None, name.number, name.parent, name.name, name.lookups)
                inode.pages = True
                self._add(nodeid, inode)
                if nodeid != name.number:
                    self._current[name.number] = nodeid
        for nodeid in names:
            if nodeid != ROOT:
                self._hold(self._known[nodeid].parent)

    def found(self, nodeid: int, node: Node) -> bool:
        """`node` is at the place where `nodeid` was found last. False where it is not what the kernel means."""
        if not any(inode_number(node.key, attempt) == nodeid for attempt in range(NODEIDS_MAX)):
            return False
        if (known := self._known.get(nodeid)) is not None:
            known.node = node
        return True

    def rewrite(self) -> None:
        """Appends all that is known to the journal."""
        for nodeid, known in self._known.items():
            if nodeid == ROOT:
                continue
            self._journal.named(nodeid, known.number, known.parent, known.name)
            if known.lookups > 1:
                self._journal.looked_up(nodeid, known.lookups - 1)
            elif not known.lookups:
                self._journal.forgot(nodeid, 1)

    # -------------------------------------------------------------------------------------------------------------------

    def _number(self, key: str) -> int:
        attempt = 0
        while True:
            number = inode_number(key, attempt)
            known = self._known.get(number)
            if known is None or _is_of(known, key, number):
                return number
            attempt += 1

    def _add(self, nodeid: int, inode: Inode) -> None:
        self._known[nodeid] = inode
        if nodeid != inode.number:
            self._others.setdefault(inode.number, set()).add(nodeid)

    def _hold(self, parent: int) -> None:
        if (known := self._known.get(parent)) is not None:
            known.children += 1

    def _release(self, parent: int) -> None:
        if (known := self._known.get(parent)) is not None:
            known.children = max(known.children - 1, 0)
            self._drop_unused(parent, known)

    def _drop_unused(self, nodeid: int, known: Inode) -> None:
        while not (known.lookups or known.children) and nodeid != ROOT:
            del self._known[nodeid]
            if nodeid != known.number:
                others = self._others[known.number]
                others.discard(nodeid)
                if not others:
                    del self._others[known.number]
                if self._current.get(known.number) == nodeid:
                    del self._current[known.number]
            nodeid = known.parent
            parent = self._known.get(nodeid)
            if parent is None:
                return
            known = parent
            known.children = max(known.children - 1, 0)


def _is_of(known: Inode, key: str, number: int) -> bool:
    """Whether `known` is of the node with this key. Of one that an earlier daemon gave the key is not known, and its number tells."""
    return known.node.key == key if known.node is not None else known.number == number
