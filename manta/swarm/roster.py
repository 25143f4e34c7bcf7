"""Which nodes are members and how each is, decided from what discovery names and what was heard; here and only here. Pure.

Discovery names addresses; a node is known by the id that it signs its hello with. So what is kept is kept per address (a contact), and a
member is a node with the best of its contacts: an address may come to belong to another node, a node may have two addresses or get a new
one. Who drives this (`manta.swarm.members`) greets whom `greet` names, and says how it went.

A contact that does not answer is suspect at once, and down after DOWN_AFTER times. It is tried again after 1 s, 2 s, 4 s and so on to 30 s.
One whose answer cannot be taken, or that does not take our requests, is refused; it is tried again in the same way, and since
a hello may go well where everything else is refused, what it did is forgotten only after FORGIVE_SECONDS without another.
An address that discovery does not name any more goes when it does not answer either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from manta.swarm.ownership import score
from manta.wire.peering import Member, MemberState

GREET_SECONDS = 5.0
"""A member that nothing was heard of for this long is greeted."""

GREETS_PER_SECOND = 50.0
"""At most; a hello costs both ends about a millisecond of CPU. With more than 250 members each is greeted less often."""

GREETS_AT_ONCE = 10
"""What may have been saved up of these."""

DOWN_AFTER = 3
BACKOFF_SECONDS_MIN = 1.0
BACKOFF_SECONDS_MAX = 30.0

FIRST_TRIES_SHORTER = 4.0
"""By what an address is tried sooner before it is down for the first time, after 0.25 s and 0.5 s: nodes that start together find each
other by then, and a node that starts need not wait long to hear who is not there."""

FORGIVE_SECONDS = 60.0

OWN_SECONDS = 60.0
"""How often our own address is greeted: it may be another node's by now."""

ADDRESSES_MAX = 16_384
"""Addresses that are kept, about 600 bytes each. Greeting them all once takes 5 minutes."""

PROBLEM_CHARACTERS_MAX = 200
VERSION_CHARACTERS_MAX = 32


def backoff_s(me: str, address: str, attempt: int) -> float:
    """How long to leave an address alone after `attempt` (1 and more) failures in a row.

    A quarter more or less than doubling, by a hash: not all nodes come back to a node at the same instant, and a test sees it happen again.
    """
    doubled = BACKOFF_SECONDS_MIN * 2.0 ** min(attempt - 1, 16)
    jittered = min(doubled, BACKOFF_SECONDS_MAX) * (0.75 + 0.5 * score(me, f"{address}#{attempt}") / 2**64)
    return min(max(jittered, BACKOFF_SECONDS_MIN), BACKOFF_SECONDS_MAX)


def printable(text: str, characters_max: int) -> str:
    """What another node says, fit for a log and a terminal: one line, no control characters."""
    return "".join(c if c.isprintable() else " " for c in text[:characters_max])


@dataclass(slots=True, eq=False)
class _Contact:
    address: str
    since: float
    named: bool = True
    node: str = ""
    state: MemberState = "suspect"
    problem: str = ""
    version: str = ""
    rtt_s: float = 0.0
    failures: int = 0
    """In a row."""
    strikes: int = 0
    struck: float = 0.0
    due: float = 0.0
    """When to greet it."""
    slot: float = 0.0
    """Its place among those to greet: `due`, or earlier."""


_BEST_FIRST: dict[MemberState, int] = {"up": 0, "suspect": 1, "down": 2, "refused": 3}


