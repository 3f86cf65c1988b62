"""Every trained part gets a gradient, from its initial values on."""

import pytest
import torch
from torch import Tensor

from energy_flow.core.flow_processor import FlowProcessor
from tests.helpers import DIM, Case, gradients, lattice_settings, model_settings


def initial_gradients(**model: object) -> tuple[FlowProcessor, dict[str, Tensor]]:
    torch.manual_seed(0)
    processor = FlowProcessor(DIM, lattice_settings(width=4, height=3), model_settings(**model), seed=0).double()
    embedding = torch.nn.functional.normalize(torch.randn(3, DIM, dtype=torch.float64), dim=-1).requires_grad_()
    return processor, gradients(processor, embedding, processor(embedding))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"residual_energy": True},
        {"num_layers": 2, "energy_dim": 3},
        {"map_hidden": 4, "residual_energy": True},
        {"skip": True},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(model: dict[str, object]) -> None:
    _, found = initial_gradients(**model)
    assert {name for name, gradient in found.items() if not (gradient != 0).any()} == set()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_every_part_of_the_shared_networks_gets_a_gradient() -> None:
    processor, found = initial_gradients(num_layers=2)
    hidden = processor.carrier.displacement_head.in_features
    for layer in range(2):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            for gate, gradient in enumerate(found[f"carrier.cells.{layer}.{name}"].split(hidden)):
                assert (gradient != 0).all(), f"{name} of layer {layer}, gate {gate}"
    for axis, name in enumerate("xyz"):
        assert (found["carrier.displacement_head.weight"][axis] != 0).all(), name
        assert found["carrier.displacement_head.bias"][axis] != 0, name
    for name in ("carrier.energy_head.weight", "carrier.energy_head.bias", "map_in.cell_value", "embedding"):
        assert (found[name] != 0).all(), name
    position_columns = found["neuron.network.0.weight"][:, :3]
    assert (position_columns != 0).all()


def test_gradients_are_those_of_the_function() -> None:
    """Central differences along a random direction of all parameters together."""
    case = Case({"spawn.enabled": True, "max_steps": 3}, displacement=0.5, seed=4, batch=2)
    processor, embedding = case.processor(), case.embedding()
    parameters = list(processor.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]
    cotangent = torch.randn(2, DIM, dtype=torch.float64)

    def loss() -> Tensor:
        return (processor(embedding).embedding * cotangent).sum()

    found = torch.autograd.grad(loss(), parameters)
    slope = sum((gradient * along).sum() for gradient, along in zip(found, direction, strict=True))
    values, width = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter.add_(along, alpha=sign * width)
            values.append(loss())
    numeric = (values[0] - values[1]) / (2 * width)
    assert float(slope) == pytest.approx(float(numeric), rel=1e-6)


def test_the_graph_of_a_batch_can_be_differentiated_in_parts() -> None:
    case = Case()
    processor, embedding = case.processor(), case.embedding()
    output = processor(embedding)
    (gradient,) = torch.autograd.grad(output.input_surface.sum(), processor.map_in.cell_value, retain_graph=True)
    assert torch.equal(gradient, torch.full_like(gradient, 3.0))
    output.surface.sum().backward()
    assert processor.carrier.energy_head.weight.grad is not None


def test_the_distance_has_a_slope_in_the_middle() -> None:
    """Flows that never left z = 0 must still learn to leave it; |z| would have no slope there."""
    case = Case({"deposit": "nearest", "max_steps": 1})
    processor, embedding = case.processor(), case.embedding()
    head = processor.carrier.displacement_head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
    output = processor(embedding)
    assert (output.landings.plane == 0).all()
    assert (output.landings.distance == 1).all()
    (gradient,) = torch.autograd.grad(output.landings.distance.sum(), head.bias)
    assert gradient.tolist() == [0.0, 0.0, 18.0]
