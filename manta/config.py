"""Configuration: one frozen section per component, and where each value comes from, here and only here.

Flags beat the environment (MANTA_SECTION_FIELD, such as MANTA_CACHE_SIZE), which beats the TOML file, which beats the defaults
below. Everything that runs takes its section as an argument and reads no environment of its own.

The CLI and the CSI driver call `load`; the daemon gets the `Config` and shares with its clients the paths derived from it
(`Config.instance_dir` and what lies in it). The hub token is found here too (`find_token`), and is in no section: it must
never be printed or written.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from manta.errors import Denied, Invalid

SYSTEM_FILE = Path("/etc/manta/config.toml")
USER_FILE = "manta/config.toml"
"""Below $XDG_CONFIG_HOME or ~/.config. Its values beat those of the system file."""

SOCKET_PATH_MAX = 107
"""Bytes of a unix socket's path: sockaddr_un has 108 with the final NUL."""


SWARM_KEY_VARIABLE = "MANTA_SWARM_KEY"
"""The cluster's shared key, instead of `swarm.key_file`. Like the hub's token it is in no section."""

PEERS_CHARACTERS_MAX = 32 * 1024
"""Of `swarm.peers`: 1,500 addresses. More nodes than that are found by a name."""

FUSE_FEATURES = ("passthrough", "resend", "readdirplus", "max_pages")
"""What `fuse.without` may name."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    dir: Path = Path("/var/cache/manta")
    """Where blobs live. The default is ~/.cache/manta for users other than root."""
    size: int = 0
    """Bytes that cached blobs may take together; 0 is no limit. Readings like "500GiB" in text."""
    free_space_floor: int = 1024**3
    """Bytes of the disk that Manta leaves free; counts as half of the disk at most."""


@dataclass(frozen=True, slots=True)
class HubConfig:
    endpoint: str = "https://huggingface.co"
    """Also HF_ENDPOINT."""
    offline: bool = False
    """Ask the hub nothing: only what is cached. Also HF_HUB_OFFLINE."""
    timeout_s: float = 20.0
    """Deadline of one metadata request to the hub, retries included."""


@dataclass(frozen=True, slots=True)
class FetchConfig:
    workers: int = 2
    """Worker processes, 1 to 16. Each is one core at most; TLS takes about 1.3 CPU-seconds per GB."""
    connections: int = 16
    """Requests in flight to the origin, at most, 1 to 64: as many are used as pay. The Hub's own clients use 8 to 16."""
    stall_s: float = 10.0
    """A transfer with no byte for this long is given up and tried again."""
    read_timeout_s: float = 60.0
    """A reader gets an error when its bytes have not come for this long."""
    fill: bool = True
    """Complete in the background what was read from, while there is nothing else to do."""


@dataclass(frozen=True, slots=True)
class FuseConfig:
    session: str = "auto"
    """auto, kernel or pyfuse3: auto takes the kernel session where kernel and privileges allow."""
    without: str = ""
    """Features of the kernel to leave unused, with commas: passthrough, resend, readdirplus, max_pages. For kernels that have trouble with
    one, and for tests."""
    complete_at_open: int = 8 * 1024**2
    """Files up to this size (bytes) are fetched when they are opened, so that the kernel reads them by itself from the first read on; 0:
    none. Only where the kernel does that (passthrough)."""
    readahead_kib: int = 4096
    """The kernel's readahead for the mount, set where permitted (root). The kernel's own default is 128."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    runtime_dir: Path = Path("/run/manta")
    """Sockets, logs and the FUSE mount, in one folder per cache directory. Default for other users: $XDG_RUNTIME_DIR/manta."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "text"
    """text, or json: one object per line."""
    keeper: str = ""
    """The socket of a keeper that lives apart (`manta keeper`), for daemons that somebody else starts again; empty: a keeper of its own."""
    metrics: str = ""
    """Serve /metrics at HOST:PORT or unix:PATH too; empty: only on the control socket."""


