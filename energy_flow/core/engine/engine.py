"""Rollouts on a tape: one `autograd.Function` around all steps, in chunks of samples that fit into memory.

Flows meet only in the aggregation, so chunks give exact gradients: every chunk runs forward, the last one's tape is
kept; the backward pass replays the others, one after the other. Memory is set by the chunk, not by the batch.
"""

import functools
import os
import shutil
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.engine.chunking import ChunkSizes
from energy_flow.core.engine.compaction import Activity
from energy_flow.core.engine.compiled import step_kernels
from energy_flow.core.engine.cuda_graphs import GraphCache
from energy_flow.core.engine.packed_weights import StepGradients, StepWeights, padded, step_parameters
from energy_flow.core.engine.tape import Compaction, Tape, most_segments
from energy_flow.core.flow_step import MoveRule
from energy_flow.core.rollout import Rollout, RolloutCall, RolloutResult, RolloutSettings, joined
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.errors import ConfigError
from energy_flow.ops.backend import has_triton, use_triton

_WORTH_COMPILING = 128  # hidden units


class ExecutionPlan(NamedTuple):
    """How a batch is computed, forward and in every replay."""

    dtype: torch.dtype  # of the recurrent network's products
    compaction: Compaction


_WalkBack = Callable[[Tensor, Tensor], tuple[Tensor, StepGradients]]


class _Taped(NamedTuple):
    """Whose tape the buffers hold, and how to walk it back."""

    call: RolloutCall
    start: int
    stop: int
    backward: _WalkBack


