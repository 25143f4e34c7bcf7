"""Configuration: one frozen section per component, and where each value comes from, here and only here.

Flags beat the environment (MANTA_SECTION_FIELD, such as MANTA_CACHE_SIZE), which beats the TOML file, which beats the defaults
below. Everything that runs takes its section as an argument and reads no environment of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CacheConfig:
    dir: Path = Path("/var/cache/manta")
    """Where blobs live. The default is ~/.cache/manta for users other than root."""
    size: int = 0
    """Bytes that cached blobs may take together; 0 is no limit. Readings like "500GiB" in text."""
    free_space_floor: int = 1024**3
    """Bytes of the disk that Manta leaves free."""


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
    """Worker processes, 1 to 16. Each is one core at most; TLS takes about 2 CPU-seconds per GB."""
    connections: int = 8
    """Requests in flight to the origin, 1 to 64. The Hub's own clients use 8 to 16."""
    stall_s: float = 10.0
    """A transfer with no byte for this long is given up and tried again."""
    read_timeout_s: float = 60.0
    """A reader gets an error when its bytes have not come for this long."""


@dataclass(frozen=True, slots=True)
class FuseConfig:
    session: str = "auto"
    """auto or pyfuse3."""
    readahead_kib: int = 4096
    """The kernel's readahead for the mount, set where permitted (root). The kernel's own default is 128."""


@dataclass(frozen=True, slots=True)
class DaemonConfig:
    runtime_dir: Path = Path("/run/manta")
    """Sockets, logs and the FUSE mount, in one folder per cache directory. Default for other users: $XDG_RUNTIME_DIR/manta."""
    log_level: str = "info"
    """debug, info, warning or error."""


@dataclass(frozen=True, slots=True)
class Config:
    cache: CacheConfig = field(default_factory=CacheConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    fuse: FuseConfig = field(default_factory=FuseConfig)
    daemon: DaemonConfig = field(default_factory=DaemonConfig)
