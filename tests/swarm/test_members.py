"""The clockwork of membership, against members on loopback that come, go, crash, fall silent and lie."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme

from manta.model.extents import CHUNK_SIZE
from manta.swarm import presence, roster
from manta.swarm.members import Membership, Pace
from manta.swarm.protocol import ANSWER_BYTES_MAX, Refusal, decode
from manta.wire.messages import Message
from manta.wire.peering import Call, Called, Member, Members, Pauses, Presence, Settings, Trouble
from tests.swarm.fake_member import KEYS, STARTED, FakeMember, run, until

ME, A, B, C = "0" * 16, "a" * 16, "b" * 16, "c" * 16
BLOB = ("blob-1", 4 * CHUNK_SIZE)
QUICK = Pace(answer_s=0.3, round_s=0.05, round_s_min=0.01, tell_s=0.01, retry_s=0.02)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "GREET_SECONDS", 0.1)
    monkeypatch.setattr(roster, "OWN_SECONDS", 0.1)
    monkeypatch.setattr(roster, "BACKOFF_SECONDS_MIN", 0.05)


class Told:
    """What the daemon was told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def __call__(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def members(self) -> list[Member]:
        """As the daemon puts the pages together."""
        known: list[Member] = []
        for message in self.messages:
            if isinstance(message, Members):
                known = [*known[: message.first], *message.members] if message.first else list(message.members)
        return known

    @property
    def states(self) -> dict[str, str]:
        return {member.node: member.state for member in self.members}

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.messages if isinstance(message, kind)]

    @property
    def presence(self) -> dict[tuple[str, str], bytes]:
        return {(m.node, m.blob): m.have for m in self.messages if isinstance(m, Presence)}


@asynccontextmanager
async def membership(
    *members: FakeMember, told: Told, keys: tuple[bytes, ...] = KEYS, peers: str = "", authorities: str = ""
) -> AsyncIterator[Membership]:
    """A membership that runs, with these members named."""
    named = peers or "static:" + ",".join(member.address for member in members)
    settings = Settings(
        0, ME, "/nowhere", "127.0.0.1", 1, named, list(keys), tls_authorities=authorities, started=STARTED
    )
    ours = Membership(settings, told, QUICK)
    running = asyncio.create_task(ours.run())
    try:
        yield ours
        assert not running.done(), "nothing that members do may end it"
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def test_members_join_and_we_are_not_among_them() -> None:
    async def story() -> None:
        told = Told()
        async with (
            FakeMember(A) as a,
            FakeMember(B, version="1.1") as b,
            FakeMember(ME) as ours,
            membership(a, b, ours, told=told) as it,
        ):
            await until(lambda: told.states == {A: "up", B: "up"})
            assert [(m.address, m.version) for m in told.members] == [(a.address, "1.0"), (b.address, "1.1")]
            assert all(m.rtt_s > 0 and m.since > 1e9 for m in told.members)
            assert it.is_member(A)
            assert not it.is_member(ME)
            assert not it.is_member(C)

    run(story)


def test_another_with_our_id_is_told_of_until_it_is_gone() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, FakeMember(ME, started=2.0) as twin, membership(a, twin, told=told):
            await until(lambda: told.of(Trouble) != [])
            [trouble] = told.of(Trouble)
            assert isinstance(trouble, Trouble)
            assert trouble.message.startswith(f"{twin.address} has the id of this node ({ME})")
            await until(lambda: told.states == {A: "up"})
            await twin.stop()
            twin.node = B
            await twin.start()
            await until(lambda: told.states == {A: "up", B: "up"})
            assert told.of(Trouble)[1:] == [Trouble(0, "twin", "")]

    run(story)


def test_a_crash_is_seen_and_the_return_too() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, FakeMember(B) as b, membership(a, b, told=told) as it:
            await until(lambda: told.states == {A: "up", B: "up"})
            await a.stop()
            await until(lambda: told.states == {A: "suspect", B: "up"})
            assert "no connection" in told.members[0].problem
            assert it.is_member(A), "a moment ago it was"
            await until(lambda: told.states == {A: "down", B: "up"})
            await a.start()
            await until(lambda: told.states == {A: "up", B: "up"})
            assert told.members[0].problem == ""

    run(story)


def test_one_that_takes_connections_and_never_answers_is_down_and_holds_nobody_up() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, FakeMember(B, has={"blob-1": b"\x01"}) as b, membership(a, b, told=told) as it:
            await until(lambda: told.states == {A: "up", B: "up"})
            a.mood = "silent"
            it.follow([BLOB])
            await until(lambda: told.states[A] == "down")
            asked = len(b.asked)
            await until(lambda: len(b.asked) > asked + 3)
            assert told.presence == {(B, "blob-1"): b"\x01"}
            assert "did not answer within 0.3 s" in told.members[0].problem

    run(story)


