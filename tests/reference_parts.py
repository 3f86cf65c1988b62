"""The parts of the reference: carriers, neurons, maps by convolution and aggregations, flow by flow, cell by cell.

Written from the rules alone, in loops; modules give their parameters only. Every function takes one flow, one cell or
one sample. Shapes have no batch: an energy is [E], a surface [S, E], an image [C, H, W].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from energy_flow.core.aggregation import MeanAggregation, SoftmaxAggregation, SumAggregation
from energy_flow.core.carriers import AttentionCarrier, LSTMCarrier, MGUCarrier, MLPCarrier
from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.local_field import LocalFieldNeuron
from energy_flow.core.maps import ConvMapIn, ConvMapOut
from energy_flow.core.simple_neuron import SimpleNeuron
from tests.reference_flows import Margins, number

Member = tuple[Tensor, Tensor, Tensor]  # weight, score and energy [E] of a landing in a cell


def fold(x: float) -> float:
    """Mirror at -1 and +1 until inside: one reflection at a time."""
    while not -1.0 <= x <= 1.0:
        x = 2.0 - x if x > 1.0 else -2.0 - x
    return x


def apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


# Carriers


def carrier_step(carrier: nn.Module, features: Tensor, energy: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    """The next energy's head and the displacement's, [E + 3], and the next hidden state; it starts as None."""
    steps: dict[type, Callable[..., tuple[Tensor, Any]]] = {
        EnergyCarrier: gru_step,
        LSTMCarrier: lstm_step,
        MGUCarrier: mgu_step,
        MLPCarrier: mlp_step,
        AttentionCarrier: attention_step,
    }
    step = next(step for kind, step in steps.items() if isinstance(carrier, kind))
    last, hidden = step(carrier, torch.cat([features, energy]), hidden)
    return torch.cat([apply(carrier.energy_head, last), apply(carrier.displacement_head, last)]), hidden


def gru_step(carrier: Any, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    after = []
    for layer, cell in enumerate(carrier.cells):
        x = gru_cell(cell, x, x.new_zeros(cell.hidden_size) if hidden is None else hidden[layer])
        after.append(x)
    return x, after


def gru_cell(cell: nn.GRUCell, inputs: Tensor, hidden: Tensor) -> Tensor:
    """Cho et al. 2014 in the variant of cuDNN: the reset gate acts after the product."""
    size = hidden.shape[0]
    gates_i = [
        cell.weight_ih[g * size : (g + 1) * size] @ inputs + cell.bias_ih[g * size : (g + 1) * size] for g in range(3)
    ]
    gates_h = [
        cell.weight_hh[g * size : (g + 1) * size] @ hidden + cell.bias_hh[g * size : (g + 1) * size] for g in range(3)
    ]
    reset = torch.sigmoid(gates_i[0] + gates_h[0])
    update = torch.sigmoid(gates_i[1] + gates_h[1])
    candidate = torch.tanh(gates_i[2] + reset * gates_h[2])
    return (1.0 - update) * candidate + update * hidden


def lstm_step(carrier: Any, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    """Hochreiter and Schmidhuber 1997 with a forget gate; PyTorch orders gates as input, forget, cell, output."""
    after = []
    for layer, cell in enumerate(carrier.cells):
        size = cell.hidden_size
        output, state = [x.new_zeros(size)] * 2 if hidden is None else hidden[layer]
        gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ output + cell.bias_hh
        enter, keep, candidate, leave = (gates[g * size : (g + 1) * size] for g in range(4))
        state = torch.sigmoid(keep) * state + torch.sigmoid(enter) * torch.tanh(candidate)
        x = torch.sigmoid(leave) * torch.tanh(state)
        after.append((x, state))
    return x, after


def mgu_step(carrier: Any, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    """Zhou et al. 2016: one gate forgets and updates; the hidden state comes first in a product."""
    after = []
    for layer, cell in enumerate(carrier.cells):
        old = x.new_zeros(cell.hidden_size) if hidden is None else hidden[layer]
        gate = torch.sigmoid(apply(cell.gate, torch.cat([old, x])))
        candidate = torch.tanh(apply(cell.candidate, torch.cat([gate * old, x])))
        x = (1.0 - gate) * old + gate * candidate
        after.append(x)
    return x, after


def mlp_step(carrier: Any, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    for layer in carrier.network:
        if isinstance(layer, nn.Linear):
            x = silu(apply(layer, x))
    return x, None


def attention_step(carrier: Any, x: Tensor, hidden: Any) -> tuple[Tensor, Any]:
    """The hidden state is the list of (key, value) of every step so far."""
    x = apply(carrier.embed, x)
    past = [*(hidden or []), (apply(carrier.key, x), apply(carrier.value, x))]
    query, width = apply(carrier.query, x), x.shape[0] // carrier.num_heads
    attended = []
    for head in range(carrier.num_heads):
        own = slice(head * width, (head + 1) * width)
        scores = [query[own] @ key[own] / math.sqrt(width) for key, _ in past]
        largest = max(number(score) for score in scores)  # exp of a large score is infinite; their ratios aren't
        shares = [(score - largest).exp() for score in scores]
        attended.append(sum(share * value[own] for share, (_, value) in zip(shares, past, strict=True)) / sum(shares))
    return silu(x + apply(carrier.output, torch.cat(attended))), past


# Neurons


def sense(neuron: nn.Module, surface: Tensor) -> Any:
    """What a neuron knows of the input surface [S, E]: a plane [C, H, W], or None."""
    if not isinstance(neuron, LocalFieldNeuron):
        return None
    return convolve(neuron.encoder, surface_to_planes(surface, neuron.width, neuron.height))


def neuron_features(neuron: nn.Module, position: Tensor, energy: Tensor, sensed: Any, margins: Margins) -> Tensor:
    """Position [3], energy [E] and the result of `sense` -> features [F]."""
    assert isinstance(neuron, SimpleNeuron | LocalFieldNeuron)
    known = [position, energy]
    if isinstance(neuron, LocalFieldNeuron):
        note_kink(margins, position[0], neuron.width)
        note_kink(margins, position[1], neuron.height)
        known += readings(sensed, position)
    first, _, second = neuron.network
    return apply(second, silu(apply(first, torch.cat(known))))


def readings(field: Tensor, position: Tensor) -> list[Tensor]:
    """The field [C, H, W] at a flow's place and one cell away: x - 1, x + 1, y - 1, y + 1."""
    step_x, step_y = (2.0 / (size - 1) if size > 1 else 0.0 for size in (field.shape[2], field.shape[1]))
    offsets = [(0.0, 0.0), (-step_x, 0.0), (step_x, 0.0), (0.0, -step_y), (0.0, step_y)]
    return [read(field, reflect(position[0] + dx), reflect(position[1] + dy)) for dx, dy in offsets]


