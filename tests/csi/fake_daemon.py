"""A daemon for tests of the CSI driver: the control API's publications over a real unix socket, and plain directories behind them.

Like the real one it gives the same name the same mount, and refuses another request under it. Whose right it is it takes from `rights`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from manta.control.protocol import Mount, MountRequest, Publication
from manta.errors import Absent, Conflict, Denied
from tests.cli import fake_daemon
from tests.cli.fake_daemon import COMMIT, Request


@dataclass
class FakeDaemon(fake_daemon.FakeDaemon):
    """``with FakeDaemon(socket, source_root=DIRECTORY) as daemon``."""

    rights: dict[str, set[str]] = field(default_factory=dict)
    """By target: the tokens that may read it, "" for nobody's and "node" for the daemon's own. Other targets are for all."""
    size: int = 2000
    cached: int = 500
    read_errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.publications: dict[str, tuple[MountRequest, Mount]] = {}
        self.made = 0

    def _answer(self, request: Request) -> msgspec.Struct:
        method, parts, body = request.method, request.path.strip("/").split("/")[1:], request.body
        match method, parts:
            case "GET", ["publications"]:
                return [  # type: ignore[return-value]  # the encoder takes it
                    Publication(name, mount.id, mount.directory, mount.pod)
                    for name, (_, mount) in self.publications.items()
                ]
            case "PUT", ["publications", name]:
                return self._publish(name, msgspec.convert(body, MountRequest))
            case "GET", ["publications", name]:
                return self._shown(name)
            case "POST", ["publications", name, "bound"]:
                return self._shown(name)
            case "DELETE", ["publications", name]:
                mount = self._shown(name)
                del self.publications[name]
                return mount
        return super()._answer(request)

    def _shown(self, name: str) -> Mount:
        if name not in self.publications:
            raise Absent(f"There is no publication {name!r}.")
        return msgspec.structs.replace(
            self.publications[name][1], size=self.size, cached=self.cached, errors=self.read_errors
        )

    def _publish(self, name: str, request: MountRequest) -> Mount:
        who = request.token or ("" if request.anonymous else "node")
        allowed = self.rights.get(request.target)
        if allowed is not None and who not in allowed:
            raise Denied(f"{request.target} is gated: name a secret.")
        same = msgspec.structs.replace(request, token="", anonymous=False)
        if name in self.publications:
            if self.publications[name][0] != same:
                raise Conflict("The volume is published already with another request.")
            return self._shown(name)
        self.made += 1
        source = self.source_root / f"{self.made}-{request.target.replace('/', '--') or 'hub'}"
        source.mkdir()
        (source / "config.json").write_text(request.target)
        mount = Mount(
            id=source.name,
            target=request.target,
            revision="main",
            commit=COMMIT,
            view=request.view,
            source=str(source),
            directory=request.directory,
            files=2,
            size=self.size,
            cached=self.cached,
            stale=False,
            errors=[],
            publication=name,
            prefetch=request.prefetch,
            pin=request.pin,
            pod=request.pod,
        )
        self.publications[name] = same, mount
        return mount
