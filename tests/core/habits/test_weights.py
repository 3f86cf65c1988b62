"""Weights that are computed from other tensors: pruned, normed, and parametrized, also with random numbers."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointError

from energy_flow.core.flow_processor import FlowProcessor
from tests.core.habits.helpers import (
    CHUNKED,
    FEW,
    GENERIC,
    assert_close,
    assert_right,
    assert_slope_of,
    disturb,
    own_results,
    plain_results,
    processor_of,
)

# Old `weight_norm` and `spectral_norm` warn that newer ones exist.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:.*spectral_norm.*is deprecated")
ways = pytest.mark.parametrize("way", FEW)
CONVERGED = 300  # power iterations: one more or one less then makes no difference
LAYERS = {
    "cell": ("carrier.cells.0", "weight_hh"),
    "head": ("carrier.displacement_head", "weight"),
    "neuron": ("neuron.network.0", "weight"),
}

Change = Callable[[nn.Module, str], object]
CHANGES: dict[str, Change] = {
    "prune": lambda layer, name: prune.l1_unstructured(layer, name, amount=0.5),
    "prune, structured": lambda layer, name: prune.ln_structured(layer, name, amount=0.4, n=2, dim=0),
    "old weight_norm": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": lambda layer, name: nn.utils.spectral_norm(layer, name, n_power_iterations=CONVERGED),
    "spectral_norm": lambda layer, name: parametrizations.spectral_norm(layer, name, n_power_iterations=CONVERGED),
    "orthogonal": parametrizations.orthogonal,
}


def changed(way: str, change: str, layer: str) -> FlowProcessor:
    """A processor with a changed weight; its parameters have moved since."""
    processor = processor_of(GENERIC[way])
    name, weight = LAYERS[layer]
    CHANGES[change](processor.get_submodule(name), weight)
    processor.double()
    own_results(processor)
    disturb(processor)
    return processor


@ways
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_computed_weights_in_training(way: str, change: str, layer: str) -> None:
    """The weight of now is used, and the tensors that it is computed from get the gradients."""
    assert_right(changed(way, change, layer))


@ways
@pytest.mark.parametrize("change", CHANGES)
def test_computed_weights_in_evaluation(way: str, change: str) -> None:
    """In evaluation the weight of now is used as well: nothing goes stale."""
    processor = changed(way, change, "head").eval()
    assert_right(processor)
    disturb(processor)
    assert_right(processor)


@ways
def test_prune_made_permanent(way: str) -> None:
    """After `prune.remove` the weight is a parameter again."""
    processor = changed(way, "prune", "cell")
    cell = processor.carrier.cells[0]
    prune.remove(cell, "weight_hh")
    assert float((cell.weight_hh == 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert_right(processor)


@pytest.mark.parametrize("way", ["auto", "autograd, chunk 2"])
def test_parametrization_removed(way: str) -> None:
    """Parametrizations may come and go between batches."""
    processor = processor_of(GENERIC[way])
    before = own_results(processor)
    head = processor.carrier.energy_head
    parametrize.register_parametrization(head, "weight", Twice())
    assert_right(processor)
    parametrize.remove_parametrizations(head, "weight", leave_parametrized=False)
    assert_close(own_results(processor), before)


@ways
def test_cached_parametrization(way: str) -> None:
    """`parametrize.cached()` around a pass changes nothing. Where a chunk runs twice, torch may refuse it."""
    processor = changed(way, "weight_norm", "cell")
    expected = plain_results(processor)
    with parametrize.cached(), refused_by_torch(allowed="chunk" in way):
        assert_close(own_results(processor), expected)


def refused_by_torch(allowed: bool) -> AbstractContextManager[None]:
    """The replay of a chunk saves other tensors than the forward pass did."""
    return contextlib.suppress(CheckpointError) if allowed else contextlib.nullcontext()


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noisy(nn.Module):
    """Adds random numbers, anew whenever the weight is read."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1 * torch.randn_like(weight)


@pytest.mark.parametrize("way", GENERIC)
@pytest.mark.parametrize("layer", LAYERS)
def test_random_parametrization(way: str, layer: str) -> None:
    """The gradients are those of the random numbers that the forward pass drew, also where a chunk runs twice."""
    processor = processor_of(GENERIC[way])
    name, weight = LAYERS[layer]
    parametrize.register_parametrization(processor.get_submodule(name), weight, Noisy())
    assert_slope_of(processor)


@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_random_parametrization_is_that_of_the_modules(way: str) -> None:
    """Without chunks the numbers are drawn in the order in which the modules run."""
    processor = processor_of(GENERIC[way] | {"chunk": None})
    parametrize.register_parametrization(processor.carrier.energy_head, "weight", Noisy())
    assert_right(processor)


@pytest.mark.parametrize("way", CHUNKED)
def test_weights_moved_by_an_optimiser(way: str) -> None:
    """The shipped parts after a step of an optimiser: no weight is kept from the batch before."""
    processor = processor_of(CHUNKED[way])
    own_results(processor)
    disturb(processor)
    assert_right(processor)
