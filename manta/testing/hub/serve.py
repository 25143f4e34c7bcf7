"""serve_folder: the hub for air-gapped sites and demos, behind `manta hub serve DIR`.

The same server as the tests', without faults or admin API and on one port: LFS files are answered by the
hub itself, since a second port is one more thing to open in a firewall.
"""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from manta.testing.hub.answers import Policy
from manta.testing.hub.digest_index import DigestIndex, default_path
from manta.testing.hub.folder import FolderSource
from manta.testing.hub.repository import Catalogue
from manta.testing.hub.server import HubServer
from manta.testing.hub.traffic import LogEntry

DEFAULT_PORT = 8000


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _log_line(entry: LogEntry) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(entry.started))
    asked = f" {entry.range}" if entry.range else ""
    cut = " (client left)" if entry.aborted else ""
    return (
        f"{clock} {entry.client} {entry.method} {entry.path}{asked}: {entry.status}, "
        f"{entry.sent} bytes in {entry.duration_s:.3f} s{cut}"
    )


def serve_folder(
    directory: str | Path,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    *,
    token: str = "",
    tls: tuple[Path, Path] | None = None,
    log_requests: bool = False,
    index: Path | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve a folder of models (layout: folder.py) with the Hub's protocol until SIGINT or SIGTERM.

    `ready` is called with the endpoint once the hub listens (port 0 takes any free one); digests of big
    files are taken in the background meanwhile, and a request for a repo waits for its own. `token`, if
    given, is needed to read anything. `tls` is a certificate and its key (PEM). `index` remembers digests
    between runs (default: $XDG_CACHE_HOME/manta/hub-index). Call it from the main thread.

    Raises NotADirectoryError, and OSError when the address cannot be bound.
    """
    asyncio.run(
        _serve(
            str(directory),
            host,
            port,
            token=token,
            tls=tls,
            log_requests=log_requests,
            index=index or default_path(),
            ready=ready,
        )
    )


async def _serve(
    directory: str,
    host: str,
    port: int,
    *,
    token: str,
    tls: tuple[Path, Path] | None,
    log_requests: bool,
    index: Path,
    ready: Callable[[str], None],
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    catalogue = Catalogue()
    digests = DigestIndex(index)
    source = FolderSource(directory, catalogue, digests, report=_print_error)
    hub = HubServer(
        catalogue,
        policy=Policy(
            redirect_blobs=False,
            required_token=token,
            any_token=True,
            quota_headers=False,
        ),
        admin=False,
        refresh=source.refresh,
        finished=(lambda entry: _print_error(_log_line(entry))) if log_requests else None,
    )
    context = None
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls)
    try:
        await hub.start(host, {"hub": port}, context)
        name = f"[{host}]" if ":" in host else host
        ready(f"{'https' if context else 'http'}://{name}:{hub.answers.ports['hub']}")
        hashing = asyncio.create_task(source.refresh_all())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({hashing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            await hashing  # passes a mistake on
        await stopping
    finally:
        digests.stop()
        await hub.close()
