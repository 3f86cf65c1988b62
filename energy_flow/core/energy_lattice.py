"""The lattice: places flows, says when they complete, spawn or end, and collects their landings."""

import math
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from energy_flow.core.geometry import Deposit, cell_centres, deposit_cells
from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowState, FlowStatus
from energy_flow.errors import NoLandingError
from energy_flow.ops.group_softmax import group_softmax_deposit
from energy_flow.settings import Settings

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class MovementSettings(Settings):
    """How far flows move; lengths in normalised units. The scale follows a schedule over optimiser steps."""

    scale: NonNegative
    warmup_steps: NonNegativeInt
    decay_steps: NonNegativeInt
    final_scale: Share
    max_displacement: Positive


class NoiseSettings(Settings):
    """Exploration noise on displacements, in training only."""

    std: NonNegative
    z: bool


class SpawnSettings(Settings):
    """Flows that move further than the threshold leave children behind."""

    enabled: bool
    threshold: Positive
    max_spawn_per_step: Count


class FilterSettings(Settings):
    """Removes flows that move less than a minimum."""

    enabled: bool
    min_displacement: Positive


class ConvergenceSettings(Settings):
    """Ends a sample's rollout early."""

    enabled: bool
    threshold: Share
    min_steps: NonNegativeInt
    patience: Count


class LatticeSettings(Settings):
    """The lattice and its rules (config group `lattice`)."""

    width: Count
    height: Count
    depth: Count
    max_steps: NonNegativeInt | None
    max_flows_per_sample: Count | None
    tensorized_storage_enabled: bool
    deposit: Deposit
    movement: MovementSettings
    noise: NoiseSettings
    spawn: SpawnSettings
    filter: FilterSettings
    convergence: ConvergenceSettings

    @property
    def num_cells(self) -> int:
        return self.width * self.height

    @property
    def num_steps(self) -> int:
        return self.depth // 2 if self.max_steps is None else self.max_steps

    @property
    def capacity(self) -> int:
        if self.max_flows_per_sample is not None:
            return self.max_flows_per_sample
        return 2 * self.num_cells if self.spawn.enabled else self.num_cells

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if not self.tensorized_storage_enabled:
            raise ValueError(
                "lattice.tensorized_storage_enabled = False: flows live in tensors only, there is no other storage. "
                "Set lattice.tensorized_storage_enabled=true"
            )
        if self.capacity < self.num_cells:
            raise ValueError(
                f"lattice.max_flows_per_sample = {self.capacity}: every one of the {self.width} x {self.height} = "
                f"{self.num_cells} cells releases a flow. Set it to {self.num_cells} or more, "
                "or to null"
            )
        if self.filter.enabled and self.spawn.enabled and self.filter.min_displacement >= self.spawn.threshold:
            raise ValueError(
                f"lattice.filter.min_displacement = {self.filter.min_displacement}: must be below "
                f"lattice.spawn.threshold = {self.spawn.threshold}, or flows that spawn would be removed"
            )
        return self


@dataclass(frozen=True)
class Landings:
    """Where flows ended, dense over slots; entries where `landed` is False mean nothing."""

    landed: Tensor  # bool [B, M]
    projected: Tensor  # bool [B, M]: put on the nearest plane after the last step, without having reached it
    xy: Tensor  # [B, M, 2]
    plane: Tensor  # int64 [B, M]: 0 is z0, 1 is zdepth
    distance: Tensor  # [B, M]: what was still to go, 0 for a flow that reached its plane
    steps: Tensor  # int64 [B, M]
    energy: Tensor  # [B, M, E]

    @property
    def score(self) -> Tensor:
        """Weight of a landing in its group's softmax: |energy| / (1 + distance) * (1 + 0.1 steps), [B, M]."""
        return (
            torch.linalg.vector_norm(self.energy, dim=-1)
            / (1 + self.distance)
            * (1 + 0.1 * self.steps.to(self.distance.dtype))
        )


@dataclass(frozen=True)
class Deposits:
    """Landings resolved into cells, ready to be aggregated."""

    scores: Tensor  # [B * M]
    values: Tensor  # [B * M, E]
    keys: Tensor  # int64 [B * M, K]: sample * S + cell
    weights: Tensor  # [B * M, K], 0 for slots that didn't land


