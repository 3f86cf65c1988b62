"""The network that every cell of the lattice shares."""

import torch
from torch import Tensor, nn


class SimpleNeuron(nn.Module):
    """(position, energy) -> features: what a flow reads at the place where it is.

    Positions are already normalised to [-1, 1] and are used as they are. The network runs in the dtype of
    the positions, also under autocast: bfloat16 can't tell neighbouring cells apart.
    """

    def __init__(self, energy_dim: int, features: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 + energy_dim, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, position: Tensor, energy: Tensor) -> Tensor:
        """[N, 3], [N, E] -> [N, features]."""
        with torch.autocast(position.device.type, enabled=False):
            return self.network(torch.cat([position, energy.to(position.dtype)], dim=-1))
