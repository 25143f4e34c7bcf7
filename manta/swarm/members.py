"""The peer process's side of membership: asks the members what is to be known, and tells the daemon; here and only here. asyncio.

Who might be there comes from `discovery`, who is from `roster`, what is asked and what of it is news from `presence`, the asking is
`client`'s. This is the clockwork between them: greetings when they are due, a round of questions a second while blobs are followed, what
has changed to the daemon. Composed by `manta.swarm.service`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from manta.errors import Denied, Invalid, MantaError, Unavailable
from manta.swarm.client import MemberClient
from manta.swarm.discovery import discover
from manta.swarm.presence import Presences, pauses_of, rate_of
from manta.swarm.protocol import Hello
from manta.swarm.roster import Roster, pages
from manta.wire.messages import Message
from manta.wire.peering import (
    BODY_BYTES_MAX,
    Call,
    Called,
    Members,
    Pauses,
    Presence,
    Settings,
    Trouble,
)

MEMBERS_PER_MESSAGE = 256
ASKED = frozenset({"resolve", "tree", "location", "report"})


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and for how long. Seconds."""

    answer_s: float = 1.0
    """A member that has not answered a hello or a round's question by then is suspect."""
    round_s: float = 1.0
    round_s_min: float = 0.1
    """Between rounds, when new blobs are followed."""
    tell_s: float = 0.25
    """Between two accounts of who is a member. Per page of one where that is longer: thousands of members take 50 ms each page."""
    tell_page_s: float = 0.05
    retry_s: float = 5.0
    """Until certificates that could not be read are looked at again."""


RATES_MAX = 4096


