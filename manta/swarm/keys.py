"""Where the cluster's shared key is read from, here and only here: a file, or the variable MANTA_SWARM_KEY.

The key is in no configuration section, message of the log, or argument of a process. Used by the daemon, which gives it to its children by
their sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from manta.config import SWARM_KEY_VARIABLE
from manta.errors import Denied, Invalid
from manta.swarm.auth import parse_keys

FILE_BYTES_MAX = 4096


def read_keys(key_file: str, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """The keys, the one to sign with first; none where neither is given. The file counts where both are.

    Raises Denied for a file that cannot be read and Invalid for what is no key; neither shows it.
    """
    if key_file:
        try:
            with Path(key_file).open("rb") as file:
                text = file.read(FILE_BYTES_MAX).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise Denied(f"The swarm's key file {key_file} cannot be read ({reason}): check swarm.key_file.") from error
        try:
            return parse_keys(text)
        except Invalid as error:
            raise Invalid(f"{key_file}: {error.message}") from None
    text = environ.get(SWARM_KEY_VARIABLE, "")
    if not text.strip():
        return ()
    try:
        return parse_keys(text)
    except Invalid as error:
        raise Invalid(f"{SWARM_KEY_VARIABLE}: {error.message}") from None


def is_loopback(host: str) -> bool:
    """Whether a listen address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