class EnergyLattice(nn.Module):
    """A W x H x D lattice: the input plane in its middle, an output plane at each end.

    Args:
        settings: size and rules.
        energy_dim: E.
        map_out: surface [B, S, E] -> embedding [B, D].
        bounded_energy: a step leaves every part of an energy in [-1, 1], as tanh does.
    """

    def __init__(
        self, settings: LatticeSettings, energy_dim: int, map_out: nn.Module, bounded_energy: bool = False
    ) -> None:
        super().__init__()
        self.bounded_energy = bounded_energy
        self.settings = settings
        self.energy_dim = energy_dim
        self.map_out = map_out
        self.tensorized_storage_enabled = settings.tensorized_storage_enabled

    def place_initial_energy(self, surface: Tensor) -> FlowState:
        """One flow per cell on the input plane z = 0, with the cell's energy.

        Args:
            surface: [B, S, E], float32 or float64: the dtype of the geometry.

        Returns:
            State of M slots per sample; those after the first S are empty.
        """
        batch, num_cells = surface.shape[:2]
        spare = self.settings.capacity - num_cells
        centres = cell_centres(self.settings.width, self.settings.height, surface.dtype, surface.device)
        position = nn.functional.pad(centres, (0, 1, 0, spare))
        return FlowState(
            position=position.expand(batch, -1, -1),
            energy=nn.functional.pad(surface, (0, 0, 0, spare)) if spare else surface,
        )

    def num_children(self, length: Tensor) -> Tensor:
        """Children of a flow that moved by `length`: min(floor(length / threshold) - 1, limit), int64."""
        rule = self.settings.spawn
        children = torch.floor(length / rule.threshold) - 1
        return children.nan_to_num(nan=0.0).clamp(0, rule.max_spawn_per_step).long()

    def landings(self, flows: FinishedFlows) -> Landings:
        """Read the landings of a finished rollout."""
        z = flows.position[..., 2]
        plane = (z > 0).long()
        return Landings(
            landed=flows.landed,
            projected=flows.status == FlowStatus.PROJECTED,
            xy=flows.position[..., :2],
            plane=plane,
            distance=torch.where(plane == 0, 1 + z, 1 - z),
            steps=flows.steps,
            energy=flows.energy,
        )

    def collect(self, landings: Landings) -> Deposits:
        """Find the cells, weights and scores of all landings: [B, M] -> flat members of B * S groups."""
        if not self.tensorized_storage_enabled:
            raise RuntimeError(
                "tensorized_storage_enabled is False: landings can only be collected from tensorised storage. "
                "Set lattice.tensorized_storage_enabled=true"
            )
        cells, weights = deposit_cells(landings.xy, self.settings.width, self.settings.height, self.settings.deposit)
        batch, capacity = landings.landed.shape
        first_key = torch.arange(batch, device=cells.device)[:, None, None] * self.settings.num_cells
        members = batch * capacity
        return Deposits(
            scores=landings.score.reshape(members),
            values=landings.energy.reshape(members, -1),
            keys=(cells + first_key).reshape(members, -1),
            weights=(weights * landings.landed[..., None]).reshape(members, -1),
        )

    @property
    def score_bound(self) -> float | None:
        """No landing has a larger score; None where nothing is known: without a step energies are those mapped in."""
        if not self.bounded_energy or self.settings.num_steps == 0:
            return None
        return math.sqrt(self.energy_dim) * (1 + 0.1 * self.settings.num_steps)

    def aggregate(self, deposits: Deposits, batch: int) -> tuple[Tensor, Tensor]:
        """Average every group: surface [B, S, E] and its mass [B, S] (sum of the deposit weights)."""
        num_groups = batch * self.settings.num_cells
        values, mass = group_softmax_deposit(
            deposits.scores, deposits.values, deposits.keys, deposits.weights, num_groups, bound=self.score_bound
        )
        return values.view(batch, -1, self.energy_dim), mass.view(batch, -1)

    def collect_completed_flows_surface_direct(self, landings: Landings) -> Tensor:
        """Collect and aggregate all landings of a batch into the output surface [B, S, E].

        Raises:
            NoLandingError: samples without a single landing (reading them synchronises with the device).
        """
        empty = (~landings.landed.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise NoLandingError(no_landing_message(empty))
        return self.aggregate(self.collect(landings), landings.landed.shape[0])[0]

    def collect_completed_flows_direct(self, landings: Landings) -> Tensor:
        """Collect all landings of a batch and read them back as embeddings [B, D]; a skip from the input isn't in it.

        Raises:
            NoLandingError: samples without a single landing.
        """
        return self.map_out(self.collect_completed_flows_surface_direct(landings))


def no_landing_message(samples: list[int]) -> str:
    return (
        f"{len(samples)} samples without a single landing ({name_samples(samples)}): all flows were removed. "
        "Lower lattice.filter.min_displacement or set lattice.filter.enabled=false"
    )


def name_samples(samples: list[int]) -> str:
    """The first of some samples, for messages."""
    shown = ", ".join(str(sample) for sample in samples[:10]) + (", ..." if len(samples) > 10 else "")
    return f"samples {shown} of the batch"