class Membership:
    """Who the other nodes are. `tell` takes Members, Presence, Pauses and Trouble, in the loop that `run` runs in: the first Members when
    discovery has found somebody, or that there is nobody."""

    def __init__(self, settings: Settings, tell: Callable[[Message], None], pace: Pace | None = None) -> None:
        self._settings = settings
        self._tell = tell
        self._pace = pace or Pace()
        self._keys = list(settings.keys)
        self._client: MemberClient | None = None
        self._roster = Roster(settings.node, epoch=time.time() - time.monotonic())
        self._presences = Presences(settings.node)
        self._polling: set[str] = set()
        self._rates: dict[str, float] = {}  # what comes to members from the origin, as was told last
        self._troubles: dict[str, str] = {}
        self._twin = ""
        """The address of another daemon that has our id."""
        self._told = -1
        self._due = asyncio.Event()
        self._changed = asyncio.Event()
        self._new_blob = asyncio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                client = MemberClient(
                    self._settings.node, self._keys, self._settings.tls_authorities, self._settings.tls_name
                )
                break
            except Invalid as error:
                self._trouble("tls", error.message)
                await asyncio.sleep(self._pace.retry_s)
        self._trouble("tls", "")
        client.keys = tuple(self._keys)
        async with client:
            self._client = client
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(discover(self._settings.peers, self._found, partial(self._trouble, "discovery")))
                    tasks.create_task(self._greet())
                    tasks.create_task(self._ask_in_rounds())
                    tasks.create_task(self._tell_members())
            finally:
                self._client = None

    # What the daemon wants ---------------------------------------------------------------------------------------------

    def follow(self, blobs: list[tuple[str, int]]) -> None:
        """Ask the members for the chunks of these (id, size) from now on; at once where one is new. At most 256."""
        if self._presences.follow(blobs):
            self._new_blob.set()

    def set_keys(self, keys: list[bytes]) -> None:
        """The cluster's keys from now on, the first to sign with."""
        self._keys = list(keys)
        if self._client is not None:
            self._client.keys = tuple(keys)
        self._roster.look_at_refused(time.monotonic())
        self._due.set()

    def is_member(self, node: str) -> bool:
        """Whether `node` is known by an answer of its own, and not refused. It may be down."""
        return self._roster.is_member(node)

    def heard(self, node: str, host: str) -> None:
        """`node` asked this one something, from `host`."""
        self._roster.heard(node, host, time.monotonic())
        self._due.set()

    async def call(self, call: Call, fd: int | None) -> Called:
        """Asks one member; `fd` stays the caller's, who also bounds the calls under way. Whatever goes wrong is in the answer: status 0
        and a sentence."""
        address = self._roster.address_of(call.node)
        if self._client is None or address is None:
            return Called(call.order, 0, problem=f"{call.node} is no member.")
        if call.what not in ASKED:
            return Called(call.order, 0, problem=f"A member cannot be asked for {call.what!r}.")
        try:
            answered = await self._client.ask(address, call.node, call.what, call.body, call.deadline_s, fd)
        except MantaError as error:
            if type(error) is Unavailable:
                # What it was asked for may take it longer than this; whether it is well, a hello tells.
                self._roster.look(address, time.monotonic())
                self._due.set()
            else:
                self._went_wrong(address, error)
            return Called(call.order, 0, problem=error.message)
        self._roster.answered(address, call.node, None, time.monotonic())
        if len(answered.body) > BODY_BYTES_MAX:
            problem = f"{address} answered with {len(answered.body)} bytes, for which there is no descriptor."
            return Called(call.order, 0, problem=problem)
        return Called(call.order, answered.status, answered.body)

    # The clockwork -----------------------------------------------------------------------------------------------------

    def _found(self, addresses: frozenset[str]) -> None:
        left_out = self._roster.found(addresses, time.monotonic())
        many = f"{left_out} of {len(addresses)} addresses of members are more than Manta keeps, and left out."
        self._trouble("members", many if left_out else "")
        self._due.set()
        self._note()

    async def _greet(self) -> None:
        async with asyncio.TaskGroup() as greetings:  # bounded by the roster: so many a second, and a deadline for each
            while True:
                for address in self._roster.greet(time.monotonic()):
                    greetings.create_task(self._greet_one(address))
                await _wait(self._due, self._roster.wait_s(time.monotonic()))

    async def _greet_one(self, address: str) -> None:
        assert self._client is not None
        try:
            hello, rtt_s = await self._client.hello(address, self._pace.answer_s)
        except MantaError as error:
            self._went_wrong(address, error)
        else:
            self._note_twin(address, hello)
            self._roster.welcomed(address, hello.node, hello.version, rtt_s, time.monotonic())
            self._note()

    def _note_twin(self, address: str, hello: Hello) -> None:
        """Another daemon may have our id."""
        if hello.node == self._settings.node and hello.started != self._settings.started:
            self._twin = address
            self._trouble(
                "twin",
                f"{address} has the id of this node ({hello.node}): its cache directory is a copy of ours. The two get nothing from each"
                " other. Stop the daemon there, remove the file `node` from its cache directory and start it again.",
            )
        elif address == self._twin:
            self._trouble("twin", "")

    async def _ask_in_rounds(self) -> None:
        async with asyncio.TaskGroup() as questions:
            while True:
                if self._presences.following:
                    self._new_blob.clear()
                    up = self._roster.up()
                    for node in self._presences.whom(up):
                        if node not in self._polling:
                            self._polling.add(node)
                            questions.create_task(self._ask_one(node, up[node]))
                    await asyncio.sleep(self._pace.round_s_min)
                    await _wait(self._new_blob, self._pace.round_s - self._pace.round_s_min)
                else:
                    await self._new_blob.wait()

    async def _ask_one(self, node: str, address: str) -> None:
        assert self._client is not None
        try:
            for blobs in self._presences.requests():
                have, rtt_s = await self._client.have(address, node, blobs, self._pace.answer_s)
                for blob, bitmap in self._presences.news(node, blobs, have):
                    self._tell(Presence(0, node, blob, bitmap))
                pauses, rate = pauses_of(have), rate_of(have)
                if pauses or rate != self._rates.get(node, 0.0):
                    if len(self._rates) >= RATES_MAX:
                        self._rates.clear()  # each is told once more
                    self._rates[node] = rate
                    self._tell(Pauses(0, node, pauses, rate))
                self._roster.answered(address, node, rtt_s, time.monotonic())
        except MantaError as error:
            self._went_wrong(address, error)
        finally:
            self._polling.discard(node)

    def _went_wrong(self, address: str, error: MantaError) -> None:
        now = time.monotonic()
        if isinstance(error, Denied | Invalid):
            self._roster.refused(address, error.message, now)
        else:
            self._roster.failed(address, error.message, now)
        self._due.set()
        self._note()

    # What the daemon is told -------------------------------------------------------------------------------------------

    def _note(self) -> None:
        if self._roster.revision != self._told:
            self._changed.set()

    async def _tell_members(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._told = self._roster.revision
            members = self._roster.members()
            count = 0
            for first, page in pages(members, BODY_BYTES_MAX, MEMBERS_PER_MESSAGE):
                self._tell(Members(0, page, first, len(members)))
                count += 1
            await asyncio.sleep(max(self._pace.tell_s, count * self._pace.tell_page_s))

    def _trouble(self, kind: str, message: str) -> None:
        if self._troubles.get(kind, "") != message:
            self._troubles[kind] = message
            self._tell(Trouble(0, kind, message))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until `event` is set, which it is not afterwards, or for `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
