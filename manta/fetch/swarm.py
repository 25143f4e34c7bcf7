"""The other nodes as the daemon sees them: drives the peer process, and knows what it tells. Here and only here.

In the daemon's trio thread. The peer process (`manta.swarm.service`) finds and greets members, asks them what they have and serves them;
from whom a chunk comes is `manta.swarm.choice`'s to say, by way of `manta.fetch.gate`. Without it, or while it is being started
again, everything comes from the origin.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from manta.config import SwarmConfig, parse_address
from manta.errors import MantaError, Throttled, Unavailable
from manta.fetch.ledger import Ledger
from manta.fetch.peer_flight import Contact
from manta.fetch.process import Channel, ending, pass_on, spawn
from manta.fetch.sources import Provenance
from manta.fetch.transfer import Transfer
from manta.hub.origin import Location
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobId
from manta.swarm.choice import LIAR_SECONDS, Choice
from manta.swarm.ownership import owner, ranking
from manta.swarm.protocol import (
    ANSWER_BYTES_MAX,
    Exchange,
    LocationRequest,
    Refusal,
    Report,
    SharedLocation,
    decode,
    encode,
)
from manta.telemetry.events import Telemetry
from manta.wire.channel import Closed
from manta.wire.messages import Ready
from manta.wire.peering import (
    BODY_BYTES_MAX,
    Asked,
    Call,
    Called,
    Cancelled,
    Follow,
    FromPeerProcess,
    Gone,
    Listening,
    Member,
    Members,
    MemberState,
    OwnPauses,
    Pauses,
    Presence,
    Reply,
    Settings,
    Trouble,
    Uploaded,
    decode_from_peer_process,
)

log = logging.getLogger(__name__)

FOLLOWED_MAX = 256
"""Blobs of which it is known who has what: more than a node fetches at a time."""

FOLLOW_SECONDS = 10.0
"""How long a blob of which nothing is fetched any more stays followed."""

KEYS_SECONDS = 5.0
"""How often the key's file is looked at."""

CALL_SECONDS = 1.5
"""How long a member may take for an answer that we could get from the hub ourselves, in two round trips."""

ASKED_AT_ONCE = 4
"""Members asked at a time for what the hub, out of reach, does not tell: a tree may be tens of megabytes, from each."""

ASKED_SECONDS = 6.0
"""How long they are asked altogether. One that is well answers in milliseconds, and those that are not are not asked."""

TOLD_BYTES_MAX = 64 * 1024 * 1024
"""Of a member's answer: the tree of 250,000 files has a quarter of this when it is packed."""

PAUSE_SECONDS_MAX = 3600.0
"""Of a pause that a member tells of. The hub's own windows are 300 s."""

ANSWER_SECONDS = 5.0
"""How long a question other than a pull is worked on: who asked has gone elsewhere by then."""

SEND_SECONDS = 10.0
"""A peer process that has not read for this long hangs, and is replaced."""

UNHEARD_MAX, UNHEARD_SECONDS = 5, 30.0
"""A peer process that says nothing, though it was told something so often and for so long, hangs: it answers in milliseconds, and takes
seconds to start on a busy machine."""

WRONG_SECONDS = LIAR_SECONDS
"""How long is said that a member gave wrong bytes: as long as it is not asked."""

JOIN_SECONDS = 3.0
"""How long after its start a node waits to hear who the others are before it asks the origin. A process is up in about half a second and
members answer in milliseconds; nodes that start together would each read the origin for that long."""

RESTART_PAUSE_SECONDS = 0.2
RESTART_PAUSE_SECONDS_MAX = 10.0
STABLE_SECONDS = 30.0

ANSWERS_MAX = 512
"""Questions of members under way: the peer process bounds what it passes on to fewer."""


class Answer(msgspec.Struct, frozen=True):
    """What this node says to a member's question. `fd`, where it is not None, holds the body; it is closed when it has been sent."""

    status: int
    body: bytes = b""
    fd: int | None = None


Answerer = Callable[[Asked], Awaitable[Answer]]


