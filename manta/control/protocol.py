"""The control API's requests and answers, here and only here: what `manta.control.server` and `manta.control.client` exchange.

HTTP/1.1 with JSON bodies over a unix socket in the daemon's runtime directory (mode 0600). An error is a 4xx/5xx with an `Error` body.
Sizes are bytes, rates bytes per second, times seconds since the epoch unless the name says otherwise.

    GET    /v1/status                    -> Status
    POST   /v1/mounts        MountRequest -> Mount        creates the directory; the caller binds it
    POST   /v1/mounts/ID/bound   Bound    -> Mount        the caller has bound it to this directory
    DELETE /v1/mounts/ID                 -> Mount         the caller has unbound it (or gives up)
    GET    /v1/publications              -> list[Publication]
    PUT    /v1/publications/NAME MountRequest -> Mount    the mount of that name: made, or the same as before with the rights checked anew
    GET    /v1/publications/NAME         -> Mount
    POST   /v1/publications/NAME/bound Bound -> Mount
    DELETE /v1/publications/NAME         -> Mount         as for a mount; 404 where there is none of that name
    POST   /v1/prefetch   PrefetchRequest -> Job
    GET    /v1/jobs/ID                   -> Job
    DELETE /v1/jobs/ID                   -> Job           cancels it; what is fetched stays
    GET    /v1/cache                     -> CacheListing
    POST   /v1/cache/verify VerifyRequest -> Job
    POST   /v1/cache/pin    CacheSelection -> CacheListing
    POST   /v1/cache/unpin  CacheSelection -> CacheListing
    POST   /v1/cache/rm     CacheSelection -> Removal
    POST   /v1/cache/gc     GcRequest      -> Removal
    POST   /v1/shutdown                  -> Status        unmounts everything and exits
    POST   /v1/restart                   -> Running       exits, and leaves its mounts to the next daemon
    GET    /v1/peers                     -> Peers         what this node knows of the others by itself
    GET    /v1/peers?cluster=1           -> Peers         with `cluster`: the others are asked, which takes 2 s at most
    GET    /v1/peers/page                -> PageLink      where a browser finds the status page
    GET    /metrics                      -> text          every metric of the daemon, in Prometheus' format
"""

from __future__ import annotations

from typing import Literal

import msgspec

ANSWER_BYTES_MAX = 128 * 1024 * 1024
"""Bound on one answer: a listing of 400,000 blobs with a name each. One of 10,000 is 2.5 MB."""

BODY_BYTES_MAX = 16 * 1024 * 1024
"""Bound on one request: names of blobs and targets."""

View = Literal["tree", "hub-cache"]
VIEWS: tuple[View, ...] = ("tree", "hub-cache")


Prefetch = Literal["none", "background", "blocking-open"]
"""none: what is read is fetched. background: all of it from the mount's beginning on, behind what readers wait for. blocking-open: opening
a small file (`SMALL_BYTES_MAX`) waits until all of it is there."""
PREFETCHES: tuple[Prefetch, ...] = ("none", "background", "blocking-open")

SMALL_BYTES_MAX = 16 * 1024 * 1024
"""Configurations, tokenizers and indexes are smaller than this, weights are larger."""

PUBLICATION_CHARACTERS_MAX = 128
"""Of a publication's name: letters, digits, dot, dash and underscore."""


class Error(msgspec.Struct, frozen=True):
    """`code` is one of `manta.errors.BY_CODE`; `message` is a sentence for a person."""

    code: str
    message: str


class Pod(msgspec.Struct, frozen=True):
    """A pod of Kubernetes, as its kubelet names it."""

    uid: str
    name: str
    namespace: str
    volume: str = ""
    """The volume's id: "csi-" and 64 hex digits for an inline one, the PV's volumeHandle otherwise."""


class MountRequest(msgspec.Struct, frozen=True):
    """`target` as `manta.model.ids.parse_target` reads it; empty for the whole hub."""

    target: str = ""
    directory: str = ""
    """Where the caller will bind it: absolute, shown by status, and watched for in mountinfo."""
    view: View = "tree"
    token: str = ""
    """The caller's own token for the hub; empty: the daemon's. Kept in memory only."""
    anonymous: bool = False
    """Without a token, not even the daemon's. Only with an empty `token`."""
    prefetch: Prefetch = "none"
    pin: bool = False
    """What it shows is kept in the cache also after its end, until `manta cache unpin TARGET`."""
    pod: Pod | None = None
    """For whom, where it is a volume of Kubernetes."""

    def __repr__(self) -> str:
        return (
            f"MountRequest(target={self.target!r}, directory={self.directory!r}, view={self.view!r}, pod={self.pod!r})"
        )


class Bound(msgspec.Struct, frozen=True):
    directory: str


