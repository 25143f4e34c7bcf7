"""The daemon's view of an origin: which commit a revision names and what a commit holds, here and only here.

It asks the origin when it must and remembers what it may: in memory for a while, in the cache directory for good. So one question is asked
once however many wait for the answer, a hub that cannot be reached leaves everything stored usable, and programs that probe for names that
do not exist do not spend the hub's quota.
Used by `manta.fs` and the daemon's mounts and jobs; belongs to the trio thread. The store's calls run in one thread at a time.

Who may see what. A public repo's stored tree serves everyone. The tree of a private or gated repo serves an access after the origin
has shown it that tree, and then for GRANT_S. While the origin cannot be asked, only the owner (the daemon's own access, with which a single
user mounts) goes on seeing what is stored: those bytes are on the owner's disk already. Anyone else, such as a pod with a token of its own,
is refused until the origin can say. What a mount has been shown it holds for its life, and gets again after a restart of the daemon
(`stored`), whatever the origin says by then.
For pods `authorise` goes before: it has the origin asked about every repo, also one that was public when its tree was stored, and knows no
owner. What it hears is remembered by repo and the digest of the token, for GRANT_S; and where a repo is hidden by now, with all its stored
trees, so that they are nobody's for the asking when the origin is away.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import trio

from manta.errors import Absent, Denied, MantaError, Throttled, Unavailable, Unreachable
from manta.hub.circuit import PATIENCE_S, Circuit
from manta.hub.neighbours import Neighbours
from manta.hub.origin import Access, Origin, Resolved
from manta.hub.refusal import Question, gated
from manta.model.ids import DEFAULT_REVISION, Commit, RepoId, is_commit
from manta.model.snapshot import FileEntry, Snapshot

T = TypeVar("T")

log = logging.getLogger(__name__)

CURRENT_S = 15.0
"""How long `current` believes what a revision named.

A library that is online asks the hub for the sha itself and then wants it here, so this must be short. One active repo costs 20
questions per window of 300 s: 25 such repos fit into the 500 that an anonymous address has, 50 into a free account's 1000.
"""

ABSENT_S = 30.0
"""How long the origin's "there is no such thing" is believed. A shell or an importer probes the same few names again and again; a person
who has just created the repo waits half a minute."""

DENIED_S = 10.0
"""How long a refusal is believed: access is granted by a click in another window, and then tried at once. A new token is a new access."""

UNAVAILABLE_S = 3.0
"""How long an unreachable origin is not asked the same thing again: one `ls -l` asks for a name several times, each up to the deadline."""

ANSWERS_MAX = 4096
"""Bound on remembered answers of each kind. An entry is about 0.5 KB."""

TREE_DEADLINES = 15
"""The deadline of a whole tree, in deadlines of one question: by default 300 s, which is how long `manta mount` waits. Each page has the
deadline of one question, by which a hub that falls silent is noticed; this is for one that is merely slow. The largest tree has 250 pages
of about a second each."""

BACKSTOP_S = 2.0
"""How much longer than `timeout_s` an adapter is waited for: it keeps that deadline itself, and knows better what went wrong."""

DISK_S = 5.0
"""How long the store is waited for. Its files take milliseconds; a disk that takes longer must not keep answers from readers."""

SNAPSHOTS_MAX = 64
SNAPSHOT_FILES_MAX = 50_000
"""Bounds on the trees kept in memory: as many as 64, or 50,000 files together (about 25 MB), but always the latest. Whoever has one mounted
holds it anyway; the others are read from the store again in milliseconds."""

MASKED_MAX = 16
"""Bound on the trees of gated repos kept for those who may not read them."""

GRANT_S = 60.0
"""How long an access that was shown a private or gated tree, or was found to have the right to it, sees it without the origin being asked
again. Mounts keep what they mounted."""

NOTED_S = 600.0
"""How long the store's note of when a revision was last seen may lag: an unchanged ref is not written to the disk each time."""

FLIGHTS_MAX = 256
"""Questions under way or waiting. The adapter asks eight at a time, so more than this could not be answered within the deadline."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The commit to use for a revision."""

    commit: Commit
    stale: bool = False
    """It is what the store remembers, because the origin could not be asked."""
    reason: str = ""
    """Why it could not be asked: a sentence; empty where it is not stale."""
    hidden: bool = field(default=False, compare=False)
    """The origin has just said that the repo is private or gated."""