class Listener(Protocol):
    """Who needs to know: the fetcher."""

    def members_changed(self) -> None: ...

    def presence_changed(self) -> None: ...

    def heed_pause(self, origin: str, seconds: float) -> None: ...

    def own_pauses(self) -> dict[str, float]: ...

    def origin_rate(self) -> float: ...

    def note_elsewhere(self, node: str, rate: float) -> None: ...


@dataclass(eq=False, slots=True)
class _Pending:
    """A call that waits for its answer."""

    answered: trio.Event = field(default_factory=trio.Event)
    answer: Called | None = None


class Swarm:
    """`keys` reads the shared keys; it raises what `manta.swarm.keys.read_keys` does. `node` is this node's id."""

    def __init__(
        self,
        config: SwarmConfig,
        node: str,
        cache_dir: str,
        keys: Callable[[], tuple[bytes, ...]],
        telemetry: Telemetry,
    ) -> None:
        self.node = node
        self.choice = Choice(node, config.downloads)
        self.ledger = Ledger()
        self.busy = 0
        """Upload slots in use."""
        self.address = config.listen
        """Where this node listens, HOST:PORT."""
        self.keys: tuple[bytes, ...] = keys()
        self._config = config
        self._cache_dir = cache_dir
        self._read_keys = keys
        self._telemetry = telemetry
        self._members: dict[str, Member] = {}
        self._pages: dict[int, list[Member]] = {}
        self._followed: OrderedDict[BlobId, tuple[int, float]] = OrderedDict()  # size, and when it was touched last
        self._follow_changed = trio.Event()
        self._troubles: dict[str, str] = {}
        self._wrong_until = float("-inf")
        self._calls: dict[int, _Pending] = {}
        self._numbers = itertools.count(1)
        self._answering: dict[int, trio.CancelScope] = {}
        self._joined = trio.Event()
        self._channel: Channel[FromPeerProcess] | None = None
        self._pid = 0
        self._started = time.time()
        self._unheard, self._heard_at = 0, 0.0
        """How often the peer process was told something since it last said anything, and when that was. Both, for a daemon that was
        stopped itself."""
        self._listener: Listener
        self._answerer: Answerer

    @property
    def processes(self) -> list[tuple[str, int]]:
        """Role and process id."""
        return [("peer", self._pid)] if self._pid else []

    @property
    def problem(self) -> str:
        """What does not work now, as sentences."""
        if trio.current_time() >= self._wrong_until:
            self._troubles.pop("wrong", None)
        return " ".join(filter(None, self._troubles.values()))

    @property
    def public_only(self) -> bool:
        """Whether other nodes are given and told only what everybody may have: so it is said, or anybody on this machine may ask."""
        return self._config.share == "public" or not self.keys

    @property
    def slots(self) -> int:
        """Upload slots."""
        return self._config.slots

    # Life ------------------------------------------------------------------------------------------------------------

    async def run(self, listener: Listener, answerer: Answerer) -> None:
        """Keeps the peer process running as long as it is not cancelled. `answerer` answers members' questions."""
        self._listener, self._answerer = listener, answerer
        self.choice.joining_until = trio.current_time() + JOIN_SECONDS
        pause = RESTART_PAUSE_SECONDS
        while True:
            began = trio.current_time()
            try:
                process, channel, stderr = spawn("manta.swarm", [], decode_from_peer_process)
            except OSError as e:
                self._troubles["process"] = (
                    f"No peer process can be started ({e.strerror}); it is tried again by itself."
                )
            else:
                self._channel, self._pid = channel, process.pid
                self._unheard, self._heard_at = 0, began
                try:
                    async with trio.open_nursery() as beside:
                        beside.start_soon(pass_on, stderr, "peer", process.pid)
                        beside.start_soon(self._keep_told)
                        beside.start_soon(self._keep_keys)
                        await self._listen(channel, beside)
                        process.kill()
                        beside.cancel_scope.cancel()
                finally:
                    self._channel, self._pid = None, 0
                    channel.close()
                    process.kill()
                    self._forget()
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(process.wait)
                self._telemetry.worker_ended("peer", process.pid)
                log.warning("the peer process (pid %d) ended with %s; starting another", process.pid, ending(process))
                self._troubles["process"] = "The peer process ended and is being started again; the log has why."
            if trio.current_time() - began > STABLE_SECONDS:
                pause = RESTART_PAUSE_SECONDS
            await trio.sleep(pause)
            pause = min(pause * 2, RESTART_PAUSE_SECONDS_MAX)

    def _forget(self) -> None:
        """Nobody tells about members any more: they are not asked."""
        for number, pending in self._calls.items():
            pending.answer = Called(number, 0, problem="the peer process ended")
            pending.answered.set()
        self._members.clear()
        self._pages.clear()
        self.busy = 0
        # What it said of itself went with it; the next one says what is still so.
        self._troubles = {kind: said for kind, said in self._troubles.items() if kind in {"keys", "wrong"}}
        self.choice.set_members(())
        self._listener.members_changed()

    def _settings(self) -> Settings:
        config, address = self._config, parse_address(self._config.listen)
        assert address is not None
        return Settings(
            0,
            self.node,
            self._cache_dir,
            address.host,
            address.port,
            config.peers,
            list(self.keys),
            config.tls_certificate,
            config.tls_key,
            config.tls_authorities,
            config.tls_name,
            config.slots,
            config.upload_rate,
            "public" if config.share == "public" else "all",
            self._started,
        )

    async def _keep_keys(self) -> None:
        """Takes over a key that was replaced."""
        while True:
            await trio.sleep(KEYS_SECONDS)
            try:
                keys = await trio.to_thread.run_sync(self._read_keys, abandon_on_cancel=True)
            except MantaError as e:
                self._troubles["keys"] = f"{e.message} The key read before stays in use."
                continue
            self._troubles.pop("keys", None)
            if keys != self.keys:
                self.keys = keys
                log.info("the swarm's key was replaced")
                await self._send(self._settings())

    async def _keep_told(self) -> None:
        """Tells which blobs are of interest, and which origins asked us for a pause."""
        await self._send(self._settings())
        told: list[tuple[str, int]] = []
        while True:
            self._follow_changed = trio.Event()
            now = trio.current_time()
            while self._followed and next(iter(self._followed.values()))[1] < now - FOLLOW_SECONDS:
                self._followed.popitem(last=False)
            wanted = sorted((str(blob), size) for blob, (size, _) in self._followed.items())
            if wanted != told:
                told = wanted
                self.choice.follow((blob for blob, _ in told), now)
                await self._send(Follow(0, told))
            await self._send(OwnPauses(0, self._listener.own_pauses(), self._listener.origin_rate()))
            self._unheard += 1
            if self._hangs(now) and self._channel is not None:
                log.error("the peer process (pid %d) does not answer; it is replaced", self._pid)
                self._channel.close()
                return
            with trio.move_on_after(1.0):
                await self._follow_changed.wait()

    def _hangs(self, now: float) -> bool:
        return self._unheard > UNHEARD_MAX and now > self._heard_at + UNHEARD_SECONDS

    async def _send(self, message: msgspec.Struct, fd: int | None = None) -> None:
        """Raises ValueError for what is larger than a message may be."""
        if (channel := self._channel) is not None:
            try:
                with trio.fail_after(SEND_SECONDS):
                    await channel.send(message, fd)  # type: ignore[arg-type]
            except Closed:
                return  # `_listen` sees the same end
            except trio.TooSlowError:
                log.error("the peer process (pid %d) does not read what it is told; it is replaced", self._pid)
                channel.close()

    async def _listen(self, channel: Channel[FromPeerProcess], beside: trio.Nursery) -> None:
        """Takes in what the process tells until its end of the socket is closed, or it turns out to be something else."""
        while True:
            try:
                message = await channel.receive()
            except Closed:
                return
            except (ValueError, RecursionError):
                log.error("the peer process (pid %d) sent what is no message; it is replaced", self._pid)
                return
            self._unheard, self._heard_at = 0, trio.current_time()
            match message:
                case Ready():
                    self._troubles.pop("process", None)
                case Listening():
                    self.address = message.address
                    self._troubles.pop("listen", None)
                    log.info("other nodes are served at %s", message.address)
                case Trouble():
                    if message.message and self._troubles.get(message.kind) != message.message:
                        log.warning("%s", message.message)
                    self._troubles[message.kind] = message.message
                case Members():
                    self._take_members(message)
                case Presence():
                    self.choice.presence(message.node, message.blob, message.have)
                    self._listener.presence_changed()
                case Pauses():
                    self._listener.note_elsewhere(message.node, message.origin_rate)
                    for origin, seconds in message.pauses.items():
                        self._listener.heed_pause(origin, seconds)
                case Asked():
                    beside.start_soon(self._answer, message)
                case Gone():
                    if (scope := self._answering.get(message.order)) is not None:
                        scope.cancel()
                case Uploaded():
                    self._take_uploaded(message)
                case Called():
                    if (pending := self._calls.get(message.order)) is not None:
                        pending.answer = message
                        pending.answered.set()

    def _take_members(self, page: Members) -> None:
        if page.first == 0:
            self._pages.clear()
        self._pages[page.first] = page.members
        members = [member for members in self._pages.values() for member in members]
        if len(members) < page.total:
            return  # more pages follow
        before = {node: member.state for node, member in self._members.items()}
        self._members = {}
        for member in sorted(members, key=lambda m: _STATES.index(m.state), reverse=True):
            self._members[member.node or member.address] = member  # a node that moved is where it is up
        for name, member in self._members.items():
            if before.get(name) != member.state:
                said = f": {member.problem}" if member.problem else ""
                log.info("node %s at %s is %s%s", member.node or "unknown", member.address, member.state, said)
        known = [member for member in self._members.values() if member.node]
        self.choice.set_members(m.node for m in known if m.state in {"up", "suspect"})
        self.choice.set_suspect(m.node for m in known if m.state == "suspect")
        if all(member.asked for member in members):
            self._join()
        self._listener.members_changed()

    def _join(self) -> None:
        self.choice.joining_until = float("-inf")
        self._joined.set()

    def _take_uploaded(self, message: Uploaded) -> None:
        self.busy = message.busy
        for node, count, chunks in message.given:
            if count < 0 or chunks < 0:
                continue  # counters only grow
            self._telemetry.given(node, count, chunks)
            self.ledger.to_peers += count
        self._telemetry.refused("busy", max(message.refused_busy, 0))
        self._telemetry.refused("auth", max(message.refused_auth, 0))

    async def _answer(self, asked: Asked) -> None:
        with trio.CancelScope() as scope:
            if len(self._answering) >= ANSWERS_MAX or asked.order in self._answering:
                refusal = Refusal(reason="busy", message="This node answers too many questions already.", retry_s=1.0)
                if self._channel is not None:
                    self._channel.tell_nowait(Reply(asked.order, 503, encode(refusal)))
                return
            self._answering[asked.order] = scope
            try:
                await self._say(asked, await self._answer_to(asked))
            finally:
                del self._answering[asked.order]

    async def _answer_to(self, asked: Asked) -> Answer:
        try:
            # A pull ends by the patience of who reads the file; see `Transfer.supply`.
            with trio.fail_after(ANSWER_SECONDS if asked.what != "pull" else math.inf):
                return await self._answerer(asked)
        except MantaError as e:
            return refused(e)
        except trio.TooSlowError:
            return refused(Unavailable(f"This node had no answer within {ANSWER_SECONDS:g} s."))
        except Exception:
            log.exception("a question of node %s could not be answered", asked.node)
            return refused(Unavailable("The node could not answer."))

    async def _say(self, asked: Asked, answer: Answer) -> None:
        try:
            if len(answer.body) > BODY_BYTES_MAX:
                log.error("an answer of %d bytes to %r does not fit into a message", len(answer.body), asked.what)
                answer = refused(Unavailable("The node's answer is too large."))
            await self._send(Reply(asked.order, answer.status, answer.body), answer.fd)
        finally:
            if answer.fd is not None:
                os.close(answer.fd)

    # Members ---------------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """All that are known, by address."""
        return sorted(self._members.values(), key=lambda member: member.address)

    def exchanges(self) -> list[Exchange]:
        """With whom what was exchanged."""
        states = {member.node: member.state for member in self._members.values()}
        return [
            Exchange(
                node=peer.node,
                bytes_in=peer.meter.total,
                chunks_in=peer.chunks,
                bytes_out=peer.given.total,
                chunks_out=peer.given_chunks,
                rate_in=rate_in,
                rate_out=rate_out,
                failures=peer.failures,
                state=states.get(peer.node, "gone"),
            )
            for peer, rate_in, rate_out in self._telemetry.peers()
        ]

    async def ask_report(self, node: str) -> Report:
        """What `node` has done. Raises Unavailable, and Invalid for an answer that is none."""
        # Of a node with many models it is larger than a message.
        fd = os.memfd_create("manta-report", os.MFD_CLOEXEC)
        try:
            answer = await self.call(node, "report", b"", fd=fd)
            size = os.fstat(fd).st_size
            if answer.status != 200 or size > ANSWER_BYTES_MAX:
                raise Unavailable(
                    f"Node {node} answered {answer.status} and {size} bytes when it was asked what it has done."
                )
            return decode(answer.body or os.pread(fd, size, 0), Report)
        finally:
            os.close(fd)

    def owner(self, key: str) -> str | None:
        """The member who asks the hub about `key` for all; None where that is this node."""
        now = trio.current_time()
        usable = [node for node in self.choice.members if self.choice.usable(node, now)]
        first = owner((*usable, self.node), key)
        return None if first == self.node else first

    async def call(
        self, node: str, what: str, body: bytes, *, fd: int | None = None, deadline_s: float = CALL_SECONDS
    ) -> Called:
        """Asks `node`; see `protocol`. A large answer is written to `fd`. Raises Unavailable where no answer comes in time."""
        if self._channel is None:
            raise Unavailable("The peer process is not running; it is being started.")
        if len(body) > BODY_BYTES_MAX:
            raise Unavailable(f"The question is {len(body)} bytes long, and a member takes {BODY_BYTES_MAX}.")
        number = next(self._numbers)
        pending = self._calls[number] = _Pending()
        try:
            with trio.move_on_after(deadline_s + 1.0):
                await self._send(Call(number, node, what, body, deadline_s), fd)
                await pending.answered.wait()
        finally:
            del self._calls[number]
            if pending.answer is None and self._channel is not None:
                self._channel.tell_nowait(Cancelled(number))
        answer = pending.answer
        if answer is None or not answer.status:
            why = answer.problem if answer is not None else f"it did not answer within {deadline_s:g} s"
            raise Unavailable(f"Node {node} could not be asked: {why.rstrip('.')}.")
        return answer

    async def ask_owner(self, what: str, key: str, body: bytes) -> bytes | None:
        """What the member says who asks the hub about `key` for all; None where that is this node, or it does not say.

        Raises Throttled where the hub asked that member for a pause.
        """
        with trio.move_on_at(self.choice.joining_until):
            await self._joined.wait()
        node = self.owner(key)
        return None if node is None else await self._told(node, what, body)

    async def ask_any(self, what: str, key: str, body: bytes) -> bytes | None:
        """What the first member says who knows; who most likely does, having asked the hub about `key`, is asked first."""
        now = trio.current_time()
        nodes = iter(ranking((n for n in self.choice.members if self.choice.usable(n, now)), key))
        found: list[bytes] = []

        async def ask(asking: trio.CancelScope) -> None:
            for node in nodes:
                with contextlib.suppress(Throttled):
                    if (told := await self._told(node, what, body)) is not None:
                        found.append(told)
                        asking.cancel()

        with trio.move_on_after(ASKED_SECONDS):
            async with trio.open_nursery() as nursery:
                for _ in range(ASKED_AT_ONCE):
                    nursery.start_soon(ask, nursery.cancel_scope)
        return found[0] if found else None

    async def _told(self, node: str, what: str, body: bytes) -> bytes | None:
        """The body of an answer, of any size."""
        fd = os.memfd_create("manta-answer", os.MFD_CLOEXEC)
        try:
            answer = await self.call(node, what, body, fd=fd)
            if (size := os.fstat(fd).st_size) > TOLD_BYTES_MAX:
                raise Unavailable(f"its answer has {size} bytes.")
            said = answer.body or os.pread(fd, size, 0)  # the descriptor takes refusals too
            if answer.status == 200:
                return said
            raise_throttled(node, said)
        except Throttled:
            raise
        except MantaError as e:
            log.debug("node %s does not answer %s: %s", node, what, e.message)
        finally:
            os.close(fd)
        return None

    # What the fetcher needs ------------------------------------------------------------------------------------------

    def contact(self, node: str) -> Contact | None:
        member = self._members.get(node)
        if member is None:
            return None
        config = self._config
        return Contact(
            node, member.address, self.node, list(self.keys), config.tls_authorities, config.tls_name, lz4=True
        )

    def touch(self, blob: BlobId, size: int) -> None:
        new = blob not in self._followed
        self._followed[blob] = size, trio.current_time()
        self._followed.move_to_end(blob)
        if new:
            if len(self._followed) > FOLLOWED_MAX:
                self._followed.popitem(last=False)
            # From now on nothing is fetched from the origin before it is known who has it, or for a second.
            self.choice.follow(map(str, self._followed), trio.current_time())
            self._follow_changed.set()

    def wrong(self, node: str, transfer: Transfer, chunk: int) -> None:
        member = self._members.get(node)
        self._troubles["wrong"] = (
            f"Node {node}{f' at {member.address}' if member else ''} gave wrong bytes for chunk {chunk} of {transfer.name}, and is not"
            " asked for ten minutes: check its disk and memory."
        )
        self._wrong_until = trio.current_time() + WRONG_SECONDS
        log.error("%s", self._troubles["wrong"])

    async def location(self, provenance: Provenance) -> Location | None:
        blob, entry = provenance.entry.blob, provenance.entry
        if blob is None or entry.size <= CHUNK_SIZE:
            return None  # of a single chunk: only its owner needs to know
        node = self.owner(f"location/{blob}")
        if node is None:
            return None
        request = LocationRequest(
            kind=provenance.repo.kind.value,
            repo=provenance.repo.name,
            commit=provenance.commit,
            path=entry.path,
            blob=str(blob),
            size=entry.size,
        )
        try:
            answer = await self.call(node, "location", encode(request), deadline_s=2 * CALL_SECONDS)
            if answer.status != 200:
                raise_throttled(node, answer.body)
                return None
            shared = decode(answer.body, SharedLocation)
        except Throttled:
            raise
        except MantaError as e:
            log.debug("node %s does not say where %s is: %s", node, provenance, e.message)
            return None
        now = time.time()
        return Location(
            shared.url,
            shared.headers,
            now + shared.expires_s if shared.expires_s else None,
            now + shared.refresh_s if shared.refresh_s else None,
            told=True,
        )


