"""The flow processor: map in, rollout, collection, map out."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack

from energy_flow.core.energy_lattice import EnergyLattice, Landings, LatticeSettings
from energy_flow.core.engine.engines import Engines
from energy_flow.core.faults import Faults
from energy_flow.core.flow_step import MoveRule
from energy_flow.core.history import Trajectories
from energy_flow.core.networks import (
    ModelSettings,
    make_aggregation,
    make_carrier,
    make_map_in,
    make_map_out,
    make_neuron,
)
from energy_flow.core.rollout import Rollout, RolloutCall, RolloutResult, RolloutSettings
from energy_flow.core.statistics import flow_statistics
from energy_flow.core.tensors import held_bytes, map_tensors
from energy_flow.core.timing import PhaseTimer
from energy_flow.core.tracing import is_traced
from energy_flow.errors import ConfigError

_WITNESS_RANGE = 1024  # squares below are exact in float32


@dataclass(frozen=True)
class FlowOutput:
    """The result of one forward pass. The next pass reuses nothing of it."""

    embedding: Tensor  # [B, D]
    surface: Tensor  # [B, S, E]
    input_surface: Tensor  # [B, S, E]
    landings: Landings
    statistics: dict[str, Tensor]  # scalars, see `flow_statistics`
    by_step: dict[str, Tensor]  # created, active, reached, projected, removed after each step, [T + 1]; entry 0: start
    faults: Faults
    trajectories: Trajectories | None

    def detached(self) -> Self:
        """The same values without their graph."""
        return map_tensors(Tensor.detach, self)


class FlowProcessor(nn.Module):
    """A flow lattice with all its trained parts: embeddings [B, D] in, embeddings [B, D] out.

    Args:
        dim: D.
        lattice: size and rules of the lattice.
        model: sizes of the networks.
        seed: of the exploration noise.
        rollout: how rollouts are computed; None: chosen by device and size.

    Raises:
        ConfigError: the maps are the identity, and D isn't S * E, or flows take no step.
    """

    optimizer_step: Tensor
    _witness: Tensor

    def __init__(
        self,
        dim: int,
        lattice: LatticeSettings,
        model: ModelSettings,
        seed: int,
        rollout: RolloutSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.model, self.seed, self.dim = lattice, model, seed, dim
        self.map_in = make_map_in(dim, lattice, model)
        self.neuron = make_neuron(lattice, model)
        self.carrier = make_carrier(lattice, model)
        map_out = make_map_out(dim, self.map_in, lattice, model)
        self.skip_gain = nn.Parameter(torch.ones(())) if model.skip else None
        aggregation = make_aggregation(lattice, model)
        bounded = not model.residual_energy
        self.lattice = EnergyLattice(lattice, model.energy_dim, map_out, bounded, aggregation)
        # On the device and in the checkpoint: noise and displacement schedule depend on it, also in evaluation.
        self.register_buffer("optimizer_step", torch.zeros((), dtype=torch.int64))
        # A number r and its square. An average of several pairs has another square, so it shows that buffers were
        # averaged, and with them `optimizer_step`.
        self.register_buffer("_witness", torch.zeros(2), persistent=False)
        self._noted, self._checked = -1, -1  # versions of `optimizer_step` and of `_witness`
        self.last_output: FlowOutput | None = None
        self.rollout_settings = RolloutSettings.automatic() if rollout is None else rollout
        self._engines = Engines(self.rollout_settings)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, e.g. for weight averaging, has seen no batch, and its tensors count their versions anew.
        return self.__dict__ | {"last_output": None, "_noted": -1, "_checked": -1}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next((value.dtype for value in self.parameters() if value.is_floating_point()), torch.float32)

    def trained_parts(self) -> dict[str, nn.Module]:
        """The networks by name, without maps that have no parameters."""
        parts = {
            "map_in": self.map_in,
            "neuron": self.neuron,
            "carrier": self.carrier,
            "map_out": self.lattice.map_out,
        }
        return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}

    def displacement_scale(self) -> Tensor:
        """`movement.scale` times its schedule at the current optimiser step, a scalar in the geometry's dtype."""
        rule = self.settings.movement
        step = self.optimizer_step.to(_geometry_dtype(self.dtype))
        scale = rule.scale * ((step + 1) / (rule.warmup_steps + 1)).clamp(max=1)
        if rule.decay_steps > 0:
            progress = ((step - rule.warmup_steps) / rule.decay_steps).clamp(0, 1)
            scale = scale * (1 + (rule.final_scale - 1) * progress)
        return scale

    def move_rule(self) -> MoveRule:
        """How the heads' output becomes a move at the current optimiser step."""
        scale = self.displacement_scale()
        return MoveRule(
            scale=scale,
            max_displacement=scale.new_full((), self.settings.movement.max_displacement),
            residual_energy=self.model.residual_energy,
        )

    def forward(
        self,
        embedding: Tensor,
        rows: Tensor | None = None,
        *,
        context: Mapping[str, Tensor] | None = None,
        record_trajectories: bool = False,
        timer: PhaseTimer | None = None,
    ) -> FlowOutput:
        """Run one batch.

        Args:
            embedding: [B, D].
            rows: int64 [B], the samples' rows in their data set. Noise needs them.
            context: further inputs [B, ...] by name, for a neuron with a method `sense`.
            record_trajectories: keep the path of every flow (detached), for inspection.
            timer: measures the phases place, propagate, collect and aggregate.

        Raises:
            ConfigError: noise is on without rows, `embedding` has another shape, the weights are halves, a part
                doesn't keep its protocol, or `rollout.engine = tape` can't run a part.
        """
        if embedding.ndim != 2 or embedding.shape[0] == 0 or embedding.shape[1] != self.dim:
            raise ConfigError(
                f"embedding of shape {list(embedding.shape)}: the model takes [batch, {self.dim}], batch at least 1"
            )
        _check_precision(self.dtype)
        _refuse_vmap()
        self._witness_step()
        with _phase(timer, "place"):
            surface = self._surface(embedding)
        with _phase(timer, "propagate"):
            flows, counts, trajectories = self._run(surface, rows, dict(context or {}), record_trajectories)
        with _phase(timer, "collect"):
            landings = self.lattice.landings(flows)
            deposits = self.lattice.collect(landings)
        with _phase(timer, "aggregate"):
            output_surface, mass = self.lattice.aggregate(deposits, embedding.shape[0])
            output_embedding = self.read_out(output_surface, embedding)
        output = FlowOutput(
            embedding=output_embedding,
            surface=output_surface,
            input_surface=surface,
            landings=landings,
            statistics=flow_statistics(landings, flows, mass, counts),
            by_step=counts.by_step,
            faults=Faults(
                no_landing=~landings.landed.any(dim=1),
                not_finite=~output_embedding.detach().isfinite().all(dim=1),
                lost=counts.lost,
                overflow=flows.overflow.sum(),
                needed=(flows.created + flows.overflow).max(),
            ),
            trajectories=trajectories,
        )
        if not torch.compiler.is_exporting():  # its tensors are stand-ins without values
            self.last_output = output.detached()
        return output

    def read_out(self, surface: Tensor, embedding: Tensor) -> Tensor:
        """Map an output surface [B, S, E] to embeddings [B, D]; add the skip from the input where there is one."""
        output: Tensor = self.lattice.map_out(surface)
        _check_shape("processor.lattice.map_out", output, "[B, D]", (surface.shape[0], self.dim))
        return output if self.skip_gain is None else output + self.skip_gain * embedding

    def cleanup_memory_safe(self) -> int:
        """Free all memory that ended flows still hold. Safe between any two batches.

        - the last batch's output kept for inspection, with its landings and trajectories;
        - CUDA graphs that no batch since the last call has used;
        - pooled buffers beyond the sizes that these batches needed. They stay while a graph is in use.

        Returns:
            The bytes freed.
        """
        freed = self._engines.trim() + held_bytes(self.last_output)
        self.last_output = None
        return freed

    def set_optimizer_step(self, step: int) -> None:
        """Set the number of optimiser steps so far, which sets the movement's scale and the noise."""
        self.optimizer_step.fill_(step)
        self._write_witness()

    def _write_witness(self) -> None:
        remainder = (self.optimizer_step % _WITNESS_RANGE).to(self._witness.dtype)
        self._witness.copy_(torch.stack([remainder, remainder.square()]))
        self._noted = _version(self.optimizer_step)

    def _witness_step(self) -> None:
        """In training, note the step; in evaluation, check after every change that nobody averaged it.

        Raises:
            ConfigError: the step was averaged, so the movement's scale would be that of another step.
        """
        if self.optimizer_step.is_meta or is_traced(self.optimizer_step):
            return
        if self.training:
            if self._noted != _version(self.optimizer_step):
                self._write_witness()
        elif self._checked != _version(self._witness):
            remainder, square = self._witness.tolist()
            if square != remainder**2:
                raise ConfigError(
                    "processor.optimizer_step was averaged with the weights, and the movement's scale depends on it. "
                    "Average without buffers (AveragedModel(model, use_buffers=False)), or call "
                    "processor.set_optimizer_step(N) of the averaged model"
                )
            self._checked = _version(self._witness)

    def _surface(self, embedding: Tensor) -> Tensor:
        """Energies of the input plane, [B, S, E]."""
        surface: Tensor = self.map_in(embedding)
        shape = (embedding.shape[0], self.settings.num_cells, self.model.energy_dim)
        _check_shape("processor.map_in", surface, "[B, S, E]", shape)
        return surface.to(_geometry_dtype(self.dtype))

    def _run(self, surface: Tensor, rows: Tensor | None, context: dict[str, Tensor], keep_paths: bool) -> RolloutResult:
        """All steps of all flows."""
        noisy = self.training and self.settings.noise.std > 0
        call = RolloutCall(
            # A copy: the caller may change its tensor before the backward pass draws the noise again.
            sample_ids=rows.clone() if noisy and rows is not None else rows,
            optimizer_step=self.optimizer_step.clone(),
            rule=self.move_rule(),
            noisy=noisy,
            keep_paths=keep_paths,
        )
        rollout = Rollout(self.lattice, self.seed)
        return self._engines.run(self.rollout_settings, self.neuron, self.carrier, rollout, surface, call, context)


