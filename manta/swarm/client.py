"""Asking a member: one signed request, one answer that is bounded, in time and the member's own; here and only here. asyncio.

Used by `manta.swarm.members`. Chunks are not asked for here but in the fetch workers. What goes wrong is raised as one of

    Unreachable   no connection, or it broke
    Unavailable   no answer in time, or one that says "not now"
    Denied        who answered is not the member, or refuses us: keys or certificates differ, or the address is another node's
    Invalid       the answer is genuine, and nonsense
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import aiohttp
from yarl import URL

from manta import __version__
from manta.config import parse_address
from manta.errors import Denied, Invalid, MantaError, Unavailable, Unreachable
from manta.swarm import auth
from manta.swarm.protocol import (
    ANSWER_BYTES_MAX,
    MAC,
    NODE_ID,
    Have,
    HaveRequest,
    Hello,
    Refusal,
    decode,
    encode,
)
from manta.swarm.roster import PROBLEM_CHARACTERS_MAX, printable

CONNECT_SECONDS = 1.0
"""Nodes of a cluster are milliseconds apart. The name's lookup and TLS count too."""

TO_DESCRIPTOR_BYTES_MAX = 256 * 1024 * 1024
"""Of an answer that is written to a descriptor: the tree of 250,000 files has about 60 MB."""

KEPT_SECONDS = 6.0
"""An idle connection is kept from one hello to the next. Of thousands of members most are greeted less often, and have none."""

CONNECTIONS_MAX = 512
"""Greetings (60), a round's questions (16) and calls (256, `manta.swarm.service`) under way are fewer: nobody waits for one."""

ADDRESS_SECONDS = 10
"""How long a name's address is used again. Static members may be named."""

_Told = TypeVar("_Told", Hello, Have)


@dataclass(frozen=True, slots=True)
class Answered:
    """A genuine answer. `body` is empty where it went to a descriptor."""

    status: int
    body: bytes
    node: str
    """Who signed it."""
    rtt_s: float
    """From the request to the end of the answer."""


def trusted(authorities: str) -> ssl.SSLContext:
    """TLS to members whose certificates come from the authorities in that PEM file, and from no other. Raises Invalid."""
    try:
        return ssl.create_default_context(cafile=authorities)
    except (OSError, ValueError) as error:
        raise Invalid(
            f"The authorities of the members' certificates in {authorities} (swarm.tls_authorities) cannot be used:"
            f" {error.strerror if isinstance(error, OSError) and error.strerror else error}."
        ) from error


