"""Gradients against central differences (float64): the reflection, the deposit, one step, the collection.

Inputs keep a distance from kinks, where a function has no derivative to compare with.
"""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.energy_lattice import Landings
from energy_flow.core.flow_step import StepResult, flow_step
from energy_flow.core.geometry import deposit_cells, fold
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.core.tensorized_flow_storage import FlowState
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
        self.carrier = EnergyCarrier(4, energy_dim, 5, num_layers, residual_energy).double()
        fill_parameters(self.neuron, seed=1, displacement=1.0)
        fill_parameters(self.carrier, seed=1, displacement=1.5)
        self.state = FlowState(
            position=uniform(2, 4, 3, low=-0.9, high=0.9).requires_grad_(),
            energy=uniform(2, 4, energy_dim).requires_grad_(),
            hidden=tuple(uniform(2, 4, 5).requires_grad_() for _ in range(num_layers)),
        )
        self.noise = 0.2 * torch.randn(2, 4, 3, dtype=DTYPE) if noisy else None
        self.scale = torch.tensor(0.9, dtype=DTYPE)
        self.limit = 0.6

    def leaves(self) -> list[Tensor]:
        state = [self.state.position, self.state.energy, *self.state.hidden]
        return [*state, *self.neuron.parameters(), *self.carrier.parameters()]

    def run(self, *_: Tensor) -> tuple[Tensor, ...]:
        """Position, energy and memory after the step; it reads `leaves`, which are changed in place."""
        state = self.result().state
        return state.position, state.energy, *state.hidden

    def result(self) -> StepResult:
        return flow_step(self.neuron, self.carrier, self.state, self.scale, self.limit, self.noise)

    @torch.no_grad()
    def check_events(self) -> None:
        """All branches are taken, none within the margin of its threshold."""
        features = self.neuron(self.state.position, self.state.energy)
        wish = self.scale * self.carrier(features, self.state.energy, self.state.hidden)[1]
        moved = self.state.position + wish.clamp(-self.limit, self.limit) + (0 if self.noise is None else self.noise)
        for value, limit in ((wish, self.limit), (moved[..., 2], 1.0), (moved[..., :2], 1.0)):
            beyond = value.abs() > limit
            assert beyond.any()
            assert not beyond.all()
            assert (value.abs() - limit).abs().min() > SMALLEST_MARGIN
        assert torch.equal(self.result().reached, moved[..., 2].abs() > 1)


@pytest.mark.parametrize(
    ("energy_dim", "num_layers", "residual_energy", "noisy"),
    [(1, 1, False, False), (2, 1, True, True), (3, 2, False, True)],
)
def test_flow_step(energy_dim: int, num_layers: int, residual_energy: bool, noisy: bool) -> None:
    """With respect to position, energy, memory and every parameter of neuron and carrier."""
    torch.manual_seed(0)
    step = Step(energy_dim, num_layers, residual_energy, noisy)
    step.check_events()
    assert gradcheck(step.run, step.leaves())


def some_landings(xy: Tensor, distance: Tensor, energy: Tensor) -> Landings:
    """Landings on both planes after different numbers of steps; every fourth slot didn't land."""
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


def test_what_the_collection_depends_on() -> None:
    """Every landing learns its place, its distance and its energy; what didn't land learns nothing."""
    lattice = Case({"width": 4, "height": 3}, {"energy_dim": 2}).processor().lattice
    leaves = [leaf.requires_grad_() for leaf in (uniform(2, 9, 2), uniform(2, 9, low=0.05), uniform(2, 9, 2))]
    landings = some_landings(*leaves)
    surface = lattice.collect_completed_flows_surface_direct(landings)
    for gradient in torch.autograd.grad((surface * torch.randn_like(surface)).sum(), leaves):
        nonzero = (gradient != 0).view(2, 9, -1)
        assert torch.equal(nonzero.all(-1), landings.landed)
        assert torch.equal(nonzero.any(-1), landings.landed)