class Mount(msgspec.Struct, frozen=True):
    id: str
    target: str
    """As asked; empty for the whole hub."""
    revision: str
    commit: str
    """Empty for the whole hub, where each repo's commit is frozen at its first lookup."""
    view: View
    source: str
    """The directory of the daemon's mount that holds it; equal to `directory` where the mount is direct (no root)."""
    directory: str
    files: int
    size: int
    cached: int
    stale: bool
    """The commit comes from the cache because the hub could not be asked."""
    errors: list[str]
    """The latest sentences about reads that failed, newest last, at most 8."""
    rate: float = 0.0
    """Bytes per second that come for its files now."""
    publication: str = ""
    """Its name, where it was made by one."""
    prefetch: Prefetch = "none"
    pin: bool = False
    pod: Pod | None = None


class Publication(msgspec.Struct, frozen=True):
    """A mount that has a name, which its caller gave it: asked for again it is the same, however often and after whatever crash."""

    name: str
    mount: str
    directory: str
    pod: Pod | None


class FileTransfer(msgspec.Struct, frozen=True):
    """A blob that is being fetched now."""

    blob: str
    name: str
    """One path by which it was asked for: REPO/PATH."""
    size: int
    cached: int
    rate: float = 0.0
    """Bytes per second that come for it now."""
    waiting: int = 0
    """Reads that wait for bytes of it."""
    source: str = ""
    """Scheme, host and port that its bytes come from; empty before the first order."""


class Source(msgspec.Struct, frozen=True):
    """A host that bytes or answers about files come from."""

    origin: str
    """Scheme, host and port; HOST:PORT of a node."""
    rate: float
    bytes: int
    """Since the daemon began to ask it."""
    connections: int
    """Requests for bytes in flight."""
    failures: int
    throttled_until: float
    """It wants to be left alone until then; 0 where it may be asked."""
    node: str = ""
    """The id of the node that it is; empty for a host of the origin."""


class Quota(msgspec.Struct, frozen=True):
    """One of the hub's request quotas, as its last answer had it."""

    kind: str
    """The hub's own word, such as "api" or "resolvers"."""
    remaining: int
    limit: int
    """Requests per window; 0 where the hub does not say."""
    reset_s: int
    """Seconds until the window ends."""


class Swarm(msgspec.Struct, frozen=True):
    """The swarm in short, from the view of this node. Bytes since its daemon started."""

    node: str
    address: str
    members: int
    """Without this node."""
    up: int
    rate_in: float
    rate_out: float
    bytes_in: int
    bytes_out: int
    slots: int
    busy: int
    """Upload slots, and how many are in use."""


class Status(msgspec.Struct, frozen=True):
    version: str
    pid: int
    started: float
    cache_dir: str
    runtime_dir: str
    endpoint: str
    offline: bool
    fuse: str
    """The session that serves FUSE, such as "pyfuse3"."""
    ephemeral: bool
    """Whether it exits by itself when its last mount and job are gone."""
    mounts: list[Mount]
    transfers: list[FileTransfer]
    cache_bytes: int
    cache_limit: int
    """0: no limit."""
    disk_free: int
    origin_rate: float
    """Bytes per second from the origin, over the last few seconds."""
    origin_bytes: int
    """Bytes taken from the origin since the daemon started."""
    read_bytes: int
    """Bytes served to readers since the daemon started; what the kernel served by itself, from its page cache or from complete
    files, never arrives here."""
    workers: int
    errors: list[str]
    """The latest sentences, newest last, at most 16."""
    problems: list[str] = []
    """What is wrong with the cache now, and what to do."""
    sources: list[Source] = []
    """Those used last, the latest first, at most 16."""
    quotas: list[Quota] = []
    connections_allowed: int = 0
    """Requests for bytes that may be in flight; readers that wait may have as many more."""
    connections_in_use: int = 0
    reads_waiting: int = 0
    open_files: int = 0
    fuse_why: str = ""
    """Why it is this FUSE session."""
    native_refusal: str = ""
    """Why the kernel does not read cached files by itself; empty where it does."""
    survival_refusal: str = ""
    """Why mounts would end with the daemon; empty where they outlive it."""
    keeper: str = ""
    """Who keeps the mounts for the next daemon, and what of them."""
    swarm: Swarm | None = None
    """None where `swarm.peers` names nobody."""


class Running(msgspec.Struct, frozen=True):
    """Which daemon answered. Part of every version's `Status` too, so that a client of one version can follow a daemon to another."""

    version: str
    pid: int
    started: float = 0.0
    """Seconds since the epoch: in containers each has the same pid."""


class PrefetchRequest(msgspec.Struct, frozen=True):
    target: str
    token: str = ""

    def __repr__(self) -> str:
        return f"PrefetchRequest(target={self.target!r})"


JobState = Literal["running", "done", "failed", "cancelled"]


class Job(msgspec.Struct, frozen=True):
    """Work the daemon does on its own: a prefetch, a verification. Kept for 10 minutes after its end."""

    id: str
    kind: Literal["prefetch", "verify"]
    state: JobState
    name: str
    """What it works on, for a person: REPO@COMMIT, or "cache"."""
    files_total: int
    files_done: int
    bytes_total: int
    bytes_done: int
    rate: float
    problems: list[str]
    """What went wrong, a sentence each, at most 100; a verify job lists the damaged blobs."""
    seconds: float = 0.0
    """How long it has run."""
    damaged: int = 0
    """Chunks that a verify job found damaged."""
    repaired: int = 0
    """Those of them that were fetched anew."""


