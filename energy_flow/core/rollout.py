"""The rollout: all steps of all flows, by the rules of the lattice.

The rules run over dense slots and know nothing of how a step is computed; a `Stepper` does that, and there are
two: plain autograd here, and the tape (`tape.py`).
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Count, EnergyLattice, LatticeSettings
from energy_flow.core.flow_step import MoveRule, StepResult, flow_step
from energy_flow.core.history import Counts, History, Trajectories
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensorized_flow_storage import (
    Births,
    FinishedFlows,
    FlowState,
    FlowStatus,
    TensorizedFlowStorage,
    TensorPool,
)
from energy_flow.errors import ConfigError
from energy_flow.ops.counter_noise import counter_noise
from energy_flow.settings import Settings

Choice = Literal["auto"] | bool


class RolloutSettings(Settings):
    """How a rollout is computed, which changes neither outputs nor gradients (config group `rollout`)."""

    engine: Literal["auto", "autograd", "tape"]
    recompute: bool
    chunk: Literal["auto"] | Count | None
    compaction: Choice
    compile: Choice
    cuda_graph: Choice

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.engine == "autograd":
            for key, value in self.model_dump(exclude={"engine"}).items():
                if value not in ("auto", None) and value is not False:
                    raise ValueError(
                        f"rollout.{key} = {str(value).lower()}: plain autograd knows no such thing. Set "
                        f"rollout.engine=auto, or leave rollout.{key} out"
                    )
        return self

    @classmethod
    def automatic(cls) -> Self:
        """Everything chosen from the device and the size."""
        return cls(engine="auto", recompute=False, chunk="auto", compaction="auto", compile="auto", cuda_graph="auto")


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """What a rollout depends on beside the surface and the weights. Fixed for its replay in the backward pass."""

    rows: Tensor | None  # int64 [B]: the samples' rows in their data set
    optimizer_step: Tensor  # int64 scalar
    scale: Tensor  # scalar, of displacements
    noisy: bool
    keep_paths: bool

    def samples(self, start: int, stop: int) -> "RolloutCall":
        """The same for some of the samples."""
        rows = None if self.rows is None else self.rows[start:stop]
        return RolloutCall(rows, self.optimizer_step, self.scale, self.noisy, self.keep_paths)


class RolloutResult(NamedTuple):
    flows: FinishedFlows
    counts: Counts
    trajectories: Trajectories | None


def joined(parts: list[RolloutResult]) -> RolloutResult:
    """The result of a batch from those of its chunks."""
    if len(parts) == 1:
        return parts[0]
    flows = [part.flows for part in parts]
    paths = [part.trajectories for part in parts if part.trajectories is not None]
    return RolloutResult(
        FinishedFlows(*(torch.cat(values) for values in zip(*(vars(part).values() for part in flows), strict=True))),
        functools.reduce(operator.add, [part.counts for part in parts]),
        Trajectories(*(torch.cat(values, 1) for values in zip(*(vars(path).values() for path in paths), strict=True)))
        if paths
        else None,
    )


class Stepper(Protocol):
    """Computes steps, and keeps what flows remember between them."""

    draw_noise: Callable[..., Tensor]  # `counter_noise`, or a compiled form of it

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        """One step of all slots: state [B, M, ·], active bool [B, M], noise [B, M, 3]."""

    def inherit(self, births: Births) -> None:
        """Children take over their parents' memory."""