class TapeEngine:
    """Runs rollouts on a tape.

    Args:
        neuron, carrier: the networks; their parameters get gradients.
        rollout: the rules. Its pool has the tape's buffers, too.
        residual_energy: see `MoveRule`.
        settings: ways of running.
    """

    def __init__(
        self,
        neuron: SimpleNeuron,
        carrier: EnergyCarrier,
        rollout: Rollout,
        residual_energy: bool,
        settings: RolloutSettings,
    ) -> None:
        self._neuron, self._carrier, self._rollout = neuron, carrier, rollout
        self._residual_energy, self._settings = residual_energy, settings
        self._sizes = ChunkSizes(settings.chunk)
        self._activity = Activity()
        self._taped: _Taped | None = None
        self._recordings = GraphCache()
        rollout.pool.dependants.append(self._recordings)  # graphs write to buffers where they were

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model, for averages say, begin without a tape.
        return self.__dict__ | {"_taped": None, "_activity": Activity()}

    def run(self, surface: Tensor, call: RolloutCall) -> RolloutResult:
        """From surface energies [B, S, E] to flows that have all ended; differentiable once.

        Raises:
            ConfigError: the settings ask for what this device can't do.
        """
        _check(self._settings, surface)
        parameters = step_parameters(self._neuron, self._carrier)
        dtype = _products_dtype(surface, parameters[0])
        way = ExecutionPlan(dtype, self._compaction(surface, dtype))
        keep = torch.is_grad_enabled() and any(value.requires_grad for value in (surface, *parameters))
        results: list[RolloutResult] = []
        position, energy = _TapedRollout.apply(self, call, way, keep, results, surface, *parameters)
        result = results.pop()
        if keep and surface.is_cuda:
            self._activity.put(result.counts, result.flows.status.numel())
        flows = replace(result.flows, position=position, energy=energy)
        return result._replace(flows=flows)

    def trim(self) -> int:
        """Let go of what no batch since the last call has needed; returns the bytes of the buffers freed.

        As long as a graph is in use, the buffers stay.
        """
        self._taped = None
        self._recordings.drop_unused()
        return 0 if len(self._recordings) else self._rollout.pool.trim()

    def release(self) -> None:
        """Let go of all buffers."""
        self._taped = None
        self._rollout.pool.clear()

    def forward(self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, keep: bool) -> RolloutResult:
        """All chunks; with `keep` the last one's tape stays for the backward pass."""

        def attempt(chunk: int) -> RolloutResult:
            starts = range(0, len(surface), chunk)
            return joined(
                [
                    self._chunk(surface, call, way, start, start + chunk, keep and start == starts[-1])
                    for start in starts
                ]
            )

        return self._within_memory(surface, way, keep, attempt)

    def backward(
        self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, grad_position: Tensor, grad_energy: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the surface and of `step_parameters`; replays the chunks whose tape isn't there."""

        def attempt(chunk: int) -> tuple[Tensor, list[Tensor]]:
            gradients = self._weights(way.dtype).no_gradients()
            grad_surface = torch.empty_like(surface)
            for start in reversed(range(0, len(surface), chunk)):
                part = slice(start, start + chunk)
                walk_back = self._walk_back(surface, call, way, start, start + chunk)
                on_start, of_chunk = walk_back(grad_position[part], grad_energy[part])
                grad_surface[part] = on_start[:, : surface.shape[1]]
                gradients.add(of_chunk)
                del walk_back, on_start, of_chunk  # the tape, which the next chunk's would stand beside
            return grad_surface, gradients.unpack(self._carrier)

        return self._within_memory(surface, way, True, attempt)

    def _walk_back(self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, start: int, stop: int) -> _WalkBack:
        """The way back through the tape of some samples; they run again if the buffers don't hold it."""
        if self._taped is None or self._taped[:3] != (call, start, stop):
            self._chunk(surface, call, way, start, stop, keep=True)
        taped, self._taped = self._taped, None
        assert taped is not None
        return taped.backward

    def _chunk(
        self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, start: int, stop: int, keep: bool
    ) -> RolloutResult:
        """Run samples [start, stop) forward."""
        self._taped = None
        part, own = surface[start:stop], call.samples(start, stop)
        kind = self._kind(part, own, way, keep)
        replayed = self._replay(kind, part, own, way, keep)
        if replayed is not None:
            result, walk_back = replayed
        else:
            result, tape = self._run(part, own, way, keep)
            walk_back = functools.partial(_walk_and_count, self._recordings, tape, kind)
            if not keep:
                self._recordings.ran(kind)
        if keep:
            self._taped = _Taped(call, start, stop, walk_back)
        return result

    def _replay(
        self, kind: Hashable, surface: Tensor, call: RolloutCall, way: ExecutionPlan, keep: bool
    ) -> tuple[RolloutResult, _WalkBack] | None:
        """Run a chunk by its CUDA graphs; None where it has none."""
        graph = None if kind is None else self._recordings.get(kind, surface.device)
        if graph is None:
            return None
        result = graph.forward(functools.partial(self._run, way=way, keep=keep), surface, call)
        return result, functools.partial(graph.backward, _walk)

    def _run(self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, keep: bool) -> tuple[RolloutResult, Tape]:
        lattice, settings = self._rollout.settings, self._settings
        on_cpu = surface.device.type == "cpu"
        tape = Tape(
            self._weights(way.dtype),
            step_kernels(self._compiles(surface.device), on_cpu),
            MoveRule.of(call.scale, lattice.movement.max_displacement, self._residual_energy),
            lattice.num_steps,
            len(surface) * lattice.capacity,
            keep=keep,
            recompute=settings.recompute,
            compaction=way.compaction,
            spawning=lattice.spawn.enabled,
            pool=self._rollout.pool,
        )
        return self._rollout.run(surface, tape, call), tape

    def _kind(self, surface: Tensor, call: RolloutCall, way: ExecutionPlan, keep: bool) -> Hashable:
        """What a graph is recorded for; None where there shall be none."""
        wanted = surface.is_cuda if self._settings.cuda_graph == "auto" else self._settings.cuda_graph
        if not wanted or call.keep_paths:
            return None
        addresses = tuple(parameter.data_ptr() for parameter in step_parameters(self._neuron, self._carrier))
        modes = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
        inputs = surface.shape, surface.dtype, call.noisy, call.rows is None
        return inputs, way, keep, torch.is_inference_mode_enabled(), modes, addresses

    def _weights(self, dtype: torch.dtype) -> StepWeights:
        return StepWeights.pack(self._neuron, self._carrier, dtype)

    def _compaction(self, surface: Tensor, dtype: torch.dtype) -> Compaction:
        wanted = self._settings.compaction
        if wanted is False:
            return "none"
        if surface.device.type == "cpu":
            return "rows"
        if wanted == "auto":
            # Kernels that leave rows out are for products of two bytes. When the host learns of the activity depends on
            # time, and another way of computing gives other roundings.
            fits = use_triton(surface) and dtype.itemsize == 2 and not torch.are_deterministic_algorithms_enabled()
            wanted = fits and self._activity.is_low()
        return "counts" if wanted else "none"

    def _compiles(self, device: torch.device) -> bool:
        """Whether to compile; on a CPU that takes half a minute once, which small models never earn back."""
        if self._settings.compile != "auto":
            return self._settings.compile
        if device.type == "cpu":
            return self._carrier.hidden_size >= _WORTH_COMPILING and _has_compiler()
        return has_triton()

    def _bytes_per_sample(self, surface: Tensor, way: ExecutionPlan, keep: bool) -> int:
        """What a sample of a chunk takes while it runs: tape, gates, gradients of the memories, states of all steps."""
        carrier, steps = self._carrier, self._rollout.settings.num_steps
        layers, size, energy_dim = len(carrier.cells), carrier.hidden_size, surface.shape[2]
        row = padded(carrier.num_features + energy_dim) + layers * size
        gates = layers * steps if keep and not self._settings.recompute else 1
        segments = most_segments(steps, way.compaction, self._rollout.settings.spawn.enabled)
        slabs = steps + layers * segments if keep else (layers + 1) * min(segments, 2)
        products = slabs * row + gates * 4 * size + (layers + 2) * size
        states = (steps if keep else 3) * (10 + 3 * energy_dim) + 4 * carrier.num_features
        return self._rollout.settings.capacity * (products * way.dtype.itemsize + states * surface.element_size())

    def _within_memory(self, surface: Tensor, way: ExecutionPlan, keep: bool, attempt: Any) -> Any:
        return self._sizes.within_memory(
            len(surface),
            surface.device,
            kind=(way, keep),
            bytes_per_sample=lambda: self._bytes_per_sample(surface, way, keep),
            held=lambda: self._rollout.pool.nbytes,
            release=self.release,
            attempt=attempt,
        )


class _TapedRollout(torch.autograd.Function):
    """All steps of all flows, as autograd sees them."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: TapeEngine,
        call: RolloutCall,
        way: ExecutionPlan,
        keep: bool,
        results: list[RolloutResult],
        surface: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(surface.device.type, enabled=False):
            result = engine.forward(surface.detach(), call, way, keep)
        ctx.engine, ctx.call, ctx.way = engine, call, way
        # Saved though the engine knows them: so torch sees if somebody changes them before the backward pass.
        ctx.save_for_backward(surface, *parameters)
        results.append(result)
        return result.flows.position, result.flows.energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        surface, *_ = ctx.saved_tensors
        with torch.autocast(surface.device.type, enabled=False):
            on_surface, on_parameters = ctx.engine.backward(
                surface.detach(), ctx.call, ctx.way, grad_position, grad_energy
            )
        return None, None, None, None, None, on_surface, *on_parameters


# What the engine keeps of a tape must not keep the engine.


def _walk(tape: Tape, grad_position: Tensor, grad_energy: Tensor) -> tuple[Tensor, StepGradients]:
    gradients = tape.weights.no_gradients()
    return tape.backward(grad_position, grad_energy, gradients), gradients


def _walk_and_count(
    recordings: GraphCache, tape: Tape, kind: Hashable, grad_position: Tensor, grad_energy: Tensor
) -> tuple[Tensor, StepGradients]:
    result = _walk(tape, grad_position, grad_energy)
    recordings.ran(kind)
    return result


def _check(settings: RolloutSettings, surface: Tensor) -> None:
    device = surface.device
    on_cpu = device.type == "cpu"
    if settings.compile is True and on_cpu and not _has_compiler():
        raise ConfigError(
            f"rollout.compile = true: {_compiler()}, which compiles for a CPU, isn't there. Install it, or set "
            "rollout.compile=auto"
        )
    if settings.cuda_graph is True and device.type != "cuda":
        raise ConfigError(f"rollout.cuda_graph = true: the device is {device}. Set rollout.cuda_graph=auto")
    if settings.compaction is True and not on_cpu and not use_triton(surface):
        raise ConfigError(
            f"rollout.compaction = true: on {device} it takes Triton, and compute capability 8.0 or more. Set "
            "rollout.compaction=auto"
        )


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _has_compiler() -> bool:
    return shutil.which(_compiler()) is not None


def _products_dtype(surface: Tensor, parameter: Tensor) -> torch.dtype:
    """Of the recurrent network's products: autocast's, where it is on."""
    kind = surface.device.type
    if torch.is_autocast_enabled(kind) and parameter.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return parameter.dtype
