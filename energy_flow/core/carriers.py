"""Carriers besides the GRU: LSTM, minimal gated unit, a network without memory, and attention over a flow's own past.

All of them keep the protocol `parts.Carrier`. They call their layers as modules, so hooks and wrappers work.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from energy_flow.core.energy_lattice import Count
from energy_flow.core.precision import parameter_dtype, without_autocast
from energy_flow.errors import ConfigError


class HeadedCarrier(nn.Module):
    """Base of the carriers: joins their inputs, and has the two heads.

    Args:
        energy_dim: E.
        hidden_size: H.
    """

    def __init__(self, energy_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.energy_head = nn.Linear(hidden_size, energy_dim)
        self.displacement_head = nn.Linear(hidden_size, 3)

    def inputs(self, features: Tensor, energy: Tensor) -> Tensor:
        """Features [..., F] and energies [..., E] -> [..., F + E], in the dtype of the features."""
        return torch.cat([features, energy.to(features.dtype)], dim=-1)

    def heads(self, hidden: Tensor) -> Tensor:
        """Both heads: [..., H] -> change of energy and direction [..., E + 3]."""
        # The heads set energies and positions: they run in the dtype of their weights, also under autocast.
        with without_autocast(hidden.device):
            hidden = hidden.to(parameter_dtype(self.energy_head))
            return torch.cat([self.energy_head(hidden), self.displacement_head(hidden)], dim=-1)


class LSTMCarrier(HeadedCarrier):
    """A long short-term memory of one or more layers.

    Args:
        features: F, output size of the neuron.
        energy_dim: E.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, *, features: Count, energy_dim: Count, hidden_size: Count, num_layers: Count = 1) -> None:
        super().__init__(energy_dim, hidden_size)
        sizes = _layer_inputs(features + energy_dim, hidden_size, num_layers)
        self.cells = nn.ModuleList(nn.LSTMCell(size, hidden_size) for size in sizes)

    def forward(
        self, features: Tensor, energy: Tensor, hidden: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of all flows.

        Args:
            features: [B, M, F].
            energy: [B, M, E].
            hidden: output and cell state of the first layer, then of the next: 2 L tensors [B, M, H]. None: zeros.

        Returns:
            The output of the heads [B, M, E + 3], and the next hidden states.
        """
        flows = features.shape[:-1]
        layer_input = self.inputs(features, energy).flatten(0, -2)  # the cells take [N, X] only
        next_hidden: list[Tensor] = []
        for layer, cell in enumerate(self.cells):
            own = None if hidden is None else [state.flatten(0, -2) for state in hidden[2 * layer : 2 * layer + 2]]
            layer_input, state = cell(layer_input, own)
            next_hidden += [layer_input.unflatten(0, flows), state.unflatten(0, flows)]
        return self.heads(next_hidden[-2]), tuple(next_hidden)


class MGUCell(nn.Module):
    """A minimal gated unit (Zhou, Wu, Zhang and Zhou, 2016: "Minimal gated unit for recurrent neural networks").

        gate = sigmoid(W_f [hidden, x] + b_f)
        candidate = tanh(W_h [gate * hidden, x] + b_h)
        hidden' = (1 - gate) * hidden + gate * candidate

    Args:
        input_size: X.
        hidden_size: H.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gate = nn.Linear(hidden_size + input_size, hidden_size)
        self.candidate = nn.Linear(hidden_size + input_size, hidden_size)

    def forward(self, inputs: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Inputs [..., X] and hidden state [..., H] (None: zeros) -> the next hidden state [..., H]."""
        if hidden is None:
            hidden = inputs.new_zeros(*inputs.shape[:-1], self.hidden_size)
        gate = torch.sigmoid(self.gate(torch.cat([hidden, inputs], dim=-1)))
        candidate = torch.tanh(self.candidate(torch.cat([gate * hidden, inputs], dim=-1)))
        return (1 - gate) * hidden + gate * candidate


class MGUCarrier(HeadedCarrier):
    """Minimal gated units in one or more layers: two thirds of a GRU's weights.

    Args:
        features: F, output size of the neuron.
        energy_dim: E.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, *, features: Count, energy_dim: Count, hidden_size: Count, num_layers: Count = 1) -> None:
        super().__init__(energy_dim, hidden_size)
        sizes = _layer_inputs(features + energy_dim, hidden_size, num_layers)
        self.cells = nn.ModuleList(MGUCell(size, hidden_size) for size in sizes)

    def forward(
        self, features: Tensor, energy: Tensor, hidden: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step of all flows.

        Args:
            features: [B, M, F].
            energy: [B, M, E].
            hidden: hidden states of the L layers, each [B, M, H]. None: zeros.

        Returns:
            The output of the heads [B, M, E + 3], and the next hidden states.
        """
        layer_input = self.inputs(features, energy)
        before: Sequence[Tensor | None] = [None] * len(self.cells) if hidden is None else hidden
        next_hidden: list[Tensor] = []
        for cell, own in zip(self.cells, before, strict=True):
            layer_input = cell(layer_input, own)
            next_hidden.append(layer_input)
        return self.heads(layer_input), tuple(next_hidden)


class MLPCarrier(HeadedCarrier):
    """Linear layers, each followed by a SiLU. A flow has no memory: its energy and position are all it knows.

    Args:
        features: F, output size of the neuron.
        energy_dim: E.
        hidden_size: H.
        num_layers: L.
    """

    def __init__(self, *, features: Count, energy_dim: Count, hidden_size: Count, num_layers: Count = 1) -> None:
        super().__init__(energy_dim, hidden_size)
        sizes = _layer_inputs(features + energy_dim, hidden_size, num_layers)
        self.network = nn.Sequential(*(layer for size in sizes for layer in (nn.Linear(size, hidden_size), nn.SiLU())))

    def forward(self, features: Tensor, energy: Tensor, hidden: tuple[()] | None = None) -> tuple[Tensor, tuple[()]]:
        """Features [B, M, F] and energies [B, M, E] -> the output of the heads [B, M, E + 3], and no hidden state."""
        return self.heads(self.network(self.inputs(features, energy))), ()


class AttentionCarrier(HeadedCarrier):
    """Attention of a flow over its own steps, from its first to the present one.

        x = embed([features, energy])
        q, k, v = query(x), key(x), value(x)
        attended = sum over own steps s of softmax_s(q . k_s / sqrt(H / num_heads)) v_s, in every head
        decision = heads(silu(x + output(attended)))

    Steps carry no number: a flow knows their order only by what its features say. The hidden state grows by one step
    in every step.

    Args:
        features: F, output size of the neuron.
        energy_dim: E.
        hidden_size: H.
        num_heads: heads of the attention; H is a multiple of it.

    Raises:
        ConfigError: H isn't a multiple of `num_heads`.
    """

    def __init__(self, *, features: Count, energy_dim: Count, hidden_size: Count, num_heads: Count) -> None:
        super().__init__(energy_dim, hidden_size)
        if num_heads < 1 or hidden_size % num_heads != 0:
            raise ConfigError(
                f"model.carrier.num_heads = {num_heads}: model.carrier.hidden_size = {hidden_size} must be a multiple "
                "of it. Set model.carrier.num_heads to 1, or to a divisor of model.carrier.hidden_size"
            )
        self.num_heads = num_heads
        self.embed = nn.Linear(features + energy_dim, hidden_size)
        self.query, self.key, self.value, self.output = (nn.Linear(hidden_size, hidden_size) for _ in range(4))

    def forward(
        self, features: Tensor, energy: Tensor, hidden: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step of all flows.

        Args:
            features: [B, M, F].
            energy: [B, M, E].
            hidden: keys and values of the t steps before, both [B, M, t, H]. None in the first step.

        Returns:
            The output of the heads [B, M, E + 3], and keys and values of t + 1 steps.
        """
        x = self.embed(self.inputs(features, energy))
        keys, values = self.key(x)[..., None, :], self.value(x)[..., None, :]
        if hidden is not None:
            keys, values = torch.cat([hidden[0], keys], dim=-2), torch.cat([hidden[1], values], dim=-2)
        attended = self.attend(self.query(x), keys, values)
        return self.heads(nn.functional.silu(x + self.output(attended))), (keys, values)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Query [..., H], keys and values [..., t, H] -> [..., H]."""
        # Products of elements: a batch of a million tiny matrix products is slower, and too large for fused kernels.
        query, keys, values = (tensor.unflatten(-1, (self.num_heads, -1)) for tensor in (query, keys, values))
        scores = (query[..., None, :, :] * keys).sum(-1) / math.sqrt(query.shape[-1])
        share = scores.softmax(dim=-2)
        return (share[..., None] * values).sum(-3).flatten(-2)


def _layer_inputs(first: int, hidden_size: int, num_layers: int) -> list[int]:
    """Input sizes of the layers, the lowest first."""
    return [first] + [hidden_size] * (num_layers - 1)
