"""The messages between the daemon and its workers, here and only here.

Each message is one SOCK_SEQPACKET datagram: a msgpack array whose first item names its type. An order that touches a blob carries the
blob's cache file as a descriptor (SCM_RIGHTS), so a worker opens no path of the cache and keeps none open.
Used by `manta.fetch` (daemon side) and `manta.worker`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MESSAGE_BYTES_MAX = 64 * 1024
"""Bound on one message: a signed URL is at most a few KiB, an error body is cut long before this."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages. `order` ties an answer to what was ordered; it is unique within one daemon's life."""

    order: int


# Daemon to worker ----------------------------------------------------------------------------------------------------


class Locate(Message, frozen=True, tag="locate"):
    """Ask the origin where a file's bytes are: one request, no redirect to another origin followed. -> Located | Failed."""

    url: str
    headers: dict[str, str]
    deadline_s: float


class Fetch(Message, frozen=True, tag="fetch"):
    """Fetch `extents` of the chunk `start`..`end` into the descriptor that comes along, in that order, one request each.

    What the extents leave out is in the cache file already (an earlier order for this chunk was cut short).
    -> Progress*, then Fetched | Failed.
    """

    url: str
    headers: dict[str, str]
    start: int
    end: int
    extents: list[tuple[int, int]]
    blob_size: int
    stall_s: float
    """Give up when no byte has come for this long."""
    last: bool = True
    """With these extents the chunk is complete, and its digest is wanted."""
    watched: bool = True
    """A reader waits for these bytes: report them as they come. Otherwise now and then is enough."""


class Pull(Message, frozen=True, tag="pull"):
    """Get `extents` of the chunk `start`..`end` from another node into the descriptor that comes along; the rest is there already.

    Nothing of it may be read before the answer, which is Fetched only where the whole chunk has the digest that the node announced.
    -> Progress* (what is on the way; not to be believed), then Fetched | Failed.
    """

    address: str
    """HOST:PORT."""
    node: str
    """Whose address that is. "" is not possible: only members are asked."""
    me: str
    blob: str
    blob_size: int
    chunk: int
    start: int
    end: int
    extents: list[tuple[int, int]]
    stall_s: float
    """Give up when nothing at all has come for this long: neither bytes nor word that it is being fetched."""
    patience_s: float
    """Give up when the node has fetched on our behalf for this long without having it."""
    keys: list[bytes] = []
    pull: bytes = b""
    """`manta.swarm.protocol.Pull`, encoded: fetch it from the origin where it is not there; b"": only what is there."""
    tls_authorities: str = ""
    """PEM file of the authorities that a member's certificate must come from; "" is plain HTTP."""
    tls_name: str = ""
    """The name in the members' certificates; "" is the address's host."""
    lz4: bool = False
    """Compressed bytes are welcome."""

    def __repr__(self) -> str:
        return f"Pull(order={self.order}, node={self.node!r}, blob={self.blob!r}, chunk={self.chunk})"


class Watch(Message, frozen=True, tag="watch"):
    """A reader waits for the bytes of the Fetch or Pull `order` from now on."""


class Digest(Message, frozen=True, tag="digest"):
    """Continue the digest of a blob (descriptor comes along) from `start` to `end`, which is what was digested before. -> Digested.

    The worker keeps the running digest per `blob`. It starts anew where `start` is 0, and answers Failed where it has no state for `start`.
    """

    blob: str
    start: int
    end: int
    blob_size: int


class Verify(Message, frozen=True, tag="verify"):
    """Compare chunks of the cache file (descriptor comes along): start, end and xxh3-128 of each. -> Verified | Failed."""

    chunks: list[tuple[int, int, bytes]]


class Cancel(Message, frozen=True, tag="cancel"):
    """Stop working on `order`; it is answered Failed unless it had ended."""


# Worker to daemon ----------------------------------------------------------------------------------------------------


class Ready(Message, frozen=True, tag="ready"):
    """The worker is up and takes orders (`order` is 0)."""

    pid: int


class Located(Message, frozen=True, tag="located"):
    """What the origin answered: the status and headers (names in lower case) of the last hop on the hub's own origin."""

    status: int
    url: str
    headers: dict[str, str]


class Progress(Message, frozen=True, tag="progress"):
    """Bytes `at`..`upto` are in the cache file; not verified. Sent as they arrive, thinned out at high rates."""

    at: int
    upto: int


class Fetched(Message, frozen=True, tag="fetched"):
    """The extents are in the cache file. `digest` is the chunk's xxh3-128 where it is complete, else empty.

    `seconds` is from the request to the last byte, `first_byte_s` from the request to the first.
    """

    digest: bytes
    seconds: float
    first_byte_s: float = 0.0


class Digested(Message, frozen=True, tag="digested"):
    """The digest has reached `end`. `hex` is the blob's digest once `end` is the blob's size, else empty."""

    end: int
    hex: str


class Verified(Message, frozen=True, tag="verified"):
    """`damaged` are the starts of the chunks that are not as they were, each with a clause that says how."""

    damaged: list[tuple[int, str]]


Reason = Literal[
    "absent", "denied", "throttled", "unavailable", "corrupt", "no_space", "cache_broken", "cancelled", "busy"
]
"""Why an order failed: the codes of `manta.errors`, `cancelled`, and `busy` for a node that has no upload slot now."""


class Failed(Message, frozen=True, tag="failed"):
    """The order was not done. Bytes reported by Progress stay where they are and may be overwritten."""

    reason: Reason
    message: str
    """A clause for a sentence: what was asked of whom and what happened; never a signed URL, never a token."""
    status: int = 0
    """The HTTP status, 0 where there was none."""
    retry_after_s: float = 0.0
    unreachable: bool = False
    """No connection came about, or nothing at all was said on it: the host may be down, see `manta.hub.circuit`."""
    behind: bool = False
    """Of a Pull: the node is well, and what failed is its own fetch from the origin on our behalf."""
    holders: list[str] = []
    """Of a Pull that found no slot: nodes that may have the chunk."""
    origin: str = ""
    """Of a Pull that failed with `throttled` behind: who asked for the pause."""


ToWorker = Locate | Fetch | Pull | Watch | Digest | Verify | Cancel
FromWorker = Ready | Located | Progress | Fetched | Digested | Verified | Failed

_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


def encode(message: Message) -> bytes:
    """Raises ValueError where the message would exceed MESSAGE_BYTES_MAX."""
    data = _encoder.encode(message)
    if len(data) > MESSAGE_BYTES_MAX:
        raise ValueError(f"a {type(message).__name__} of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    return data


def decode_to_worker(data: bytes) -> ToWorker:
    """Raises msgspec.DecodeError (a ValueError) for what is no message."""
    return _to_worker.decode(data)


def decode_from_worker(data: bytes) -> FromWorker:
    """Raises msgspec.DecodeError (a ValueError) for what is no message."""
    return _from_worker.decode(data)