def _geometry_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of positions and energies: float32, or float64 for float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def _version(value: Tensor) -> int:
    """How often a tensor was changed in place; -2 for one of inference mode, which doesn't count."""
    return -2 if value.is_inference() else value._version


def _check_shape(part: str, value: Tensor, letters: str, shape: tuple[int, ...]) -> None:
    """Check what a part returned.

    Raises:
        ConfigError: names both shapes.
    """
    if value.shape != shape:
        raise ConfigError(
            f"{part}: returned a tensor of shape {list(value.shape)}, but it must be {letters} = {list(shape)}"
        )


def _check_precision(dtype: torch.dtype) -> None:
    """Refuse weights of two bytes.

    Raises:
        ConfigError: names the way to faster products.
    """
    if dtype.itemsize < 4:
        raise ConfigError(
            f"parameters of {dtype}: positions need float32, or neighbouring cells become one. Keep the parameters in "
            "float32 (model.float()), and set trainer.precision=bf16-mixed or use torch.autocast"
        )


def _refuse_vmap() -> None:
    """Refuse torch.func.vmap.

    Raises:
        ConfigError: names the way without it.
    """
    if any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
        raise ConfigError(
            "torch.func.vmap: a rollout updates its bookkeeping in place, which vmap can't batch. A batch [B, D] "
            "already runs all samples at once; for several sets of weights, call torch.func.functional_call in a loop"
        )


def _phase(timer: PhaseTimer | None, name: str) -> AbstractContextManager[Any]:
    return nullcontext() if timer is None else timer.phase(name)