def test_a_node_that_moves_and_an_address_that_gets_another_node() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as first, FakeMember(B) as second, membership(first, second, told=told) as it:
            await until(lambda: told.states == {A: "up", B: "up"})
            it.follow([BLOB])
            await until(lambda: len(told.presence) == 2)
            first.node, second.node = C, A
            await until(lambda: told.states == {C: "up", A: "up"})
            assert {m.node: m.address for m in told.members} == {C: first.address, A: second.address}
            second.node = C
            await until(lambda: told.states == {C: "up"})

    run(story)


@pytest.mark.parametrize("mood", ["wrong signature", "unsigned", "altered", "replay", "endless", "no http", "redirect"])
def test_a_hostile_member_is_left_out_and_says_why(mood: str) -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, FakeMember(B) as b, membership(a, b, told=told):
            await until(lambda: told.states == {A: "up", B: "up"})
            a.mood = mood
            await until(lambda: told.states[A] != "up")
            assert told.members[0].problem
            assert told.states[B] == "up"
            a.mood = "well"
            await until(lambda: told.states[A] == "up")

    run(story)


@pytest.mark.parametrize(
    "mood", ["short bitmap", "garbage", "nested", "endless", "other member's answer", "wrong signature"]
)
def test_one_that_greets_well_and_lies_about_its_chunks_is_refused(mood: str) -> None:
    async def story() -> None:
        told = Told()
        liar = FakeMember(A, has={"blob-1": b"\x0f"}, mood="have " + mood)
        async with liar as a, FakeMember(B, has={"blob-1": b"\x02"}) as b, membership(a, b, told=told) as it:
            it.follow([BLOB])
            await until(lambda: told.states.get(A) == "refused")
            await until(lambda: told.presence == {(B, "blob-1"): b"\x02"})
            await until(lambda: not it.is_member(A))

    run(story)


def test_another_key_is_refused_and_taken_once_it_is_ours() -> None:
    async def story() -> None:
        told = Told()
        other = b"another key of this cluster"
        async with FakeMember(A, keys=(other,)) as a, membership(a, told=told) as it:
            await until(lambda: [m.state for m in told.members] == ["refused"])
            assert "same swarm key" in told.members[0].problem
            it.set_keys([other, KEYS[0]])
            await until(lambda: told.states == {A: "up"})

    run(story)


def test_what_members_have_is_told_once_and_when_it_changes() -> None:
    async def story() -> None:
        told = Told()
        has = {"blob-1": b"\x01"}
        async with FakeMember(A, has=has) as a, FakeMember(B) as b, membership(a, b, told=told) as it:
            await until(lambda: told.states == {A: "up", B: "up"})
            assert "/v1/have" not in a.asked, "nothing is followed"
            it.follow([BLOB])
            await until(lambda: told.presence == {(A, "blob-1"): b"\x01", (B, "blob-1"): b"\0"})
            asked = a.asked.count("/v1/have")
            await until(lambda: a.asked.count("/v1/have") > asked + 5)
            assert len(told.of(Presence)) == 2
            has["blob-1"] = b"\x03"
            await until(lambda: told.presence[A, "blob-1"] == b"\x03")
            assert len(told.of(Presence)) == 3
            it.follow([])
            await asyncio.sleep(QUICK.round_s)
            asked = a.asked.count("/v1/have")
            await asyncio.sleep(3 * QUICK.round_s)
            assert a.asked.count("/v1/have") == asked

    run(story)


def test_a_new_blob_is_asked_for_at_once() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A, has={"blob-1": b"\x01", "blob-2": b"\x01"}) as a:
            settings = Settings(0, ME, "/nowhere", "127.0.0.1", 1, f"static:{a.address}", list(KEYS))
            it = Membership(settings, told, Pace(round_s=3600.0, round_s_min=0.01))
            running = asyncio.create_task(it.run())
            await until(lambda: told.states == {A: "up"})
            it.follow([BLOB])
            await until(lambda: (A, "blob-1") in told.presence)
            it.follow([BLOB, ("blob-2", CHUNK_SIZE)])
            await until(lambda: (A, "blob-2") in told.presence)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    run(story)


def test_pauses_are_told_while_there_are_any() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A, pauses={"https://hub": 7.0}) as a, membership(a, told=told) as it:
            it.follow([BLOB])
            await until(lambda: bool(told.of(Pauses)))
            assert told.of(Pauses)[0] == Pauses(0, A, {"https://hub": 7.0})
            a.pauses = {}
            count = a.asked.count("/v1/have")
            await until(lambda: a.asked.count("/v1/have") > count + 2)
            count = len(told.of(Pauses))
            asked = a.asked.count("/v1/have")
            await until(lambda: a.asked.count("/v1/have") > asked + 2)
            assert len(told.of(Pauses)) == count

    run(story)


