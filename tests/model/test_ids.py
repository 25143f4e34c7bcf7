from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manta.errors import Invalid
from manta.model.ids import (
    BlobAlgorithm,
    BlobId,
    RepoId,
    RepoKind,
    Target,
    is_commit,
    is_name_part,
    parse_blob_id,
    parse_revision,
    parse_target,
    quote_revision,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = RepoId(RepoKind.MODEL, "org/name")


@pytest.mark.parametrize("name", ["a", "A1", "_x_", "Qwen2.5-0.5B", "a-b.c_d", "x" * 96])
def test_names_the_hub_allows(name: str) -> None:
    assert is_name_part(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", "a--b", "-a", "a-", ".a", "a.", "a/b", "a b", "ä", "a\n", "a.git", "x" * 97, "a\0"]
)
def test_names_the_hub_refuses(name: str) -> None:
    assert not is_name_part(name)


@pytest.mark.parametrize("name", ["name", "org/", "/name", "a/b/c", "org/..", "../name", "org//name", "org/a--b"])
def test_a_repo_is_org_and_name(name: str) -> None:
    with pytest.raises(Invalid, match="expected ORG/NAME"):
        RepoId(RepoKind.MODEL, name)


def test_a_repo_knows_its_parts_and_its_folder() -> None:
    repo = RepoId(RepoKind.DATASET, "org/name")
    assert (repo.organisation, repo.short_name) == ("org", "name")
    assert repo.folder == "datasets--org--name"
    assert str(repo) == "datasets/org/name"
    assert str(MODEL) == "org/name"


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("org/name", Target(MODEL)),
        ("hf://org/name", Target(MODEL)),
        ("models/org/name", Target(MODEL)),
        ("org/name/", Target(MODEL)),
        ("datasets/org/name", Target(RepoId(RepoKind.DATASET, "org/name"))),
        ("hf://spaces/org/name", Target(RepoId(RepoKind.SPACE, "org/name"))),
        ("org/name@v1.0", Target(MODEL, "v1.0")),
        (f"org/name@{COMMIT}", Target(MODEL, COMMIT)),
        ("org/name@refs/pr/12", Target(MODEL, "refs/pr/12")),
        ("org/name@refs/pr/12/onnx/int8", Target(MODEL, "refs/pr/12", "onnx/int8")),
        ("org/name@refs/convert/parquet", Target(MODEL, "refs/convert/parquet")),
        ("org/name@feature%2Fx/sub", Target(MODEL, "feature/x", "sub")),
        ("org/name/sub folder/b", Target(MODEL, None, "sub folder/b")),
        ("org/name/sub@x", Target(MODEL, None, "sub@x")),
    ],
)
def test_targets_are_read(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "org",
        "hf://",
        "models/org",
        "org/",
        "org/name@",
        "org/name@/x",
        "org/name@..",
        "org/name@a%2F..%2Fb",
        "org/name@-x",
        "org/name@a%0Ab",
        "org/name@%2Fx",
        "org/name/a/../b",
        "org/name/./b",
        "org/name/a//b",
        "org/na me",
    ],
)
def test_what_is_no_target_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_target(text)
    assert caught.value.message.endswith(".")


revisions = st.text(st.characters(min_codepoint=33, exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda r: not r.startswith(("/", "-")) and ".." not in r
)


@settings(deadline=None, derandomize=True)
@given(revisions)
def test_a_quoted_revision_reads_back(revision: str) -> None:
    assert parse_revision(quote_revision(revision)) == revision


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from(RepoKind),
    st.none() | revisions | st.sampled_from(["refs/pr/7", "refs/convert/parquet"]),
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1), max_size=3),
)
def test_a_written_target_reads_back(kind: RepoKind, revision: str | None, folders: list[str]) -> None:
    if any(part in {".", ".."} for part in folders):
        return
    target = Target(RepoId(kind, "org/name"), revision, "/".join(folders))
    assert parse_target(str(target)) == target


def test_blob_ids_read_back() -> None:
    for blob in (BlobId(BlobAlgorithm.SHA256, "ab" * 32), BlobId(BlobAlgorithm.GIT_SHA1, "0c" * 20)):
        assert parse_blob_id(str(blob)) == blob
    assert str(BlobId(BlobAlgorithm.GIT_SHA1, "0c" * 20)) == "git-" + "0c" * 20


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256-",
        "sha256-" + "ab" * 20,
        "git-" + "ab" * 32,
        "sha256-" + "AB" * 32,
        "md5-" + "ab" * 16,
        "sha256-" + "ab" * 31 + "/.",
        "sha256-" + "ab" * 32 + "\n",
    ],
)
def test_what_is_no_blob_id_is_refused(text: str) -> None:
    with pytest.raises(Invalid):
        parse_blob_id(text)


def test_commits() -> None:
    assert is_commit(COMMIT)
    assert not is_commit(COMMIT.upper())
    assert not is_commit(COMMIT[:-1])
    assert not is_commit(COMMIT + "\n")
