"""Pictures of measurements: lines against the size (logarithmic axes), and bars at one size (from zero)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from energy_flow.viz.style import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, new_figure, say_empty
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.output import in_bytes, in_seconds

COLOURS = (VERMILION, BLUE, GREEN, ORANGE, INK, GREY)
MARKERS = ("s", "o", "^", "D", "v", "P")
BAR_COLOURS = (INK, GREEN, ORANGE, BLUE, GREY)
SECONDS, BYTES = "seconds", "peak_bytes"
SHOWN: dict[str, Callable[[float | None], str]] = {SECONDS: in_seconds, BYTES: in_bytes}
LOG_BASE = {SECONDS: 10, BYTES: 2}
AS_GRAPH = ", CUDA graph"  # ends the name of a variant that is another one, run as a CUDA graph


@dataclass(frozen=True)
class Panel:
    """One case of a picture."""

    case: str  # rows whose case begins with it
    title: str
    value: str  # SECONDS or BYTES
    size_label: str


def figure_of_panels(rows: Sequence[Row], panels: Sequence[Panel], title: str, columns: int = 3) -> Figure:
    """Draw a panel per case, with a line per variant against the size.

    Where a panel has two variants, an arrow at the largest size shows the ratio between them.
    """
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(3.8 * columns + 3.2, 3.1 * lines + 0.5)
    variants = list(dict.fromkeys(row.variant for row in rows if row.seconds is not None or row.peak_bytes is not None))
    plain = list(dict.fromkeys(name.removesuffix(AS_GRAPH) for name in variants))
    looks = {name: _look(plain.index(name.removesuffix(AS_GRAPH)), name.endswith(AS_GRAPH)) for name in variants}
    axes = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for panel, one in zip(panels, axes, strict=False):
        _draw_lines(one, panel, rows, looks)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    handles = {name: handle for one in axes for handle, name in zip(*one.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def figure_of_bars(rows: Sequence[Row], title: str, kinds: Mapping[str, str]) -> Figure:
    """Draw two panels of bars per case: time on the left, peak memory on the right, both from zero.

    `kinds` are the legend's texts by the beginnings of variants' names; the longest beginning counts.
    """
    cases = list(dict.fromkeys(row.case for row in rows))
    most = max(sum(row.case == case for row in rows) for case in cases)
    figure = new_figure(12, (0.27 * most + 1.0) * len(cases) + 0.9)
    colours = dict(zip(kinds, BAR_COLOURS, strict=True))
    for line, case in enumerate(cases):
        own = [row for row in rows if row.case == case]
        for column, (value, name) in enumerate(((SECONDS, "time"), (BYTES, "peak memory"))):
            axes = figure.add_subplot(len(cases), 2, 2 * line + column + 1)
            _draw_bars(axes, own, value, colours)
            axes.set_title(f"{case.split(';')[0]}: {name}", fontsize=10)
            if column:
                axes.set_yticklabels([])
    handles = [Patch(color=colours[prefix], label=kind) for prefix, kind in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def plain_axes(axes: Axes) -> None:
    """Give axes a light grid, small labels and no frame at the top and the right."""
    axes.tick_params(labelsize=8, color=GREY)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="major", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _look(index: int, dashed: bool) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "--" if dashed else "-",
    }


def _draw_lines(axes: Axes, panel: Panel, rows: Sequence[Row], looks: dict[str, dict[str, Any]]) -> None:
    own = [row for row in rows if row.case.startswith(panel.case) and getattr(row, panel.value)]  # no 0 on a log axis
    axes.set_title(panel.title, fontsize=10)
    if not own:
        say_empty(axes, "not measured")
        return
    ends: dict[str, float] = {}
    for name, look in looks.items():
        points = sorted((row.size, getattr(row, panel.value)) for row in own if row.variant == name)
        if points:
            look = look if len(points) > 1 else look | {"linestyle": "none"}
            axes.plot(*zip(*points, strict=True), **look, markersize=5, linewidth=1.8, label=name)
            ends[name] = points[-1][1]
    _log_axes(axes, panel, sorted({row.size for row in own}))
    if len(ends) == 2:
        _draw_ratio(axes, max(row.size for row in own), *ends.values())


def _log_axes(axes: Axes, panel: Panel, sizes: list[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log", base=LOG_BASE[panel.value])
    labelled = [size for before, size in zip([0, *sizes], sizes, strict=False) if size >= 1.8 * before]
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(lambda value, _: SHOWN[panel.value](value))
    axes.yaxis.set_minor_formatter("")
    axes.set_xlim(sizes[0] / 1.5, sizes[-1] * 2.6)
    axes.margins(y=0.18)
    low, high = axes.get_ylim()
    if high / low < 30:  # a shorter axis might have a single labelled tick
        axes.set_ylim(low / 3, high * 3)
    axes.set_xlabel(panel.size_label, fontsize=9)
    plain_axes(axes)


def _draw_ratio(axes: Axes, size: int, first: float, last: float) -> None:
    """Show how far apart two lines end."""
    place = size * 1.22
    axes.annotate("", (place, last), (place, first), arrowprops={"arrowstyle": "<->", "color": GREY, "linewidth": 1.0})
    ratio = max(first, last) / min(first, last)
    shown = f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"
    axes.text(place * 1.12, math.sqrt(first * last), shown, fontsize=9, color=INK, va="center", clip_on=False)


def _draw_bars(axes: Axes, rows: Sequence[Row], value: str, colour_of: Mapping[str, str]) -> None:
    values = [getattr(row, value) for row in rows]
    if not any(values):
        say_empty(axes, "not measured")
        return
    colours = [colour_of[max(filter(row.variant.startswith, colour_of), key=len)] for row in rows]
    bars = axes.barh(range(len(rows)), [one or 0 for one in values], color=colours, height=0.72)
    axes.bar_label(bars, [SHOWN[value](one) for one in values], padding=3, fontsize=8, color=INK)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(one for one in values if one))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
