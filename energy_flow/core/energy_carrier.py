"""The recurrent network that all flows share: a GRU and two heads."""

import torch
from torch import Tensor, nn

from energy_flow.ops.gru_cell import gru_cell


class GRUCell(nn.GRUCell):
    """`nn.GRUCell`, differentiable twice on every device."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Inputs [..., X] and hidden states [..., H] -> the next hidden states [..., H]; None: zeros."""
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
        return gru_cell(input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)


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
        self.hidden_size = hidden_size
        self.cells = nn.ModuleList(GRUCell(size, hidden_size) for size in sizes)
        self.energy_head = nn.Linear(hidden_size, energy_dim)
        self.displacement_head = nn.Linear(hidden_size, 3)

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
        return self.heads(hidden[-1].to(energy.dtype)), hidden

    def recur(self, inputs: Tensor, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One step of the GRU: inputs [..., F + E] and L hidden states [..., H] -> the next L hidden states."""
        layer_input, next_hidden = inputs.flatten(0, -2), []  # cells of torch take [N, X]
        for cell, own in zip(self.cells, hidden, strict=True):
            layer_input = cell(layer_input, own.flatten(0, -2))
            next_hidden.append(layer_input.unflatten(0, own.shape[:-1]))
        return tuple(next_hidden)

    def heads(self, hidden: Tensor) -> Tensor:
        """Both heads: [..., H], in the dtype of the energies -> change of energy and direction [..., E + 3]."""
        # The heads set energies and positions: they run in that dtype, also under autocast, which meta doesn't have.
        with torch.autocast("cpu" if hidden.is_meta else hidden.device.type, enabled=False):
            return torch.cat([self.energy_head(hidden), self.displacement_head(hidden)], dim=-1)
