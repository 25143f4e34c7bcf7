"""The deck of the `faults` benchmark: one fault for every 50 requests, each card once before any comes again."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks.faults import MIX, REQUESTS_PER_FAULT, Deck
from manta.testing.hub.faults import Rule, RuleState

CARDS = sum(cards for _, cards in MIX.values())


class Hub:
    """The part of HubProcess that a deck needs; its rules strike the first `requests` requests."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.rules: dict[int, Rule] = {}

    def add_fault(self, action: Any, **conditions: Any) -> int:
        self.rules[len(self.rules)] = Rule(action=action, **conditions)
        return len(self.rules) - 1

    def faults(self) -> list[RuleState]:
        return [
            RuleState(number, rule, self.requests, int(rule.skip < self.requests))
            for number, rule in self.rules.items()
        ]


def deal(deck: Deck, requests: int) -> tuple[Counter[str], list[int]]:
    hub: Any = Hub(requests)
    deck.deal(hub, 2 * requests)
    return deck.collect(hub), [rule.skip for rule in hub.rules.values()]


def test_two_percent_of_the_requests_are_struck() -> None:
    struck, places = deal(Deck(1), 20 * REQUESTS_PER_FAULT)
    assert struck.total() == 20
    assert [place // REQUESTS_PER_FAULT for place in places] == list(range(40))


def test_a_deck_is_dealt_before_a_card_comes_again() -> None:
    deck = Deck(2)
    struck = Counter[str]()
    for _ in range(4):
        struck += deal(deck, CARDS * REQUESTS_PER_FAULT // 4)[0]
    assert struck == {name: cards for name, (_, cards) in MIX.items()}


def test_the_seed_says_it_all() -> None:
    assert deal(Deck(3), 500) == deal(Deck(3), 500)
    assert deal(Deck(3), 500) != deal(Deck(4), 500)