@dataclass(frozen=True, slots=True)
class SwarmConfig:
    peers: str = ""
    """Who the other nodes are: static:HOST:PORT,..., dns:NAME:PORT or kubernetes:NAMESPACE/SERVICE; empty: there are none."""
    listen: str = "127.0.0.1:9402"
    """HOST:PORT that other nodes reach this one at. Beyond loopback only with a key."""
    key_file: str = ""
    """A file with the cluster's shared key, or two of them while one is replaced. Also the variable MANTA_SWARM_KEY."""
    tls_certificate: str = ""
    """PEM file of this node's certificate, with its chain; empty: plain HTTP."""
    tls_key: str = ""
    """PEM file of the certificate's key."""
    tls_authorities: str = ""
    """PEM file of the authorities that the other nodes' certificates come from."""
    tls_name: str = ""
    """The name in the other nodes' certificates; empty: the host by which each is reached."""
    slots: int = 8
    """Chunks that are given to others at a time, 1 to 256."""
    downloads: int = 8
    """Chunks that come from others at a time, 1 to 256. As many as `slots`: where all ask for more than all give, most is refused."""
    upload_rate: int = 0
    """Bytes per second to other nodes, at most; 0 is no limit."""
    download_rate: int = 0
    """Bytes per second from other nodes, at most; 0 is no limit."""
    share: str = "all"
    """all, or public: blobs of private and gated repos are not given to other nodes."""


