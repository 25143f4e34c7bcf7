"""What nodes say to each other over HTTP/1.1: paths, headers, bodies, here and only here. Bodies are msgpack. Pure.

    GET  /v1/hello                          -> Hello
    POST /v1/have       HaveRequest         -> Have         which chunks of blobs are here
    GET  /v1/blobs/BLOB/CHUNK?size=N[&pull=...]            the chunk's bytes; Range is relative to the chunk
    POST /v1/ask/resolve  ResolveRequest    -> Resolved     what the asked node knows of the hub, or asks it
    POST /v1/ask/tree     TreeRequest       -> a stored tree, as `manta.cache.metadata` writes it
    POST /v1/ask/location LocationRequest   -> SharedLocation
    POST /v1/ask/report                     -> Report       what the node has done, for `manta peers`

A chunk is answered 200 or 206 with its bytes, and DIGEST (xxh3-128 of the whole chunk, hex), ENCODING; 202 Refusal: it is being fetched on
the asker's behalf, ask again; 404 Refusal: not here; 503 Refusal: no upload slot, `holders` may have it; 502 Refusal: the fetch
on the asker's behalf failed, `reason` says why. Else 400 (a request that is none), 401 (see `auth`), 403 (not handed out). Every answer
carries MAC where there is a key. `pull` asks a node that lacks the chunk to fetch it from the origin.

Used by the peer process (both sides) and by `manta.worker.peer`.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Literal, TypeVar
from urllib.parse import parse_qsl, quote

import msgspec

from manta.errors import Invalid
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobId, parse_blob_id

DIGEST = "x-manta-digest"
ENCODING = "x-manta-encoding"
"""lz4: the body is one LZ4 frame of the range's bytes. identity otherwise."""
MAC = "x-manta-mac"
PLAIN_BYTES = "x-manta-bytes"
"""With lz4: how many bytes the body is when it is unpacked."""
ACCEPT_LZ4 = "x-manta-accept"

HOLD_SECONDS = 0.5
"""How long a request for a chunk that is being fetched is held before it is answered 202."""

BODY_BYTES_MAX = 64 * 1024
"""Bytes of a request's body."""

ANSWER_BYTES_MAX = 4 * 1024 * 1024
"""Bytes of an answer that is no chunk and no tree."""

TARGET_BYTES_MAX = 8 * 1024
HAVE_BLOBS_MAX = 256
BLOB_BYTES_MAX = 16 * 1024**4

_BLOB_TARGET = re.compile(r"/v1/blobs/([a-z0-9-]{1,80})/([0-9]{1,9})")
_RANGE = re.compile(r"bytes=([0-9]{1,9})-([0-9]{1,9})")
NODE_ID = re.compile(r"[0-9a-f]{16}")


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all bodies. A field that one side does not know is left out; it has a default."""


class Hello(Body, frozen=True):
    """Who answers."""

    node: str
    version: str
    started: float
    """Seconds since the epoch."""


class HaveRequest(Body, frozen=True):
    """Blobs (id, size), at most HAVE_BLOBS_MAX."""

    blobs: list[tuple[str, int]]


class Have(Body, frozen=True):
    """The chunks of each blob that the node can give now: a bit a chunk, chunk 0 in the lowest bit of byte 0. Others are left out."""

    node: str
    blobs: dict[str, bytes] = {}
    pauses: dict[str, float] = {}
    """The origins that asked this node for a pause, and for how many seconds from now."""
    slots: int = 0
    busy: int = 0
    """Upload slots, and how many are in use."""
    origin_rate: float = 0.0
    """Bytes per second that come to it from the origin."""


class Pull(Body, frozen=True):
    """Where the origin has the blob, for a node that is to fetch a chunk on the asker's behalf with its own rights."""

    kind: str
    repo: str
    commit: str
    path: str
    urgent: bool = False
    """A reader waits for it."""


class ResolveRequest(Body, frozen=True):
    kind: str
    repo: str
    revision: str = ""
    """"" is the default branch."""
    known: bool = False
    """Only what is known without asking the hub: the asker could not reach it."""


class Resolved(Body, frozen=True):
    """The commit that the revision names. Told of public repos only."""

    commit: str
    canonical: str = ""
    age_s: float = 0.0


class TreeRequest(Body, frozen=True):
    kind: str
    repo: str
    commit: str


class LocationRequest(Body, frozen=True):
    kind: str
    repo: str
    commit: str
    path: str
    blob: str
    size: int


class SharedLocation(Body, frozen=True):
    """Where the bytes are. Never with an Authorization header: such a location is not shared."""

    url: str
    headers: dict[str, str]
    expires_s: float = 0.0
    """Seconds from now; 0 where it does not end."""
    refresh_s: float = 0.0

    def __repr__(self) -> str:
        return "SharedLocation(...)"


