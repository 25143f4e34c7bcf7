"""Prefetching and verifying: progress, failures that stop nothing else, cancelling, and what is kept of the past."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from manta.errors import Absent, Denied, InUse
from manta.fetch.sources import Provenance
from manta.model.ids import parse_target
from manta.operations import jobs as jobs_module
from manta.operations.jobs import FILES_AT_ONCE, KEPT_SECONDS, PROBLEMS_MAX, RUNNING_MAX
from manta.testing.workers import failed
from manta.wire.messages import Fetch, Verify
from tests.fs.fakes import ACCESS, CHUNK, FIRST, MODEL, OTHER, SECOND, MemoryHub, content
from tests.operations.node import node
from tests.telemetry.scrape import samples

BIG = content(10 * CHUNK, seed=1)
SMALL = content(100, seed=2)
TARGET = parse_target("org/name")


@pytest.fixture
async def hub() -> MemoryHub:
    hub = MemoryHub()
    files = [
        hub.lfs("big.bin", BIG),
        hub.lfs("copy/big.bin", BIG),
        hub.plain("config.json", SMALL),
        hub.plain("empty", b""),
    ]
    hub.commit(MODEL, FIRST, files, None, "main")
    hub.commit(OTHER, SECOND, [hub.lfs("same.bin", BIG)], None, "main")
    return hub


BIG_BLOB = MemoryHub().lfs("big.bin", BIG).blob
SMALL_BLOB = MemoryHub().plain("config.json", SMALL).blob
assert BIG_BLOB is not None
assert SMALL_BLOB is not None


# Prefetching ---------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_prefetch_fetches_each_blob_once_and_counts_every_file(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        started = await n.jobs.prefetch(TARGET, ACCESS)
        assert (started.state, started.kind, started.name) == ("running", "prefetch", f"org/name@{FIRST}")
        assert (started.files_total, started.bytes_total) == (4, 2 * len(BIG) + len(SMALL))
        assert started.bytes_done == len(BIG)  # the copy costs nothing
        assert n.jobs.running == 1
        done = await n.end_of(started)
        assert (done.state, done.problems, done.rate) == ("done", [], 0.0)
        assert (done.files_done, done.bytes_done) == (4, done.bytes_total)
        assert (n.jobs.running, n.ended) == (0, 1)
        assert hub.workers.bytes_sent == len(BIG) + len(SMALL)
        assert all(info.sealed and not info.in_use for info in n.store.listing())


@pytest.mark.trio
async def test_a_prefetch_of_what_is_there_asks_for_no_bytes(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        sent = hub.workers.bytes_sent
        again = await n.fetch("org/name")
        assert hub.workers.bytes_sent == sent
        assert again.bytes_done == again.bytes_total


@pytest.mark.trio
async def test_a_prefetch_of_a_subfolder_fetches_that(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        job = await n.fetch("org/name/copy")
        assert (job.files_total, job.bytes_total) == (1, len(BIG))
        assert n.cached(SMALL_BLOB) == 0
        with pytest.raises(Absent, match="has no folder 'cop'"):
            await n.jobs.prefetch(parse_target("org/name/cop"), ACCESS)


@pytest.mark.trio
async def test_what_the_hub_says_of_the_target_is_raised(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        with pytest.raises(Absent):
            await n.jobs.prefetch(parse_target("org/missing"), ACCESS)
        hub.denied.add(ACCESS)
        with pytest.raises(Denied):
            await n.jobs.prefetch(TARGET, ACCESS)
        assert n.jobs.running == 0


@pytest.mark.trio
async def test_a_file_that_fails_does_not_stop_the_others(tmp_path: Path, hub: MemoryHub) -> None:
    hub.workers.fault("fetch", failed("no_space", "the disk is full"), where=_small, times=None)
    async with node(tmp_path, hub) as n:
        job = await n.end_of(await n.jobs.prefetch(TARGET, ACCESS))
        assert job.state == "failed"
        [problem] = job.problems
        assert problem.startswith("org/name/config.json: the disk is full. Free space")
        assert (job.files_done, job.bytes_done) == (4, job.bytes_total - len(SMALL))
        assert n.cached(BIG_BLOB) == len(BIG)
        assert all(not info.in_use for info in n.store.listing())


def _small(order: object) -> bool:
    return isinstance(order, Fetch) and order.blob_size == len(SMALL)


@pytest.mark.trio
async def test_what_nobody_foresaw_ends_one_file_and_not_the_daemon(
    tmp_path: Path, hub: MemoryHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with node(tmp_path, hub) as n:
        really = n.blobs.fetcher.open

        def fail(provenance: Provenance) -> object:
            if provenance.entry.path == "config.json":
                raise KeyError("hf_secret")
            return really(provenance)

        monkeypatch.setattr(n.blobs.fetcher, "open", fail)
        job = await n.end_of(await n.jobs.prefetch(TARGET, ACCESS))
        assert job.state == "failed"
        assert job.problems == ["The daemon failed (KeyError); its log has the details."]
        assert n.cached(BIG_BLOB) == len(BIG)
        assert "unforeseen" in caplog.text


@pytest.mark.trio
async def test_problems_are_bounded(tmp_path: Path) -> None:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.plain(f"{n}", b"%d" % n) for n in range(PROBLEMS_MAX + 20)], "main")
    hub.workers.fault("fetch", failed("no_space", "the disk is full"), times=None)
    async with node(tmp_path, hub) as n:
        job = await n.end_of(await n.jobs.prefetch(TARGET, ACCESS))
        assert (job.files_done, len(job.problems)) == (PROBLEMS_MAX + 20, PROBLEMS_MAX)


@pytest.mark.trio
async def test_a_cancelled_prefetch_keeps_what_came_and_fetches_no_more(tmp_path: Path, hub: MemoryHub) -> None:
    held = hub.workers.fault("fetch", hold=True, times=None, where=lambda o: isinstance(o, Fetch) and o.start >= CHUNK)
    async with node(tmp_path, hub) as n:
        job = await n.jobs.prefetch(TARGET, ACCESS)
        await held.reached.wait()
        n.jobs.cancel(job.id)
        ended = await n.end_of(job)
        assert ended.state == "cancelled"
        held.release()
        ordered = len(hub.workers.fetches)
        await trio.testing.wait_all_tasks_blocked()
        assert len(hub.workers.fetches) == ordered  # what was under way came, nothing was added
        assert CHUNK <= n.cached(BIG_BLOB) < len(BIG)
        assert n.jobs.cancel(job.id).state == "cancelled"
        assert (await n.fetch("org/name")).state == "done"
        assert hub.workers.bytes_sent == len(BIG) + len(SMALL)  # no byte twice


@pytest.mark.trio
async def test_cancelling_one_job_leaves_another_what_it_wants(tmp_path: Path, hub: MemoryHub) -> None:
    held = hub.workers.fault("fetch", hold=True, times=None)
    async with node(tmp_path, hub) as n:
        one = await n.jobs.prefetch(TARGET, ACCESS)
        other = await n.jobs.prefetch(parse_target("org/other"), ACCESS)
        await held.reached.wait()
        await trio.testing.wait_all_tasks_blocked()
        n.jobs.cancel(one.id)
        assert (await n.end_of(one)).state == "cancelled"
        held.release()
        assert (await n.end_of(other)).state == "done"


@pytest.mark.trio
async def test_only_a_few_files_are_under_way_at_once(tmp_path: Path) -> None:
    hub = MemoryHub()
    hub.commit(MODEL, FIRST, [hub.plain(f"{n}", b"%d" % n) for n in range(30)], "main")
    held = hub.workers.fault("locate", hold=True, times=None)
    async with node(tmp_path, hub) as n:
        job = await n.jobs.prefetch(TARGET, ACCESS)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(info.in_use for info in n.store.listing()) == FILES_AT_ONCE
        held.release()
        assert (await n.end_of(job)).files_done == 30


@pytest.mark.trio
async def test_the_rate_is_of_what_comes_and_not_of_what_was_there(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name/copy")
        held = hub.workers.fault("fetch", hold=True, times=None)
        job = await n.jobs.prefetch(TARGET, ACCESS)
        await held.reached.wait()
        mock_clock.jump(1)
        assert n.jobs[job.id].rate == 0
        held.release()
        await n.end_of(job)


# Verifying -----------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_a_verification_finds_nothing_where_all_is_well(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        job = n.jobs.verify([info.id for info in n.store.listing()])
        assert (job.kind, job.name, job.bytes_total) == ("verify", "cache", len(BIG) + len(SMALL))
        done = await n.end_of(job)
        assert (done.state, done.files_done, done.bytes_done) == ("done", 2, done.bytes_total)
        assert n.discarded == []


@pytest.mark.trio
async def test_a_damaged_blob_is_a_problem_also_where_it_was_repaired(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        for repair in (None, ACCESS):
            n.damage(BIG_BLOB, 3 * CHUNK + 17)
            done = await n.end_of(n.jobs.verify([info.id for info in n.store.listing()], repair=repair))
            assert (done.state, done.damaged, done.repaired) == ("failed", 1, 1 if repair else 0)
            assert len(done.problems) == 1
            await n.fetch("org/name")
        numbers = samples(n.telemetry.metrics)
        outcomes = [
            numbers[f"manta_verified_blobs_total{{outcome={name}}}"] for name in ("sound", "damaged", "repaired")
        ]
        assert outcomes == [2, 1, 1]


@pytest.mark.trio
async def test_a_verification_looks_at_what_was_asked_for(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        n.damage(BIG_BLOB, 0)
        assert SMALL_BLOB is not None
        assert BIG_BLOB is not None
        assert (await n.end_of(n.jobs.verify([SMALL_BLOB]))).state == "done"
        gone = MemoryHub().lfs("x", b"gone").blob
        assert gone is not None
        assert (await n.end_of(n.jobs.verify([BIG_BLOB, gone]))).files_total == 1
        assert n.cached(BIG_BLOB) == len(BIG) - CHUNK


@pytest.mark.trio
async def test_a_cancelled_verification_ends_with_the_order_it_is_at(tmp_path: Path, hub: MemoryHub) -> None:
    held = hub.workers.fault("verify", hold=True)
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name/copy")
        assert BIG_BLOB is not None
        job = n.jobs.verify([BIG_BLOB])
        await held.reached.wait()
        n.jobs.cancel(job.id)
        ended = await n.end_of(job)
        assert (ended.state, ended.bytes_done) == ("cancelled", 0)
        assert all(not info.in_use for info in n.store.listing())


@pytest.mark.trio
async def test_a_blob_that_cannot_be_verified_is_a_problem_and_the_others_are_verified(
    tmp_path: Path, hub: MemoryHub
) -> None:
    hub.workers.fault("verify", failed("unavailable", "its worker process ended"), where=_of_small)
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
        done = await n.end_of(n.jobs.verify([info.id for info in n.store.listing()]))
        assert (done.state, done.files_done, done.damaged) == ("failed", 2, 0)
        assert done.problems == [f"{SMALL_BLOB} could not be verified: its worker process ended. Try again."]
        assert done.bytes_done == len(BIG)


def _of_small(order: object) -> bool:
    return isinstance(order, Verify) and order.chunks[0][1] == len(SMALL)


# What is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_what_never_was_is_absent(tmp_path: Path) -> None:
    async with node(tmp_path) as n:
        for ask in (n.jobs.__getitem__, n.jobs.cancel):
            with pytest.raises(Absent, match=r"no job '7'; it may have ended more than 10 minutes ago"):
                ask("7")


@pytest.mark.trio
async def test_a_job_that_ended_is_kept_for_a_while(
    tmp_path: Path, hub: MemoryHub, mock_clock: trio.testing.MockClock
) -> None:
    async with node(tmp_path, hub) as n:
        first = await n.end_of(n.jobs.verify([]))
        mock_clock.jump(KEPT_SECONDS - 1)
        second = await n.end_of(n.jobs.verify([]))
        assert n.jobs[first.id] == first
        mock_clock.jump(2)
        n.jobs.verify([])
        with pytest.raises(Absent):
            n.jobs[first.id]
        assert n.jobs[second.id] == second


@pytest.mark.trio
async def test_a_job_that_ended_says_what_was_true_then(tmp_path: Path, hub: MemoryHub) -> None:
    async with node(tmp_path, hub) as n:
        done = await n.fetch("org/name")
        for info in n.store.listing():
            n.store.remove(info.id)
        assert n.jobs[done.id] == done


@pytest.mark.trio
async def test_the_past_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "KEPT_MAX", 3)
    async with node(tmp_path) as n:
        ids = []
        for _ in range(10):
            ids.append((await n.end_of(n.jobs.verify([]))).id)  # noqa: PERF401
        assert n.jobs[ids[-1]].state == "done"
        with pytest.raises(Absent):
            n.jobs[ids[0]]
        assert len(n.jobs._jobs) == 4


@pytest.mark.trio
async def test_running_jobs_are_bounded(tmp_path: Path, hub: MemoryHub) -> None:
    hub.workers.fault("locate", hold=True, times=None)
    async with node(tmp_path, hub) as n:
        running = [await n.jobs.prefetch(TARGET, ACCESS) for _ in range(RUNNING_MAX)]
        with pytest.raises(InUse, match=r"64 jobs are running already. Wait for one to end"):
            await n.jobs.prefetch(TARGET, ACCESS)
        n.jobs.cancel(running[0].id)
        await n.end_of(running[0])
        n.jobs.verify([])


@pytest.mark.trio
async def test_the_log_says_what_ran_and_how_it_ended(
    tmp_path: Path, hub: MemoryHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with node(tmp_path, hub) as n:
        await n.fetch("org/name")
    assert f"prefetch of org/name@{FIRST} begins: 4 files" in caplog.text
    assert f"prefetch of org/name@{FIRST}: done" in caplog.text
    assert "hf_secret" not in caplog.text
