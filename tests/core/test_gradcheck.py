"""Gradients against central differences (float64): the reflection, the deposit, one step, the collection.

The hand-written backward passes of the tape are compared with autograd, one by one. Inputs keep a distance from kinks,
where a function has no derivative.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Landings
from energy_flow.core.flow_step import MoveRule, StepResult, fold, fold_slope, move, move_backward
from energy_flow.core.geometry import deposit_cells
from energy_flow.core.rollout import AutogradStepper, RolloutCall
from energy_flow.core.simple_neuron import SimpleNeuron, neuron_features, neuron_features_backward
from energy_flow.core.tensorized_flow_storage import Births, FlowState
from energy_flow.ops.gru_gates import gates_backward, gates_forward
from energy_flow.ops.gru_layer import LayerGradients, PackedLayer
from tests.helpers import SMALLEST_MARGIN, Case, fill_parameters

DTYPE = torch.float64
SIZES = [(4, 3), (2, 2), (1, 3), (5, 1), (1, 1)]


def uniform(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, dtype=DTYPE) * (high - low) + low


def margin(values: Tensor) -> float:
    """Distance of the closest value to a whole number."""
    return float((values - values.round()).abs().min())


def away_from_cells(xy: Tensor, width: int, height: int) -> bool:
    """No landing lies on a line from cell to cell, where bilinear weights have a kink."""
    axes = [(xy[..., axis] + 1) * (0.5 * (size - 1)) for axis, size in enumerate((width, height)) if size > 1]
    return all(margin(place) > SMALLEST_MARGIN for place in axes)


@pytest.mark.parametrize("seed", range(3))
def test_fold(seed: int) -> None:
    torch.manual_seed(seed)
    value = uniform(40, low=-9, high=9)
    assert margin((value + 1) / 2) > SMALLEST_MARGIN, "reflections at odd numbers"
    assert value.abs().min() < 1 < 5 < value.abs().max(), "inside, and reflected several times"
    assert gradcheck(fold, [value.requires_grad_()])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_bilinear_weights(width: int, height: int, seed: int) -> None:
    torch.manual_seed(seed)
    xy = uniform(2, 6, 2)
    assert away_from_cells(xy, width, height)
    assert gradcheck(lambda place: deposit_cells(place, width, height, "bilinear")[1], [xy.requires_grad_()])


class Step:
    """One step of a few flows of which some are held by the limit, some reflect and some reach a plane."""

    def __init__(self, energy_dim: int, num_layers: int, residual_energy: bool, noisy: bool) -> None:
        self.neuron = SimpleNeuron(energy_dim, 4).double()
        self.carrier = EnergyCarrier(4, energy_dim, 5, num_layers).double()
        fill_parameters(self.neuron, seed=1, displacement=1.0)
        fill_parameters(self.carrier, seed=1, displacement=1.5)
        self.position = uniform(2, 4, 3, low=-0.9, high=0.9).requires_grad_()
        self.energy = uniform(2, 4, energy_dim).requires_grad_()
        self.hidden = tuple(uniform(2, 4, 5).requires_grad_() for _ in range(num_layers))
        self.active = torch.arange(8).view(2, 4) % 4 != 1
        self.noise = 0.2 * torch.randn(2, 4, 3, dtype=DTYPE) if noisy else None
        self.rule = MoveRule(torch.tensor(0.9, dtype=DTYPE), torch.tensor(0.6, dtype=DTYPE), residual_energy)

    def leaves(self) -> list[Tensor]:
        return [self.position, self.energy, *self.hidden, *self.neuron.parameters(), *self.carrier.parameters()]

    def run(self, *_: Tensor) -> tuple[Tensor, ...]:
        """Position, energy and hidden states after the step. `gradcheck` changes `leaves` in place."""
        result, hidden = self.result()
        return result.position, result.energy, *hidden

    def result(self) -> tuple[StepResult, tuple[Tensor, ...]]:
        call = RolloutCall(None, torch.tensor(0), self.rule, noisy=False, keep_paths=False)
        stepper = AutogradStepper(self.neuron, self.carrier, call)
        stepper._hidden = self.hidden
        result = stepper.step(FlowState(self.position, self.energy), self.active, self.noise)
        assert stepper._hidden is not None
        return result, stepper._hidden

    @torch.no_grad()
    def check_events(self) -> None:
        """All branches are taken, none within the margin of its threshold."""
        result, _ = self.result()
        limit = self.rule.max_displacement
        wish = self.rule.scale * result.decision[..., -3:]
        moved = self.position + wish.clamp(-limit, limit) + (0 if self.noise is None else self.noise)
        for value, bound in ((wish, limit), (moved[..., 2], 1.0), (moved[..., :2], 1.0)):
            beyond = value[self.active].abs() > bound
            assert beyond.any()
            assert not beyond.all()
            assert (value.abs() - bound).abs().min() > SMALLEST_MARGIN
        assert torch.equal(result.reached, self.active & (moved[..., 2].abs() > 1))
        assert torch.equal(result.position[~self.active], self.position[~self.active])


@pytest.mark.parametrize(
    ("energy_dim", "num_layers", "residual_energy", "noisy"),
    [(1, 1, False, False), (2, 1, True, True), (3, 2, False, True)],
)
def test_flow_step(energy_dim: int, num_layers: int, residual_energy: bool, noisy: bool) -> None:
    """With respect to position, energy, hidden states and every parameter of neuron and carrier."""
    torch.manual_seed(0)
    step = Step(energy_dim, num_layers, residual_energy, noisy)
    step.check_events()
    assert gradcheck(step.run, step.leaves())


def some_landings(xy: Tensor, distance: Tensor, energy: Tensor) -> Landings:
    """Landings on both planes after different numbers of steps; every fourth slot has none."""
    batch, capacity = distance.shape
    slot = torch.arange(capacity).expand(batch, -1)
    landed = slot % 4 != 3
    return Landings(landed, landed & (slot % 2 == 0), xy, slot % 2, distance, slot % 5, energy)


@pytest.mark.parametrize("energy_dim", [1, 2])
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
@pytest.mark.parametrize(("width", "height"), [(4, 3), (2, 1)])
def test_collection(width: int, height: int, deposit: str, energy_dim: int) -> None:
    """From landings to the surface: places, distances and energies."""
    torch.manual_seed(1)
    changes = {"width": width, "height": height, "deposit": deposit}
    lattice = Case(changes, {"energy_dim": energy_dim}).processor().lattice
    leaves = [uniform(2, 9, 2), uniform(2, 9, low=0.05), uniform(2, 9, energy_dim)]

    def surface(xy: Tensor, distance: Tensor, energy: Tensor) -> Tensor:
        return lattice.collect_completed_flows_surface_direct(some_landings(xy, distance, energy))

    landings = some_landings(*leaves)
    mass = lattice.aggregate(lattice.collect(landings), batch=2)[1]
    if deposit == "bilinear":
        assert away_from_cells(landings.xy, width, height)
        assert (mass - 1).abs().min() > SMALLEST_MARGIN, "the missing share has a kink at 1"
        assert (mass > 1).any()
        assert width == 2 or ((mass > 0) & (mass < 1)).any()
    assert landings.energy.norm(dim=-1).min() > SMALLEST_MARGIN
    for leaf in leaves:
        leaf.requires_grad_()
    assert gradcheck(surface, leaves)


def test_the_collection_depends_on_landings_alone() -> None:
    """Every landing gets a gradient for place, distance and energy; slots without a landing get none."""
    lattice = Case({"width": 4, "height": 3}, {"energy_dim": 2}).processor().lattice
    leaves = [leaf.requires_grad_() for leaf in (uniform(2, 9, 2), uniform(2, 9, low=0.05), uniform(2, 9, 2))]
    landings = some_landings(*leaves)
    surface = lattice.collect_completed_flows_surface_direct(landings)
    for gradient in torch.autograd.grad((surface * torch.randn_like(surface)).sum(), leaves):
        nonzero = (gradient != 0).view(2, 9, -1)
        assert torch.equal(nonzero.all(-1), landings.landed)
        assert torch.equal(nonzero.any(-1), landings.landed)


def assert_gradients_agree(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def autograd(outputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, cotangents)


def like(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(value) for value in values)


def test_fold_slope() -> None:
    value = torch.cat([uniform(200, low=-9, high=9), torch.tensor([-1.0, 1.0, 0.0], dtype=DTYPE)]).requires_grad_()
    (expected,) = torch.autograd.grad(fold(value).sum(), value)
    assert torch.equal(fold_slope(value.detach()), expected)
    assert {-1.0, 1.0} == set(expected.tolist())


@pytest.mark.parametrize("residual_energy", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_move_backward(residual_energy: bool, noisy: bool) -> None:
    num_flows = 60
    position = uniform(num_flows, 3).requires_grad_()
    energy, decision = uniform(num_flows, 2).requires_grad_(), uniform(num_flows, 5, low=-3, high=3).requires_grad_()
    with torch.no_grad():
        decision[0, 2:] = 0.8  # times the scale just the limit
    active = torch.rand(num_flows) > 0.2
    active[0] = True
    noise = 0.2 * torch.randn(num_flows, 3, dtype=DTYPE) if noisy else None
    rule = MoveRule(torch.tensor(0.5, dtype=DTYPE), torch.tensor(0.4, dtype=DTYPE), residual_energy)
    after, next_energy, length, reached = move(position, energy, active, decision, noise, *rule)
    assert not length.requires_grad
    assert reached.any()
    grad_position, grad_energy = like(after, next_energy)
    expected = autograd((after, next_energy), (grad_position, grad_energy), [position, energy, decision])
    with torch.no_grad():
        actual = move_backward(position, next_energy, active, decision, noise, *rule, grad_position, grad_energy)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    assert (actual[2][reached, 4] == 0).all(), "on a plane z is what it is"
    assert (actual[2][0, 2:4] != 0).all(), "at the limit itself there is a slope"
    assert (actual[2][~active] == 0).all()


def test_neuron_features_backward() -> None:
    neuron = SimpleNeuron(2, 6).double()
    position, energy = uniform(30, 3).requires_grad_(), uniform(30, 2).requires_grad_()
    weight1, bias1, weight2, bias2 = neuron.network.parameters()
    features = neuron_features(position, energy, weight1, bias1, weight2, bias2)
    (grad_features,) = like(features)
    expected = autograd((features,), (grad_features,), [position, energy, weight1, bias1, weight2, bias2])
    with torch.no_grad():
        actual = neuron_features_backward(position, energy, weight1, bias1, weight2, grad_features)
    assert_gradients_agree(actual, expected)


def test_scatter_to_parents() -> None:
    born = torch.rand(3, 8) > 0.5
    births = Births(born, torch.randint(0, 4, (3, 8)))
    own, parents = uniform(3, 8, 2).requires_grad_(), uniform(3, 8, 2).requires_grad_()
    gathered = births.gather_from_parents(own, parents)
    (cotangent,) = like(gathered)
    expected = autograd((gathered,), (cotangent,), [own, parents])
    assert_gradients_agree(births.scatter_to_parents(cotangent), expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("empty", [False, True])
def test_a_layer_of_the_tape(padding: int, empty: bool) -> None:
    """Products, gates and backward through both, against PyTorch's own cell."""
    num_rows, inputs, size = 11, 5, 4
    cell = nn.GRUCell(inputs, size).double()
    layer_input, hidden = uniform(num_rows, inputs).requires_grad_(), uniform(num_rows, size)
    hidden = (hidden * (not empty)).requires_grad_()
    next_hidden = cell(layer_input, hidden)
    (grad_next,) = like(next_hidden)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    expected_input, expected_hidden, *expected_weights = autograd(
        (next_hidden,), (grad_next,), [layer_input, hidden, *weights]
    )
    with torch.no_grad():
        layer = PackedLayer.pack(cell, inputs + padding, DTYPE)
        xh = torch.cat([nn.functional.pad(layer_input, (0, padding)), hidden], dim=1)
        gates, out = torch.full((num_rows, 4 * size), torch.nan, dtype=DTYPE), torch.empty_like(hidden)
        layer.products(xh, gates, empty)
        gates_forward(gates, hidden, layer.bias, out)
        assert_gradients_agree((out,), (next_hidden,))
        sums = LayerGradients(layer)
        grad_gates, grad_hidden = gates_backward(gates, hidden, grad_next.clone(), layer.bias, sums.bias)
        layer.add_hidden_gradient(grad_gates, grad_hidden)
        sums.add(grad_gates, xh, num_rows if empty else 0)
        grad_input = layer.input_gradient(grad_gates)
        below = torch.ones_like(grad_input)
        layer.add_input_gradient(grad_gates, below)
        torch.testing.assert_close(below, grad_input + 1)
        assert (grad_input[:, inputs:] == 0).all()
        assert_gradients_agree((grad_input[:, :inputs], grad_hidden), (expected_input, expected_hidden))
        for found, wanted in zip(sums.unpack(inputs, DTYPE), expected_weights, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_weight_gradients_add_up() -> None:
    """Row by row, in parts, with rows at the start whose hidden state is 0."""
    cell = nn.GRUCell(5, 4).double()
    layer, xh, gates = PackedLayer.pack(cell, 8, DTYPE), uniform(9, 12), uniform(9, 16)
    xh[:3, 8:] = 0
    whole, parts = LayerGradients(layer), LayerGradients(layer)
    whole.add(gates, xh, 3)
    parts.add(gates[:5], xh[:5], 0)
    parts.add(gates[5:], xh[5:], 0)
    assert_gradients_agree(parts.unpack(5, DTYPE)[:2], whole.unpack(5, DTYPE)[:2])
