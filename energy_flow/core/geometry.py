"""Geometry of the lattice, in normalised coordinates [-1, 1]: cells, reflection, deposit weights.

Shape letters used throughout `core` and `ops`:
B samples, D embedding dimension, W x H cells of a plane, S = W * H, E energy dimension,
M flow slots per sample, T steps, L recurrent layers, K cells that one landing touches.
"""

import functools
from typing import Literal

import torch
from torch import Tensor

Deposit = Literal["bilinear", "nearest"]


@functools.cache
def cell_centres(width: int, height: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Centres (x, y) of all cells of a plane, [S, 2], at `surface_index = y * width + x`. Don't write to it."""
    # Cached: made on the CPU in float64, so that every device gets the same bits, and copied once. Never an
    # inference tensor, since training may be the next to use it.
    with torch.inference_mode(False):
        x, y = (_axis_centres(size) for size in (width, height))
        centres = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=-1)
        return centres.to(device=device, dtype=dtype)


def _axis_centres(num_cells: int) -> Tensor:
    if num_cells == 1:
        return torch.zeros(1, dtype=torch.float64)
    return 2 * torch.arange(num_cells, dtype=torch.float64) / (num_cells - 1) - 1


def fold(coordinate: Tensor) -> Tensor:
    """Reflect a coordinate at -1 and 1 until it lies inside (a triangular wave of period 4).

    Values already inside are returned bit for bit. The gradient is +1 or -1: the number of reflections.
    """
    folded = 1 - (torch.remainder(coordinate + 1, 4) - 2).abs()
    return torch.where(coordinate.abs() <= 1, coordinate, folded)


def fold_slope(coordinate: Tensor) -> Tensor:
    """Derivative of `fold`: 1 or -1, elementwise."""
    slope = -(torch.remainder(coordinate + 1, 4) - 2).sign()
    return torch.where(coordinate.abs() <= 1, 1.0, slope)


def deposit_cells(xy: Tensor, width: int, height: int, deposit: Deposit) -> tuple[Tensor, Tensor]:
    """Cells that a landing at `xy` deposits on, and with which weight.

    Args:
        xy: [..., 2], in [-1, 1].
        deposit: `nearest`: one cell, weight 1; `bilinear`: the four cells around, weights sum to one
            and move continuously with `xy`.

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
    # The left cell is at most the last but one, so that +1 lies wholly on the last cell. On an axis of one
    # cell left and right are the same cell, and the fraction is 0.
    left = _index(place.detach().floor(), max(num_cells - 2, 0))
    fraction = place - left
    cells = torch.stack([left, (left + 1).clamp(max=num_cells - 1)], dim=-1)
    return cells, torch.stack([1 - fraction, fraction], dim=-1)


def _index(place: Tensor, last: int) -> Tensor:
    # NaN becomes a valid index, or one sick sample would take the whole batch down; weights and energies stay NaN,
    # so it shows, in that sample alone.
    return place.nan_to_num(nan=0.0).clamp(0, last).long()