class Rollout:
    """Runs the rules of a lattice over all steps.

    Args:
        lattice, seed: whose rules, and of which exploration noise.
        pool: where the bookkeeping lives while a rollout runs.
    """

    def __init__(self, lattice: EnergyLattice, seed: int, pool: TensorPool) -> None:
        self.lattice, self.seed, self.pool = lattice, seed, pool

    @property
    def settings(self) -> LatticeSettings:
        return self.lattice.settings

    def run(self, surface: Tensor, stepper: Stepper, call: RolloutCall) -> RolloutResult:
        """From surface energies [B, S, E] to flows that have all ended.

        Only the device knows who is active: nothing here waits for it.
        """
        settings = self.settings
        storage = TensorizedFlowStorage(self.lattice.place_initial_energy(surface), settings.num_cells, self.pool)
        history = History(call.keep_paths)
        convergence = _Convergence(settings, storage)
        history.look(storage)
        for step in range(settings.num_steps):
            before = storage.state
            result = stepper.step(before, storage.where(FlowStatus.ACTIVE), self._noise(stepper, step, call))
            storage.advance(FlowState(result.position, result.energy), result.reached)
            if settings.spawn.enabled and step + 1 < settings.num_steps:
                children = self.lattice.num_children(result.length) * storage.where(FlowStatus.ACTIVE)
                stepper.inherit(storage.spawn(children, before.position))
            if settings.filter.enabled:
                too_short = result.length < settings.filter.min_displacement
                storage.end(storage.where(FlowStatus.ACTIVE) & too_short & (storage.age > 0), FlowStatus.REMOVED)
            if settings.convergence.enabled:
                storage.end(convergence.converged(step + 1), FlowStatus.PROJECTED)
            history.look(storage)
            history.moved(result.length)
        storage.end(storage.where(FlowStatus.ACTIVE), FlowStatus.PROJECTED)
        flows = storage.finished()
        return RolloutResult(flows, history.counts(flows), history.trajectories(flows))

    def _noise(self, stepper: Stepper, step: int, call: RolloutCall) -> Tensor | None:
        rule = self.settings.noise
        if not call.noisy:
            return None
        if call.rows is None:
            raise ConfigError(
                f"lattice.noise.std = {rule.std}: noise depends on the data row of every sample. Let batches carry "
                "'row' (int64, [batch]), or set lattice.noise.std=0"
            )
        capacity, dtype = self.settings.capacity, call.scale.dtype
        noise = stepper.draw_noise(self.seed, call.optimizer_step, step, call.rows, capacity, dtype) * rule.std
        return noise if rule.z else nn.functional.pad(noise[..., :2], (0, 1))


class AutogradStepper:
    """Plain autograd: the networks as they are, a memory that is replaced in every step."""

    draw_noise = staticmethod(counter_noise)

    def __init__(self, neuron: SimpleNeuron, carrier: EnergyCarrier, rule: MoveRule) -> None:
        self._neuron, self._carrier, self._rule = neuron, carrier, rule
        self._hidden: tuple[Tensor, ...] | None = None

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        return flow_step(self, state.position, state.energy, active, noise, self._rule)

    def inherit(self, births: Births) -> None:
        assert self._hidden is not None, "children are born of flows that moved"
        self._hidden = tuple(births.inherit(memory, memory) for memory in self._hidden)

    def read(self, position: Tensor, energy: Tensor) -> Tensor:
        features = self._neuron(position, energy)
        return torch.cat([features, energy.to(features.dtype)], dim=-1)

    def remember(self, read: Tensor) -> Tensor:
        if self._hidden is None:
            empty = read.new_zeros(()).expand(*read.shape[:-1], self._carrier.hidden_size)
            self._hidden = (empty,) * len(self._carrier.cells)
        self._hidden = self._carrier.remember(read, self._hidden)
        return self._hidden[-1]

    def decide(self, memory: Tensor) -> Tensor:
        return self._carrier.decide(memory)


class _Convergence:
    """Per sample: have enough flows ended, or has nothing ended for a while?"""

    def __init__(self, settings: LatticeSettings, storage: TensorizedFlowStorage) -> None:
        self._rule = settings.convergence
        self._storage = storage
        self._ended = torch.zeros_like(storage.created)
        self._idle = torch.zeros_like(storage.created)

    def converged(self, step: int) -> Tensor:
        """Bool mask [B, M] of the flows to project after `step` steps."""
        storage, rule = self._storage, self._rule
        ended = (storage.where(FlowStatus.REACHED) | storage.where(FlowStatus.REMOVED)).sum(1)
        self._idle = torch.where(ended > self._ended, 0, self._idle + (step > rule.min_steps))
        self._ended = ended
        # In float64: a share that equals the threshold must not be missed by float32's rounding.
        share = ended.double() / storage.created
        done = (share >= rule.threshold) | (self._idle >= rule.patience)
        if step < rule.min_steps:
            done = torch.zeros_like(done)
        return done[:, None] & storage.where(FlowStatus.ACTIVE)
