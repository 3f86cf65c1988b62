"""Parts that were replaced, subclassed, wrapped, shared, tied, patched or frozen after construction."""

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowProcessor
from tests.core.habits.helpers import (
    EVERY,
    GENERIC,
    assert_close,
    assert_right,
    inputs_of,
    own_results,
    plain_results,
    processor_of,
    scalar,
    trained,
)
from tests.core.habits.parts import (
    ENERGY,
    FEATURES,
    HIDDEN,
    Doubling,
    DoublingCarrier,
    DoublingNeuron,
    HalvedCell,
    HalvedLinear,
    LoRA,
    LSTMCarrier,
    MemorylessCarrier,
    OwnCarrier,
    OwnNeuron,
    Scaled,
    filled,
    with_weights_of,
)
from tests.helpers import Case

ways = pytest.mark.parametrize("way", GENERIC)


@ways
@pytest.mark.parametrize("make", [OwnCarrier, MemorylessCarrier, LSTMCarrier])
def test_replaced_carrier(way: str, make: type[nn.Module]) -> None:
    """A module put in the place of the carrier is used and gets its gradients; any nest of hidden states will do."""
    processor = processor_of(GENERIC[way])
    processor.carrier = filled(make())
    assert_right(processor)


@ways
def test_replaced_neuron(way: str) -> None:
    """A module put in the place of the neuron is used and gets its gradients."""
    processor = processor_of(GENERIC[way])
    processor.neuron = filled(OwnNeuron())
    assert_right(processor)


@ways
def test_replaced_after_a_run(way: str) -> None:
    """A part may be replaced between two batches, and put back."""
    processor = processor_of(GENERIC[way])
    before = own_results(processor)
    shipped, processor.carrier = processor.carrier, filled(OwnCarrier())
    assert_right(processor)
    processor.carrier = shipped
    assert_close(own_results(processor), before)


@pytest.mark.parametrize("way", EVERY)
def test_replaced_by_the_same_kind(way: str) -> None:
    """New modules of the shipped kinds are no reason to leave the tape; their weights are used."""
    processor = processor_of(EVERY[way])
    own_results(processor)
    processor.carrier.energy_head = filled(nn.Linear(HIDDEN, ENERGY))
    processor.carrier.cells[1] = filled(nn.GRUCell(HIDDEN, HIDDEN))
    processor.neuron.network[2] = filled(nn.Linear(FEATURES, FEATURES))
    assert_right(processor)


@ways
@pytest.mark.parametrize("name", ["map_in", "map_out"])
def test_replaced_maps(way: str, name: str) -> None:
    """The maps may be any modules."""
    processor = processor_of(GENERIC[way])
    owner = processor if name == "map_in" else processor.lattice
    setattr(owner, name, Scaled(getattr(owner, name)))
    assert_right(processor)


@ways
def test_another_activation_inside_the_neuron(way: str) -> None:
    """A layer inside the neuron may be replaced by one of another kind."""
    processor = processor_of(GENERIC[way])
    processor.neuron.network[1] = nn.Tanh()
    assert_right(processor)


@ways
def test_a_layer_more_inside_the_neuron(way: str) -> None:
    """A layer may be added inside the neuron."""
    processor = processor_of(GENERIC[way])
    processor.neuron.network.append(nn.Sequential(nn.Tanh(), filled(nn.Linear(FEATURES, FEATURES))))
    assert_right(processor)


@ways
def test_a_recurrent_layer_more(way: str) -> None:
    """A cell may be added to the carrier."""
    processor = processor_of(GENERIC[way])
    processor.carrier.cells.append(filled(nn.GRUCell(HIDDEN, HIDDEN)))
    assert_right(processor)


@ways
def test_subclassed_neuron(way: str) -> None:
    """A subclass of the neuron decides what runs."""
    processor = processor_of(GENERIC[way])
    processor.neuron = with_weights_of(DoublingNeuron, processor.neuron, ENERGY, FEATURES)
    assert_right(processor)


@ways
def test_subclassed_carrier(way: str) -> None:
    """A subclass of the carrier decides what runs."""
    processor = processor_of(GENERIC[way])
    processor.carrier = with_weights_of(DoublingCarrier, processor.carrier, FEATURES, ENERGY, HIDDEN, 2)
    assert_right(processor)


@ways
@pytest.mark.parametrize("name", ["carrier.cells.0", "carrier.energy_head", "neuron.network.0"])
def test_subclassed_layer(way: str, name: str) -> None:
    """A subclass of `nn.GRUCell` or `nn.Linear` inside a part decides what runs."""
    processor = processor_of(GENERIC[way])
    layer = processor.get_submodule(name)
    layer.__class__ = HalvedCell if isinstance(layer, nn.GRUCell) else HalvedLinear
    assert_right(processor)


@ways
@pytest.mark.parametrize("name", ["carrier", "neuron", "carrier.cells.0", "carrier.cells.1", "neuron.network.2"])
def test_wrapped_part(way: str, name: str) -> None:
    """A wrapper with a parameter of its own runs around the part; no layer drops out."""
    processor = processor_of(GENERIC[way])
    processor.set_submodule(name, Scaled(processor.get_submodule(name)))
    assert_right(processor)


