"""The peer server: what other nodes ask of this one over HTTP, and what they get, here and only here. One asyncio loop.

`manta.swarm.protocol` says what is asked and answered, `manta.swarm.auth` who may; each request is checked before anything else is done
with it, each answer to a member is signed. Chunks are given by `manta.swarm.chunks`; what else is asked for, the daemon knows. Nothing in
a request becomes part of a path but the digits of a blob's id. Used by `manta.swarm.service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from manta import __version__
from manta.errors import Denied, Invalid, MantaError, Unavailable
from manta.model.ids import parse_blob_id
from manta.swarm.auth import Answer, Request, Sender, Verifier, sign_answer
from manta.swarm.chunks import Chunks
from manta.swarm.door import Certificate, Connection, Door, bind
from manta.swarm.limits import Limits
from manta.swarm.page import Page
from manta.swarm.permits import Permits
from manta.swarm.protocol import (
    ANSWER_BYTES_MAX,
    BODY_BYTES_MAX,
    HAVE_BLOBS_MAX,
    MAC,
    TARGET_BYTES_MAX,
    Have,
    HaveRequest,
    Hello,
    LocationRequest,
    Refusal,
    ResolveRequest,
    TreeRequest,
    decode,
    encode,
)
from manta.swarm.pulls import Pulls
from manta.swarm.questions import Answered, Crowded, Questions, refused
from manta.swarm.shelf import Shelf
from manta.swarm.slots import Slots
from manta.swarm.uploads import Allowance, Upload
from manta.wire.link import in_thread
from manta.wire.messages import Message
from manta.wire.peering import BODY_BYTES_MAX as ASKED_BYTES_MAX
from manta.wire.peering import Listening, Settings, Trouble, Uploaded

REPORT_SECONDS = 1.0
LISTEN_PAUSE_SECONDS = 1.0
LISTEN_PAUSE_SECONDS_MAX = 30.0
CERTIFICATE_SECONDS = 30.0
"""How often the certificate's files are looked at."""

LONG_BYTES = 64 * 1024
"""An answer from this length on is sent as a chunk is, with an eye on who takes it."""

HASH_BYTES = 1024 * 1024

_MEMBERS = "/v1/"
_ASKED: dict[str, type[Any] | None] = {
    "resolve": ResolveRequest,
    "tree": TreeRequest,
    "location": LocationRequest,
    "report": None,
}
"""The questions that the daemon answers, and their bodies."""


class Acquaintances(Protocol):
    """What is needed of the membership."""

    def is_member(self, node: str) -> bool:
        """Whether it is worth naming to others."""
        ...

    def heard(self, node: str, host: str) -> None:
        """`node` asked this one something, from `host`."""
        ...


