"""The recurrent network that all flows share: a GRU and two heads."""

import torch
from torch import Tensor, nn

from energy_flow.ops.gru_cell import gru_cell


class EnergyCarrier(nn.Module):
    """Computes from features, energy and hidden state the next energy and the displacement of a flow.

    Args:
        features: F, output size of the neuron.
        energy_dim: E.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, features: int, energy_dim: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        sizes = [features + energy_dim] + [hidden_size] * (num_layers - 1)
        # `nn.GRUCell` stores the parameters under their standard names; `ops` computes.
        self.cells = nn.ModuleList(nn.GRUCell(size, hidden_size) for size in sizes)
        self.energy_head = nn.Linear(hidden_size, energy_dim)
        self.displacement_head = nn.Linear(hidden_size, 3)

    @property
    def num_features(self) -> int:
        """F."""
        return self.gru_cells()[0].input_size - self.energy_head.out_features

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.energy_head.in_features

    def gru_cells(self) -> list[nn.GRUCell]:
        """The L layers, the lowest first."""
        return [cell for cell in self.cells if isinstance(cell, nn.GRUCell)]

    def forward(
        self, features: Tensor, energy: Tensor, hidden: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of all flows.

        Args:
            features: [..., F].
            energy: [..., E].
            hidden: hidden states of the L layers, each [..., H]; None: zeros.

        Returns:
            The output of the heads [..., E + 3], and the next hidden states.
        """
        inputs = torch.cat([features, energy.to(features.dtype)], dim=-1)
        if hidden is None:
            zeros = inputs.new_zeros(()).expand(*inputs.shape[:-1], self.hidden_size)
            hidden = (zeros,) * len(self.cells)
        hidden = self.recur(inputs, hidden)
        return self.heads(hidden[-1]), hidden

    def recur(self, inputs: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of the GRU: inputs [..., F + E] and L hidden states [..., H] -> the next L hidden states."""
        layer_input, next_hidden = inputs, []
        for cell, own in zip(self.gru_cells(), hidden, strict=True):
            layer_input = gru_cell(layer_input, own, cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
            next_hidden.append(layer_input)
        return tuple(next_hidden)

    def heads(self, hidden: Tensor) -> Tensor:
        """Both heads: [..., H] -> change of energy and direction [..., E + 3]."""
        # The heads set energies and positions: they run in the dtype of their weights, also under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.energy_head.weight.dtype)
            return torch.cat([self.energy_head(hidden), self.displacement_head(hidden)], dim=-1)
