"""Trees and refs on the disk, so that what is cached stays usable while the hub cannot be asked. The files' format is here and only here.

    meta/models--org--name/refs/main.json             the commit that a revision meant, and when the hub said so
    meta/models--org--name/trees/COMMIT.json.lz4      the snapshot of a commit

Used by the daemon. Everything that writes is SLOW (fsync); reading a snapshot of 10,000 files takes about 40 ms, a ref some
microseconds. A lock lets trio thread and worker threads use it together. A damaged file is removed and taken for none: the hub is asked
again. What the hub calls things is checked or quoted before it becomes part of a path.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import lz4.frame
import msgspec

from manta.cache.disk import disk_error, disk_errors, replace_file
from manta.errors import Invalid
from manta.model.ids import Commit, RepoId, RepoKind, is_commit, parse_blob_id
from manta.model.snapshot import FileEntry, Snapshot

logger = logging.getLogger(__name__)

_VERSION = 1
_REF_SUFFIX = ".json"
_TREE_SUFFIX = ".json.lz4"

TREE_BYTES_MAX = 256 * 1024**2
"""Of a stored tree, unpacked: 250,000 files take about 50 MB. What another node sends may claim to be anything."""

SIZE_MAX = 16 * 1024**4
"""Of a file: what the filesystem of a cache holds, and above any that the hub takes."""

_NAME_BYTES_MAX = 200
"""A file name may have 255 bytes; a quoted revision that is longer than this is named by its hash instead. The file holds it in full."""


class _StoredFile(msgspec.Struct, frozen=True, array_like=True):
    path: str
    size: int
    blob: str
    """Empty where the origin hides it."""
    git_oid: str


class _StoredSnapshot(msgspec.Struct, frozen=True):
    version: int
    repo: str
    commit: str
    gated: bool
    private: bool
    files: list[_StoredFile]


class _StoredRef(msgspec.Struct, frozen=True):
    version: int
    revision: str
    commit: str
    when: float


_ref_decoder = msgspec.json.Decoder(_StoredRef)
_snapshot_decoder = msgspec.json.Decoder(_StoredSnapshot)


class MetadataStore:
    """The stored trees and refs below `directory`, the cache's ``meta`` folder."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """SLOW: stores `snapshot`, instead of what is stored of its commit: access to a gated repo may have changed what can be seen.

        Raises NoSpace and CacheBroken.
        """
        path = self._tree_path(snapshot.repo, snapshot.commit)
        stored = _StoredSnapshot(
            _VERSION,
            str(snapshot.repo),
            snapshot.commit,
            snapshot.gated,
            snapshot.private,
            [
                _StoredFile(f.path, f.size, str(f.blob) if f.blob is not None else "", f.git_oid)
                for f in snapshot.files.values()
            ],
        )
        # The checksum finds damage that is still JSON, such as another digit in a digest. No size: if damaged, it would be allocated.
        self._write(path, lz4.frame.compress(msgspec.json.encode(stored), content_checksum=True, store_size=False))

    def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        """SLOW for large trees: the stored snapshot, None where there is none. Raises CacheBroken."""
        path = self._tree_path(repo, commit)
        data = self._read(path)
        if data is None:
            return None
        try:
            return decode_snapshot(data, repo, commit)
        except Invalid as error:
            self._remove_damaged(path, error)
            return None

    def encoded(self, repo: RepoId, commit: Commit) -> bytes | None:
        """SLOW for large trees: what `decode_snapshot` reads, None where it is not stored. Raises CacheBroken."""
        return self._read(self._tree_path(repo, commit))

    def save_ref(self, repo: RepoId, revision: str, commit: Commit, when: float) -> None:
        """SLOW: notes that at `when` (seconds since the epoch) `revision` of `repo` was `commit`. Raises NoSpace and CacheBroken."""
        self._write(
            self._ref_path(repo, revision), msgspec.json.encode(_StoredRef(_VERSION, revision, _commit(commit), when))
        )

    def ref(self, repo: RepoId, revision: str) -> tuple[Commit, float] | None:
        """The commit that `revision` last was, and when; None where that is not stored. Raises CacheBroken."""
        path = self._ref_path(repo, revision)
        stored = self._read_ref(path)
        if stored is None:
            return None
        if stored.revision != revision:
            self._remove_damaged(path, Invalid(f"it is of {stored.revision!r}"))
            return None
        return Commit(stored.commit), stored.when

    def refs(self, repo: RepoId) -> dict[str, tuple[Commit, float]]:
        """What `ref` says of every stored revision of `repo`. Raises CacheBroken."""
        folder = self._folder(repo) / "refs"
        stored = (self._read_ref(folder / name) for name in self._names(folder, _REF_SUFFIX))
        return {ref.revision: (Commit(ref.commit), ref.when) for ref in stored if ref is not None}

    def snapshots(self, repo: RepoId) -> list[Commit]:
        """The commits of `repo` whose trees are stored, the latest stored last. Raises CacheBroken."""
        folder = self._folder(repo) / "trees"
        dated = []
        for name in self._names(folder, _TREE_SUFFIX):
            with suppress(FileNotFoundError), disk_errors(folder, "listing stored trees"):
                dated.append((os.stat(folder / name).st_mtime_ns, name.removesuffix(_TREE_SUFFIX)))
        return [Commit(commit) for _, commit in sorted(dated) if is_commit(commit)]

    def repos(self) -> list[RepoId]:
        """The repos of which something is stored, in order. Raises CacheBroken."""
        found = []
        for name in self._names(self._directory, ""):
            kind, _, rest = name.partition("--")
            with suppress(ValueError, Invalid):
                found.append(RepoId(RepoKind(kind), rest.replace("--", "/", 1)))
        return sorted(found)

    def forget(self, repo: RepoId) -> None:
        """SLOW: removes everything that is stored of `repo`. Raises CacheBroken."""
        folder = self._folder(repo)
        with self._lock, disk_errors(folder, "removing stored trees"):
            # Refs first: one without its tree would be worse than a tree that no ref names.
            for part in (folder / "refs", folder / "trees"):
                for name in self._names(part, ""):
                    (part / name).unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    part.rmdir()
            with suppress(FileNotFoundError):
                folder.rmdir()

    def mark(self, repo: RepoId, *, gated: bool, private: bool) -> None:
        """SLOW: notes with every stored tree of `repo` that it is gated or private by now, or neither. Raises NoSpace and CacheBroken."""
        for commit in self.snapshots(repo):
            snapshot = self.snapshot(repo, commit)
            if snapshot is not None and (snapshot.gated, snapshot.private) != (gated, private):
                self.save_snapshot(replace(snapshot, gated=gated, private=private))

    def _folder(self, repo: RepoId) -> Path:
        return self._directory / repo.folder

    def _tree_path(self, repo: RepoId, commit: Commit) -> Path:
        return self._folder(repo) / "trees" / f"{_commit(commit)}{_TREE_SUFFIX}"

    def _ref_path(self, repo: RepoId, revision: str) -> Path:
        return self._folder(repo) / "refs" / f"{_file_name(revision)}{_REF_SUFFIX}"

    def _names(self, folder: Path, suffix: str) -> list[str]:
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise disk_error(error, folder, "listing stored trees") from error
        return sorted(name for name in names if name.endswith(suffix))

    def _read(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(error, path, "reading stored metadata") from error

    def _read_ref(self, path: Path) -> _StoredRef | None:
        data = self._read(path)
        if data is None:
            return None
        try:
            stored = _ref_decoder.decode(data)
            _expect((stored.version, is_commit(stored.commit)), (_VERSION, True))
        except (msgspec.DecodeError, UnicodeDecodeError, Invalid) as error:
            self._remove_damaged(path, error)
            return None
        return stored

    def _write(self, path: Path, data: bytes) -> None:
        with self._lock, disk_errors(path, "storing metadata"):
            # Not `parents`: where the whole cache was unmounted, nothing of it may appear in the directory below.
            path.parent.parent.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            replace_file(path, data)

    def _remove_damaged(self, path: Path, error: Exception) -> None:
        logger.warning("Removed the damaged %s: %s. The hub will be asked again.", path, error)
        with suppress(OSError):
            path.unlink()


def decode_snapshot(data: bytes, repo: RepoId, commit: Commit) -> Snapshot:
    """A snapshot as it is stored, and as nodes tell each other. Raises Invalid where it is damaged, or another's."""
    try:
        unpacker = lz4.frame.LZ4FrameDecompressor()
        plain = unpacker.decompress(data, max_length=TREE_BYTES_MAX)
        _expect((unpacker.eof, unpacker.unused_data or b""), (True, b""))
        stored = _snapshot_decoder.decode(plain)
        _expect((stored.version, stored.repo, stored.commit), (_VERSION, str(repo), commit))
        _expect(all(0 <= f.size <= SIZE_MAX for f in stored.files), True)
        files = [FileEntry(f.path, f.size, parse_blob_id(f.blob) if f.blob else None, f.git_oid) for f in stored.files]
    except (RuntimeError, EOFError, msgspec.DecodeError, UnicodeDecodeError, Invalid) as error:
        # RuntimeError: what lz4 raises, and what is nested too deep.
        raise Invalid(str(error)) from error
    return Snapshot.of(repo, commit, files, gated=stored.gated, private=stored.private)


def _file_name(revision: str) -> str:
    # quote() leaves dots alone: no file may begin with one, or be "..".
    name = quote(revision, safe="").replace(".", "%2E", 1) if revision.startswith(".") else quote(revision, safe="")
    return name if len(name) <= _NAME_BYTES_MAX else f"%{hashlib.sha256(revision.encode()).hexdigest()}"


def _commit(commit: Commit) -> str:
    """`commit`, which becomes part of a path. Raises Invalid where it is none."""
    if not is_commit(commit):
        raise Invalid(f"{commit!r} is not a commit: expected 40 hexadecimal digits.")
    return commit


def _expect(found: object, expected: object) -> None:
    if found != expected:
        raise Invalid(f"it holds {found}, not {expected}")