def test_of_many_members_a_few_are_asked_each_round_and_all_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "MEMBERS_PER_ROUND", 3)

    async def story() -> None:
        told = Told()
        async with AsyncExitStack() as stack:
            many = [await stack.enter_async_context(FakeMember(f"{n:016x}")) for n in range(1, 11)]
            it = await stack.enter_async_context(membership(*many, told=told))
            await until(lambda: len(told.members) == 10 and set(told.states.values()) == {"up"})
            it.follow([BLOB])
            await until(lambda: len(told.presence) == 10)
            counts = [member.asked.count("/v1/have") for member in many]
            assert max(counts) <= min(counts) + 2

    run(story)


def test_a_call_brings_the_answer_whatever_its_status() -> None:
    async def story() -> None:
        told = Told()
        fd = os.memfd_create("tree", os.MFD_CLOEXEC)
        large = bytes(ANSWER_BYTES_MAX + 1)
        answers = {"report": (200, b"report"), "tree": (200, large), "location": (200, bytes(100_000))}
        async with FakeMember(A, answers=answers) as a, membership(a, told=told) as it:
            await until(lambda: told.states == {A: "up"})
            assert await it.call(Call(7, A, "report", b"", 5.0), None) == Called(7, 200, b"report")
            refused = await it.call(Call(8, A, "resolve", b"x", 5.0), None)
            assert refused.status == 404
            assert decode(refused.body, Refusal).reason == "absent"
            assert await it.call(Call(9, A, "tree", b"", 5.0), fd) == Called(9, 200)
            assert os.fstat(fd).st_size == len(large)
            too_large = await it.call(Call(10, A, "location", b"", 5.0), None)
            assert too_large.status == 0
            assert "100000 bytes" in too_large.problem
            assert told.states == {A: "up"}
        os.close(fd)

    run(story)


def test_a_call_that_fails_says_why_and_the_member_is_avoided() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, membership(a, told=told) as it:
            assert (await it.call(Call(1, A, "report", b"", 5.0), None)).problem == f"{A} is no member."
            await until(lambda: told.states == {A: "up"})
            assert "'hello'" in (await it.call(Call(2, A, "hello", b"", 5.0), None)).problem
            await a.stop()
            called = await it.call(Call(3, A, "report", b"", 5.0), None)
            assert called.status == 0
            assert "takes no connection" in called.problem
            await until(lambda: told.states[A] != "up")
            await a.start()
            await until(lambda: told.states == {A: "up"})
            a.mood = "wrong signature"
            called = await it.call(Call(4, A, "report", b"", 5.0), None)
            assert "signature" in called.problem
            await until(lambda: told.states == {A: "refused"})

    run(story)


def test_a_call_that_takes_too_long_leaves_a_member_that_greets_well() -> None:
    async def story() -> None:
        told = Told()
        async with FakeMember(A) as a, membership(a, told=told) as it:
            await until(lambda: told.states == {A: "up"})
            a.mood = "silent"
            called = await it.call(Call(7, A, "tree", b"", 0.1), None)
            assert called == Called(7, 0, problem=f"{a.address} did not answer within 0.1 s.")
            a.mood = "well"
            await until(lambda: told.states == {A: "up"})

    run(story)


def test_nobody_is_told_too_but_not_before_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known = threading.Event()

    def look_up(*_: object, **__: object) -> list[object]:
        known.wait(10.0)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)

    async def story() -> None:
        told = Told()
        async with membership(told=told, peers="dns:manta.example:9402"):
            await asyncio.sleep(5 * QUICK.tell_s)
            assert told.messages == []
            known.set()
            await until(lambda: told.messages == [Members(0, [], 0, 0)])

    run(story)


def test_thousands_of_addresses_are_told_in_pages() -> None:
    async def story() -> None:
        told = Told()
        addresses = [f"127.0.0.1:{port}" for port in range(20_000, 21_000)]
        async with membership(told=told, peers="static:" + ",".join(addresses)):
            await until(lambda: len(told.members) == 1000)
            pages = [m for m in told.of(Members) if isinstance(m, Members) and m.total == 1000]
            assert {page.total for page in pages} == {1000}
            assert max(len(page.members) for page in pages) == 256

    run(story)


def test_certificates_that_cannot_be_read_are_trouble_until_they_can(tmp_path: Path) -> None:
    async def story() -> None:
        told = Told()
        path = tmp_path / "ca.pem"
        async with membership(told=told, peers="static:127.0.0.1:1", authorities=str(path)) as it:
            await until(lambda: bool(told.of(Trouble)))
            trouble = told.of(Trouble)[0]
            assert isinstance(trouble, Trouble)
            assert (trouble.kind, "swarm.tls_authorities" in trouble.message) == ("tls", True)
            assert (await it.call(Call(1, A, "report", b"", 5.0), None)).status == 0
            trustme.CA().cert_pem.write_to_path(str(path))
            await until(lambda: told.of(Trouble)[-1] == Trouble(0, "tls", ""))
            await until(lambda: len(told.members) == 1)

    run(story)
