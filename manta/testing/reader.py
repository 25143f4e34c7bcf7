"""A plain program that reads files one after the other, here and only here. Run by `manta.testing.cluster` as

    python -S -E -P manta/testing/reader.py [--block BYTES] PATH ...

with the standard library alone, so that nothing else is in the process. It opens nothing before a line comes on its standard input, so that
many can be made to start at once. Then it takes each file from begin to end and digests what it gets, and prints one JSON object: `began`
and `ended` on the monotonic clock that all processes share, `bytes`, `cpu_s` (its own), `digests` (sha256 by path, of whole files) and
`error`, which says where it stopped and why; empty where it did not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time

BLOCK_BYTES = 4 * 1024 * 1024


def read(paths: list[str], block: int) -> dict[str, object]:
    buffer = memoryview(bytearray(block))
    digests: dict[str, str] = {}
    total = 0
    error = ""
    began = time.monotonic()
    for path in paths:
        digest = hashlib.sha256()
        at = 0
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                while count := os.readv(fd, [buffer]):
                    digest.update(buffer[:count])
                    at += count
            finally:
                os.close(fd)
        except OSError as failure:
            error = f"{path} at {at}: {failure.strerror}"
            break
        finally:
            total += at
        digests[path] = digest.hexdigest()
    told = {"began": began, "ended": time.monotonic(), "bytes": total, "cpu_s": time.process_time()}
    return {**told, "digests": digests, "error": error}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="reader.py")
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--block", type=int, default=BLOCK_BYTES)
    options = parser.parse_args(arguments)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return 1  # whoever was to say when is gone
    print(json.dumps(read(options.paths, options.block)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
