"""Figure of learnt trajectories and true landings."""

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from energy_flow.core.history import Trajectories
from energy_flow.viz.style import BLUE, GREY, INK, VERMILION, new_figure, to_numpy


def field_figure(trajectories: Trajectories, true_landings: Tensor, sample: int, max_flows: int) -> Figure:
    """Draw paths of up to `max_flows` flows of one sample from above, together with their true landings.

    A grey line leads from a cell to its true landing, a small ring. The blue path is that of the flow, with a dot at
    its landing. Each step is a straight line, also if the flow was reflected at a border. The title has the mean
    distance between all landings and the true ones, and the same distance without movement.

    Args:
        trajectories: of a batch without children.
        true_landings: (x, y) for the energy of every cell, [B, S, 2].
        sample: row of the batch.
        max_flows: the most paths to draw; the choice is always the same.

    Raises:
        ValueError: the numbers of flows and of true landings differ.
    """
    position = to_numpy(trajectories.position[:, sample, :, :2])
    true = to_numpy(true_landings[sample])
    if position.shape[1:] != true.shape:
        raise ValueError(f"true landings {list(true.shape)}: must be one per flow, {list(position.shape[1:])}")
    off, still = (float(np.linalg.norm(ends - true, axis=-1).mean()) for ends in (position[-1], position[0]))
    chosen = np.random.default_rng(0).choice(len(true), min(max_flows, len(true)), replace=False)
    paths, true = position[:, chosen].transpose(1, 0, 2), true[chosen]

    figure = new_figure(6.2, 6.6)
    axes = figure.add_subplot()
    straight = np.stack([paths[:, 0], true], axis=1)
    axes.add_collection(LineCollection(list(straight), colors=GREY, linewidths=2.4, alpha=0.55))
    axes.scatter(true[:, 0], true[:, 1], s=42, facecolors="none", edgecolors=VERMILION, linewidths=1.1, zorder=3)
    axes.add_collection(LineCollection(list(paths), colors=BLUE, linewidths=1.1))
    axes.scatter(paths[:, 0, 0], paths[:, 0, 1], s=5, color=INK, zorder=3)
    axes.scatter(paths[:, -1, 0], paths[:, -1, 1], s=12, color=BLUE, zorder=4)
    axes.set(xlim=(-1.04, 1.04), ylim=(-1.04, 1.04), aspect="equal")
    axes.set_xlabel("x", fontsize=9)
    axes.set_ylabel("y", fontsize=9)
    axes.tick_params(labelsize=8, color=GREY)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(
        f"Sample {sample}: {len(chosen)} of {position.shape[1]:,} flows\n"
        f"mean distance to the true landings {off:.3f}, without movement {still:.3f}",
        fontsize=11,
    )
    return figure


def _legend() -> list[Line2D]:
    return [
        Line2D([], [], color=BLUE, marker="o", markersize=4, label="path of a flow and its landing"),
        Line2D([], [], color=GREY, linewidth=2.4, alpha=0.55, label="from the cell to the true landing"),
        Line2D([], [], color=INK, marker="o", ls="", markersize=2.5, label="cell"),
        Line2D([], [], color=VERMILION, marker="o", ls="", markersize=6, markerfacecolor="none", label="true landing"),
    ]
