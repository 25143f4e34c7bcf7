"""Who may say something to a node: HMAC over every request and answer with the cluster's shared key, here and only here. Pure.

A request names its sender, the node it is for, the time and a number used once, and carries HMAC-SHA256 over all that, its method, target,
range and body. A node takes it within WINDOW_SECONDS of its own clock, each number once. The answer is signed with that
number, so that nobody without the key can answer in a member's place. The key itself never travels. Two keys may be valid at a time, so
that one can be replaced: the first signs, either is accepted.

What a signature does not do is hide: without TLS the bytes can be read on the way, and altered by who controls the network, which the
digest of the whole blob finds. Used by the peer process and by workers.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from manta.errors import Denied, Invalid

KEY_CHARACTERS_MIN = 16
KEYS_MAX = 2

WINDOW_SECONDS = 30.0
"""How far the sender's clock may be from ours. Nodes of a cluster keep time by NTP, to well below a second."""

NONCES_MAX = 262_144
"""Numbers remembered, about 30 MB when full: 4,000 requests per second for the time that a request is good for."""

PAGE_SECONDS_MAX = 600
"""How long a link to the status page is good. Whoever gets to see the link sees the page."""

_HEADER = re.compile(
    r"Manta node=([0-9a-f]{16}),to=([0-9a-f]{16}|),time=([0-9]{1,16}),nonce=([0-9a-f]{32}),key=([0-9a-f]{8}|),mac=([0-9a-f]{64}|)"
)


def parse_keys(text: str) -> tuple[bytes, ...]:
    """The keys in `text`: one per line (or separated by commas), the one to sign with first. Raises Invalid."""
    keys = tuple(line.strip().encode() for line in re.split(r"[\n,]", text) if line.strip())
    if not 1 <= len(keys) <= KEYS_MAX:
        raise Invalid(f"The swarm's key must be one line, or two while it is replaced, not {len(keys)}.")
    if any(len(key) < KEY_CHARACTERS_MIN for key in keys):
        raise Invalid(
            f"The swarm's key must have at least {KEY_CHARACTERS_MIN} characters: make one with `openssl rand -hex 32`."
        )
    return keys


def key_name(key: bytes) -> str:
    """Tells keys apart without showing them: 8 hex digits of a digest."""
    return hashlib.sha256(b"manta-key-name\0" + key).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Request:
    """What of a request is signed. `target` is path and query as they are sent; `range` the Range header or ""."""

    method: str
    target: str
    range: str = ""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What of an answer is signed. `head` describes a chunk's body (`protocol.chunk_head`), "" elsewhere; `body` is b"" for a chunk."""

    status: int
    head: str = ""
    body: bytes = b""
    body_sha256: str = ""
    """Hex, instead of `body`, for one that is too large to have at hand."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who a request says it is from, and the number that its answer is signed with."""

    node: str
    to: str
    nonce: str
    key: bytes = field(repr=False)
    """The key it was signed with; b"" without keys."""


