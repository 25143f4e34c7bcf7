"""The pool with real worker processes against the real local hub: what dies is replaced, what hangs is killed, and nothing is left."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from manta.cache.digests import chunk_digest
from manta.errors import Unavailable
from manta.fetch import process
from manta.fetch import workers as module
from manta.fetch.workers import OrderControl, WorkerPool
from manta.telemetry.events import Telemetry
from manta.testing.hub import Generated, GeneratedContent, HubProcess, HubSpec, RepoSpec, faults
from manta.wire.channel import receive_nowait
from manta.wire.messages import Digested, Failed, Fetch, Fetched, Located, Pull
from tests.telemetry.scrape import samples

SIZE = 2_000_000
REPO, FILE = "manta/one", "model.bin"
DATA = GeneratedContent("one", SIZE).read()
pytestmark = [pytest.mark.trio, pytest.mark.timeout(60)]


def watched() -> OrderControl:
    return OrderControl(wanted=True)


@pytest.fixture(scope="module")
def _pool_hub() -> Iterator[HubProcess]:
    with HubProcess(HubSpec(repos=[RepoSpec(id=REPO, files={FILE: Generated("one", SIZE)})])) as hub:
        yield hub


@pytest.fixture
def hub(_pool_hub: HubProcess) -> HubProcess:
    _pool_hub.reset()
    return _pool_hub


@pytest.fixture
def cache_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Processes of ours, zombies among them."""
    own = os.getpid()
    return {int(pid) for task in os.listdir(f"/proc/{own}/task") for pid in _children_of(own, task)}


def _children_of(pid: int, task: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{task}/children").read_text().split()


@asynccontextmanager
async def running(fetchers: int = 1) -> AsyncIterator[WorkerPool]:
    """A pool, after which no process and no descriptor may be left."""
    await trio.to_thread.run_sync(lambda: None)  # trio's thread machinery keeps its own
    fds, processes = open_fds(), children()
    pool = WorkerPool(fetchers)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.run)
        yield pool
        nursery.cancel_scope.cancel()
    assert children() == processes
    assert open_fds() == fds
    assert pool.pids == []


async def in_thread(work: Callable[[], object]) -> None:
    await trio.to_thread.run_sync(work)


async def locate(pool: WorkerPool, hub: HubProcess) -> str:
    url = f"{hub.endpoint}/{REPO}/resolve/{hub.files(REPO).commit}/{FILE}"
    answer = await pool.locate(url, {}, 20.0)
    assert isinstance(answer, Located)
    return answer.headers["location"]


def order(url: str, start: int = 0, end: int = 1_000_000, stall_s: float = 20.0) -> Callable[[int], Fetch]:
    return lambda number: Fetch(number, url, {}, start, end, [(start, end)], SIZE, stall_s)


async def test_what_a_worker_writes_to_stderr_becomes_a_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The interpreter's own words of one that cannot start, for instance."""
    complains = tmp_path / "python"
    complains.write_text("#!/bin/sh\necho 'Traceback:' >&2; echo '  no module' >&2; exit 3\n")
    complains.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(complains))
    telemetry = Telemetry()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(WorkerPool(1, telemetry).run)
        with trio.fail_after(30):
            while "fetch worker says" not in caplog.text or "exit code 3" not in caplog.text:
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    said = next(r for r in caplog.records if r.getMessage().startswith("a fetch worker says"))
    assert said.getMessage() == "a fetch worker says: Traceback:\n  no module"
    assert said.__dict__["fields"]["role"] == "fetch"
    assert samples(telemetry.metrics)["manta_worker_restarts_total{role=fetch}"] >= 1


