"""The daemon's driver of the peer process, against a test that holds the other end of its socket."""

from __future__ import annotations

import logging
import math
import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from manta.config import SwarmConfig
from manta.errors import Absent, Denied, Invalid, MantaError, Throttled, Unavailable
from manta.fetch import process as process_module
from manta.fetch import swarm as module
from manta.fetch.process import Channel
from manta.fetch.sources import Provenance
from manta.fetch.swarm import Answer, Swarm
from manta.fetch.transfer import Transfer
from manta.hub.origin import Access
from manta.model.extents import CHUNK_SIZE
from manta.model.ids import BlobAlgorithm, BlobId, Commit, RepoId, RepoKind
from manta.model.snapshot import FileEntry
from manta.swarm.ownership import owner
from manta.swarm.protocol import Refusal, SharedLocation, decode, encode
from manta.telemetry.events import Telemetry
from manta.wire.channel import pair, receive_nowait, send_nowait
from manta.wire.messages import Message, Ready
from manta.wire.messages import encode as encode_message
from manta.wire.peering import (
    BODY_BYTES_MAX,
    Asked,
    Call,
    Called,
    Cancelled,
    Follow,
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
    ToPeerProcess,
    Trouble,
    Uploaded,
    decode_from_peer_process,
    decode_to_peer_process,
)

ME, A, B, C = "0" * 16, "a" * 16, "b" * 16, "c" * 16
KEY, NEW_KEY = b"the-key-of-the-tests", b"another-key-of-the-tests"
BLOB = BlobId(BlobAlgorithm.SHA256, "3f" * 32)
CONFIG = SwarmConfig(peers="static:10.0.0.1:9402", listen="10.0.0.9:9402")
pytestmark = [pytest.mark.trio, pytest.mark.timeout(30)]


class Child:
    """Stands in for the peer process: what the daemon has of one, and the other end of its socket."""

    pids = iter(range(70_000, 80_000))

    def __init__(self) -> None:
        ours, self.socket = pair()
        self.socket.setblocking(False)
        self.said, self.stderr = os.pipe()
        self.channel = Channel(ours, decode_from_peer_process)
        self.pid = next(self.pids)
        self.returncode: int | None = None

    def kill(self) -> None:
        self.die(-9)

    def wait(self) -> int:
        assert self.returncode is not None
        return self.returncode

    def die(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            if self.socket.fileno() != -1:
                trio.lowlevel.notify_closing(self.socket)
                self.socket.close()
            os.close(self.stderr)

    def tell(self, *messages: Message) -> None:
        for message in messages:
            send_nowait(self.socket, encode_message(message))

    async def hear(self) -> tuple[ToPeerProcess, int | None]:
        """The next message, with the descriptor that came along, which is the caller's."""
        while True:
            try:
                data, fd = receive_nowait(self.socket)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)
            else:
                return decode_to_peer_process(data), fd

    async def expect(self, kind: type[Message]) -> Message:
        """The next message of that kind; others are passed over."""
        message, _ = await self.expect_with_fd(kind)
        return message

    async def expect_with_fd(self, kind: type[Message]) -> tuple[Message, int | None]:
        with trio.fail_after(60):
            while True:
                message, fd = await self.hear()
                if isinstance(message, kind):
                    return message, fd
                assert fd is None


@dataclass
class Ear:
    """A listener: what the fetcher would hear."""

    changes: int = 0
    presences: int = 0
    paused: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    elsewhere: dict[str, float] = field(default_factory=dict)

    def members_changed(self) -> None:
        self.changes += 1

    def presence_changed(self) -> None:
        self.presences += 1

    def heed_pause(self, origin: str, seconds: float) -> None:
        self.paused[origin] = seconds

    def own_pauses(self) -> dict[str, float]:
        return self.own

    def origin_rate(self) -> float:
        return 3e6

    def note_elsewhere(self, node: str, rate: float) -> None:
        self.elsewhere[node] = rate


