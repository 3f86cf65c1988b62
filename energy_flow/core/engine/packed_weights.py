"""The weights of a step in the layout of the tape's kernels, and the sums of their gradients."""

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.ops.gru_layer import LayerGradients, PackedLayer

_ALIGNMENT = 32  # elements, so that matrix units can read a row: 16 bytes on a GPU, 64 bytes on a CPU in bf16


@dataclass(frozen=True)
class PackedWeights:
    """All weights of a step, copied and packed once per rollout."""

    neuron: tuple[Tensor, ...]  # weight1, bias1, weight2, bias2
    layers: tuple[PackedLayer, ...]
    head_weight: Tensor  # [E + 3, H], energy first; the dtype of the geometry
    head_bias: Tensor  # [E + 3]
    num_features: int  # F
    input_size: int  # X: F + E, padded for alignment
    hidden_size: int  # H
    energy_dim: int  # E
    trained: tuple[bool, ...]  # of each layer: whether any of its weights needs a gradient

    @classmethod
    @torch.no_grad()
    def pack(cls, neuron: SimpleNeuron, carrier: EnergyCarrier, dtype: torch.dtype) -> Self:
        """Pack copies of the weights of both networks; `dtype` is that in which the GRU's products run."""
        cells = _cells(carrier)
        width = padded(cells[0].input_size)
        layers = [PackedLayer.pack(cell, width if i == 0 else cell.input_size, dtype) for i, cell in enumerate(cells)]
        energy_dim = carrier.energy_head.out_features
        return cls(
            neuron=tuple(weight.clone() for weight in _neuron_weights(neuron)),
            layers=tuple(layers),
            head_weight=torch.cat([carrier.energy_head.weight, carrier.displacement_head.weight]),
            head_bias=torch.cat([carrier.energy_head.bias, carrier.displacement_head.bias]),
            num_features=cells[0].input_size - energy_dim,
            input_size=width,
            hidden_size=carrier.hidden_size,
            energy_dim=energy_dim,
            trained=tuple(any(weight.requires_grad for weight in cell.parameters()) for cell in cells),
        )

    @property
    def row_size(self) -> int:
        """Elements of a tape's row: [x | hidden states of all layers]."""
        return self.input_size + len(self.layers) * self.hidden_size


def padded(input_size: int) -> int:
    """The columns that the tape has for an input of this size."""
    return -(-input_size // _ALIGNMENT) * _ALIGNMENT


class PackedGradients:
    """Gradients of `PackedWeights`, summed over flows and steps. They start at 0."""

    def __init__(self, weights: PackedWeights) -> None:
        self._num_features, self._energy_dim = weights.num_features, weights.energy_dim
        self.neuron = [torch.zeros_like(weight) for weight in weights.neuron]
        pairs = zip(weights.layers, weights.trained, strict=True)
        self.layers = [LayerGradients(layer, trained) for layer, trained in pairs]
        self.head_weight = torch.zeros_like(weights.head_weight)
        self.head_bias = torch.zeros_like(weights.head_bias)

    def add_neuron(self, gradients: list[Tensor]) -> None:
        """Add the neuron's gradients of one step."""
        torch._foreach_add_(self.neuron, gradients)

    def add(self, other: "PackedGradients") -> None:
        """Add the gradients of another chunk."""
        torch._foreach_add_(self._tensors(), other._tensors())

    def _tensors(self) -> list[Tensor]:
        layers = [tensor for layer in self.layers for tensor in (layer.weight_ih, layer.weight_hh, layer.bias)]
        return [*self.neuron, *layers, self.head_weight, self.head_bias]

    def unpack(self) -> list[Tensor]:
        """The gradients of the modules' parameters, in the order of `step_parameters` and in the heads' dtype."""
        inputs = self._num_features + self._energy_dim
        dtype = self.head_weight.dtype
        cells = [layer.unpack(inputs if i == 0 else None, dtype) for i, layer in enumerate(self.layers)]
        heads = [*self.head_weight.split([self._energy_dim, 3]), *self.head_bias.split([self._energy_dim, 3])]
        return [*self.neuron, *(gradient for cell in cells for gradient in cell), *heads]


def step_parameters(neuron: SimpleNeuron, carrier: EnergyCarrier) -> list[Tensor]:
    """All parameters of a step."""
    cells = [(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh) for cell in _cells(carrier)]
    energy, displacement = carrier.energy_head, carrier.displacement_head
    heads = [energy.weight, displacement.weight, energy.bias, displacement.bias]
    return [*_neuron_weights(neuron), *(parameter for cell in cells for parameter in cell), *heads]


def _neuron_weights(neuron: SimpleNeuron) -> tuple[Tensor, ...]:
    """Weight and bias of the first linear layer, then of the second."""
    first, second = cast(nn.Linear, neuron.network[0]), cast(nn.Linear, neuron.network[2])
    return first.weight, first.bias, second.weight, second.bias


def _cells(carrier: EnergyCarrier) -> list[nn.GRUCell]:
    return [cast(nn.GRUCell, cell) for cell in carrier.cells]
