"""One step of all flows: written once, run in every way that the rollout knows."""

from typing import NamedTuple

import torch
from torch import Tensor

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.geometry import fold
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensorized_flow_storage import FlowState


class StepResult(NamedTuple):
    """What one step does to every slot, active or not."""

    state: FlowState
    length: Tensor  # [B, M], detached: how far the flow moved, noise included, before any reflection
    reached: Tensor  # bool [B, M]: the flow is on an output plane


def flow_step(
    neuron: SimpleNeuron,
    carrier: EnergyCarrier,
    state: FlowState,
    scale: Tensor,
    max_displacement: float,
    noise: Tensor | None,
) -> StepResult:
    """Read, remember, decide, move, reflect. A pure function of its arguments.

    Args:
        state: of all slots.
        scale: scalar tensor, multiplies the displacement head.
        max_displacement: limit per axis, normalised units.
        noise: [B, M, 3] in normalised units, added after the limit; None for no noise.
    """
    features = neuron(state.position, state.energy)
    energy, direction, hidden = carrier(features, state.energy, state.hidden)
    displacement = (scale * direction).clamp(-max_displacement, max_displacement)
    if noise is not None:
        displacement = displacement + noise
    moved = state.position + displacement
    z = moved[..., 2:]
    reached = z.detach().abs() >= 1
    position = torch.cat([fold(moved[..., :2]), torch.where(reached, z.detach().sign(), z)], dim=-1)
    length = torch.linalg.vector_norm(displacement.detach(), dim=-1)
    return StepResult(FlowState(position, energy, hidden), length, reached[..., 0])
