"""The programs that read while Manta is being killed, here and only here: each compares what it gets with what the hub holds. Run as

    python -m benchmarks.witnesses KIND FOLDER --files FILE --log FILE --seed N

    sequential   4 MiB reads in order, digested, and the digest compared with the hub's
    random       every MiB once in random order, compared with the content made anew
    mapped       the same by page faults
    load         safetensors, one tensor after the other, compared likewise

Each reads all files of FOLDER, from another one on than the others, and holds the folder open all the while. --files is a JSON file: what
each file is to be (`Expected`), in the words of the hub's own spec. --log gets one `RECORD` per read: when it began (seconds on the clock
that all processes share) and how long it took. Nothing is tried again: a read that fails is an error, and the next file follows.
Prints one JSON object (`Testimony`). A process that ends by SIGBUS has met an error in a mapping. Run by `survive`.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import math
import mmap
import os
import random
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TypeVar

import msgspec
from safetensors import safe_open

from manta.testing.hub.content import Content
from manta.testing.hub.files import Safetensors, read_spec

_Found = TypeVar("_Found")

KINDS = ("sequential", "random", "mapped", "load")
SEQUENTIAL_BYTES = 4 * 1024 * 1024
RANDOM_BYTES = 1024 * 1024
RECORD = struct.Struct("<dd")
COMPLAINTS_MAX = 5
"""Errors and wrong places that are told of; all are counted."""


class Expected(msgspec.Struct, frozen=True):
    spec: Safetensors
    sha256: str


class Testimony(msgspec.Struct):
    bytes: int = 0
    """Read and compared."""
    reads: int = 0
    errors: int = 0
    wrong: int = 0
    """Reads that gave other bytes than the hub has, and listings with other names."""
    complaints: list[str] = []


class Witness:
    def __init__(self, folder: Path, files: Mapping[str, Expected], log: IO[bytes], seed: int) -> None:
        self.testimony = Testimony()
        self._folder = folder
        self._files = files
        self._log = log
        self._random = random.Random(seed)

    def read_all(self, kind: str) -> None:
        names = sorted(self._files)
        first = KINDS.index(kind) % len(names)
        ways: dict[str, Callable[[Path, Expected], None]] = {
            "sequential": self._sequential,
            "random": self._at_random,
            "mapped": self._mapped,
            "load": self._load,
        }
        held = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for name in names[first:] + names[:first]:
                try:
                    if sorted(self._timed(lambda: os.listdir(held))) != names:
                        self._wrong("the folder has other names in it")
                    ways[kind](self._folder / name, self._files[name])
                except Exception as error:  # whatever safetensors makes of one: each is an error of a reader
                    self._failed(name, error)
        finally:
            os.close(held)

    def _sequential(self, path: Path, expected: Expected) -> None:
        buffer = memoryview(bytearray(SEQUENTIAL_BYTES))
        digest = hashlib.sha256()
        fd = self._timed(lambda: os.open(path, os.O_RDONLY))
        try:
            while count := self._timed(lambda: os.readv(fd, [buffer])):
                digest.update(buffer[:count])
                self.testimony.bytes += count
        finally:
            os.close(fd)
        if digest.hexdigest() != expected.sha256:
            self._wrong(f"{path.name}, read in order, has the digest {digest.hexdigest()} and not {expected.sha256}")

    def _at_random(self, path: Path, expected: Expected) -> None:
        fd = self._timed(lambda: os.open(path, os.O_RDONLY))
        try:
            self._blocks(path, read_spec(expected.spec), lambda start, length: _whole(fd, start, length))
        finally:
            os.close(fd)

    def _mapped(self, path: Path, expected: Expected) -> None:
        content = read_spec(expected.spec)
        fd = self._timed(lambda: os.open(path, os.O_RDONLY))
        try:
            with mmap.mmap(fd, content.size, prot=mmap.PROT_READ) as view:
                self._blocks(path, content, lambda start, length: view[start : start + length])
        finally:
            os.close(fd)

    def _blocks(self, path: Path, content: Content, read: Callable[[int, int], bytes]) -> None:
        starts = list(range(0, content.size, RANDOM_BYTES))
        self._random.shuffle(starts)
        for start in starts:
            stop = min(start + RANDOM_BYTES, content.size)
            found = self._timed(lambda: read(start, stop - start))  # noqa: B023 - called at once
            self._compare(path, start, found, content.read(start, stop))

    def _load(self, path: Path, expected: Expected) -> None:
        content = read_spec(expected.spec)
        sizes = {
            tensor.name: 2 * math.prod(tensor.shape) for tensor in expected.spec.tensors
        }  # F16, see rig.seeded_tensors
        at = content.size - sum(sizes.values())
        with self._timed(lambda: safe_open(path, framework="numpy")) as file:
            for name, size in sizes.items():
                tensor = self._timed(lambda: file.get_tensor(name))  # noqa: B023 - called at once
                self._compare(path, at, tensor.tobytes(), content.read(at, at + size))
                at += size

    def _compare(self, path: Path, start: int, found: bytes, true: bytes) -> None:
        self.testimony.bytes += len(found)
        if found != true:
            self._wrong(f"{path.name} has other bytes than the hub's in [{start}, {start + len(true)})")

    def _timed(self, read: Callable[[], _Found]) -> _Found:
        began = time.monotonic()
        try:
            return read()
        finally:
            self._log.write(RECORD.pack(began, time.monotonic() - began))
            self.testimony.reads += 1

    def _wrong(self, what: str) -> None:
        self.testimony.wrong += 1
        self._complain(what)

    def _failed(self, name: str, error: Exception) -> None:
        self.testimony.errors += 1
        number = errno.errorcode.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        self._complain(f"{name}: {number} {type(error).__name__}: {error}".replace(":  ", ": "))

    def _complain(self, what: str) -> None:
        if len(self.testimony.complaints) < COMPLAINTS_MAX:
            self.testimony.complaints.append(what)


def _whole(fd: int, start: int, length: int) -> bytes:
    """As much as there is: a read that meets an error in its middle gives what came before it, and the next read the error."""
    found = b""
    while len(found) < length and (more := os.pread(fd, length - len(found), start + len(found))):
        found += more
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="witnesses.py")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    files = msgspec.json.decode(options.files.read_bytes(), type=dict[str, Expected])
    with options.log.open("wb") as log:
        witness = Witness(options.folder, files, log, options.seed)
        witness.read_all(options.kind)
    print(msgspec.json.encode(witness.testimony).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
