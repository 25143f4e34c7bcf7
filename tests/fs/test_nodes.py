"""Keys of nodes: what is one inode, and what is not."""

from __future__ import annotations

from manta.fetch.sources import Provenance
from manta.fs.nodes import FOREVER_SECONDS, BlobNode, TextNode
from manta.hub.origin import Access
from tests.fs.fakes import ACCESS, FIRST, MODEL, OTHER, SECOND, hidden, lfs, plain


def test_a_blob_is_one_inode_wherever_it_appears() -> None:
    here = BlobNode(Provenance(MODEL, FIRST, lfs("a.bin", b"weights"), ACCESS))
    there = BlobNode(Provenance(OTHER, SECOND, lfs("sub/b.bin", b"weights"), Access.anonymous()))
    assert here.key == there.key
    assert here.size == there.size == 7


def test_the_same_bytes_under_two_algorithms_are_two_blobs() -> None:
    assert (
        BlobNode(Provenance(MODEL, FIRST, lfs("a", b"x"), ACCESS)).key
        != BlobNode(Provenance(MODEL, FIRST, plain("a", b"x"), ACCESS)).key
    )


def test_what_the_hub_hides_is_an_inode_per_path() -> None:
    nodes = [
        BlobNode(Provenance(repo, commit, hidden(path), ACCESS))
        for repo in (MODEL, OTHER)
        for commit in (FIRST, SECOND)
        for path in ("a", "b")
    ]
    assert len({node.key for node in nodes}) == 8


def test_a_text_is_current_for_long_unless_it_says_otherwise() -> None:
    assert TextNode("key", b"").lifetime_s == FOREVER_SECONDS
