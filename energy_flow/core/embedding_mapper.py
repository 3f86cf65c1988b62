"""The two ends of a flow lattice: embedding to surface energies, surface energies to embedding.

They are learned, or, where the embedding is a surface already, the identity.
"""

import math

import torch
from torch import Tensor, nn

# Root mean square of the initial surface energies: tanh is still nearly linear there.
INITIAL_ENERGY = 0.3


class MapIn(nn.Module):
    """Embedding [B, D] -> energies of the input surface [B, S, E].

    The network ends in a tanh; a learned value per cell is added after it. The embedding is scaled by
    sqrt(D), so that a row of unit length enters with entries of size one.
    """

    def __init__(self, embedding_dim: int, num_cells: int, energy_dim: int, hidden: int | None) -> None:
        super().__init__()
        self.num_cells, self.energy_dim = num_cells, energy_dim
        self.input_scale = math.sqrt(embedding_dim)
        self.network = nn.Sequential(*_layers(embedding_dim, num_cells * energy_dim, hidden), nn.Tanh())
        if hidden is None:
            _start_orthogonal(_only_linear(self))
        self.cell_value = nn.Parameter(torch.zeros(num_cells, energy_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        surface = self.network(embedding * self.input_scale)
        return surface.view(-1, self.num_cells, self.energy_dim) + self.cell_value


class MapOut(nn.Module):
    """Energies of the output surface [B, S, E] -> embedding [B, D], not normalised.

    The network's output is divided by sqrt(D), as the map in multiplies by it.
    """

    def __init__(self, embedding_dim: int, num_cells: int, energy_dim: int, hidden: int | None) -> None:
        super().__init__()
        self.output_scale = 1 / math.sqrt(embedding_dim)
        self.network = nn.Sequential(*_layers(num_cells * energy_dim, embedding_dim, hidden))

    def forward(self, surface: Tensor) -> Tensor:
        return self.network(surface.flatten(1)) * self.output_scale

    @torch.no_grad()
    def start_as_inverse(self, map_in: MapIn, share: float = 1.0) -> None:
        """Begin as `share` times the (pseudo-)inverse of a linear map in: flows that stay put give the input back."""
        weight, linear = _only_linear(map_in).weight, _only_linear(self)
        linear.weight.copy_(weight.T * (share * min(weight.shape) / weight.square().sum()))
        linear.bias.zero_()


class IdentityIn(nn.Module):
    """A surface [B, S * E] is its own input surface [B, S, E].

    Nothing is learned here, no value per cell either: what a cell holds is given, and weights that belong to no
    cell run on a lattice of any width and height.
    """

    def __init__(self, num_cells: int, energy_dim: int) -> None:
        super().__init__()
        self.num_cells, self.energy_dim = num_cells, energy_dim

    def forward(self, embedding: Tensor) -> Tensor:
        return embedding.reshape(-1, self.num_cells, self.energy_dim)


class IdentityOut(nn.Module):
    """The output surface [B, S, E], flattened to [B, S * E]."""

    def forward(self, surface: Tensor) -> Tensor:
        return surface.flatten(1)


def _only_linear(mapper: MapIn | MapOut) -> nn.Linear:
    linear = mapper.network[0]
    assert isinstance(linear, nn.Linear)
    return linear


@torch.no_grad()
def _start_orthogonal(linear: nn.Linear) -> None:
    """Orthonormal rows or columns, scaled so that a unit-RMS input gives entries of `INITIAL_ENERGY`; bias 0."""
    rows, columns = linear.weight.shape
    nn.init.orthogonal_(linear.weight, gain=INITIAL_ENERGY * math.sqrt(max(rows / columns, 1.0)))
    linear.bias.zero_()


def _layers(inputs: int, outputs: int, hidden: int | None) -> list[nn.Module]:
    if hidden is None:
        return [nn.Linear(inputs, outputs)]
    return [nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs)]