@dataclass(frozen=True, slots=True)
class Config:
    cache: CacheConfig = field(default_factory=CacheConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    daemon: DaemonConfig = field(default_factory=DaemonConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)

    @property
    def instance_dir(self) -> Path:
        """The runtime folder of the one daemon of this cache directory: the same for every spelling of the directory's path."""
        import hashlib

        real = os.path.realpath(self.cache.dir)
        return self.daemon.runtime_dir / hashlib.sha256(os.fsencode(real)).hexdigest()[:12]

    @property
    def socket_path(self) -> Path:
        """The control API's socket. Raises Invalid when the kernel could not take a path so long."""
        path = self.instance_dir / "control.sock"
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise Invalid(
                f"The socket's path {path} is longer than the {SOCKET_PATH_MAX} bytes that Linux allows:"
                " choose a shorter runtime directory (--runtime-dir, MANTA_DAEMON_RUNTIME_DIR)."
            )
        return path

    @property
    def log_path(self) -> Path:
        return self.instance_dir / "daemon.log"

    @property
    def mount_root(self) -> Path:
        """Where the daemon mounts its one filesystem as root."""
        return self.instance_dir / "root"

    def make_instance_dir(self) -> Path:
        """Creates the runtime folder where it is missing, and makes sure that nobody else can put a socket there."""
        me = os.geteuid()
        for folder, owners in ((self.daemon.runtime_dir, {0, me}), (self.instance_dir, {me})):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                state = folder.lstat() if folder == self.instance_dir else folder.stat()
            except OSError as error:
                raise Denied(
                    f"The runtime directory {folder} cannot be made ({error.strerror}):"
                    " choose another with --runtime-dir or MANTA_DAEMON_RUNTIME_DIR."
                ) from error
            # In a sticky directory, such as /tmp, others can create files and not replace ours.
            others_may_write = state.st_mode & 0o022 and not state.st_mode & stat.S_ISVTX
            if state.st_uid not in owners or not stat.S_ISDIR(state.st_mode) or others_may_write:
                raise Denied(
                    f"The runtime directory {folder} belongs to someone else or is writable by others:"
                    " remove it, or choose another with --runtime-dir or MANTA_DAEMON_RUNTIME_DIR."
                )
        return self.instance_dir

    def environment(self) -> dict[str, str]:
        """Every value as MANTA_* variables, for a process that must see this configuration and no other."""
        values = {variable(key): _as_text(value) for key, value in items(self)}
        # An empty file: otherwise the process would look for files of its own, which could be broken or gone.
        return {**values, "MANTA_CONFIG": "/dev/null"}


class Origin(NamedTuple):
    """Where a value came from."""

    kind: str
    """flag, environment, file or default."""
    name: str
    """The flag, the variable or the file's path; empty for a default."""

    def __str__(self) -> str:
        return self.name or self.kind


@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration and the origin of each of its values, by SECTION.FIELD."""

    config: Config
    origins: Mapping[str, Origin]

    def is_explicit(self, key: str) -> bool:
        """Whether somebody asked for this value."""
        return self.origins[key].kind != "default"


class Token(NamedTuple):
    """The caller's own token for the hub. Its repr hides it, since reprs end up in logs."""

    value: str
    origin: str

    def __repr__(self) -> str:
        return f"Token(value='...', origin={self.origin!r})"


def items(config: Config) -> Iterable[tuple[str, object]]:
    """All values of `config` as (SECTION.FIELD, value), in the order they are defined."""
    for section in fields(config):
        values = getattr(config, section.name)
        for entry in fields(values):
            yield f"{section.name}.{entry.name}", getattr(values, entry.name)


def variable(key: str) -> str:
    """The environment variable of SECTION.FIELD."""
    return f"MANTA_{key.replace('.', '_').upper()}"


def load(
    flags: Mapping[str, object] | None = None,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    user_id: int | None = None,
) -> Loaded:
    """The configuration in effect. `flags` are SECTION.FIELD -> value or text; `file` is what --config names.

    Without `file` and without MANTA_CONFIG, /etc/manta/config.toml and then the user's own file are read where they exist.
    Raises Invalid naming the flag, variable or file, the value, and what is allowed.
    """
    env = os.environ if environ is None else environ
    home = Path(env.get("HOME") or "~").expanduser()
    given: dict[str, tuple[object, Origin]] = {
        key: (value, Origin("default", ""))
        for key, value in _defaults(env, home, os.geteuid() if user_id is None else user_id).items()
    }
    for layer in (_from_files(file, env, home), _from_environment(env), _from_flags(flags or {})):
        for key, value, origin in layer:
            given[key] = (_KINDS[key].read_from(value, key, origin, home), origin)
    sections = {
        section.name: type(getattr(_BARE, section.name))(
            **{entry.name: given[f"{section.name}.{entry.name}"][0] for entry in fields(getattr(_BARE, section.name))}
        )
        for section in fields(Config)
    }
    return Loaded(Config(**sections), {key: origin for key, (_, origin) in given.items()})


def find_token(environ: Mapping[str, str] | None = None) -> Token | None:
    """The token that HF tools would use here: HF_TOKEN, else what `hf auth login` saved. None where there is none.

    Follows huggingface_hub's rules without importing it, which would make every command wait for half a second.
    """
    env = os.environ if environ is None else environ
    home = Path(env.get("HOME") or "~").expanduser()
    if _hf_true(env.get("HF_HUB_DISABLE_IMPLICIT_TOKEN")):
        return None
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := env.get(name, "").replace("\n", "").replace("\r", "").strip():
            return Token(value, name)
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    hf_home = _path_below(home, env.get("HF_HOME") or str(cache / "huggingface"))
    path = _path_below(home, env.get("HF_TOKEN_PATH") or str(hf_home / "token"))
    try:
        value = path.read_text("utf-8").replace("\n", "").replace("\r", "").strip()
    except (OSError, UnicodeDecodeError):
        return None  # nobody logged in here, or another user's home: the same as no token
    return Token(value, str(path)) if value else None


_UNITS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "p": 1000**5,
    "ki": 1024,
    "mi": 1024**2,
    "gi": 1024**3,
    "ti": 1024**4,
    "pi": 1024**5,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]i?|)b?", re.IGNORECASE)
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_SECOND_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}
SIZE_ALLOWED = 'bytes, or a size like "500GiB" (1024 based), "20GB" or "1.5T" (1000 based)'


