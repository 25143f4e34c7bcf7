"""The scheduler: who goes first, who waits, what is never done; and a seeded simulation of hundreds of schedules."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest

from manta.fetch.scheduler import (
    BACKGROUND_BESIDE_DEMAND,
    BLOCKED_BLOBS_MAX,
    BLOCKED_MAX,
    DEMAND_ORDERS_MAX,
    OTHER_ORDERS_MAX,
    QUIET_SECONDS,
    Priority,
    Scheduler,
    Want,
)
from manta.model.ids import BlobAlgorithm, BlobId

CHUNK = 100


def blob_id(number: int) -> BlobId:
    return BlobId(BlobAlgorithm.SHA256, f"{number:064x}")


A, B, C = blob_id(1), blob_id(2), blob_id(3)


class Cache:
    """Which chunks are there: the other side of the scheduler."""

    def __init__(self, sizes: dict[BlobId, int]) -> None:
        self.sizes = sizes
        self.present: dict[BlobId, set[int]] = defaultdict(set)

    def missing(self, blob: BlobId, chunk: int) -> int | None:
        return next((c for c in range(chunk, self.sizes[blob]) if c not in self.present[blob]), None)

    def complete(self, blob: BlobId) -> bool:
        return self.missing(blob, 0) is None


class Bench:
    """A scheduler over a cache, for tests that go step by step."""

    def __init__(self, connections: int = 4, chunks: int = 20) -> None:
        self.cache = Cache({A: chunks, B: chunks, C: chunks})
        self.scheduler = Scheduler(lambda: connections, self.cache.missing)
        self.now = 0.0

    def take(self) -> list[Want]:
        """All that may go now."""
        wants = []
        while (want := self.scheduler.next(self.now)) is not None:
            wants.append(want)
        return wants

    def fetched(self, *wants: Want) -> None:
        for want in wants:
            self.cache.present[want.blob].add(want.chunk)
            self.scheduler.finished(want)

    def demand(self, blob: BlobId, *chunks: int) -> None:
        for chunk in chunks:
            self.scheduler.demand(blob, chunk, chunk * CHUNK)

    def ahead(self, blob: BlobId, *chunks: int, owner: str = "reader") -> None:
        self.scheduler.look_ahead(blob, owner, [(chunk, chunk * CHUNK) for chunk in chunks])

    def assert_nothing_left(self) -> None:
        assert not self.scheduler._blobs
        assert not self.scheduler._running
        assert not any(self.scheduler.wants(blob) for blob in (A, B, C))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def chunks(wants: Iterable[Want]) -> list[tuple[BlobId, int]]:
    return [(want.blob, want.chunk) for want in wants]


# Who goes first ----------------------------------------------------------------------------------------------------------


def test_nothing_wanted_is_nothing_to_do(bench: Bench) -> None:
    assert bench.take() == []
    bench.assert_nothing_left()


def test_the_four_priorities_go_in_their_order() -> None:
    bench = Bench(connections=8, chunks=2)
    bench.scheduler.want_whole(C, Priority.FILL)
    bench.scheduler.want_whole(B, Priority.PREFETCH)
    bench.ahead(A, 0)
    bench.demand(A, 1)
    assert [want.priority for want in bench.take()] == [
        Priority.DEMAND,
        Priority.READAHEAD,
        Priority.PREFETCH,
        Priority.PREFETCH,
    ]


def test_a_want_carries_the_byte_a_reader_waits_for(bench: Bench) -> None:
    bench.scheduler.demand(A, 3, 355)
    bench.scheduler.demand(A, 3, 399)
    assert bench.take() == [Want(A, 3, Priority.DEMAND, 355)]


def test_readahead_rises_to_demand_and_does_not_fall_back(bench: Bench) -> None:
    bench.ahead(A, 5)
    bench.demand(A, 5)
    bench.ahead(A, 5)
    assert [want.priority for want in bench.take()] == [Priority.DEMAND]


def test_a_new_window_replaces_the_old_one_and_no_demand(bench: Bench) -> None:
    bench.demand(A, 1)
    bench.ahead(A, 1, 2, 3)
    bench.ahead(A, 4, 1)
    assert chunks(bench.take()) == [(A, 1), (A, 4)]


def test_what_is_present_or_under_way_is_not_ordered(bench: Bench) -> None:
    bench.cache.present[A].add(1)
    bench.demand(A, 1, 2)
    (want,) = bench.take()
    assert want.chunk == 2
    bench.demand(A, 2)
    bench.ahead(A, 2)
    bench.scheduler.want_whole(A, Priority.FILL)
    assert 2 not in [other.chunk for other in bench.take()]


def test_blobs_take_turns() -> None:
    bench = Bench(connections=2)
    bench.demand(A, *range(6))
    bench.demand(B, *range(3))
    served = []
    running = bench.take()
    while running:
        served += running
        bench.fetched(running.pop(0))
        running += bench.take()
    first = [want.blob for want in dict.fromkeys(served)][:6]
    assert first.count(A) == first.count(B) == 3


@pytest.mark.parametrize("priority", [Priority.PREFETCH, Priority.FILL])
def test_whole_blobs_take_turns(priority: Priority) -> None:
    bench = Bench(connections=3)
    for blob in (A, B, C):
        bench.scheduler.want_whole(blob, priority)
    assert chunks(bench.take()) == [(A, 0), (B, 0), (C, 0)]


def test_the_higher_wish_for_a_whole_blob_stays(bench: Bench) -> None:
    for priority in (Priority.FILL, Priority.PREFETCH, Priority.FILL):
        bench.scheduler.want_whole(A, priority)
    assert {want.priority for want in bench.take()} == {Priority.PREFETCH}


# Limits ------------------------------------------------------------------------------------------------------------------


def test_readers_have_connections_of_their_own(bench: Bench) -> None:
    bench.scheduler.want_whole(A, Priority.FILL)
    assert len(bench.take()) == 4
    bench.demand(B, *range(10))
    assert [want.priority for want in bench.take()] == [Priority.DEMAND] * 4
    assert bench.scheduler.under_way == 8


def test_background_keeps_little_beside_readers_and_takes_all_when_they_are_done(bench: Bench) -> None:
    bench.demand(B, 0)
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    wants = bench.take()
    assert [want.priority for want in wants] == [Priority.DEMAND] + [Priority.PREFETCH] * BACKGROUND_BESIDE_DEMAND
    bench.fetched(wants[0])
    assert bench.take() == []  # the reader may be back at once
    bench.now += QUIET_SECONDS
    assert len(bench.take()) == 4 - BACKGROUND_BESIDE_DEMAND


@pytest.mark.parametrize(("first_byte_s", "beside"), [(0.003, 1), (0.06, 2), (0.09, 4), (0.12, 4)])
def test_background_beside_readers_covers_the_origins_latency(first_byte_s: float, beside: int) -> None:
    bench = Bench(connections=4)
    for _ in range(30):
        bench.scheduler.learn(first_byte_s, 0.12)
    bench.scheduler.learn(0.0, 0.0)  # too fast to tell
    bench.demand(B, 0)
    bench.scheduler.want_whole(A, Priority.FILL)
    assert len(bench.take()) == 1 + beside


# Parts of chunks ---------------------------------------------------------------------------------------------------------


def test_a_want_for_a_part_says_so_and_two_parts_are_the_whole(bench: Bench) -> None:
    bench.scheduler.demand(A, 1, 110, 120)
    bench.scheduler.demand(A, 2, 210, 220)
    bench.scheduler.demand(A, 2, 250, 260)
    assert bench.take() == [Want(A, 1, Priority.DEMAND, 110, 120), Want(A, 2, Priority.DEMAND, 210, 0)]


def test_the_rest_of_a_chunk_comes_before_what_nobody_asked_for(bench: Bench) -> None:
    bench.scheduler.demand(A, 7, 710, 720)
    bench.scheduler.want_whole(A, Priority.FILL)
    (first, *_) = bench.take()
    bench.scheduler.finished(first)
    bench.scheduler.want_rest(A, 7)
    bench.now += QUIET_SECONDS
    assert bench.take()[0] == Want(A, 7, Priority.FILL, 0)


def test_a_rest_that_failed_is_wanted_again_unless_it_was_forgotten(bench: Bench) -> None:
    bench.scheduler.want_rest(A, 7)
    (rest,) = bench.take()
    bench.scheduler.again(rest)
    assert bench.take() == [rest]
    bench.scheduler.forget(A)
    bench.scheduler.again(rest)
    assert bench.take() == []
    bench.assert_nothing_left()


def test_a_rest_that_a_reader_wants_is_fetched_once(bench: Bench) -> None:
    bench.scheduler.want_rest(A, 7)
    bench.demand(A, 7)
    (want,) = bench.take()
    assert want.priority is Priority.DEMAND
    bench.fetched(want)
    bench.assert_nothing_left()


def test_readahead_and_background_share_connections(bench: Bench) -> None:
    bench.ahead(A, 0, 1, 2)
    bench.scheduler.want_whole(B, Priority.FILL)
    assert [want.priority for want in bench.take()] == [Priority.READAHEAD] * 3 + [Priority.FILL]


# Whole blobs -------------------------------------------------------------------------------------------------------------


def test_a_whole_blob_is_fetched_in_order_and_only_what_is_missing() -> None:
    bench = Bench(connections=3, chunks=6)
    bench.cache.present[A] = {1, 4}
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    order = []
    while wants := bench.take():
        order += [want.chunk for want in wants]
        bench.fetched(*wants)
    assert order == [0, 2, 3, 5]
    bench.assert_nothing_left()


def test_a_chunk_that_failed_is_come_back_to_first() -> None:
    bench = Bench(connections=1, chunks=4)
    bench.scheduler.want_whole(A, Priority.FILL)
    order = []
    while wants := bench.take():
        order.append(wants[0].chunk)
        if order.count(0) == 1 and wants[0].chunk == 0:
            bench.scheduler.again(wants[0])
        else:
            bench.fetched(*wants)
    assert order == [0, 0, 1, 2, 3]
    bench.assert_nothing_left()


def test_a_blob_that_is_complete_when_it_is_wanted_leaves_nothing(bench: Bench) -> None:
    bench.cache.present[A] = set(range(20))
    bench.scheduler.want_whole(A, Priority.FILL)
    assert not bench.scheduler.wants(A)
    assert bench.take() == []
    bench.assert_nothing_left()


def test_the_last_chunk_of_a_whole_blob_ends_the_wish_at_once() -> None:
    """Who lets go of the blob asks right after the last chunk."""
    bench = Bench(connections=2, chunks=2)
    bench.scheduler.want_whole(A, Priority.FILL)
    bench.fetched(*bench.take())
    assert not bench.scheduler.wants(A)
    bench.assert_nothing_left()


def test_what_came_in_another_way_is_not_wanted_any_more(bench: Bench) -> None:
    bench.scheduler.hold(A, math.inf)
    bench.demand(A, 1)
    bench.ahead(A, 2)
    assert bench.scheduler.wants(A)
    bench.cache.present[A] = {1, 2}
    assert not bench.scheduler.wants(A)
    bench.assert_nothing_left()


def test_stopping_background_leaves_the_readers(bench: Bench) -> None:
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    bench.demand(A, 7)
    bench.scheduler.unwant_whole(A)
    assert chunks(bench.take()) == [(A, 7)]


def test_stopping_background_of_what_is_only_background_leaves_nothing(bench: Bench) -> None:
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    bench.scheduler.unwant_whole(A)
    assert not bench.scheduler.wants(A)
    bench.assert_nothing_left()


def test_an_empty_window_leaves_nothing(bench: Bench) -> None:
    bench.ahead(A)
    bench.ahead(A, 1)
    bench.ahead(A)
    bench.assert_nothing_left()


# Failures ----------------------------------------------------------------------------------------------------------------


def test_a_failed_chunk_goes_first_when_it_goes_again(bench: Bench) -> None:
    bench.demand(A, 1, 2, 3, 4, 5, 6)
    wants = bench.take()
    bench.scheduler.again(wants[2])
    assert bench.take() == [wants[2]]


@pytest.mark.parametrize("background", ["readahead", "fill"])
def test_a_reader_that_came_while_a_chunk_was_under_way_is_not_forgotten_when_it_fails(
    bench: Bench, background: str
) -> None:
    if background == "readahead":
        bench.ahead(A, 3)
    else:
        bench.cache.present[A] = set(range(20)) - {3}
        bench.scheduler.want_whole(A, Priority.FILL)
    (want,) = bench.take()
    bench.scheduler.demand(A, 3, 350)
    bench.ahead(A)  # another reader's window
    bench.scheduler.unwant_whole(A)
    bench.scheduler.again(want)
    assert bench.take() == [Want(A, 3, Priority.DEMAND, 350)]


def test_background_that_comes_to_a_chunk_before_its_readers_turn_keeps_the_readers_want(bench: Bench) -> None:
    bench.demand(A, *range(5))
    assert len(bench.take()) == 4
    bench.cache.present[A] = set(range(5, 20))
    bench.scheduler.want_whole(A, Priority.FILL)
    (want,) = bench.take()
    assert (want.chunk, want.priority) == (4, Priority.FILL)
    bench.scheduler.unwant_whole(A)
    bench.scheduler.again(want)
    assert not bench.take()  # the readers' connections are taken
    bench.fetched(Want(A, 0, Priority.DEMAND, 0))
    assert bench.take() == [Want(A, 4, Priority.DEMAND, 400)]


def test_background_that_was_stopped_does_not_come_back_by_failing(bench: Bench) -> None:
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    wants = bench.take()
    bench.scheduler.unwant_whole(A)
    for want in wants:
        bench.scheduler.again(want)
        bench.scheduler.hold(A, 5.0)
    assert bench.take() == []
    assert not bench.scheduler.wants(A)
    bench.assert_nothing_left()


def test_a_blob_that_is_forgotten_is_gone_when_its_orders_end(bench: Bench) -> None:
    bench.demand(A, 1)
    bench.scheduler.want_whole(A, Priority.FILL)
    wants = bench.take()
    bench.scheduler.forget(A)
    assert bench.scheduler.wants(A)  # under way
    assert bench.take() == []
    for want in wants:
        bench.scheduler.finished(want)
    bench.assert_nothing_left()


# Holds -------------------------------------------------------------------------------------------------------------------


def test_a_blob_on_hold_waits_and_others_go(bench: Bench) -> None:
    bench.scheduler.hold(A, 5.0)
    bench.demand(A, 1)
    bench.demand(B, 1)
    assert chunks(bench.take()) == [(B, 1)]
    assert bench.scheduler.next_change(bench.now) == 5.0
    bench.now = 5.0
    assert chunks(bench.take()) == [(A, 1)]
    assert bench.scheduler.next_change(bench.now) is None


def test_a_hold_without_an_end_ends_when_it_is_released(bench: Bench) -> None:
    bench.demand(A, 1)
    bench.scheduler.hold(A, math.inf)
    assert bench.take() == []
    assert bench.scheduler.next_change(bench.now) is None
    bench.scheduler.release(A)
    assert chunks(bench.take()) == [(A, 1)]


def test_a_shorter_pause_does_not_end_a_longer_one(bench: Bench) -> None:
    bench.demand(A, 1)
    bench.scheduler.hold(A, math.inf)
    bench.scheduler.hold(A, 1.0)
    bench.now = 2.0
    assert bench.take() == []
    bench.scheduler.release(A)
    assert len(bench.take()) == 1


def test_a_hold_outlives_what_was_wanted_and_keeps_nothing_itself(bench: Bench) -> None:
    bench.scheduler.hold(A, 5.0)
    bench.demand(A, 1)
    bench.scheduler.forget(A)
    assert not bench.scheduler.wants(A)
    bench.demand(A, 1)
    assert bench.take() == []
    bench.now = 5.0
    assert len(bench.take()) == 1
    assert not bench.scheduler._holds


def test_a_chunk_that_pauses_is_fetched_by_nobody_and_the_others_of_its_blob_go_on(bench: Bench) -> None:
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    first, *others = bench.take()
    bench.scheduler.again(first, after=5.0)
    bench.ahead(A, first.chunk)
    bench.fetched(*others)
    assert first.chunk not in [want.chunk for want in bench.take()]
    assert bench.scheduler.next_change(bench.now) == 5.0
    bench.scheduler.demand(A, first.chunk, 33)
    assert bench.scheduler.next(4.9) is None
    assert bench.scheduler.next(5.0) == Want(A, first.chunk, Priority.DEMAND, 33)  # a reader came meanwhile


@pytest.mark.parametrize("ends", ["forget", "unwant_whole"])
def test_a_pause_for_what_nobody_wants_any_more_is_over(bench: Bench, ends: str) -> None:
    bench.scheduler.want_whole(A, Priority.PREFETCH)
    wants = bench.take()
    for want in wants:
        bench.scheduler.again(want, after=5.0)
    assert bench.scheduler.wants(A)
    getattr(bench.scheduler, ends)(A)
    assert not bench.scheduler.wants(A)
    bench.demand(A, wants[0].chunk)
    assert len(bench.take()) == 1  # the pause was the failed order's
    bench.fetched(Want(A, wants[0].chunk, Priority.DEMAND, 0))
    bench.now = 5.0
    assert bench.take() == []
    bench.assert_nothing_left()


# Nobody holds another up -------------------------------------------------------------------------------------------------


def test_a_blob_without_an_order_gets_one_beside_a_blob_that_has_all_connections() -> None:
    bench = Bench(connections=2)
    bench.demand(A, *range(10))
    assert [want.blob for want in bench.take()] == [A, A]
    bench.demand(B, 0, 1)
    bench.demand(C, 0)
    assert chunks(bench.take()) == [(B, 0), (C, 0)]


def test_silent_orders_do_not_count_up_to_a_bound() -> None:
    bench = Bench(connections=2)
    bench.demand(A, *range(20))
    taken: list[Want] = []
    while wants := bench.take():
        taken += wants
        bench.scheduler.set_silent({want.key for want in taken})
    assert len(taken) == 2 * DEMAND_ORDERS_MAX
    bench.scheduler.want_whole(B, Priority.FILL)
    bench.now += QUIET_SECONDS
    background: list[Want] = []
    while wants := bench.take():
        background += wants
        bench.scheduler.set_silent({want.key for want in taken + background})
    assert len(background) == 2 * OTHER_ORDERS_MAX


def test_two_readers_of_a_blob_have_a_window_each_and_take_turns() -> None:
    bench = Bench(connections=3)
    bench.ahead(A, 1, 2, 3, owner="one")
    bench.ahead(A, 11, 12, 13, owner="two")
    assert [want.chunk for want in bench.take()] == [1, 11, 2]
    bench.ahead(A, owner="one")
    bench.fetched(Want(A, 1, Priority.READAHEAD, 0), Want(A, 2, Priority.READAHEAD, 0))
    assert [want.chunk for want in bench.take()] == [12, 13]


def test_groups_take_turns_however_many_blobs_they_have() -> None:
    groups = {A: "many files", B: "many files", C: "one file"}
    cache = Cache(dict.fromkeys(groups, 20))
    scheduler = Scheduler(lambda: 4, cache.missing, groups.__getitem__)
    for blob in groups:
        scheduler.want_whole(blob, Priority.PREFETCH)
    order = [want.blob for _ in range(4) if (want := scheduler.next(0.0)) is not None]
    assert order == [A, C, B, C]


# The simulation ----------------------------------------------------------------------------------------------------------


class Simulation:
    """Random wants, completions, failures, holds and changes of mind against a scheduler, with a model of what has to be true."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.connections = self.chance.randint(1, 6)
        self.blobs = [blob_id(number) for number in range(self.chance.randint(1, 8))]
        self.cache = Cache({blob: self.chance.randint(1, 30) for blob in self.blobs})
        for blob in self.blobs:
            everything = range(self.cache.sizes[blob])
            self.cache.present[blob] = set(self.chance.sample(everything, self.chance.randint(0, len(everything) // 2)))
        groups = {blob: self.chance.randrange(3) for blob in self.blobs}
        self.scheduler = Scheduler(lambda: self.connections, self.cache.missing, groups.__getitem__)
        self.now = 0.0
        self.running: list[Want] = []
        # The model.
        self.demanded: set[tuple[BlobId, int]] = set()
        self.ahead: dict[BlobId, dict[int, set[int]]] = defaultdict(dict)  # by reader
        self.whole: set[BlobId] = set()
        self.holds: dict[BlobId, float] = {}
        self.pauses: dict[tuple[BlobId, int], float] = {}
        self.silent: set[tuple[BlobId, int]] = set()
        self.fetched = 0

    def held(self, blob: BlobId) -> bool:
        return self.now < self.holds.get(blob, 0.0)

    def run(self) -> None:
        for _ in range(self.chance.randint(30, 120)):
            self.chance.choice(
                [
                    self.demand,
                    self.demand,
                    self.look_ahead,
                    self.want_whole,
                    self.change_mind,
                    self.hold,
                    self.fall_silent,
                ]
                + [self.adapt]
                + [self.end] * 4
            )()
            self.now += self.chance.choice([0.0, 0.1, 1.0])
            self.order()
            self.check_bounds()
        self.finish()

    def demand(self) -> None:
        blob = self.chance.choice(self.blobs)
        chunk = self.chance.randrange(self.cache.sizes[blob])
        if chunk not in self.cache.present[blob]:
            self.demanded.add((blob, chunk))
            self.scheduler.demand(blob, chunk, chunk * CHUNK + self.chance.randrange(CHUNK))

    def look_ahead(self) -> None:
        blob = self.chance.choice(self.blobs)
        first = self.chance.randrange(self.cache.sizes[blob])
        window = range(first, min(first + self.chance.randint(0, 6), self.cache.sizes[blob]))
        reader = self.chance.randrange(3)
        self.ahead[blob][reader] = set(window)
        self.scheduler.look_ahead(blob, reader, [(chunk, chunk * CHUNK) for chunk in window])

    def want_whole(self) -> None:
        blob = self.chance.choice(self.blobs)
        self.whole.add(blob)
        self.scheduler.want_whole(blob, self.chance.choice([Priority.PREFETCH, Priority.FILL]))

    def change_mind(self) -> None:
        blob = self.chance.choice(self.blobs)
        self.whole.discard(blob)
        if self.chance.random() < 0.3:
            self.demanded = {(b, c) for b, c in self.demanded if b != blob}
            self.ahead[blob].clear()
            self.pauses = {key: until for key, until in self.pauses.items() if key[0] != blob}
            self.scheduler.forget(blob)
        else:
            self.unwant_whole(blob)

    def unwant_whole(self, blob: BlobId) -> None:
        self.scheduler.unwant_whole(blob)
        queues = self.scheduler._blobs.get(blob)
        pausing = queues.pausing if queues is not None else {}
        self.pauses = {key: until for key, until in self.pauses.items() if key[0] != blob or key[1] in pausing}

    def hold(self) -> None:
        blob = self.chance.choice(self.blobs)
        match self.chance.randrange(7):
            case 0 | 1 | 2:
                until = self.chance.choice([self.now + 3, math.inf])
                self.holds[blob] = max(until, self.holds.get(blob, 0.0))
                self.scheduler.hold(blob, until)
            case _:
                self.holds.pop(blob, None)
                self.scheduler.release(blob)

    def fall_silent(self) -> None:
        self.silent = {want.key for want in self.running if self.chance.random() < 0.4}
        self.scheduler.set_silent(self.silent)

    def adapt(self) -> None:
        self.connections = self.chance.randint(1, 6)

    def end(self, success: float = 0.6) -> None:
        """One order ends: well, or to be tried again, or given up."""
        if not self.running:
            return
        want = self.running.pop(self.chance.randrange(len(self.running)))
        fate = self.chance.random()
        if fate < success:
            self.cache.present[want.blob].add(want.chunk)
            self.demanded.discard((want.blob, want.chunk))
            self.fetched += 1
            self.scheduler.finished(want)
        elif fate < 0.95:
            if want.priority is Priority.DEMAND:
                self.demanded.add((want.blob, want.chunk))
            elif want.priority is Priority.READAHEAD:
                self.ahead[want.blob].setdefault(-1, set()).add(want.chunk)
            after = self.chance.choice([0.0, self.now + 0.5, self.now + 5])
            if after:
                self.pauses[want.key] = after
            self.scheduler.again(want, after)
        else:
            self.scheduler.finished(want)
            self.demanded.discard((want.blob, want.chunk))
            self.whole.discard(want.blob)
            self.unwant_whole(want.blob)

    def order(self) -> None:
        while (want := self.scheduler.next(self.now)) is not None:
            assert not self.held(want.blob)
            assert self.now >= self.pauses.pop(want.key, 0.0)
            assert want.chunk not in self.cache.present[want.blob]
            assert (want.blob, want.chunk) not in chunks(self.running)
            assert want.priority is Priority.DEMAND or not self.waiting_demand()
            if want.priority >= Priority.PREFETCH:
                assert want.blob in self.whole
            elif want.priority is Priority.DEMAND:
                assert CHUNK * want.chunk <= want.first < CHUNK * (want.chunk + 1)
            self.running.append(want)
            self.check_limits(want)
        assert not self.waiting_demand()
        assert self.scheduler.under_way == len(self.running)

    def waiting_demand(self) -> bool:
        """Whether a reader waits for what could be ordered now."""
        demands = [want for want in self.running if want.priority is Priority.DEMAND]
        live = sum(1 for want in demands if want.key not in self.silent)
        if len(demands) >= DEMAND_ORDERS_MAX * self.connections or live >= 2 * self.connections:
            return False
        served = {want.blob for want in demands} if live >= self.connections else set()
        under_way = set(chunks(self.running))
        return any(
            not self.held(blob) and (blob, chunk) not in under_way and self.now >= self.pauses.get((blob, chunk), 0.0)
            for blob, chunk in self.demanded
            if blob not in served
        )

    def check_limits(self, latest: Want) -> None:
        """That `latest` was within the connections that are allowed now."""
        live = [want for want in self.running if want.key not in self.silent or want is latest]
        demands = [want for want in self.running if want.priority is Priority.DEMAND]
        live_demands = [want for want in live if want.priority is Priority.DEMAND]
        if latest.priority is Priority.DEMAND:
            assert len(demands) <= DEMAND_ORDERS_MAX * self.connections
            assert len(live_demands) <= 2 * self.connections
            if len(live_demands) > self.connections:
                assert [want.blob for want in demands].count(latest.blob) == 1
            return
        assert len(live) - len(live_demands) <= self.connections
        assert len(self.running) - len(demands) <= OTHER_ORDERS_MAX * self.connections
        if latest.priority >= Priority.PREFETCH and demands:
            background = [want for want in live if want.priority >= Priority.PREFETCH]
            assert len(background) <= min(BACKGROUND_BESIDE_DEMAND, self.connections)

    def check_bounds(self) -> None:
        """What is queued is what is wanted, and a blob that nobody wants leaves nothing."""
        for blob, queues in self.scheduler._blobs.items():
            assert not queues.demand.keys() & (queues.running | queues.pausing.keys())
            assert not queues.running & queues.pausing.keys()
            assert queues.raised.keys() <= queues.running | queues.pausing.keys()
            assert all(len(window) <= self.cache.sizes[blob] for window in (queues.demand, *queues.ahead.values()))
            assert not queues.idle
        for rotation in self.scheduler._ready.values():
            assert set(rotation) <= self.scheduler._blobs.keys() - self.scheduler._holds.keys()
        under_way = {want.blob for want in self.running}
        for blob in self.blobs:
            wanted = blob in under_way or (blob in self.whole and not self.cache.complete(blob))
            wanted = wanted or any(b == blob for b, _ in self.demanded)
            ahead = set().union(*self.ahead[blob].values()) - self.cache.present[blob]
            if wanted:
                assert self.scheduler.wants(blob)
            elif not ahead and not any(b == blob for b, _ in self.pauses):
                assert not self.scheduler.wants(blob)

    def finish(self) -> None:
        """From now on all goes well: whatever is wanted comes, in no more orders than it needs."""
        self.silent.clear()
        self.scheduler.set_silent(())
        while True:
            self.order()
            if self.running:
                self.end(success=1.0)
                continue
            change = self.scheduler.next_change(self.now)
            if change is not None:
                assert change > self.now
                self.now = change
                continue
            stuck = [blob for blob, until in self.holds.items() if until == math.inf]
            if not stuck:
                break
            for blob in stuck:
                del self.holds[blob]
                self.scheduler.release(blob)
        assert not self.demanded
        assert all(self.cache.complete(blob) for blob in self.whole)
        assert not self.scheduler._blobs
        assert not self.scheduler._running
        self.now += 10
        assert self.scheduler.next(self.now) is None
        assert not self.scheduler._holds


@pytest.mark.parametrize("block", range(10))
def test_no_schedule_breaks_the_rules(block: int) -> None:
    for seed in range(block * 200, block * 200 + 200):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except AssertionError as e:
            raise AssertionError(f"seed {seed}, at {simulation.now:g} s") from e


# Other nodes -------------------------------------------------------------------------------------------------------------


class Others:
    """A `Gate` that lets `given` come from other nodes, and all else where there is a connection and `origin`."""

    def __init__(self, *given: tuple[BlobId, int], origin: bool = True) -> None:
        self.given = set(given)
        self.origin = origin
        self.asked = 0

    def admits(self, blob: BlobId, chunk: int, priority: Priority, *, connection: bool) -> bool:
        self.asked += 1
        return (blob, chunk) in self.given or (connection and self.origin)

    def next_missing(self, blob: BlobId, free: Callable[[int], bool], *, connection: bool) -> int | None:
        chunks = (chunk for chunk in range(100) if free(chunk))
        return next((c for c in chunks if self.admits(blob, c, Priority.FILL, connection=connection)), None)


def among(others: Others, connections: int = 1) -> Scheduler:
    return Scheduler(lambda: connections, lambda _, chunk: chunk, gate=others)


def _blob(number: int) -> BlobId:
    return BlobId(BlobAlgorithm.SHA256, f"{number:064x}")


def test_what_comes_from_other_nodes_takes_no_connection() -> None:
    blob = _blob(0)
    scheduler = among(Others(*((blob, chunk) for chunk in range(20))))
    scheduler.look_ahead(blob, "reader", [(chunk, 0) for chunk in range(30)])
    for chunk in range(20):
        want = scheduler.next(0.0)
        assert want is not None
        assert want.chunk == chunk
        scheduler.beside(want)
    last = scheduler.next(0.0)
    assert last is not None  # by the one connection
    assert last.chunk == 20
    assert scheduler.next(0.0) is None
    scheduler.finished(last)
    assert scheduler.next(0.0) is not None


def test_a_demand_goes_to_other_nodes_beside_any_number_of_orders() -> None:
    blob = _blob(0)
    others = Others((blob, 99))
    scheduler = among(others)
    for chunk in range(9):
        scheduler.demand(blob, chunk, 0)
    while (want := scheduler.next(0.0)) is not None:
        assert want.chunk < 9
    scheduler.demand(blob, 99, 0)
    want = scheduler.next(0.0)
    assert want is not None
    assert want.chunk == 99


def test_what_nobody_has_time_for_stays_wanted_and_hides_nothing() -> None:
    many = 3 * BLOCKED_MAX
    blob = _blob(0)
    others = Others((blob, many), origin=False)
    scheduler = among(others)
    for chunk in range(many + 1):
        scheduler.demand(blob, chunk, 0)
    found = [scheduler.next(0.0) for _ in range(5)]
    (want,) = [want for want in found if want is not None]
    assert want.chunk == many
    scheduler.finished(want)
    others.given = {(blob, chunk) for chunk in range(many)}
    came = set()
    while (taken := scheduler.next(0.0)) is not None:
        came.add(taken.chunk)
        scheduler.finished(taken)
    assert came == set(range(many))


def test_blobs_that_nobody_has_time_for_hide_none_and_a_look_has_a_bound() -> None:
    many = 5 * BLOCKED_BLOBS_MAX
    others = Others((_blob(many), 0), origin=False)
    scheduler = among(others)
    for number in range(many + 1):
        scheduler.demand(_blob(number), 0, 0)
        scheduler.look_ahead(_blob(number), "reader", [(chunk, 0) for chunk in range(1, 90)])
        scheduler.want_rest(_blob(number), 95)
    found = []
    for _ in range(8):
        others.asked = 0
        found.append(scheduler.next(0.0))
        assert others.asked <= BLOCKED_BLOBS_MAX * (2 * BLOCKED_MAX + 2)
    (want,) = [want for want in found if want is not None]
    assert want.blob == _blob(many)


def test_a_chunk_that_went_to_another_node_and_failed_is_wanted_as_before() -> None:
    blob = _blob(0)
    scheduler = among(Others((blob, 3)))
    scheduler.want_rest(blob, 3)
    want = scheduler.next(0.0)
    assert want is not None
    scheduler.beside(want)
    scheduler.demand(blob, 3, 7)
    scheduler.again(want, 1.0)
    assert scheduler.next(0.5) is None
    again = scheduler.next(1.0)
    assert again is not None
    assert (again.chunk, again.priority) == (3, Priority.DEMAND)
    scheduler.finished(again)
    assert not scheduler._beside
