"""The recurrent network that every flow shares: a GRU and two heads."""

import torch
from torch import Tensor, nn

from energy_flow.ops.gru_cell import gru_cell


class EnergyCarrier(nn.Module):
    """Decides, from what a flow reads and remembers, its next energy and where it moves."""

    def __init__(
        self, features: int, energy_dim: int, hidden_size: int, num_layers: int, residual_energy: bool
    ) -> None:
        super().__init__()
        sizes = [features + energy_dim] + [hidden_size] * (num_layers - 1)
        # `nn.GRUCell` holds the parameters under the field's standard names; `gru_cell` does the computing.
        self.cells = nn.ModuleList(nn.GRUCell(size, hidden_size) for size in sizes)
        self.energy_head = nn.Linear(hidden_size, energy_dim)
        self.displacement_head = nn.Linear(hidden_size, 3)
        self.residual_energy = residual_energy

    def forward(
        self, features: Tensor, energy: Tensor, hidden: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            features: [N, F].
            energy: [N, E].
            hidden: L tensors [N, H].

        Returns:
            energy [N, E], displacement before scale and clamp [N, 3], hidden (L tensors [N, H]).
        """
        layer_input = torch.cat([features, energy.to(features.dtype)], dim=-1)
        next_hidden = []
        for cell, state in zip(self.cells, hidden, strict=True):
            assert isinstance(cell, nn.GRUCell)
            layer_input = gru_cell(layer_input, state, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            next_hidden.append(layer_input)
        # The heads set energies and positions: they run in the precision of the energy, also under autocast.
        with torch.autocast(energy.device.type, enabled=False):
            memory = layer_input.to(energy.dtype)
            change = self.energy_head(memory)
            displacement = self.displacement_head(memory)
        energy = energy + change if self.residual_energy else torch.tanh(change)
        return energy, displacement, tuple(next_hidden)
