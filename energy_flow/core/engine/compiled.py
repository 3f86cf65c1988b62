"""The elementwise parts of a step and of its backward pass, as they are or compiled."""

import functools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from energy_flow.core.flow_step import move, move_backward
from energy_flow.core.rollout import step_modules
from energy_flow.core.simple_neuron import neuron_features_backward, write_features
from energy_flow.ops.counter_noise import counter_noise, drawn, normal_quantiles
from energy_flow.ops.gru_gates import (
    gate_gradients,
    gates_backward,
    gates_forward,
    next_hidden,
)
from energy_flow.ops.narrow_linear import (
    add_product,
    narrow_linear,
    narrow_linear_backward,
    narrow_linear_torch,
)

Function = Callable[..., Any]
_MAX_FORMS = 256
_limits = threading.local()


def compiler() -> str:
    """The C++ compiler that torch.compile needs on a CPU."""
    return os.environ.get("CXX", "g++")


def has_compiler() -> bool:
    """Whether it is installed."""
    return shutil.which(compiler()) is not None


@dataclass(frozen=True)
class StepKernels:
    """The functions that run between the matrix products of a step."""

    write_features: Function
    features_backward: Function
    move: Function
    move_backward: Function
    gates_forward: Function
    gates_backward: Function
    heads_forward: Function
    heads_backward: Function
    counter_noise: Function


@functools.cache
def step_kernels(compiled: bool, on_cpu: bool) -> StepKernels:
    """The kernels for a device, cached.

    `torch.compile` compiles a function at its first call, once more for a second size, and then for any size.
    """
    if not compiled:
        return StepKernels(
            write_features=write_features,
            features_backward=neuron_features_backward,
            move=move,
            move_backward=move_backward,
            gates_forward=gates_forward,
            gates_backward=gates_backward,
            heads_forward=narrow_linear,
            heads_backward=narrow_linear_backward,
            counter_noise=counter_noise,
        )
    # On a GPU, gates and heads have kernels of their own.
    return StepKernels(
        write_features=_compile(write_features),
        features_backward=_compile(neuron_features_backward),
        move=_compile(move),
        move_backward=_compile(move_backward),
        gates_forward=_compiled_gates(_compile(next_hidden)) if on_cpu else gates_forward,
        gates_backward=functools.partial(gates_backward, kernel=_compile(gate_gradients)) if on_cpu else gates_backward,
        heads_forward=_compile(narrow_linear_torch) if on_cpu else narrow_linear,
        heads_backward=functools.partial(narrow_linear_backward, kernel=_compile(add_product))
        if on_cpu
        else narrow_linear_backward,
        # Compiled for a CPU (torch 2.13), the last numbers of a row are wrong.
        counter_noise=counter_noise if on_cpu else _compiled_noise(_compile(drawn)),
    )


@functools.cache
def compiled_step() -> Function:
    """`step_modules`, compiled as far as the modules allow."""
    return _compile(step_modules, fullgraph=False)


def _compiled_gates(function: Function) -> Function:
    # Copy the result outside of compiled code: it doesn't see that `out` and `hidden` are parts of one tape.
    def forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, count: Tensor | None = None) -> None:
        out.copy_(function(gates, hidden, bias))

    return forward


def _compiled_noise(function: Function) -> Function:
    def noise(
        seed: int, optimizer_step: Tensor, rollout_step: int, rows: Tensor, num_slots: int, dtype: torch.dtype
    ) -> Tensor:
        quantiles = normal_quantiles(dtype, rows.device)
        result: Tensor = function(seed, optimizer_step, rollout_step, rows, num_slots, quantiles)
        return result

    return noise


def _compile(function: Function, fullgraph: bool = True) -> Function:
    compiled = torch.compile(function, fullgraph=fullgraph)

    def call(*arguments: Any) -> Any:
        # Dynamo compiles once per dtype, model size and kind of rule, and stops at 8. The limit is set per thread, and
        # on a GPU autograd runs the backward pass in a thread of its own.
        if not hasattr(_limits, "raised"):
            config = torch._dynamo.config
            config.cache_size_limit = max(config.cache_size_limit, _MAX_FORMS)
            _limits.raised = True
        return compiled(*arguments)

    return call