async def test_orders_are_carried_out(hub: HubProcess, cache_fd: int) -> None:
    async with running(fetchers=2) as pool:
        url = await locate(pool, hub)
        told: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:

            async def fetch(start: int) -> None:
                make = order(url, start, start + 100_000)
                answer = await pool.fetch(make, cache_fd, lambda at, upto: told.append((at, upto)), watched())
                assert isinstance(answer, Fetched)
                assert answer.digest == chunk_digest(DATA[start : start + 100_000])

            for start in range(0, SIZE, 100_000):
                nursery.start_soon(fetch, start)
        assert sum(upto - at for at, upto in told) == SIZE
        sha256 = hashlib.sha256(DATA).hexdigest()
        answer = await pool.digest(f"sha256-{sha256}", 0, SIZE, SIZE, cache_fd)
        assert answer == Digested(answer.order, SIZE, sha256)
        assert len(pool.pids) == 3


async def test_a_worker_that_is_killed_fails_its_orders_and_is_replaced(hub: HubProcess, cache_fd: int) -> None:
    async with running() as pool:
        url = await locate(pool, hub)
        hub.add_fault(faults.Stall(after_bytes=200_000, seconds=60), origin="cdn", times=1)
        before = set(pool.pids)
        came = trio.Event()
        async with trio.open_nursery() as nursery:

            async def fetch() -> None:
                answer = await pool.fetch(order(url), cache_fd, lambda *_: came.set(), watched())
                assert isinstance(answer, Failed)
                assert answer.reason == "unavailable"
                assert "its worker process ended" in answer.message

            nursery.start_soon(fetch)
            await came.wait()
            fetcher = _fetcher_of(pool)
            os.kill(fetcher, signal.SIGKILL)
        answer = await pool.fetch(order(url), cache_fd, lambda *_: None, watched())
        assert isinstance(answer, Fetched)
        assert fetcher not in pool.pids
        assert len(set(pool.pids) - before) == 1