class Blob(msgspec.Struct, frozen=True):
    id: str
    size: int
    cached: int
    sealed: bool
    pinned: bool
    in_use: bool
    """Open, being fetched, or part of a mount."""
    last_used: float
    names: list[str]
    """Where stored trees show it: REPO@COMMIT/PATH, at most 4."""


class CacheListing(msgspec.Struct, frozen=True):
    blobs: list[Blob]
    cache_bytes: int
    cache_limit: int


class CacheSelection(msgspec.Struct, frozen=True):
    """Which blobs: blob ids, or targets (their newest stored snapshot). Empty means all, which rm refuses."""

    names: list[str] = []


class VerifyRequest(CacheSelection, frozen=True):
    full: bool = False
    """Sealed blobs by the hub's digest of the whole, not by the digests of their chunks."""
    repair: bool = False
    """Fetch anew what is damaged."""


class GcRequest(msgspec.Struct, frozen=True):
    """Evict down to `size` bytes (-1: the configured limit). Never touches what is in use or pinned."""

    size: int = -1
    dry_run: bool = False


class Removal(msgspec.Struct, frozen=True):
    removed: list[Blob]
    freed: int
    kept: list[str]
    """What was asked for and not removed, with the reason, a sentence each."""


PeerState = Literal["up", "suspect", "down", "refused"]
"""As in `manta.wire.peering`: suspect did not answer the last time, down several times; refused: keys or ids do not fit."""


class Peer(msgspec.Struct, frozen=True):
    """Another node as this one sees it, and what the two have exchanged since this daemon started: in is to this node."""

    node: str
    """Empty while nothing but its address is known."""
    address: str
    """HOST:PORT."""
    state: PeerState
    since: float
    rtt_s: float
    version: str
    problem: str
    """A sentence, where it is not up."""
    bytes_in: int = 0
    bytes_out: int = 0
    chunks_in: int = 0
    chunks_out: int = 0
    rate_in: float = 0.0
    rate_out: float = 0.0
    failures: int = 0


class ClusterNode(msgspec.Struct, frozen=True):
    """What a node says of itself: bytes since its daemon started, rates now. In is from other nodes, out is to them."""

    node: str
    address: str
    version: str
    started: float
    origin_bytes: int
    origin_rate: float
    bytes_in: int
    bytes_out: int
    rate_in: float
    rate_out: float
    slots: int
    busy: int
    cache_bytes: int


class SharedBlob(msgspec.Struct, frozen=True):
    """A blob, and how many of the nodes that answered have each of its chunks."""

    blob: str
    name: str
    """For people: ORG/NAME/PATH. From outside: any text."""
    size: int
    chunks: int
    chunks_per_cell: int
    holders: list[int]
    """A cell has as many as its rarest chunk. At most `manta.operations.peers.CELLS_MAX` cells."""


class Flow(msgspec.Struct, frozen=True):
    sender: str
    receiver: str
    rate: float


class Cluster(msgspec.Struct, frozen=True):
    """What the nodes said that answered, this one included."""

    asked: float
    """When they were."""
    nodes: list[ClusterNode]
    silent: list[str]
    """Those that did not answer: a sentence each."""
    not_asked: int
    """Members beyond the number that is asked."""
    origin_bytes: int
    """What all of them took from the origin since their daemons started."""
    distinct_bytes: int
    """What of it is different, and still in a cache: a byte that several nodes have counts once."""
    origin_multiple: float | None
    """The one divided by the other: how many copies the origin sent. None where nothing has come."""
    blobs: list[SharedBlob]
    blobs_left_out: int
    flows: list[Flow]
    """Who sends to whom now, the largest first; those of the origin are in `nodes`."""


class Peers(msgspec.Struct, frozen=True):
    """The swarm as this node knows it. Without one (`swarm.peers` is empty) all is empty but `enabled`."""

    enabled: bool
    node: str = ""
    address: str = ""
    """HOST:PORT that others reach it at."""
    discovery: str = ""
    """`swarm.peers`."""
    problem: str = ""
    """What does not work, a sentence."""
    slots: int = 0
    busy: int = 0
    origin_bytes: int = 0
    peer_bytes: int = 0
    given_bytes: int = 0
    """To other nodes."""
    distinct_bytes: int = 0
    """Of the blobs that it has got something of since its daemon started: what is in the cache, and did come."""
    origin_multiple: float | None = None
    """Bytes from the origin for each of them. Of N nodes that start at once each has 1/N where all goes well."""
    members: list[Peer] = []
    cluster: Cluster | None = None


class PageLink(msgspec.Struct, frozen=True):
    url: str
    expires: float
    """Whoever has the link sees the page until then; 0 where it is for this machine only and needs no signature."""