def reflect(x: Tensor) -> Tensor:
    assert x.isfinite()
    while not -1.0 <= number(x) <= 1.0:
        x = 2.0 - x if number(x) > 1.0 else -2.0 - x
    return x


def read(field: Tensor, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros_like(field[:, 0, 0])
    for row, share_y in bilinear_axis(y, field.shape[1]):
        for column, share_x in bilinear_axis(x, field.shape[2]):
            total = total + share_y * share_x * field[:, row, column]
    return total


def bilinear_axis(coordinate: Tensor, cells: int) -> list[tuple[int, Tensor]]:
    """(cell, share) of the cells around a place on an axis; the shares add up to 1."""
    if cells == 1:
        return [(0, torch.ones_like(coordinate))]
    place = (coordinate + 1.0) / 2.0 * (cells - 1)
    left = min(max(math.floor(number(place)), 0), cells - 2)
    return [(left, 1.0 - (place - left)), (left + 1, place - left)]


def note_kink(margins: Margins, coordinate: Tensor, cells: int) -> None:
    """Bilinear shares have a kink at every cell but the first and the last."""
    place = (number(coordinate) + 1.0) / 2.0 * (cells - 1)
    if cells > 1 and coordinate.requires_grad and 1e-12 < place < cells - 1 - 1e-12:
        margins.note("left cell", place - round(place))


# Maps by convolution


def surface_to_planes(surface: Tensor, width: int, height: int) -> Tensor:
    rows = [torch.stack([surface[y * width + x] for x in range(width)], dim=1) for y in range(height)]
    return torch.stack(rows, dim=1)


def planes_to_surface(planes: Tensor) -> Tensor:
    _, height, width = planes.shape
    return torch.stack([planes[:, y, x] for y in range(height) for x in range(width)])


def convolve(network: nn.Module, planes: Tensor) -> Tensor:
    """Convolutions with a SiLU between them; cells beyond a border are those that a flow would be reflected to."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        planes = convolution(layer, planes)
        if layer is not layers[-1]:
            planes = silu(planes)
    return planes


def convolution(layer: nn.Conv2d, planes: Tensor) -> Tensor:
    _, height, width = planes.shape
    half = layer.kernel_size[0] // 2
    rows = []
    for y in range(height):
        row = []
        for x in range(width):
            total = layer.bias
            for dy in range(-half, half + 1):
                for dx in range(-half, half + 1):
                    source = planes[:, mirrored(y + dy, height), mirrored(x + dx, width)]
                    total = total + layer.weight[:, :, dy + half, dx + half] @ source
            row.append(total)
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows, dim=1)


def mirrored(cell: int, cells: int) -> int:
    if cells == 1:
        return 0
    return round((fold(2.0 * cell / (cells - 1) - 1.0) + 1.0) / 2.0 * (cells - 1))


def conv_map_in(mapper: ConvMapIn, embedding: Tensor) -> Tensor:
    """Embedding [D] -> surface [S, E]. Rows of unit length enter with entries of size one."""
    pixels = embedding * math.sqrt(embedding.shape[0])
    planes = torch.tanh(convolve(mapper.network, pixels.reshape(-1, mapper.height, mapper.width)))
    return planes_to_surface(planes) + mapper.cell_value


def conv_map_out(mapper: ConvMapOut, surface: Tensor) -> Tensor:
    """Surface [S, E] -> embedding [D]."""
    image = convolve(mapper.network, surface_to_planes(surface, mapper.width, mapper.height)).reshape(-1)
    return image / math.sqrt(image.shape[0])


# Aggregations


def aggregate(aggregation: nn.Module, members: list[Member], margins: Margins) -> Tensor:
    """The energy [E] of a cell from all of its landings, at least one."""
    if isinstance(aggregation, SumAggregation):
        return sum((weight * energy for weight, _, energy in members[1:]), members[0][0] * members[0][2])
    assert isinstance(aggregation, SoftmaxAggregation | MeanAggregation)
    mass = sum(weight for weight, _, _ in members)
    if mass.requires_grad:
        margins.note("missing share", 1.0 - mass)
    missing = 1.0 - mass if number(mass) < 1.0 else torch.zeros_like(mass)
    if isinstance(aggregation, MeanAggregation):
        members = [(weight, torch.zeros_like(score), energy) for weight, score, energy in members]
    numerator = sum(weight * score.exp() * energy for weight, score, energy in members)
    return numerator / (sum(weight * score.exp() for weight, score, _ in members) + missing)