_STATES: tuple[MemberState, ...] = ("up", "suspect", "refused", "down")


def raise_throttled(node: str, body: bytes) -> None:
    """Raises Throttled where that is why `node` did not answer: the hub asked it for a pause. Raises Invalid for no refusal.

    The sentence is ours: what another node says may be anything.
    """
    refusal = decode(body, Refusal)
    if refusal.reason == "throttled":
        # Also of what is no number: trio's clock takes none.
        retry_s = min(refusal.retry_s, PAUSE_SECONDS_MAX) if refusal.retry_s > 0 else 0.0
        raise Throttled(f"The hub asked node {node}, which asks it for all, to wait {retry_s:.0f} s.", retry_s)


_MESSAGE_CHARACTERS_MAX = 1000


_REASONS = frozenset({"absent", "denied", "throttled", "unavailable", "corrupt", "no_space", "cache_broken", "invalid"})
_STATUS = {"absent": 404, "denied": 502, "throttled": 502, "invalid": 400}


def refused(error: MantaError) -> Answer:
    """An error as the answer to a member's question."""
    reason = error.code if error.code in _REASONS else "unavailable"
    retry_s = error.retry_after_s if isinstance(error, Throttled) else 0.0
    refusal = Refusal(reason=reason, message=error.message[:_MESSAGE_CHARACTERS_MAX], retry_s=retry_s)  # type: ignore[arg-type]
    return Answer(_STATUS.get(reason, 502), encode(refusal))
