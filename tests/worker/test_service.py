"""The worker as a process of its own, over its socket: it takes orders, answers each once, and ends with the daemon."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from manta.cache.digests import chunk_digest
from manta.testing import scratch
from manta.testing.hub import HubProcess, faults
from manta.wire.channel import Closed, pair, receive_nowait, send_nowait
from manta.wire.messages import (
    Cancel,
    Digest,
    Digested,
    Failed,
    Fetch,
    Fetched,
    FromWorker,
    Locate,
    Located,
    Message,
    Progress,
    Pull,
    Ready,
    decode_from_worker,
    encode,
)
from tests.worker.conftest import FILE, REPO, SIZE, TOKEN

PATIENCE_S = 20.0


@dataclass
class Worker:
    """A worker process and the daemon's end of its socket."""

    process: subprocess.Popen[str]
    socket: socket.socket

    def send(self, message: Message | bytes, fd: int | None = None) -> None:
        send_nowait(self.socket, message if isinstance(message, bytes) else encode(message), fd)

    def receive(self) -> FromWorker:
        """The next message. Raises Closed at the end."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                data, fd = receive_nowait(self.socket)
            except BlockingIOError:
                if not select.select([self.socket], [], [], deadline - time.monotonic())[0]:
                    raise TimeoutError("the worker says nothing") from None
                continue
            assert fd is None
            return decode_from_worker(data)

    def answer(self) -> FromWorker:
        """The next message that is no progress."""
        while isinstance(message := self.receive(), Progress):
            pass
        return message

    def end(self) -> int:
        """Its exit code, once its socket has ended."""
        try:
            while True:
                self.receive()
        except Closed:
            pass
        return self.process.wait(PATIENCE_S)

    def open_files(self) -> list[str]:
        return scratch.open_files(self.process.pid)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start(role: str = "fetch", environ: dict[str, str] | None = None, ready: bool = True) -> Worker:
        ours, theirs = pair()
        ours.setblocking(False)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "manta.worker", role, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environ or {})},
            )
        worker = Worker(process, ours)
        workers.append(worker)
        if ready:
            assert worker.receive() == Ready(0, process.pid)
        return worker

    yield start
    for worker in workers:
        worker.socket.close()
        worker.process.kill()
        worker.process.communicate()


def located(worker: Worker, hub: HubProcess) -> str:
    """FILE's signed URL."""
    url = f"{hub.endpoint}/{REPO}/resolve/{hub.files(REPO).commit}/{FILE}"
    worker.send(Locate(1, url, {}, PATIENCE_S))
    answer = worker.answer()
    assert isinstance(answer, Located)
    return answer.headers["location"]


def fetch(number: int, url: str, start: int = 0, end: int = 1_000_000) -> Fetch:
    return Fetch(number, url, {}, start, end, [(start, end)], SIZE, PATIENCE_S)


def test_it_locates_and_fetches(start: Callable[..., Worker], hub: HubProcess, cache_fd: int, data: bytes) -> None:
    worker = start()
    url = located(worker, hub)
    for number, at in enumerate((0, 1_000_000, 2_000_000), 2):
        worker.send(fetch(number, url, at, at + 1_000_000), cache_fd)
    answers = [worker.answer() for _ in range(3)]
    assert {a.order: a.digest for a in answers if isinstance(a, Fetched)} == {
        2: chunk_digest(data[:1_000_000]),
        3: chunk_digest(data[1_000_000:2_000_000]),
        4: chunk_digest(data[2_000_000:3_000_000]),
    }
    assert not [name for name in worker.open_files() if "cache.data" in name]
    worker.socket.close()
    assert worker.process.wait(PATIENCE_S) == 0
    assert worker.process.stderr is not None
    assert worker.process.stderr.read() == ""


def test_progress_says_what_is_in_the_file(
    start: Callable[..., Worker], hub: HubProcess, cache_fd: int, data: bytes
) -> None:
    worker = start()
    worker.send(fetch(2, located(worker, hub)), cache_fd)
    upto = 0
    while isinstance(message := worker.receive(), Progress):
        assert (message.order, message.at) == (2, upto)
        upto = message.upto
        assert os.pread(cache_fd, upto - message.at, message.at) == data[message.at : upto]
    assert isinstance(message, Fetched)
    assert upto == 1_000_000


def test_it_digests(start: Callable[..., Worker], cache_fd: int, data: bytes, hub: HubProcess) -> None:
    worker = start("digest")
    os.pwrite(cache_fd, data, 0)
    sha256 = hub.files(REPO).files[FILE].sha256
    worker.send(Digest(1, f"sha256-{sha256}", 0, 1_000_000, SIZE), cache_fd)
    assert worker.answer() == Digested(1, 1_000_000, "")
    worker.send(Digest(2, f"sha256-{sha256}", 1_000_000, SIZE, SIZE), cache_fd)
    assert worker.answer() == Digested(2, SIZE, sha256)
    worker.send(Digest(3, f"sha256-{sha256}", 1_000_000, SIZE, SIZE), cache_fd)
    answer = worker.answer()
    assert isinstance(answer, Failed)
    assert answer.reason == "absent"
    assert os.getpriority(os.PRIO_PROCESS, worker.process.pid) >= 10
    assert not [name for name in worker.open_files() if "cache.data" in name]