class World:
    def __init__(self) -> None:
        self.children: list[Child] = []
        self.started = trio.Event()
        self.keys: tuple[bytes, ...] = (KEY,)
        self.key_trouble: MantaError | None = None
        self.ear = Ear()
        self.answerer: Callable[[Asked], Awaitable[Answer]] = self.no_answer
        self.swarm = Swarm(CONFIG, ME, "/cache", self.read_keys, Telemetry())

    def read_keys(self) -> tuple[bytes, ...]:
        if self.key_trouble is not None:
            raise self.key_trouble
        return self.keys

    async def no_answer(self, asked: Asked) -> Answer:
        raise Absent("Nothing is here.")

    async def answer(self, asked: Asked) -> Answer:
        return await self.answerer(asked)

    def spawn(self, name: str, arguments: list[str], decode: object) -> object:
        assert (name, arguments) == ("manta.swarm", [])
        child = Child()
        self.children.append(child)
        self.started.set()
        self.started = trio.Event()
        return child, child.channel, trio.lowlevel.FdStream(child.said)

    async def next_child(self) -> Child:
        count = len(self.children)
        with trio.fail_after(60):
            while len(self.children) == count:
                await self.started.wait()
        return self.children[-1]

    @property
    def child(self) -> Child:
        return self.children[-1]

    async def until(self, is_so: Callable[[], bool]) -> None:
        with trio.fail_after(30):
            while not is_so():
                await trio.sleep(0.1)

    async def have(self, *members: Member) -> None:
        """Makes these the members."""
        before = self.ear.changes
        self.child.tell(Members(0, list(members), 0, len(members)))
        await self.until(lambda: self.ear.changes > before)


def member(node: str, state: MemberState = "up", address: str = "", **more: str) -> Member:
    return Member(node, address or f"10.0.0.{int(node[0] or '0', 16)}:9402", state, 1000.0, **more)  # type: ignore[arg-type]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> AsyncIterator[World]:
    """A driver that runs; afterwards no descriptor may be left."""
    autojump_clock.autojump_threshold = 0.003
    await trio.to_thread.run_sync(lambda: None)
    fds = open_fds()
    async with running(monkeypatch) as made:
        yield made
    assert open_fds() == fds


@asynccontextmanager
async def running(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    made = World()
    monkeypatch.setattr(module, "spawn", made.spawn)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.swarm.run, made.ear, made.answer)
        await made.next_child()
        yield made
        nursery.cancel_scope.cancel()
    assert all(child.returncode is not None for child in made.children)
    assert made.swarm.processes == []


# Members -------------------------------------------------------------------------------------------------------------


async def test_the_settings_come_first_and_hide_the_key(world: World, autojump_clock: MockClock) -> None:
    settings, fd = await world.child.hear()
    assert isinstance(settings, Settings)
    assert (settings.node, settings.keys, settings.host, settings.port) == (ME, [KEY], "10.0.0.9", 9402)
    assert fd is None
    assert "the-key" not in repr(settings)
    assert world.swarm.processes == [("peer", world.child.pid)]


async def test_members_come_in_pages_and_count_when_all_are_there(world: World, autojump_clock: MockClock) -> None:
    before = world.ear.changes
    world.child.tell(Members(0, [member(A)], 0, 2), Listening(0, "10.0.0.9:1"))
    await world.until(lambda: world.swarm.address == "10.0.0.9:1")
    assert (world.swarm.members(), world.ear.changes) == ([], before)
    world.child.tell(Members(0, [member(B, "suspect")], 1, 2))
    await world.until(lambda: world.ear.changes > before)
    assert [m.node for m in world.swarm.members()] == [A, B]
    assert sorted(world.swarm.choice.members) == [A, B]
    assert world.swarm.choice.usable(A, trio.current_time())
    assert not world.swarm.choice.usable(B, trio.current_time())


async def test_a_list_that_begins_anew_replaces_one_that_was_not_finished(
    world: World, autojump_clock: MockClock
) -> None:
    world.child.tell(Members(0, [member(A)], 0, 3), Members(0, [member(B)], 1, 3))
    await world.have(member(C))
    assert [m.node for m in world.swarm.members()] == [C]


async def test_who_is_down_or_refused_is_seen_and_not_asked(world: World, autojump_clock: MockClock) -> None:
    await world.have(member(A, "down"), member(B, "refused", problem="Another key."), member("", address="10.0.0.7:1"))
    assert list(world.swarm.choice.members) == []
    assert len(world.swarm.members()) == 3
    await world.have()
    assert world.swarm.members() == []


