"""The lattice: its settings, the placing of flows, the number of children, and the collection of landings."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from energy_flow.core.aggregation import SoftmaxAggregation
from energy_flow.core.geometry import Deposit, cell_centres, deposit_cells
from energy_flow.core.tensorized_flow_storage import FinishedFlows, FlowState, FlowStatus
from energy_flow.errors import ConfigError, NoLandingError
from energy_flow.settings import Settings

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]

# Every step of a flow adds this share to the score of its landing.
SCORE_PER_STEP = 0.1

_Number = TypeVar("_Number", float, Tensor)


class MovementSettings(Settings):
    """How far flows move, in normalised units. The scale follows a schedule over optimiser steps."""

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
    """A flow that moves at least twice the threshold in one step leaves children behind."""

    enabled: bool
    threshold: Positive
    max_spawn_per_step: Count


class FilterSettings(Settings):
    """Removes flows that move less than a minimum in one step."""

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
    aggregation: dict[str, Any] | None = None  # None, and so in every file from before this key: the softmax

    @property
    def num_cells(self) -> int:
        """S = W * H."""
        return self.width * self.height

    @property
    def num_steps(self) -> int:
        """T."""
        return self.depth // 2 if self.max_steps is None else self.max_steps

    @property
    def capacity(self) -> int:
        """M, the slots of one sample."""
        if self.max_flows_per_sample is not None:
            return self.max_flows_per_sample
        return 2 * self.num_cells if self.spawn.enabled else self.num_cells

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if not self.tensorized_storage_enabled:
            raise ValueError(
                "lattice.tensorized_storage_enabled = False: flows are stored in tensors, there is no other storage. "
                "Set lattice.tensorized_storage_enabled=true"
            )
        if self.capacity < self.num_cells:
            raise ValueError(
                f"lattice.max_flows_per_sample = {self.capacity}: each of the {self.width} x {self.height} = "
                f"{self.num_cells} cells releases a flow. Set it to {self.num_cells} or more, "
                "or to null"
            )
        if self.filter.enabled and self.spawn.enabled and self.filter.min_displacement >= self.spawn.threshold:
            raise ValueError(
                f"lattice.filter.min_displacement = {self.filter.min_displacement}: must be below "
                f"lattice.spawn.threshold = {self.spawn.threshold}, or the filter would remove flows that spawn. "
                "Lower the first, or raise the second"
            )
        return self


@dataclass(frozen=True)
class Landings:
    """The landing of every slot. Entries where `landed` is False are meaningless."""

    landed: Tensor  # bool [B, M]
    projected: Tensor  # bool [B, M]: put on the nearest plane after the last step
    xy: Tensor  # [B, M, 2]
    plane: Tensor  # int64 [B, M]: 0 is z0, 1 is zdepth
    distance: Tensor  # [B, M]: remaining distance to the plane, 0 for a flow that reached it
    steps: Tensor  # int64 [B, M]
    energy: Tensor  # [B, M, E]

    @property
    def score(self) -> Tensor:
        """`landing_score` of every landing, [B, M]."""
        norm = torch.linalg.vector_norm(self.energy, dim=-1)
        return landing_score(norm, self.distance, self.steps.to(self.distance.dtype))


@dataclass(frozen=True)
class Deposits:
    """The cells, weights and scores of all landings: the input of the aggregation."""

    scores: Tensor  # [B * M]
    values: Tensor  # [B * M, E]
    keys: Tensor  # int64 [B * M, K]: sample * S + cell
    weights: Tensor  # [B * M, K], 0 for slots without a landing


class EnergyLattice(nn.Module):
    """A W x H x D lattice: the input plane in its middle, an output plane at each end.

    Args:
        settings: size and rules.
        energy_dim: E.
        map_out: surface [B, S, E] -> embedding [B, D].
        bounded_energy: whether every component of an energy is in [-1, 1] after a step, as with tanh.
        aggregation: keeps the protocol `Aggregation`; None: the softmax over the scores.
    """

    def __init__(
        self,
        settings: LatticeSettings,
        energy_dim: int,
        map_out: nn.Module,
        bounded_energy: bool = False,
        aggregation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.aggregation = SoftmaxAggregation() if aggregation is None else aggregation
        self.bounded_energy = bounded_energy
        self.settings = settings
        self.energy_dim = energy_dim
        self.map_out = map_out
        self.tensorized_storage_enabled = settings.tensorized_storage_enabled

    def place_initial_energy(self, surface: Tensor) -> FlowState:
        """Place one flow per cell on the input plane z = 0, with the cell's energy.

        Args:
            surface: [B, S, E] in the dtype of the geometry, float32 or float64.

        Returns:
            The state of M slots per sample. Slots after the first S are empty.
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
        """Children of a flow that moved by `length`: min(floor(length / threshold) - 1, max_spawn_per_step).

        Args:
            length: [B, M], normalised units.

        Returns:
            int64 [B, M], at least 0.
        """
        rule = self.settings.spawn
        children = torch.floor(length / rule.threshold) - 1
        return children.nan_to_num(nan=0.0).clamp(0, rule.max_spawn_per_step).long()

    def landings(self, flows: FinishedFlows) -> Landings:
        """The landings of a finished rollout."""
        z = flows.position[..., 2]
        plane = (z > 0).long()
        projected = flows.status == FlowStatus.PROJECTED
        return Landings(
            landed=projected | (flows.status == FlowStatus.REACHED),
            projected=projected,
            xy=flows.position[..., :2],
            plane=plane,
            distance=torch.where(plane == 0, 1 + z, 1 - z),
            steps=flows.steps,
            energy=flows.energy,
        )

    def collect(self, landings: Landings) -> Deposits:
        """Find the cells, weights and scores of all landings, as members of B * S groups.

        Raises:
            RuntimeError: tensorised storage is off.
        """
        if not self.tensorized_storage_enabled:
            raise RuntimeError(
                "tensorized_storage_enabled is False: landings are collected from tensorised storage only. "
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
        """The largest score that a landing can have; None if no bound is known.

        Without a step, energies are those mapped in, which have no bound.
        """
        if not self.bounded_energy or self.settings.num_steps == 0:
            return None
        return landing_score(math.sqrt(self.energy_dim), 0.0, float(self.settings.num_steps))

    def aggregate(self, deposits: Deposits, batch: int) -> tuple[Tensor, Tensor]:
        """Aggregate the deposits of every group.

        Args:
            deposits: of all landings.
            batch: B.

        Returns:
            The output surface [B, S, E], and its mass [B, S], the sum of the deposit weights.

        Raises:
            ConfigError: the aggregation returned something else.
        """
        num_groups = batch * self.settings.num_cells
        values, mass = self.aggregation(
            deposits.scores, deposits.values, deposits.keys, deposits.weights, num_groups, self.score_bound
        )
        if values.shape != (num_groups, self.energy_dim) or mass.shape != (num_groups,):
            raise ConfigError(
                f"processor.lattice.aggregation ({type(self.aggregation).__name__}): returned energies of shape "
                f"{list(values.shape)} and mass of shape {list(mass.shape)}, but they must be [B * S, E] = "
                f"{[num_groups, self.energy_dim]} and [B * S]. See energy_flow.core.parts.Aggregation"
            )
        return values.view(batch, -1, self.energy_dim), mass.view(batch, -1)

    def collect_completed_flows_surface_direct(self, landings: Landings) -> Tensor:
        """Collect and aggregate all landings of a batch into the output surface [B, S, E].

        Raises:
            NoLandingError: samples without a single landing. The check waits for the device.
        """
        empty = (~landings.landed.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise NoLandingError(no_landing_message(empty))
        return self.aggregate(self.collect(landings), landings.landed.shape[0])[0]

    def collect_completed_flows_direct(self, landings: Landings) -> Tensor:
        """Collect all landings of a batch and map them to embeddings [B, D], without the skip from the input.

        Raises:
            NoLandingError: samples without a single landing.
        """
        return self.map_out(self.collect_completed_flows_surface_direct(landings))


def landing_score(energy_norm: _Number, distance: _Number, steps: _Number) -> _Number:
    """The score of a landing, its weight in the softmax of its group.

        score = |energy| / (1 + distance) * (1 + 0.1 * steps)

    The same function computes the bound on all scores, so the two can't differ.

    Args:
        energy_norm: L2 norm of the energy.
        distance: remaining distance to the plane, in normalised units.
        steps: steps of the flow.
    """
    return energy_norm / (1 + distance) * (1 + SCORE_PER_STEP * steps)


def no_landing_message(samples: list[int]) -> str:
    """The message about samples without a landing."""
    return (
        f"{len(samples)} samples without a single landing ({name_samples(samples)}): all flows were removed. "
        "Lower lattice.filter.min_displacement or set lattice.filter.enabled=false"
    )


def name_samples(samples: list[int]) -> str:
    """The first ten of some samples, for messages."""
    shown = ", ".join(str(sample) for sample in samples[:10]) + (", ..." if len(samples) > 10 else "")
    return f"samples {shown} of the batch"