class Metadata(Protocol):
    """The persistent side: what `manta.cache.metadata.MetadataStore` offers. Its calls may block on the disk."""

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Keeps a tree for good."""
        ...

    def snapshot(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        """The tree kept for a commit."""
        ...

    def save_ref(self, repo: RepoId, revision: str, commit: Commit, when: float) -> None:
        """Keeps what a revision named at `when` (seconds since the epoch)."""
        ...

    def ref(self, repo: RepoId, revision: str) -> tuple[Commit, float] | None:
        """What a revision named last, and when that was."""
        ...

    def mark(self, repo: RepoId, *, gated: bool, private: bool) -> None:
        """Keeps with all trees of `repo` that it is gated or private, or neither."""
        ...


class Catalog:
    """See the module. `owner` is the daemon's own access; `clock` gives seconds since the epoch for what is stored; `circuit` is the
    origin's, which others that ask it may share. `neighbours`: other nodes, one of which asks the origin for all; None: there are none.
    `latest` says with what the origin is asked on behalf of an access: see `manta.hub.identity`.

    Its methods raise what `manta.hub.origin.Origin` says, within `timeout_s` (that of the origin's own questions) for a revision and
    TREE_DEADLINES times that for a tree, plus BACKSTOP_S, and DISK_S for each use of the store. While the origin is known to be out of
    reach they take PATIENCE_S at most.
    """

    def __init__(
        self,
        origin: Origin,
        store: Metadata,
        nursery: trio.Nursery,
        *,
        offline: bool = False,
        timeout_s: float = 20.0,
        owner: Access | None = None,
        clock: Callable[[], float] = time.time,
        circuit: Circuit | None = None,
        neighbours: Neighbours | None = None,
        latest: Callable[[Access], Access] = lambda access: access,
    ) -> None:
        self._origin = origin
        self._latest = latest
        self._neighbours = neighbours
        self._store = store
        self._nursery = nursery
        self._offline = offline
        self._timeout_s = timeout_s
        self._owner = owner or Access.anonymous()
        self._clock = clock
        self._circuit = circuit or Circuit(origin.endpoint)
        self._disk = trio.CapacityLimiter(1)
        self._flights: dict[Hashable, _Flight] = {}
        self._resolutions: _Lapsing[Resolution] = _Lapsing(ANSWERS_MAX)
        self._refusals: _Lapsing[MantaError] = _Lapsing(ANSWERS_MAX)
        self._masked: _Lapsing[Snapshot] = _Lapsing(MASKED_MAX)
        self._grants: _Lapsing[bool] = _Lapsing(ANSWERS_MAX)
        self._heard: _Lapsing[tuple[bool, bool]] = _Lapsing(ANSWERS_MAX)
        self._marks: _Lapsing[tuple[bool, bool]] = _Lapsing(ANSWERS_MAX)
        self._noted: _Lapsing[Commit] = _Lapsing(ANSWERS_MAX)
        self._trees = _Trees()

    # Revisions -------------------------------------------------------------------------------------------------------

    async def resolve(self, repo: RepoId, revision: str | None, access: Access) -> Resolution:
        """The commit that `revision` names now, by the origin's word where it can be asked. None is the default branch, which is "main".

        A commit whose tree is stored is taken as it is. Where the origin cannot be asked: the commit it named last, as stale.
        """
        name = revision or DEFAULT_REVISION
        return await self._shared(("ref", repo, name, access), lambda: self._resolve(repo, name, access))

    async def current(self, repo: RepoId, revision: str | None, access: Access) -> Resolution:
        """As `resolve`, and content with an answer up to CURRENT_S old: for what is looked at again and again."""
        known = self._resolutions.get(("ref", repo, revision or DEFAULT_REVISION, access))
        return known if known is not None else await self.resolve(repo, revision, access)

    async def _resolve(self, repo: RepoId, revision: str, access: Access) -> Resolution:
        if is_commit(revision) and await self._known_tree(repo, Commit(revision)) is not None:
            return Resolution(Commit(revision))
        key = ("ref", repo, revision, access)
        recent = self._resolutions.get(key)
        if recent is not None and recent.stale:
            return recent
        subject = f"{repo}@{revision[:12] if is_commit(revision) else revision}"
        if self._offline:
            stale = await self._remembered(repo, revision, self._offline_error(subject))
            self._resolutions.put(key, stale, CURRENT_S)
            return stale
        hidden = False
        try:
            commit = None if self._neighbours is None else await self._neighbours.resolve(repo, revision)
            if commit is not None:
                self._heard.put(self._right(repo, access), (False, False), GRANT_S)
            else:
                resolved = await self._ask(
                    key, self._timeout_s, lambda: self._origin.resolve(repo, revision, access), subject
                )
                await self._hear(resolved, access)
                commit, hidden = resolved.commit, resolved.gated or resolved.private
        except Unavailable as error:
            stale = await self._remembered(repo, revision, error)
            self._resolutions.put(key, stale, _believed_s(error))
            return stale
        resolution, now, named = Resolution(commit, hidden=hidden), self._clock(), commit
        if not is_commit(revision) and self._noted.get((repo, revision)) != commit:
            await self._on_disk(lambda: self._store.save_ref(repo, revision, named, now))
            self._noted.put((repo, revision), commit, NOTED_S)
        self._resolutions.put(key, resolution, CURRENT_S)
        return resolution

    async def _remembered(self, repo: RepoId, revision: str, why: Unavailable) -> Resolution:
        """What the store knows of `revision`, or else another node; raises `why` where that is nothing."""
        ref = await self._on_disk(lambda: self._store.ref(repo, revision))
        if ref is None:
            known = None if self._neighbours is None else await self._neighbours.remembered(repo, revision)
            if known is None:
                raise why
            return Resolution(known, stale=True, reason=why.message)
        return Resolution(ref[0], stale=True, reason=why.message)

    # Rights ----------------------------------------------------------------------------------------------------------

    async def authorise(self, repo: RepoId, commit: Commit, access: Access) -> None:
        """Returns where `access` may read `repo`, by the origin's word of the last GRANT_S, however much of it is stored; or where it is
        public as far as is known and the origin cannot be asked. Nothing is said of a tree that is not stored: who lists it is told.

        Raises Absent and Denied as the origin says, and Unavailable where it cannot be asked about a repo that is private or gated.
        """
        if self._grants.get(self._right(repo, access)) is None:
            await self._shared(("right", repo, commit, access), lambda: self._authorise(repo, commit, access))

    def hidden(self, snapshot: Snapshot) -> bool:
        """Whether not everybody may see it, by the origin's latest word."""
        return any(self._marks.get(snapshot.repo) or (snapshot.gated, snapshot.private))

    async def _authorise(self, repo: RepoId, commit: Commit, access: Access) -> None:
        known, right = await self._known_tree(repo, commit), self._right(repo, access)
        if known is None:
            return
        key, subject = ("right", repo, access), f"{repo}@{commit[:12]}"
        try:
            if self._offline:
                raise self._offline_error(subject)
            if self._heard.get(right) is None and await self._told_public(known):
                self._heard.put(right, (False, False), GRANT_S)
            if self._heard.get(right) is None:
                resolved = await self._ask(
                    key, self._timeout_s, lambda: self._origin.resolve(repo, None, access), subject
                )
                await self._hear(resolved, access)
            heard, until = self._heard.get(right) or (True, True), self._heard.until(right)
            if heard != (known.gated, known.private):
                await self._mark(repo, heard)
            # An origin tells everybody about a gated repo, and gives its files to some.
            entry = next(iter(known.files.values()), None) if heard[0] else None
            if entry is not None:
                await self._ask(("read", *key), self._timeout_s, lambda: self._read_one(known, entry, access), subject)
                until = trio.current_time() + GRANT_S
        except Absent:
            # To whoever may not see it a private repo is one that does not exist.
            await self._mark(repo, (known.gated, True))
            raise
        except Unavailable:
            if self.hidden(known):
                raise
            return
        self._grants.put(right, True, until - trio.current_time())

    async def _told_public(self, known: Snapshot) -> bool:
        """Whether the node that asks about the repo for all says that everybody may see it now."""
        if self._neighbours is None or self.hidden(known):
            return False
        return await self._neighbours.resolve(known.repo, DEFAULT_REVISION) is not None

    async def _read_one(self, known: Snapshot, entry: FileEntry, access: Access) -> None:
        """Raises Denied where the origin does not give it."""
        if not await self._origin.may_read(known.repo, known.commit, entry, access):
            raise gated(Question(self._origin.endpoint, known.repo, known.commit, self._latest(access)))

    async def _hear(self, resolved: Resolved, access: Access) -> None:
        """What the origin says of a repo to one who may know of it."""
        now = resolved.gated, resolved.private
        self._heard.put(self._right(resolved.repo, access), now, GRANT_S)
        await self._note(resolved.repo, now)

    async def _note(self, repo: RepoId, now: tuple[bool, bool]) -> None:
        """That a repo is public nobody needs to be told, but where it was not before."""
        if any(now) or self._marks.get(repo) is not None:
            await self._mark(repo, now)

    async def _mark(self, repo: RepoId, now: tuple[bool, bool]) -> None:
        """Whether the repo is gated, and whether it is private, holds for all its trees, also for those that are stored."""
        if now != self._marks.get(repo):
            self._marks.put(repo, now, math.inf)
            await self._on_disk(lambda: self._store.mark(repo, gated=now[0], private=now[1]))

    def _right(self, repo: RepoId, access: Access) -> Hashable:
        """What is heard of a right is remembered under: never the repo alone, and the token of the moment, not who has it."""
        return repo, self._latest(access).digest

    # Trees -----------------------------------------------------------------------------------------------------------

    async def snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        """The tree of a commit, as `access` may see it: without blobs where it may not read them, see `denial`."""
        known = self._trees.get(repo, commit)
        if known is not None and self._may_see(known, access):
            return known
        return await self._shared(("tree", repo, commit, access), lambda: self._snapshot(repo, commit, access))

    async def stored(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        """The stored tree of a commit, whoever may see it: for a mount that was shown it before the daemon was restarted, and for nobody
        else. None where it is not stored, or the disk does not answer."""
        return await self._known_tree(repo, commit)

    @property
    def owner(self) -> Access:
        """The daemon's own access."""
        return self._owner

    def denial(self, snapshot: Snapshot, access: Access) -> Denied | None:
        """Why nothing of a snapshot that `snapshot` gave for `access` can be read; None where it can."""
        if all(entry.blob is not None for entry in snapshot.files.values()):
            return None
        return gated(Question(self._origin.endpoint, snapshot.repo, snapshot.commit, self._latest(access)))

    async def _snapshot(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        known = await self._known_tree(repo, commit)
        if known is not None and self._may_see(known, access):
            return known
        key = ("tree", repo, commit, access)
        masked = self._masked.get(key)
        if masked is not None:
            return masked
        anybody = self._offline or self._circuit.open
        if self._neighbours is not None and known is None:
            told = await self._neighbours.tree(repo, commit, anybody=anybody)
            if told is not None:
                return await self._keep(told)
        try:
            if self._offline:
                raise self._offline_error(f"{repo}@{commit[:12]}")
            shown = await self._ask(
                key,
                self._timeout_s * TREE_DEADLINES,
                lambda: self._listed(repo, commit, access),
                f"{repo}@{commit[:12]}",
            )
        except Unavailable as error:
            if known is None:
                if self._neighbours is None or anybody:
                    raise
                if (told := await self._neighbours.tree(repo, commit, anybody=True)) is None:
                    raise
                return await self._keep(told)
            if access == self._owner:
                return known
            raise Unavailable(
                f"{repo} is private or gated, and whether the token in use may read it cannot be asked now: {error.message}"
            ) from None
        await self._note(repo, (shown.gated, shown.private))
        if self.denial(shown, access) is not None:
            self._masked.put(key, shown, DENIED_S)
            return shown
        self._grants.put(self._right(repo, access), True, GRANT_S)
        if known is not None and (known.gated, known.private) == (shown.gated, shown.private):
            return known
        return await self._keep(shown)

    async def _keep(self, shown: Snapshot) -> Snapshot:
        await self._on_disk(lambda: self._store.save_snapshot(shown))
        self._trees.put(shown)
        return shown

    async def _listed(self, repo: RepoId, commit: Commit, access: Access) -> Snapshot:
        snapshot = await self._origin.snapshot(repo, commit, access)
        await trio.to_thread.run_sync(_laid_out, snapshot)
        return snapshot

    async def _known_tree(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        known = self._trees.get(repo, commit)
        if known is None:
            known = await self._on_disk(lambda: _laid_out(self._store.snapshot(repo, commit)))
            if known is not None:
                self._trees.put(known)
        return known

    def _may_see(self, snapshot: Snapshot, access: Access) -> bool:
        return not self.hidden(snapshot) or self._grants.get(self._right(snapshot.repo, access)) is not None

    # Asking ----------------------------------------------------------------------------------------------------------

    async def _ask(self, key: Hashable, timeout_s: float, ask: Callable[[], Awaitable[T]], subject: str) -> T:
        """The origin's answer, by a deadline. Its refusals are remembered for a while and given again without asking."""
        refused = self._refusals.get(key)
        if refused is not None:
            raise _again(refused)
        try:
            if self._circuit.open:
                return await self._probe(timeout_s, ask, subject)
            return await self._outcome(timeout_s, ask, subject)
        except MantaError as error:
            self._refusals.put(key, error, _believed_s(error))
            raise

    async def _outcome(self, timeout_s: float, ask: Callable[[], Awaitable[T]], subject: str) -> T:
        """What `ask` says, by a deadline; the circuit hears whether the origin was there."""
        began = trio.current_time()
        try:
            with trio.fail_after(timeout_s + BACKSTOP_S):
                answer = await ask()
        except trio.TooSlowError:
            error = Unreachable(
                f"{self._origin.endpoint} did not answer within {timeout_s:.0f} s when asked for {subject}:"
                " check the network, or try again."
            )
        except Unreachable as silence:
            error = silence
        except MantaError:
            self._circuit.answered(trio.current_time())
            raise
        else:
            self._circuit.answered(trio.current_time())
            return answer
        self._circuit.failed(began, trio.current_time(), error.message)
        raise error

    async def _probe(self, timeout_s: float, ask: Callable[[], Awaitable[T]], subject: str) -> T:
        """What `ask` says where the origin, out of reach so far, is back. Raises Unreachable for the known reason, soon.

        A probe goes on by itself: one that ended with its asker's patience would never find an origin that is slow.
        """
        known = self._circuit.reason
        if self._circuit.admits(trio.current_time()):
            probe = _Flight()
            self._nursery.start_soon(probe.fly, lambda: self._outcome(timeout_s, ask, subject))
            with trio.move_on_after(PATIENCE_S):
                await probe.landed.wait()
                # The question says which kind of answer it is.
                return cast(T, probe.outcome())
        raise Unreachable(
            f"{self._origin.endpoint} is out of reach, so it was not asked for {subject}; it is tried again by itself."
            f" The last attempt: {known}"
        )

    def _offline_error(self, subject: str) -> Unavailable:
        return Unavailable(
            f"{subject} is not in the cache, and offline mode is on: mount it once online, or unset HF_HUB_OFFLINE"
            " and MANTA_HUB_OFFLINE."
        )

    async def _on_disk(self, work: Callable[[], T]) -> T | None:
        """What the store says; None where it fails or takes too long: the origin can still be asked, and that is only said in the log."""
        try:
            with trio.fail_after(DISK_S):
                return await trio.to_thread.run_sync(work, limiter=self._disk, abandon_on_cancel=True)
        except trio.TooSlowError:
            log.warning("the stored metadata could not be used: the disk did not answer within %.0f s", DISK_S)
        except (MantaError, OSError) as error:
            log.warning("the stored metadata could not be used: %s", error)
        return None

    async def _shared(self, key: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """The outcome of `ask`, which runs once for all who want it at the same time and goes on when they go."""
        flight = self._flights.get(key)
        if flight is None:
            if len(self._flights) >= FLIGHTS_MAX:
                raise Unavailable(
                    f"{FLIGHTS_MAX} questions to {self._origin.endpoint} are waiting for an answer already: try again soon."
                )
            flight = self._flights[key] = _Flight()
            self._nursery.start_soon(self._fly, key, flight, ask)
        await flight.landed.wait()
        # The key says which kind of answer it is.
        return cast(T, flight.outcome())

    async def _fly(self, key: Hashable, flight: _Flight, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            await flight.fly(ask)
        finally:
            del self._flights[key]


class _Flight:
    """One question under way and, once landed, its outcome."""

    def __init__(self) -> None:
        self.landed = trio.Event()
        self._answer: object = None
        self._error: Exception | None = Unavailable("Manta is stopping: the question was not answered.")

    async def fly(self, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            self._answer = await ask()
            self._error = None
        except Exception as error:
            # Also what no one foresaw: it ends this question, and not the daemon with everyone's mounts.
            self._error = error
        finally:
            self.landed.set()

    def outcome(self) -> object:
        """The answer. Raises what kept it from coming."""
        if self._error is not None:
            raise _again(self._error)
        return self._answer


class _Lapsing(Generic[T]):
    """Answers by key, each for its time by trio's clock, at most `bound`: what was used longest ago goes first."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._answers: OrderedDict[Hashable, tuple[T, float]] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        answer = self._answers.get(key)
        if answer is None:
            return None
        if answer[1] <= trio.current_time():
            del self._answers[key]
            return None
        self._answers.move_to_end(key)
        return answer[0]

    def until(self, key: Hashable) -> float:
        """When it lapses; now, where there is none."""
        return self._answers[key][1] if key in self._answers else trio.current_time()

    def put(self, key: Hashable, answer: T, seconds: float) -> None:
        self._answers[key] = (answer, trio.current_time() + seconds)
        self._answers.move_to_end(key)
        if len(self._answers) > self._bound:
            self._answers.popitem(last=False)


class _Trees:
    """Snapshots in memory, within SNAPSHOTS_MAX and SNAPSHOT_FILES_MAX: what was used longest ago goes first."""

    def __init__(self) -> None:
        self._snapshots: OrderedDict[tuple[RepoId, Commit], Snapshot] = OrderedDict()
        self._files = 0
        # What a mount holds is in memory anyway: the next mount of it shares it.
        self._alive: WeakValueDictionary[tuple[RepoId, Commit], Snapshot] = WeakValueDictionary()

    def get(self, repo: RepoId, commit: Commit) -> Snapshot | None:
        if (repo, commit) in self._snapshots:
            self._snapshots.move_to_end((repo, commit))
        return self._alive.get((repo, commit))

    def put(self, snapshot: Snapshot) -> None:
        key = (snapshot.repo, snapshot.commit)
        if key in self._snapshots:
            self._files -= len(self._snapshots.pop(key).files)
        self._snapshots[key] = self._alive[key] = snapshot
        self._files += len(snapshot.files)
        while len(self._snapshots) > SNAPSHOTS_MAX or (self._files > SNAPSHOT_FILES_MAX and len(self._snapshots) > 1):
            _, gone = self._snapshots.popitem(last=False)
            self._files -= len(gone.files)


def _laid_out(snapshot: Snapshot | None) -> Snapshot | None:
    """The same with its folders and sums worked out, for a thread. Raises Corrupt before anyone relies on a tree that cannot be shown."""
    if snapshot is not None:
        snapshot.folders, snapshot.contents  # noqa: B018
    return snapshot


def _believed_s(error: MantaError) -> float:
    """For how many seconds the same question is not asked again after `error`."""
    if isinstance(error, Throttled):
        return max(error.retry_after_s, UNAVAILABLE_S)
    if isinstance(error, Absent):
        return ABSENT_S
    return DENIED_S if isinstance(error, Denied) else UNAVAILABLE_S


def _again(error: Exception) -> Exception:
    """A copy to raise: one exception raised in many tasks would gather all their tracebacks."""
    copy = type(error).__new__(type(error), *error.args)
    copy.__dict__.update(error.__dict__)
    return copy