async def test_a_worker_that_hangs_is_killed_and_replaced(
    hub: HubProcess, cache_fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_SLACK_SECONDS", 0.2)
    async with running() as pool:
        url = await locate(pool, hub)
        stuck = _fetcher_of(pool)
        os.kill(stuck, signal.SIGSTOP)
        answer = await pool.fetch(order(url, stall_s=0.1), cache_fd, lambda *_: None, watched())
        assert isinstance(answer, Failed)
        assert "was stuck" in answer.message
        assert isinstance(await pool.fetch(order(url), cache_fd, lambda *_: None, watched()), Fetched)
        assert stuck not in pool.pids


async def test_a_worker_that_never_gets_ready_is_replaced(
    hub: HubProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    real, started = sys.executable, trio.Event()
    monkeypatch.setattr(module, "START_SECONDS_MAX", 0.2)
    monkeypatch.setattr(sys, "executable", str(hangs))
    spawn = module._spawn

    def spy(role: module.Role) -> module._Worker:
        if len(seen) == 2:  # one of each role was given up or is about to be
            monkeypatch.setattr(module, "START_SECONDS_MAX", 20.0)
            monkeypatch.setattr(sys, "executable", real)
            started.set()
        seen.append(role)
        return spawn(role)

    seen: list[str] = []
    monkeypatch.setattr(module, "_spawn", spy)
    async with running() as pool:
        with pytest.raises(Unavailable, match="No fetch worker process could be started"):
            await pool.locate("http://nobody.invalid/", {}, 1.0)
        await started.wait()
        assert isinstance(await locate(pool, hub), str)


async def test_a_process_that_cannot_be_started_is_tried_again(
    hub: HubProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    popen = subprocess.Popen
    refused: list[int] = []

    def refuse(*arguments: object, **options: object) -> object:
        if len(refused) < 3:
            refused.append(1)
            raise OSError(11, "Resource temporarily unavailable")
        return popen(*arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", refuse)
    async with running() as pool:
        assert await locate(pool, hub)
    assert "can be started (Resource temporarily unavailable)" in caplog.text


async def test_a_worker_that_talks_nonsense_is_replaced(
    hub: HubProcess, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running() as pool:
        await locate(pool, hub)
        (worker,) = [w for w in pool._workers if w.role == "fetch"]
        # From the daemon's end it looks the same as if the worker had sent it.
        sock = worker.channel._socket

        def nonsense(from_: socket.socket) -> tuple[bytes, int | None]:
            data, fd = receive_nowait(from_)
            return (b"nonsense", fd) if from_ is sock else (data, fd)

        monkeypatch.setattr(process, "receive_nowait", nonsense)
        answer = await pool.locate(f"{hub.endpoint}/", {}, 20.0)
        assert isinstance(answer, Failed)
        assert await locate(pool, hub)
        assert worker.process.pid not in pool.pids
    assert "no message" in caplog.text


async def test_an_order_that_is_cancelled_is_cancelled_in_the_worker(hub: HubProcess, cache_fd: int) -> None:
    async with running() as pool:
        url = await locate(pool, hub)
        hub.add_fault(faults.Stall(after_bytes=1000, seconds=60), origin="cdn", times=1)
        came = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.fetch, order(url), cache_fd, lambda *_: came.set(), watched())
            await came.wait()
            nursery.cancel_scope.cancel()
        (worker,) = [w for w in pool._workers if w.role == "fetch"]
        assert not worker.pending
        await in_thread(lambda: hub.wait_for(1, origin="cdn", finished=True, timeout_s=10))
        assert isinstance(await pool.fetch(order(url), cache_fd, lambda *_: None, watched()), Fetched)


async def test_an_order_that_is_too_large_is_a_failure_and_no_crash() -> None:
    async with running() as pool:
        answer = await pool.locate("http://nobody.invalid/" + "x" * 100_000, {}, 1.0)
        assert isinstance(answer, Failed)
        assert "exceeds" in answer.message
        assert not any(worker.pending for worker in pool._workers)


async def test_without_a_worker_readers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_SECONDS_MAX", 0.05)
    with pytest.raises(Unavailable, match="see the daemon's log"):
        await WorkerPool(1).locate("http://nobody.invalid/", {}, 1.0)


async def test_workers_that_all_end_at_their_start_are_told_to_who_waits(
    hub: HubProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o700)
    real = sys.executable
    monkeypatch.setattr(sys, "executable", str(broken))
    async with running(2) as pool:
        with pytest.raises(Unavailable, match=r"No fetch worker process stays up.*exit code 7 before it was ready"):
            await locate(pool, hub)
        monkeypatch.setattr(sys, "executable", real)
        while True:  # it comes back by itself
            try:
                assert await locate(pool, hub)
                break
            except Unavailable:
                await trio.sleep(0.05)


async def test_it_ends_while_orders_are_under_way(hub: HubProcess, cache_fd: int) -> None:
    async with running(fetchers=2) as pool:
        url = await locate(pool, hub)
        hub.add_fault(faults.Stall(after_bytes=1000, seconds=60), origin="cdn")
        came = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(pool.fetch, order(url), cache_fd, lambda *_: came.set(), watched())
            await came.wait()
            began = time.monotonic()
            nursery.cancel_scope.cancel()
    assert time.monotonic() - began < 10


async def test_what_lies_in_the_working_directory_is_not_imported(
    hub: HubProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("aiohttp", "msgspec", "queue", "email"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')\n")
    monkeypatch.chdir(tmp_path)
    async with running() as pool:
        assert await locate(pool, hub)


@pytest.mark.parametrize("fetchers", [0, 17])
async def test_the_number_of_workers_is_bounded(fetchers: int) -> None:
    with pytest.raises(ValueError, match="1 to 16"):
        WorkerPool(fetchers)


def _fetcher_of(pool: WorkerPool) -> int:
    (pid,) = [worker.process.pid for worker in pool._workers if worker.role == "fetch"]
    return pid


async def test_a_pull_is_a_fetch_workers(cache_fd: int) -> None:
    """Of a node that answers like a worker's own tests have it; here, that nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    blob = "sha256-" + "0" * 64
    async with running() as pool:
        answer = await pool.pull(
            lambda n: Pull(n, address, "b" * 16, "a" * 16, blob, SIZE, 0, 0, SIZE, [(0, SIZE)], 5.0, 5.0),
            cache_fd,
            lambda *_: None,
            watched(),
        )
    assert isinstance(answer, Failed)
    assert (answer.reason, answer.unreachable) == ("unavailable", True)
