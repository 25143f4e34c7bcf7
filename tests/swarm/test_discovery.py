"""Who the other nodes might be: lists, and names that are looked up again and again."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from manta.swarm.discovery import discover, resolve
from tests.swarm.fake_member import run, until

Answer = list[str] | Exception


class NameServer:
    """What getaddrinfo answers: IP addresses, or an error. `hang` makes it wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: Answer = []
        self.asked: list[tuple[str, int]] = []
        self.hang: threading.Event | None = None
        monkeypatch.setattr(socket, "getaddrinfo", self._look_up)

    def _look_up(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        self.asked.append((host, port))
        if self.hang is not None:
            self.hang.wait(10.0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in self.answer]


class Heard:
    def __init__(self) -> None:
        self.found: list[frozenset[str]] = []
        self.trouble = ""

    def tell(self, sentence: str) -> None:
        self.trouble = sentence


def looked_up(story: Callable[[Heard], Any], **options: float) -> None:
    """Runs `story` beside the look-ups of manta.example:9402."""

    async def whole() -> None:
        heard = Heard()
        quick = {"every_s": 0.01, "deadline_s": 0.1, "trouble_after_s": 0.03} | options
        looking = asyncio.create_task(resolve("manta.example:9402", heard.found.append, heard.tell, **quick))
        try:
            await story(heard)
            assert not looking.done()
        finally:
            looking.cancel()
            with suppress(asyncio.CancelledError):
                await looking

    run(whole)


def test_a_list_is_told_once_in_one_spelling() -> None:
    async def story() -> None:
        heard = Heard()
        task = asyncio.create_task(
            discover("static:10.0.0.1:9402, [::1]:09402,node.example:1", heard.found.append, heard.tell)
        )
        await until(lambda: bool(heard.found))
        assert heard.found == [frozenset({"10.0.0.1:9402", "[::1]:9402", "node.example:1"})]
        assert not task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(story)


def test_a_name_is_looked_up_again_and_told_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch)
    server.answer = ["10.0.0.1", "fd00::1", "10.0.0.1"]

    async def story(heard: Heard) -> None:
        await until(lambda: len(server.asked) > 3)
        assert heard.found == [frozenset({"10.0.0.1:9402", "[fd00::1]:9402"})]
        assert set(server.asked) == {("manta.example", 9402)}
        server.answer = ["10.0.0.2"]
        await until(lambda: heard.found[-1] == frozenset({"10.0.0.2:9402"}))
        assert heard.trouble == ""

    looked_up(story)


@pytest.mark.parametrize("code", [socket.EAI_NONAME, socket.EAI_NODATA])
def test_a_name_without_addresses_is_nobody_yet(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    server = NameServer(monkeypatch)
    server.answer = socket.gaierror(code, "no such name")

    async def story(heard: Heard) -> None:
        await until(lambda: len(server.asked) > 10)
        assert heard.found == [frozenset()]
        assert heard.trouble == ""
        server.answer = ["10.0.0.1"]
        await until(lambda: heard.found[-1] == frozenset({"10.0.0.1:9402"}))

    looked_up(story)


def test_a_look_up_that_fails_keeps_who_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch)
    server.answer = ["10.0.0.1"]

    async def story(heard: Heard) -> None:
        await until(lambda: bool(heard.found))
        server.answer = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        await until(lambda: heard.trouble != "")
        assert "manta.example" in heard.trouble
        assert "Temporary failure" in heard.trouble
        assert heard.found == [frozenset({"10.0.0.1:9402"})]
        server.answer = ["10.0.0.1"]
        await until(lambda: heard.trouble == "")
        assert len(heard.found) == 1

    looked_up(story)


def test_a_failure_that_passes_soon_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch)
    server.answer = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    async def story(heard: Heard) -> None:
        await until(lambda: len(server.asked) > 5)
        assert heard.trouble == ""

    looked_up(story, trouble_after_s=3600.0)


def test_one_look_up_hangs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch)
    server.hang = threading.Event()
    server.answer = ["10.0.0.1"]

    async def story(heard: Heard) -> None:
        await until(lambda: "no answer" in heard.trouble)
        assert len(server.asked) == 1
        assert server.hang is not None
        server.hang.set()
        await until(lambda: heard.found == [frozenset({"10.0.0.1:9402"})])
        await until(lambda: heard.trouble == "")

    looked_up(story, deadline_s=0.01)


def test_leaving_while_a_look_up_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch)
    server.hang = threading.Event()

    async def story(_heard: Heard) -> None:
        await until(lambda: bool(server.asked))

    threading.Timer(0.2, server.hang.set).start()
    looked_up(story)


def test_localhost_is_found_for_real() -> None:
    async def story() -> None:
        heard = Heard()
        task = asyncio.create_task(discover("dns:localhost:9402", heard.found.append, heard.tell))
        await until(lambda: bool(heard.found))
        assert heard.found[0] & {"127.0.0.1:9402", "[::1]:9402"}
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(story)