class Server:
    """Answers as the node of `settings`. `tell` reaches the daemon; `members` knows the other nodes."""

    def __init__(
        self,
        settings: Settings,
        questions: Questions,
        tell: Callable[[Message], None],
        members: Acquaintances,
        limits: Limits,
    ) -> None:
        self._members = members
        self._settings = settings
        self._tell = tell
        self._limits = limits
        self._verifier = Verifier(settings.node, settings.keys)
        self._slots = Slots(settings.slots)
        self._allowance = Allowance(settings.upload_rate)
        self._questions = questions
        self._pulls = Pulls(questions, limits)
        self._permits = Permits(questions, limits, all_of_them=self._all_of_them)
        self._shelf = Shelf(Path(settings.cache_dir))
        self._chunks = Chunks(
            settings.node,
            self._shelf,
            self._slots,
            self._pulls,
            self._permits,
            self._allowance,
            members.is_member,
            limits,
        )
        self._page = Page(questions)
        self._door = Door(self._answer, limits)
        self._rekeyed = asyncio.Event()
        self._pauses: dict[str, float] = {}
        self._origin_rate = 0.0
        self._troubled: set[str] = set()
        self._refused_auth = 0
        self._busy_told = 0

    # Life ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_listening())
            group.create_task(self._keep_reporting())

    def set_keys(self, keys: list[bytes]) -> None:
        """From now on; without any, only loopback is listened at."""
        self._verifier.keys = tuple(keys)
        self._permits.all_of_them = self._all_of_them
        self._rekeyed.set()

    def set_origins(self, pauses: dict[str, float], rate: float) -> None:
        """The origins that asked this node for a pause, and for how many seconds from now; and the bytes per second that come from them."""
        self._origin_rate = rate
        now = asyncio.get_running_loop().time()
        self._pauses = {origin: now + seconds for origin, seconds in pauses.items()}

    @property
    def _all_of_them(self) -> bool:
        return self._settings.share == "all" and bool(self._verifier.keys)

    async def _keep_listening(self) -> None:
        pause = LISTEN_PAUSE_SECONDS
        while True:
            self._rekeyed.clear()
            try:
                certificate = self._certificate()
                beyond = bool(self._verifier.keys)
                sockets = await bind(self._settings.host, self._settings.port, beyond_loopback=beyond)
            except MantaError as error:
                self._trouble("listen", error.message)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._rekeyed.wait()
                pause = min(pause * 2, LISTEN_PAUSE_SECONDS_MAX)
                continue
            pause = LISTEN_PAUSE_SECONDS
            self._trouble("listen", "")
            host, port = self._settings.host, sockets[0].getsockname()[1]
            self._tell(Listening(0, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
            serving = asyncio.create_task(self._door.serve(sockets, certificate.context if certificate else None))
            try:
                await self._until_rekeyed(serving, certificate, keyed=beyond)
            finally:
                serving.cancel()
                await asyncio.wait({serving})

    async def _until_rekeyed(
        self, serving: asyncio.Task[None], certificate: Certificate | None, *, keyed: bool
    ) -> None:
        """Until what is listened at must be thought over: there were keys and are none, or none and are some."""
        while keyed is bool(self._verifier.keys):
            self._rekeyed.clear()
            rekeyed = asyncio.ensure_future(self._rekeyed.wait())
            try:
                await asyncio.wait({rekeyed, serving}, timeout=CERTIFICATE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                rekeyed.cancel()
            if serving.done():
                serving.result()
            if certificate is not None:
                try:
                    certificate.refresh()
                    self._trouble("certificate", "")
                except Unavailable as error:
                    self._trouble("certificate", error.message)

    def _certificate(self) -> Certificate | None:
        """Raises Unavailable."""
        if not self._settings.tls_certificate:
            return None
        return Certificate(Path(self._settings.tls_certificate), Path(self._settings.tls_key))

    def _trouble(self, kind: str, message: str) -> None:
        if message or kind in self._troubled:
            self._tell(Trouble(0, kind, message))
        if message:
            self._troubled.add(kind)
        else:
            self._troubled.discard(kind)

    async def _keep_reporting(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._pulls.sweep()
            given, refused_busy = self._chunks.tally.take()
            refused_auth, self._refused_auth = self._refused_auth, 0
            busy = self._slots.busy
            if given or refused_busy or refused_auth or busy != self._busy_told:
                self._busy_told = busy
                self._tell(Uploaded(0, given, busy, refused_busy, refused_auth))

    # Requests --------------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises ConnectionError where the connection is of no use any more."""
        with self._door.answering(request) as connection:
            try:
                if request.raw_path.startswith(_MEMBERS):
                    return await self._answer_member(request, connection)
                return await self._finish(request, await self._page.answer(request, self._verifier.keys))
            except ConnectionError:
                raise
            except Exception as error:
                # A fault of ours: one asker is cut off, the others go on, and the daemon's log has it.
                print("".join(traceback.format_exception(error)), file=sys.stderr)
                raise ConnectionAbortedError("the answer failed") from error

    async def _answer_member(self, request: web.BaseRequest, connection: Connection) -> web.StreamResponse:
        sender: Sender | None = None
        try:
            body = await self._body(request)
            sender = self._sender(request, body)
            connection.known = True
            outcome = await self._route(request, sender, body)
        except MantaError as error:
            outcome = _refusal(error)
        return outcome if isinstance(outcome, web.StreamResponse) else await self._say(request, sender, outcome)

    async def _body(self, request: web.BaseRequest) -> bytes:
        """Raises Invalid for a body that is too long or does not come."""
        body = b""
        try:
            async with asyncio.timeout(self._limits.body_s):
                while piece := await request.content.readany():
                    body += piece
                    if len(body) > BODY_BYTES_MAX:
                        raise Invalid(f"The body is longer than {BODY_BYTES_MAX} bytes.")
        except TimeoutError:
            raise Invalid(f"The body did not come within {self._limits.body_s:g} s.") from None
        except web.RequestPayloadError as error:
            raise Invalid("The body is malformed.") from error
        return body

    def _sender(self, request: web.BaseRequest, body: bytes) -> Sender:
        """Raises Denied."""
        signed = Request(request.method, request.raw_path, request.headers.get("range", ""), body)
        try:
            return self._verifier.check(request.headers.get("authorization", ""), signed, time.time())
        except Denied:
            self._refused_auth += 1
            raise

    async def _route(self, request: web.BaseRequest, sender: Sender, body: bytes) -> web.StreamResponse | Answered:
        """Raises MantaError."""
        if len(request.raw_path) > TARGET_BYTES_MAX:
            raise Invalid("The path is too long.")
        what = f"{request.method} {request.raw_path}"
        if not what.startswith("GET /v1/blobs/"):
            self._members.heard(sender.node, request.remote or "")
        if what.startswith("GET /v1/blobs/"):
            return await self._chunks.answer(request, sender)
        if what == "GET /v1/hello":
            return Answered(
                200, encode(Hello(node=self._settings.node, version=__version__, started=self._settings.started))
            )
        if what == "POST /v1/have":
            return Answered(200, encode(self._have(decode(body, HaveRequest))))
        kind = what.removeprefix("POST /v1/ask/")
        if kind in _ASKED:
            return await self._ask(kind, sender, body)
        raise Invalid("No node is asked that.")

    def _have(self, asked: HaveRequest) -> Have:
        """Raises Invalid."""
        if len(asked.blobs) > HAVE_BLOBS_MAX:
            raise Invalid(f"At most {HAVE_BLOBS_MAX} blobs are asked for at a time.")
        have: dict[str, bytes] = {}
        room = ANSWER_BYTES_MAX // 2
        for name, size in asked.blobs:
            blob = parse_blob_id(name)
            bits = self._shelf.bitmap(blob, size) if size >= 0 and self._permits.known(blob) else None
            if bits is not None and len(bits) <= room:
                have[name] = bits
                room -= len(bits)
        now = asyncio.get_running_loop().time()
        return Have(
            node=self._settings.node,
            blobs=have,
            pauses={origin: until - now for origin, until in self._pauses.items() if until > now},
            slots=self._slots.limit,
            busy=self._slots.busy,
            origin_rate=self._origin_rate,
        )

    async def _ask(self, kind: str, sender: Sender, body: bytes) -> Answered:
        """Raises Invalid and Unavailable."""
        expected = _ASKED[kind]
        if expected is not None:
            decode(body, expected)
        if len(body) > ASKED_BYTES_MAX:
            raise Invalid("The question is too long.")
        return await self._questions.ask(sender.node, kind, body, self._limits.question_s)

    # Answers ---------------------------------------------------------------------------------------------------------

    async def _say(self, request: web.BaseRequest, sender: Sender | None, answered: Answered) -> web.StreamResponse:
        """`sender` None: who is not known gets an answer without a signature. Raises ConnectionError, and where the daemon's file with the
        body is none, OSError and Unavailable."""
        try:
            size, said = len(answered.body), Answer(answered.status, body=answered.body)
            if answered.file is not None:
                size = answered.file_bytes
                said = Answer(answered.status, body_sha256=await in_thread(_sha256, answered.file, size))
            headers = {"server": "manta", "content-type": "application/octet-stream"}
            if sender is not None and (mac := sign_answer(said, sender, self._settings.node)):
                headers[MAC] = mac
            if answered.file is None and size < LONG_BYTES:
                short = web.Response(status=answered.status, body=answered.body, headers=headers)
                return await self._finish(request, short)
            response = web.StreamResponse(status=answered.status, headers=headers)
            response.content_length = size
            await response.prepare(request)
            upload = Upload(request, self._allowance, self._limits)
            if answered.file is not None:
                await upload.file(answered.file, 0, size)
            else:
                await upload.memory(answered.body)
            await response.write_eof()
            return response
        finally:
            answered.close()

    async def _finish(self, request: web.BaseRequest, response: web.Response) -> web.Response:
        """Sends a short answer. Raises ConnectionError where it is not taken."""
        try:
            async with asyncio.timeout(self._limits.answer_s):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionAbortedError("the answer was not taken") from None
        return response


def _refusal(error: MantaError) -> Answered:
    match error:
        case Denied():
            return refused(401, Refusal(reason="unauthorized", message=error.message))
        case Invalid():
            return refused(400, Refusal(reason="invalid", message=error.message))
        case Crowded():
            return refused(503, Refusal(reason="busy", message=error.message, retry_s=1.0))
    return refused(503, Refusal(reason="unavailable", message=error.message, retry_s=1.0))


def _sha256(fd: int, size: int) -> str:
    """SLOW: of the whole file, in hex. Raises OSError."""
    digest = hashlib.sha256()
    for at in range(0, size, HASH_BYTES):
        digest.update(os.pread(fd, HASH_BYTES, at))
    return digest.hexdigest()
