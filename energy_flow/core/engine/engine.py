"""Rollouts on a tape: one `autograd.Function` around all steps, in chunks of samples that fit into memory.

Flows meet only in the aggregation, so chunks give exact gradients. The forward pass runs every chunk and keeps the tape
of the last one; the backward pass replays the others one by one. The memory depends on the chunk, not on the batch.
"""

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.engine.chunking import ChunkSizes
from energy_flow.core.engine.compaction import Activity
from energy_flow.core.engine.compiled import compiler, has_compiler, step_kernels
from energy_flow.core.engine.cuda_graphs import GraphCache
from energy_flow.core.engine.locking import EngineLock
from energy_flow.core.engine.packed_weights import PackedGradients, PackedWeights, padded, step_parameters
from energy_flow.core.engine.tape import Compaction, Tape, most_segments
from energy_flow.core.precision import without_autocast
from energy_flow.core.rollout import Rollout, RolloutCall, RolloutResult, RolloutSettings, join_chunks
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensors import tensors_of
from energy_flow.errors import ConfigError
from energy_flow.ops.backend import has_triton, use_triton

_WORTH_COMPILING = 128  # hidden units; on a CPU, smaller models never earn back half a minute of compiling


class ExecutionPlan(NamedTuple):
    """How a batch is computed, in the forward pass and in every replay."""

    dtype: torch.dtype  # of the GRU's products
    compaction: Compaction


@dataclass(frozen=True, eq=False)
class TapeJob:
    """A batch to run: everything besides its surface, as it was at the call. Forward pass and replays use the same."""

    rollout: Rollout
    call: RolloutCall
    weights: PackedWeights  # copies: later changes of the parameters don't reach a replay
    plan: ExecutionPlan
    keep: bool  # for a backward pass


# Gradients of positions and energies at the end -> gradients of the energies at the start, and of the weights.
_Backward = Callable[[Tensor, Tensor], tuple[Tensor, PackedGradients]]


class _Taped(NamedTuple):
    """The samples whose tape the buffers hold, and its backward pass."""

    job: TapeJob
    start: int
    stop: int
    backward: _Backward


