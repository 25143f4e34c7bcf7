"""The driver's small state file: which volume it has published where, here and only here.

What is mounted stands in mountinfo, and whose it is the daemon knows; the file has what neither tells after a crash: with which arguments a
target was published (a republish with others is refused), and which publications the daemon has still to be told the end of. No tokens.

One JSON file, replaced as a whole: written aside, fsynced, renamed, and the directory fsynced. A file that cannot be read is put aside,
and the entries come from mountinfo and the daemon (`manta_csi.reconciliation`). Belongs to the event loop; writes in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from manta.errors import MantaError, NoSpace, Unavailable
from manta_csi.threads import Threads

log = logging.getLogger(__name__)

VERSION = 1
ENTRIES_MAX = 4096
"""A node has 110 pods by default and 200 volumes at our word."""
FILE_BYTES_MAX = 64 * 1024 * 1024
WRITE_S = 15.0
"""For a write with its two fsyncs. A busy disk of a node takes seconds at its worst."""


class Entry(msgspec.Struct, frozen=True):
    """A volume that is published, is being published, or whose end the daemon was not told yet."""

    name: str
    """Of the publication at the daemon."""
    volume: str
    """The volume's id; empty where it was recovered and nobody knows."""
    target: str
    attributes: dict[str, str] | None = None
    """As people wrote them; None where it was recovered."""
    readonly: bool = False
    access: int = 0
    """The access mode's number in CSI."""


class _File(msgspec.Struct, frozen=True):
    version: int
    entries: list[Entry]


class State:
    """The entries by target, and their file."""

    def __init__(self, directory: Path, threads: Threads) -> None:
        self.path = directory / "publications.json"
        self._threads = threads
        self._entries: dict[str, Entry] = {}
        self._changes = 0
        self._written = 0
        self._writing = asyncio.Lock()
        self._disk = threading.Lock()
        self._on_disk = 0

    def load(self) -> str:
        """Reads the file, at the start. Returns what was wrong with it, a sentence, or nothing. Blocks."""
        try:
            with self.path.open("rb") as file:
                content = file.read(FILE_BYTES_MAX + 1)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"The state file {self.path} cannot be read ({error.strerror})."
        try:
            if len(content) > FILE_BYTES_MAX:
                raise msgspec.ValidationError(f"more than {FILE_BYTES_MAX} bytes")
            read = msgspec.json.decode(content, type=_File)
            if read.version != VERSION:
                raise msgspec.ValidationError(f"version {read.version}, where this driver writes {VERSION}")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            with suppress(OSError):
                self.path.replace(aside)
            return f"The state file {self.path} cannot be used ({error}); it is kept as {aside.name}."
        self._entries = {entry.target: entry for entry in read.entries[:ENTRIES_MAX]}
        return ""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, target: str) -> Entry | None:
        return self._entries.get(target)

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    async def put(self, entry: Entry) -> None:
        """Returns when it is on the disk. Raises NoSpace when there are too many, Unavailable when it cannot be written."""
        if self._entries.get(entry.target) == entry:
            return
        if entry.target not in self._entries and len(self._entries) >= ENTRIES_MAX:
            raise NoSpace(f"This node has {ENTRIES_MAX} volumes of Manta already, and the driver keeps no more.")
        before = self._entries.get(entry.target)
        self._entries[entry.target] = entry
        try:
            await self._flush()
        except MantaError:
            if self._entries.get(entry.target) is entry:  # what is not on the disk is not begun
                if before is None:
                    del self._entries[entry.target]
                else:
                    self._entries[entry.target] = before
            raise

    async def drop(self, target: str) -> None:
        """Never fails: an entry that comes back after a crash is found to be of no use and dropped again."""
        if self._entries.pop(target, None) is None:
            return
        try:
            await self._flush()
        except MantaError as error:
            log.warning("%s", error.message)

    async def _flush(self) -> None:
        """All who change something while a write is under way share the next one."""
        self._changes += 1
        mine = self._changes
        async with self._writing:
            if self._written >= mine:
                return
            number = self._changes
            content = msgspec.json.encode(_File(VERSION, list(self._entries.values())))
            await self._threads.run(
                lambda: self._write(number, content), timeout_s=WRITE_S, what=f"Writing the state file {self.path}"
            )
            self._written = number

    def _write(self, number: int, content: bytes) -> None:
        with self._disk:
            if number < self._on_disk:
                return  # this one hung, and a later one was faster
            aside = self.path.with_name(f"{self.path.name}.new")
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
                with open(aside, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(self.path)
                folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except OSError as error:
                raise Unavailable(
                    f"The state file {self.path} could not be written: {error.strerror}. The node's disk may be full or read-only."
                ) from error
            self._on_disk = number
