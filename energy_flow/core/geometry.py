"""Cells of a plane, and the weights with which a landing deposits on them, in normalised coordinates [-1, 1].

Shape letters of `core` and `ops`: B samples, D embedding dimension, W x H cells of a plane, S = W * H, E energy
dimension, M flow slots per sample, T steps, L recurrent layers, K cells that one landing deposits on. H is also the
hidden size, where no plane is meant.
"""

from typing import Literal

import torch
from torch import Tensor

from energy_flow.ops.constants import cached_tensor

Deposit = Literal["bilinear", "nearest"]


@cached_tensor
def cell_centres(width: int, height: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres (x, y) of all cells of a plane, [S, 2], at `surface_index = y * width + x`.

    The result is cached: don't write to it.
    """
    # Computed on the CPU in float64, so that every device gets the same bits. Never an inference tensor: training may
    # use it next.
    with torch.inference_mode(False):
        x, y = (_axis_centres(size) for size in (width, height))
        centres = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)
        return centres.to(device=device, dtype=dtype)


def _axis_centres(num_cells: int) -> Tensor:
    if num_cells == 1:
        return torch.zeros(1, dtype=torch.float64)
    return 2 * torch.arange(num_cells, dtype=torch.float64) / (num_cells - 1) - 1


def deposit_cells(xy: Tensor, width: int, height: int, deposit: Deposit) -> tuple[Tensor, Tensor]:
    """The cells on which a landing at `xy` deposits, and its weight on each.

    Args:
        xy: [..., 2], in [-1, 1].
        width, height: W and H, cells of a plane.
        deposit: `nearest`: one cell, weight 1. `bilinear`: the four cells around `xy`; their weights sum to 1 and
            change continuously with `xy`.

    Returns:
        index [..., K] int64 (`y * width + x`) and weight [..., K] in the dtype of `xy`; K = 1 or 4.
    """
    x, y = xy.unbind(-1)
    if deposit == "nearest":
        cell = _nearest_cell(y, height) * width + _nearest_cell(x, width)
        return cell[..., None], torch.ones_like(xy[..., :1])
    cells_x, weights_x = _bilinear_axis(x, width)
    cells_y, weights_y = _bilinear_axis(y, height)
    index = (cells_y[..., :, None] * width + cells_x[..., None, :]).flatten(-2)
    weight = (weights_y[..., :, None] * weights_x[..., None, :]).flatten(-2)
    return index, weight


def _nearest_cell(coordinate: Tensor, num_cells: int) -> Tensor:
    place = (coordinate.detach() + 1) * (0.5 * (num_cells - 1))
    return _index((place + 0.5).floor(), num_cells - 1)


def _bilinear_axis(coordinate: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """The left and right cell along one axis and their weights, both [..., 2]."""
    place = (coordinate + 1) * (0.5 * (num_cells - 1))
    # The left cell is at most the last but one: then +1 lies wholly on the last cell. On an axis of one cell, left and
    # right are the same cell, and the fraction is 0.
    left = _index(place.detach().floor(), max(num_cells - 2, 0))
    fraction = place - left
    cells = torch.stack([left, (left + 1).clamp(max=num_cells - 1)], dim=-1)
    return cells, torch.stack([1 - fraction, fraction], dim=-1)


def _index(place: Tensor, last: int) -> Tensor:
    # NaN becomes a valid index: otherwise one nonfinite sample would stop the whole batch. Its weights and energies
    # stay NaN, so the fault shows in this sample alone.
    return place.nan_to_num(nan=0.0).clamp(0, last).long()
