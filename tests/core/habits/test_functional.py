"""Weights as arguments: `functional_call`, `torch.func`, meta-learning, and gradients of gradients."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.errors import ConfigError
from tests.core.habits.helpers import (
    CASE,
    EVERY,
    GENERIC,
    assert_close,
    assert_slope,
    gradients_of,
    inputs_of,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.parts import OwnCarrier, filled
from tests.core.habits.plain import plain_forward, plain_parts

Weights = dict[str, Tensor]
every = pytest.mark.parametrize("way", EVERY)
EMBEDDING, ROWS = inputs_of()[0].detach(), inputs_of()[1]


def other_weights(processor: FlowProcessor, seed: int) -> Weights:
    """Weights of the same shapes, leaves of a graph of their own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value + 0.1 * torch.randn(value.shape, dtype=value.dtype, generator=generator)).detach().requires_grad_()
        for name, value in processor.named_parameters()
    }


def loss_with(processor: FlowProcessor, weights: Weights, seed: int = 7) -> Tensor:
    return scalar(functional_call(processor, weights, (EMBEDDING, ROWS)), seed)


def plain_loss_with(processor: FlowProcessor, weights: Weights, seed: int = 7) -> Tensor:
    """The same by a plain forward pass."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.processor = processor

        def forward(self, embedding: Tensor, rows: Tensor) -> Any:
            return plain_forward(self.processor, embedding, rows)

    named = {f"processor.{name}": value for name, value in weights.items()}
    with plain_parts():
        return scalar(functional_call(Plain(), named, (EMBEDDING, ROWS)), seed)


@every
def test_functional_call(way: str) -> None:
    """The given weights are used, and get the gradients; those of the module get none and stay as they are."""
    processor = processor_of(EVERY[way])
    own = {name: value.detach().clone() for name, value in processor.named_parameters()}
    weights = other_weights(processor, 1)
    loss = loss_with(processor, weights)
    expected = plain_loss_with(processor, weights)
    assert_close({"loss": loss.detach()}, {"loss": expected.detach()})
    assert_close(gradients_of(loss, weights), gradients_of(expected, weights))
    assert all(torch.equal(value, own[name]) and value.grad is None for name, value in processor.named_parameters())


@pytest.mark.parametrize("way", GENERIC)
def test_functional_call_of_an_own_part(way: str) -> None:
    """The same with a carrier of one's own."""
    processor = processor_of(GENERIC[way])
    processor.carrier = filled(OwnCarrier())
    weights = other_weights(processor, 1)
    expected = gradients_of(plain_loss_with(processor, weights), weights)
    assert_close(gradients_of(loss_with(processor, weights), weights), expected)


@every
def test_functional_call_with_some_weights(way: str) -> None:
    """Weights that aren't given are the module's own, and get their gradients."""
    processor = processor_of(EVERY[way])
    some = {name: value for name, value in other_weights(processor, 1).items() if name.startswith("carrier.cells.0")}
    rest = {name: value for name, value in trained(processor).items() if name not in some}
    expected = gradients_of(plain_loss_with(processor, some), some | rest)
    assert_close(gradients_of(loss_with(processor, some), some | rest), expected)


@every
def test_two_weight_sets_and_one_backward(way: str) -> None:
    """First-order meta-learning: one backward pass through two calls with different weights."""
    processor = processor_of(EVERY[way])
    sets = [other_weights(processor, seed) for seed in (1, 2)]
    leaves = {f"{number}.{name}": value for number, weights in enumerate(sets) for name, value in weights.items()}
    found = gradients_of(sum_of_two(loss_with, processor, sets), leaves)
    assert_close(found, gradients_of(sum_of_two(plain_loss_with, processor, sets), leaves))


def sum_of_two(call: Callable[..., Tensor], processor: FlowProcessor, sets: list[Weights]) -> Tensor:
    return call(processor, sets[0], 7) + 2 * call(processor, sets[1], 8)


@every
def test_maml_first_order(way: str) -> None:
    """MAML: both weight sets are a step away from the module's own weights, which get the gradient of both losses."""
    processor = processor_of(EVERY[way])
    found = maml(loss_with, processor, create_graph=False)
    assert_close(found, maml(plain_loss_with, processor, create_graph=False))


@pytest.mark.parametrize("way", ["autograd", "autograd, chunk 2"])
def test_maml_second_order(way: str) -> None:
    """MAML through the gradients themselves: exact on engine autograd, with chunks too."""
    processor = processor_of(EVERY[way])
    found = maml(loss_with, processor, create_graph=True)
    assert_close(found, maml(plain_loss_with, processor, create_graph=True))
    leaves = dict(processor.named_parameters())

    def loss() -> Tensor:
        with torch.enable_grad():
            return maml_loss(plain_loss_with, processor, create_graph=False)

    assert_slope(loss, list(leaves.values()), [found[name] for name in leaves])


def maml(call: Callable[..., Tensor], processor: FlowProcessor, create_graph: bool) -> Weights:
    return gradients_of(maml_loss(call, processor, create_graph), trained(processor))


def maml_loss(call: Callable[..., Tensor], processor: FlowProcessor, create_graph: bool) -> Tensor:
    """Two tasks, each with one step of gradient descent from the module's own weights."""
    own, total = dict(processor.named_parameters()), torch.zeros((), dtype=torch.float64)
    for task in (1, 2):
        slopes = torch.autograd.grad(call(processor, own, task), list(own.values()), create_graph=create_graph)
        adapted = {name: own[name] - 0.01 * slope for name, slope in zip(own, slopes, strict=True)}
        total = total + call(processor, adapted, task + 10)
    return total


