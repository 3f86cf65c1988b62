"""Figure of surfaces."""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from energy_flow.viz.style import SIGNED, UNSIGNED, Array, box_aspect, cell_axes, new_figure, to_numpy, upper_bound

MAX_CHANNELS = 4
PANEL_AREA = 4.4  # square inches
BAR_WIDTH = 0.13  # inches


def surface_figure(surface: Tensor, width: int, height: int, title: str) -> Figure:
    """Draw the energies of the cells: one row per sample, one panel per channel (the first four) and one for the norm.

    All channels have the same symmetric colour scale, in which white is zero. The norms have another scale. With one
    channel there is no panel for the norm. Cell (0, 0) is at the bottom left.

    Args:
        surface: [S, E] or [B, S, E].
        width, height: W and H; S = W * H.
        title: of the figure.

    Raises:
        ValueError: the surface doesn't have W * H cells.
    """
    if surface.ndim not in (2, 3) or surface.shape[-2] != width * height:
        raise ValueError(f"surface {list(surface.shape)}: must be [S, E] or [B, S, E] with S = {width} * {height}")
    energy = to_numpy(surface).reshape(-1, height, width, surface.shape[-1])
    num_samples, energy_dim = energy.shape[0], energy.shape[-1]
    num_channels = min(energy_dim, MAX_CHANNELS)
    num_columns = num_channels + (energy_dim > 1)

    aspect = box_aspect(width, height)
    panel_width = (PANEL_AREA / aspect) ** 0.5
    panel_height = panel_width * aspect
    figure = new_figure(num_columns * (panel_width + 0.35) + 1.9, num_samples * (panel_height + 0.45) + 0.7)
    panels = figure.subplots(num_samples, num_columns, squeeze=False, sharex=True, sharey=True)

    channels = energy[..., :num_channels]
    limit = upper_bound(channels)
    scale = ScalarMappable(Normalize(-limit, limit), SIGNED)
    _draw(panels[:, :num_channels], channels, scale, [f"channel {index}" for index in range(num_channels)])
    _add_bar(figure, panels[:, :num_channels], scale, "energy", (panel_width, panel_height))
    if energy_dim > 1:
        norm = np.linalg.norm(energy, axis=-1, keepdims=True)
        scale = ScalarMappable(Normalize(0, upper_bound(norm)), UNSIGNED)
        _draw(panels[:, num_channels:], norm, scale, ["norm"])
        _add_bar(figure, panels[:, num_channels:], scale, "‖energy‖₂", (panel_width, panel_height))
    if num_samples > 1:
        for sample, axes in enumerate(panels[:, 0]):
            axes.set_ylabel(f"sample {sample}\ny (cell)", fontsize=8)
    shown = f", first {num_channels} of {energy_dim} channels" if energy_dim > num_channels else ""
    figure.suptitle(f"{title}{shown}", fontsize=11)
    return figure


def _draw(panels: Array, images: Array, scale: ScalarMappable, titles: list[str]) -> None:
    """Draw images [B, H, W, C] into axes [B, C]."""
    height, width = images.shape[1:3]
    for (sample, column), axes in np.ndenumerate(panels):
        axes.imshow(scale.to_rgba(images[sample, ..., column]), origin="lower", interpolation="nearest")
        cell_axes(axes, width, height)
        if sample == 0:
            axes.set_title(titles[column], fontsize=9)


def _add_bar(figure: Figure, panels: Array, scale: ScalarMappable, label: str, size: tuple[float, float]) -> None:
    """Add a colour bar of fixed width and of the height of the panels; `size` is that of one panel in inches."""
    rows, columns = panels.shape
    bar = figure.colorbar(scale, ax=panels, fraction=BAR_WIDTH / (columns * size[0]), aspect=rows * size[1] / BAR_WIDTH)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
