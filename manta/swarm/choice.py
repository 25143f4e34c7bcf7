"""Where a missing chunk comes from: another node that has it, its owner, or the origin. Here and only here. Pure: the clock is an argument.

The order is: a member known to have it; else its owner, who fetches it from the origin on our behalf; else the second owner; else the
origin. Where we are the owner we go there ourselves, and first ask the member who was that before us if we do not know what it has.
What is known of a member (whether it has a chunk, is busy, fails, how fast it is) is only ever a hint: each answer corrects it.

Driven by `manta.fetch.gate` and by the simulator, with the same calls:

    choice.set_members(nodes)                    who may be asked at all
    choice.presence(node, blob, have)            what a member has
    choice.choose(...)                           then, for a Peer: begin, and one of got | busy | lacks | unable | failed | lied
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

from manta.swarm.ownership import owned, owners, score

PER_MEMBER = 4
"""Chunks that one member is asked for at a time: half of its slots. With a single other node they must fill the link."""

PULLS_PER_MEMBER = 1
PULLS = 4
"""Chunks that one member, and all of them, are asked to fetch on our behalf at a time; readers' go beside, as many again. They take as long
as the origin lets them, so they do not count among those that are on the way: they would keep from coming what is there already. In
background more are of no use: who starts with us fetches what it owns by itself."""

OWNERS = 2
"""Members that are asked, one after the other, to fetch from the origin on our behalf before we do it ourselves."""

AVOID_SECONDS = 1.0
AVOID_SECONDS_MAX = 30.0
"""How long a member that failed is not asked; twice as long with each failure in a row."""

RECOVERY_SECONDS = 3.0
"""How long the owner of a chunk that nobody waits for may fail to be reached before another node fetches it in its place."""

LIAR_SECONDS = 600.0
"""How long a member that sent wrong bytes is not asked: it has a broken disk or memory, or is hostile."""

LACKING_SECONDS = 2.0
"""How long a member that did not have a chunk is not asked for it again."""

WITHHELD_SECONDS = 60.0
"""How long a member that gives a blob to nobody is not asked for it again: a private one, where only public ones are shared."""

UNABLE_SECONDS = 5.0
"""How long an owner that could not fetch a chunk is not asked for it again."""

SPARE_SECONDS = 0.5
SPARE_SECONDS_MAX = 30.0
"""How long such an owner is not asked for anything in advance where the origin is out of our reach too: with the origin away, all nodes
would ask each other for every chunk that nobody has, again and again. Twice as long each time."""

SOON_SECONDS = 4.0
"""Where the origin is out of reach, a member that has a chunk and failed is waited for, if it will be asked again within this."""

BUSY_SECONDS = 0.2
"""The pause where a member has no slot and does not say for how long: a chunk takes 0.07 s at 1 Gbit/s, and eight share the link."""

BUSY_SECONDS_MIN = 0.05
BUSY_SECONDS_MAX = 2.0
"""What a member may say: one that says less would be asked as fast as it answers, one that says more would keep a chunk from coming."""

CROWDED_SECONDS = 15.0
"""How long a reader's chunk waits for members that have it and no time, before it comes from the origin: well within a reader's patience.
Eight slots that share 100 Mbit/s go round in 5 s."""

_ASKED_SECONDS = 5.0
"""A reader's chunk that was not asked about for this long is not waited for any more."""

SETTLE_SECONDS = 1.0
"""How long a new blob's chunks are not fetched from the origin while it is not known yet who has them. Members answer in milliseconds."""

CHUNKS_MAX = 8192
"""Chunks of which hints and refusals are kept."""

GONE_MAX = 1024
"""Members that left of which it is remembered how they were."""

_LEARNING = 0.3
_LEARNING_BYTES_MIN = 256 * 1024
"""A transfer of less says nothing of a link: a file of 1 KB in 1 ms would look like 1 MB/s."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Ask member `node`; with `pull` it may fetch the chunk from the origin."""

    node: str
    pull: bool


@dataclass(frozen=True, slots=True)
class FromOrigin:
    """Ask the origin."""


@dataclass(frozen=True, slots=True)
class NotNow:
    """Somebody has it or will, and has no time for us: ask again soon."""


Source = Peer | FromOrigin | NotNow
ORIGIN, NOT_NOW = FromOrigin(), NotNow()