class BlobReport(Body, frozen=True):
    """One blob of a node: what of it is there, and what of it came from the origin since the daemon started."""

    blob: str
    size: int
    name: str
    """For people: ORG/NAME/PATH."""
    have: bytes
    """Its chunks, as in `Have`."""
    from_origin: int
    """Bytes."""
    from_peers: int


class Exchange(Body, frozen=True):
    """What a node got from and gave to another one, since its daemon started."""

    node: str
    bytes_in: int = 0
    chunks_in: int = 0
    bytes_out: int = 0
    chunks_out: int = 0
    rate_in: float = 0.0
    rate_out: float = 0.0
    """Bytes per second now."""
    failures: int = 0
    state: str = ""


class Report(Body, frozen=True):
    node: str
    address: str
    version: str
    started: float
    from_origin: int
    """Bytes of bodies from the origin since the start."""
    from_peers: int
    to_peers: int
    origin_rate: float = 0.0
    """Bytes per second from the origin now."""
    blobs: list[BlobReport] = []
    exchanges: list[Exchange] = []
    slots: int = 0
    busy: int = 0
    cache_bytes: int = 0


class Refusal(Body, frozen=True):
    """Why a chunk is not in the answer, or a question has none."""

    reason: Literal[
        "coming", "absent", "busy", "invalid", "unauthorized", "withheld", "denied", "throttled", "unavailable", "corrupt", "no_space",
        "cache_broken",
    ]  # fmt: skip
    message: str = ""
    """A sentence."""
    holders: list[str] = []
    """Nodes that may have it."""
    retry_s: float = 0.0
    origin: str = ""
    """For "throttled": who asked for the pause."""


T = TypeVar("T", bound=Body)

_encoder = msgspec.msgpack.Encoder()


def encode(body: Body) -> bytes:
    return _encoder.encode(body)


def decode(data: bytes, kind: type[T]) -> T:
    """Raises Invalid for what is no `kind`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Invalid(f"The body is no {kind.__name__}.") from error


@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """A request for bytes `start`..`end` of chunk `chunk` (relative to the chunk) of a blob of `size` bytes."""

    blob: BlobId
    size: int
    chunk: int
    start: int
    end: int
    whole: bool
    """No Range was sent: all of the chunk is asked for."""
    pull: Pull | None


def chunk_target(blob: BlobId, size: int, chunk: int, pull: Pull | None = None) -> str:
    """Path and query of the request for a chunk."""
    asked = f"&pull={base64.urlsafe_b64encode(encode(pull)).decode().rstrip('=')}" if pull is not None else ""
    return f"/v1/blobs/{quote(str(blob))}/{chunk}?size={size}{asked}"


def parse_chunk_target(target: str, range_header: str) -> ChunkRequest:
    """What a request for a chunk asks for. Raises Invalid for anything that `chunk_target` does not write."""
    path, _, query = target.partition("?")
    found = _BLOB_TARGET.fullmatch(path)
    if found is None or len(target) > TARGET_BYTES_MAX:
        raise Invalid("The path names no chunk of a blob.")
    try:
        fields = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=4))
    except ValueError as error:
        raise Invalid("The query has too many fields.") from error
    if fields.keys() - {"size", "pull"} or not re.fullmatch(r"[0-9]{1,15}", fields.get("size", "")):
        raise Invalid("The query is not that of a chunk.")
    blob, chunk, size = parse_blob_id(found[1]), int(found[2]), int(fields["size"])
    if not 0 < size <= BLOB_BYTES_MAX or chunk * CHUNK_SIZE >= size:
        raise Invalid(f"A blob of {size} bytes has no chunk {chunk}.")
    length = min(CHUNK_SIZE, size - chunk * CHUNK_SIZE)
    start, end = 0, length
    if range_header:
        asked = _RANGE.fullmatch(range_header)
        if asked is None or not int(asked[1]) <= int(asked[2]) < length:
            raise Invalid("The range is none of the chunk's.")
        start, end = int(asked[1]), int(asked[2]) + 1
    pull = None
    if "pull" in fields:
        text = fields["pull"]
        try:
            pull = decode(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True), Pull)
        except ValueError as error:
            raise Invalid("The pull is malformed.") from error
    return ChunkRequest(blob, size, chunk, start, end, not range_header, pull)


def chunk_head(digest: bytes, start: int, end: int, encoding: str, body_bytes: int) -> str:
    """What of a chunk's answer is signed besides its status: the digest, which bytes of the chunk, and how they are sent."""
    return f"{digest.hex()} {start}-{end} {encoding} {body_bytes}"
