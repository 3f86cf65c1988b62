"""The elementwise parts of a step and of its way back, as they are or compiled."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from energy_flow.core.flow_step import move, move_backward
from energy_flow.core.simple_neuron import neuron_features_backward, write_features
from energy_flow.ops.counter_noise import counter_noise, drawn, normal_quantiles
from energy_flow.ops.gru_gates import (
    gate_gradients,
    gates_backward,
    gates_backward_by,
    gates_forward,
    next_hidden,
)
from energy_flow.ops.narrow_linear import (
    add_product,
    heads_backward,
    heads_backward_by,
    heads_forward,
    heads_forward_torch,
)

Function = Callable[..., Any]
_MAX_FORMS = 256
_limits = threading.local()


@dataclass(frozen=True)
class StepKernels:
    """What runs between the matrix products of a step."""

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
    """One set per way of running; compiled ones are compiled when first called, again for a new size, then for any."""
    if not compiled:
        return StepKernels(
            write_features,
            neuron_features_backward,
            move,
            move_backward,
            gates_forward,
            gates_backward,
            heads_forward,
            heads_backward,
            counter_noise,
        )
    return StepKernels(
        _compile(write_features),
        _compile(neuron_features_backward),
        _compile(move),
        _compile(move_backward),
        # On a GPU gates and heads have kernels of their own.
        _forward_by(_compile(next_hidden)) if on_cpu else gates_forward,
        functools.partial(gates_backward_by, _compile(gate_gradients)) if on_cpu else gates_backward,
        _compile(heads_forward_torch) if on_cpu else heads_forward,
        functools.partial(heads_backward_by, _compile(add_product)) if on_cpu else heads_backward,
        # Compiled for a CPU (torch 2.13) the last numbers of a row come out wrong.
        counter_noise if on_cpu else _noise_by(_compile(drawn)),
    )


def _forward_by(function: Function) -> Function:
    # The result is copied outside: `out` and `hidden` are parts of one tape, which compiled code would have to see.
    def forward(gates: Tensor, hidden: Tensor, bias: Tensor, out: Tensor, count: Tensor | None = None) -> None:
        out.copy_(function(gates, hidden, bias))

    return forward


def _noise_by(function: Function) -> Function:
    def noise(
        seed: int, optimizer_step: Tensor, rollout_step: int, rows: Tensor, num_slots: int, dtype: torch.dtype
    ) -> Tensor:
        quantiles = normal_quantiles(dtype, rows.device)
        result: Tensor = function(seed, optimizer_step, rollout_step, rows, num_slots, quantiles)
        return result

    return noise


def _compile(function: Function) -> Function:
    compiled = torch.compile(function, fullgraph=True)

    def call(*arguments: Any) -> Any:
        # Every dtype, size of a model and kind of rule is a form of its own; dynamo gives up at 8 of them. The limit is
        # one thread's, and on a GPU autograd walks back in a thread of its own.
        if not hasattr(_limits, "raised"):
            config = torch._dynamo.config
            config.cache_size_limit = max(config.cache_size_limit, _MAX_FORMS)
            _limits.raised = True
        return compiled(*arguments)

    return call
