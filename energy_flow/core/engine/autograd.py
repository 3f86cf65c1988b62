"""Rollouts of any modules: the step as the modules are, recorded by autograd, in chunks that fit into memory.

A batch that fits runs once, under plain autograd. Otherwise `torch.utils.checkpoint` runs chunks of samples: forward
without their inner tensors, and once more when the backward pass needs these. The second run uses the parameters,
buffers, inputs and random numbers of the first, so gradients are exact even if the model has changed in between.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from energy_flow.core.engine.choice import has_hook
from energy_flow.core.engine.chunking import ChunkSizes
from energy_flow.core.engine.compiled import compiled_step
from energy_flow.core.engine.locking import EngineLock
from energy_flow.core.engine.snapshot import Snapshot
from energy_flow.core.rollout import (
    AutogradStepper,
    Rollout,
    RolloutCall,
    RolloutResult,
    RolloutSettings,
    join_chunks,
    step_modules,
)
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensors import map_tensors
from energy_flow.core.tracing import is_traced

# Forward methods of the classes that were compiled, as they were then.
_COMPILED: dict[type[nn.Module], Callable[..., Any]] = {}

_Run = Callable[[Tensor, RolloutCall], RolloutResult]


class AutogradEngine:
    """Runs rollouts of any modules.

    Args:
        settings: `chunk` and `compile` matter. The step is compiled where `compile = true`: what torch.compile makes of
            other people's modules is theirs to judge.
        lock: held by every run and replay. A replay puts other tensors into the modules for a while, and no other
            thread may read them then.
    """

    def __init__(self, settings: RolloutSettings, lock: EngineLock) -> None:
        self._compile = settings.compile is True
        self._lock = lock
        self._sizes = ChunkSizes(settings.chunk)
        self._sample_bytes: dict[Hashable, int] = {}

    def run(
        self, neuron: nn.Module, carrier: nn.Module, rollout: Rollout, surface: Tensor, call: RolloutCall
    ) -> RolloutResult:
        """Run all steps, from surface energies [B, S, E] to flows that have all ended.

        Args:
            neuron, carrier: modules that keep the protocols of `energy_flow.core.parts`.
            rollout: the rules.
            surface: energies of the input plane.
            call: the other inputs.

        Raises:
            ConfigError: a module doesn't keep its protocol.
        """
        modules = (neuron, carrier)
        traced = is_traced(surface)
        step = compiled_step() if not traced and self._compiles(modules) else step_modules

        def run(part: Tensor, own: RolloutCall) -> RolloutResult:
            return rollout.run(part, AutogradStepper(neuron, carrier, own, step), own, TensorPool())

        if traced:
            return run(surface, call)
        return self._sizes.within_memory(
            len(surface),
            surface.device,
            kind=(torch.is_grad_enabled(), self._kind(modules, surface, rollout)),
            bytes_per_sample=lambda: self._bytes_per_sample(modules, run, rollout, surface, call),
            held=lambda: 0,
            release=lambda: None,
            attempt=lambda chunk: self._chunks(modules, run, surface, call, chunk),
        )

    def _compiles(self, modules: tuple[nn.Module, ...]) -> bool:
        """Whether to compile the step.

        Compiled code doesn't notice a hook, or another forward method of a class, that comes after it was compiled.
        """
        if not self._compile:
            return False
        parts = [part for module in modules for part in module.modules()]
        same = all(_COMPILED.setdefault(type(part), type(part).forward) is type(part).forward for part in parts)
        return same and not any(has_hook(part) for part in parts)

    def _chunks(
        self, modules: tuple[nn.Module, ...], run: _Run, surface: Tensor, call: RolloutCall, chunk: int
    ) -> RolloutResult:
        """Run a batch in chunks."""
        batch = len(surface)
        if chunk >= batch:
            return run(surface, call)
        parts = [
            (surface[start : start + chunk], call.samples(start, start + chunk)) for start in range(0, batch, chunk)
        ]
        if not torch.is_grad_enabled():
            return join_chunks([run(*part) for part in parts])
        first = Snapshot(modules)
        return join_chunks([self._replayable(run, Snapshot(modules, parameters=first), *part) for part in parts])

    def _replayable(self, run: _Run, snapshot: Snapshot, surface: Tensor, call: RolloutCall) -> RolloutResult:
        """Run a chunk without keeping its inner tensors."""
        is_replay = False
        kept, kept_call = _copy_inputs(surface, call)

        def attempt(part: Tensor) -> RolloutResult:
            nonlocal is_replay
            if not is_replay:
                is_replay = True
                return run(part, call)
            with self._lock, snapshot.installed():
                return run(kept, kept_call)

        result: RolloutResult = checkpoint(attempt, surface, use_reentrant=False)
        return result

    def _bytes_per_sample(
        self, modules: tuple[nn.Module, ...], run: _Run, rollout: Rollout, surface: Tensor, call: RolloutCall
    ) -> int:
        """Bytes that autograd saves for one sample, measured by a run of the first one.

        Without gradients a step keeps next to nothing, so the whole batch runs until memory says otherwise.
        """
        if not torch.is_grad_enabled():
            return 1
        kind = self._kind(modules, surface, rollout)
        if kind not in self._sample_bytes:
            self._sample_bytes[kind] = _measure(modules, run, surface[:1], call.samples(0, 1))
        return self._sample_bytes[kind]

    @staticmethod
    def _kind(modules: tuple[nn.Module, ...], surface: Tensor, rollout: Rollout) -> Hashable:
        """What the memory of a sample depends on."""
        types = tuple(type(part) for module in modules for part in module.modules())
        shapes = tuple(value.shape for module in modules for value in module.parameters())
        autocast = torch.is_autocast_enabled(surface.device.type)
        return types, shapes, surface.shape[1:], surface.dtype, autocast, rollout.key


def _measure(modules: tuple[nn.Module, ...], run: _Run, surface: Tensor, call: RolloutCall) -> int:
    """Bytes of the tensors that autograd saves in a run, without those of the modules themselves.

    The run works on copies of parameters and buffers, and leaves torch's random generators as they were.
    """
    own: set[int] = set()
    blocks: dict[int, int] = {}
    kept: list[Tensor] = []  # no block may be freed and used again while they are counted

    def count(value: Tensor) -> None:
        block = value.untyped_storage()
        if block.data_ptr() not in own:
            blocks[block.data_ptr()] = block.nbytes()
            kept.append(value.detach())

    devices = [surface.device] if surface.is_cuda else []
    with torch.random.fork_rng(devices=devices), Snapshot(modules).installed():
        own |= {value.untyped_storage().data_ptr() for module in modules for value in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            run(*_copy_inputs(surface, call))
    kept.clear()
    return max(1, sum(blocks.values()))


def _copy_inputs(surface: Tensor, call: RolloutCall) -> tuple[Tensor, RolloutCall]:
    """Copies of a chunk's inputs for its replay, out of reach of the caller."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad)

    return copy(surface), replace(call, sensed=map_tensors(copy, call.sensed))
