"""Where the cluster's shared key is read from, here and only here: a file, or the variable MANTA_SWARM_KEY.

The key is in no configuration section, message of the log, or argument of a process. Used by the daemon, which gives it to its children by
their sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

from manta.config import SWARM_KEY_VARIABLE, SwarmConfig, parse_address, parse_peers
from manta.errors import Denied, Invalid
from manta.swarm.auth import parse_keys

KEYS_BYTES_MAX = 4096
"""Of both keys together: they travel in one message to a child. A key of `openssl rand -hex 32` has 64."""


def read_keys(key_file: str, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    """The keys, the one to sign with first; none where neither is given. The file counts where both are.

    Raises Denied for a file that cannot be read and Invalid for what is no key; neither shows it.
    """
    if key_file:
        try:
            with Path(key_file).open("rb") as file:
                text = file.read(KEYS_BYTES_MAX + 1).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            # Not "from": the error of a text that is none holds the bytes.
            raise Denied(f"The swarm's key file {key_file} cannot be read ({reason}): check swarm.key_file.") from None
        return _parsed(text, key_file)
    text = environ.get(SWARM_KEY_VARIABLE, "")
    return _parsed(text, SWARM_KEY_VARIABLE) if text.strip() else ()


def _parsed(text: str, where: str) -> tuple[bytes, ...]:
    if len(text.encode("utf-8", "surrogateescape")) > KEYS_BYTES_MAX:
        raise Invalid(f"{where}: The swarm's keys must not be longer than {KEYS_BYTES_MAX} bytes together.")
    try:
        return parse_keys(text)
    except UnicodeEncodeError:
        raise Invalid(f"{where}: The swarm's key must be text in UTF-8.") from None
    except Invalid as error:
        raise Invalid(f"{where}: {error.message}") from None


def check(config: SwarmConfig, keys: tuple[bytes, ...]) -> None:
    """Refuses what would leave this node open to everybody, or have it believe anybody. Raises Invalid."""
    advice = "(swarm.key_file, or MANTA_SWARM_KEY; `openssl rand -hex 32` makes one)"
    listen = parse_address(config.listen)
    if not keys and listen is not None and not is_loopback(listen.host):
        raise Invalid(
            f"This node would serve others at {config.listen} without a key: everybody there could read the cache. Give all nodes"
            f" the same key {advice}, or listen on 127.0.0.1."
        )
    kind, named = parse_peers(config.peers)
    hosts = [address.host for name in named if kind == "static" and (address := parse_address(name)) is not None]
    if not keys and (kind != "static" or not all(map(is_loopback, hosts))):
        raise Invalid(
            f"This node would take files from {config.peers[:100]!r} without a key: whoever answers there could give it anything. Give"
            f" all nodes the same key {advice}."
        )
    if bool(config.tls_certificate) != bool(config.tls_authorities):
        raise Invalid(
            "swarm.tls_certificate and swarm.tls_authorities go together: nodes that serve TLS are asked by TLS. Set both, or neither."
        )


def is_loopback(host: str) -> bool:
    """Whether a listen address is reached from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
