"""Inode numbers and the kernel's memory of them."""

from __future__ import annotations

import pytest

from manta.fs import inodes
from manta.fs.inodes import ROOT, InodeTable, inode_number
from manta.fs.nodes import LinkNode, TextNode
from manta.fs.views import SnapshotFolder
from manta.model.snapshot import Snapshot
from tests.fs.fakes import FIRST, MODEL, MemoryHub, MemorySource


def table() -> InodeTable:
    return InodeTable(SnapshotFolder(MemorySource(MemoryHub()), Snapshot.of(MODEL, FIRST, [])))


def text(key: str) -> TextNode:
    return TextNode(key, b"")


def test_numbers_are_the_same_in_every_daemon_and_never_reserved() -> None:
    assert inode_number("blob:sha256-ab") == 7_720_090_417_176_223_361
    numbers = {inode_number(f"key {i}") for i in range(1000)}
    assert len(numbers) == 1000
    assert all(ROOT < number < 2**63 for number in numbers)


def test_a_key_may_hold_bytes_that_are_no_utf8() -> None:
    assert inode_number("tree:\udcff") != inode_number("tree:\udcfe")


def test_each_lookup_is_forgotten_once() -> None:
    known = table()
    number = known.look_up(text("a"))
    assert known.look_up(text("a")) == number
    known.forget(number, 1)
    assert known[number].key == "a"
    known.forget(number, 1)
    with pytest.raises(KeyError):
        known[number]
    assert len(known) == 1


def test_a_later_lookup_gives_the_newer_node() -> None:
    known = table()
    known.look_up(TextNode("ref", b"old"))
    number = known.look_up(TextNode("ref", b"new"))
    assert known[number] == TextNode("ref", b"new")


def test_unknown_numbers_and_the_root_are_not_forgotten() -> None:
    known = table()
    known.forget(12345, 7)
    known.forget(ROOT, 100)
    assert known[ROOT].key == f"tree::{MODEL}@{FIRST}:"


def test_colliding_keys_get_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "inode_number", lambda key, attempt=0: 100 + attempt)
    known = table()
    first, second = known.look_up(text("a")), known.look_up(LinkNode("b", "a"))
    assert (first, second) == (100, 101)
    assert (known.number(text("a")), known.number(LinkNode("b", "a"))) == (100, 101)
    assert known[first].key == "a"
    assert known[second].key == "b"


def test_a_kernel_that_is_gone_remembers_nothing() -> None:
    known = table()
    known.look_up(text("a"))
    known.clear()
    assert len(known) == 1
    assert known[ROOT].key == f"tree::{MODEL}@{FIRST}:"
