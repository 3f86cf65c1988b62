"""The two maps of a flow lattice: from embeddings to surface energies, and from surface energies to embeddings.

They are learned, or the identity where embeddings already are surfaces.
"""

import math

import torch
from torch import Tensor, nn

from energy_flow.errors import ConfigError

# Root mean square of the surface energies before training; tanh is still nearly linear there.
INITIAL_ENERGY = 0.3


class MapIn(nn.Module):
    """Maps embeddings [B, D] to energies of the input surface [B, S, E].

        surface = tanh(network(sqrt(D) * embedding)) + cell_value

    The factor sqrt(D) gives the entries of an embedding of unit length a root mean square of 1.

    Args:
        embedding_dim: D.
        num_cells: S.
        energy_dim: E.
        hidden: size of the hidden layer; None: no hidden layer.
    """

    def __init__(self, embedding_dim: int, num_cells: int, energy_dim: int, hidden: int | None) -> None:
        super().__init__()
        self.num_cells, self.energy_dim, self.is_linear = num_cells, energy_dim, hidden is None
        self.input_scale = math.sqrt(embedding_dim)
        self.network = nn.Sequential(*_layers(embedding_dim, num_cells * energy_dim, hidden), nn.Tanh())
        if hidden is None:
            _start_orthogonal(_only_linear(self))
        self.cell_value = nn.Parameter(torch.zeros(num_cells, energy_dim))

    def forward(self, embedding: Tensor) -> Tensor:
        surface = self.network(embedding * self.input_scale)
        return surface.view(-1, self.num_cells, self.energy_dim) + self.cell_value


class MapOut(nn.Module):
    """Maps energies of the output surface [B, S, E] to embeddings [B, D], not normalised.

        embedding = network(surface) / sqrt(D)

    Args:
        embedding_dim: D.
        num_cells: S.
        energy_dim: E.
        hidden: size of the hidden layer; None: no hidden layer.
    """

    def __init__(self, embedding_dim: int, num_cells: int, energy_dim: int, hidden: int | None) -> None:
        super().__init__()
        self.is_linear = hidden is None
        self.output_scale = 1 / math.sqrt(embedding_dim)
        self.network = nn.Sequential(*_layers(num_cells * energy_dim, embedding_dim, hidden))

    def forward(self, surface: Tensor) -> Tensor:
        return self.network(surface.flatten(1)) * self.output_scale

    @torch.no_grad()
    def start_as_inverse(self, map_in: MapIn, share: float = 1.0) -> None:
        """Start as `share` times the (pseudo-)inverse of a linear map in: flows that don't move return the input."""
        weight, linear = _only_linear(map_in).weight, _only_linear(self)
        linear.weight.copy_(weight.T * (share * min(weight.shape) / weight.square().sum()))
        linear.bias.zero_()


class IdentityIn(nn.Module):
    """Takes a surface [B, S * E] as the input surface [B, S, E].

    It has no parameters, not even a value per cell. So weights that were trained on one lattice run on a lattice of any
    width and height.

    Args:
        num_cells: S.
        energy_dim: E.
    """

    def __init__(self, num_cells: int, energy_dim: int) -> None:
        super().__init__()
        self.num_cells, self.energy_dim = num_cells, energy_dim

    def forward(self, embedding: Tensor) -> Tensor:
        numbers = self.num_cells * self.energy_dim
        if embedding.shape[1] != numbers:  # `reshape` would mix samples
            raise ConfigError(
                f"model.map_in: embeddings of dimension {embedding.shape[1]} must be surfaces of lattice.width x "
                f"lattice.height x model.energy_dim = {numbers} numbers. Set the lattice to the size of the data, or "
                "choose model/map_in=linear"
            )
        return embedding.reshape(-1, self.num_cells, self.energy_dim)


class IdentityOut(nn.Module):
    """Flattens the output surface [B, S, E] to [B, S * E]."""

    def forward(self, surface: Tensor) -> Tensor:
        return surface.flatten(1)


def _only_linear(mapper: MapIn | MapOut) -> nn.Linear:
    """The layer of a map without a hidden layer."""
    linear = mapper.network[0]
    assert isinstance(linear, nn.Linear)
    return linear


@torch.no_grad()
def _start_orthogonal(linear: nn.Linear) -> None:
    """Set orthonormal rows or columns, scaled so that inputs of RMS 1 give an RMS of `INITIAL_ENERGY`; bias 0."""
    rows, columns = linear.weight.shape
    nn.init.orthogonal_(linear.weight, gain=INITIAL_ENERGY * math.sqrt(max(rows / columns, 1.0)))
    linear.bias.zero_()


def _layers(inputs: int, outputs: int, hidden: int | None) -> list[nn.Module]:
    """One linear layer, or two with a GELU between them."""
    if hidden is None:
        return [nn.Linear(inputs, outputs)]
    return [nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs)]