@dataclass(slots=True)
class _Member:
    """What is known of one."""

    in_flight: int = 0
    pulls: int = 0
    """Of them: those that it fetches on our behalf, or is to."""
    rate: float = 0.0
    """Bytes per second of one chunk's transfer, lately; 0 where none has ended."""
    failures: int = 0
    """In a row."""
    avoid_until: float = float("-inf")
    unable: int = 0
    """How often it could not fetch from the origin, lately in a row."""
    spare_until: float = float("-inf")
    """Until then it is not asked to fetch what no reader waits for, where we cannot reach the origin either."""
    silent: bool = False
    """Nothing comes of what it was asked for."""
    missed: float = float("-inf")
    """When it was wanted last and could not be asked; `missing_since`: since when that has been so."""
    missing_since: float = float("-inf")
    suspect: bool = False
    """It did not answer when it was greeted the last time."""


@dataclass(slots=True)
class _Hints:
    """What was said of one chunk."""

    holders: dict[str, None] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    """Members that lack it or could not fetch it."""
    busy_until: dict[str, float] = field(default_factory=dict)
    waiting_since: float = float("-inf")
    """Since when a reader waits for members that have it and no time."""
    waited: float = float("-inf")
    """When that was seen last."""


class Choice:
    """`me` is this node. `downloads` is how many chunks may come from members at a time."""

    def __init__(self, me: str, downloads: int, *, per_member: int = PER_MEMBER) -> None:
        if downloads < 1 or per_member < 1:
            raise ValueError("at least 1 download, and 1 per member")
        self.me = me
        self.downloads = downloads
        self._per_member = per_member
        self._members: dict[str, _Member] = {}
        self._gone: OrderedDict[str, _Member] = OrderedDict()
        self._have: dict[str, dict[str, bytes]] = {}  # by blob and node
        self._followed: dict[str, float] = {}  # blobs, and since when
        self._hints: OrderedDict[tuple[str, int], _Hints] = OrderedDict()
        self._rankings: OrderedDict[tuple[str, int], list[str]] = OrderedDict()
        self._withheld: OrderedDict[tuple[str, str], float] = OrderedDict()  # by node and blob: until when
        self.in_flight = 0
        """Chunks that are being asked for."""
        self._pulls = 0  # of them
        self.epoch = 0
        """Another number whenever chunks have other owners."""
        self.joining_until = float("-inf")
        """Until then it is not known yet who the members are: nothing goes to the origin that one of them may have, or own."""

    # Who is there ----------------------------------------------------------------------------------------------------

    def set_members(self, nodes: Iterable[str]) -> None:
        """The members that answer, without this node. What was learned of one that comes back is still known."""
        wanted = set(nodes) - {self.me}
        if wanted == self._members.keys():
            return
        for node in self._members.keys() - wanted:
            self._gone[node] = self._members.pop(node)
            for have in self._have.values():
                have.pop(node, None)
        while len(self._gone) > GONE_MAX:
            # Not those who still are asked for something: they would come back with less than nothing in flight.
            idle = next((node for node, member in self._gone.items() if not member.in_flight), None)
            if idle is None:
                break
            del self._gone[idle]
        for node in sorted(wanted - self._members.keys()):
            self._members[node] = self._gone.pop(node) if node in self._gone else _Member()
        self._rankings.clear()
        self.epoch += 1

    @property
    def members(self) -> Iterator[str]:
        return iter(self._members)

    @property
    def full(self) -> bool:
        """Whether as many chunks are on the way as may be where no reader waits."""
        return self.in_flight - self._pulls >= self.downloads

    def usable(self, node: str, now: float) -> bool:
        """Whether `node` may be asked now."""
        member = self._members.get(node)
        return member is not None and not (member.silent or member.suspect) and now >= member.avoid_until

    # What they have --------------------------------------------------------------------------------------------------

    def follow(self, blobs: Iterable[str], now: float) -> None:
        """The blobs that are of interest; what is known of others is forgotten."""
        wanted = set(blobs)
        for blob in self._followed.keys() - wanted:
            del self._followed[blob]
            self._have.pop(blob, None)
        for blob in wanted - self._followed.keys():
            self._followed[blob] = now

    def presence(self, node: str, blob: str, have: bytes) -> None:
        """Member `node` has these chunks of `blob` (a bit each, see `protocol.Have`)."""
        if node in self._members and blob in self._followed:
            self._have.setdefault(blob, {})[node] = have

    def holders(self, blob: str, chunk: int) -> list[str]:
        """The members that are believed to have it."""
        at, bit = chunk >> 3, 1 << (chunk & 7)
        found = [n for n, have in self._have.get(blob, {}).items() if at < len(have) and have[at] & bit]
        hints = self._hints.get((blob, chunk))
        return found if hints is None else [*found, *(n for n in hints.holders if n not in found)]

    def anybody_has(self, blob: str, now: float) -> bool:
        """Whether any member that may be asked now is believed to have any of it."""
        return any(any(have) and self.usable(node, now) for node, have in self._have.get(blob, {}).items())

    def held(self, blob: str, chunk: int, now: float, *, besides: str = "") -> bool:
        """Whether any member that may be asked now is believed to have it, `besides` that one."""
        return any(self.usable(node, now) for node in self.holders(blob, chunk) if node != besides)

    def anybody(self, now: float) -> bool:
        """Whether any member may be asked now."""
        return any(self.usable(node, now) for node in self._members)

    def in_vain(self, blob: str, chunk: int, now: float) -> bool:
        """Whether a member was asked for the chunk a moment ago and could not fetch it."""
        hints = self._hints.get((blob, chunk))
        return hints is not None and any(until > now for until in hints.not_before.values())

    def settled(self, blob: str, now: float) -> bool:
        """Whether it is known by now who has what of `blob`, as far as it will be."""
        since = self._followed.get(blob)
        if since is None or now >= since + SETTLE_SECONDS:
            return True
        known = self._have.get(blob, {})
        return all(node in known or not self.usable(node, now) for node in self._members)

    # Where from ------------------------------------------------------------------------------------------------------

    def choose(
        self, blob: str, chunk: int, now: float, *, urgent: bool = False, origin: bool = True, behalf: bool = False
    ) -> Source:
        """Whom to ask. `urgent`: a reader waits. `origin`: it can be asked now. `behalf`: for another member, who must not be sent on."""
        if now < self.joining_until:
            return NOT_NOW
        if not self._members:
            return ORIGIN
        hints = self._hints.get((blob, chunk))
        holding = [node for node in self.holders(blob, chunk) if self._may(node, blob, hints, now)]
        if holding:
            free = [node for node in holding if self._has_time(node, hints, now, urgent)]
            if free:
                return Peer(self._best(free, blob, chunk), pull=False)
            return ORIGIN if urgent and origin and self._crowded(blob, chunk, now) else NOT_NOW
        absent = [n for n in self.holders(blob, chunk) if n in self._members and not self.usable(n, now)]
        if not origin and any(self._soon(node, now) for node in absent):
            return NOT_NOW
        if not urgent and any(self._may_recover(node, now) for node in absent):
            return NOT_NOW
        ranked = self._ranked(blob, chunk)
        place = ranked.index(self.me) if self.me in ranked else len(ranked)
        if behalf or place == 0:
            return self._own(blob, chunk, ranked, hints, now, origin=origin, urgent=urgent, behalf=behalf)
        asked = 0
        for node in ranked:
            if node == self.me or asked >= OWNERS:
                break
            if not self.usable(node, now):
                if not urgent and self._may_recover(node, now):
                    return NOT_NOW
                continue  # whoever is next owns it meanwhile
            asked += 1
            if not self._may(node, blob, hints, now) or (not (origin or urgent) and self._spared(node, now)):
                continue
            return Peer(node, pull=True) if self._has_time(node, hints, now, urgent, pull=True) else NOT_NOW
        return ORIGIN if origin else self._else(blob, ranked, hints, now, urgent)

    def _may_recover(self, node: str, now: float) -> bool:
        """Whether `node` cannot be asked since a moment ago only. Where nobody waits that is no reason to read the origin twice: a busy
        machine answers late, and the owner has fetched it meanwhile or soon will."""
        member = self._members[node]
        if now > member.missed + _ASKED_SECONDS:
            member.missing_since = now
        member.missed = now
        return now < member.missing_since + RECOVERY_SECONDS

    def _crowded(self, blob: str, chunk: int, now: float) -> bool:
        """Whether a reader has waited long enough for members that have it and no time."""
        hints = self._hint(blob, chunk)
        if now > hints.waited + _ASKED_SECONDS:
            hints.waiting_since = now
        hints.waited = now
        return now >= hints.waiting_since + CROWDED_SECONDS

    def _own(
        self,
        blob: str,
        chunk: int,
        ranked: list[str],
        hints: _Hints | None,
        now: float,
        *,
        origin: bool,
        urgent: bool,
        behalf: bool,
    ) -> Source:
        """We are to get it from the origin, unless the one who was the owner before us has it."""
        if not self.settled(blob, now):
            return NOT_NOW
        before = next((node for node in ranked if node != self.me and self.usable(node, now)), None)
        unknown = before is not None and before not in self._have.get(blob, {})
        if before is not None and unknown and self._may(before, blob, hints, now):
            return Peer(before, pull=False) if self._has_time(before, hints, now, urgent) else NOT_NOW
        if origin or behalf:
            return ORIGIN
        return self._else(blob, ranked, hints, now, urgent)

    def _else(self, blob: str, ranked: list[str], hints: _Hints | None, now: float, urgent: bool) -> Source:
        """The origin is out of our reach: some member may reach it. The origin where none is left, so that the reason is told."""
        for node in ranked:
            if node == self.me or (not urgent and self._spared(node, now)):
                continue
            if self._may(node, blob, hints, now):
                return Peer(node, pull=True) if self._has_time(node, hints, now, urgent, pull=True) else NOT_NOW
        return ORIGIN

    def _may(self, node: str, blob: str, hints: _Hints | None, now: float) -> bool:
        if not self.usable(node, now) or now < self._withheld.get((node, blob), now):
            return False
        return hints is None or now >= hints.not_before.get(node, now)

    def _soon(self, node: str, now: float) -> bool:
        """Whether it will be asked again soon, though it is not now."""
        member = self._members.get(node)
        return member is not None and not self.usable(node, now) and member.avoid_until <= now + SOON_SECONDS

    def _spared(self, node: str, now: float) -> bool:
        member = self._members.get(node)
        return member is not None and now < member.spare_until

    def _has_time(self, node: str, hints: _Hints | None, now: float, urgent: bool, *, pull: bool = False) -> bool:
        if hints is not None and now < hints.busy_until.get(node, now):
            return False
        times = 2 if urgent else 1  # a reader's chunk goes beside all that was asked for in advance
        member = self._members[node]
        if pull:
            return member.pulls < times * PULLS_PER_MEMBER and self._pulls < times * PULLS
        coming, of_member = self.in_flight - self._pulls, member.in_flight - member.pulls
        return of_member < times * self._per_member and coming < times * self.downloads

    def _best(self, nodes: list[str], blob: str, chunk: int) -> str:
        """Who would be done with one more first, roughly; equal ones are spread by a hash, by each node in its own way."""
        rates = [self._members[node].rate for node in nodes if self._members[node].rate]
        usual = median(rates) if rates else 1.0

        def cost(node: str) -> tuple[float, int]:
            member = self._members[node]
            return (member.in_flight + 1) / (member.rate or usual), score(node, f"{self.me}/{blob}/{chunk}")

        return min(nodes, key=cost)

    def _ranked(self, blob: str, chunk: int) -> list[str]:
        if (known := self._rankings.get((blob, chunk))) is None:
            for each, ranked in owners((*self._members, self.me), blob, chunk, _RANKED).items():
                self._rankings[blob, each] = ranked
            known = self._rankings[blob, chunk]
            while len(self._rankings) > CHUNKS_MAX:
                self._rankings.popitem(last=False)
        return known

    def owned(self, blob: str, chunks: Iterable[int]) -> list[int]:
        """Those of `chunks` that this node owns."""
        return owned(self._members, self.me, blob, chunks)

    # What became of it -----------------------------------------------------------------------------------------------

    def begin(self, node: str, *, pull: bool = False) -> None:
        """`node` is asked for a chunk. One of the following must follow, or `end`, with the same `pull`."""
        self._count(node, 1, pull)

    def end(self, node: str, *, pull: bool = False) -> None:
        """It was cancelled."""
        self._count(node, -1, pull)

    def _count(self, node: str, by: int, pull: bool) -> None:
        self.in_flight += by
        self._pulls += by * pull
        if (member := self._known(node)) is not None:
            member.in_flight += by
            member.pulls += by * pull

    def got(self, node: str, blob: str, chunk: int, size: int, seconds: float, *, pull: bool = False) -> None:
        """All `size` bytes came, in `seconds` from the first to the last."""
        self.end(node, pull=pull)
        self._hints.pop((blob, chunk), None)
        if (member := self._known(node)) is not None:
            member.failures, member.silent = 0, False
            if size >= _LEARNING_BYTES_MIN:
                rate = size / max(seconds, 1e-3)
                member.rate = rate if not member.rate else member.rate + _LEARNING * (rate - member.rate)

    def busy(
        self,
        node: str,
        blob: str,
        chunk: int,
        holders: Iterable[str],
        now: float,
        retry_s: float = 0.0,
        *,
        pull: bool = False,
    ) -> None:
        """`node` has no slot, and names members that may have it."""
        self.end(node, pull=pull)
        hints = self._hint(blob, chunk)
        hints.busy_until[node] = now + min(max(retry_s or BUSY_SECONDS, BUSY_SECONDS_MIN), BUSY_SECONDS_MAX)
        for holder in holders:
            if holder in self._members:
                hints.holders[holder] = None

    def lacks(self, node: str, blob: str, chunk: int, now: float, *, pull: bool = False) -> None:
        """`node` does not have it."""
        self.end(node, pull=pull)
        self._lacking(node, blob, chunk, now + LACKING_SECONDS)

    def withholds(self, node: str, blob: str, chunk: int, now: float, *, pull: bool = False) -> None:
        """`node` is well, and gives the blob to nobody."""
        self.end(node, pull=pull)
        self._lacking(node, blob, chunk, now + LACKING_SECONDS)
        self._withheld[node, blob] = now + WITHHELD_SECONDS
        self._withheld.move_to_end((node, blob))
        if len(self._withheld) > CHUNKS_MAX:
            self._withheld.popitem(last=False)

    def unable(self, node: str, blob: str, chunk: int, now: float, *, pull: bool = False) -> None:
        """`node` is well, and could not fetch it from the origin."""
        self.end(node, pull=pull)
        self._lacking(node, blob, chunk, now + UNABLE_SECONDS)
        if (member := self._known(node)) is not None and now >= member.spare_until:
            member.unable = 1 if now > member.spare_until + SPARE_SECONDS_MAX else min(member.unable + 1, 16)
            member.spare_until = now + min(SPARE_SECONDS * 2.0 ** (member.unable - 1), SPARE_SECONDS_MAX)

    def failed(self, node: str, now: float, *, pull: bool = False) -> None:
        """It did not answer, broke off, or refused us."""
        self.end(node, pull=pull)
        member = self._known(node)
        if member is not None and now >= member.avoid_until:
            # What was under way when it failed fails too: that is one failure. And a liar stays one.
            member.failures += 1
            member.avoid_until = now + min(AVOID_SECONDS * 2.0 ** min(member.failures - 1, 16), AVOID_SECONDS_MAX)

    def lied(self, node: str, now: float) -> None:
        """It sent wrong bytes. To be called beside the others: it may turn out later."""
        if (member := self._known(node)) is not None:
            member.avoid_until = now + LIAR_SECONDS

    def set_silent(self, nodes: Iterable[str]) -> None:
        """The members of whose orders nothing comes: no more is asked of them meanwhile."""
        silent = set(nodes)
        for node, member in self._members.items():
            member.silent = node in silent

    def set_suspect(self, nodes: Iterable[str]) -> None:
        """The members that did not answer the last time: they keep what they own, and are not asked for the moment."""
        suspect = set(nodes)
        for node, member in self._members.items():
            member.suspect = node in suspect

    def avoided(self, now: float) -> list[str]:
        """The members that are not asked now."""
        return [node for node in self._members if not self.usable(node, now)]

    def _known(self, node: str) -> _Member | None:
        """Also one that left: it may come back, and what it was asked for ends meanwhile."""
        return self._members.get(node) or self._gone.get(node)

    def _lacking(self, node: str, blob: str, chunk: int, until: float) -> None:
        hints = self._hint(blob, chunk)
        hints.not_before[node] = until
        hints.holders.pop(node, None)
        if (have := self._have.get(blob, {}).get(node)) is not None and chunk >> 3 < len(have):
            corrected = bytearray(have)
            corrected[chunk >> 3] &= ~(1 << (chunk & 7))
            self._have[blob][node] = bytes(corrected)

    def _hint(self, blob: str, chunk: int) -> _Hints:
        hints = self._hints.setdefault((blob, chunk), _Hints())
        self._hints.move_to_end((blob, chunk))
        if len(self._hints) > CHUNKS_MAX:
            self._hints.popitem(last=False)
        return hints


_RANKED = 8
"""Members of a ranking that are looked at: with all of these down there are others to worry about than one more copy."""
