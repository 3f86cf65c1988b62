"""What is known of scores before a rollout: the aggregation leaves out its maximum on the strength of it."""

import pytest
import torch
from torch import nn

from energy_flow.core.energy_lattice import EnergyLattice, Landings
from tests.helpers import Case


def lattice(energy_dim: int, max_steps: int, bounded_energy: bool) -> EnergyLattice:
    settings = Case({"width": 4, "height": 3, "max_steps": max_steps}).processor().lattice.settings
    return EnergyLattice(settings, energy_dim, nn.Identity(), bounded_energy)


def landings(energy_dim: int, steps: int) -> Landings:
    """One sample of 12 flows: the first with the largest score that there can be."""
    energy = torch.rand(1, 12, energy_dim, dtype=torch.float64) * 2 - 1
    energy[0, 0] = 1
    distance = torch.rand(1, 12, dtype=torch.float64)
    distance[0, 0] = 0
    landed = torch.ones(1, 12, dtype=torch.bool)
    xy = torch.rand(1, 12, 2, dtype=torch.float64) * 2 - 1
    slots = torch.zeros(1, 12, dtype=torch.int64)
    return Landings(landed, ~landed, xy, slots, distance, slots + steps, energy)


@pytest.mark.parametrize(("energy_dim", "steps"), [(1, 1), (1, 20), (4, 5)])
def test_no_score_is_above_the_bound_and_one_reaches_it(energy_dim: int, steps: int) -> None:
    bound = lattice(energy_dim, steps, bounded_energy=True).score_bound
    assert bound == pytest.approx(float(landings(energy_dim, steps).score.max()))


def test_nothing_is_known_of_residual_energy_or_without_a_step() -> None:
    assert lattice(1, 5, bounded_energy=False).score_bound is None
    assert lattice(1, 0, bounded_energy=True).score_bound is None


def test_the_bound_changes_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    some, surfaces, bounds = landings(2, 5), [], []
    for bounded_energy in (False, True):
        case = lattice(2, 5, bounded_energy)
        bounds.append(case.score_bound)
        surfaces.append(case.aggregate(case.collect(some), batch=1)[0])
    assert bounds[0] is None
    assert bounds[1] is not None
    torch.testing.assert_close(surfaces[0], surfaces[1], rtol=0, atol=1e-13)
