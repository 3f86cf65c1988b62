"""Figure of the paths of flows through the lattice."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Poly3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D

from energy_flow.core.history import Trajectories
from energy_flow.viz.style import GREY, INK, PLANE_COLOURS, Array, new_figure, to_numpy

SHEETS = ((-1.0, "z0", PLANE_COLOURS[0]), (0.0, "input plane", INK), (1.0, "zdepth", PLANE_COLOURS[1]))
KINDS = (("ended on z0", PLANE_COLOURS[0]), ("ended on zdepth", PLANE_COLOURS[1]), ("removed", GREY))


def trajectory_figure(trajectories: Trajectories, sample: int, max_flows: int) -> Figure:
    """Draw paths of up to `max_flows` flows of one sample.

    The lattice is upright: z0 at the bottom, the input plane in the middle, zdepth at the top. A path has the colour of
    its last plane, or is grey if the flow was removed. It leads from a small dot to a large one.

    Args:
        trajectories: of a batch.
        sample: row of the batch.
        max_flows: the most paths to draw; the choice is always the same.
    """
    paths, num_created = _paths(trajectories, sample, max_flows)
    end = np.where(paths[:, -1, 2] <= -1, 0, np.where(paths[:, -1, 2] >= 1, 1, 2))  # z0, zdepth, removed
    figure = new_figure(6.6, 5.8)
    axes = figure.add_subplot(projection="3d")
    _draw_lattice(axes)
    handles = []
    for kind, (name, colour) in enumerate(KINDS):
        chosen = paths[end == kind]
        if not len(chosen):
            continue
        axes.add_collection3d(Line3DCollection(chosen, colors=colour, linewidths=1.1, alpha=0.75), autolim=False)
        axes.scatter(*chosen[:, 0].T, color=INK, s=4, depthshade=False)
        axes.scatter(*chosen[:, -1].T, color=colour, s=16, depthshade=False, edgecolors="white", linewidths=0.3)
        handles.append(Line2D([], [], color=colour, marker="o", markersize=4, label=f"{name} ({len(chosen)})"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    num_steps = trajectories.position.shape[0] - 1
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    figure.suptitle(f"Sample {sample}: {len(paths)} of {num_created:,} flows, {steps}", fontsize=11)
    return figure


def _paths(trajectories: Trajectories, sample: int, max_flows: int) -> tuple[Array, int]:
    """Paths [N, T+1, 3] of some flows, and the number of created flows. A flow rests at its start until its birth."""
    active = to_numpy(trajectories.active[:, sample])
    created = np.flatnonzero(active.any(axis=0))
    # Slots follow the rows of the surface. So every n-th flow might be a whole column of cells: choose at random.
    chosen = np.random.default_rng(0).choice(created, min(max_flows, len(created)), replace=False)
    position = to_numpy(trajectories.position[:, sample])[:, chosen]
    steps = np.arange(len(position))[:, None]
    since_birth = np.maximum(steps, active[:, chosen].argmax(axis=0))
    return np.take_along_axis(position, since_birth[..., None], axis=0).transpose(1, 0, 2), len(created)


def _draw_lattice(axes: Axes3D) -> None:
    corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    for z, _, colour in SHEETS:
        sheet = [[(x, y, z) for x, y in corners]]
        axes.add_collection3d(Poly3DCollection(sheet, facecolors=colour, edgecolors=colour, alpha=0.08), autolim=False)
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis), ("", axes.zaxis)):
        axis.set_ticks([-1, 0, 1])
        axis.set_label_text(name, fontsize=9)
        axis.set_tick_params(labelsize=8, pad=0)
        axis.set_pane_color((1.0, 1.0, 1.0, 0.0))
        axis.line.set_color(GREY)
    # The names of the sheets are tick labels of z: text at another place would overlap the tick labels.
    axes.zaxis.set_ticklabels([f"{z:+.0f}  {name}" if z else f"0  {name}" for z, name, _ in SHEETS])
    for label, (_, _, colour) in zip(axes.zaxis.get_ticklabels(), SHEETS, strict=True):
        label.set(color=colour, ha="left")
    axes.grid(False)
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
    axes.set_box_aspect((1, 1, 1), zoom=1.0)
    axes.view_init(elev=14, azim=-58)
