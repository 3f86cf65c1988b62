"""One forward pass in a few plain lines: the independent check of this folder.

It calls map in, neuron, carrier and map out as they stand in the processor, for all samples at once, and autograd does
the rest. No spawn, no filter, no early convergence. Inside `plain_parts()` the shipped neuron and carrier are plain as
well: they call each of their modules, in the order in which it stands here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.ops.counter_noise import counter_noise


class PlainOutput(NamedTuple):
    """Like `FlowOutput`, as far as tests compare it."""

    embedding: Tensor  # [B, D]
    surface: Tensor  # [B, S, E]


def plain_forward(processor: FlowProcessor, embedding: Tensor, rows: Tensor | None = None) -> PlainOutput:
    """One forward pass of bilinear deposits; with noise if the processor trains and its lattice has noise."""
    lattice = processor.settings
    energy = processor.map_in(embedding)
    position = cell_places(lattice.width, lattice.height).to(energy).expand(len(embedding), -1, -1)
    active = torch.ones(energy.shape[:2], dtype=torch.bool)
    steps = torch.zeros(energy.shape[:2]).to(energy)
    hidden: Any = None
    for step in range(lattice.num_steps):
        decision, hidden = processor.carrier(processor.neuron(position, energy), energy, hidden)
        limit = lattice.movement.max_displacement
        move = (processor.displacement_scale() * decision[..., -3:]).clamp(-limit, limit)
        if processor.training and lattice.noise.std > 0:
            move = move + lattice.noise.std * noise_of(processor, step, rows, energy)
        moved = position + move
        height = moved[..., 2:].clamp(-1, 1)
        moves = active[..., None]
        position = torch.where(moves, torch.cat([mirrored(moved[..., :2]), height], -1), position)
        energy = torch.where(moves, torch.tanh(decision[..., :-3]), energy)
        steps = steps + active
        active = active & (moved[..., 2].abs() < 1)
    surface = collected(position, energy, steps, active, lattice.width, lattice.height)
    output = processor.lattice.map_out(surface)
    if processor.skip_gain is not None:
        output = output + processor.skip_gain * embedding
    return PlainOutput(output, surface)


def cell_places(width: int, height: int) -> Tensor:
    """The centres of all cells, z = 0, [S, 3]."""
    places = [[2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1, 0.0] for y in range(height) for x in range(width)]
    return torch.tensor(places, dtype=torch.float64)


def noise_of(processor: FlowProcessor, step: int, rows: Tensor | None, energy: Tensor) -> Tensor:
    assert rows is not None
    noise = counter_noise(processor.seed, processor.optimizer_step.clone(), step, rows, energy.shape[1], energy.dtype)
    return noise if processor.settings.noise.z else noise * torch.tensor([1, 1, 0])


def mirrored(place: Tensor) -> Tensor:
    """Reflect at -1 and 1 until inside."""
    while (place.abs() > 1).any():
        place = torch.where(place > 1, 2 - place, place)
        place = torch.where(place < -1, -2 - place, place)
    return place


def collected(position: Tensor, energy: Tensor, steps: Tensor, active: Tensor, width: int, height: int) -> Tensor:
    """The output surface [B, S, E]: the softmax over all landings of a cell, each with its bilinear weight."""
    z = position[..., 2]
    distance = torch.where(active, 1 - z * torch.where(z > 0, 1.0, -1.0), 0.0)
    strength = torch.exp(energy.norm(dim=-1) / (1 + distance) * (1 + 0.1 * steps))
    share = torch.einsum("bmy,bmx->bmyx", hat(position[..., 1], height), hat(position[..., 0], width)).flatten(2)
    missing = (1 - share.sum(1)).clamp(min=0)
    weight = share * strength[..., None]
    return torch.einsum("bms,bme->bse", weight, energy) / (weight.sum(1) + missing)[..., None]


def hat(coordinate: Tensor, cells: int) -> Tensor:
    """Bilinear weights of all cells along an axis, [B, M, cells]."""
    place = (coordinate + 1) / 2 * (cells - 1)
    return (1 - (place[..., None] - torch.arange(cells)).abs()).clamp(min=0)


def neuron_forward(self: SimpleNeuron, position: Tensor, energy: Tensor) -> Tensor:
    return self.network(torch.cat([position, energy], -1))


def carrier_forward(
    self: EnergyCarrier, features: Tensor, energy: Tensor, hidden: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = torch.cat([features, energy], -1)
    shape, states = value.shape[:-1], []
    for layer, cell in enumerate(self.cells):
        before = None if hidden is None else hidden[layer].flatten(0, -2)
        value = cell(value.flatten(0, -2), before).unflatten(0, shape)
        states.append(value)
    return torch.cat([self.energy_head(value), self.displacement_head(value)], -1), tuple(states)


@contextmanager
def plain_parts() -> Iterator[None]:
    """The shipped neuron and carrier as plain modules, which call `nn.GRUCell`, `nn.Linear` and their like."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimpleNeuron, "forward", neuron_forward)
        patch.setattr(EnergyCarrier, "forward", carrier_forward)
        yield
