"""The programs that read files through a mount and measure it, here and only here. Run by `benchmarks.rig` as

    python -S -E benchmarks/readers.py PROGRAM PATH ...

with the standard library alone, so that starting is quick and nothing else is in the process. Times are taken inside, from before open()
to the last byte, on the monotonic clock that all processes share. Each prints one JSON object; `probe` one per line of its input.

    sequential PATH --block BYTES [--no-digest]        one read after the other on one descriptor
    random PATH --block BYTES --threads N --seed S [--no-digest]
                                                       every block once in random order, N threads on one descriptor
    mapped PATH --block BYTES [--no-digest]            mmap, from start to end; without a digest each block is copied
    resident PATH ...                                  what of each file is in the page cache, by cachestat
    probe --length BYTES                               reads "OFFSET PATH" lines; opens, reads at the offset, closes
    download PATH -- COMMAND ...                       runs a command that writes PATH, and measures that
    find PATH                                          the program find over a folder: names, kinds and sizes of all below it
    stat PATH --names FILE                             stat of each name in FILE (one a line, below PATH)
    open PATH --names FILE --times N                   open and close of each of them, N times over

What they read is digested as it is read: sequential and mapped by sha256; random by the sha256 of the sha256 of each block in file order,
which does not depend on the order of reading (`blocks_digest` says what it must be).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator

SYS_CACHESTAT = 451
"""The number is the same on every architecture; Linux 6.5 and later."""


def blocks_digest(blocks: Iterable[bytes | memoryview]) -> str:
    """The digest of `random` over these blocks, for whoever has the bytes in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def sequential(path: str, block: int, *, digested: bool) -> dict[str, object]:
    buffer = memoryview(bytearray(block))
    digest = hashlib.sha256()
    size, first = 0, 0.0
    began = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(fd, [buffer]):
            first = first or time.monotonic()
            if digested:
                digest.update(buffer[:count])
            size += count
    finally:
        os.close(fd)
    ended = time.monotonic()
    told = {"digest": digest.hexdigest()} if digested else {}
    return {"began": began, "first": first, "ended": ended, "bytes": size, **told}


