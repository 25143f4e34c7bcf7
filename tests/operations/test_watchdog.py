from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from manta.operations import watchdog as module
from manta.operations.watchdog import EXIT_CODE, Watchdog


class Ending:
    """What a watchdog does, without ending this process."""

    def __init__(self) -> None:
        self.steps: list[object] = []
        self.over = threading.Event()

    def last_resort(self) -> None:
        self.steps.append("aborted")

    def exit(self, code: int) -> None:
        self.steps.append(code)
        self.over.set()


@pytest.fixture
def ending() -> Ending:
    return Ending()


def test_an_end_that_takes_too_long_is_forced(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_RESORT_SECONDS", 0.01)
    with Watchdog(ending.last_resort, exit_now=ending.exit) as watchdog:
        watchdog.start()
        assert ending.over.wait(10)
    assert ending.steps == ["aborted", EXIT_CODE]


def test_an_orderly_end_is_left_alone(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_RESORT_SECONDS", 0.2)
    with Watchdog(ending.last_resort, exit_now=ending.exit) as watchdog:
        watchdog.start()
    assert not ending.over.wait(0.4)


def test_nothing_happens_before_the_end_begins(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_RESORT_SECONDS", 0.0)
    monkeypatch.setattr(module, "HURRY_SECONDS", 0.0)
    with Watchdog(ending.last_resort, exit_now=ending.exit) as watchdog:
        watchdog.hurry()
        assert not ending.over.wait(0.1)


def test_hurrying_brings_it_forward_and_starting_again_does_not_put_it_off(
    ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HURRY_SECONDS", 0.01)
    with Watchdog(ending.last_resort, exit_now=ending.exit) as watchdog:
        watchdog.start()
        watchdog.hurry()
        watchdog.start()
        assert ending.over.wait(10)


def test_a_last_resort_that_fails_does_not_keep_the_process(ending: Ending, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_RESORT_SECONDS", 0.0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fail() -> None:
        raise OSError("no such connection")

    with Watchdog(fail, exit_now=ending.exit) as watchdog:
        watchdog.start()
        assert ending.over.wait(10)
    assert ending.steps == [EXIT_CODE]


SIGNALLED = """
import os, signal, sys, threading, time
from manta.operations import watchdog
watchdog.LAST_RESORT_SECONDS = float(sys.argv[1])
watchdog.HURRY_SECONDS = 0.01
told = []
with watchdog.Watchdog(lambda: print("aborted", told, flush=True)) as dog:
    dog.heed_signals(told.append)
    for _ in range(int(sys.argv[2])):
        before = len(told)
        os.kill(os.getpid(), signal.SIGTERM)
        while len(told) == before:
            time.sleep(0.001)
    time.sleep(30)
"""


@pytest.mark.parametrize(("seconds", "signals", "told"), [(0.05, 1, "[False]"), (20, 2, "[False, True]")])
def test_signals_are_heeded_while_the_main_thread_hangs(seconds: float, signals: int, told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(seconds), str(signals)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (EXIT_CODE, f"aborted {told}")
