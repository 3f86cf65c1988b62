"""The weights of a step in the layout of the tape's kernels, and the sums of their gradients."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.ops.gru_layer import LayerGradients, PackedLayer

_ALIGNMENT = 32  # elements, so that matrix units can read a row: 16 bytes on a GPU, 64 bytes on a CPU in bf16


@dataclass(frozen=True)
class PackedWeights:
    """All weights of a step, packed once per rollout."""

    neuron: tuple[Tensor, ...]  # weight1, bias1, weight2, bias2
    layers: tuple[PackedLayer, ...]
    head_weight: Tensor  # [E + 3, H], energy first; the dtype of the geometry
    head_bias: Tensor  # [E + 3]
    num_features: int  # F
    input_size: int  # X: F + E, padded for alignment
    hidden_size: int  # H

    @classmethod
    def pack(cls, neuron: SimpleNeuron, carrier: EnergyCarrier, dtype: torch.dtype) -> Self:
        """Pack the weights of both networks; `dtype` is that in which the GRU's products run."""
        cells = carrier.gru_cells()
        width = padded(cells[0].input_size)
        layers = [PackedLayer.pack(cell, width if i == 0 else cell.input_size, dtype) for i, cell in enumerate(cells)]
        return cls(
            neuron=neuron.weights,
            layers=tuple(layers),
            head_weight=torch.cat([carrier.energy_head.weight, carrier.displacement_head.weight]),
            head_bias=torch.cat([carrier.energy_head.bias, carrier.displacement_head.bias]),
            num_features=cells[0].input_size - carrier.energy_head.out_features,
            input_size=width,
            hidden_size=cells[0].hidden_size,
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
        self.neuron = [torch.zeros_like(weight) for weight in weights.neuron]
        self.layers = [LayerGradients(layer) for layer in weights.layers]
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

    def unpack(self, carrier: EnergyCarrier) -> list[Tensor]:
        """The gradients of the modules' parameters, in the order of `step_parameters`."""
        cells = [layer.unpack(cell) for layer, cell in zip(self.layers, carrier.gru_cells(), strict=True)]
        energy_dim = carrier.energy_head.out_features
        heads = [*self.head_weight.split([energy_dim, 3]), *self.head_bias.split([energy_dim, 3])]
        return [*self.neuron, *(gradient for cell in cells for gradient in cell), *heads]


def step_parameters(neuron: SimpleNeuron, carrier: EnergyCarrier) -> list[Tensor]:
    """All parameters of a step."""
    cells = [(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh) for cell in carrier.gru_cells()]
    energy, displacement = carrier.energy_head, carrier.displacement_head
    heads = [energy.weight, displacement.weight, energy.bias, displacement.bias]
    return [*neuron.weights, *(parameter for cell in cells for parameter in cell), *heads]
