"""What a directory tree is made of: folders, blobs, small texts and links, here and only here.

A node is a value with a `key` that names it for good: equal keys are one inode, in every mount and after a restart. So a blob has one
inode wherever it appears, and the kernel keeps one copy of its pages. No FUSE here; `manta.fs.views` has the folders.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from manta.fetch.sources import Provenance
from manta.model.ids import BlobId

FOREVER_SECONDS = 86400.0
"""How long the kernel may keep names and attributes that never change. A day, not for ever: nothing breaks if one was wrong."""


def blob_key(blob: BlobId) -> str:
    """The key of the node whose content is `blob`."""
    return f"blob:{blob}"


@dataclass(frozen=True, slots=True)
class BlobNode:
    """A file whose content is a blob."""

    provenance: Provenance

    @property
    def key(self) -> str:
        entry = self.provenance.entry
        if entry.blob is None:
            return f"hidden:{self.provenance.repo}@{self.provenance.commit}:{entry.path}"
        return blob_key(entry.blob)

    @property
    def size(self) -> int:
        return self.provenance.entry.size


@dataclass(frozen=True, slots=True)
class TextNode:
    """A small file that Manta writes itself."""

    key: str
    content: bytes
    lifetime_s: float = FOREVER_SECONDS
    """How long the kernel may take it for current."""


@dataclass(frozen=True, slots=True)
class LinkNode:
    """A symbolic link."""

    key: str
    target: str


class Folder(abc.ABC):
    """A directory. Its children may have to be asked of the hub."""

    key: str
    lifetime_s: float = FOREVER_SECONDS
    """How long the kernel may keep the answer to a lookup in it, absence included."""

    @abc.abstractmethod
    async def child(self, name: str) -> Node:
        """Raises Absent, or why the hub could not tell."""

    @abc.abstractmethod
    async def children(self) -> Sequence[tuple[str, Node]]:
        """What a listing shows, which may be less than `child` finds: nobody can list the whole hub."""

    def attributes(self) -> Mapping[str, str]:
        """Extended attributes, without their ``user.manta.`` prefix."""
        return {}


Node = Folder | BlobNode | TextNode | LinkNode
