"""The weights of a step in the form in which the tape uses them, and the sums of their gradients."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.ops.gru_layer import LayerGradients, PackedLayer

_ALIGNMENT = 32  # elements, what matrix units ask of a row: 16 bytes on a GPU, 64 on a CPU, in bf16


@dataclass(frozen=True)
class StepWeights:
    """Packed once per rollout."""

    neuron: tuple[Tensor, ...]  # weight1, bias1, weight2, bias2
    layers: tuple[PackedLayer, ...]
    head_weight: Tensor  # [E + 3, H], energy first; the dtype of the geometry
    head_bias: Tensor  # [E + 3]
    num_features: int  # F
    input_size: int  # X: features and energy, padded for alignment

    @classmethod
    def pack(cls, neuron: SimpleNeuron, carrier: EnergyCarrier, dtype: torch.dtype) -> Self:
        """`dtype`: of the recurrent network's products."""
        cells = carrier.gru_cells()
        width = padded(cells[0].input_size)
        layers = [PackedLayer.pack(cell, width if i == 0 else cell.input_size, dtype) for i, cell in enumerate(cells)]
        return cls(
            neuron=neuron.weights,
            layers=tuple(layers),
            head_weight=torch.cat([carrier.energy_head.weight, carrier.displacement_head.weight]),
            head_bias=torch.cat([carrier.energy_head.bias, carrier.displacement_head.bias]),
            num_features=carrier.num_features,
            input_size=width,
        )

    def no_gradients(self) -> "StepGradients":
        """Zeros to add gradients to."""
        return StepGradients(self)

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden_size

    @property
    def row_size(self) -> int:
        """Elements of a tape's row: [x | memories of all layers]."""
        return self.input_size + len(self.layers) * self.hidden_size


def padded(input_size: int) -> int:
    """Columns of the tape for an input of this size."""
    return -(-input_size // _ALIGNMENT) * _ALIGNMENT


class StepGradients:
    """Sums over flows and steps."""

    def __init__(self, weights: StepWeights) -> None:
        self.neuron = [torch.zeros_like(weight) for weight in weights.neuron]
        self.layers = [LayerGradients(layer) for layer in weights.layers]
        self.head_weight = torch.zeros_like(weights.head_weight)
        self.head_bias = torch.zeros_like(weights.head_bias)

    def add_neuron(self, gradients: list[Tensor]) -> None:
        torch._foreach_add_(self.neuron, gradients)

    def add(self, other: "StepGradients") -> None:
        torch._foreach_add_(self._tensors(), other._tensors())

    def _tensors(self) -> list[Tensor]:
        layers = [tensor for layer in self.layers for tensor in (layer.inputs, layer.memory, layer.bias)]
        return [*self.neuron, *layers, self.head_weight, self.head_bias]

    def unpack(self, carrier: EnergyCarrier) -> list[Tensor]:
        """In the order of `step_parameters`."""
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
