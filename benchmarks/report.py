"""What a benchmark returns, and how it is printed and written, here and only here.

The JSON document is a contract (docs of the commands that never change): {"name", "machine", "commit", "runs", "table", "goals"}, where
a goal is {"name", "value", "goal", "met"}. Used by every benchmark and by `benchmarks.__main__`. Pure.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Cell = str | int | float | None
Row = dict[str, Cell]
"""One line of the table: columns by name, with the unit in the name, such as "MB/s". Rows may lack columns."""

MEGABYTE = 1_000_000
GIGABYTE = 1_000_000_000
"""Rates and CPU time per byte are in powers of ten, as link and disk speeds are; sizes are in powers of two, as files are."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on a ratio, a count or bytes. A value that could not be measured (NaN) never meets its goal."""

    name: str
    value: float
    sense: Literal[">=", "<=", "=="]
    bound: float

    @property
    def met(self) -> bool:
        if self.sense == ">=":
            return self.value >= self.bound
        if self.sense == "<=":
            return self.value <= self.bound
        return self.value == self.bound

    def document(self) -> dict[str, object]:
        value = None if math.isnan(self.value) else self.value
        return {"name": self.name, "value": value, "goal": f"{self.sense} {self.bound:.12g}", "met": self.met}


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars to draw: one value per label, and levels to compare them with."""

    title: str
    unit: str
    bars: Sequence[tuple[str, float]]
    levels: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines to draw: for each label points (x, y), y from nought."""

    title: str
    x: str
    unit: str
    curves: Sequence[tuple[str, Sequence[tuple[float, float]]]]
    logarithmic: bool = False
    """In x."""


@dataclass(slots=True)
class Report:
    name: str
    runs: list[dict[str, object]] = field(default_factory=list)
    """Everything measured, one entry per measurement, for whoever doubts the table."""
    table: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know, such as a part that was left out, a sentence each."""
    chart: Chart | Curves | None = None

    @property
    def met(self) -> bool:
        return all(goal.met for goal in self.goals)

    def document(self, machine: Mapping[str, Cell], commit: str) -> dict[str, object]:
        return {
            "name": self.name,
            "machine": dict(machine),
            "commit": commit,
            "runs": self.runs,
            "table": self.table,
            "goals": [goal.document() for goal in self.goals],
            "notes": self.notes,
        }

    def text(self) -> str:
        """The table and the goals, for a terminal."""
        lines = [format_table(self.table)]
        if self.goals:
            lines.append("")
        width = max((len(goal.name) for goal in self.goals), default=0)
        for goal in self.goals:
            verdict = "met" if goal.met else "MISSED"
            lines.append(
                f"{verdict:6}  {goal.name:{width}}  {format_cell(goal.value)}  (goal {goal.sense} {goal.bound:,.12g})"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def encode(document: Mapping[str, object]) -> str:
    """Strict JSON: a NaN that slipped into a figure is an error here and not in whoever reads the file."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def format_cell(cell: Cell) -> str:
    """Three significant digits for measurements, since the fourth is noise; whole numbers in full."""
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if math.isnan(cell):
            return "-"
        if cell == int(cell) and abs(cell) < 1e15:
            return f"{int(cell):,}"
        digits = max(0, 2 - math.floor(math.log10(abs(cell))))
        return f"{cell:,.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def format_table(rows: Sequence[Row]) -> str:
    """Columns in the order they first appear; text to the left, numbers to the right."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = {name: [format_cell(row.get(name)) for row in rows] for name in columns}
    wide = {name: max(len(name), *map(len, texts[name])) for name in columns}
    left = {name for name in columns if all(isinstance(row.get(name), str | None) for row in rows)}

    def line(cells: Mapping[str, str]) -> str:
        parts = (f"{cells[name]:{'<' if name in left else '>'}{wide[name]}}" for name in columns)
        return "  ".join(parts).rstrip()

    head = line({name: name for name in columns})
    rule = "  ".join("-" * wide[name] for name in columns)
    return "\n".join([head, rule, *(line({name: texts[name][at] for name in columns}) for at in range(len(rows)))])


def median(values: Sequence[float]) -> float:
    """NaN where nothing was measured, which no goal is met by."""
    return statistics.median(values) if values else math.nan


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed: always one that was measured."""
    if not 0 < share <= 1:
        raise ValueError(f"not a share: {share}")
    if not values:
        return math.nan
    return sorted(values)[math.ceil(share * len(values)) - 1]


def ratio(value: float, reference: float) -> float:
    """NaN where the reference is nothing."""
    return value / reference if reference else math.nan
