"""Identifiers: repos, targets, commits and blobs, and how each is written, here and only here. Pure values."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import NewType
from urllib.parse import quote, unquote

from manta.errors import Invalid

Commit = NewType("Commit", str)
"""A 40-hex git commit id."""

DEFAULT_REVISION = "main"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The Hub's own rule (huggingface_hub's validate_repo_id): word characters, '-', '.', no '--' or '..', at most 96 characters.
_NAME_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
# These branches hold a slash and are still one revision; any other revision with a slash must be written quoted (%2F).
_SLASHED_REVISION = re.compile(r"refs/(?:pr/\d+|convert/[^/]+)")


class RepoKind(enum.StrEnum):
    """What the Hub keeps in a repo. The value is the plural that its URLs use."""

    MODEL = "models"
    DATASET = "datasets"
    SPACE = "spaces"


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def is_name_part(name: str) -> bool:
    """Whether `name` can be an organisation's or a repo's name on the Hub."""
    return _NAME_PART.fullmatch(name) is not None and not name.endswith(".git")


@dataclass(frozen=True, slots=True, order=True)
class RepoId:
    """One repo of the origin. `name` is ORG/NAME."""

    kind: RepoKind
    name: str

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        if len(parts) != 2 or not all(is_name_part(part) for part in parts):
            raise Invalid(f"{self.name!r} is not a repo: expected ORG/NAME, of letters, digits, '.', '_' and '-'.")

    @property
    def organisation(self) -> str:
        return self.name.split("/")[0]

    @property
    def short_name(self) -> str:
        return self.name.split("/")[1]

    @property
    def folder(self) -> str:
        """The folder name that HF libraries use for this repo in their cache, such as ``models--org--name``."""
        return f"{self.kind.value}--{self.name.replace('/', '--')}"

    def __str__(self) -> str:
        return self.name if self.kind is RepoKind.MODEL else f"{self.kind.value}/{self.name}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a person asks to mount or prefetch: a repo, one revision of it (None: the default branch), one subfolder ("": all)."""

    repo: RepoId
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        revision = f"@{quote_revision(self.revision)}" if self.revision is not None else ""
        return f"{self.repo}{revision}{'/' if self.subfolder else ''}{self.subfolder}"


def quote_revision(revision: str) -> str:
    """A revision as one path segment; `refs/pr/1` and `refs/convert/x` stay readable, as the Hub's own clients write them."""
    return revision if _SLASHED_REVISION.fullmatch(revision) else quote(revision, safe="")


def parse_revision(text: str) -> str:
    """The revision that one path segment names (quoted or not). Raises Invalid for what no revision can be."""
    revision = unquote(text)
    if not revision or revision.startswith(("/", "-")) or ".." in revision or any(ord(c) < 33 for c in revision):
        raise Invalid(f"{text!r} is not a revision: expected a branch, a tag, refs/pr/N or a commit.")
    return revision


def parse_target(text: str) -> Target:
    """Reads ``[hf://][models/|datasets/|spaces/]ORG/NAME[@REVISION][/SUBFOLDER]``.

    A revision that contains a slash is written quoted (``@feature%2Fx``), except ``refs/pr/N`` and ``refs/convert/X``.
    Raises Invalid with the expected form.
    """
    rest = text.removeprefix("hf://").strip("/")
    kind = RepoKind.MODEL
    for candidate in RepoKind:
        if rest.startswith(candidate.value + "/"):
            kind, rest = candidate, rest.removeprefix(candidate.value + "/")
            break
    organisation, slash, rest = rest.partition("/")
    match = re.match(r"([^/@]*)(?:@(refs/(?:pr/\d+|convert/[^/]+)(?=/|$)|[^/]*))?(?:/(.*))?$", rest, re.DOTALL)
    if not slash or match is None:
        raise Invalid(
            f"{text!r} is not a target: expected ORG/NAME, ORG/NAME@REVISION or ORG/NAME@REVISION/FOLDER,"
            " with datasets/ or spaces/ before it where it is no model."
        )
    name, revision, subfolder = match.groups()
    folder = (subfolder or "").strip("/")
    if any(part in {"", ".", ".."} for part in folder.split("/")) and folder:
        raise Invalid(f"{text!r} names the folder {folder!r}, which cannot exist in a repo.")
    return Target(
        RepoId(kind, f"{organisation}/{name}"),
        parse_revision(revision) if revision is not None else None,
        folder,
    )


class BlobAlgorithm(enum.StrEnum):
    """How a blob's id was computed."""

    SHA256 = "sha256"
    """Of the content: LFS and Xet files."""
    GIT_SHA1 = "git"
    """Of ``blob SIZE\\0`` and the content: files kept in git itself."""


@dataclass(frozen=True, slots=True, order=True)
class BlobId:
    """The name of immutable content."""

    algorithm: BlobAlgorithm
    hex: str

    def __post_init__(self) -> None:
        pattern = _SHA256 if self.algorithm is BlobAlgorithm.SHA256 else _COMMIT
        if pattern.fullmatch(self.hex) is None:
            raise Invalid(f"{self.hex!r} is not a {self.algorithm.value} blob id.")

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.hex}"


def parse_blob_id(text: str) -> BlobId:
    """Reads what ``str(BlobId)`` writes. Raises Invalid."""
    algorithm, _, digest = text.partition("-")
    if algorithm not in {a.value for a in BlobAlgorithm}:
        raise Invalid(f"{text!r} is not a blob id: expected sha256-HEX or git-HEX.")
    return BlobId(BlobAlgorithm(algorithm), digest)
