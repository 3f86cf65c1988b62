"""One step of all flows, and its way back: written once, run in every way that the rollout knows."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from energy_flow.core.geometry import fold, fold_slope


class Networks(Protocol):
    """What a step asks of the networks that flows share. How flows remember is the rollout's business."""

    def read(self, position: Tensor, energy: Tensor) -> Tensor:
        """[..., 3], [..., E] -> features and energy, what the carrier reads [..., F + E]."""

    def remember(self, read: Tensor) -> Tensor:
        """Update the memory of all flows; returns the last layer's, [..., H]."""

    def decide(self, memory: Tensor) -> Tensor:
        """[..., H] -> change of energy and direction, [..., E + 3], in the dtype of the geometry."""


class MoveRule(NamedTuple):
    """How decisions become moves."""

    scale: Tensor  # scalar, multiplies the displacement head
    max_displacement: Tensor  # scalar, per axis, normalised units
    residual_energy: bool  # energy + change, instead of tanh(change)

    @classmethod
    def of(cls, scale: Tensor, max_displacement: float, residual_energy: bool) -> Self:
        """With the limit on the device of `scale`: compiled code takes a second number for a tensor on the CPU."""
        return cls(scale, scale.new_full((), max_displacement), residual_energy)


class StepResult(NamedTuple):
    """State of every slot after a step; flows that aren't active stand still."""

    position: Tensor  # [..., 3]
    energy: Tensor  # [..., E]
    length: Tensor  # [...], detached: how far the flow moved, noise included, before any reflection; 0 if not active
    reached: Tensor  # bool [...]: the flow is on an output plane
    decision: Tensor  # [..., E + 3]: what the heads said


def move(
    position: Tensor,
    energy: Tensor,
    active: Tensor,
    decision: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    max_displacement: Tensor,
    residual_energy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Position, energy, length and reached of `StepResult`."""
    change, direction = decision[..., :-3], decision[..., -3:]
    displacement = (scale * direction).clamp(-max_displacement, max_displacement)
    if noise is not None:
        displacement = displacement + noise
    moved = position + displacement
    z = moved[..., 2:]
    on_plane = z.detach().abs() >= 1
    landed = torch.cat([fold(moved[..., :2]), torch.where(on_plane, z.detach().sign(), z)], dim=-1)
    changed = energy + change if residual_energy else torch.tanh(change)
    length = torch.linalg.vector_norm(displacement.detach(), dim=-1)
    moves = active[..., None]
    return (
        torch.where(moves, landed, position),
        torch.where(moves, changed, energy),
        torch.where(active, length, 0.0),
        active & on_plane[..., 0],
    )


def move_backward(
    position: Tensor,
    next_energy: Tensor,
    active: Tensor,
    decision: Tensor,
    noise: Tensor | None,
    scale: Tensor,
    max_displacement: Tensor,
    residual_energy: bool,
    grad_position: Tensor,
    grad_energy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of position, energy and decision from those of position and energy after `move`.

    Args:
        position: before the move.
        next_energy: after it.
        grad_position, grad_energy: of position and energy after it.
    """
    wish = scale * decision[..., -3:]
    displacement = wish.clamp(-max_displacement, max_displacement)
    if noise is not None:
        displacement = displacement + noise
    moved = position + displacement
    slope = torch.cat([fold_slope(moved[..., :2]), (moved[..., 2:].abs() < 1).to(moved.dtype)], dim=-1)
    moves = active[..., None]
    grad_moved = torch.where(moves, grad_position * slope, 0.0)
    grad_direction = grad_moved * scale * (wish.abs() <= max_displacement)
    slope_energy = 1.0 if residual_energy else 1 - next_energy.square()
    grad_change = torch.where(moves, grad_energy * slope_energy, 0.0)
    return (
        torch.where(moves, grad_moved, grad_position),
        grad_energy if residual_energy else torch.where(moves, 0.0, grad_energy),
        torch.cat([grad_change, grad_direction], dim=-1),
    )


def flow_step(
    networks: Networks,
    position: Tensor,
    energy: Tensor,
    active: Tensor,
    noise: Tensor | None,
    rule: MoveRule,
    moving: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = move,
) -> StepResult:
    """Read, remember, decide, move.

    Args:
        position, energy: [..., 3] and [..., E] of all slots.
        active: bool [...].
        noise: [..., 3] in normalised units, added after the limit; None for no noise.
        moving: `move`, or a compiled form of it.
    """
    memory = networks.remember(networks.read(position, energy))
    decision = networks.decide(memory)
    return StepResult(*moving(position, energy, active, decision, noise, *rule), decision)