class MemberClient:
    """Requests of the node `me`. An asynchronous context; `keys` may be replaced at any time, the first signs.

    With `tls_authorities` over TLS; `tls_name` is the name in the certificates, "" the address's host. Raises Invalid where the
    authorities cannot be read. Proxies, redirects, cookies and compression are not for members.
    """

    def __init__(self, me: str, keys: Sequence[bytes], tls_authorities: str = "", tls_name: str = "") -> None:
        self.keys = tuple(keys)
        self._me = me
        self._tls = trusted(tls_authorities) if tls_authorities else None
        self._tls_name = tls_name or None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> MemberClient:
        connector = aiohttp.TCPConnector(
            limit=CONNECTIONS_MAX,
            keepalive_timeout=KEPT_SECONDS,
            ttl_dns_cache=ADDRESS_SECONDS,
            resolver=aiohttp.ThreadedResolver(),
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers={"User-Agent": f"manta/{__version__}", "Accept-Encoding": "identity"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    # What may be asked -------------------------------------------------------------------------------------------------

    async def hello(self, address: str, deadline_s: float) -> tuple[Hello, float]:
        """Who is at `address`, proven by its signature, and the round-trip time in seconds."""
        answered = await self._exchange("GET", "/v1/hello", address, "", b"", deadline_s, None)
        return _decoded(answered, address, Hello), answered.rtt_s

    async def have(
        self, address: str, node: str, blobs: list[tuple[str, int]], deadline_s: float
    ) -> tuple[Have, float]:
        """Which chunks of `blobs` it has, and the round-trip time in seconds. The bitmaps are not looked at here."""
        body = encode(HaveRequest(blobs=blobs))
        answered = await self._exchange("POST", "/v1/have", address, node, body, deadline_s, None)
        return _decoded(answered, address, Have), answered.rtt_s

    async def ask(
        self, address: str, node: str, what: str, body: bytes, deadline_s: float, fd: int | None = None
    ) -> Answered:
        """The answer to resolve, tree, location or report, whatever its status. One of 200 is written to `fd` where that is given, from
        its beginning; `fd` is empty where this raises."""
        return await self._exchange("POST", f"/v1/ask/{what}", address, node, body, deadline_s, fd)

    # One exchange ------------------------------------------------------------------------------------------------------

    async def _exchange(
        self, method: str, target: str, address: str, node: str, body: bytes, deadline_s: float, fd: int | None
    ) -> Answered:
        try:
            async with asyncio.timeout(deadline_s):
                try:
                    return await self._attempt(method, target, address, node, body, fd)
                except aiohttp.ClientConnectorError:
                    raise
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # A kept connection may be closed by the member in the instant in which it is used again. aiohttp tries a GET
                    # once more by itself; all that is asked for by POST may be asked for twice too.
                    if method == "GET":
                        raise
                    return await self._attempt(method, target, address, node, body, fd)
        except MantaError:
            _empty(fd)
            raise
        except Exception as error:
            # Whatever aiohttp makes of what a hostile member sends: it has many errors, and no common base.
            _empty(fd)
            raise _failure(error, address, deadline_s) from error

    async def _attempt(
        self, method: str, target: str, address: str, node: str, body: bytes, fd: int | None
    ) -> Answered:
        assert self._session is not None, "used outside of its context"
        named = parse_address(address)
        if named is None or named.path:
            raise Invalid(f"{address} is no HOST:PORT.")
        keys, nonce, began = self.keys, auth.new_nonce(), time.monotonic()
        request = auth.Request(method, target, body=body)
        header = auth.sign(request, self._me, node, keys, time.time(), nonce)
        url = URL.build(scheme="https" if self._tls else "http", host=named.host, port=named.port, path=target)
        async with self._session.request(
            method,
            url,
            data=body or None,
            headers={"Authorization": header},
            allow_redirects=False,
            ssl=self._tls or True,
            server_hostname=self._tls_name,
        ) as response:
            status = response.status
            taken, digest = await _read(response, address, fd if status == 200 else None)
            mac = response.headers.get(MAC, "")
        signer = node or _signer(taken)
        answer = auth.Answer(status, body_sha256=digest)
        genuine = not keys or auth.answer_is_genuine(answer, mac, nonce, signer, keys[0])
        if status == 401 or not genuine:
            raise _not_taken(status, mac, taken, address, node)
        return Answered(status, taken, signer, time.monotonic() - began)


async def _read(response: aiohttp.ClientResponse, address: str, fd: int | None) -> tuple[bytes, str]:
    """The body (b"" where it went to `fd`) and its sha256 in hex. Raises Invalid for one beyond its bound."""
    digest, taken, size = hashlib.sha256(), bytearray(), 0
    limit = ANSWER_BYTES_MAX if fd is None else TO_DESCRIPTOR_BYTES_MAX
    async for piece in response.content.iter_any():
        if size + len(piece) > limit:
            response.close()
            raise Invalid(f"{address} answered with more than {limit} bytes.")
        digest.update(piece)
        if fd is None:
            taken += piece
        else:
            _write(fd, piece, size)
        size += len(piece)
    return bytes(taken), digest.hexdigest()


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(fd, view, at)
            at, view = at + written, view[written:]
    except OSError as error:
        raise Unavailable(f"A member's answer cannot be stored: {error.strerror}.") from error


def _empty(fd: int | None) -> None:
    if fd is not None:
        os.ftruncate(fd, 0)


def _signer(body: bytes) -> str:
    """The node that a hello names; "" where it is none."""
    try:
        node = decode(body, Hello).node
    except Invalid:
        return ""
    return node if NODE_ID.fullmatch(node) else ""


def _decoded(answered: Answered, address: str, kind: type[_Told]) -> _Told:
    if answered.status != 200:
        raise Unavailable(f"{address} answered {answered.status}{_reason(answered.body)}.")
    try:
        told = decode(answered.body, kind)
    except Invalid as error:
        raise Invalid(f"{address} answered what is no {kind.__name__}.") from error
    if told.node != answered.node:
        raise Invalid(f"{address} names another node in its answer than signed it, or none.")
    return told


def _reason(body: bytes) -> str:
    """What a Refusal says, as the end of a sentence."""
    try:
        message = decode(body, Refusal).message
    except Invalid:
        message = ""
    return f": {printable(message, PROBLEM_CHARACTERS_MAX).rstrip('. ')}" if message else ""


def _not_taken(status: int, mac: str, body: bytes, address: str, node: str) -> MantaError:
    """Why an answer is not taken for that of `node`."""
    if status == 401:
        # Who is refused shares no key with the one who says it, so there is nothing to sign it with.
        return Denied(f"{address} refuses this node{_reason(body)}.")
    if mac and not node and status != 200:
        # Nothing but a hello names its signer.
        return Unavailable(f"{address} answered {status}{_reason(body)}.")
    if mac:
        return Denied(f"The signature of the answer of {address} is wrong: give all nodes the same swarm key.")
    if status == 429 or status >= 500:
        return Unavailable(f"{address} answered {status} before it looked who asks{_reason(body)}.")
    return Denied(
        f"{address} answered {status} without a signature: give all nodes the same swarm key, or see what listens there."
    )


def _failure(error: Exception, address: str, deadline_s: float) -> MantaError:
    match error:
        case aiohttp.ConnectionTimeoutError():
            return Unreachable(f"{address} took no connection for {CONNECT_SECONDS:g} s.")
        case TimeoutError():
            return Unavailable(f"{address} did not answer within {deadline_s:g} s.")
        case aiohttp.ClientSSLError():
            return Denied(
                f"{address} has no certificate for its name from swarm.tls_authorities ({_cause(error)}):"
                " see swarm.tls_certificate there, and swarm.tls_name here."
            )
        case aiohttp.ClientConnectorDNSError():
            return Unreachable(f"The name of {address} has no address.")
        case aiohttp.ClientConnectorError():
            return Unreachable(f"{address} takes no connection ({_cause(error)}).")
        case aiohttp.ClientConnectionError() | aiohttp.ClientPayloadError() | OSError():
            return Unreachable(f"{address} closed the connection before it had answered.")
        case _:
            return Invalid(f"{address} answered what is no HTTP ({type(error).__name__}).")


def _cause(error: Exception) -> str:
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error.__cause__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError):
        return cause.reason or type(cause).__name__
    # asyncio writes the address into strerror, which is in the sentence already.
    return os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else type(cause).__name__
