"""benchmarks.witnesses: each finds what is right right, a wrong byte wrong, and an error an error."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed")

from benchmarks import witnesses
from benchmarks.rig import REPOSITORY, seeded_tensors
from benchmarks.witnesses import KINDS, Expected, Testimony
from manta.testing.hub.files import read_spec

SIZE = 3 * 1024 * 1024 + 4098
NAMES = ("one.safetensors", "two.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files as they should be, and beside it what they should be."""
    folder = tmp_path / "folder"
    folder.mkdir()
    expected = {}
    for name in NAMES:
        spec = seeded_tensors(name, SIZE, rows_max=64)
        content = read_spec(spec).read()
        (folder / name).write_bytes(content)
        expected[name] = Expected(spec, hashlib.sha256(content).hexdigest())
    (tmp_path / "files.json").write_bytes(msgspec.json.encode(expected))
    return folder


def hear(kind: str, folder: Path) -> tuple[Testimony, list[tuple[float, float]]]:
    log = folder.parent / "log"
    command = [sys.executable, "-m", "benchmarks.witnesses", kind, str(folder)]
    command += ["--files", str(folder.parent / "files.json"), "--log", str(log), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True, cwd=REPOSITORY)
    return msgspec.json.decode(done.stdout, type=Testimony), list(witnesses.RECORD.iter_unpack(log.read_bytes()))


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_right(kind: str, folder: Path) -> None:
    seen, reads = hear(kind, folder)
    assert (seen.errors, seen.wrong, seen.complaints) == (0, 0, [])
    assert seen.bytes >= len(NAMES) * SIZE
    assert seen.reads == len(reads) > len(NAMES)
    assert reads == sorted(reads)
    assert all(took >= 0 for _, took in reads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_byte(kind: str, folder: Path) -> None:
    with (folder / NAMES[1]).open("r+b") as file:
        file.seek(SIZE // 2)
        [byte] = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte ^ 1]))
    seen, _ = hear(kind, folder)
    assert (seen.errors, seen.wrong) == (0, 1)
    assert NAMES[1] in seen.complaints[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_counted_and_the_next_file_is_read(kind: str, folder: Path) -> None:
    (folder / NAMES[0]).unlink()
    (folder / NAMES[0]).symlink_to("/nowhere")
    seen, _ = hear(kind, folder)
    assert (seen.errors, seen.wrong) == (1, 0)
    assert seen.bytes >= SIZE


def test_a_name_that_is_gone_is_wrong(folder: Path) -> None:
    (folder / "three").write_text("")
    seen, _ = hear("random", folder)
    assert seen.wrong == len(NAMES)
