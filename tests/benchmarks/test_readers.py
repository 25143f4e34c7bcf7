"""benchmarks.readers: each program reads all the bytes, once, and digests them right."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readers

BLOCK = 64 * 1024
SIZE = 10 * BLOCK + 4321


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a file.safetensors"
    path.write_bytes(content)
    return path


def run(*arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    command = [sys.executable, "-S", "-E", "-P", readers.__file__, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def blocks_of(content: bytes) -> str:
    return readers.blocks_digest(content[start : start + BLOCK] for start in range(0, len(content), BLOCK))


@pytest.mark.parametrize("program", ["sequential", "mapped"])
def test_in_order(program: str, file: Path, content: bytes) -> None:
    (result,) = run(program, str(file), "--block", str(BLOCK))
    assert result["bytes"] == SIZE
    assert result["digest"] == hashlib.sha256(content).hexdigest()
    assert 0 < result["began"] <= result["ended"]
    assert result["cpu_s"] > 0
    assert result["rss_peak"] > 1 << 20


@pytest.mark.parametrize("program", ["sequential", "mapped", "random --threads 2 --seed 7"])
def test_without_a_digest(program: str, file: Path) -> None:
    (result,) = run(*program.split(), str(file), "--block", str(BLOCK), "--no-digest")
    assert result["bytes"] == SIZE
    assert "digest" not in result


def test_the_cpu_time_is_that_of_reading(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(64 << 20))
    (result,) = run("sequential", str(file), "--block", str(BLOCK))
    # A sha256 of 64 MiB takes 20 ms on the fastest machine there is.
    assert result["cpu_s"] >= 0.02


def test_what_is_in_the_page_cache(file: Path) -> None:
    try:
        (result,) = run("resident", str(file), str(file))
    except subprocess.CalledProcessError as failed:
        if "cachestat: Function not implemented" not in failed.stderr:
            raise
        pytest.skip("this kernel has no cachestat")
    page = os.sysconf("SC_PAGESIZE")
    # It was just written, and nobody had a reason to take it out again.
    assert result["resident"] == [-(-SIZE // page) * page] * 2


def test_a_download_is_its_command_and_its_file(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'wb').write(b'x' * 1000); sum(range(10**6))"
    path = tmp_path / "loaded"
    (result,) = run("download", str(path), "--", sys.executable, "-S", "-c", script, str(path))
    assert result["bytes"] == 1000
    assert 0 < result["cpu_s"] <= 2 * (result["ended"] - result["began"])
    with pytest.raises(subprocess.CalledProcessError):
        run("download", str(path), "--", "false")


@pytest.mark.parametrize("threads", [1, 4])
def test_at_random(threads: int, file: Path, content: bytes) -> None:
    (result,) = run("random", str(file), "--block", str(BLOCK), "--threads", str(threads), "--seed", "7")
    assert result["bytes"] == SIZE
    assert result["digest"] == blocks_of(content)


def test_a_wrong_byte_shows_in_every_digest(file: Path, content: bytes) -> None:
    spoilt = bytearray(content)
    spoilt[5 * BLOCK] ^= 1
    file.write_bytes(spoilt)
    (result,) = run("random", str(file), "--block", str(BLOCK), "--threads", "2", "--seed", "7")
    assert result["digest"] != blocks_of(content)


def test_blocks_in_another_place_have_another_digest() -> None:
    assert readers.blocks_digest([b"a", b"b"]) != readers.blocks_digest([b"b", b"a"])


def test_probes_one_after_the_other(file: Path, content: bytes) -> None:
    results = run("probe", "--length", "4096", stdin=f"100 {file}\n{SIZE - 10} {file}\n")
    assert [result["bytes"] for result in results] == [4096, 10]
    assert results[0]["digest"] == hashlib.sha256(content[100:4196]).hexdigest()
    assert results[1]["digest"] == hashlib.sha256(content[-10:]).hexdigest()
    assert results[0]["began"] <= results[0]["opened"] <= results[0]["ended"]


@pytest.mark.parametrize("program", ["sequential", "mapped"])
def test_a_file_that_is_not_there_is_an_error(program: str, tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run(program, str(tmp_path / "none"), "--block", str(BLOCK))
    assert "FileNotFoundError" in failed.value.stderr


def test_a_read_error_in_a_thread_is_an_error_of_the_program(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        run("random", str(tmp_path), "--block", "4096", "--threads", "2", "--seed", "1")
    assert "IsADirectoryError" in failed.value.stderr


def test_a_folder_is_looked_at(tmp_path: Path) -> None:
    names = [f"folder/{number}" for number in range(5)]
    (tmp_path / "top" / "folder").mkdir(parents=True)
    for number, name in enumerate(names):
        (tmp_path / "top" / name).write_bytes(bytes(number))
    listed = tmp_path / "names"
    listed.write_text("\n".join(names))
    top = str(tmp_path / "top")
    (found,) = run("find", top)
    (asked,) = run("stat", top, "--names", str(listed))
    assert (found["entries"], found["total"]) == (asked["entries"], asked["total"]) == (5, 10)
    (opened,) = run("open", top, "--names", str(listed), "--times", "3")
    assert len(opened["open_s"]) == 15
    assert 0 < max(opened["open_s"]) < opened["ended"] - opened["began"]
