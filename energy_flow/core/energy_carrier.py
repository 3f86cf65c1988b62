"""The recurrent network that every flow shares: a GRU and two heads."""

import torch
from torch import Tensor, nn

from energy_flow.ops.gru_cell import gru_cell


class EnergyCarrier(nn.Module):
    """Decides, from what a flow reads and remembers, its next energy and where it moves."""

    def __init__(self, features: int, energy_dim: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        sizes = [features + energy_dim] + [hidden_size] * (num_layers - 1)
        # `nn.GRUCell` holds the parameters under the field's standard names; `ops` does the computing.
        self.cells = nn.ModuleList(nn.GRUCell(size, hidden_size) for size in sizes)
        self.energy_head = nn.Linear(hidden_size, energy_dim)
        self.displacement_head = nn.Linear(hidden_size, 3)

    @property
    def num_features(self) -> int:
        return self.gru_cells()[0].input_size - self.energy_head.out_features

    @property
    def hidden_size(self) -> int:
        return self.energy_head.in_features

    def gru_cells(self) -> list[nn.GRUCell]:
        return [cell for cell in self.cells if isinstance(cell, nn.GRUCell)]

    def remember(self, read: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of the GRU: read [..., F + E] and L memories [..., H] -> the next L memories."""
        layer_input, following = read, []
        for cell, memory in zip(self.gru_cells(), hidden, strict=True):
            layer_input = gru_cell(layer_input, memory, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            following.append(layer_input)
        return tuple(following)

    def decide(self, memory: Tensor) -> Tensor:
        """Both heads: [..., H] -> change of energy and direction [..., E + 3]."""
        # The heads set energies and positions: they run in the dtype of their weights, also under autocast.
        with torch.autocast(memory.device.type, enabled=False):
            memory = memory.to(self.energy_head.weight.dtype)
            return torch.cat([self.energy_head(memory), self.displacement_head(memory)], dim=-1)
