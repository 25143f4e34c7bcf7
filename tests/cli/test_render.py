"""manta.cli.render: numbers, tables, the progress line on a terminal and in a log."""

from __future__ import annotations

import io

import pytest

from manta.cli.render import Console, Progress, duration, plural, share, size, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (90_868_376, "90.9 MB"),
        (1.5e12, "1.50 TB"),
        (3e15, "3000.00 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.6, 61, 3600, 90061)] == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 00 min",
        "1 d 1 h",
    ]


def test_a_share_is_whole_only_when_it_is() -> None:
    assert (share(999, 1000), share(1000, 1000), share(0, 0)) == ("99%", "100%", "100%")


def test_plurals() -> None:
    assert (plural(1, "file"), plural(0, "file"), plural(12000, "file")) == ("1 file", "0 files", "12,000 files")


def test_tables_are_aligned() -> None:
    assert table(("NAME", ">SIZE"), [("a", "5 B"), ("longer", "10 B")]) == [
        "NAME    SIZE",
        "a        5 B",
        "longer  10 B",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_on_a_terminal_the_line_is_redrawn_in_place() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress("thing", stream, clock)
    progress.show(0, 10_000_000)
    clock.now += 0.01
    progress.show(1, 10_000_000)  # too soon to draw
    clock.now += 0.99
    progress.show(5_000_000, 10_000_000, detail="1/2 files")
    clock.now += 1
    progress.show(10_000_000, 10_000_000, last=True)
    progress.end()
    first, second, third = stream.getvalue().split("\r")[1:]
    assert "0% 0 B of 10.0 MB" in first
    assert "50% 5.0 MB of 10.0 MB, 5.0 MB/s, 1 s left" in second
    assert "1/2 files" in second
    assert "100% 10.0 MB of 10.0 MB, 5.0 MB/s" in third
    assert stream.getvalue().endswith("\n")
    assert len(third.rstrip("\n")) == len(second)  # blanks cover what was longer
    assert all(len(line) < 80 for line in (first, second, third))


def test_in_a_log_there_is_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress("thing", stream, clock)
    for second in range(11):
        progress.show(second * 100, 1000)
        clock.now += 1
    progress.show(1000, 1000, last=True)
    progress.end()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["thing: 50%", "thing: 100%", "thing: 100%"]


def test_a_stall_shows_in_the_rate() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress("thing", stream, clock)
    for done in (0, 1000, 2000):
        progress.show(done, 10_000)
        clock.now += 1
    for _ in range(8):
        progress.show(2000, 10_000)
        clock.now += 1
    assert stream.getvalue().split("\r")[-1].split(", ")[1].strip() == "0 B/s"


def test_quiet_and_json_hush_what_a_program_does_not_want() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(as_json=True, out=out, err=err)
    console.say("a")
    console.tell("b")
    console.progress("c").show(1, 2, last=True)
    console.document({"value": 1})
    console.warn("careful")
    assert (out.getvalue(), err.getvalue()) == ('{"value": 1}\n', "manta: careful\n")
    out, err = io.StringIO(), io.StringIO()
    console = Console(verbosity=-1, out=out, err=err)
    console.say("asked for")
    console.tell("b")
    console.warn("careful")
    console.note("detail")
    console.document({"value": 1})
    console.fail("absent", "Not there.")
    assert (out.getvalue(), err.getvalue()) == ("asked for\n", "manta: Not there.\n")
