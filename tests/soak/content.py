"""What the soak's hub holds, and the true bytes of it on the disk, made by the generator and not by the hub. Here and only here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from manta.testing.hub import CommitSpec, Generated, GeneratedContent, HubSpec, RepoSpec
from manta.testing.hub.files import FileSpec

MIB = 1024 * 1024

STEADY = tuple(f"soak/steady-{number}" for number in range(4))
MOVING = tuple(f"soak/moving-{number}" for number in range(2))
"""Their branch goes back and forth between two commits that share a file."""
FLIPPED = "soak/flipped"
"""The one repo whose bytes are altered on the way in a manner that only the digest shows."""
REPOS = (*STEADY, *MOVING, FLIPPED)
COMMITS = ("first", "second")

SIZES: Mapping[str, int] = {
    "small.json": 1777,
    "one-chunk.bin": 5 * MIB + 1,
    "weights.bin": 26 * MIB + 12_345,
    "more.bin": 17 * MIB,
}


@dataclass(frozen=True)
class File:
    """A file of one commit. `seed` names its content."""

    path: str
    seed: str
    size: int


def files(repo: str, commit: str) -> Iterator[File]:
    """In a moving repo the second commit has its own weights, and the rest as in the first."""
    for path, size in SIZES.items():
        other = repo in MOVING and commit == "second" and path == "weights.bin"
        yield File(path, f"{repo}/{path}{'/second' if other else ''}", size)


def spec() -> HubSpec:
    repos = []
    for repo in REPOS:
        specs: dict[str, dict[str, FileSpec]] = {
            commit: {file.path: Generated(file.seed, file.size) for file in files(repo, commit)} for commit in COMMITS
        }
        commits = [
            CommitSpec(name=commit, files=specs[commit]) for commit in (COMMITS if repo in MOVING else COMMITS[:1])
        ]
        repos.append(RepoSpec(id=repo, commits=commits))
    return HubSpec(repos=repos)


class Truth:
    """The true bytes of each file, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        for repo in REPOS:
            for commit in COMMITS:
                for file in files(repo, commit):
                    target = self.of(file)
                    if not target.exists():
                        with target.open("wb") as out:
                            out.writelines(GeneratedContent(file.seed, file.size).pieces())

    def of(self, file: File) -> Path:
        return self._folder / file.seed.replace("/", "--")