@pytest.mark.parametrize("turned", [False, True])
async def test_a_node_that_moved_is_where_it_is_up(world: World, autojump_clock: MockClock, turned: bool) -> None:
    places = [member(A, "down", "10.0.0.1:1"), member(A, "up", "10.0.0.2:2"), member(A, "suspect", "10.0.0.3:3")]
    await world.have(*(reversed(places) if turned else places))
    contact = world.swarm.contact(A)
    assert contact is not None
    assert (contact.address, contact.keys) == ("10.0.0.2:2", [KEY])
    assert world.swarm.choice.usable(A, trio.current_time())


async def test_what_members_have_and_their_pauses_are_passed_on(world: World, autojump_clock: MockClock) -> None:
    await world.have(member(A))
    world.swarm.touch(BLOB, 3 * CHUNK_SIZE)
    follow = await world.child.expect(Follow)
    while follow == Follow(0, []):
        follow = await world.child.expect(Follow)
    assert follow == Follow(0, [(str(BLOB), 3 * CHUNK_SIZE)])
    world.child.tell(Presence(0, A, str(BLOB), b"\x05"), Pauses(0, A, {"https://hub:443": 7.0}))
    await world.until(lambda: bool(world.ear.paused))
    assert world.ear.paused == {"https://hub:443": 7.0}
    assert world.ear.presences == 1
    assert world.swarm.choice.holders(str(BLOB), 2) == [A]
    assert world.swarm.choice.holders(str(BLOB), 1) == []


async def test_what_is_not_touched_any_more_is_not_followed(world: World, autojump_clock: MockClock) -> None:
    world.swarm.touch(BLOB, 1)
    for expected in ([(str(BLOB), 1)], []):
        follow = None
        while follow != Follow(0, expected):
            follow = cast(Follow, await world.child.expect(Follow))


async def test_followed_blobs_are_bounded(world: World, autojump_clock: MockClock) -> None:
    for number in range(module.FOLLOWED_MAX + 50):
        world.swarm.touch(BlobId(BlobAlgorithm.SHA256, f"{number:064x}"), 16 * 1024**4)
    follow = Follow(0, [])
    while len(follow.blobs) < module.FOLLOWED_MAX:
        follow = cast(Follow, await world.child.expect(Follow))
    assert len(follow.blobs) == module.FOLLOWED_MAX


async def test_own_pauses_are_told_again_and_again(world: World, autojump_clock: MockClock) -> None:
    world.ear.own = {"https://hub:443": 5.0}
    said = None
    while said != OwnPauses(0, {"https://hub:443": 5.0}, 3e6):
        said = cast(OwnPauses, await world.child.expect(OwnPauses))


async def test_what_was_given_is_counted(world: World, autojump_clock: MockClock) -> None:
    world.child.tell(Uploaded(0, [(A, 100, 1), (B, 50, 0)], busy=3))
    await world.until(lambda: world.swarm.busy == 3)
    assert world.swarm.ledger.to_peers == 150
    assert {e.node: e.bytes_out for e in world.swarm.exchanges()} == {A: 100, B: 50}


