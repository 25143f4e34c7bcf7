from __future__ import annotations

import random

from manta.hub.circuit import CIRCUITS_MAX, OPEN_AFTER_S, PROBE_S, Circuit, Circuits

HUB = "https://hub:443"
WHY = "The hub could not be asked."


def opened(at: float = 100.0) -> Circuit:
    circuit = Circuit(HUB)
    circuit.failed(at - OPEN_AFTER_S, at, WHY)
    assert circuit.open
    return circuit


def test_a_new_circuit_lets_everything_through() -> None:
    circuit = Circuit(HUB)
    assert not circuit.open
    assert all(circuit.admits(0.0) for _ in range(100))
    assert circuit.wait_s(0.0) == 0


def test_failures_at_once_open_it_when_they_have_gone_on_for_a_while() -> None:
    circuit = Circuit(HUB)
    circuit.failed(0.0, 0.0, WHY)
    circuit.failed(0.5, 0.5, WHY)
    assert circuit.admits(1.0)
    assert not circuit.open
    circuit.failed(OPEN_AFTER_S, OPEN_AFTER_S, WHY)
    assert circuit.reason == WHY
    circuit.failed(OPEN_AFTER_S + 1, OPEN_AFTER_S + 1, "Another reason.")
    assert circuit.reason == "Another reason.", "the latest is the one that helps"


def test_many_failures_of_one_moment_are_one_event() -> None:
    """A balancer that restarts breaks all connections at once."""
    circuit = Circuit(HUB)
    for _ in range(50):
        circuit.failed(10.0, 10.1, WHY)
    assert not circuit.open


def test_one_long_silence_opens_it() -> None:
    circuit = Circuit(HUB)
    circuit.failed(0.0, 10.0, WHY)
    assert circuit.open


def test_an_answer_in_between_says_that_the_origin_is_there() -> None:
    """One file whose requests hang for their whole deadline, beside others that are answered."""
    circuit = Circuit(HUB)
    for tick in range(100):
        circuit.answered(tick + 0.5)
        circuit.failed(tick - 9.0, float(tick), WHY)
    assert not circuit.open


def test_an_open_circuit_lets_a_probe_through_now_and_then() -> None:
    circuit = opened(100.0)
    assert not circuit.admits(100.0)
    assert circuit.wait_s(100.5) == PROBE_S - 0.5
    assert circuit.admits(100.0 + PROBE_S)
    assert not circuit.admits(100.0 + PROBE_S)
    # Also when nobody says what became of that one.
    assert circuit.admits(100.0 + 2 * PROBE_S)


def test_any_answer_closes_it() -> None:
    circuit = opened(100.0)
    circuit.answered(101.0)
    assert not circuit.open
    assert circuit.admits(101.0)
    circuit.failed(99.0, 110.0, WHY)
    assert not circuit.open, "what was under way before it came back says nothing about now"
    circuit.failed(110.0, 110.0 + OPEN_AFTER_S, WHY)
    assert circuit.open


def test_requests_to_a_dead_origin_are_bounded_and_its_return_is_found_soon() -> None:
    """Forty askers that try as often as they may, at random moments, for a minute of outage."""
    for seed in range(200):
        chance = random.Random(seed)
        circuit, back = Circuit(HUB), 60.0
        sent = 0
        closed_at = None
        now = 0.0
        while now < back + 10:
            now += chance.expovariate(40)
            if circuit.open and not circuit.admits(now):
                continue
            sent += circuit.open
            if now < back:
                circuit.failed(now, now + chance.choice([0.0, 0.001]), WHY)
            else:
                closed_at = now if closed_at is None else closed_at
                circuit.answered(now)
        assert sent <= back / PROBE_S + 1
        assert closed_at is not None
        assert closed_at - back <= PROBE_S + 0.5


def test_a_cdn_that_has_said_nothing_since_the_hub_went_is_taken_to_be_gone_too() -> None:
    circuits = Circuits()
    hub, cdn = circuits.of(HUB), circuits.of("https://cdn:443")
    cdn.answered(90.0)
    there = "https://cdn:443"
    assert circuits.outage(there, HUB, 90.0) == ""
    hub.failed(95.0, 100.0, WHY)
    assert circuits.outage(there, HUB, 99.0) == "", "nobody knew"
    assert circuits.outage(there, HUB, 100.0) == WHY
    cdn.answered(101.0)
    assert circuits.outage(there, HUB, 101.0) == ""
    assert circuits.outage(HUB, HUB, 101.0) == WHY
    cdn.failed(102.0, 110.0, "The CDN is gone.")
    assert circuits.outage(there, HUB, 109.0) == ""
    assert circuits.outage(there, HUB, 110.0) == "The CDN is gone."


def test_circuits_are_one_per_origin_and_bounded() -> None:
    circuits = Circuits()
    hub = circuits.of(HUB)
    for number in range(CIRCUITS_MAX * 3):
        circuits.of(f"https://cdn{number}:443")
        assert circuits.of(HUB) is hub
    other = circuits.of("https://other:443")
    for number in range(CIRCUITS_MAX):
        circuits.of(f"https://host{number}:443")
    assert circuits.of("https://other:443") is not other
