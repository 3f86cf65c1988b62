"""The two maps of a flow lattice for images: from images to surface energies, and back, by convolutions."""

import math

import torch
from torch import Tensor, nn

from energy_flow.core.convolution import convolutions, planes_to_surface, surface_to_planes
from energy_flow.core.energy_lattice import Count
from energy_flow.errors import ConfigError


class ConvMapIn(nn.Module):
    """Maps images, as embeddings [B, D], to energies of the input surface [B, S, E].

        surface = tanh(convolutions(sqrt(D) * image)) + cell_value

    An embedding is an image [C, H, W], flattened in this order: the pixels of the first channel come first, row by row.
    So D = C * H * W. One pixel belongs to one cell. Borders are reflected.

    Args:
        embedding_dim: D.
        width, height: W and H, cells of a plane.
        energy_dim: E.
        hidden: channels between two convolutions; None: one convolution.
        kernel_size: width of the kernels in cells, odd.

    Raises:
        ConfigError: D isn't a multiple of W * H, or `kernel_size` is even.
    """

    def __init__(
        self,
        *,
        embedding_dim: Count,
        width: Count,
        height: Count,
        energy_dim: Count,
        kernel_size: Count,
        hidden: Count | None = None,
    ) -> None:
        super().__init__()
        channels = image_channels(embedding_dim, width, height)
        self.width, self.height = width, height
        self.input_scale = math.sqrt(embedding_dim)
        sizes = [channels, *([] if hidden is None else [hidden]), energy_dim]
        self.network = nn.Sequential(convolutions(sizes, kernel_size, "model.map_in.kernel_size"), nn.Tanh())
        self.cell_value = nn.Parameter(torch.zeros(width * height, energy_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        image = (embedding * self.input_scale).unflatten(1, (-1, self.height, self.width))
        return planes_to_surface(self.network(image)) + self.cell_value


class ConvMapOut(nn.Module):
    """Maps energies of the output surface [B, S, E] to images, as embeddings [B, D], not normalised.

        image = convolutions(surface) / sqrt(D)

    The order of the D numbers is that of `ConvMapIn`.

    Args:
        embedding_dim: D.
        width, height: W and H, cells of a plane.
        energy_dim: E.
        hidden: channels between two convolutions; None: one convolution.
        kernel_size: width of the kernels in cells, odd.

    Raises:
        ConfigError: D isn't a multiple of W * H, or `kernel_size` is even.
    """

    def __init__(
        self,
        *,
        embedding_dim: Count,
        width: Count,
        height: Count,
        energy_dim: Count,
        kernel_size: Count,
        hidden: Count | None = None,
    ) -> None:
        super().__init__()
        channels = image_channels(embedding_dim, width, height)
        self.width, self.height = width, height
        self.output_scale = 1 / math.sqrt(embedding_dim)
        sizes = [energy_dim, *([] if hidden is None else [hidden]), channels]
        self.network = convolutions(sizes, kernel_size, "model.map_out.kernel_size")

    def forward(self, surface: Tensor) -> Tensor:
        image: Tensor = self.network(surface_to_planes(surface, self.width, self.height))
        return image.flatten(1) * self.output_scale


def image_channels(embedding_dim: int, width: int, height: int) -> int:
    """C of an image [C, height, width] of `embedding_dim` numbers.

    Raises:
        ConfigError: C isn't a whole number.
    """
    pixels = width * height
    if embedding_dim % pixels != 0:
        raise ConfigError(
            f"lattice.width x lattice.height = {width} x {height} = {pixels}: a map by convolution reads an embedding "
            f"as an image with one pixel per cell, so its {embedding_dim} numbers must be a multiple of {pixels}. Set "
            "lattice.width and lattice.height to the size of the images, or set model/map_in=linear and "
            "model/map_out=linear"
        )
    return embedding_dim // pixels
