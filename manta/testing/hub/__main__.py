"""`python -m manta.testing.hub`: a test hub described by a JSON spec, for tests and benchmarks.

Prints one JSON line {"hub": URL, "cdn": URL, "other": URL, "pid": N} on standard output once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from manta.testing.hub.answers import Policy
from manta.testing.hub.content import DigestStoppedError
from manta.testing.hub.digest_index import DigestIndex
from manta.testing.hub.folder import FolderSource
from manta.testing.hub.routes import ORIGINS, Route
from manta.testing.hub.server import HubServer
from manta.testing.hub.spec import HubSpec, build_catalogue

_EPILOG = """\
The spec is JSON (manta.testing.hub.spec.HubSpec), for example:

  {"repos": [{"id": "org/name", "files": {
      "config.json":       {"kind": "text", "text": "{}"},
      "notes.bin":         {"kind": "disk", "path": "/data/notes.bin"},
      "model.safetensors": {"kind": "generated", "seed": "a", "size": 2147483648}}}],
   "users": [{"name": "reader", "token": "hf_reader", "access": ["org/gated"]}],
   "settings": {"latency_s": 0.05, "bandwidth": 125000000}}

Point clients at it with HF_ENDPOINT=http://HOST:PORT. Watch and steer it with curl:

  curl -s HOST:PORT/_hub/stats
  curl -s HOST:PORT/_hub/faults -d '{"origin": "cdn", "times": 1, "action": {"fault": "stall", "after_bytes": 1000}}'
  curl -s HOST:PORT/_hub/settings -X PUT -d '{"latency_s": 0.05}'

All admin calls: manta/testing/hub/admin.py. All faults: manta/testing/hub/faults.py.
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m manta.testing.hub",
        description="A local Hugging Face Hub for tests: same protocol, seeded content, faults on demand.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--spec", metavar="FILE", help="JSON spec, - for one line of standard input (default: standard content)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=0, help="hub port; CDN and third origin take the next two (default: any free)"
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="serve HTTPS with this certificate (PEM)")
    parser.add_argument("--tls-key", metavar="FILE", help="the certificate's key (PEM)")
    parser.add_argument("--index", metavar="FILE", type=Path, help="remember digests of big files here between runs")
    parser.add_argument(
        "--admin-socket",
        metavar="PATH",
        help="serve the admin API on this unix socket too; removed at the end, with its folder if that is left empty",
    )
    parser.add_argument("--until-eof", action="store_true", help="end when standard input ends")
    arguments = parser.parse_args(argv)
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        parser.error("--tls-cert and --tls-key go together")
    return arguments


def _read_spec(source: str | None) -> HubSpec:
    if source is None:
        from manta.testing.hub.standard import standard_spec

        return standard_spec()
    text = sys.stdin.buffer.readline() if source == "-" else Path(source).read_bytes()
    return msgspec.json.decode(text, type=HubSpec)


def _end_at_eof(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """Call `end` once standard input ends: the parent is gone or wants us gone."""
    while os.read(sys.stdin.fileno(), 1 << 16):
        pass
    loop.call_soon_threadsafe(end)


async def _serve(arguments: argparse.Namespace, spec: HubSpec) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    index = DigestIndex(arguments.index)

    def end() -> None:
        index.stop()  # an end asked for while digests are taken does not wait for them
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    if arguments.until_eof:
        threading.Thread(target=_end_at_eof, args=(loop, end), daemon=True).start()
    catalogue = await asyncio.to_thread(build_catalogue, spec, index)
    await asyncio.to_thread(index.save)
    sources = [FolderSource(folder, catalogue, index) for folder in spec.folders]
    for source in sources:
        await source.refresh_all()

    async def refresh(route: Route) -> None:
        for source in sources:
            await source.refresh(route)

    settings = spec.settings
    hub = HubServer(
        catalogue,
        policy=Policy(
            signed_url_lifetime_s=settings.signed_url_lifetime_s,
            redirect_blobs=settings.redirect_blobs,
            cdn_allows_head=settings.cdn_allows_head,
        ),
        quotas=settings.quotas,
        latency_s=settings.latency_s,
        bandwidth=settings.bandwidth,
        log_max=settings.log_max,
        refresh=refresh if sources else None,
    )
    tls = None
    if arguments.tls_cert:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(arguments.tls_cert, arguments.tls_key)
    ports = {origin: arguments.port + place if arguments.port else 0 for place, origin in enumerate(ORIGINS)}
    try:
        await hub.start(arguments.host, ports, tls)
        if arguments.admin_socket:
            await hub.start_admin_socket(arguments.admin_socket)
        scheme = "https" if tls else "http"
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        urls = {origin: f"{scheme}://{host}:{port}" for origin, port in hub.answers.ports.items()}
        print(json.dumps({**urls, "pid": os.getpid()}), flush=True)
        await stop.wait()
    finally:
        await hub.close()
        if arguments.admin_socket:
            with contextlib.suppress(OSError):
                os.unlink(arguments.admin_socket)
                os.rmdir(os.path.dirname(arguments.admin_socket))


def main(argv: list[str] | None = None) -> int:
    """Run a hub until it is told to end; returns the exit status."""
    arguments = _arguments(argv)
    try:
        spec = _read_spec(arguments.spec)
        with contextlib.suppress(DigestStoppedError):
            asyncio.run(_serve(arguments, spec))
    except (OSError, ValueError, msgspec.DecodeError) as mistake:
        print(f"manta.testing.hub: {mistake}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
