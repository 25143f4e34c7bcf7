"""Numbers, nodeids, and the kernel's memory of them."""

from __future__ import annotations

import pytest

from manta.errors import Absent
from manta.fs import inodes
from manta.fs.inodes import ROOT, InodeTable, inode_number
from manta.fs.journal import RecoveredName
from manta.fs.nodes import LinkNode, Node, TextNode
from manta.fs.views import SnapshotFolder
from manta.model.snapshot import Snapshot
from tests.fs.fakes import FIRST, MODEL, MemoryHub, MemorySource


def table() -> InodeTable:
    return InodeTable(SnapshotFolder(MemorySource(MemoryHub()), Snapshot.of(MODEL, FIRST, [])))


def text(key: str) -> TextNode:
    return TextNode(key, b"")


def look_up(known: InodeTable, node: Node, parent: int = ROOT, name: bytes = b"name", *, native: bool = False) -> int:
    nodeid, number = known.choose(node, native=native)
    known.told(node, nodeid, number, parent, name)
    return nodeid


def test_numbers_are_the_same_in_every_daemon_and_never_reserved() -> None:
    assert inode_number("blob:sha256-ab") == 7_720_090_417_176_223_361
    numbers = {inode_number(f"key {i}") for i in range(1000)}
    assert len(numbers) == 1000
    assert all(ROOT < number < 2**63 for number in numbers)


def test_a_key_may_hold_bytes_that_are_no_utf8() -> None:
    assert inode_number("tree:\udcff") != inode_number("tree:\udcfe")


def test_each_lookup_is_forgotten_once() -> None:
    known = table()
    number = look_up(known, text("a"))
    assert look_up(known, text("a")) == number
    known.forget(number, 1)
    assert known.node(number) == text("a")
    known.forget(number, 1)
    with pytest.raises(Absent):
        known.node(number)
    assert len(known) == 1


def test_a_later_lookup_gives_the_newer_node() -> None:
    known = table()
    look_up(known, TextNode("ref", b"old"))
    number = look_up(known, TextNode("ref", b"new"))
    assert known.node(number) == TextNode("ref", b"new")


def test_unknown_numbers_and_the_root_are_not_forgotten() -> None:
    known = table()
    known.forget(12345, 7)
    known.forget(ROOT, 100)
    assert isinstance(known.node(ROOT), SnapshotFolder)


def test_colliding_keys_get_numbers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "inode_number", lambda key, attempt=0: 100 + attempt)
    known = table()
    first, second = look_up(known, text("a")), look_up(known, LinkNode("b", "a"))
    assert (first, second) == (100, 101)
    assert (known.choose(text("a")), known.choose(LinkNode("b", "a"))) == ((100, 100), (101, 101))
    assert known.node(first) == text("a")
    assert known.node(second) == LinkNode("b", "a")


def test_a_kernel_that_is_gone_remembers_nothing() -> None:
    known = table()
    look_up(known, text("a"))
    known.clear()
    assert len(known) == 1
    assert isinstance(known.node(ROOT), SnapshotFolder)


def test_a_folder_is_known_while_anything_in_it_is() -> None:
    """A file can be found in two folders, of which the kernel may forget the one that was found last."""
    known = table()
    folder = look_up(known, text("folder"), ROOT, b"folder")
    below = look_up(known, text("below"), folder, b"below")
    file = look_up(known, text("file"), below, b"file")
    known.forget(below, 1)
    known.forget(folder, 1)
    assert len(known) == 4
    assert look_up(known, text("file"), ROOT, b"same file") == file
    assert len(known) == 2
    known.forget(file, 2)
    assert len(known) == 1


# Nodeids and the ways in which files are open --------------------------------------------------------------------------


def test_a_node_keeps_its_nodeid_while_its_files_are_open_in_the_way_it_needs() -> None:
    known = table()
    number = look_up(known, text("a"))
    known[number].copying = 2
    assert look_up(known, text("a")) == number
    known[number].copying, known[number].native = 0, 1
    assert look_up(known, text("a"), native=True) == number


def test_a_node_gets_another_nodeid_where_its_files_are_open_in_another_way_and_one_number() -> None:
    known = table()
    number = look_up(known, text("a"))
    known[number].copying = 1
    assert known.choose(text("a"), native=True) == known.choose(text("a"), native=True)
    second = look_up(known, text("a"), native=True)
    assert second != number
    assert known[second].number == number
    assert known.nodeids("a") == [number, second]
    known[second].native = 1
    # It stays the one in use, also when the first is free again.
    known[number].copying = 0
    assert look_up(known, text("a"), native=True) == second
    assert look_up(known, text("a")) == number  # damaged, and copied again
    known[number].copying = 1
    assert look_up(known, text("a"), native=True) == second
    known.forget(second, 3)
    assert known.nodeids("a") == [number]
    assert len(known) == 2


def test_there_is_an_end_to_the_nodeids_of_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "NODEIDS_MAX", 3)
    known = table()
    for _ in range(3):
        known[look_up(known, text("a"), native=True)].copying = 1
    assert len(known.nodeids("a")) == 3
    assert look_up(known, text("a"), native=True) in known.nodeids("a")


# What an earlier daemon gave -------------------------------------------------------------------------------------------


def test_what_an_earlier_daemon_gave_is_known_by_its_place() -> None:
    known = table()
    folder, number = inode_number("folder"), inode_number("a")
    second = inode_number("a", 1)
    known.recover(
        {
            folder: RecoveredName(folder, ROOT, b"folder", 0),
            number: RecoveredName(number, folder, b"a", 2),
            second: RecoveredName(number, folder, b"a", 1),
        }
    )
    assert known.node(second) is None
    assert (known[second].parent, known[second].name) == (folder, b"a")
    assert known.nodeids("a") == [number, second]
    assert look_up(known, text("a"), folder, b"a") == second
    assert known.found(number, text("a"))
    assert known.node(number) == text("a")
    assert not known.found(number, text("b"))
    known.forget(number, 2)
    assert len(known) == 3
    known.forget(second, 2)
    assert len(known) == 1