def test_a_digest_worker_fetches_nothing(start: Callable[..., Worker], cache_fd: int) -> None:
    worker = start("digest")
    worker.send(fetch(1, "http://nobody.invalid/"), cache_fd)
    answer = worker.answer()
    assert isinstance(answer, Failed)
    assert answer.reason == "unavailable"


def test_a_cancelled_order_is_answered_once_and_keeps_no_file(
    start: Callable[..., Worker], hub: HubProcess, cache_fd: int
) -> None:
    worker = start()
    url = located(worker, hub)
    hub.add_fault(faults.Stall(after_bytes=1000, seconds=60), origin="cdn", times=1)
    worker.send(fetch(2, url), cache_fd)
    hub.wait_for(origin="cdn")
    worker.send(Cancel(2))
    worker.send(Cancel(2))
    answer = worker.answer()
    assert isinstance(answer, Failed)
    assert (answer.order, answer.reason) == (2, "cancelled")
    worker.send(Cancel(2))
    worker.send(Cancel(77))
    worker.send(fetch(3, url), cache_fd)
    assert isinstance(worker.answer(), Fetched)
    assert not [name for name in worker.open_files() if "cache.data" in name]


def test_an_order_that_is_cancelled_before_it_began_is_answered_too(
    start: Callable[..., Worker], cache_fd: int, hub: HubProcess
) -> None:
    worker = start()
    url = located(worker, hub)
    worker.process.send_signal(signal.SIGSTOP)
    for number in range(2, 12):
        worker.send(fetch(number, url), cache_fd)
        worker.send(Cancel(number))
    worker.process.send_signal(signal.SIGCONT)
    answers = [worker.answer() for _ in range(10)]
    assert sorted(answer.order for answer in answers) == list(range(2, 12))
    assert {answer.reason for answer in answers if isinstance(answer, Failed)} == {"cancelled"}
    assert not [name for name in worker.open_files() if "cache.data" in name]


def test_a_digest_keeps_its_file_though_it_is_cancelled(
    start: Callable[..., Worker], cache_fd: int, data: bytes, hub: HubProcess
) -> None:
    """Its thread cannot be stopped: were the descriptor closed under it, it would digest whatever comes next under that number."""
    worker = start("digest")
    os.pwrite(cache_fd, data, 0)
    sha256 = hub.files(REPO).files[FILE].sha256
    worker.process.send_signal(signal.SIGSTOP)
    worker.send(Digest(1, f"sha256-{sha256}", 0, SIZE - 1, SIZE), cache_fd)
    worker.send(Cancel(1))
    worker.process.send_signal(signal.SIGCONT)
    answer = worker.answer()
    assert isinstance(answer, Failed | Digested)
    worker.send(Digest(2, f"sha256-{sha256}", SIZE - 1, SIZE, SIZE), cache_fd)
    assert worker.answer() == Digested(2, SIZE, sha256)


def test_it_ends_with_the_daemon(start: Callable[..., Worker], hub: HubProcess, cache_fd: int) -> None:
    worker = start()
    url = located(worker, hub)
    hub.add_fault(faults.Stall(after_bytes=1000, seconds=60), origin="cdn")
    worker.send(fetch(2, url), cache_fd)
    hub.wait_for(origin="cdn")
    worker.socket.close()
    assert worker.process.wait(PATIENCE_S) == 0
    assert worker.process.stderr is not None
    assert worker.process.stderr.read() == ""


@pytest.mark.parametrize("noise", [b"noise", b"\x91\xa5ready", encode(Ready(1, 2)), b"\xc1" * 60_000])
def test_what_is_no_order_ends_it(start: Callable[..., Worker], noise: bytes) -> None:
    worker = start("digest")
    worker.send(noise)
    assert worker.end() == 0
    assert worker.process.stderr is not None
    said = worker.process.stderr.read()
    assert "no message" in said
    assert "Traceback" not in said


def test_a_killed_worker_is_an_end(start: Callable[..., Worker]) -> None:
    worker = start("digest")
    worker.process.kill()
    assert worker.end() == -signal.SIGKILL


def test_it_leaves_ctrl_c_to_the_daemon(start: Callable[..., Worker], cache_fd: int) -> None:
    worker = start("digest")
    worker.process.send_signal(signal.SIGINT)
    worker.send(Digest(1, "sha256-" + "0" * 64, 0, 10, SIZE), cache_fd)
    assert worker.answer() == Digested(1, 10, "")


