"""The flow processor: map in, rollout of all steps, landings, map out."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from energy_flow.core.embedding_mapper import IdentityIn, IdentityOut, MapIn, MapOut
from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Count, EnergyLattice, Landings, LatticeSettings
from energy_flow.core.engine.engine import TapeEngine
from energy_flow.core.flow_step import MoveRule
from energy_flow.core.history import Counts, Trajectories
from energy_flow.core.rollout import AutogradStepper, Rollout, RolloutCall, RolloutResult, RolloutSettings
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensorized_flow_storage import FinishedFlows, TensorPool
from energy_flow.core.timing import PhaseTimer
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings

# How much of the input the surface gives back at first where the input is added to the output anyway.
SKIP_SHARE = 0.1


class ModelSettings(Settings):
    """The networks (config group `model`)."""

    energy_dim: Count
    residual_energy: bool
    features: Count
    hidden_size: Count
    num_layers: Count
    maps: Literal["learned", "identity"]
    map_hidden: Count | None
    skip: bool

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.maps == "identity" and self.map_hidden is not None:
            raise ValueError(
                f"model.map_hidden = {self.map_hidden}: model.maps = identity has no hidden layer. "
                "Set model.map_hidden=null, or model.maps=learned"
            )
        return self


@dataclass(frozen=True)
class Faults:
    """Findings that must end a training step; they stay on the device until somebody reads them."""

    no_landing: Tensor  # bool [B]
    not_finite: Tensor  # bool [B]: NaN or Inf in the output embedding
    lost: Tensor  # int64 scalar: created flows that neither landed nor were removed
    overflow: Tensor  # int64 scalar: children without a slot (counted and logged, no fault)
    needed: Tensor  # int64 scalar: slots per sample that would have held all children


@dataclass(frozen=True)
class FlowOutput:
    """All that one forward pass gives; nothing of it is reused by the next."""

    embedding: Tensor  # [B, D]
    surface: Tensor  # [B, S, E]
    input_surface: Tensor  # [B, S, E]
    landings: Landings
    statistics: dict[str, Tensor]  # scalars; counts are per sample
    by_step: dict[str, Tensor]  # created, active, reached, projected, removed after each step, [T + 1]; entry 0: start
    faults: Faults
    trajectories: Trajectories | None

    def detached(self) -> Self:
        """The same values without their graph."""
        return _detached(self)


class FlowProcessor(nn.Module):
    """Embeddings in, embeddings out: a flow lattice with all that is trained in it.

    Args:
        dim: D, of input and output embeddings.
        lattice: size and rules of the lattice.
        model: sizes of the networks.
        seed: of the exploration noise.
        rollout: how rollouts are computed; None: chosen from the device and the size.

    Raises:
        ConfigError: the maps are the identity, and `dim` isn't that of a surface of the lattice or there is no step.
    """

    optimizer_step: Tensor

    def __init__(
        self,
        dim: int,
        lattice: LatticeSettings,
        model: ModelSettings,
        seed: int,
        rollout: RolloutSettings | None = None,
    ) -> None:
        super().__init__()
        energy = model.energy_dim
        self.settings, self.model, self.seed, self.dim = lattice, model, seed, dim
        self.map_in = _map_in(dim, lattice, model)
        self.neuron = SimpleNeuron(energy, model.features)
        self.carrier = EnergyCarrier(model.features, energy, model.hidden_size, model.num_layers)
        map_out = _map_out(dim, self.map_in, model)
        self.skip_gain = nn.Parameter(torch.ones(())) if model.skip else None
        self.lattice = EnergyLattice(lattice, energy, map_out, bounded_energy=not model.residual_energy)
        # On the device and in the checkpoint: noise and displacement schedule follow it, also in evaluation.
        self.register_buffer("optimizer_step", torch.zeros((), dtype=torch.int64))
        self.last_output: FlowOutput | None = None
        self._pool = TensorPool()
        self._rules = Rollout(self.lattice, seed, self._pool)
        self.rollout_settings = RolloutSettings.automatic() if rollout is None else rollout
        self._tape = TapeEngine(self.neuron, self.carrier, self._rules, model.residual_energy, self.rollout_settings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_output": None}  # a copy, for averages say, has had no batch

    def trained_parts(self) -> dict[str, nn.Module]:
        """The networks by name, but for maps without parameters."""
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
        step = self.optimizer_step.to(self._geometry_dtype)
        scale = rule.scale * ((step + 1) / (rule.warmup_steps + 1)).clamp(max=1)
        if rule.decay_steps > 0:
            progress = ((step - rule.warmup_steps) / rule.decay_steps).clamp(0, 1)
            scale = scale * (1 + (rule.final_scale - 1) * progress)
        return scale

    def forward(
        self,
        embedding: Tensor,
        rows: Tensor | None = None,
        *,
        record_trajectories: bool = False,
        timer: PhaseTimer | None = None,
    ) -> FlowOutput:
        """Run one batch.

        Args:
            embedding: [B, D].
            rows: [B] int64, the samples' rows in their data set; needed where noise is on.
            record_trajectories: keep the path of every flow (detached), for inspection.
            timer: takes the times of the parts.

        Raises:
            ConfigError: noise is on and there are no rows, or `embedding` has another shape.
        """
        if embedding.ndim != 2 or embedding.shape[0] == 0 or embedding.shape[1] != self.dim:
            raise ConfigError(
                f"embedding of shape {list(embedding.shape)}: the model takes [batch, {self.dim}], batch at least 1"
            )
        batch = embedding.shape[0]
        with _phase(timer, "place"):
            surface = self.map_in(embedding).to(self._geometry_dtype)
        with _phase(timer, "propagate"):
            flows, counts, trajectories = self._rollout(surface, rows, record_trajectories)
        with _phase(timer, "collect"):
            landings = self.lattice.landings(flows)
            deposits = self.lattice.collect(landings)
        with _phase(timer, "aggregate"):
            output_surface, mass = self.lattice.aggregate(deposits, batch)
            output_embedding = self.read_out(output_surface, embedding)
        output = FlowOutput(
            embedding=output_embedding,
            surface=output_surface,
            input_surface=surface,
            landings=landings,
            statistics=_statistics(landings, flows, mass, counts),
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
        self.last_output = output.detached()
        return output

    def read_out(self, surface: Tensor, embedding: Tensor) -> Tensor:
        """Output surface [B, S, E] -> output embedding [B, D], with the skip from the input where there is one."""
        output: Tensor = self.lattice.map_out(surface)
        return output if self.skip_gain is None else output + self.skip_gain * embedding

    def cleanup_memory_safe(self) -> int:
        """Let go of what ended flows still hold, all in one go; returns the bytes given back.

        That is the last batch's output kept for inspection (landings, trajectories), CUDA graphs that no batch since
        the last call has run, and whatever the pooled buffers have beyond what those batches needed, unless a graph
        that is in use relies on them. Safe at any time between two batches.
        """
        freed = self._tape.trim()
        freed += sum(_storages(self.last_output).values())
        self.last_output = None
        return freed

    def _rollout(self, surface: Tensor, rows: Tensor | None, keep_paths: bool) -> RolloutResult:
        """All steps of all flows, by the engine of the settings."""
        call = RolloutCall(
            rows=rows,
            optimizer_step=self.optimizer_step.clone(),
            scale=self.displacement_scale(),
            noisy=self.training and self.settings.noise.std > 0,
            keep_paths=keep_paths,
        )
        if _uses_tape(self.rollout_settings, self.settings.num_steps):
            return self._tape.run(surface, call)
        rule = MoveRule.of(call.scale, self.settings.movement.max_displacement, self.model.residual_energy)
        return self._rules.run(surface, AutogradStepper(self.neuron, self.carrier, rule), call)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.carrier.energy_head.weight.dtype

    @property
    def _geometry_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)


def _map_in(dim: int, lattice: LatticeSettings, model: ModelSettings) -> MapIn | IdentityIn:
    cells, energy = lattice.num_cells, model.energy_dim
    if model.maps == "learned":
        return MapIn(dim, cells, energy, model.map_hidden)
    if dim != cells * energy:
        raise ConfigError(
            f"model.maps = identity: embeddings of dimension {dim} must be surfaces of lattice.width x lattice.height "
            f"x model.energy_dim = {lattice.width} x {lattice.height} x {energy} = {cells * energy} numbers. "
            "Give a lattice of the data's size, or model.maps=learned"
        )
    if lattice.num_steps == 0:
        raise ConfigError(
            "lattice.max_steps = 0 (or lattice.depth = 1): with model.maps = identity only flows that take steps have "
            "anything to learn. Give it a step, or model.maps=learned"
        )
    return IdentityIn(cells, energy)


def _map_out(dim: int, map_in: MapIn | IdentityIn, model: ModelSettings) -> MapOut | IdentityOut:
    if isinstance(map_in, IdentityIn):
        return IdentityOut()
    map_out = MapOut(dim, map_in.num_cells, map_in.energy_dim, model.map_hidden)
    if model.map_hidden is None:
        map_out.start_as_inverse(map_in, SKIP_SHARE if model.skip else 1.0)
    return map_out


def _uses_tape(settings: RolloutSettings, num_steps: int) -> bool:
    """Whether rollouts of so many steps run on a tape: nothing is on one without a step."""
    return num_steps > 0 and settings.engine != "autograd"


def _statistics(landings: Landings, flows: FinishedFlows, mass: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Scalars on the device: counts per sample, so that they don't depend on the batch, and means.

    Means over landings are 0 where nothing landed, which is a fault of its own.
    """
    landed = landings.landed
    count = landed.sum().clamp(min=1)

    def mean(value: Tensor) -> Tensor:
        return (value.detach() * landed).sum() / count

    energy = landings.energy.detach()
    energy_mean = mean(energy.mean(-1))
    num_moves, num_steps = counts.num_moves, len(counts.by_step["active"]) - 1
    batch, num_cells = mass.shape
    num_created = flows.created.sum()
    return {
        "share_z0": mean(landings.plane == 0),
        "share_zdepth": mean(landings.plane == 1),
        "share_projected": mean(landings.projected),
        "steps": mean(landings.steps),
        "created": num_created / batch,
        "landed": landed.sum() / batch,
        "removed": flows.removed.sum() / batch,
        "spawned": num_created / batch - num_cells,
        "overflow": flows.overflow.sum() / batch,
        "coverage": (mass > 0).to(mass.dtype).mean(),
        "displacement": counts.distance / num_moves.clamp(min=1),
        "energy_mean": energy_mean,
        "energy_std": mean((energy - energy_mean).square().mean(-1)).sqrt(),
        "active_share": num_moves / (num_created * max(num_steps, 1)),
    }


def _phase(timer: PhaseTimer | None, name: str) -> AbstractContextManager[Any]:
    return nullcontext() if timer is None else timer.phase(name)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _detached(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def _storages(value: Any) -> dict[int, int]:
    """Bytes of every memory block that the tensors of a nested value hold, by address: views count once."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    items: list[Any] = list(value.values()) if isinstance(value, dict) else []
    if dataclasses.is_dataclass(value):
        items = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return {address: size for item in items for address, size in _storages(item).items()}
