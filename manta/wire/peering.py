"""The messages between the daemon and its peer process, here and only here. Framing as in `manta.wire.messages`.

The peer process serves other nodes from the cache's files and finds out who they are; whatever needs the hub, the scheduler or what the
daemon knows, it asks the daemon for. Used by `manta.fetch.swarm` (daemon side) and `manta.swarm.service`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from manta.wire.messages import MESSAGE_BYTES_MAX, Message, Ready

# Daemon to peer process ----------------------------------------------------------------------------------------------


class Settings(Message, frozen=True, tag="settings"):
    """The first message; again when keys change (then the rest stays as it was)."""

    node: str
    cache_dir: str
    host: str
    port: int
    peers: str
    """What `swarm.peers` says."""
    keys: list[bytes]
    tls_certificate: str = ""
    tls_key: str = ""
    tls_authorities: str = ""
    tls_name: str = ""
    slots: int = 8
    upload_rate: int = 0
    """Bytes per second; 0 is no limit."""
    share: Literal["all", "public"] = "all"
    started: float = 0.0
    """When the daemon began, in seconds since the epoch. With the id it tells this node from another that has a copy of its cache."""

    def __repr__(self) -> str:
        return "Settings(...)"


class Follow(Message, frozen=True, tag="follow"):
    """The blobs (id, size) of which it is to be known which members have which chunks; replaces those before. At most 256."""

    blobs: list[tuple[str, int]]


class OwnPauses(Message, frozen=True, tag="own-pauses"):
    """The origins that asked this node for a pause, and for how many seconds from now, and what comes to it from them: members are told.
    Once a second and when `Follow` changes; -> Ready: a process that hangs is found out by that."""

    pauses: dict[str, float]
    origin_rate: float = 0.0
    """Bytes per second."""


class Call(Message, frozen=True, tag="call"):
    """Ask a member. `what` is resolve, tree, location or report; `body` is the request's. A descriptor may come along, to which an answer
    of any size is written. -> Called."""

    node: str
    what: str
    body: bytes
    deadline_s: float


class Reply(Message, frozen=True, tag="reply"):
    """To Asked. A descriptor that comes along holds the body instead of `body`."""

    status: int
    body: bytes = b""


class Cancelled(Message, frozen=True, tag="cancelled"):
    """Nobody waits for the Call `order` any more."""


# Peer process to daemon ----------------------------------------------------------------------------------------------


class Listening(Message, frozen=True, tag="listening"):
    address: str
    """HOST:PORT."""


class Trouble(Message, frozen=True, tag="trouble"):
    """What does not work now (`kind` listen, discovery, keys, ...), a sentence for `manta status`; "" when it works again."""

    kind: str
    message: str


MemberState = Literal["up", "suspect", "down", "refused"]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """Another node. `node` is "" while nothing but its address is known."""

    node: str
    address: str
    """HOST:PORT."""
    state: MemberState
    """suspect: it did not answer the last time; down: several times; refused: it does not take our key, or we not its."""
    since: float
    """Seconds since the epoch."""
    rtt_s: float = 0.0
    version: str = ""
    problem: str = ""
    """A sentence, where it is not up."""
    asked: bool = True
    """It was greeted, whatever came of it."""


class Members(Message, frozen=True, tag="members"):
    """All members but this node, whenever that changes. A message takes 256; `first` is where these begin, `total` how many there are."""

    members: list[Member]
    first: int = 0
    total: int = 0


class Presence(Message, frozen=True, tag="presence"):
    """What a member has of a followed blob: a bit a chunk. All zero where it has nothing."""

    node: str
    blob: str
    have: bytes


class Pauses(Message, frozen=True, tag="pauses"):
    """A member was asked by these origins to wait so many seconds from now: so shall we."""

    node: str
    pauses: dict[str, float]
    origin_rate: float = 0.0
    """Bytes per second that come to that member from the origin."""


class Asked(Message, frozen=True, tag="asked"):
    """A member wants what only the daemon knows. `what` is pull (PullAsked), resolve, tree, location, report, public (a blob's id: may
    everybody have it?), or page (path and query, its signature taken off; for people, and `node` is "").
    -> Reply; for a pull when the chunk is in the cache (200) or cannot be had (502, or 403 where it is withheld, and a Refusal); for public
    200 or another status; for the others what the member gets."""

    node: str
    what: str
    body: bytes


class Gone(Message, frozen=True, tag="gone"):
    """Nobody waits for the answer to Asked `order` any more."""


class Uploaded(Message, frozen=True, tag="uploaded"):
    """What was given since the last one, at most once a second: by node, bytes and chunks; and what was refused."""

    given: list[tuple[str, int, int]]
    busy: int
    """Upload slots in use."""
    refused_busy: int = 0
    refused_auth: int = 0


class Called(Message, frozen=True, tag="called"):
    """The answer to Call: the status (0: none came, `problem` says why), and the body where no descriptor took it."""

    status: int
    body: bytes = b""
    problem: str = ""


class PullAsked(msgspec.Struct, frozen=True):
    """The body of Asked "pull"."""

    blob: str
    size: int
    chunk: int
    kind: str
    repo: str
    commit: str
    path: str
    urgent: bool


ToPeerProcess = Settings | Follow | OwnPauses | Call | Reply | Cancelled
FromPeerProcess = Ready | Listening | Trouble | Members | Presence | Pauses | Asked | Gone | Uploaded | Called

_to: msgspec.msgpack.Decoder[ToPeerProcess] = msgspec.msgpack.Decoder(ToPeerProcess)
_from: msgspec.msgpack.Decoder[FromPeerProcess] = msgspec.msgpack.Decoder(FromPeerProcess)

BODY_BYTES_MAX = MESSAGE_BYTES_MAX - 4096
"""Of a body that goes in a message; a larger one goes by descriptor."""


def decode_to_peer_process(data: bytes) -> ToPeerProcess:
    """Raises msgspec.DecodeError (a ValueError) for what is no message."""
    return _to.decode(data)


def decode_from_peer_process(data: bytes) -> FromPeerProcess:
    """Raises msgspec.DecodeError (a ValueError) for what is no message."""
    return _from.decode(data)
