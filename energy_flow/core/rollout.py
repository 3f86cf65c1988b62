"""The rollout: all steps of all flows, by the rules of the lattice.

`Rollout` applies the rules to dense slots [B, M]. A `Stepper` computes the steps and stores the hidden states. There
are two steppers: the modules as they are in this file, and the tape in `engine/tape.py`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from energy_flow.core.energy_lattice import Count, EnergyLattice, LatticeSettings
from energy_flow.core.flow_step import MoveRule, StepResult, move
from energy_flow.core.history import Counts, History, Trajectories
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import Births, FinishedFlows, FlowState, FlowStatus, TensorizedFlowStorage
from energy_flow.core.tensors import map_tensors, tensors_of
from energy_flow.errors import ConfigError
from energy_flow.ops.counter_noise import counter_noise
from energy_flow.settings import Settings

Choice = Literal["auto"] | bool


class RolloutSettings(Settings):
    """How a rollout is computed (config group `rollout`). No setting changes outputs or gradients beyond rounding."""

    engine: Literal["auto", "autograd", "tape"]
    recompute: bool
    chunk: Literal["auto"] | Count | None
    compaction: Choice
    compile: Choice
    cuda_graph: Choice

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.engine == "autograd":
            for key, value in self.model_dump(exclude={"engine", "chunk", "compile"}).items():
                if value not in ("auto", None) and value is not False:
                    raise ValueError(
                        f"rollout.{key} = {str(value).lower()}: rollout.engine = autograd has no such setting. Set "
                        f"rollout.engine=auto, or leave rollout.{key} out"
                    )
        return self

    @classmethod
    def automatic(cls) -> Self:
        """Choose everything by device and size."""
        return cls(engine="auto", recompute=False, chunk="auto", compaction="auto", compile="auto", cuda_graph="auto")


@dataclass(frozen=True, eq=False)
class RolloutCall:
    """The inputs of a rollout besides the surface and the weights. The backward pass replays with the same call."""

    sample_ids: Tensor | None  # int64 [B]: the samples' rows in their data set
    optimizer_step: Tensor  # int64 scalar
    rule: MoveRule
    noisy: bool
    keep_paths: bool
    sensed: Any = None  # of a `SensingNeuron`: a record of tensors [B, ...], perhaps with gradients

    def samples(self, start: int, stop: int) -> "RolloutCall":
        """The call of samples [start, stop)."""
        ids = None if self.sample_ids is None else self.sample_ids[start:stop]
        return replace(self, sample_ids=ids, sensed=map_tensors(lambda value: value[start:stop], self.sensed))


class RolloutResult(NamedTuple):
    """The flows at the end of a rollout, and its record."""

    flows: FinishedFlows
    counts: Counts
    trajectories: Trajectories | None


def join_chunks(parts: list[RolloutResult]) -> RolloutResult:
    """The result of a batch from those of its chunks, in the order of the samples."""
    if len(parts) == 1:
        return parts[0]
    flows, counts, trajectories = zip(*parts, strict=True)
    return RolloutResult(
        flows=map_tensors(lambda *tensors: torch.cat(tensors), *flows),
        counts=map_tensors(lambda *tensors: functools.reduce(torch.add, tensors), *counts),
        trajectories=map_tensors(lambda *tensors: torch.cat(tensors, 1), *trajectories),
    )


class Stepper(Protocol):
    """Computes the steps of a rollout, and stores the hidden states between them."""

    draw_noise: Callable[..., Tensor]  # `counter_noise`, or a compiled form of it

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        """One step of all slots: features, GRU, heads, move.

        Args:
            state: position [B, M, 3] and energy [B, M, E].
            active: bool [B, M].
            noise: [B, M, 3] in normalised units; None for no noise.
        """

    def give_birth(self, births: Births) -> None:
        """Give children the hidden states of their parents."""


class Rollout:
    """Applies the rules of a lattice in every step.

    Args:
        lattice: its settings are the rules.
        seed: of the exploration noise.
    """

    def __init__(self, lattice: EnergyLattice, seed: int) -> None:
        self.lattice, self.seed = lattice, seed
        self.settings: LatticeSettings = lattice.settings
        self.key = lattice.settings.model_dump_json(), seed  # the rules as a key of dicts
        self._num_cells, self._num_steps = self.settings.num_cells, self.settings.num_steps

    def run(self, surface: Tensor, stepper: Stepper, call: RolloutCall, pool: TensorPool) -> RolloutResult:
        """Run all steps, from surface energies [B, S, E] to flows that have all ended.

        Only the device knows which flows are active. Nothing here waits for it.

        Args:
            surface: energies of the input plane.
            stepper: computes the steps.
            call: the other inputs.
            pool: holds the bookkeeping of the flows while the rollout runs.

        Raises:
            ConfigError: noise is on, and the call has no sample ids.
        """
        settings = self.settings
        storage = TensorizedFlowStorage(self.lattice.place_initial_energy(surface), self._num_cells, pool)
        history = History(storage, call.keep_paths)
        convergence = _Convergence(settings, storage)
        for step in range(self._num_steps):
            before = storage.state
            noise = self._noise(stepper, step, call) if call.noisy else None
            result = stepper.step(before, storage.status == FlowStatus.ACTIVE, noise)
            storage.advance(FlowState(result.position, result.energy), result.reached)
            if settings.spawn.enabled and step + 1 < self._num_steps:
                children = self.lattice.num_children(result.length) * (storage.status == FlowStatus.ACTIVE)
                stepper.give_birth(storage.spawn(children, before.position))
            if settings.filter.enabled:
                too_short = (result.length < settings.filter.min_displacement) & (storage.age > 0)
                storage.end((storage.status == FlowStatus.ACTIVE) & too_short, FlowStatus.REMOVED)
            if settings.convergence.enabled:
                storage.end(convergence.converged(step + 1), FlowStatus.PROJECTED)
            history.record(result.length)
        flows = storage.project()
        return RolloutResult(
            flows=flows,
            counts=history.counts(flows),
            trajectories=history.trajectories(flows) if call.keep_paths else None,
        )

    def _noise(self, stepper: Stepper, step: int, call: RolloutCall) -> Tensor:
        rule = self.settings.noise
        if call.sample_ids is None:
            raise ConfigError(
                f"lattice.noise.std = {rule.std}: noise depends on the data row of every sample. Add 'row' "
                "(int64, [batch]) to the batches, or set lattice.noise.std=0"
            )
        capacity, dtype = self.settings.capacity, call.rule.scale.dtype
        noise = stepper.draw_noise(self.seed, call.optimizer_step, step, call.sample_ids, capacity, dtype) * rule.std
        return noise if rule.z else nn.functional.pad(noise[..., :2], (0, 1))


class _Convergence:
    """Decides per sample whether enough flows have ended, or none has ended for a while."""

    def __init__(self, settings: LatticeSettings, storage: TensorizedFlowStorage) -> None:
        self._rule = settings.convergence
        self._storage = storage
        self._ended = torch.zeros_like(storage.created)
        self._idle = torch.zeros_like(storage.created)

    def converged(self, step: int) -> Tensor:
        """Bool mask [B, M] of the flows to project after `step` steps."""
        status, rule = self._storage.status, self._rule
        ended = ((status == FlowStatus.REACHED) | (status == FlowStatus.REMOVED)).sum(1)
        self._idle = torch.where(ended > self._ended, 0, self._idle + (step > rule.min_steps))
        self._ended = ended
        # In float64: rounding to float32 could miss a share that equals the threshold.
        share = ended.double() / self._storage.created
        done = (share >= rule.threshold) | (self._idle >= rule.patience)
        if step < rule.min_steps:
            done = torch.zeros_like(done)
        return done[:, None] & (status == FlowStatus.ACTIVE)


def step_modules(
    neuron: nn.Module,
    carrier: nn.Module,
    state: FlowState,
    active: Tensor,
    noise: Tensor | None,
    hidden: Any,
    sensed: tuple[Any, ...],
    rule: MoveRule,
) -> tuple[StepResult, Any]:
    """One step of the modules as they are; returns the next hidden state, too.

    Args:
        neuron, carrier: see `energy_flow.core.parts`.
        state, active, noise: see `Stepper.step`.
        hidden: of the step before; None in the first step.
        sensed: nothing, or the result of the neuron's `sense`.
        rule: how decisions become moves.

    Raises:
        ConfigError: a part doesn't keep its protocol.
    """
    features = neuron(state.position, state.energy, *sensed)
    if not isinstance(features, Tensor) or features.shape[:-1] != active.shape:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ConfigError(
            f"processor.neuron ({type(neuron).__name__}): returned {found}, but it must be features [B, M, F] = "
            f"[{active.shape[0]}, {active.shape[1]}, F]. See energy_flow.core.parts.Neuron"
        )
    result = carrier(features, state.energy, hidden)
    if hidden is None:  # all steps are alike, so the first one is checked
        _check_carrier(carrier, result, state)
    decision, hidden = result
    decision = decision.to(state.position.dtype)
    return StepResult(*move(state.position, state.energy, active, decision, noise, *rule), decision), hidden


class AutogradStepper:
    """Computes steps with the modules themselves, whatever they are; autograd records them.

    Args:
        neuron, carrier: see `energy_flow.core.parts`.
        call: the inputs of the rollout.
        step: `step_modules`, or a compiled form of it.
    """

    draw_noise = staticmethod(counter_noise)

    def __init__(
        self, neuron: nn.Module, carrier: nn.Module, call: RolloutCall, step: Callable[..., Any] = step_modules
    ) -> None:
        self._neuron, self._carrier, self._rule, self._step = neuron, carrier, call.rule, step
        self._sensed = () if call.sensed is None else (call.sensed,)
        self._hidden: Any = None

    def step(self, state: FlowState, active: Tensor, noise: Tensor | None) -> StepResult:
        """See `Stepper`.

        Raises:
            ConfigError: a part doesn't keep its protocol.
        """
        result: StepResult
        result, self._hidden = self._step(
            self._neuron, self._carrier, state, active, noise, self._hidden, self._sensed, self._rule
        )
        return result

    def give_birth(self, births: Births) -> None:
        """See `Stepper`."""
        self._hidden = map_tensors(lambda hidden: births.gather_from_parents(hidden, hidden), self._hidden)


def _check_carrier(carrier: nn.Module, result: Any, state: FlowState) -> None:
    """Check the result of a carrier's step.

    Raises:
        ConfigError: names the shapes that the protocol asks for, and those that came.
    """
    where = f"processor.carrier ({type(carrier).__name__})"
    flows, energy_dim = state.energy.shape[:2], state.energy.shape[2]
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor):
        raise ConfigError(
            f"{where}: returned {type(result).__name__}, but a step returns the decision [B, M, E + 3] and the next "
            "hidden state. See energy_flow.core.parts.Carrier"
        )
    decision, hidden = result
    if decision.shape != (*flows, energy_dim + 3):
        raise ConfigError(
            f"{where}: returned a decision of shape {list(decision.shape)}, but it must be [B, M, E + 3] = "
            f"{[*flows, energy_dim + 3]}. See energy_flow.core.parts.Carrier"
        )
    for value in tensors_of(hidden):
        if value.shape[:2] != flows:
            raise ConfigError(
                f"{where}: returned a hidden state of shape {list(value.shape)}, but it must begin with [B, M] = "
                f"{list(flows)}: a state per flow. See energy_flow.core.parts.Carrier"
            )
