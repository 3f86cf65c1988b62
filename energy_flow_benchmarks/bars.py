"""Pictures of variants at one size: a bar each, for time and for peak memory."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from energy_flow.viz.style import BLUE, GREEN, GREY, INK, ORANGE, new_figure, say_empty
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.output import BYTE_UNITS, TIME_UNITS, in_units

COLOURS = (INK, ORANGE, BLUE, GREY, GREEN)


def figure_of_bars(
    rows: Sequence[Row], cases: Sequence[str], title: str, kinds: Sequence[str], kind_of: Callable[[str], int]
) -> Figure:
    """A line of two panels per case: seconds on the left, peak memory on the right, both from zero.

    Args:
        kinds: of variants, for the legend.
        kind_of: the index of a variant's kind.
    """
    most = max((sum(row.case == case for row in rows) for case in cases), default=1)
    figure = new_figure(12, (0.27 * most + 1.0) * len(cases) + 0.9)
    for line, case in enumerate(cases):
        own = [row for row in rows if row.case == case]
        for column, value in enumerate(("seconds", "peak_bytes")):
            axes = figure.add_subplot(len(cases), 2, 2 * line + column + 1)
            _draw(axes, own, value, kind_of)
            axes.set_title(f"{case.split(';')[0]}: {'seconds' if column == 0 else 'peak memory'}", fontsize=10)
            if column:
                axes.set_yticklabels([])
    handles = [Patch(color=COLOURS[index], label=kind) for index, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def _draw(axes: Axes, rows: Sequence[Row], value: str, kind_of: Callable[[str], int]) -> None:
    values = [getattr(row, value) for row in rows]
    if not any(values):
        say_empty(axes, "not measured")
        return
    longest = max(one for one in values if one)
    places = range(len(rows))
    axes.barh(places, [one or 0 for one in values], color=[COLOURS[kind_of(row.variant)] for row in rows], height=0.72)
    for place, one in zip(places, values, strict=True):
        shown = in_units(one, TIME_UNITS if value == "seconds" else BYTE_UNITS)
        axes.text((one or 0) + 0.01 * longest, place, shown, fontsize=8, color=INK, va="center")
    axes.set_yticks(places, [row.variant for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * longest)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
