"""Figures of the landings of flows and of their groups."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from energy_flow.core.energy_lattice import Landings
from energy_flow.core.geometry import Deposit, deposit_cells
from energy_flow.viz.style import (
    BLUE,
    EMPTY,
    GREY,
    INK,
    PLANE_NAMES,
    UNSIGNED,
    Array,
    box_aspect,
    cell_axes,
    new_figure,
    say_empty,
    to_numpy,
    upper_bound,
)

MAX_BARS = 24


def landing_figure(landings: Landings, sample: int, width: int, height: int) -> Figure:
    """Draw the landings of one sample, one panel per output plane.

    The colour is the norm of the energy, with the same scale for both planes. A disc is a flow that reached its plane.
    A cross is a flow that was projected onto it after its last step.

    Args:
        landings: of a batch.
        sample: row of the batch.
        width, height: W and H.
    """
    landed = to_numpy(landings.landed[sample])
    place = _cell_units(to_numpy(landings.xy[sample])[landed], width, height)
    plane = to_numpy(landings.plane[sample])[landed]
    projected = to_numpy(landings.projected[sample])[landed]
    energy = np.linalg.norm(to_numpy(landings.energy[sample])[landed], axis=-1)

    figure = new_figure(*_two_panels(width, height))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = ScalarMappable(Normalize(0, upper_bound(energy)), UNSIGNED)
    for index, axes in enumerate(panels):
        here = plane == index
        _scatter(axes, place[here], colours.to_rgba(energy[here]), projected[here])
        cell_axes(axes, width, height, grid=True)
        landed_here = f"{_count(int(here.sum()), 'landing')}, {int(projected[here].sum()):,} projected"
        axes.set_title(f"{PLANE_NAMES[index]}: {landed_here}", fontsize=9)
        if not here.any():
            say_empty(axes, "no flow landed here")
    bar = figure.colorbar(colours, ax=panels, fraction=0.04)
    bar.set_label("‖energy‖₂", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.legend(handles=_marker_legend(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"Landings of sample {sample}", fontsize=11)
    return figure


def group_figure(landings: Landings, sample: int, width: int, height: int, deposit: Deposit) -> Figure:
    """Draw the groups of one sample on both planes together: members per cell, as a map and as a histogram.

    A landing is a member of a cell's group if it deposits on the cell (weight > 0). Coverage is the share of cells with
    at least one member.

    Args:
        landings: of a batch.
        sample: row of the batch.
        width, height: W and H.
        deposit: the deposit rule of the lattice.
    """
    members = _members(landings, sample, width, height, deposit)
    covered = int((members > 0).sum())
    figure = new_figure(*_two_panels(width, height))
    map_axes, bar_axes = figure.subplots(1, 2)
    image = map_axes.imshow(
        np.ma.masked_equal(members.reshape(height, width), 0),
        cmap=UNSIGNED,
        vmin=0,
        vmax=max(int(members.max()), 1),
        origin="lower",
        interpolation="nearest",
    )
    map_axes.set_facecolor(EMPTY)
    cell_axes(map_axes, width, height)
    map_axes.set_title(f"coverage {covered / members.size:.0%}: {covered:,} of {members.size:,} cells", fontsize=9)
    bar = figure.colorbar(image, ax=map_axes, fraction=0.05, ticks=MaxNLocator(5, integer=True))
    bar.set_label("members", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if covered == 0:
        say_empty(map_axes, "no flow landed")
    _member_histogram(bar_axes, members, box_aspect(width, height))
    num_landings = int(to_numpy(landings.landed[sample]).sum())
    figure.suptitle(f"Groups of sample {sample}: {_count(num_landings, 'landing')}, {deposit} deposit", fontsize=11)
    return figure


def _scatter(axes: Axes, place: Array, colours: Array, projected: Array) -> None:
    """Draw discs and crosses on one plane, smaller ones if there are many."""
    size = float(np.clip(9000 / max(len(place), 1), 4, 36))
    for chosen, marker, line, edge in ((~projected, "o", 0.06, INK), (projected, "x", 0.2, None)):
        axes.scatter(
            place[chosen, 0],
            place[chosen, 1],
            color=colours[chosen],
            marker=marker,
            s=size,
            linewidths=line * size**0.5,
            edgecolors=edge,
            alpha=0.9,
        )


def _member_histogram(axes: Axes, members: Array, aspect: float) -> None:
    width = max(1, int(np.ceil(members.max() / MAX_BARS)))
    # Cells without a landing have their own bar, left of the others and of the same width.
    edges = np.concatenate([[0], np.arange(1, members.max() + width + 1, width)])
    counts, _ = np.histogram(members, bins=edges)
    left = np.where(edges[:-1] == 0, 0.5 - width, edges[:-1] - 0.5)
    colours = [GREY] + [BLUE] * (len(counts) - 1)
    axes.bar(left, counts, width=width, align="edge", color=colours, edgecolor="white", linewidth=0.5)
    axes.set_box_aspect(aspect)
    axes.set_title("grey: cells without a landing", fontsize=9)
    axes.set_xlabel("members of a group", fontsize=8)
    axes.set_ylabel("cells", fontsize=8)
    for axis, num_ticks in ((axes.xaxis, 6), (axes.yaxis, 5)):
        axis.set_major_locator(MaxNLocator(num_ticks, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8, length=2, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)


def _members(landings: Landings, sample: int, width: int, height: int, deposit: Deposit) -> Array:
    """Number of landings that deposit on each cell, int64 [S]."""
    index, weight = deposit_cells(landings.xy[sample].detach(), width, height, deposit)
    hit = to_numpy((weight > 0) & landings.landed[sample, :, None])
    return np.bincount(to_numpy(index)[hit], minlength=width * height)


def _cell_units(xy: Array, width: int, height: int) -> Array:
    """Convert [N, 2] in [-1, 1] to cell units; on an axis of one cell, the whole range is within that cell."""
    size = np.array([width, height])
    return np.where(size > 1, (xy + 1) / 2 * (size - 1), xy / 2 * 0.9)


def _two_panels(width: int, height: int) -> tuple[float, float]:
    aspect = box_aspect(width, height)
    panel_width = (10.0 / aspect) ** 0.5
    return 2 * panel_width + 1.6, panel_width * aspect + 1.4


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _marker_legend() -> list[Line2D]:
    return [
        Line2D([], [], marker="o", ls="", color=GREY, markeredgecolor=INK, markersize=6, label="reached the plane"),
        Line2D([], [], marker="x", ls="", color=INK, markersize=6, label="projected after the last step"),
    ]
