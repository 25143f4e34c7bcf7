"""DigestIndex: digests already taken, so that big files are read once and not at every start.

Keyed by what a content is (path, size, mtime and inode of a file; seed and size of a generated one). Kept in
one JSON file in a cache folder outside the served one; safe to delete at any time. Threads may share it.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from pathlib import Path

from manta.testing.hub.content import (
    Content,
    FileContent,
    GeneratedContent,
    git_blob_sha1_hex,
    sha256_hex,
)

# Smaller contents are hashed faster than their entry would be looked up and stored.
_SIZE_MIN = 1 << 20

# Entries kept: the newest. A hundred thousand big files are far beyond one hub.
_ENTRIES_MAX = 100_000

FORMAT = "manta-digests-1"


def default_path() -> Path:
    """Where the index lives unless told otherwise: $XDG_CACHE_HOME/manta/hub-index/digests.json."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "manta" / "hub-index" / "digests.json"


class DigestIndex:
    """Digests by content; remembers them in `path`, or only while the process lives when that is None."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._digests: dict[str, str] = {} if path is None else _load(path)
        self._changed = False
        self._stop = threading.Event()

    def stop(self) -> None:
        """Make digests being taken, and all later ones, end with DigestStoppedError."""
        self._stop.set()

    def sha256(self, content: Content) -> str:
        """The content's sha256, taken now if it is not known."""
        return self._digest("sha256", content)

    def git_sha1(self, content: Content) -> str:
        """The content's git blob id, taken now if it is not known."""
        return self._digest("git", content)

    def _digest(self, kind: str, content: Content) -> str:
        identity = _identity(content)
        key = f"{kind} {identity}"
        if identity:
            with self._lock:
                known = self._digests.pop(key, None)
                if known is not None:
                    self._digests[key] = known  # newest last
                    return known
        digest = (sha256_hex if kind == "sha256" else git_blob_sha1_hex)(content, self._stop)
        if identity:
            with self._lock:
                self._digests[key] = digest
                self._changed = True
        return digest

    def save(self) -> None:
        """Write the index if it has grown. A folder that cannot be written costs a re-read, not an error."""
        with self._lock:
            if self._path is None or not self._changed:
                return
            entries = dict(list(self._digests.items())[-_ENTRIES_MAX:])
            self._changed = False
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(self._path, json.dumps({"format": FORMAT, "digests": entries}))
        except OSError:
            return


def _write_whole(path: Path, text: str) -> None:
    """Put a file in place complete or not at all, whoever else writes it at the same time."""
    fd, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with open(fd, "w") as file:
            file.write(text)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


def _identity(content: Content) -> str:
    """What a content is known by; empty for those not worth remembering."""
    if content.size < _SIZE_MIN:
        return ""
    if isinstance(content, FileContent):
        size, mtime_ns, inode = content.identity
        return f"file {size} {mtime_ns} {inode} {content.path}"
    if isinstance(content, GeneratedContent):
        return f"generated {content.size} {content.seed}"
    return ""


def _load(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        return {}
    digests = stored.get("digests")
    return {str(key): str(value) for key, value in digests.items()} if isinstance(digests, dict) else {}
