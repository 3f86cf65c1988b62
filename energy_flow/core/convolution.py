"""Convolutions over the cells of a plane, with borders that reflect as the lattice does."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from energy_flow.errors import ConfigError


class ReflectPad(nn.Module):
    """Continue planes [B, C, H, W] beyond their borders by reflection: c b | a b c | b a.

    The border cells stand once, because a flow is reflected at their centres. Planes of any size work, so a single
    cell is repeated. On a GPU the bits of the gradient can differ from run to run, unless
    `torch.use_deterministic_algorithms(True)`, which torch's own reflection refuses there.

    Args:
        cells: cells to add on every side.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, plane: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H + 2 * cells, W + 2 * cells]."""
        rows, columns = (self._sources(size, plane.device) for size in plane.shape[-2:])
        return plane.index_select(-2, rows).index_select(-1, columns)

    def _sources(self, size: int, device: torch.device) -> Tensor:
        """The cell that stands at every place along an axis of `size` cells."""
        place = torch.arange(-self.cells, size + self.cells, device=device)
        period = max(2 * (size - 1), 1)
        place = place.remainder(period)
        return torch.minimum(place, period - place)


def convolutions(channels: Sequence[int], kernel_size: int, key: str) -> nn.Sequential:
    """Convolutions with a SiLU between any two: planes [B, channels[0], H, W] -> [B, channels[-1], H, W].

    Args:
        channels: of the input, then of the output of every convolution.
        kernel_size: width of the kernels in cells, odd.
        key: the config key of `kernel_size`, for messages.

    Raises:
        ConfigError: `kernel_size` isn't odd and positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(
            f"{key} = {kernel_size}: a kernel has a cell in its middle, so its width must be odd and at least 1. "
            f"Set {key}={max(kernel_size - 1, 1)} or {key}={max(kernel_size + 1, 3)}"
        )
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [ReflectPad(kernel_size // 2), nn.Conv2d(inputs, outputs, kernel_size), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def surface_to_planes(surface: Tensor, width: int, height: int) -> Tensor:
    """Surfaces [B, S, C], S = height * width -> planes [B, C, height, width]."""
    return surface.transpose(1, 2).unflatten(2, (height, width))


def planes_to_surface(planes: Tensor) -> Tensor:
    """Planes [B, C, H, W] -> surfaces [B, S, C]."""
    return planes.flatten(2).transpose(1, 2)