class TapeEngine:
    """Runs rollouts of the shipped networks on a tape, one batch at a time.

    Args:
        settings: how rollouts are computed.
        lock: held by every call, as the buffers serve one batch at a time.
    """

    def __init__(self, settings: RolloutSettings, lock: EngineLock) -> None:
        self._settings = settings
        self._lock = lock
        self._sizes = ChunkSizes(settings.chunk)
        self._activity = Activity()
        self._taped: _Taped | None = None
        self._graphs = GraphCache()
        self._pool = TensorPool()
        self._pool.dependants.append(self._graphs)  # graphs write to fixed addresses

    def __getstate__(self) -> dict[str, Any]:
        # A copy of a model, e.g. for weight averaging, starts without a tape.
        return self.__dict__ | {"_taped": None, "_activity": Activity()}

    def run(
        self, neuron: SimpleNeuron, carrier: EnergyCarrier, rollout: Rollout, surface: Tensor, call: RolloutCall
    ) -> RolloutResult:
        """Run all steps, from surface energies [B, S, E] to flows that have all ended; differentiable once.

        Args:
            neuron, carrier: exactly the shipped networks; their parameters get gradients.
            rollout: the rules.
            surface: energies of the input plane.
            call: the other inputs.

        Raises:
            ConfigError: the device doesn't support a setting.
        """
        _check(self._settings, surface)
        parameters = step_parameters(neuron, carrier)
        dtype = _products_dtype(surface, parameters[0])
        job = TapeJob(
            rollout=rollout,
            call=call,
            weights=PackedWeights.pack(neuron, carrier, dtype),
            plan=ExecutionPlan(dtype, self._compaction(surface, dtype)),
            keep=torch.is_grad_enabled() and any(value.requires_grad for value in (surface, *parameters)),
        )
        results: list[RolloutResult] = []
        position, energy = _TapedRollout.apply(self, job, results, surface, *parameters)
        result = results.pop()
        if job.keep and surface.is_cuda:
            self._activity.put(result.counts, result.flows.status.numel())
        flows = replace(result.flows, position=position, energy=energy)
        return result._replace(flows=flows)

    def trim(self) -> int:
        """Free graphs and buffers that no batch since the last call has needed; returns the bytes of the buffers.

        While a graph is in use, the buffers stay.
        """
        with self._lock:
            self._taped = None
            self._graphs.drop_unused()
            return 0 if len(self._graphs) else self._pool.trim()

    def release(self) -> None:
        """Free all buffers."""
        self._taped = None
        self._pool.clear()

    def forward(self, surface: Tensor, job: TapeJob) -> RolloutResult:
        """Run all chunks; keep the tape of the last one where there will be a backward pass."""

        def attempt(chunk: int) -> RolloutResult:
            starts = range(0, len(surface), chunk)
            return join_chunks(
                [self._chunk(surface, job, start, start + chunk, job.keep and start == starts[-1]) for start in starts]
            )

        with self._lock.on(surface.device):
            return self._within_memory(surface, job, job.keep, attempt)

    def backward(
        self, surface: Tensor, job: TapeJob, grad_position: Tensor, grad_energy: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the surface and of `step_parameters`. Chunks without a tape run forward once more."""

        def attempt(chunk: int) -> tuple[Tensor, list[Tensor]]:
            gradients = PackedGradients(job.weights)
            grad_surface = torch.empty_like(surface)
            for start in reversed(range(0, len(surface), chunk)):
                part = slice(start, start + chunk)
                backward = self._backward_of(surface, job, start, start + chunk)
                grad_start, of_chunk = backward(grad_position[part], grad_energy[part])
                grad_surface[part] = grad_start[:, : surface.shape[1]]
                gradients.add(of_chunk)
                del backward, grad_start, of_chunk  # frees the tape before the next chunk makes its own
            return grad_surface, gradients.unpack()

        with self._lock.on(surface.device):
            return self._within_memory(surface, job, True, attempt)

    def _backward_of(self, surface: Tensor, job: TapeJob, start: int, stop: int) -> _Backward:
        """The backward pass of samples [start, stop). They run forward again if the buffers don't hold their tape."""
        if self._taped is None or self._taped[:3] != (job, start, stop):
            self._chunk(surface, job, start, stop, keep=True)
        taped, self._taped = self._taped, None
        assert taped is not None
        return taped.backward

    def _chunk(self, surface: Tensor, job: TapeJob, start: int, stop: int, keep: bool) -> RolloutResult:
        """Run samples [start, stop) forward."""
        self._taped = None
        values = surface[start:stop], job.call.samples(start, stop), job.weights
        kind = self._kind(values[0], job, keep)
        run = functools.partial(self._run, job=job, keep=keep)
        graph = None if kind is None else self._graphs.get(kind, surface.device)
        if graph is not None:
            result = graph.forward(run, *values)
            backward = functools.partial(graph.backward, _backward)
        else:
            result, tape = run(*values)
            backward = functools.partial(_backward_and_count, self._graphs, tape, kind)
            if not keep:
                self._graphs.count_run(kind)
        if keep:
            self._taped = _Taped(job, start, stop, backward)
        return result

    def _run(
        self, surface: Tensor, call: RolloutCall, weights: PackedWeights, *, job: TapeJob, keep: bool
    ) -> tuple[RolloutResult, Tape]:
        """Run a chunk; `surface`, `call` and `weights` may be the copies of a CUDA graph."""
        lattice, device = job.rollout.settings, surface.device
        tape = Tape(
            weights=weights,
            kernels=step_kernels(self._compiles(device, weights.hidden_size), device.type == "cpu"),
            rule=call.rule,
            num_steps=lattice.num_steps,
            num_slots=len(surface) * lattice.capacity,
            keep=keep,
            recompute=self._settings.recompute,
            compaction=job.plan.compaction,
            spawning=lattice.spawn.enabled,
            pool=self._pool,
        )
        return job.rollout.run(surface, tape, call, self._pool), tape

    def _kind(self, surface: Tensor, job: TapeJob, keep: bool) -> Hashable:
        """The kind of a chunk: one CUDA graph fits all chunks of a kind. None: run it without a graph."""
        call, rollout = job.call, job.rollout
        wanted = surface.is_cuda if self._settings.cuda_graph == "auto" else self._settings.cuda_graph
        if not wanted or call.keep_paths:
            return None
        modes = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        inputs = surface.device, surface.shape, surface.dtype, call.noisy, call.sample_ids is None
        rules = rollout.key, call.rule.residual_energy
        weights = tuple(value.shape for value in tensors_of(job.weights)), job.weights.trained
        return inputs, job.plan, keep, torch.is_inference_mode_enabled(), modes, rules, weights

    def _compaction(self, surface: Tensor, dtype: torch.dtype) -> Compaction:
        wanted = self._settings.compaction
        if wanted is False:
            return "none"
        if surface.device.type == "cpu":
            return "active_only"
        if wanted == "auto":
            # Kernels that skip rows exist for two-byte numbers only. The time at which the host learns the activity
            # varies, and skipping changes the rounding: not for deterministic algorithms.
            fits = use_triton(surface) and dtype.itemsize == 2 and not torch.are_deterministic_algorithms_enabled()
            wanted = fits and self._activity.is_low()
        return "active_first" if wanted else "none"

    def _compiles(self, device: torch.device, hidden_size: int) -> bool:
        """Whether to compile the kernels."""
        if self._settings.compile != "auto":
            return self._settings.compile
        if device.type == "cpu":
            return hidden_size >= _WORTH_COMPILING and has_compiler()
        return has_triton()

    def _bytes_per_sample(self, surface: Tensor, job: TapeJob, keep: bool) -> int:
        """Bytes that one sample needs: tape, gates, gradients of the hidden states, states of all steps."""
        weights, lattice, steps = job.weights, job.rollout.settings, job.rollout.settings.num_steps
        layers, size, energy_dim = len(weights.layers), weights.hidden_size, surface.shape[2]
        row = padded(weights.num_features + energy_dim) + layers * size
        gates = layers * steps if keep and not self._settings.recompute else 1
        segments = most_segments(steps, job.plan.compaction, lattice.spawn.enabled)
        slabs = steps + layers * segments if keep else (layers + 1) * min(segments, 2)
        products = slabs * row + gates * 4 * size + (layers + 2) * size
        states = (steps if keep else 3) * (10 + 3 * energy_dim) + 4 * weights.num_features
        return lattice.capacity * (products * job.plan.dtype.itemsize + states * surface.element_size())

    def _within_memory(self, surface: Tensor, job: TapeJob, keep: bool, attempt: Any) -> Any:
        bytes_per_sample = self._bytes_per_sample(surface, job, keep)
        return self._sizes.within_memory(
            len(surface),
            surface.device,
            kind=(job.plan, keep, bytes_per_sample),
            bytes_per_sample=lambda: bytes_per_sample,
            held=lambda: self._pool.nbytes,
            release=self.release,
            attempt=attempt,
        )


class _TapedRollout(torch.autograd.Function):
    """All steps of all flows, as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: TapeEngine,
        job: TapeJob,
        results: list[RolloutResult],
        surface: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(surface.device):
            result = engine.forward(surface.detach(), job)
        ctx.engine, ctx.job = engine, job
        ctx.save_for_backward(surface)  # so torch raises if it changes before the backward pass
        results.append(result)
        return result.flows.position, result.flows.energy

    @staticmethod
    def backward(ctx: Any, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise ConfigError(
                "create_graph = True: the tape has no second derivatives. Set rollout.engine=autograd, which has them"
            )
        (surface,) = ctx.saved_tensors
        with without_autocast(surface.device):
            grad_surface, gradients = ctx.engine.backward(surface.detach(), ctx.job, grad_position, grad_energy)
        return None, None, None, grad_surface, *gradients


# Functions, not methods: the engine keeps them with a tape, and must not keep itself alive.


def _backward(tape: Tape, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor, PackedGradients]:
    gradients = PackedGradients(tape.weights)
    return tape.backward(grad_position, grad_energy, gradients), gradients


def _backward_and_count(
    graphs: GraphCache, tape: Tape, kind: Hashable, grad_position: Tensor, grad_energy: Tensor
) -> tuple[Tensor, PackedGradients]:
    result = _backward(tape, grad_position, grad_energy)
    graphs.count_run(kind)
    return result


def _check(settings: RolloutSettings, surface: Tensor) -> None:
    device = surface.device
    on_cpu = device.type == "cpu"
    if settings.compile is True and on_cpu and not has_compiler():
        raise ConfigError(
            f"rollout.compile = true: torch.compile needs {compiler()} on a CPU, which isn't installed. Install "
            "it, or set rollout.compile=auto"
        )
    if settings.cuda_graph is True and device.type != "cuda":
        raise ConfigError(f"rollout.cuda_graph = true: the device is {device}. Set rollout.cuda_graph=auto")
    if settings.compaction is True and not on_cpu and not use_triton(surface):
        raise ConfigError(
            f"rollout.compaction = true: on {device} it needs Triton, and compute capability 8.0 or more. Set "
            "rollout.compaction=auto"
        )


def _products_dtype(surface: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype of the GRU's products: that of autocast where it is on."""
    kind = surface.device.type
    if torch.is_autocast_enabled(kind) and parameter.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return parameter.dtype
