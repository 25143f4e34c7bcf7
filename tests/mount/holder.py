"""A process beside the test that holds files of a mount and does with them what it is told, here and only here.

    with Holder() as holder:
        holder.do("open", "weights", directory / "weights.bin")
        holder.tell("digest", "weights", 0, size)      # begins
        ...                                            # something happens to the daemon
        assert holder.answer() == true_digest(0, size)

What it holds has a name. An errno that it gets is raised here as an OSError; a mapping that fails ends it (SIGBUS), which is an EOFError.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Self

from tests.mount.node import TIMEOUT_S

PROGRAM = r"""
import ctypes, hashlib, itertools, json, mmap, os, sys

held = {}
step = 1 << 20

def digest(read, at, end):
    found = hashlib.sha256()
    while at < end:
        data = read(at, min(step, end - at))
        if not data:
            raise EOFError(f"nothing at {at}")
        found.update(data)
        at += len(data)
    return found.hexdigest()

def pages(fd):
    "How many pages of the open file's own inode are in the page cache: cachestat(2)."
    counts = (ctypes.c_uint64 * 5)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(451, fd, (ctypes.c_uint64 * 2)(0, 0), counts, 0):
        raise OSError(ctypes.get_errno(), "cachestat")
    return counts[0]

class Commands:
    def open(self, name, path, flags=os.O_RDONLY):
        held[name] = os.open(path, flags)
        return os.fstat(held[name]).st_ino

    def open_again(self, name, other):
        return self.open(name, f"/proc/self/fd/{held[other]}")

    def close(self, name):
        os.close(held.pop(name))

    def digest(self, name, at, end):
        return digest(lambda at, size: os.pread(held[name], size, at), at, end)

    def forget_pages(self, name):
        os.posix_fadvise(held[name], 0, 0, os.POSIX_FADV_DONTNEED)

    def pages(self, name):
        return pages(held[name])

    def map(self, name, other):
        held[name] = mmap.mmap(held[other], 0, prot=mmap.PROT_READ)

    def digest_mapped(self, name, at, end):
        return digest(lambda at, size: held[name][at : at + size], at, end)

    def scan(self, name, path):
        held[name] = os.scandir(path)

    def entries(self, name, most):
        return [entry.name for entry in itertools.islice(held[name], most)]

    def change_directory(self, path):
        os.chdir(path)

    def list(self, path):
        return sorted(os.listdir(path))

    def stat(self, path):
        found = os.stat(path)
        return [found.st_ino, found.st_size]

commands = Commands()
for line in sys.stdin:
    command, *arguments = json.loads(line)
    try:
        answer = [getattr(commands, command)(*arguments), 0]
    except OSError as e:
        answer = [None, e.errno]
    print(json.dumps(answer), flush=True)
"""


class Holder:
    """One such process; it ends with the `with`. `python`: the command that runs it, such as one that runs it in a container."""

    def __init__(self, python: Sequence[str] = (sys.executable,)) -> None:
        self._python = python

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [*self._python, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd="/",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: str, *arguments: object) -> None:
        """Has it begin; `answer` has what comes of it."""
        assert self._process.stdin is not None
        plain = [argument if isinstance(argument, int) else str(argument) for argument in arguments]
        self._process.stdin.write(json.dumps([command, *plain]) + "\n")

    def answer(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Raises OSError, EOFError where the process has ended, TimeoutError."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        if not ready:
            raise TimeoutError(f"it has not answered within {timeout_s} s")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"it has ended: {self._process.communicate(timeout=30)[1]}")
        value, errno = json.loads(line)
        if errno:
            raise OSError(errno, os.strerror(errno))
        return value

    def do(self, command: str, *arguments: object, timeout_s: float = TIMEOUT_S) -> Any:
        self.tell(command, *arguments)
        return self.answer(timeout_s)

    @property
    def waits(self) -> bool:
        """Whether what it was told to do is not done."""
        assert self._process.stdout is not None
        return not select.select([self._process.stdout], [], [], 0)[0]
