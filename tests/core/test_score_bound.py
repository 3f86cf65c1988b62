"""The bound on all scores: where it is small enough, the aggregation skips its maximum."""

import math

import pytest
import torch
from torch import nn

from energy_flow.core import energy_lattice
from energy_flow.core.energy_lattice import EnergyLattice, Landings, landing_score
from tests.helpers import Case


def lattice(energy_dim: int, max_steps: int, bounded_energy: bool) -> EnergyLattice:
    settings = Case({"width": 4, "height": 3, "max_steps": max_steps}).processor().lattice.settings
    return EnergyLattice(settings, energy_dim, nn.Identity(), bounded_energy)


def landings(energy_dim: int, steps: int) -> Landings:
    """One sample of 12 flows. The first has the largest possible score."""
    energy = torch.rand(1, 12, energy_dim, dtype=torch.float64) * 2 - 1
    energy[0, 0] = 1
    distance = torch.rand(1, 12, dtype=torch.float64)
    distance[0, 0] = 0
    landed = torch.ones(1, 12, dtype=torch.bool)
    xy = torch.rand(1, 12, 2, dtype=torch.float64) * 2 - 1
    slots = torch.zeros(1, 12, dtype=torch.int64)
    return Landings(
        landed=landed, projected=~landed, xy=xy, plane=slots, distance=distance, steps=slots + steps, energy=energy
    )


def test_the_score_is_the_formula() -> None:
    assert landing_score(0.8, 0.25, 4.0) == pytest.approx(0.8 / 1.25 * 1.4)
    some = landings(3, 4)
    expected = some.energy.square().sum(-1).sqrt() / (1 + some.distance) * (1 + 0.1 * some.steps.double())
    torch.testing.assert_close(some.score, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("per_step", [0.1, 0.7])
@pytest.mark.parametrize(("energy_dim", "steps"), [(1, 1), (1, 20), (4, 5)])
def test_no_score_is_above_the_bound_and_one_reaches_it(
    energy_dim: int, steps: int, per_step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with another constant: scores and bound use the same one."""
    monkeypatch.setattr(energy_lattice, "SCORE_PER_STEP", per_step)
    bound = lattice(energy_dim, steps, bounded_energy=True).score_bound
    score = landings(energy_dim, steps).score
    assert bound == pytest.approx(math.sqrt(energy_dim) * (1 + per_step * steps))
    assert bound == pytest.approx(float(score.max()))
    assert int(score.argmax()) == 0


def test_residual_energy_and_rollouts_without_a_step_have_no_bound() -> None:
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