@ways
@pytest.mark.parametrize("names", [("carrier.energy_head",), ("carrier.displacement_head",), ("neuron.network.0",)])
def test_lora(way: str, names: tuple[str, ...]) -> None:
    """Low-rank adapters on linear layers: the base is frozen, the adapter is trained."""
    processor = processor_of(GENERIC[way])
    for name in names:
        layer = processor.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        processor.set_submodule(name, LoRA(layer))
    assert f"{names[0]}.a" in trained(processor)
    assert f"{names[0]}.base.weight" not in trained(processor)
    assert_right(processor)


@ways
def test_patched_forward(way: str) -> None:
    """A `forward` set on an instance is the one that runs."""
    processor = processor_of(GENERIC[way])
    head = processor.carrier.displacement_head
    head.forward = types.MethodType(lambda self, value: 0.7 * nn.Linear.forward(self, value), head)
    assert_right(processor)


TWO_EQUAL = Case(
    {"noise.std": 0.1, "max_steps": 3},
    {"num_layers": 2, "energy_dim": 2, "features": 3, "hidden_size": 5},
    training=True,
)


def share_a_cell(processor: FlowProcessor) -> None:
    processor.carrier.cells[1] = processor.carrier.cells[0]


def tie_linear_layers(processor: FlowProcessor) -> None:
    processor.neuron.network[2] = processor.neuron.network[0]


def tie_a_weight(processor: FlowProcessor) -> None:
    processor.carrier.cells[1].weight_hh = processor.carrier.cells[0].weight_hh


@pytest.mark.parametrize("way", [*EVERY, "auto"])
@pytest.mark.parametrize("share", [share_a_cell, tie_a_weight, tie_linear_layers])
def test_shared_parts(way: str, share: Callable[[FlowProcessor], None]) -> None:
    """A module or a weight used twice gets the sum of both gradients."""
    case = TWO_EQUAL
    if share is tie_linear_layers:
        case = Case(case.lattice, {**case.model, "features": 5}, training=True)
    processor = processor_of({**GENERIC, **EVERY}[way], case)
    share(processor)
    assert_right(processor, case)


FROZEN = ["carrier", "neuron", "carrier.energy_head", "carrier.displacement_head", "carrier.cells.0", "map_in"]


@pytest.mark.parametrize("way", [*EVERY, "auto"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_part(way: str, name: str) -> None:
    """A frozen part gets no gradient. All other gradients are exact."""
    processor = processor_of({**GENERIC, **EVERY}[way])
    frozen = processor.get_submodule(name).requires_grad_(False)
    expected = plain_results(processor)
    assert not any(key.startswith(f"{name}.") for key in expected)
    assert_close(own_results(processor), expected)
    scalar(processor(*inputs_of())).backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(parameter.grad is not None for parameter in trained(processor).values())


@pytest.mark.parametrize("way", EVERY)
def test_one_frozen_weight(way: str) -> None:
    """A single weight may be frozen: the gradients of its neighbours are exact."""
    processor = processor_of(EVERY[way])
    for name in ("carrier.cells.0.weight_hh", "carrier.energy_head.bias", "neuron.network.0.weight"):
        processor.get_parameter(name).requires_grad_(False)
    assert_right(processor)


@pytest.mark.parametrize("way", EVERY)
def test_everything_frozen(way: str) -> None:
    """With all parameters frozen the input still gets its gradient, and without that there is no graph."""
    processor = processor_of(EVERY[way]).requires_grad_(False)
    assert_right(processor)
    embedding, rows = inputs_of()
    assert not processor(embedding.detach(), rows).embedding.requires_grad


@pytest.mark.parametrize("way", EVERY)
def test_frozen_and_thawed(way: str) -> None:
    """Freezing and thawing between batches is seen at once."""
    processor = processor_of(EVERY[way])
    for frozen in (True, False, True):
        processor.carrier.requires_grad_(not frozen)
        assert_right(processor)


@ways
def test_tensor_subclass(way: str) -> None:
    """A parameter that is a tensor subclass keeps its own arithmetic."""
    processor = processor_of(GENERIC[way])
    head = processor.carrier.energy_head
    weight = nn.Parameter(head.weight.detach().as_subclass(Doubling))
    assert type(weight) is Doubling
    head.weight = weight
    expected = plain_results(processor)
    head.weight = nn.Parameter(2 * weight.detach().as_subclass(torch.Tensor))
    head.bias = nn.Parameter(2 * head.bias.detach())
    torch.testing.assert_close(plain_results(processor)["surface"], expected["surface"])
    head.weight, head.bias = weight, nn.Parameter(head.bias.detach() / 2)
    # Not `torch.autograd.grad`: torch switches off the arithmetic of a subclass while it computes gradients for it.
    scalar(processor(*inputs_of())).backward()
    for name, parameter in processor.named_parameters():
        assert parameter.grad is not None
        assert_close({name: parameter.grad.as_subclass(Tensor)}, {name: expected[name].as_subclass(Tensor)})
