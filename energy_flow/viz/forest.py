"""Forest plot: differences with their intervals, one below the other, and a line at zero."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from energy_flow.viz.style import BLUE, GREY, INK, VERMILION, Array, new_figure, say_empty

WIDEST = 100  # largest / smallest difference; above it, a linear axis would hide the smallest


@dataclass(frozen=True)
class ForestLine:
    """One line of the plot: a difference with its interval, and the text to the right of it."""

    name: str
    interval: tuple[float, float, float] | None  # mean, low, high; None: nothing to draw
    shown: str  # the numbers, or the reason why there are none
    square: bool  # drawn as a square: a second kind of methods


def forest_figure(
    lines: Sequence[ForestLine], *, title: str, label: str, lower_is_better: bool, kinds: tuple[str, str]
) -> Figure:
    """Draw one line per method from top to bottom. The colour shows whether the interval is on one side of zero.

    If the sizes of the differences vary much, the axis is linear up to the smallest and logarithmic beyond it. Then the
    label of the axis says so.

    Args:
        lines: from top to bottom.
        title: of the figure.
        label: of the axis.
        lower_is_better: whether differences below zero are better.
        kinds: names of the circles and of the squares, for the legend.
    """
    longest = max((len(line.name) for line in lines), default=0)
    figure = new_figure(7.4 + 0.07 * longest, 0.3 * len(lines) + 2.0)
    axes = figure.add_subplot()
    for place, line in enumerate(lines):
        _draw(axes, place, line, lower_is_better)
        axes.text(1.02, place, line.shown, transform=axes.get_yaxis_transform(), fontsize=8, va="center", color=INK)
    axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
    axes.set_yticks(range(len(lines)), [line.name for line in lines], fontsize=9)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    drawn = [line.interval for line in lines if line.interval is not None]
    scale = _scale(axes, np.array(drawn)) if drawn else ""
    if not drawn:
        say_empty(axes, "no pair to compare")
    axes.set_xlabel(f"{label}  ({'← better' if lower_is_better else 'better →'}){scale}", fontsize=9)
    axes.tick_params(labelsize=8, color=GREY)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(handles=_legend(lines, kinds), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _draw(axes: Axes, place: int, line: ForestLine, lower_is_better: bool) -> None:
    if line.interval is None:
        return
    mean, low, high = line.interval
    better = high < 0 if lower_is_better else low > 0
    colour = BLUE if better else VERMILION if low > 0 or high < 0 else GREY
    axes.plot((low, high), (place, place), color=colour, linewidth=2.0, solid_capstyle="butt", zorder=2)
    axes.plot(mean, place, color=colour, marker="s" if line.square else "o", markersize=6, zorder=3)


def _scale(axes: Axes, intervals: Array) -> str:
    """Scale the axis for intervals [N, 3]; returns the note for its label."""
    axes.margins(x=0.06)
    sizes = np.abs(intervals).max(1)
    smallest, largest = float(sizes.min()), float(sizes.max())
    if not 0 < WIDEST * smallest < largest:
        return ""
    linear = 10.0 ** math.ceil(math.log10(smallest))
    axes.set_xscale("symlog", linthresh=linear)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return f"\nlogarithmic beyond ±{linear:g}"


def _legend(lines: Sequence[ForestLine], kinds: tuple[str, str]) -> list[Line2D]:
    colours = ((BLUE, "better"), (VERMILION, "worse"), (GREY, "may be chance"))
    handles = [Line2D([], [], color=colour, linewidth=2.0, label=label) for colour, label in colours]
    if any(line.square for line in lines):
        for marker, label in zip("os", kinds, strict=True):
            handles.append(Line2D([], [], color=INK, marker=marker, ls="", markersize=6, label=label))
    return handles
