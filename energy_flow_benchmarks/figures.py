"""Pictures of measurements: a panel per case, a line per variant, both axes logarithmic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from energy_flow.viz.style import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, new_figure, say_empty
from energy_flow_benchmarks.findings import Row

COLOURS = (VERMILION, BLUE, GREEN, ORANGE, INK, GREY)
MARKERS = ("s", "o", "^", "D", "v", "P")
LETTERS_PER_INCH = 12  # of the legend, the line before each entry counted as 6 letters
SECONDS, BYTES = "seconds", "peak_bytes"
AS_GRAPH = ", CUDA graph"  # what the name of a variant ends with that is another one in a CUDA graph


@dataclass(frozen=True)
class Panel:
    """One case of a picture."""

    case: str  # rows whose case begins with it
    title: str
    value: str  # SECONDS or BYTES
    size_label: str


def figure_of_panels(rows: Sequence[Row], panels: Sequence[Panel], title: str, columns: int = 3) -> Figure:
    """Every panel shows its case against the size, with a line per variant.

    How many times the first variant's value the last one's is stands at the largest size: the gap that the picture
    shows. A case at a single size gets bars.
    """
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(4.1 * columns + 0.3, 3.1 * lines + 0.9)
    variants = list(dict.fromkeys(row.variant for row in rows if row.seconds is not None or row.peak_bytes is not None))
    plain = list(dict.fromkeys(name.removesuffix(AS_GRAPH) for name in variants))
    looks = {name: _look(plain.index(name.removesuffix(AS_GRAPH)), name.endswith(AS_GRAPH)) for name in variants}
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for panel, one in zip(panels, axes, strict=False):
        _draw(one, panel, rows, looks)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    handles = {
        label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True) if label
    }
    beside = max(1, int(figure.get_figwidth() * LETTERS_PER_INCH / (max(map(len, handles), default=0) + 6)))
    ncols = max(1, min(len(handles), beside))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _look(index: int, dashed: bool) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "--" if dashed else "-",
    }


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row], looks: dict[str, dict[str, Any]]) -> None:
    own = [row for row in rows if row.case.startswith(panel.case) and getattr(row, panel.value) is not None]
    axes.set_title(panel.title, fontsize=10)
    if not own:
        say_empty(axes, "not measured")
        return
    scale, unit = _unit([getattr(row, panel.value) for row in own], panel.value)
    ends: dict[str, float] = {}
    for name, look in looks.items():
        points = sorted((row.size, getattr(row, panel.value) * scale) for row in own if row.variant == name)
        if points:
            look = look if len(points) > 1 else look | {"linestyle": "none"}
            axes.plot(*zip(*points, strict=True), **look, markersize=5, linewidth=1.8, label=name)
            ends[name] = points[-1][1]
    _axes(axes, panel, sorted({row.size for row in own}), unit)
    if len(ends) == 2:
        _gap(axes, max(row.size for row in own), *ends.values())


def _axes(axes: Axes, panel: Panel, at: list[int], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_spaced(at)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda size, _: _short(size))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlim(at[0] / 1.5, at[-1] * 2.6)
    axes.margins(y=0.18)
    low, high = axes.get_ylim()
    if high / low < 30:  # or there would be a single labelled tick
        axes.set_ylim(low / 3, high * 3)
    axes.set_xlabel(panel.size_label, fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(which="major", color="#E6E6E6", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _gap(axes: Axes, size: int, first: float, last: float) -> None:
    """How far apart the two lines end."""
    if min(first, last) <= 0:
        return
    place = size * 1.22
    axes.annotate("", (place, last), (place, first), arrowprops={"arrowstyle": "<->", "color": GREY, "linewidth": 1.0})
    ratio = max(first, last) / min(first, last)
    shown = f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
    axes.text(place * 1.12, math.sqrt(first * last), shown, fontsize=9, color=INK, va="center", clip_on=False)


def _unit(values: list[float], value: str) -> tuple[float, str]:
    """Factor and name of the unit in which the largest value reads well."""
    top = max(values)
    if value == BYTES:
        return (2.0**-20, "MiB") if top < 2**30 else (2.0**-30, "GiB")
    if top < 1e-4:
        return 1e6, "microseconds"
    return (1e3, "milliseconds") if top < 10 else (1.0, "seconds")


def _spaced(at: list[int]) -> list[int]:
    """Sizes to label: those that stand far enough from the one before."""
    kept: list[int] = []
    for size in at:
        if not kept or size / kept[-1] >= 1.8:
            kept.append(size)
    return kept


def _short(size: float) -> str:
    for limit, letter in ((10**6, "M"), (10**3, "k")):
        if size >= limit:
            return f"{size / limit:.3g}{letter}"
    return f"{size:g}"
