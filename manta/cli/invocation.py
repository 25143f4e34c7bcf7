"""What every command gets: its arguments, the configuration in effect, where to write, and the way to the daemon."""

from __future__ import annotations

import argparse
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from manta.cli.render import Console
from manta.config import Config, Loaded, check_key, find_token, load
from manta.errors import InUse, Invalid

if TYPE_CHECKING:
    from manta.control.client import Client
    from manta.control.protocol import Status

# A running daemon keeps its own settings. These flags say which daemon, or are checked against it.
_ADDRESSING = {"cache.dir", "daemon.runtime_dir", "hub.endpoint", "hub.offline"}


class Invocation:
    """One run of one command."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments = arguments
        self.console = console

    @cached_property
    def loaded(self) -> Loaded:
        """Read when first asked for: commands that need no configuration work while it is broken."""
        flags: dict[str, object] = {}
        for text in getattr(self.arguments, "set", None) or []:
            key, equals, value = text.partition("=")
            if not equals:
                raise Invalid(f"--set {text} is no setting: expected --set SECTION.FIELD=VALUE.")
            check_key(key)
            flags[key] = value
        for key, name in (
            ("cache.dir", "cache_dir"),
            ("hub.endpoint", "endpoint"),
            ("hub.offline", "offline"),
            ("fuse.session", "fuse"),
            ("daemon.runtime_dir", "runtime_dir"),
            ("daemon.log_level", "log_level"),
            ("daemon.log_format", "log_format"),
            ("daemon.keeper", "keeper"),
            ("daemon.metrics", "metrics"),
            ("swarm.peers", "peers"),
            ("swarm.listen", "listen"),
        ):
            value = getattr(self.arguments, name, None)
            if value is not None:
                flags[key] = value
        file = getattr(self.arguments, "config", None)
        return load(flags, file=Path(file) if file else None)

    @property
    def config(self) -> Config:
        return self.loaded.config

    def token(self) -> str:
        """The caller's own token, "" where there is none. It goes to the daemon over the socket and nowhere else."""
        found = find_token()
        self.console.note(f"the hub token comes from {found.origin}" if found else "no hub token is set or saved")
        return found.value if found else ""

    def connect(self) -> Client:
        """The running daemon's client. Raises NotRunning."""
        from manta.control.client import connect

        return connect(self.config)

    def check_daemon(self, client: Client) -> Status:
        """Its status, after making sure that it takes its bytes from where this command was told to. Raises InUse."""
        status = client.status()
        self.check_origin(status)
        if client.launched:
            self.console.note(f"started a daemon (pid {status.pid}); its log is {self.config.log_path}")
            return status
        ignored = [
            str(origin)
            for key, origin in self.loaded.origins.items()
            if origin.kind == "flag" and key not in _ADDRESSING
        ]
        if ignored:
            self.console.warn(
                f"the daemon of {self.config.cache.dir} was already running and keeps its own settings:"
                f" {', '.join(ignored)} has no effect until it is started anew"
            )
        return status

    def check_origin(self, status: Status) -> None:
        """Raises InUse when the running daemon takes its bytes from elsewhere than this command was told to."""
        hub, origins = self.config.hub, self.loaded.origins
        advice = (
            f"The daemon (pid {status.pid}) serves one hub for the cache directory {status.cache_dir}: end it first"
            " (`manta status` shows its mounts, `manta umount` ends them), or use another --cache-dir."
        )
        if self.loaded.is_explicit("hub.endpoint") and hub.endpoint != status.endpoint.rstrip("/"):
            raise InUse(
                f"{origins['hub.endpoint']} asks for the hub {hub.endpoint}, and the running daemon uses"
                f" {status.endpoint}. {advice}"
            )
        if self.loaded.is_explicit("hub.offline") and hub.offline != status.offline:
            asked, runs = ("offline", "online") if hub.offline else ("online", "offline")
            raise InUse(f"{origins['hub.offline']} asks for {asked} mode, and the running daemon is {runs}. {advice}")
