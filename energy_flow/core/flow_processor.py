"""The flow processor: map in, rollout of all steps, landings, map out."""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from energy_flow.core.embedding_mapper import MapIn, MapOut
from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Count, EnergyLattice, Landings, LatticeSettings
from energy_flow.core.flow_step import flow_step
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensorized_flow_storage import FlowStatus, TensorizedFlowStorage, TensorPool
from energy_flow.core.timing import PhaseTimer
from energy_flow.errors import ConfigError
from energy_flow.ops.counter_noise import counter_noise
from energy_flow.settings import Settings


class ModelSettings(Settings):
    """The networks (config group `model`)."""

    energy_dim: Count
    residual_energy: bool
    features: Count
    hidden_size: Count
    num_layers: Count
    map_hidden: Count | None


@dataclass(frozen=True)
class Faults:
    """Findings that must end a training step; they stay on the device until somebody reads them."""

    no_landing: Tensor  # bool [B]
    not_finite: Tensor  # bool [B]: NaN or Inf in the output embedding
    lost: Tensor  # int64 scalar: created flows that neither landed nor were removed
    overflow: Tensor  # int64 scalar: children without a slot (counted and logged, no fault)
    needed: Tensor  # int64 scalar: slots per sample that would have held all children


@dataclass(frozen=True)
class Trajectories:
    """Paths of all flows, detached."""

    position: Tensor  # [T + 1, B, M, 3]; stands still once a flow has ended; the last entry is on a plane
    active: Tensor  # bool [T + 1, B, M]: active at the start of step t; entry T: before projection
    displacement: Tensor  # [T, B, M]: length of each move, 0 where not active


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
    """

    optimizer_step: Tensor

    def __init__(self, dim: int, lattice: LatticeSettings, model: ModelSettings, seed: int) -> None:
        super().__init__()
        cells, energy = lattice.num_cells, model.energy_dim
        self.settings, self.model, self.seed, self.dim = lattice, model, seed, dim
        self.map_in = MapIn(dim, cells, energy, model.map_hidden)
        self.neuron = SimpleNeuron(energy, model.features)
        self.carrier = EnergyCarrier(model.features, energy, model.hidden_size, model.num_layers, model.residual_energy)
        map_out = MapOut(dim, cells, energy, model.map_hidden)
        if model.map_hidden is None:
            map_out.start_as_inverse(self.map_in)
        self.lattice = EnergyLattice(lattice, energy, map_out)
        # On the device and in the checkpoint: noise and displacement schedule follow it, also in evaluation.
        self.register_buffer("optimizer_step", torch.zeros((), dtype=torch.int64))
        self.last_output: FlowOutput | None = None
        self._pool = TensorPool()

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
            state = self.lattice.place_initial_energy(surface, self.model.num_layers, self.model.hidden_size)
            storage = TensorizedFlowStorage(state, self.settings.num_cells, self._pool)
        with _phase(timer, "propagate"):
            record = _Record(record_trajectories)
            self._rollout(storage, rows, record)
        with _phase(timer, "collect"):
            landings = self.lattice.landings(storage)
            deposits = self.lattice.collect(landings)
        with _phase(timer, "aggregate"):
            output_surface, mass = self.lattice.aggregate(deposits, batch)
            output_embedding = self.lattice.map_out(output_surface)
        output = FlowOutput(
            embedding=output_embedding,
            surface=output_surface,
            input_surface=surface,
            landings=landings,
            statistics=_statistics(landings, storage, mass, record),
            by_step=record.by_step(),
            faults=Faults(
                no_landing=~landings.landed.any(dim=1),
                not_finite=~output_embedding.detach().isfinite().all(dim=1),
                lost=record.lost(storage),
                overflow=storage.overflow.sum(),
                needed=(storage.created + storage.overflow).max(),
            ),
            trajectories=record.trajectories(storage) if record_trajectories else None,
        )
        self.last_output = output.detached()
        return output

    def cleanup_memory_safe(self) -> int:
        """Let go of what ended flows still hold, all in one go; returns the bytes given back.

        That is the last batch's output kept for inspection (landings, trajectories) and whatever the pooled
        buffers have beyond what batches since the last call needed. Safe at any time between two batches.
        """
        freed = self._pool.trim()
        freed += sum(_storages(self.last_output).values())
        self.last_output = None
        return freed

    @property
    def _geometry_dtype(self) -> torch.dtype:
        return torch.promote_types(self.map_in.cell_value.dtype, torch.float32)

    def _rollout(self, storage: TensorizedFlowStorage, rows: Tensor | None, record: "_Record") -> None:
        """All steps of all flows. Only the device knows who is active: nothing here waits for it."""
        settings = self.settings
        scale = self.displacement_scale()
        convergence = _Convergence(settings, storage)
        record.look(storage)
        for step in range(settings.num_steps):
            noise = self._noise(step, rows, storage)
            before = storage.state
            result = flow_step(self.neuron, self.carrier, before, scale, settings.movement.max_displacement, noise)
            moved = storage.where(FlowStatus.ACTIVE)
            storage.advance(result.state, result.reached)
            active = storage.where(FlowStatus.ACTIVE)
            if settings.spawn.enabled and step + 1 < settings.num_steps:
                children = self.lattice.num_children(result.length) * active
                storage.spawn(children, before.position)
            if settings.filter.enabled:
                storage.end(active & (result.length < settings.filter.min_displacement), FlowStatus.REMOVED)
            if settings.convergence.enabled:
                storage.end(convergence.converged(step + 1), FlowStatus.PROJECTED)
            record.step(storage, result.length * moved)
        storage.end(storage.where(FlowStatus.ACTIVE), FlowStatus.PROJECTED)

    def _noise(self, step: int, rows: Tensor | None, storage: TensorizedFlowStorage) -> Tensor | None:
        rule = self.settings.noise
        if not self.training or rule.std == 0:
            return None
        if rows is None:
            raise ConfigError(
                f"lattice.noise.std = {rule.std}: noise depends on the data row of every sample. Let batches carry "
                "'row' (int64, [batch]), or set lattice.noise.std=0"
            )
        dtype = storage.state.position.dtype
        noise = counter_noise(self.seed, self.optimizer_step, step, rows, storage.capacity, dtype) * rule.std
        return noise if rule.z else nn.functional.pad(noise[..., :2], (0, 1))


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


class _Record:
    """What is written down about a rollout while it runs; device tensors throughout."""

    def __init__(self, keep_paths: bool) -> None:
        self._keep_paths = keep_paths
        self._counts: dict[str, list[Tensor]] = {}
        self._unaccounted: list[Tensor] = []
        self._distance: list[Tensor] = []
        self._position: list[Tensor] = []
        self._active: list[Tensor] = []
        self._displacement: list[Tensor] = []

    def look(self, storage: TensorizedFlowStorage) -> None:
        """Count the flows of every status."""
        self._count("created", storage.created)
        for status in (FlowStatus.ACTIVE, FlowStatus.REACHED, FlowStatus.PROJECTED, FlowStatus.REMOVED):
            self._count(status.name.lower(), storage.where(status))
        self._unaccounted.append(storage.unaccounted())
        if self._keep_paths:
            self._position.append(storage.state.position.detach())
            self._active.append(storage.where(FlowStatus.ACTIVE))

    def _count(self, name: str, flows: Tensor) -> None:
        self._counts.setdefault(name, []).append(flows.sum())

    def step(self, storage: TensorizedFlowStorage, length: Tensor) -> None:
        """After a step; `length` [B, M] is 0 for flows that didn't move."""
        self.look(storage)
        self._distance.append(length.sum())
        if self._keep_paths:
            self._displacement.append(length)

    def by_step(self) -> dict[str, Tensor]:
        return {name: torch.stack(values) for name, values in self._counts.items()}

    def lost(self, storage: TensorizedFlowStorage) -> Tensor:
        """Flows lost in any step, or neither landed nor removed at the end."""
        ended = storage.landed | storage.where(FlowStatus.REMOVED)
        return torch.stack([*self._unaccounted, (storage.created - ended.sum(1)).abs().sum()]).sum()

    def moves(self) -> tuple[Tensor, Tensor, int]:
        """Number of moves of single flows, the length of all of them together, and the number of steps."""
        if not self._distance:
            zero = self._counts["active"][0].new_zeros(())
            return zero, zero, 0
        return torch.stack(self._counts["active"][:-1]).sum(), torch.stack(self._distance).sum(), len(self._distance)

    def trajectories(self, storage: TensorizedFlowStorage) -> Trajectories:
        position = torch.stack(self._position)
        z = position[-1, ..., 2]
        plane = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        position[-1, ..., 2] = torch.where(storage.landed, plane, z)
        moves = torch.stack(self._displacement) if self._displacement else position.new_zeros(0, *z.shape)
        return Trajectories(position, torch.stack(self._active), moves)


def _statistics(landings: Landings, storage: TensorizedFlowStorage, mass: Tensor, record: _Record) -> dict[str, Tensor]:
    """Scalars on the device: counts per sample, so that they don't depend on the batch, and means.

    Means over landings are 0 where nothing landed, which is a fault of its own.
    """
    landed = landings.landed
    count = landed.sum().clamp(min=1)

    def mean(value: Tensor) -> Tensor:
        return (value.detach() * landed).sum() / count

    energy = landings.energy.detach()
    energy_mean = mean(energy.mean(-1))
    num_moves, length, num_steps = record.moves()
    batch, num_cells = mass.shape
    num_created = storage.created.sum()
    return {
        "share_z0": mean(landings.plane == 0),
        "share_zdepth": mean(landings.plane == 1),
        "share_projected": mean(landings.projected),
        "steps": mean(landings.steps),
        "created": num_created / batch,
        "landed": landed.sum() / batch,
        "removed": storage.where(FlowStatus.REMOVED).sum() / batch,
        "spawned": num_created / batch - num_cells,
        "overflow": storage.overflow.sum() / batch,
        "coverage": (mass > 0).to(mass.dtype).mean(),
        "displacement": length / num_moves.clamp(min=1),
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