def penalty_gradients(processor: FlowProcessor, plain: bool) -> Weights:
    """The gradient of the squared norm of the input's gradient."""
    embedding, rows = inputs_of()
    with plain_parts():
        loss = scalar(plain_forward(processor, embedding, rows)) if plain else None
    if loss is None:
        loss = scalar(processor(embedding, rows))
    (slope,) = torch.autograd.grad(loss, embedding, create_graph=True)
    return gradients_of(slope.square().sum(), trained(processor))


@pytest.mark.parametrize("way", ["autograd", "autograd, chunk 1", "autograd, chunk 2"])
def test_gradient_of_a_gradient(way: str) -> None:
    """A gradient penalty is exact on engine autograd, with chunks too."""
    processor = processor_of(EVERY[way])
    assert_close(penalty_gradients(processor, plain=False), penalty_gradients(processor, plain=True))


@pytest.mark.parametrize("way", [name for name in EVERY if name.startswith("tape")])
@pytest.mark.parametrize("named", [True, False])
def test_gradient_of_a_gradient_on_the_tape(way: str, named: bool) -> None:
    """The tape has first derivatives only, and says so; also to `torch.autograd.grad`, which names its inputs."""
    processor, (embedding, rows) = processor_of(EVERY[way]), inputs_of()
    loss = scalar(processor(embedding, rows))
    with pytest.raises((RuntimeError, ConfigError), match=r"differentiable|create_graph|rollout\.engine"):
        penalty(loss, embedding, processor, named)


def penalty(loss: Tensor, embedding: Tensor, processor: FlowProcessor, named: bool) -> None:
    (slope,) = torch.autograd.grad(loss, embedding, create_graph=True)
    if named:
        gradients_of(slope.square().sum(), trained(processor))
    else:
        slope.square().sum().backward()


def right_or_refused(call: Callable[[], Any]) -> Any:
    """The value, or None if energy_flow refuses the call in its own words, which name the way."""
    try:
        return call()
    except ConfigError as error:
        assert "torch.func" in str(error) or "rollout." in str(error), error  # noqa: PT017
        return None


@every
def test_func_grad(way: str) -> None:
    """`torch.func.grad` over `functional_call`: exact, or refused in words that name the way."""
    processor = processor_of(EVERY[way])
    weights = {name: value.detach() for name, value in other_weights(processor, 1).items()}
    found = right_or_refused(lambda: grad(lambda values: loss_with(processor, values))(weights))
    if found is not None:
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        assert_close(found, gradients_of(plain_loss_with(processor, leaves), leaves))


@every
def test_vmap_over_samples(way: str) -> None:
    """`torch.func.vmap` over single samples: exact, or refused in words that name the way."""
    processor = processor_of(EVERY[way]).eval()
    found = right_or_refused(lambda: vmap(lambda one: processor(one[None]).embedding[0])(EMBEDDING))
    if found is not None:
        with plain_parts():
            assert_close({"embedding": found}, {"embedding": plain_forward(processor, EMBEDDING).embedding})


@every
def test_vmap_over_weights(way: str) -> None:
    """An ensemble by `stack_module_state` and `vmap`: exact, or refused in words that name the way."""
    models = [processor_of(EVERY[way]).eval() for _ in range(2)]
    for number, model in enumerate(models):
        model.load_state_dict({**model.state_dict(), **other_weights(model, number)})
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0])

    def call(weights: Weights, buffers: Weights) -> Tensor:
        return functional_call(base, (weights, buffers), (EMBEDDING,)).embedding

    found = right_or_refused(lambda: vmap(call)(parameters, buffers))
    if found is not None:
        with plain_parts():
            expected = torch.stack([plain_forward(model, EMBEDDING).embedding for model in models])
        assert_close({"embedding": found.detach()}, {"embedding": expected.detach()})


@every
def test_gradients_of_each_sample(way: str) -> None:
    """`vmap(grad(...))`, the gradients of each sample: exact, or refused in words that name the way."""
    processor = processor_of(EVERY[way]).eval()
    weights = {name: value.detach() for name, value in processor.named_parameters()}

    def loss(values: Weights, one: Tensor) -> Tensor:
        return functional_call(processor, values, (one[None],)).embedding.square().sum()

    found = right_or_refused(lambda: vmap(grad(loss), in_dims=(None, 0))(weights, EMBEDDING))
    if found is not None:
        for number in range(CASE.batch):
            with plain_parts():
                one = plain_forward(processor, EMBEDDING[number : number + 1]).embedding.square().sum()
            expected = gradients_of(one, trained(processor))
            assert_close({name: value[number] for name, value in found.items()}, expected)


@every
def test_forward_mode(way: str) -> None:
    """Forward-mode derivatives (`torch.func.jvp`): exact, or an error."""
    processor = processor_of(EVERY[way]).eval()
    direction, width = torch.ones_like(EMBEDDING), 1e-6
    try:
        _, found = torch.func.jvp(lambda value: processor(value).embedding, (EMBEDDING,), (direction,))
    except (ConfigError, RuntimeError, NotImplementedError) as error:
        assert str(error)  # noqa: PT017  # an error is fine, a wrong number isn't
        return
    with plain_parts(), torch.no_grad():
        ends = [plain_forward(processor, EMBEDDING + sign * width * direction).embedding for sign in (1, -1)]
    assert_close({"slope": found.detach()}, {"slope": (ends[0] - ends[1]) / (2 * width)}, 1e-6)
