"""Reads a file in one of several ways and compares each byte with the true one; prints what it found as JSON. Standard library only.

    python -S -E -P reader.py KIND PATH TRUTH SEED

It stops at the first error. A reader that is given other bytes than the true ones says where.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import sys
import time
from collections.abc import Callable, Iterator

MIB = 1024 * 1024
KINDS = ("sequential", "backwards", "random", "small", "mapped", "again")
WRONG_MAX = 3
"""Places told of."""

Piece = tuple[int, int]


class Comparison:
    """What has been compared so far."""

    def __init__(self, truth: int) -> None:
        self._truth = truth
        self.compared = 0
        self.wrong: list[Piece] = []
        self.slowest_s = 0.0

    def piece(self, read: Callable[[int, int], bytes], at: int, size: int) -> None:
        began = time.monotonic()
        found = read(at, size)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        true = os.pread(self._truth, size, at)
        self.compared += len(found)
        if found != true and len(self.wrong) < WRONG_MAX:
            self.wrong.append((at, next((i for i, (a, b) in enumerate(zip(found, true, strict=False)) if a != b), -1)))


def pieces(kind: str, size: int, rng: random.Random) -> Iterator[Piece]:
    """Offsets and sizes to read."""
    match kind:
        case "sequential":
            step = rng.choice([4096, 65_536, 131_072, MIB, 4 * MIB])
            if step == 4096:
                size = min(size, 4 * MIB)
            yield from ((at, min(step, size - at)) for at in range(0, size, step))
        case "backwards":
            yield from ((at, min(MIB, size - at)) for at in reversed(range(0, size, MIB)))
        case "again":
            for _ in range(2):
                yield from ((at, min(MIB, size - at)) for at in range(0, size, MIB))
        case _:
            for _ in range(rng.randrange(4, 60)):
                at = rng.randrange(size)
                yield at, min(size - at, rng.randrange(1, 5000 if kind == "small" else 3 * MIB))


def whole(fd: int, at: int, length: int) -> bytes:
    """As much as there is: a read that meets an error in its middle gives what came before it, and the next read the error."""
    found = b""
    while len(found) < length and (more := os.pread(fd, length - len(found), at + len(found))):
        found += more
    return found


def mapped(fd: int, size: int, comparison: Comparison, rng: random.Random) -> None:
    """By page faults. The caller is a process that may be killed by SIGBUS: that is how an error of a mapped file shows."""
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        for at, length in pieces(rng.choice(["sequential", "random"]), size, rng):
            comparison.piece(lambda at, length: view[at : at + length], at, length)


def main(kind: str, path: str, truth: str, seed: str) -> None:
    rng = random.Random(seed)
    state, error = "", ""
    with open(truth, "rb", buffering=0) as true:
        comparison = Comparison(true.fileno())
        try:
            state = os.getxattr(path, "user.manta.state").decode()
            fd = os.open(path, os.O_RDONLY)
            try:
                size = os.fstat(fd).st_size
                if size != os.fstat(true.fileno()).st_size:
                    comparison.wrong.append((size, -1))
                elif kind == "mapped":
                    mapped(fd, size, comparison, rng)
                else:
                    for at, length in pieces(kind, size, rng):
                        comparison.piece(lambda at, length: whole(fd, at, length), at, length)
            finally:
                os.close(fd)
        except OSError as e:
            error = errno.errorcode.get(e.errno or 0, str(e.errno))
    print(
        json.dumps(
            {
                "state": state,
                "error": error,
                "compared": comparison.compared,
                "wrong": comparison.wrong,
                "slowest_s": comparison.slowest_s,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
