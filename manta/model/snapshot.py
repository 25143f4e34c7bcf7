"""A snapshot: the tree of one commit, here and only here. Pure values, built by `manta.hub`, read by `manta.fs`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from manta.errors import Corrupt
from manta.model.ids import BlobId, Commit, RepoId

_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a snapshot. `blob` is None where the origin hides the digest (gated, no access): it cannot be read."""

    path: str
    size: int
    blob: BlobId | None
    git_oid: str = ""
    """The git object id of the entry, which for LFS files is the pointer's and not the content's."""


@dataclass(frozen=True, slots=True)
class Contents:
    """The files of a folder and of all below it, summed up."""

    files: int
    size: int
    """Bytes of all of them together."""
    blobs: Mapping[BlobId, int]
    """How many of them have each blob; those whose blob is hidden are not here."""


@dataclass(frozen=True)
class Snapshot:
    """Files of `repo` at `commit`, by path. Raises Corrupt for a tree that no filesystem can show."""

    repo: RepoId
    commit: Commit
    files: Mapping[str, FileEntry]
    gated: bool = False
    private: bool = False

    @classmethod
    def of(
        cls,
        repo: RepoId,
        commit: Commit,
        files: Iterable[FileEntry],
        *,
        gated: bool = False,
        private: bool = False,
    ) -> Snapshot:
        return cls(repo, commit, MappingProxyType({f.path: f for f in files}), gated, private)

    def next_part(self, path: str) -> FileEntry | None:
        """The file that follows `path` where a model is cut into numbered parts: its name with one number one higher, as wide as before.
        None where there is none."""
        folder, slash, name = path.rpartition("/")
        for number in _NUMBER.finditer(name):
            follower = f"{int(number[0]) + 1:0{len(number[0])}d}"
            found = self.files.get(f"{folder}{slash}{name[: number.start()]}{follower}{name[number.end() :]}")
            if found is not None:
                return found
        return None

    @cached_property
    def folders(self) -> Mapping[str, Mapping[str, FileEntry | None]]:
        """Children by folder path ("" is the top): a FileEntry for a file, None for a folder. Names are in byte order."""
        folders: dict[str, dict[str, FileEntry | None]] = {"": {}}
        for path, entry in self.files.items():
            parts = path.split("/")
            if any(part in {"", ".", ".."} or not _is_name(part) for part in parts):
                raise Corrupt(f"The tree of {self.repo}@{self.commit} names {path!r}, which is not a path.")
            parent = ""
            for part in parts[:-1]:
                folder = f"{parent}/{part}" if parent else part
                if folders[parent].setdefault(part, None) is not None:
                    raise Corrupt(f"The tree of {self.repo}@{self.commit} has {folder!r} as a file and as a folder.")
                folders.setdefault(folder, {})
                parent = folder
            if folders[parent].setdefault(parts[-1], entry) is not entry:
                raise Corrupt(f"The tree of {self.repo}@{self.commit} has {path!r} twice.")
        return {
            folder: dict(sorted(children.items(), key=lambda item: item[0].encode()))
            for folder, children in folders.items()
        }

    def below(self, subfolder: str) -> Iterator[FileEntry]:
        """The files in `subfolder` and in its folders ("": all files); none where there is no such folder."""
        if not subfolder:
            yield from self.files.values()
            return
        folders = [subfolder] if subfolder in self.folders else []
        while folders:
            folder = folders.pop()
            for name, entry in self.folders[folder].items():
                if entry is not None:
                    yield entry
                else:
                    folders.append(f"{folder}/{name}")

    def showing(self, blob: BlobId) -> Iterator[FileEntry]:
        """The files that have `blob`. Looks through all."""
        return (entry for entry in self.files.values() if entry.blob == blob)

    def contents_of(self, subfolder: str) -> Contents:
        return self.contents if not subfolder else _sum(self.below(subfolder))

    @cached_property
    def contents(self) -> Contents:
        """Of the whole snapshot."""
        return _sum(self.files.values())


def _sum(entries: Iterable[FileEntry]) -> Contents:
    files = size = 0
    blobs: Counter[BlobId] = Counter()
    for entry in entries:
        files, size = files + 1, size + entry.size
        if entry.blob is not None:
            blobs[entry.blob] += 1
    return Contents(files, size, blobs)


def _is_name(part: str) -> bool:
    """Whether a filesystem can have this name: no NUL, and nothing that UTF-8 cannot write (lone surrogates)."""
    try:
        return b"\0" not in part.encode()
    except UnicodeEncodeError:
        return False