def test_it_dies_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """The daemon's end of the socket lives on in another process here, so only the signal can tell."""
    ours, theirs = pair()
    reader, writer = os.pipe()
    code = (
        "import subprocess, sys\n"
        f"w = subprocess.Popen([sys.executable, '-m', 'manta.worker', 'digest', '{theirs.fileno()}'],"
        f" pass_fds=[{theirs.fileno()}, {writer}])\n"
        "print(w.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with ours, theirs:
        daemon = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno(), writer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.close(writer)
        assert daemon.stdout is not None
        daemon.stdout.readline()
        ours.settimeout(PATIENCE_S)
        assert isinstance(decode_from_worker(ours.recv(1000)), Ready)
        daemon.kill()
        daemon.communicate()
        # The pipe ends when the last of the two has ended.
        assert select.select([reader], [], [], PATIENCE_S)[0]
        assert os.read(reader, 1) == b""
    os.close(reader)


def test_an_answer_that_is_too_large_is_an_answer(start: Callable[..., Worker]) -> None:
    """An origin can make its headers larger than a message."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        worker = start()
        worker.send(Locate(1, f"http://127.0.0.1:{server.getsockname()[1]}/", {}, PATIENCE_S))
        connection, _ = server.accept()
        with connection:
            names = ["etag", "ratelimit", "retry-after", "x-error-code", "x-error-message", "x-linked-etag"]
            names += ["x-linked-size", "x-repo-commit", "x-xet-hash", "date"]
            head = "".join(f"{name}: {'x' * 8000}\r\n" for name in names)
            connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
            answer = worker.answer()
    assert isinstance(answer, Failed)
    assert answer.reason == "unavailable"


def test_passwords_of_other_programs_are_not_sent(
    start: Callable[..., Worker], hub: HubProcess, cache_fd: int, tmp_path: Path
) -> None:
    """Many a client would take them from ~/.netrc, and refuse to send ours beside them."""
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    netrc.chmod(0o600)
    worker = start(environ={"HOME": str(tmp_path), "NETRC": str(netrc)})
    url = f"{hub.endpoint}/manta/private/resolve/{hub.files('manta/private').commit}/{FILE}"
    worker.send(Locate(1, url, {"authorization": f"Bearer {TOKEN}"}, PATIENCE_S))
    answer = worker.answer()
    assert isinstance(answer, Located)
    assert answer.status == 302
    worker.send(Fetch(2, answer.headers["location"], {}, 0, 10_000, [(0, 10_000)], 10_000, PATIENCE_S), cache_fd)
    assert isinstance(worker.answer(), Fetched)
    assert hub.stats().violations == []


@pytest.mark.parametrize("arguments", [[], ["fetch"], ["bake", "3"], ["fetch", "x"]])
def test_a_person_is_told_what_to_run(arguments: list[str]) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "manta.worker", *arguments], capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert "manta mount" in said.stderr


def test_a_node_that_does_not_listen_is_told_of(start: Callable[..., Worker], cache_fd: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    worker = start()
    order = Pull(
        5, f"127.0.0.1:{port}", "b" * 16, "a" * 16, "sha256-" + "0" * 64, SIZE, 0, 0, SIZE, [(0, SIZE)], 5.0, 5.0
    )
    worker.send(order, cache_fd)
    answer = worker.answer()
    assert isinstance(answer, Failed)
    assert (answer.order, answer.reason, answer.unreachable, answer.behind) == (5, "unavailable", True, False)


def test_a_digest_worker_asks_no_nodes(start: Callable[..., Worker], cache_fd: int) -> None:
    worker = start("digest")
    order = Pull(5, "127.0.0.1:1", "b" * 16, "a" * 16, "sha256-" + "0" * 64, SIZE, 0, 0, SIZE, [(0, SIZE)], 5.0, 5.0)
    worker.send(order, cache_fd)
    assert worker.answer() == Failed(5, "unavailable", "reached a worker that only digests")


def test_a_pull_is_cancelled_while_nothing_comes(start: Callable[..., Worker], cache_fd: int) -> None:
    worker = start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        order = Pull(5, address, "b" * 16, "a" * 16, "sha256-" + "0" * 64, SIZE, 0, 0, SIZE, [(0, SIZE)], 20.0, 20.0)
        worker.send(order, cache_fd)
        listener.settimeout(PATIENCE_S)
        with listener.accept()[0] as asking:
            asking.settimeout(PATIENCE_S)
            assert asking.recv(10).startswith(b"GET /v1/")
            worker.send(Cancel(5))
            assert worker.answer() == Failed(5, "cancelled", "was cancelled")
    assert not any("cache.data" in name for name in worker.open_files())
