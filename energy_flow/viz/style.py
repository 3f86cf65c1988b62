"""Colours, canvas and cell axes of all figures. No figure uses `pyplot`, because it keeps global state."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

# Okabe-Ito colours, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, VERMILION, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9A9A9A", "#333333"
PLANE_NAMES = ("z0", "zdepth")
PLANE_COLOURS = (BLUE, VERMILION)
SIGNED, UNSIGNED = "RdBu_r", "viridis"
EMPTY = "#EFEFEF"
MAX_GRID_CELLS = 64  # with more cells per axis, grid lines would hide the data
MAX_BOX_ASPECT = 3.0
DPI = 110


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of `width` x `height` inches on an Agg canvas. Its labels won't overlap."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> Array:
    """Render the figure to an image, uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def to_numpy(tensor: Tensor) -> Array:
    """Copy a tensor to the host; floats become float64, because NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.float64).numpy() if tensor.is_floating_point() else tensor.numpy()


def upper_bound(values: Array) -> float:
    """The upper end of a colour scale: the largest finite magnitude, or 1 if there is none."""
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max()) or 1.0 if finite.size else 1.0


def box_aspect(width: int, height: int) -> float:
    """Height / width of a panel of cells: cells are square, unless the lattice is too thin to be readable."""
    return float(np.clip(height / width, 1 / MAX_BOX_ASPECT, MAX_BOX_ASPECT))


def cell_axes(axes: Axes, width: int, height: int, *, grid: bool = False) -> None:
    """Set up axes in cell units: x to the right, y upwards, cell (0, 0) at the bottom left."""
    axes.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, height - 0.5), aspect="auto", box_aspect=box_aspect(width, height))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=8, length=2, color=GREY)
    axes.set_xlabel("x (cell)", fontsize=8)
    axes.set_ylabel("y (cell)", fontsize=8)
    axes.label_outer()  # one name for panels that share an axis
    axes.spines[:].set_color(GREY)
    if grid and max(width, height) <= MAX_GRID_CELLS:
        axes.set_xticks(np.arange(width + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(height + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="#E2E2E2", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.set_axisbelow(True)


def say_empty(axes: Axes, text: str) -> None:
    """Write into the middle of an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=GREY)
