"""Hooks on every module of neuron and carrier, and hooks of all modules at once."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from energy_flow.core.flow_processor import FlowProcessor
from tests.core.habits.helpers import (
    CASE,
    EVERY,
    FEW,
    GENERIC,
    assert_close,
    assert_right,
    gradients_of,
    inputs_of,
    own_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.plain import plain_forward, plain_parts

# A `ModuleList` is never called, so `carrier.cells` itself has no hooks to call.
MODULES = (
    "neuron",
    "neuron.network",
    "neuron.network.0",
    "neuron.network.1",
    "neuron.network.2",
    "carrier",
    "carrier.cells.0",
    "carrier.cells.1",
    "carrier.energy_head",
    "carrier.displacement_head",
)
STEPS = CASE.lattice["max_steps"]
ways = pytest.mark.parametrize("way", FEW)
modules = pytest.mark.parametrize("name", MODULES)


def scaled_first(values: Any) -> Any:
    """0.9 times a tensor, or the first tensor of a tuple."""
    if isinstance(values, tuple):
        return (0.9 * values[0], *values[1:])
    return 0.9 * values


def scaled_each(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else 0.9 * gradient for gradient in gradients)


def forward_hook(module: nn.Module, inputs: Any, output: Any) -> Any:
    return scaled_first(output)


def forward_pre_hook(module: nn.Module, inputs: Any) -> Any:
    return scaled_first(inputs)


def full_backward_hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
    return scaled_each(grad_input)


def full_backward_pre_hook(module: nn.Module, grad_output: Any) -> Any:
    return scaled_each(grad_output)


HOOKS: dict[str, Callable[..., Any]] = {
    hook.__name__: hook for hook in (forward_hook, forward_pre_hook, full_backward_hook, full_backward_pre_hook)
}


def register(module: nn.Module, kind: str, hook: Callable[..., Any]) -> Any:
    return getattr(module, f"register_{kind}")(hook)


@ways
@modules
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_changes_the_result(way: str, name: str, kind: str) -> None:
    """A hook may change inputs, outputs and gradients. All other gradients follow."""
    processor = processor_of(GENERIC[way])
    register(processor.get_submodule(name), kind, HOOKS[kind])
    assert_right(processor)


@modules
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_is_called_once_per_step(name: str, kind: str) -> None:
    """Without chunks a hook is called once per step, in the forward or in the backward pass."""
    processor = processor_of({"chunk": None})
    calls: Counter[str] = Counter()
    hook = lambda *arguments: calls.update([name])  # noqa: E731
    register(processor.get_submodule(name), kind, hook)
    embedding, rows = inputs_of()
    scalar(processor(embedding, rows)).backward()
    assert calls[name] == STEPS


@ways
@modules
def test_hook_that_only_looks(way: str, name: str) -> None:
    """A hook that only reads changes nothing, and sees all flows of all steps."""
    processor = processor_of(GENERIC[way])
    expected = own_results(processor)
    seen: list[int] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).shape[:-1].numel())

    handle = processor.get_submodule(name).register_forward_hook(look)
    with torch.no_grad():
        processor(*inputs_of())
    assert sum(seen) == STEPS * 3 * 6, "all slots in each step"
    assert_close(own_results(processor), expected)
    handle.remove()
    count = len(seen)
    assert_close(own_results(processor), expected)
    assert len(seen) == count, "it was removed"


@ways
@pytest.mark.parametrize("name", ["map_in", "lattice.map_out", "map_in.network.0"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_on_a_map(way: str, name: str, kind: str) -> None:
    """Hooks on the maps work as on any module."""
    processor = processor_of(GENERIC[way])
    register(processor.get_submodule(name), kind, HOOKS[kind])
    assert_right(processor)


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hook_on_the_processor(way: str, kind: str) -> None:
    """A hook on the processor itself is no reason to leave the tape."""
    processor = processor_of(EVERY[way])
    calls: list[str] = []
    register(processor, kind, lambda *arguments: calls.append(kind))
    assert_right(processor)
    assert calls == [kind]


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("name", ["carrier.cells.0.weight_hh", "carrier.energy_head.bias", "neuron.network.0.weight"])
def test_hook_on_a_weight(way: str, name: str) -> None:
    """`Tensor.register_hook` on a weight changes its gradient once per backward pass."""
    processor = processor_of(EVERY[way])
    expected = own_results(processor)
    calls: list[Tensor] = []

    def double(gradient: Tensor) -> Tensor:
        calls.append(gradient)
        return 2 * gradient

    processor.get_parameter(name).register_hook(double)
    found = own_results(processor)
    assert_close(found, expected | {name: 2 * expected[name]})
    assert len(calls) == 1


@pytest.mark.parametrize("way", EVERY)
def test_post_accumulate_hook(way: str) -> None:
    """`register_post_accumulate_grad_hook` on a weight is called once per backward pass, with the whole gradient."""
    processor = processor_of(EVERY[way])
    name = "carrier.cells.0.weight_hh"
    seen: list[Tensor] = []
    processor.get_parameter(name).register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    scalar(processor(*inputs_of())).backward()
    assert len(seen) == 1
    assert_close({name: seen[0]}, {name: own_results(processor)[name]})


def only_cells(hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *rest: hook(module, *rest) if isinstance(module, nn.GRUCell) else None


@contextmanager
def everywhere(kind: str) -> Iterator[None]:
    handle = getattr(global_hooks, f"register_module_{kind}")(only_cells(HOOKS[kind]))
    try:
        yield
    finally:
        handle.remove()


@ways
@pytest.mark.parametrize("kind", HOOKS)
def test_global_hook(way: str, kind: str) -> None:
    """A hook for all modules of the process is called for the modules of the parts as well."""
    processor = processor_of(GENERIC[way])
    expected = own_results(processor)
    with everywhere(kind):
        assert_right(processor)
        with pytest.raises(AssertionError, match="differs by"):
            assert_close(own_results(processor), expected)
    assert_close(own_results(processor), expected)


@ways
def test_hook_that_collects(way: str) -> None:
    """Outputs that a hook collects have their graph: a penalty on them reaches the weights."""
    with plain_parts():
        expected = gradients_with_penalty(plain_forward, processor_of({"engine": "autograd"}))
    assert_close(gradients_with_penalty(FlowProcessor.__call__, processor_of(GENERIC[way])), expected)


def gradients_with_penalty(run: Callable[..., Any], processor: FlowProcessor) -> dict[str, Tensor]:
    """Gradients of a loss with the sum of squares of all outputs of the displacement head."""
    collected: list[Tensor] = []
    head = processor.carrier.displacement_head
    head.register_forward_hook(lambda module, inputs, output: collected.append(output))
    loss = scalar(run(processor, *inputs_of()))
    penalty = sum((value.square().sum() for value in list(collected)), torch.zeros((), dtype=torch.float64))
    assert float(penalty) > 0, "the hook was called"
    return gradients_of(loss + penalty, trained(processor))
