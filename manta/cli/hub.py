"""`manta hub serve DIR`: a folder of models behind the Hub's protocol, for air-gapped sites and the demo."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from manta.cli.invocation import Invocation
from manta.errors import Invalid

TOKEN_VARIABLE = "MANTA_SERVE_TOKEN"
"""The token that clients must show comes from here: a flag would put it into the process list."""


def serve(invocation: Invocation) -> int:
    from manta.testing.hub.serve import serve_folder

    arguments, console = invocation.arguments, invocation.console
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise Invalid("--tls-cert and --tls-key go together.")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not _is_loopback(arguments.host) and not token:
        console.warn(
            f"anyone who reaches {arguments.host} can read every file in {arguments.directory};"
            f" {TOKEN_VARIABLE} makes clients show a token"
        )

    def ready(endpoint: str) -> None:
        console.document({"endpoint": endpoint, "pid": os.getpid()})
        console.say(
            f"Serving {arguments.directory} at {endpoint}; Ctrl-C ends it. Point any Hugging Face tool at it with:",
            f"  export HF_ENDPOINT={endpoint}",
        )
        console.flush()

    try:
        serve_folder(
            arguments.directory,
            arguments.host,
            arguments.port,
            token=token,
            tls=(Path(arguments.tls_cert), Path(arguments.tls_key)) if arguments.tls_cert else None,
            log_requests=console.verbosity >= 1,
            ready=ready,
        )
    except NotADirectoryError:
        raise Invalid(f"{arguments.directory} is not a directory: expected a folder with ORG/NAME folders.") from None
    except OSError as error:
        raise Invalid(f"{arguments.host}:{arguments.port} cannot be listened on: {error.strerror or error}.") from error
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
