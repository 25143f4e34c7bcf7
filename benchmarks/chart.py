"""Plots of a report's chart, here and only here. Used by `benchmarks.__main__`; matplotlib is optional."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

from benchmarks.report import Chart, Curves, format_cell

BAR_COLOR = "#3b6ea5"
LEVEL_COLORS = ("#c0392b", "#444444", "#2e8b57")


def possible() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(chart: Chart | Curves, path: Path) -> None:
    """A PNG at `path`."""
    if isinstance(chart, Curves):
        _draw_curves(chart, path)
    else:
        _draw_bars(chart, path)


def _draw_bars(chart: Chart, path: Path) -> None:
    """Horizontal bars with their values, and the levels as lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.8 + 0.4 * len(chart.bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [label for label, _ in chart.bars]
    places = list(range(len(labels)))
    drawn = axes.barh(places, [value for _, value in chart.bars], color=BAR_COLOR, height=0.6)
    axes.bar_label(drawn, labels=[format_cell(value) for _, value in chart.bars], padding=3)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    for (label, value), color in zip(chart.levels, itertools.cycle(LEVEL_COLORS), strict=False):
        axes.axvline(value, color=color, linestyle="--", linewidth=1, label=f"{label}: {format_cell(value)}")
    axes.set_xlim(0, 1.15 * max([value for _, value in (*chart.bars, *chart.levels)], default=1))
    axes.set_xlabel(chart.unit)
    axes.set_title(chart.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.levels:
        figure.legend(fontsize=8, loc="outside lower center", ncols=len(chart.levels))
    figure.savefig(path, dpi=120)


def _draw_curves(chart: Curves, path: Path) -> None:
    """A line with markers for each curve, at the places that were measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, points), color in zip(chart.curves, itertools.cycle((BAR_COLOR, *LEVEL_COLORS)), strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", color=color, label=label)
    places = sorted({x for _, points in chart.curves for x, _ in points})
    if chart.logarithmic:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(places, [format_cell(place) for place in places])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.unit)
    axes.set_title(chart.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
