"""The state file: whole after any crash, put aside when damaged, written once for many."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import msgspec
import pytest

from manta.errors import NoSpace, Unavailable
from manta_csi import state as state_module
from manta_csi.state import Entry, State
from manta_csi.threads import Threads


def entry(number: int, **changes: object) -> Entry:
    made = Entry(f"csi-{number}", f"volume-{number}", f"/k/{number}/mount", {"model": "org/name"}, False, 1)
    return msgspec.structs.replace(made, **changes)


def state_in(directory: Path) -> State:
    return State(directory, Threads("test", 2))


def test_what_was_put_is_there_after_a_restart(tmp_path: Path) -> None:
    async def before() -> None:
        state = state_in(tmp_path)
        assert state.load() == ""
        await state.put(entry(1))
        await state.put(entry(2))
        await state.put(entry(2, readonly=True))
        await state.drop("/k/1/mount")
        await state.drop("/k/9/mount")

    asyncio.run(before())
    state = state_in(tmp_path)
    assert state.load() == ""
    assert state.entries() == [entry(2, readonly=True)]
    assert state.get("/k/1/mount") is None
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{broken", b'{"version":1}', b'{"version":2,"entries":[]}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_file_is_put_aside(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "publications.json").write_bytes(content)
    state = state_in(tmp_path)
    assert "cannot be used" in state.load()
    assert len(state) == 0
    assert (tmp_path / "publications.json.damaged").read_bytes() == content
    assert state_in(tmp_path).load() == ""


def test_a_write_that_was_cut_off_leaves_the_file_before(tmp_path: Path) -> None:
    async def put() -> None:
        await state_in(tmp_path).put(entry(1))

    asyncio.run(put())
    (tmp_path / "publications.json.new").write_bytes(b'{"version":1,"entr')
    state = state_in(tmp_path)
    assert state.load() == ""
    assert state.entries() == [entry(1)]


def test_many_changes_share_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[int] = []
    write = State._write

    def counted(self: State, number: int, content: bytes) -> None:
        writes.append(number)
        write(self, number, content)

    monkeypatch.setattr(State, "_write", counted)

    async def put() -> None:
        state = state_in(tmp_path)
        await asyncio.gather(*(state.put(entry(number)) for number in range(50)))

    asyncio.run(put())
    assert len(writes) <= 3
    state = state_in(tmp_path)
    state.load()
    assert len(state) == 50


def test_a_write_that_hung_does_not_bring_back_what_a_later_one_dropped(tmp_path: Path) -> None:
    state = asyncio.run(loaded(tmp_path))
    state._write(2, b"later")
    state._write(1, b"earlier")
    assert state.path.read_bytes() == b"later"


async def loaded(directory: Path) -> State:
    return state_in(directory)


def test_what_cannot_be_written_is_not_begun(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def put() -> None:
        state = state_in(tmp_path / "file")
        with pytest.raises(Unavailable, match="could not be written"):
            await state.put(entry(1))
        assert len(state) == 0

    asyncio.run(put())


def test_there_is_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "ENTRIES_MAX", 2)

    async def put() -> None:
        state = state_in(tmp_path)
        await state.put(entry(1))
        await state.put(entry(2))
        with pytest.raises(NoSpace):
            await state.put(entry(3))
        await state.put(entry(2, access=3))

    asyncio.run(put())
