"""Chunks fetched on behalf of others: once however many ask, told that it is coming, given up when nobody asks any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from manta.errors import Unavailable
from manta.swarm.limits import Limits
from manta.swarm.protocol import ChunkRequest, Pull, Refusal, encode
from manta.swarm.pulls import Pulls
from manta.swarm.questions import Questions
from manta.wire.peering import Asked, PullAsked, Reply
from tests.swarm.node import ASKER, OTHER, PULL, FakeDaemon, blob_of, content, run, serving, shelve

DATA = content(50_000)
BLOB = blob_of(DATA)
ELSEWHERE = msgspec.structs.replace(PULL, repo="org/copy")
FAILED = encode(Refusal(reason="denied", message="The hub refused."))
QUICK = Limits(hold_s=0.05, abandoned_s=0.0)


def wanted(pull: Pull = PULL, chunk: int = 0) -> ChunkRequest:
    return ChunkRequest(BLOB, len(DATA), chunk, 0, len(DATA), True, pull)


def pulls(limits: Limits = QUICK) -> tuple[FakeDaemon, Pulls]:
    daemon = FakeDaemon()
    daemon.questions = Questions(daemon.tell, limits)
    return daemon, Pulls(daemon.questions, limits)


def of(asked: Asked) -> PullAsked:
    return msgspec.msgpack.decode(asked.body, type=PullAsked)


def test_many_askers_are_one_fetch(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=Limits(hold_s=10.0)) as node:
            askers = [node.asker(f"{n:016x}") for n in range(6)]
            asking = [asyncio.create_task(asker.chunk(BLOB, len(DATA), 0, PULL)) for asker in askers]
            await node.daemon.until(lambda: node.daemon.asked("pull"))
            shelve(node.cache, DATA[:-1])  # of another blob: nothing comes of that
            while sum(pull.waiting for pull in node.server._pulls._pulls.values()) < 6:
                await asyncio.sleep(0)
            shelve(node.cache, DATA)
            node.daemon.reply(Reply(node.daemon.asked("pull")[0].order, 200))
            gots = await asyncio.gather(*asking)
            assert [got.status for got in gots] == [200] * 6
            assert {got.body for got in gots} == {DATA}
            [asked] = node.daemon.asked("pull")
            assert of(asked) == PullAsked(
                str(BLOB), len(DATA), 0, PULL.kind, PULL.repo, PULL.commit, PULL.path, urgent=False
            )

    run(test())


def test_who_waits_long_is_told_that_it_is_coming(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=QUICK) as node:
            for _ in range(3):
                got = await node.asker().chunk(BLOB, len(DATA), 0, PULL)
                assert (got.status, got.refusal.reason) == (202, "coming")
            [asked] = node.daemon.asked("pull")
            shelve(node.cache, DATA)
            node.daemon.reply(Reply(asked.order, 200))
            assert (await node.asker().chunk(BLOB, len(DATA), 0, PULL)).body == DATA
            assert node.daemon.asked("pull") == [asked]
            assert node.daemon.gone() == []

    run(test())


def test_a_failure_reaches_everybody_and_is_remembered_for_a_moment(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            node.daemon.answers["pull"] = lambda asked: Reply(asked.order, 502, FAILED)
            for asker in (node.asker(), node.asker(OTHER)):
                got = await asker.chunk(BLOB, len(DATA), 0, PULL)
                assert (got.status, got.refusal.reason) == (502, "denied")
            assert len(node.daemon.asked("pull")) == 1
            # From another repo it may be had.
            node.daemon.answers["pull"] = lambda asked: (shelve(node.cache, DATA), Reply(asked.order, 200))[1]
            assert (await node.asker().chunk(BLOB, len(DATA), 0, ELSEWHERE)).body == DATA
            assert [of(asked).repo for asked in node.daemon.asked("pull")] == [PULL.repo, ELSEWHERE.repo]

    run(test())


def test_a_fetch_that_brought_nothing_is_no_chunk(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as node:
            node.daemon.answers["pull"] = lambda asked: Reply(asked.order, 200)
            assert (await node.asker().chunk(BLOB, len(DATA), 0, PULL)).status == 503
            node.daemon.answers["pull"] = lambda asked: Reply(asked.order, 404, b"")
            assert (await node.asker().chunk(BLOB, len(DATA), 0, PULL)).status == 502

    run(test())


def test_a_failure_elsewhere_is_tried_here() -> None:
    async def test() -> None:
        daemon, wanting = pulls(Limits(hold_s=10.0))
        first = asyncio.create_task(wanting.wait(ASKER, wanted()))
        await daemon.until(lambda: daemon.asked("pull"))
        second = asyncio.create_task(wanting.wait(OTHER, wanted(ELSEWHERE)))
        await asyncio.sleep(0)
        daemon.reply(Reply(daemon.asked("pull")[0].order, 502, FAILED))
        await daemon.until(lambda: len(daemon.asked("pull")) == 2)
        daemon.reply(Reply(daemon.asked("pull")[1].order, 200))
        answers = [await first, await second]
        assert [answer.status for answer in answers if answer] == [502, 200]
        assert len(wanting) == 0

    run(test())


def test_a_reader_that_waits_makes_it_urgent() -> None:
    async def test() -> None:
        daemon, wanting = pulls(Limits(hold_s=10.0))
        first = asyncio.create_task(wanting.wait(ASKER, wanted()))
        await daemon.until(lambda: daemon.asked("pull"))
        second = asyncio.create_task(wanting.wait(OTHER, wanted(msgspec.structs.replace(PULL, urgent=True))))
        third = asyncio.create_task(wanting.wait(OTHER, wanted(msgspec.structs.replace(PULL, urgent=True))))
        await daemon.until(daemon.gone)
        asked = daemon.asked("pull")
        assert [of(each).urgent for each in asked] == [False, True]
        assert daemon.gone() == [asked[0].order]  # after the new one: the fetch goes on
        daemon.reply(Reply(asked[0].order, 502, FAILED))  # crossed with Gone: means nothing
        daemon.reply(Reply(asked[1].order, 200))
        assert [a and a.status for a in await asyncio.gather(first, second, third)] == [200] * 3

    run(test())


def test_what_nobody_waits_for_is_given_up() -> None:
    async def test() -> None:
        daemon, wanting = pulls()
        waiting = asyncio.create_task(wanting.wait(ASKER, wanted()))
        await daemon.until(lambda: daemon.asked("pull"))
        wanting.sweep()
        assert daemon.gone() == []  # one is held
        assert await waiting is None
        wanting.sweep()
        assert daemon.gone() == [daemon.asked("pull")[0].order]
        assert len(wanting) == 0
        daemon.reply(Reply(daemon.asked("pull")[0].order, 200))  # crossed with Gone
        assert await wanting.wait(ASKER, wanted()) is None
        assert len(daemon.asked("pull")) == 2

    run(test())


def test_there_are_no_more_than_allowed(tmp_path: Path) -> None:
    async def test() -> None:
        limits = Limits(hold_s=0.01, pulls=2)
        daemon, wanting = pulls(limits)
        assert [await wanting.wait(ASKER, wanted(chunk=chunk)) for chunk in range(2)] == [None, None]
        with pytest.raises(Unavailable):
            await wanting.wait(ASKER, wanted(chunk=2))
        assert await wanting.wait(OTHER, wanted(chunk=1)) is None  # is under way
        assert len(daemon.asked("pull")) == 2
        async with serving(tmp_path, limits=Limits(hold_s=0.01, pulls=0)) as node:
            got = await node.asker().chunk(BLOB, len(DATA), 0, PULL)
            assert (got.status, got.refusal.reason) == (503, "busy")

    run(test())


def test_failures_are_forgotten() -> None:
    async def test() -> None:
        daemon, wanting = pulls(Limits(hold_s=10.0, failure_s=0.0))
        daemon.answers["pull"] = lambda asked: Reply(asked.order, 502, FAILED)
        for count in (1, 2):
            answer = await wanting.wait(ASKER, wanted())
            assert answer is not None
            assert answer.status == 502
            assert len(daemon.asked("pull")) == count
        wanting.sweep()
        assert not wanting._failures

    run(test())
