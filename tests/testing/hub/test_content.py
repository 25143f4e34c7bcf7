"""Contents: any range equals the same range of the whole, and digests are what other programs say."""

import hashlib
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from manta.testing.hub.content import (
    BLOCK_LENGTH,
    PREAMBLE_LENGTH,
    BytesContent,
    Content,
    ContentChangedError,
    FileContent,
    GeneratedContent,
    JoinedContent,
    TensorShape,
    git_blob_sha1_hex,
    joined,
    safetensors_content,
    sha256_hex,
)

SIZE = 3 * BLOCK_LENGTH + 12_345
GENERATED = GeneratedContent("a", SIZE)
WHOLE = GENERATED.read()


@given(st.integers(0, SIZE), st.integers(0, 200_000))
def test_any_range_of_generated_content_is_that_range_of_the_whole(start: int, length: int) -> None:
    stop = min(SIZE, start + length)
    assert GENERATED.read(start, stop) == WHOLE[start:stop]


def test_generated_content_is_the_same_in_every_process() -> None:
    assert sha256_hex(GENERATED) == hashlib.sha256(WHOLE).hexdigest()
    assert sha256_hex(GeneratedContent("pinned", 10_000_000)) == (
        "36064fa83c2a029eb5080596cfd3cfdfb824883e0dbb53dbb76ce9ebf7dc43d3"
    )


def test_block_length_is_prime() -> None:
    assert all(BLOCK_LENGTH % divisor for divisor in range(2, int(BLOCK_LENGTH**0.5) + 1))


@pytest.mark.parametrize("mistake", [1, 512, 4096, 1 << 16, 1 << 20, 8 << 20, 16 << 20])
def test_a_wrong_offset_shows_within_the_first_bytes(mistake: int) -> None:
    for start in (0, PREAMBLE_LENGTH, 1 << 20, 4 << 20):
        assert WHOLE[start : start + 8] != WHOLE[start + mistake : start + mistake + 8]


def test_seeds_differ_from_the_first_bytes_on_and_everywhere_else() -> None:
    other = GeneratedContent("b", SIZE)
    for start in (0, PREAMBLE_LENGTH, BLOCK_LENGTH, SIZE - 8):
        assert other.read(start, start + 8) != WHOLE[start : start + 8]


def test_a_range_of_a_huge_file_costs_no_more_than_its_bytes() -> None:
    huge = GeneratedContent("huge", 50 << 30)
    assert len(huge.read((49 << 30) - 1, (49 << 30) + 1)) == 2


@given(st.lists(st.binary(max_size=20), max_size=5), st.data())
def test_joined_content_reads_across_its_parts(parts: list[bytes], data: st.DataObject) -> None:
    content = joined(*map(BytesContent, parts))
    whole = b"".join(parts)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert content.read(start, stop) == whole[start:stop]


def test_parts_of_contents_join(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    file = FileContent(str(path), path.stat())
    content = JoinedContent([(file, 0, 4), (BytesContent(b"xyz"), 1, 2), (file, 5, 10)])
    assert content.read() == b"0123y56789"


@pytest.mark.parametrize("change", ["rewritten", "replaced", "removed"])
def test_a_changed_file_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    content = FileContent(str(path), path.stat())
    if change == "rewritten":
        path.write_bytes(b"after, and longer")
    elif change == "replaced":
        fresh = tmp_path / "fresh"
        fresh.write_bytes(b"before")
        fresh.rename(path)
    else:
        path.unlink()
    with pytest.raises(ContentChangedError, match="file"):
        content.read()


@pytest.mark.parametrize("content", [BytesContent(b""), BytesContent(b"hello\n"), GeneratedContent("git", 100_000)])
def test_git_agrees_on_blob_ids(content: Content) -> None:
    said = subprocess.run(["git", "hash-object", "--stdin"], input=content.read(), capture_output=True, check=True)
    assert git_blob_sha1_hex(content) == said.stdout.decode().strip()


def test_safetensors_files_load(tmp_path: Path) -> None:
    tensors = [
        TensorShape("a", "F32", (3, 5)),
        TensorShape("b.weight", "BF16", (4, 1024)),
        TensorShape("c", "I8", (0,)),
    ]
    content = safetensors_content(tensors, "seed")
    path = tmp_path / "model.safetensors"
    path.write_bytes(content.read())
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"a", "b.weight", "c"}
        assert file.get_tensor("a").tobytes() == GeneratedContent("seed", 60 + 8192).read(0, 60)


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="unknown safetensors dtype 'F12'"):
        safetensors_content([TensorShape("a", "F12", (1,))], "seed")
