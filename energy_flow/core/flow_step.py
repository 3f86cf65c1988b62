"""The move of one step, its reflection at the sides, and its backward pass.

    d = clamp(scale * direction, ±max_displacement) + noise
    position' = fold(position + d) along x and y; along z a flow stops at the planes z = ±1
    energy' = tanh(change), or energy + change where the energy is residual

The heads of the carrier give `direction` and `change`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MoveRule(NamedTuple):
    """How the heads' output becomes a move."""

    scale: Tensor  # scalar, multiplies the displacement head
    max_displacement: Tensor  # scalar, per axis, normalised units; a plain number would be a CPU tensor when compiled
    residual_energy: bool  # energy + change, instead of tanh(change)


class StepResult(NamedTuple):
    """All slots after one step. Flows that aren't active stay where they are."""

    position: Tensor  # [..., 3]
    energy: Tensor  # [..., E]
    length: Tensor  # [...], detached: length of the move with noise, before any reflection; 0 if not active
    reached: Tensor  # bool [...]: the flow is on an output plane
    decision: Tensor  # [..., E + 3]: output of the heads, energy first


def fold(coordinate: Tensor) -> Tensor:
    """Reflect a coordinate at -1 and 1 until it lies inside (a triangular wave of period 4).

    Values inside are returned bit for bit. The gradient is +1 after an even number of reflections, -1 after an odd one.
    """
    folded = 1 - (torch.remainder(coordinate + 1, 4) - 2).abs()
    return torch.where(coordinate.abs() <= 1, coordinate, folded)


def fold_slope(coordinate: Tensor) -> Tensor:
    """Derivative of `fold`: 1 or -1, elementwise."""
    slope = -(torch.remainder(coordinate + 1, 4) - 2).sign()
    return torch.where(coordinate.abs() <= 1, 1.0, slope)


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
    """Move all active flows by the output of the heads.

    Args:
        position: [..., 3].
        energy: [..., E].
        active: bool [...].
        decision: [..., E + 3], output of the heads: change of energy, then direction.
        noise: [..., 3] in normalised units, added after the limit; None for no noise.
        scale, max_displacement, residual_energy: see `MoveRule`.

    Returns:
        position, energy, length and reached of `StepResult`.
    """
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
    """The backward pass of `move`, with the same arguments except these.

    Args:
        position: [..., 3], before the move.
        next_energy: [..., E], after the move.
        grad_position, grad_energy: gradients of position and energy after the move.

    Returns:
        Gradients of position, energy and decision before the move.
    """
    unlimited = scale * decision[..., -3:]
    displacement = unlimited.clamp(-max_displacement, max_displacement)
    if noise is not None:
        displacement = displacement + noise
    moved = position + displacement
    slope = torch.cat([fold_slope(moved[..., :2]), (moved[..., 2:].abs() < 1).to(moved.dtype)], dim=-1)
    moves = active[..., None]
    grad_moved = torch.where(moves, grad_position * slope, 0.0)
    grad_direction = grad_moved * scale * (unlimited.abs() <= max_displacement)
    slope_energy = 1.0 if residual_energy else 1 - next_energy.square()
    grad_change = torch.where(moves, grad_energy * slope_energy, 0.0)
    return (
        torch.where(moves, grad_moved, grad_position),
        grad_energy if residual_energy else torch.where(moves, 0.0, grad_energy),
        torch.cat([grad_change, grad_direction], dim=-1),
    )