def _mac(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\n".join(parts).encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def _request_mac(key: bytes, request: Request, node: str, to: str, time_ms: str, nonce: str) -> str:
    body = hashlib.sha256(request.body).hexdigest()
    return _mac(key, "manta-request-1", node, to, time_ms, nonce, request.method, request.target, request.range, body)


def sign_page(keys: Sequence[bytes], now: float) -> str:
    """The query with which a browser may see the status page of any node of the cluster, for PAGE_SECONDS_MAX from `now` on. Raises Denied
    without a key."""
    if not keys:
        raise Denied(
            "Without a swarm key the status page is for this machine alone: open it at the address that the node listens at."
        )
    until = str(int(now + PAGE_SECONDS_MAX))
    return f"until={until}&mac={_mac(keys[0], 'manta-page-1', until)}"


def page_is_signed(until: str, mac: str, keys: Sequence[bytes], now: float) -> bool:
    """Whether the fields of a query are from `sign_page` with one of `keys`, and not too old. Never without a key."""
    # The clock of the node that signed it may be ahead.
    if not re.fullmatch(r"[0-9]{1,12}", until) or not 0 <= int(until) - now <= PAGE_SECONDS_MAX + WINDOW_SECONDS:
        return False
    given = mac.encode("utf-8", "replace")
    return any(hmac.compare_digest(given, _mac(key, "manta-page-1", until).encode()) for key in keys)


def new_nonce() -> str:
    return secrets.token_hex(16)


def sign(request: Request, node: str, to: str, keys: Sequence[bytes], now: float, nonce: str) -> str:
    """The Authorization header. `to` is the node that it is for, "" where that is not known yet (hello); `now` seconds since the epoch.

    Without keys it only names the sender.
    """
    time_ms = str(int(now * 1000))
    key = keys[0] if keys else b""
    mac = _request_mac(key, request, node, to, time_ms, nonce) if key else ""
    return f"Manta node={node},to={to},time={time_ms},nonce={nonce},key={key_name(key) if key else ''},mac={mac}"


def sign_answer(answer: Answer, sender: Sender, node: str) -> str:
    """What goes into the header `protocol.MAC`: by `node`, to the request of `sender`. "" without a key."""
    return _answer_mac(sender.key, answer, sender.nonce, node) if sender.key else ""


def _answer_mac(key: bytes, answer: Answer, nonce: str, node: str) -> str:
    body = answer.body_sha256 or hashlib.sha256(answer.body).hexdigest()
    return _mac(key, "manta-answer-1", node, nonce, str(answer.status), answer.head, body)


def answer_is_genuine(answer: Answer, mac: str, nonce: str, node: str, key: bytes) -> bool:
    """Whether `node` gave this answer to the request with `nonce`, which was signed with `key`. Always true without a key."""
    return not key or hmac.compare_digest(
        mac.encode("utf-8", "replace"), _answer_mac(key, answer, nonce, node).encode()
    )


class Verifier:
    """What a server asks about each request. `me` is its node id; `keys` may be replaced at any time."""

    def __init__(self, me: str, keys: Sequence[bytes]) -> None:
        self._me = me
        self.keys = tuple(keys)
        self._seen: set[str] = set()
        self._order: deque[tuple[float, str]] = deque()

    def check(self, header: str, request: Request, now: float) -> Sender:
        """Who sent it. Raises Denied with a sentence for the other node's person, which says nothing that helps to guess."""
        found = _HEADER.fullmatch(header)
        if found is None:
            raise Denied("The request has no Authorization header of a Manta node.")
        node, to, time_ms, nonce, name, mac = found.groups()
        if to not in {"", self._me}:
            raise Denied("The request is for another node: its address may have been given to this one.")
        if not self.keys:
            return Sender(node, to, nonce, b"")
        key = next((key for key in self.keys if key_name(key) == name), None)
        if key is None:
            raise Denied("The request is signed with a key that is not this node's: give all nodes the same swarm key.")
        if not hmac.compare_digest(mac, _request_mac(key, request, node, to, time_ms, nonce)):
            raise Denied("The request's signature is wrong: give all nodes the same swarm key.")
        apart = int(time_ms) / 1000 - now
        if abs(apart) > WINDOW_SECONDS:
            raise Denied(
                f"The request's time is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} this node's clock: set the clocks (NTP)."
            )
        self._forget(now)
        if nonce in self._seen:
            raise Denied("The request was seen before.")
        if len(self._seen) >= NONCES_MAX:
            raise Denied("Too many requests in a short time; try again.")
        self._seen.add(nonce)
        self._order.append((now, nonce))
        return Sender(node, to, nonce, key)

    def _forget(self, now: float) -> None:
        """A number may go when the time of any request with it is out of the window."""
        while self._order and self._order[0][0] < now - 2 * WINDOW_SECONDS:
            self._seen.discard(self._order.popleft()[1])