def shuffled(path: str, block: int, threads: int, seed: int, *, digested: bool) -> dict[str, object]:
    began = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        order = list(range(-(-size // block)))
        random.Random(seed).shuffle(order)
        digests = bytearray(32 * len(order)) if digested else None
        errors: list[BaseException] = []
        # next() on one shared iterator of a list is a single step under the interpreter lock.
        queue = iter(order)
        workers = [
            threading.Thread(target=_read_blocks, args=(fd, size, block, queue, digests, errors))
            for _ in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        ended = time.monotonic()
    finally:
        os.close(fd)
    if errors:
        raise errors[0]
    told = {"digest": hashlib.sha256(digests).hexdigest()} if digests is not None else {}
    return {"began": began, "ended": ended, "bytes": size, **told}


def _read_blocks(
    fd: int, size: int, block: int, queue: Iterator[int], digests: bytearray | None, errors: list[BaseException]
) -> None:
    buffer = memoryview(bytearray(block))
    try:
        for number in queue:
            offset = number * block
            wanted = min(block, size - offset)
            have = 0
            while have < wanted:
                count = os.preadv(fd, [buffer[have:wanted]], offset + have)
                if not count:
                    raise OSError(f"the file ended at {offset + have} of {size}")
                have += count
            if digests is not None:
                digests[32 * number : 32 * number + 32] = hashlib.sha256(buffer[:wanted]).digest()
    except BaseException as error:  # every kind: the main thread must not report a success
        errors.append(error)


def mapped(path: str, block: int, *, digested: bool) -> dict[str, object]:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(0 if digested else block))
    began = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view, memoryview(view) as bytes_:
            for start in range(0, size, block):
                with bytes_[start : start + block] as part:
                    if digested:
                        digest.update(part)
                    else:
                        buffer[: len(part)] = part
    finally:
        os.close(fd)
    ended = time.monotonic()
    told = {"digest": digest.hexdigest()} if digested else {}
    return {"began": began, "ended": ended, "bytes": size, **told}


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted"))


def resident(paths: list[str]) -> dict[str, object]:
    """Bytes of page cache that belong to each file itself. Raises OSError (ENOSYS before Linux 6.5).

    Not mincore: that looks through a mapping, which for a file that FUSE passes through is the backing file's, and would count it twice.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    began = time.monotonic()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            whole, told = _Range(0, 0), _CacheStat()
            if libc.syscall(SYS_CACHESTAT, fd, ctypes.byref(whole), ctypes.byref(told), 0):
                error = ctypes.get_errno()
                raise OSError(error, f"cachestat: {os.strerror(error)}", path)
        finally:
            os.close(fd)
        found.append(told.cache * mmap.PAGESIZE)
    return {"began": began, "ended": time.monotonic(), "resident": found}


def probe(line: str, length: int) -> dict[str, object]:
    offset, _, path = line.rstrip("\n").partition(" ")
    began = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    opened = time.monotonic()
    try:
        data = os.pread(fd, length, int(offset))
        ended = time.monotonic()
    finally:
        os.close(fd)
    digest = hashlib.sha256(data).hexdigest()
    return {"began": began, "opened": opened, "ended": ended, "bytes": len(data), "digest": digest}


def download(path: str, command: list[str]) -> dict[str, object]:
    """From before the command starts until it has ended, and its CPU seconds. Raises CalledProcessError where it fails."""
    began = time.monotonic()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    ended = time.monotonic()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {"began": began, "ended": ended, "bytes": os.stat(path).st_size}
    return {**result, "cpu_s": used.ru_utime + used.ru_stime, "rss_peak": used.ru_maxrss * 1024}


def find(path: str) -> dict[str, object]:
    began = time.monotonic()
    done = subprocess.run(["find", path, "-type", "f", "-printf", "%s\\n"], capture_output=True, check=True)
    ended = time.monotonic()
    sizes = list(map(int, done.stdout.split()))
    return {"began": began, "ended": ended, "entries": len(sizes), "total": sum(sizes)}


def stat(path: str, names: list[str]) -> dict[str, object]:
    total = 0
    began = time.monotonic()
    for name in names:
        total += os.stat(f"{path}/{name}").st_size
    return {"began": began, "ended": time.monotonic(), "entries": len(names), "total": total}


def open_all(path: str, names: list[str], times: int) -> dict[str, object]:
    taken = []
    began = time.monotonic()
    for name in names * times:
        before = time.monotonic()
        fd = os.open(f"{path}/{name}", os.O_RDONLY)
        taken.append(time.monotonic() - before)
        os.close(fd)
    return {"began": began, "ended": time.monotonic(), "open_s": taken}


def usage() -> dict[str, object]:
    """This process's own CPU seconds and peak memory (VmHWM: ru_maxrss would include the parent's before exec)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return {"cpu_s": used.ru_utime + used.ru_stime, "rss_peak": peak}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="readers.py")
    programs = parser.add_subparsers(dest="program", required=True)
    for name in ("sequential", "random", "mapped"):
        program = programs.add_parser(name)
        program.add_argument("path")
        program.add_argument("--block", type=int, required=True)
        program.add_argument("--no-digest", action="store_true")
        if name == "random":
            program.add_argument("--threads", type=int, required=True)
            program.add_argument("--seed", type=int, required=True)
    programs.add_parser("probe").add_argument("--length", type=int, required=True)
    programs.add_parser("resident").add_argument("paths", nargs="+")
    program = programs.add_parser("download")
    program.add_argument("path")
    program.add_argument("command", nargs="+")
    for name in ("find", "stat", "open"):
        program = programs.add_parser(name)
        program.add_argument("path")
        if name != "find":
            program.add_argument("--names", required=True)
        if name == "open":
            program.add_argument("--times", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.program == "probe":
        for line in sys.stdin:
            print(json.dumps(probe(line, options.length)), flush=True)
        return 0
    found = _run(options)
    print(json.dumps({**usage(), **found}))
    return 0


def _run(options: argparse.Namespace) -> dict[str, object]:
    match options.program:
        case "sequential":
            return sequential(options.path, options.block, digested=not options.no_digest)
        case "random":
            return shuffled(options.path, options.block, options.threads, options.seed, digested=not options.no_digest)
        case "mapped":
            return mapped(options.path, options.block, digested=not options.no_digest)
        case "resident":
            return resident(options.paths)
        case "download":
            return download(options.path, options.command)
        case "find":
            return find(options.path)
        case "stat":
            return stat(options.path, _lines(options.names))
        case _:
            return open_all(options.path, _lines(options.names), options.times)


def _lines(path: str) -> list[str]:
    with open(path) as lines:
        return lines.read().splitlines()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