def parse_size(text: str) -> int:
    """Bytes that `text` names, with units as Kubernetes and disks use them: Gi and GiB are 1024 based, G and GB 1000 based."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Invalid(f"{text!r} is not a size: expected {SIZE_ALLOWED}.")
    return (
        int(float(match[1]) * _UNITS[match[2].lower()]) if "." in match[1] else int(match[1]) * _UNITS[match[2].lower()]
    )


class _Kind(NamedTuple):
    """How one value is read from text or TOML. `read` raises ValueError or TypeError for what is not `allowed`."""

    allowed: str
    read: Callable[[object, Path], object]

    def read_from(self, value: object, key: str, origin: Origin, home: Path) -> object:
        base = Path(origin.name).parent if origin.kind == "file" else Path.cwd()
        try:
            result = self.read(value, home)
        except (TypeError, ValueError, Invalid):
            where = f"{key} in {origin.name}" if origin.kind == "file" else origin.name
            raise Invalid(f"{where} is {value!r}: expected {self.allowed}.") from None
        return base / result if isinstance(result, Path) else result


def _read_path(value: object, home: Path) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return _path_below(home, value)


def _read_size(value: object, _home: Path) -> int:
    if isinstance(value, str):
        return parse_size(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError
    return value


def _read_switch(value: object, _home: Path) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {"1", "true", "yes", "on"}:
        return True
    if isinstance(value, str) and value.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError


def _read_url(value: object, _home: Path) -> str:
    from urllib.parse import urlsplit

    if not isinstance(value, str):
        raise TypeError
    parts = urlsplit(value.strip())
    _ = parts.port  # raises ValueError for a port that is none
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError
    return value.strip().rstrip("/")


class ListenAddress(NamedTuple):
    """Where a server listens: `host` and `port`, or `path` of a unix socket where that is not empty."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> ListenAddress | None:
    """What `daemon.metrics` names, None for nothing. Raises ValueError."""
    text = text.strip()
    if not text:
        return None
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ValueError
        return ListenAddress("", 0, path)
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    # An IPv4 address may have brackets, too: "[$(POD_IP)]:9402" has to do for both families (deploy/charts).
    if bracketed is not (":" in bare) and not (bracketed and re.fullmatch(r"\d+(\.\d+){3}", bare)):
        raise ValueError
    if not colon or not bare or set(bare) & set("[]") or not port.isascii() or not port.isdigit():
        raise ValueError
    if not 0 < int(port) < 65536:
        raise ValueError
    return ListenAddress(bare, int(port))


