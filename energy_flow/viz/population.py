"""Figure of the numbers of flows in a rollout."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from energy_flow.viz.style import BLUE, GREEN, GREY, INK, VERMILION, new_figure, to_numpy

# Line styles differ too, so that curves on top of each other (created = active at the start) stay visible.
CURVES = (
    ("created", INK, (0, (5, 2))),
    ("active", BLUE, "-"),
    ("reached", GREEN, "-"),
    ("removed", VERMILION, "-"),
    ("projected", GREY, "-"),
)


def population_figure(by_step: dict[str, Tensor]) -> Figure:
    """Draw the numbers of created, active, reached and removed flows at each step.

    Args:
        by_step: `created`, `active`, `reached`, `removed` and `projected`, each [T+1]: counts of the whole batch, entry
            0 at the start and entry t after step t. `projected` is drawn only if samples converged early.
    """
    figure = new_figure(6.4, 3.8)
    axes = figure.add_subplot()
    num_steps = len(by_step["created"]) - 1
    for name, colour, style in CURVES:
        counts = to_numpy(by_step[name])
        if name == "projected" and not counts.any():
            continue
        axes.plot(
            np.arange(num_steps + 1),
            counts,
            color=colour,
            linestyle=style,
            linewidth=1.8,
            marker="o",
            markersize=0 if num_steps > 30 else 6.5 if name == "created" else 3.5,
            label=f"{name} ({counts[-1]:,} at the end)",
        )
    axes.set_xlim(-0.3, max(num_steps, 1) + 0.3)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("flows in the batch", fontsize=9)
    axes.tick_params(labelsize=8, color=GREY)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("Flows by step", fontsize=11)
    return figure
