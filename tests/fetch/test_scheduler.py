"""The scheduler: who goes first, who waits, what is never done; and a seeded simulation of hundreds of schedules."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable

import pytest

from manta.fetch.scheduler import BACKGROUND_BESIDE_DEMAND, QUIET_SECONDS, Priority, Scheduler, Want
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
        self.scheduler = Scheduler(connections, self.cache.missing)
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
            self.scheduler.want(blob, chunk, Priority.DEMAND, chunk * CHUNK)

    def ahead(self, blob: BlobId, *chunks: int) -> None:
        self.scheduler.look_ahead(blob, [(chunk, chunk * CHUNK) for chunk in chunks])

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
    bench.scheduler.want(A, 3, Priority.DEMAND, 355)
    bench.scheduler.want(A, 3, Priority.DEMAND, 399)
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
    bench.scheduler.want(A, 1, Priority.DEMAND, 110, 120)
    bench.scheduler.want(A, 2, Priority.DEMAND, 210, 220)
    bench.scheduler.want(A, 2, Priority.DEMAND, 250, 260)
    assert bench.take() == [Want(A, 1, Priority.DEMAND, 110, 120), Want(A, 2, Priority.DEMAND, 210, 0)]


def test_the_rest_of_a_chunk_comes_before_what_nobody_asked_for(bench: Bench) -> None:
    bench.scheduler.want(A, 7, Priority.DEMAND, 710, 720)
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


def test_a_chunk_that_failed_behind_the_cursor_is_come_back_to() -> None:
    bench = Bench(connections=1, chunks=4)
    bench.scheduler.want_whole(A, Priority.FILL)
    order = []
    while wants := bench.take():
        order.append(wants[0].chunk)
        if order.count(0) == 1 and wants[0].chunk == 0:
            bench.scheduler.again(wants[0])
        else:
            bench.fetched(*wants)
    assert order == [0, 1, 2, 3, 0]
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
    bench.scheduler.want(A, 3, Priority.DEMAND, 350)
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
    assert bench.scheduler.next_change(bench.now) is None  # nothing waits for it
    bench.demand(A, 1)
    assert bench.take() == []
    bench.now = 5.0
    assert len(bench.take()) == 1
    assert not bench.scheduler._holds


def test_a_held_origin_holds_everything(bench: Bench) -> None:
    bench.demand(A, 1)
    bench.scheduler.hold_origin(10.0)
    bench.scheduler.hold_origin(4.0)
    assert bench.take() == []
    assert bench.scheduler.next_change(bench.now) == 10.0
    bench.now = 10.0
    assert len(bench.take()) == 1


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
        self.scheduler = Scheduler(self.connections, self.cache.missing)
        self.now = 0.0
        self.running: list[Want] = []
        # The model.
        self.demanded: set[tuple[BlobId, int]] = set()
        self.ahead: dict[BlobId, set[int]] = defaultdict(set)
        self.whole: set[BlobId] = set()
        self.holds: dict[BlobId, float] = {}
        self.origin_hold = 0.0
        self.fetched = 0

    def held(self, blob: BlobId) -> bool:
        return self.now < self.holds.get(blob, 0.0)

    def run(self) -> None:
        for _ in range(self.chance.randint(50, 250)):
            self.chance.choice(
                [self.demand, self.demand, self.look_ahead, self.want_whole, self.change_mind, self.hold, self.end]
                + [self.end] * 3
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
            self.scheduler.want(blob, chunk, Priority.DEMAND, chunk * CHUNK + self.chance.randrange(CHUNK))

    def look_ahead(self) -> None:
        blob = self.chance.choice(self.blobs)
        first = self.chance.randrange(self.cache.sizes[blob])
        window = range(first, min(first + self.chance.randint(0, 6), self.cache.sizes[blob]))
        self.ahead[blob] = set(window)
        self.scheduler.look_ahead(blob, [(chunk, chunk * CHUNK) for chunk in window])

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
            self.scheduler.forget(blob)
        else:
            self.scheduler.unwant_whole(blob)

    def hold(self) -> None:
        blob = self.chance.choice(self.blobs)
        match self.chance.randrange(8):
            case 0:
                self.origin_hold = max(self.origin_hold, self.now + 2)
                self.scheduler.hold_origin(self.now + 2)
            case 1 | 2 | 3:
                until = self.chance.choice([self.now + 3, math.inf])
                self.holds[blob] = max(until, self.holds.get(blob, 0.0))
                self.scheduler.hold(blob, until)
            case _:
                self.holds.pop(blob, None)
                self.scheduler.release(blob)

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
                self.ahead[want.blob].add(want.chunk)
            self.scheduler.again(want)
        else:
            self.scheduler.finished(want)
            self.demanded.discard((want.blob, want.chunk))
            self.whole.discard(want.blob)
            self.scheduler.unwant_whole(want.blob)

    def order(self) -> None:
        while (want := self.scheduler.next(self.now)) is not None:
            assert self.now >= self.origin_hold
            assert not self.held(want.blob)
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
        if self.now < self.origin_hold:
            return False
        if sum(1 for want in self.running if want.priority is Priority.DEMAND) >= self.connections:
            return False
        under_way = set(chunks(self.running))
        return any(not self.held(blob) and (blob, chunk) not in under_way for blob, chunk in self.demanded)

    def check_limits(self, latest: Want) -> None:
        counts = [sum(1 for want in self.running if want.priority is priority) for priority in Priority]
        assert counts[Priority.DEMAND] <= self.connections
        assert sum(counts) - counts[Priority.DEMAND] <= self.connections
        if latest.priority >= Priority.PREFETCH and counts[Priority.DEMAND]:
            assert counts[Priority.PREFETCH] + counts[Priority.FILL] <= BACKGROUND_BESIDE_DEMAND

    def check_bounds(self) -> None:
        """What is queued is what is wanted, and a blob that nobody wants leaves nothing."""
        for blob, queues in self.scheduler._blobs.items():
            demand, ahead = queues.wanted
            assert not demand.keys() & ahead.keys()
            assert not (demand.keys() | ahead.keys()) & queues.running
            assert queues.raised.keys() <= queues.running
            assert len(demand) + len(ahead) <= self.cache.sizes[blob]
            assert not queues.idle
        under_way = {want.blob for want in self.running}
        for blob in self.blobs:
            wanted = blob in under_way or (blob in self.whole and not self.cache.complete(blob))
            wanted = wanted or any(b == blob for b, _ in self.demanded)
            if wanted:
                assert self.scheduler.wants(blob)
            elif not self.ahead[blob] - self.cache.present[blob]:
                assert not self.scheduler.wants(blob)

    def finish(self) -> None:
        """From now on all goes well: whatever is wanted comes, in no more orders than it needs."""
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
    for seed in range(block * 40, block * 40 + 40):
        simulation = Simulation(seed)
        try:
            simulation.run()
        except AssertionError as e:
            raise AssertionError(f"seed {seed}, at {simulation.now:g} s") from e