def _read_address(value: object, _home: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    address = parse_address(value)
    return "" if address is None else str(address)


def _seconds(low: float, high: float) -> _Kind:
    def read(value: object, _home: Path) -> float:
        if isinstance(value, str):
            match = _SECONDS.fullmatch(value.strip().lower())
            if match is None:
                raise ValueError
            seconds = float(match[1]) * _SECOND_UNITS[match[2]]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            seconds = float(value)
        else:
            raise ValueError
        if not low <= seconds <= high:
            raise ValueError
        return seconds

    return _Kind(f'seconds from {low:g} to {high:g}, or a text like "500ms", "20s" or "2m"', read)


def _count(low: int, high: int) -> _Kind:
    def read(value: object, _home: Path) -> int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        number = int(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return _Kind(f"a whole number from {low} to {high}", read)


def _choice(*allowed: str) -> _Kind:
    def read(value: object, _home: Path) -> str:
        if not isinstance(value, str) or value.lower() not in allowed:
            raise ValueError
        return value.lower()

    return _Kind(f"{', '.join(allowed[:-1])} or {allowed[-1]}", read)


def _some(*allowed: str) -> _Kind:
    def read(value: object, _home: Path) -> str:
        if not isinstance(value, str):
            raise TypeError
        named = [name.strip().lower() for name in value.split(",") if name.strip()]
        if not set(named) <= set(allowed):
            raise ValueError
        return ",".join(name for name in allowed if name in named)

    return _Kind(f"nothing, or some of {', '.join(allowed)}, separated by commas", read)


def _read_file(value: object, home: Path) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    path = _path_below(home, value)
    if value and not path.is_absolute():
        raise ValueError
    return str(path) if value else ""


def _read_socket(value: object, home: Path) -> str:
    path = _read_file(value, home)
    if len(os.fsencode(path)) > SOCKET_PATH_MAX:
        raise ValueError
    return path


def parse_peers(text: str) -> tuple[str, tuple[str, ...]]:
    """What `swarm.peers` names: "static" and addresses, "dns" and one NAME:PORT, "kubernetes" and NAMESPACE, SERVICE; "" for nobody.

    Raises ValueError.
    """
    text = text.strip()
    if not text:
        return "", ()
    if len(text) > PEERS_CHARACTERS_MAX:
        raise ValueError
    kind, colon, rest = text.partition(":")
    named = tuple(part.strip() for part in rest.split(",") if part.strip())
    if kind == "kubernetes":
        namespace, _, service = rest.partition("/")
        if not all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in (namespace, service)):
            raise ValueError
        return kind, (namespace, service)
    if kind not in {"static", "dns"} or not colon or not named or (kind == "dns" and len(named) != 1):
        raise ValueError
    for address in named:
        if (parsed := parse_address(address)) is None or not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", parsed.host):
            raise ValueError
    return kind, named


def _read_peers(value: object, _home: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    parse_peers(value)
    return value.strip()


def _read_name(value: object, _home: Path) -> str:
    if not isinstance(value, str) or (value and not re.fullmatch(r"[A-Za-z0-9.:-]{1,253}", value)):
        raise ValueError
    return value


def _read_listen(value: object, _home: Path) -> str:
    if not isinstance(value, str) or (address := parse_address(value)) is None or address.path:
        raise ValueError
    return str(address)


_DIRECTORY = _Kind("a directory's path", _read_path)
_FILE = _Kind("a file's absolute path, or nothing", _read_file)
_BYTES = _Kind(SIZE_ALLOWED, _read_size)
_SWITCH = _Kind("true or false", _read_switch)

_KINDS: Mapping[str, _Kind] = {
    "cache.dir": _DIRECTORY,
    "cache.size": _BYTES,
    "cache.free_space_floor": _BYTES,
    "hub.endpoint": _Kind("a URL like https://huggingface.co", _read_url),
    "hub.offline": _SWITCH,
    "hub.timeout_s": _seconds(0.1, 600),
    "fetch.workers": _count(1, 16),
    "fetch.connections": _count(1, 64),
    "fetch.stall_s": _seconds(0.1, 600),
    "fetch.read_timeout_s": _seconds(0.1, 3600),
    "fetch.fill": _SWITCH,
    "fuse.session": _choice("auto", "kernel", "pyfuse3"),
    "fuse.without": _some(*FUSE_FEATURES),
    "fuse.complete_at_open": _BYTES,
    "fuse.readahead_kib": _count(4, 1024 * 1024),
    "daemon.runtime_dir": _DIRECTORY,
    "daemon.log_level": _choice("debug", "info", "warning", "error"),
    "daemon.log_format": _choice("text", "json"),
    "daemon.keeper": _Kind(f"a socket's absolute path of {SOCKET_PATH_MAX} bytes at most, or nothing", _read_socket),
    "daemon.metrics": _Kind('HOST:PORT, such as "127.0.0.1:9401", or unix:PATH, or nothing for off', _read_address),
    "swarm.peers": _Kind(
        'nothing, "static:HOST:PORT,...", "dns:NAME:PORT" or "kubernetes:NAMESPACE/SERVICE"', _read_peers
    ),
    "swarm.listen": _Kind('HOST:PORT, such as "127.0.0.1:9402" or "0.0.0.0:9402"', _read_listen),
    "swarm.key_file": _FILE,
    "swarm.tls_certificate": _FILE,
    "swarm.tls_key": _FILE,
    "swarm.tls_authorities": _FILE,
    "swarm.tls_name": _Kind("a host name, or nothing", _read_name),
    "swarm.slots": _count(1, 256),
    "swarm.downloads": _count(1, 256),
    "swarm.upload_rate": _BYTES,
    "swarm.download_rate": _BYTES,
    "swarm.share": _choice("all", "public"),
}
"""What each value may be. A new field needs its line here; tests/test_config.py holds both to each other."""

KEYS: tuple[str, ...] = tuple(_KINDS)
_BARE = Config()
_SECTIONS = tuple(section.name for section in fields(Config))

# Kubernetes puts these into every pod for each Service of its namespace: a Service named "manta-cache" must not break Manta.
_SERVICE_LINK = re.compile(
    r"MANTA_.*?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def allowed(key: str) -> str:
    """What SECTION.FIELD may be, for a person."""
    return _KINDS[key].allowed


def check_key(key: str) -> None:
    """Raises Invalid, with the nearest known name, when no setting is called `key`."""
    if key not in _KINDS:
        raise Invalid(f"There is no setting {key!r}{did_you_mean(key, _KINDS)}. `manta config` lists all settings.")


def _defaults(env: Mapping[str, str], home: Path, user_id: int) -> dict[str, object]:
    values = dict(items(_BARE))
    if user_id != 0:
        import tempfile

        values["cache.dir"] = Path(env.get("XDG_CACHE_HOME") or home / ".cache") / "manta"
        runtime = env.get("XDG_RUNTIME_DIR")
        # Without a login session there is no runtime directory: a folder of the user's own in /tmp, checked when it is made.
        values["daemon.runtime_dir"] = (
            Path(runtime) / "manta" if runtime else Path(tempfile.gettempdir()) / f"manta-{user_id}"
        )
    return values


def _from_flags(flags: Mapping[str, object]) -> Iterable[tuple[str, object, Origin]]:
    for key, value in flags.items():
        check_key(key)
        yield key, value, Origin("flag", FLAGS.get(key, f"--set {key}"))


FLAGS: Mapping[str, str] = {
    "cache.dir": "--cache-dir",
    "hub.endpoint": "--endpoint",
    "hub.offline": "--offline",
    "fuse.session": "--fuse",
    "daemon.runtime_dir": "--runtime-dir",
    "daemon.log_level": "--log-level",
    "daemon.log_format": "--log-format",
    "daemon.keeper": "--keeper",
    "daemon.metrics": "--metrics",
    "swarm.peers": "--peers",
    "swarm.listen": "--listen",
}
"""The settings that have a flag of their own; `--set SECTION.FIELD=VALUE` reaches them all."""


def _from_environment(env: Mapping[str, str]) -> Iterable[tuple[str, object, Origin]]:
    if endpoint := env.get("HF_ENDPOINT"):
        yield "hub.endpoint", endpoint, Origin("environment", "HF_ENDPOINT")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        # huggingface_hub reads whatever it does not know as false, and so must we: the variable is not ours.
        if name in env:
            yield "hub.offline", _hf_true(env[name]), Origin("environment", name)
            break
    keys = {variable(key): key for key in KEYS}
    for name in sorted(name for name in env if name.startswith("MANTA_")):
        if name in keys:
            yield keys[name], env[name], Origin("environment", name)
        elif name not in {"MANTA_CONFIG", SWARM_KEY_VARIABLE} and not _SERVICE_LINK.fullmatch(name):
            hint = did_you_mean(name, keys)
            if hint or name.startswith(tuple(f"MANTA_{section.upper()}_" for section in _SECTIONS)):
                raise Invalid(
                    f"The environment variable {name} is no setting of Manta{hint}. `manta config` lists all settings."
                )


def _from_files(file: Path | None, env: Mapping[str, str], home: Path) -> Iterable[tuple[str, object, Origin]]:
    named = file or (_path_below(home, env["MANTA_CONFIG"]) if env.get("MANTA_CONFIG") else None)
    if named is not None:
        yield from _from_file(named, must_exist="--config" if file else "MANTA_CONFIG")
        return
    for path in (SYSTEM_FILE, Path(env.get("XDG_CONFIG_HOME") or home / ".config") / USER_FILE):
        yield from _from_file(path, must_exist="")


def _from_file(path: Path, *, must_exist: str) -> Iterable[tuple[str, object, Origin]]:
    import tomllib

    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        if not must_exist:
            return
        raise Invalid(f"The configuration file {path} that {must_exist} names does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Invalid(f"The configuration file {path} cannot be read: {error}.") from error
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"The configuration file {path} is not TOML: {error}.") from error
    for name, values in sections.items():
        if name not in _SECTIONS or not isinstance(values, dict):
            raise Invalid(
                f"{name!r} in {path} is no section{did_you_mean(name, _SECTIONS)}:"
                f" expected [{'], ['.join(_SECTIONS[:-1])}] or [{_SECTIONS[-1]}]."
            )
        for entry, value in values.items():
            key = f"{name}.{entry}"
            if key not in _KINDS:
                known = [known.partition(".")[2] for known in _KINDS if known.startswith(f"{name}.")]
                raise Invalid(
                    f"{entry!r} in section [{name}] of {path} is no setting{did_you_mean(entry, known)}:"
                    f" expected {', '.join(known)}."
                )
            yield key, value, Origin("file", str(path))


def _path_below(home: Path, text: str) -> Path:
    if text == "~" or text.startswith("~/"):
        return home / text[2:]
    return Path(text)


def _hf_true(value: str | None) -> bool:
    return value is not None and value.upper() in {"1", "ON", "YES", "TRUE"}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The part of a refusal that names the nearest of the known names; empty where none is near."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.8)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
