"""benchmarks.report: goals, the JSON contract, the printed table, and the few statistics."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.report import Goal, Report, encode, format_cell, format_table, median, quantile, ratio


@pytest.mark.parametrize(
    ("value", "sense", "bound", "met"),
    [
        (0.95, ">=", 0.95, True),
        (0.949, ">=", 0.95, False),
        (1.3, "<=", 1.3, True),
        (1.301, "<=", 1.3, False),
        (0, "==", 0, True),
        (1, "==", 0, False),
        (math.nan, ">=", 0.95, False),
        (math.nan, "<=", 1.3, False),
        (math.nan, "==", 0, False),
    ],
)
def test_a_goal_is_met_on_its_own_side_of_its_bound(value: float, sense: str, bound: float, met: bool) -> None:
    goal = Goal("g", value, sense, bound)  # type: ignore[arg-type]
    assert goal.met is met


def report() -> Report:
    return Report(
        "cold",
        runs=[{"way": "curl", "seconds": 1.5}],
        table=[{"what": "curl", "MB/s": 119.6}, {"what": "mount", "MB/s": 118.0, "ratio": 0.987}],
        goals=[Goal("mount / curl", 0.987, ">=", 0.95), Goal("bytes sent more than once", 0, "==", 0)],
    )


def test_the_document_has_what_the_contract_names() -> None:
    document = json.loads(encode(report().document({"cores": 2}, "abc")))
    assert {"name", "machine", "commit", "runs", "table", "goals"} <= set(document)
    assert document["name"] == "cold"
    assert document["machine"] == {"cores": 2}
    assert document["commit"] == "abc"
    assert document["goals"][0] == {"name": "mount / curl", "value": 0.987, "goal": ">= 0.95", "met": True}


def test_a_report_is_met_when_all_its_goals_are() -> None:
    good = report()
    assert good.met
    good.goals.append(Goal("bytes", 1, "==", 0))
    assert not good.met


def test_a_goal_that_was_not_measured_is_null_and_missed() -> None:
    assert Goal("g", math.nan, ">=", 1).document() == {"name": "g", "value": None, "goal": ">= 1", "met": False}


def test_nan_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode({"value": math.nan})


def test_the_text_shows_each_goal_with_its_verdict() -> None:
    shown = report()
    shown.goals.append(Goal("memory", 400e6, "<=", 300e6))
    shown.notes.append("half was left out")
    lines = shown.text().splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["met", "met", "MISSED", "note:"]
    assert "0.987" in lines[-4]
    assert ">= 0.95" in lines[-4]


def test_the_table_has_a_column_for_every_name_and_a_dash_where_a_row_lacks_it() -> None:
    lines = format_table(report().table).splitlines()
    assert lines[0].split() == ["what", "MB/s", "ratio"]
    assert lines[2].split() == ["curl", "120", "-"]
    assert lines[3].split() == ["mount", "118", "0.987"]
    assert lines[2].index("120") + 3 == lines[3].index("118") + 3  # numbers end where their column ends


def test_a_table_without_rows_is_empty_and_no_error() -> None:
    assert format_table([]).strip() == ""


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        ("x", "x"),
        (1234567, "1,234,567"),
        (119.63, "120"),
        (1.0, "1"),
        (0.98765, "0.988"),
        (0.0123456, "0.0123"),
        (12345.6, "12,346"),
        (0.0, "0"),
        (-1.234, "-1.23"),
    ],
)
def test_cells_have_three_digits(cell: str | float | None, text: str) -> None:
    assert format_cell(cell) == text


def test_the_median_of_nothing_is_nan() -> None:
    assert math.isnan(median([]))
    assert median([3.0, 1.0, 2.0]) == 2.0


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(1, 11)]
    assert quantile(values, 0.9) == 9.0
    assert quantile(values, 0.91) == 10.0
    assert quantile(values, 1.0) == 10.0
    assert quantile([5.0], 0.01) == 5.0
    assert math.isnan(quantile([], 0.5))
    with pytest.raises(ValueError, match="share"):
        quantile(values, 0)


def test_a_ratio_to_nothing_is_nan() -> None:
    assert ratio(1, 2) == 0.5
    assert math.isnan(ratio(1, 0))
