"""Which event is due about a pod's model."""

from __future__ import annotations

import msgspec
import pytest

from manta.control.protocol import Mount, Pod
from manta_csi.events import EVENTS_MAX, SLOW_S, Event, Told, due
from tests.csi.test_node import mount as any_mount

POD = Pod("u", "server-0", "default", "csi-1")


def mount(cached: int, *errors: str) -> Mount:
    return any_mount(size=10_000_000_000, cached=cached * 100_000_000, errors=list(errors), pod=POD, rate=1.25e9)


def told(*looks: tuple[float, Mount, bool]) -> list[Event]:
    """The events of a series of looks: when, what, and whether somebody waits."""
    memory: Told | None = None
    events = []
    for now, seen, reading in looks:
        memory, event = due(seen, memory, reading=reading, now=now)
        if event is not None:
            events.append(event)
    return events


def test_progress_is_told_in_steps() -> None:
    events = told(*((at, mount(at), True) for at in range(101)))
    assert [event.reason for event in events] == ["ModelLoading"] * 3 + ["ModelLoaded"]
    assert events[0].message == "org/name: 2.5 GB of 10.0 GB are on the node (25 %), 1.2 GB/s now."
    assert {event.pod for event in events} == {POD}


def test_a_model_that_was_there_says_nothing() -> None:
    assert told((0, mount(100), False), (10, mount(100), True)) == []


def test_a_slow_start_is_told_once_and_only_while_somebody_waits() -> None:
    assert told((0, mount(5), False), (SLOW_S * 9, mount(5), False)) == []
    events = told(*((at * 10.0, mount(5), True) for at in range(20)))
    assert [event.reason for event in events] == ["ModelSlow"]
    assert "nothing has come for 60 s" in events[0].message
    # Who begins to read after an idle hour has not waited for an hour.
    assert told((0, mount(5), False), (3600, mount(5), False), (3601, mount(5), True)) == []


def test_an_error_is_told_once() -> None:
    events = told((0, mount(5), True), (1, mount(5, "The hub is away."), True), (2, mount(5, "The hub is away."), True))
    assert [(event.kind, event.message) for event in events] == [("Warning", "The hub is away.")]


def test_there_is_a_bound() -> None:
    assert len(told(*((at, mount(5, f"error {at}"), True) for at in range(50)))) == EVENTS_MAX


def test_an_event_object() -> None:
    announcer = pytest.importorskip("manta_csi.events").Announcer
    pytest.importorskip("kubernetes_asyncio")
    body = announcer(None, "csi.manta.dev", "node-1").body(
        Event(POD, "Warning", "ModelReadFailed", "With hf_" + "x" * 30 + " in it")
    )
    assert body["involvedObject"]["uid"] == "u"
    assert body["metadata"]["namespace"] == "default"
    assert "xxx" not in body["message"]
    assert msgspec.json.encode(body)
