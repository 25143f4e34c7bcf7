"""The programs that load a model as users do, here and only here: with safetensors, and huggingface_hub's download. Run as

    python -m benchmarks.loaders load FILE ...                  each file's tensors at once
    python -m benchmarks.loaders tensors FILE [--no-digest]     one tensor after the other, of which none is kept
    python -m benchmarks.loaders download REPO

with the virtual environment's packages. Times are taken inside and leave the imports out, which are the same for all. Each prints one
JSON object. With torch installed, load_file is torch's; every tensor is touched either way, since torch maps the file and reads later.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.readers import usage


def load(paths: list[str]) -> dict[str, object]:
    """Seconds from the first open to the last tensor in memory, and a digest over names and bytes of all tensors."""
    framework = "torch" if importlib.util.find_spec("torch") else "numpy"
    digest = hashlib.sha256()
    count = size = 0
    if framework == "torch":
        # By name: torch is not among the project's requirements, and need not be there to check types.
        torch: Any = importlib.import_module("torch")
        load_torch: Any = importlib.import_module("safetensors.torch").load_file

        began = time.monotonic()
        tensors = [load_torch(path) for path in paths]
        for shard in tensors:
            for tensor in shard.values():
                tensor.flatten().view(torch.uint8).sum()
        ended = time.monotonic()
        named = {name: each.flatten().view(torch.uint8).numpy() for shard in tensors for name, each in shard.items()}
    else:
        import numpy
        from safetensors.numpy import load_file as load_numpy

        began = time.monotonic()
        arrays = [load_numpy(path) for path in paths]  # copies every tensor
        ended = time.monotonic()
        named = {name: array.view(numpy.uint8) for shard in arrays for name, array in shard.items()}
    used = usage()
    for name in sorted(named):
        digest.update(name.encode())
        digest.update(memoryview(named[name]).cast("B"))
        count += 1
        size += named[name].nbytes
    result = {"began": began, "ended": ended, "bytes": size, "tensors": count, "digest": digest.hexdigest()}
    return {**result, "framework": framework, **used}


def tensors(path: str, *, digested: bool) -> dict[str, object]:
    """Seconds from open to a copy of the last tensor in memory. In numpy: what differs from torch is only who allocates."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    count = size = 0
    began = time.monotonic()
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            tensor = file.get_tensor(name)
            count += 1
            size += tensor.nbytes
            if digested:
                digest.update(name.encode())
                digest.update(memoryview(tensor.view("u1")).cast("B"))
    ended = time.monotonic()
    told = {"digest": digest.hexdigest()} if digested else {}
    return {"began": began, "ended": ended, "bytes": size, "tensors": count, **told, **usage()}


def download(repo: str) -> dict[str, object]:
    """Seconds of one snapshot_download with its defaults, into the cache that the environment names, and the bytes of the largest file."""
    from huggingface_hub import snapshot_download

    began = time.monotonic()
    folder = snapshot_download(repo)
    ended = time.monotonic()
    size = max(path.stat().st_size for path in Path(folder).rglob("*"))
    return {"began": began, "ended": ended, "bytes": size, "folder": folder, **usage()}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="loaders.py")
    programs = parser.add_subparsers(dest="program", required=True)
    programs.add_parser("load").add_argument("paths", nargs="+")
    program = programs.add_parser("tensors")
    program.add_argument("path")
    program.add_argument("--no-digest", action="store_true")
    programs.add_parser("download").add_argument("repo")
    options = parser.parse_args(arguments)
    print(json.dumps(_run(options)))
    return 0


def _run(options: argparse.Namespace) -> dict[str, object]:
    match options.program:
        case "load":
            return load(options.paths)
        case "tensors":
            return tensors(options.path, digested=not options.no_digest)
        case _:
            return download(options.repo)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