class Roster:
    """All members but `me`. Times are those of one monotonic clock; `epoch` is what to add for seconds since the epoch."""

    def __init__(self, me: str, epoch: float = 0.0) -> None:
        self.me = me
        self.revision = 0
        """Grows whenever `members` would differ in more than round-trip times."""
        self._epoch = epoch
        self._contacts: dict[str, _Contact] = {}
        self._nodes: dict[str, list[_Contact]] = {}
        """The contacts of each node id; the one in use is first."""
        self._line: list[tuple[float, str]] = []
        """Whom to greet when. An entry that is not its contact's slot is void."""
        self._allowance = float(GREETS_AT_ONCE)
        self._allowance_at = 0.0

    # Who might be there ------------------------------------------------------------------------------------------------

    def found(self, addresses: frozenset[str], now: float) -> int:
        """Discovery names these now. Returns how many of them were left out, being beyond ADDRESSES_MAX."""
        for contact in [c for c in self._contacts.values() if c.named and c.address not in addresses]:
            contact.named = False
            if contact.state == "up":
                self._set_due(contact, now)  # does it answer?
            else:
                self._drop(contact)
        fresh = []
        for address in addresses:
            known = self._contacts.get(address)
            if known is None:
                fresh.append(address)
            else:
                known.named = True
        # Nodes that start together are told the same list: each begins elsewhere in it.
        fresh.sort(key=lambda address: score(self.me, address))
        taken = fresh[: max(0, ADDRESSES_MAX - len(self._contacts))]
        for place, address in enumerate(taken):
            contact = _Contact(address, now, problem=f"{address} was not asked yet.", slot=float("inf"))
            self._contacts[address] = contact
            self._set_due(contact, now + place / GREETS_PER_SECOND / 2)
            self.revision += 1
        return len(fresh) - len(taken)

    # Whom to greet -----------------------------------------------------------------------------------------------------

    def greet(self, now: float) -> list[str]:
        """The addresses to greet now. Each counts as greeted: say how it went, or it comes again after GREET_SECONDS."""
        self._allow(now)
        chosen = []
        while self._line and self._line[0][0] <= now and self._allowance >= 1.0:
            slot, address = heappop(self._line)
            contact = self._contacts.get(address)
            if contact is None or slot != contact.slot:
                continue
            contact.slot = float("inf")
            if contact.due > now:
                self._set_due(contact, contact.due)
                continue
            self._allowance -= 1.0
            self._set_due(contact, now + GREET_SECONDS)
            chosen.append(address)
        return chosen

    def wait_s(self, now: float) -> float:
        """How long until `greet` may name somebody; at most GREET_SECONDS."""
        self._allow(now)
        until_due = self._line[0][0] - now if self._line else GREET_SECONDS
        until_allowed = (1.0 - self._allowance) / GREETS_PER_SECOND
        return min(max(until_due, until_allowed, 0.0), GREET_SECONDS)

    def look(self, address: str, now: float) -> None:
        """There is doubt about it: greet it soon."""
        if contact := self._contacts.get(address):
            self._set_due(contact, now)

    def heard(self, node: str, host: str, now: float) -> None:
        """`node` asked us something, from `host`: if it is not known to be up, what is at that host is greeted soon. Nodes that start one
        after the other would find the later ones only when their pauses are over."""
        if any(contact.state == "up" for contact in self._nodes.get(node, ())):
            return
        for contact in self._contacts.values():
            if contact.state in {"suspect", "down"} and contact.address.rpartition(":")[0].strip("[]") == host:
                self._set_due(contact, now)

    def look_at_refused(self, now: float) -> None:
        """The keys are others: those that were refused may be members now."""
        for contact in self._contacts.values():
            if contact.state == "refused":
                contact.strikes = 0
                self._set_due(contact, now)

    def _allow(self, now: float) -> None:
        earned = max(0.0, now - self._allowance_at) * GREETS_PER_SECOND
        self._allowance = min(float(GREETS_AT_ONCE), self._allowance + earned)
        self._allowance_at = now

    def _set_due(self, contact: _Contact, due: float) -> None:
        contact.due = due
        if due < contact.slot:
            contact.slot = due
            heappush(self._line, (due, contact.address))

    # How it went -------------------------------------------------------------------------------------------------------

    def welcomed(self, address: str, node: str, version: str, rtt_s: float, now: float) -> None:
        """`node` answered a hello at `address`."""
        contact = self._contacts.get(address)
        if contact is None:
            return
        version = printable(version, VERSION_CHARACTERS_MAX)
        if (contact.node, contact.state, contact.version) != (node, "up", version):
            contact.since = now if (contact.node, contact.state) != (node, "up") else contact.since
            self.revision += 1
        if contact.node != node:
            self._leave(contact)
            contact.node = node
            self._nodes.setdefault(node, []).append(contact)
        if now - contact.struck > FORGIVE_SECONDS:
            contact.strikes = 0
        contact.state, contact.problem, contact.version = "up", "", version
        self._well(contact, rtt_s, now)
        self._choose(node)

    def answered(self, address: str, node: str, rtt_s: float | None, now: float) -> None:
        """`node`, which is up at that address, answered something else; `rtt_s` is None where the answer took it work."""
        contact = self._contacts.get(address)
        if contact is not None and contact.node == node and contact.state == "up":
            self._well(contact, contact.rtt_s if rtt_s is None else rtt_s, now)

    def failed(self, address: str, problem: str, now: float) -> None:
        """It did not answer in time, or not at all. `problem` is a sentence."""
        contact = self._contacts.get(address)
        if contact is None:
            return
        contact.failures += 1
        state: MemberState = "suspect" if contact.failures < DOWN_AFTER else "down"
        wait_s = backoff_s(self.me, address, contact.failures)
        if not contact.node and state == "suspect":
            wait_s /= FIRST_TRIES_SHORTER
        self._worse(contact, state, problem, now, wait_s)

    def refused(self, address: str, problem: str, now: float) -> None:
        """It does not take our requests, or what it answers cannot be taken. `problem` is a sentence."""
        contact = self._contacts.get(address)
        if contact is None:
            return
        # A member until now: its address may have been given to another node, so who is there is asked at once.
        moved = contact.state == "up" and contact.strikes == 0
        contact.strikes += 1
        contact.struck = now
        wait_s = 0.0 if moved else backoff_s(self.me, address, contact.strikes)
        self._worse(contact, "refused", problem, now, wait_s)

    def _well(self, contact: _Contact, rtt_s: float, now: float) -> None:
        contact.failures = 0
        contact.rtt_s = rtt_s
        pause_s = OWN_SECONDS if contact.node == self.me else self._greet_seconds()
        self._set_due(contact, now + pause_s * (0.9 + 0.2 * score(self.me, contact.address) / 2**64))

    def _greet_seconds(self) -> float:
        return max(GREET_SECONDS, 1.2 * len(self._contacts) / GREETS_PER_SECOND)

    def _worse(self, contact: _Contact, state: MemberState, problem: str, now: float, wait_s: float) -> None:
        if not contact.named:
            self._drop(contact)
            return
        problem = printable(problem, PROBLEM_CHARACTERS_MAX)
        if (contact.state, contact.problem) != (state, problem):
            contact.since = now if contact.state != state else contact.since
            contact.state, contact.problem = state, problem
            self.revision += 1
        self._set_due(contact, now + wait_s)
        self._choose(contact.node)

    def _drop(self, contact: _Contact) -> None:
        self._leave(contact)
        del self._contacts[contact.address]
        self.revision += 1

    def _leave(self, contact: _Contact) -> None:
        """Its address is not its node's any more."""
        contacts = self._nodes.get(contact.node, [])
        if contact in contacts:
            contacts.remove(contact)
        if not contacts:
            self._nodes.pop(contact.node, None)
        else:
            self._choose(contact.node)

    def _choose(self, node: str) -> None:
        """Puts the node's best contact first: up, named. Among equals the one in use stays (the sort is stable)."""
        if len(contacts := self._nodes.get(node, [])) > 1:
            before = contacts[0]
            contacts.sort(key=lambda contact: (_BEST_FIRST[contact.state], not contact.named))
            self.revision += contacts[0] is not before

    # Who is ------------------------------------------------------------------------------------------------------------

    def members(self) -> list[Member]:
        """All of them, in the order of their ids; addresses where no node answered yet come first."""
        shown = [*self._in_use(), *(contact for contact in self._contacts.values() if not contact.node)]
        shown.sort(key=lambda contact: (contact.node, contact.address))
        return [
            Member(
                c.node,
                c.address,
                c.state,
                c.since + self._epoch,
                c.rtt_s,
                c.version,
                c.problem,
                bool(c.node or c.failures or c.strikes),
            )
            for c in shown
        ]

    def up(self) -> dict[str, str]:
        """The addresses of the members that are up, by node."""
        return {contact.node: contact.address for contact in self._in_use() if contact.state == "up"}

    def address_of(self, node: str) -> str | None:
        """Where to ask a member, in whatever state; None for a node that is none."""
        contacts = self._nodes.get(node) if node != self.me else None
        return contacts[0].address if contacts else None

    def is_member(self, node: str) -> bool:
        """Whether it has answered as itself at an address that is still a member's, and is not refused. It may be down."""
        contacts = self._nodes.get(node) if node != self.me else None
        return contacts is not None and contacts[0].state != "refused"

    def _in_use(self) -> Iterator[_Contact]:
        return (contacts[0] for node, contacts in self._nodes.items() if node != self.me)


def pages(members: list[Member], bytes_max: int, members_max: int) -> Iterable[tuple[int, list[Member]]]:
    """`members` in pages of at most `bytes_max` when encoded, each with the number of its first one; an empty page where there are none."""
    first, page, size = 0, list[Member](), 0
    for at, member in enumerate(members):
        texts = (member.node, member.address, member.state, member.version, member.problem)
        weight = sum(len(text.encode()) + 3 for text in texts) + 20  # two numbers of 9 bytes
        if page and (size + weight > bytes_max or len(page) >= members_max):
            yield first, page
            first, page, size = at, [], 0
        page.append(member)
        size += weight
    yield first, page