async def test_troubles_are_said_until_they_are_over(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    world.child.tell(Trouble(0, "discovery", "No name."), Trouble(0, "listen", "In use."))
    await world.until(lambda: "In use." in world.swarm.problem)
    assert "No name." in world.swarm.problem
    world.child.tell(Trouble(0, "discovery", ""), Listening(0, "h:1"))
    await world.until(lambda: not world.swarm.problem)
    assert caplog.text.count("No name.") == 1


async def test_who_gave_wrong_bytes_is_said_as_long_as_it_is_not_asked(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRONG_SECONDS", 5.0)

    class Named:
        name = "org/name/file"

    await world.have(member(A))
    world.swarm.wrong(A, cast(Transfer, Named()), 3)
    assert "gave wrong bytes for chunk 3 of org/name/file" in world.swarm.problem
    await trio.sleep(module.WRONG_SECONDS)
    assert world.swarm.problem == ""


# Life ----------------------------------------------------------------------------------------------------------------


async def test_one_that_dies_is_started_again_later_each_time(world: World, autojump_clock: MockClock) -> None:
    await world.have(member(A))
    world.child.tell(Uploaded(0, [], busy=5), Trouble(0, "discovery", "No name."))
    await world.until(lambda: world.swarm.busy == 5)
    pauses = []
    for _ in range(9):
        died = trio.current_time()
        world.child.die(1)
        child = await world.next_child()
        pauses.append(trio.current_time() - died)
        assert (world.swarm.members(), list(world.swarm.choice.members), world.swarm.busy) == ([], [], 0)
        assert isinstance((await child.hear())[0], Settings)
    assert pauses[0] < 1
    assert pauses == pytest.approx([min(0.2 * 2**n, module.RESTART_PAUSE_SECONDS_MAX) for n in range(9)], abs=0.5)
    assert "No name." not in world.swarm.problem
    assert "is being started again" in world.swarm.problem
    world.child.tell(Ready(0, world.child.pid))
    await world.until(lambda: not world.swarm.problem)
    await trio.sleep(module.STABLE_SECONDS)
    died = trio.current_time()
    world.child.die(1)
    await world.next_child()
    assert trio.current_time() - died < 1


async def test_one_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.003
    async with running(monkeypatch) as world:

        def refuse(*_: object) -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(module, "spawn", refuse)
        world.child.die(1)
        await world.until(lambda: "Too many open files" in world.swarm.problem)
        with pytest.raises(Unavailable, match="not running"):
            await world.swarm.call(A, "report", b"")
        monkeypatch.setattr(module, "spawn", world.spawn)
        await world.next_child()


@pytest.mark.parametrize("noise", [b"\x00", b"\x93\xa5asked", b"\xff" * 100, encode_message(Reply(1, 200))])
async def test_one_that_talks_nonsense_is_replaced(
    world: World, autojump_clock: MockClock, noise: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = world.child
    send_nowait(first.socket, noise)
    await world.next_child()
    assert first.returncode == -9
    assert "sent what is no message" in caplog.text


async def test_one_that_does_not_read_is_replaced(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError

    async def never(_: object) -> None:
        await trio.sleep_forever()

    first = world.child
    with monkeypatch.context() as stuck:
        stuck.setattr(process_module, "send_nowait", full)
        stuck.setattr(trio.lowlevel, "wait_writable", never)
        await world.until(lambda: first.returncode is not None)
    assert "does not read what it is told" in caplog.text
    await world.until(lambda: world.child is not first)


async def test_strange_messages_of_a_live_one_do_no_harm(world: World, autojump_clock: MockClock) -> None:
    world.child.tell(
        Gone(77),
        Called(78, 200),
        Presence(0, C, "no-blob", b"\xff"),
        Members(0, [member(A)], 5, 9),
        Uploaded(0, [("?", -5, -1)], busy=-1, refused_busy=-1, refused_auth=-1),
        Trouble(0, "?", "x"),
    )
    await world.have(member(A))
    assert [m.node for m in world.swarm.members()] == [A]
    assert len(world.children) == 1


# Keys ----------------------------------------------------------------------------------------------------------------


async def test_a_replaced_key_is_told_and_used(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await world.child.expect(Settings)
    await world.have(member(A))
    world.keys = (NEW_KEY, KEY)
    settings = cast(Settings, await world.child.expect(Settings))
    assert settings.keys == [NEW_KEY, KEY]
    contact = world.swarm.contact(A)
    assert contact is not None
    assert contact.keys == [NEW_KEY, KEY]
    assert "the swarm's key was replaced" in caplog.text
    assert "of-the-tests" not in caplog.text + repr(contact)


async def test_a_bad_key_afterwards_keeps_the_old_one_and_says_so(world: World, autojump_clock: MockClock) -> None:
    world.key_trouble = Denied("The swarm's key file /k cannot be read (No such file or directory).")
    await world.until(lambda: bool(world.swarm.problem))
    assert world.swarm.problem.endswith("The key read before stays in use.")
    assert world.swarm.keys == (KEY,)
    world.child.die(1)
    child = await world.next_child()
    assert cast(Settings, await child.expect(Settings)).keys == [KEY]
    assert "stays in use" in world.swarm.problem
    world.key_trouble = None
    child.tell(Ready(0, 1))
    await world.until(lambda: not world.swarm.problem)


async def test_a_key_that_is_bad_at_the_start_is_raised() -> None:
    def bad() -> tuple[bytes, ...]:
        raise Invalid("It is too short.")

    with pytest.raises(Invalid, match="too short"):
        Swarm(CONFIG, ME, "/cache", bad, Telemetry())


# Questions of members ------------------------------------------------------------------------------------------------


async def test_an_answer_goes_out_and_a_large_one_by_descriptor(world: World, autojump_clock: MockClock) -> None:
    async def answer(asked: Asked) -> Answer:
        if asked.what == "resolve":
            return Answer(200, asked.body + asked.node.encode())
        fd = os.memfd_create("test")
        os.write(fd, b"tree" * 50_000)
        return Answer(200, b"", fd)

    world.answerer = answer
    world.child.tell(Asked(5, A, "resolve", b"q"))
    assert await world.child.expect(Reply) == Reply(5, 200, b"q" + A.encode())
    world.child.tell(Asked(6, B, "tree", b""))
    reply, fd = await world.child.expect_with_fd(Reply)
    assert isinstance(fd, int)
    assert reply == Reply(6, 200)
    assert os.pread(fd, 1_000_000, 0) == b"tree" * 50_000
    os.close(fd)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (Absent("Not here."), 404, "absent"),
        (Invalid("No repo."), 400, "invalid"),
        (Throttled("Slow down.", 7.0), 502, "throttled"),
        (Denied("Gated."), 502, "denied"),
        (Unavailable("x" * 100_000), 502, "unavailable"),
        (RuntimeError("hf_secret"), 502, "unavailable"),
    ],
)
async def test_what_goes_wrong_is_a_refusal(
    world: World, autojump_clock: MockClock, error: Exception, status: int, reason: str
) -> None:
    async def answer(asked: Asked) -> Answer:
        raise error

    world.answerer = answer
    world.child.tell(Asked(5, A, "resolve", b""))
    reply = cast(Reply, await world.child.expect(Reply))
    refusal = decode(reply.body, Refusal)
    assert (reply.status, refusal.reason) == (status, reason)
    assert refusal.retry_s == (7.0 if reason == "throttled" else 0.0)
    assert "hf_secret" not in refusal.message
    assert len(refusal.message) <= 1000


async def test_an_answer_that_is_too_large_ends_the_question_and_not_the_daemon(
    world: World, autojump_clock: MockClock
) -> None:
    async def answer(asked: Asked) -> Answer:
        return Answer(200, bytes(BODY_BYTES_MAX + 1))

    world.answerer = answer
    world.child.tell(Asked(5, A, "report", b""))
    assert cast(Reply, await world.child.expect(Reply)).status == 502


async def test_a_question_that_takes_too_long_is_given_up_but_a_pull_is_not(
    world: World, autojump_clock: MockClock
) -> None:
    done = trio.Event()

    async def answer(asked: Asked) -> Answer:
        await trio.sleep(3 * module.ANSWER_SECONDS)
        done.set()
        return Answer(200)

    world.answerer = answer
    world.child.tell(Asked(5, A, "resolve", b""), Asked(6, A, "pull", b""))
    given_up = cast(Reply, await world.child.expect(Reply))
    assert (given_up.order, given_up.status) == (5, 502)
    assert await world.child.expect(Reply) == Reply(6, 200)
    assert done.is_set()


async def test_a_question_that_nobody_waits_for_is_cancelled(world: World, autojump_clock: MockClock) -> None:
    begun, ended = trio.Event(), trio.Event()

    async def answer(asked: Asked) -> Answer:
        begun.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    world.answerer = answer
    world.child.tell(Asked(5, A, "pull", b""))
    await begun.wait()
    world.child.tell(Gone(5))
    await ended.wait()


async def test_questions_are_bounded_and_each_number_counts_once(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWERS_MAX", 2)
    go = trio.Event()

    async def answer(asked: Asked) -> Answer:
        await go.wait()
        return Answer(200)

    world.answerer = answer
    world.child.tell(Asked(5, A, "pull", b""))
    await trio.testing.wait_all_tasks_blocked()
    world.child.tell(Asked(5, A, "pull", b""))
    assert cast(Reply, await world.child.expect(Reply)).status == 503
    world.child.tell(Asked(6, A, "pull", b""), Asked(7, A, "pull", b""))
    refused = cast(Reply, await world.child.expect(Reply))
    assert refused.status == 503
    taken = {5, 6, 7} - {refused.order}
    go.set()
    replies = [cast(Reply, await world.child.expect(Reply)) for _ in range(2)]
    assert {(reply.order, reply.status) for reply in replies} == {(order, 200) for order in taken}


# Questions to members ------------------------------------------------------------------------------------------------


async def asked(world: World, ask: Callable[[], Awaitable[object]], *answers: Called | bytes) -> list[object]:
    """What `ask` gives when the calls that it makes are answered like that (bytes: by descriptor), and the calls."""
    outcome: list[object] = []

    async def run() -> None:
        try:
            outcome.append(await ask())
        except MantaError as e:
            outcome.append(e)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        for answer in answers:
            call, fd = await world.child.expect_with_fd(Call)
            body = answer if isinstance(answer, bytes) else answer.body
            status = 200 if isinstance(answer, bytes) else answer.status
            if fd is not None:
                os.write(fd, body)
                os.close(fd)
                body = b""
            problem = "" if isinstance(answer, bytes) else answer.problem
            world.child.tell(Called(call.order, status, body, problem))
            outcome.append(call)
    return outcome


def key_of(node: str, among: list[str]) -> str:
    """A key that `node` owns."""
    return next(key for n in range(1000) if owner(among, key := f"key/{n}") == node)


async def test_the_owner_is_asked_and_its_answer_may_be_large(world: World, autojump_clock: MockClock) -> None:
    await world.have(member(A), member(B, "suspect"))
    key = key_of(A, [A, ME])
    call, told = await asked(world, lambda: world.swarm.ask_owner("tree", key, b"q"), b"x" * 300_000)
    assert isinstance(call, Call)
    assert (call.node, call.what, call.body) == (A, "tree", b"q")
    assert told == b"x" * 300_000
    assert await world.swarm.ask_owner("tree", key_of(ME, [A, ME]), b"q") is None


async def test_the_owners_pause_is_heard_in_our_own_words(world: World, autojump_clock: MockClock) -> None:
    """The descriptor takes refusals as it takes answers."""
    await world.have(member(A))
    key = key_of(A, [A, ME])
    for retry_s, heard in ((7.0, 7.0), (math.inf, 3600.0), (1e300, 3600.0), (math.nan, 0.0), (-5.0, 0.0)):
        refusal = encode(Refusal(reason="throttled", message="\x1b[31m<script>", retry_s=retry_s))
        _, error = await asked(world, lambda: world.swarm.ask_owner("resolve", key, b""), Called(0, 502, refusal))
        assert isinstance(error, Throttled)
        assert error.retry_after_s == heard
        assert "script" not in error.message


@pytest.mark.parametrize(
    "answer",
    [
        Called(0, 404, encode(Refusal(reason="absent"))),
        Called(0, 0, problem="it is gone."),
        Called(0, 500, b"garbage"),
        Called(0, 401, b""),
        Called(0, -7, b""),
    ],
)
async def test_what_a_member_does_not_tell_is_nothing(world: World, autojump_clock: MockClock, answer: Called) -> None:
    await world.have(member(A))
    _, told = await asked(world, lambda: world.swarm.ask_owner("tree", key_of(A, [A, ME]), b""), answer)
    assert told is None


async def test_an_answer_beyond_its_bound_is_not_read(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOLD_BYTES_MAX", 10)
    await world.have(member(A))
    _, told = await asked(world, lambda: world.swarm.ask_owner("tree", key_of(A, [A, ME]), b""), b"x" * 11)
    assert told is None


async def test_a_call_that_is_not_answered_ends_and_is_cancelled(world: World, autojump_clock: MockClock) -> None:
    await world.have(member(A))
    with pytest.raises(Unavailable, match=r"could not be asked: it did not answer within 1\.5 s\."):
        await world.swarm.call(A, "report", b"")
    call = cast(Call, await world.child.expect(Call))
    assert await world.child.expect(Cancelled) == Cancelled(call.order)
    world.child.tell(Called(call.order, 200))  # too late
    await world.have(member(A))


async def test_a_call_ends_with_the_process(world: World, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            with pytest.raises(Unavailable, match="the peer process ended"):
                await world.swarm.call(A, "report", b"", deadline_s=1000.0)

        nursery.start_soon(call)
        await world.child.expect(Call)
        world.child.die(1)


async def test_a_question_too_large_for_a_message_is_not_asked(world: World, autojump_clock: MockClock) -> None:
    with pytest.raises(Unavailable, match="bytes long"):
        await world.swarm.call(A, "tree", bytes(BODY_BYTES_MAX + 1))


async def test_all_are_asked_until_one_knows(world: World, autojump_clock: MockClock) -> None:
    nodes = [f"{n:016x}" for n in range(1, 41)]
    await world.have(*(member(n, address=f"10.0.1.{i}:1") for i, n in enumerate(nodes)))
    absent = Called(0, 404, encode(Refusal(reason="absent")))
    paused = Called(0, 502, encode(Refusal(reason="throttled", retry_s=5.0)))
    outcome = await asked(world, lambda: world.swarm.ask_any("resolve", "k", b""), *[absent, paused] * 19, b"known")
    assert b"known" in outcome
    calls = [call.node for call in outcome if isinstance(call, Call)]
    assert len(set(calls)) == 39
    assert owner(nodes, "k") in calls[: module.ASKED_AT_ONCE]


async def test_nobody_knows_and_nobody_answers(world: World, autojump_clock: MockClock) -> None:
    assert await world.swarm.ask_any("tree", "k", b"") is None
    await world.have(*(member(f"{n:016x}", address=f"10.0.1.{n}:1") for n in range(1, 41)))
    began = trio.current_time()
    assert await world.swarm.ask_any("tree", "k", b"") is None
    assert trio.current_time() - began <= module.ASKED_SECONDS + 1


# Locations -----------------------------------------------------------------------------------------------------------


def provenance(size: int = 10 * CHUNK_SIZE) -> Provenance:
    entry = FileEntry("model.bin", size, BLOB)
    return Provenance(RepoId(RepoKind.MODEL, "org/name"), Commit("c" * 40), entry, Access("hf_secret"))


async def test_a_location_is_asked_of_its_owner_without_the_token(world: World, autojump_clock: MockClock) -> None:
    node = next(f"{n:016x}" for n in range(1, 1000) if owner([f"{n:016x}", ME], f"location/{BLOB}") != ME)
    await world.have(member(node))
    shared = SharedLocation(url="https://cdn/x?sig=secret", headers={}, expires_s=100.0)
    call, location = await asked(world, lambda: world.swarm.location(provenance()), Called(0, 200, encode(shared)))
    assert b"hf_secret" not in msgspec.msgpack.encode(call)
    assert location.told  # type: ignore[attr-defined]
    assert location.url == "https://cdn/x?sig=secret"  # type: ignore[attr-defined]
    assert "secret" not in repr(location) + repr(shared)
    for answer in (Called(0, 200, b"garbage"), Called(0, 404, encode(Refusal(reason="absent"))), Called(0, 0)):
        assert (await asked(world, lambda: world.swarm.location(provenance()), answer))[1] is None
    throttled = Called(0, 502, encode(Refusal(reason="throttled", retry_s=3.0)))
    assert isinstance((await asked(world, lambda: world.swarm.location(provenance()), throttled))[1], Throttled)


async def test_a_single_chunk_is_not_worth_the_question(world: World, autojump_clock: MockClock) -> None:
    assert await world.swarm.location(provenance(CHUNK_SIZE)) is None


# The child -----------------------------------------------------------------------------------------------------------


async def test_no_child_has_the_key_or_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def popen(command: list[str], **options: object) -> None:
        given.update(options, command=command)
        raise OSError(2, "none")

    monkeypatch.setenv("MANTA_SWARM_KEY", "the-key-of-the-tests")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_secret")
    monkeypatch.setattr(subprocess, "Popen", popen)
    fds = open_fds()
    with pytest.raises(OSError):
        process_module.spawn("manta.swarm", [], decode_from_peer_process)
    assert open_fds() == fds
    assert "PATH" in cast(dict[str, str], given["env"])
    assert "hf_secret" not in str(given)
    assert "the-key" not in str(given)


async def test_a_process_that_says_nothing_is_replaced(world: World, autojump_clock: MockClock) -> None:
    first = world.child
    for _ in range(60):
        await trio.sleep(1.0)
        first.tell(Ready(0, first.pid))
    assert world.swarm.processes == [("peer", first.pid)], "it answers"
    second = await world.next_child()
    assert first.returncode == -9
    assert world.swarm.processes == [("peer", second.pid)]


async def test_a_daemon_that_was_stopped_itself_blames_nobody(world: World, autojump_clock: MockClock) -> None:
    child = world.child
    await child.expect(OwnPauses)
    autojump_clock.jump(3600)
    await trio.sleep(2.0)
    assert world.swarm.processes == [("peer", child.pid)]
