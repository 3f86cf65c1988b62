"""Aggregations against the reference, and what they keep: totals, hulls, empty cells."""

from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from energy_flow.core.aggregation import MeanAggregation, SoftmaxAggregation, SumAggregation
from energy_flow.core.geometry import Deposit, deposit_cells
from energy_flow.ops.group_softmax import group_softmax_deposit
from tests.helpers import assert_near
from tests.reference_flows import Margins, number
from tests.reference_parts import aggregate

DTYPE = torch.float64
KINDS = [SoftmaxAggregation, MeanAggregation, SumAggregation]
every_kind = pytest.mark.parametrize("kind", KINDS)
INSIDE = st.floats(-1, 1, allow_nan=False)


def members(num: int = 12, num_keys: int = 4, groups: int = 5, energy_dim: int = 2) -> tuple[Tensor, ...]:
    """Scores, values, keys and weights. The last group has no members, and every fifth member no weight."""
    weights = torch.rand(num, num_keys, dtype=DTYPE)
    weights = 0.9 * weights / num_keys**0.5 * (torch.arange(num) % 5 != 4)[:, None]
    keys = torch.randint(0, groups - 1, (num, num_keys))
    return torch.randn(num, dtype=DTYPE), torch.randn(num, energy_dim, dtype=DTYPE), keys, weights


def reference(
    kind: Any, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    energies, masses = [], []
    for group in range(groups):
        own = [
            (weights[n, k], scores[n], values[n])
            for n in range(keys.shape[0])
            for k in range(keys.shape[1])
            if keys[n, k] == group
        ]
        energies.append(aggregate(kind(), own, Margins()) if own else torch.zeros_like(values[0]))
        masses.append(number(sum(weight for weight, _, _ in own)))
    return torch.stack(energies), torch.tensor(masses, dtype=DTYPE)


@every_kind
@pytest.mark.parametrize("num_keys", [1, 4])
@pytest.mark.parametrize("bound", [None, 50.0])
def test_equals_the_reference(kind: Any, num_keys: int, bound: float | None) -> None:
    scores, values, keys, weights = members(num_keys=num_keys, groups=9)
    leaves = [scores.requires_grad_(), values.requires_grad_(), weights.requires_grad_()]
    actual, mass = kind()(scores, values, keys, weights, 9, bound)
    expected, expected_mass = reference(kind, scores, values, keys, weights, 9)
    assert ((mass > 0) & (mass < 1)).any(), "the missing share counts in some groups"
    assert_near(actual, expected, 1e-14, "energies")
    assert_near(mass, expected_mass, 1e-14, "mass")
    assert not mass.requires_grad
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(actual, leaves, cotangent, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, leaves, cotangent, allow_unused=True, materialize_grads=True)
    for name, one, other in zip(("scores", "values", "weights"), found, wanted, strict=True):
        assert (other != 0).any() == (name != "scores" or kind is SoftmaxAggregation)
        assert_near(one, other, 1e-13, f"gradient of {name}")


@every_kind
def test_gradcheck(kind: Any) -> None:
    scores, values, keys, weights = members(num=4, groups=3)
    mass = kind()(scores, values, keys, weights, 3, None)[1]
    assert (mass - 1).abs().min() > 1e-3, "at a mass of 1 the empty share has a kink"
    leaves = [scores.requires_grad_(), values.requires_grad_(), weights.requires_grad_()]
    assert gradcheck(lambda s, v, w: kind()(s, v, keys, w, 3, None)[0], leaves)


def test_softmax_is_the_operation_itself() -> None:
    case = members()
    for bound in (None, 20.0):
        actual = SoftmaxAggregation()(*case, 5, bound)
        expected = group_softmax_deposit(*case, 5, bound=bound)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@every_kind
def test_mass_is_the_sum_of_weights(kind: Any) -> None:
    case = members()
    _, mass = kind()(*case, 5, None)
    expected = torch.zeros(5, dtype=DTYPE).index_add(0, case[2].flatten(), case[3].flatten())
    assert_near(mass, expected, 1e-14, "mass")


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_and_deterministic_algorithms(kind: Any, dtype: torch.dtype) -> None:
    scores, values, keys, weights = members()
    expected, _ = kind()(scores, values, keys, weights, 5, None)
    scores, values, weights = (tensor.to(dtype) for tensor in (scores, values, weights))
    torch.use_deterministic_algorithms(True)
    try:
        energies, mass = kind()(scores, values.requires_grad_(), keys, weights, 5, None)
        energies.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert energies.dtype == mass.dtype == dtype
    assert_near(energies, expected, 1e-5, "energies")


@every_kind
def test_no_parameters(kind: Any) -> None:
    assert not kind().state_dict()


@st.composite
def landings(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Energies [N, E], keys and weights [N, K] of landings anywhere on the planes of two samples, and the groups."""
    width, height, energy_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    deposit: Deposit = draw(st.sampled_from(["nearest", "bilinear"]))
    points = draw(st.lists(st.tuples(INSIDE, INSIDE, st.integers(0, 1)), min_size=1, max_size=12))
    energies = draw(st.lists(st.floats(-10, 10), min_size=len(points) * energy_dim, max_size=len(points) * energy_dim))
    xy = torch.tensor([point[:2] for point in points], dtype=DTYPE)
    sample = torch.tensor([point[2] for point in points])
    cells, weights = deposit_cells(xy, width, height, deposit)
    keys = cells + sample[:, None] * width * height
    event(f"{deposit}, several landings in a group: {len(keys.flatten().unique()) < keys.numel()}")
    return torch.tensor(energies, dtype=DTYPE).view(len(points), energy_dim), keys, weights, 2 * width * height


@given(landings())
def test_the_sum_conserves_energy(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    """In every sample, the cells of the output surface have together the energy of all landings."""
    values, keys, weights, groups = case
    energies, mass = SumAggregation()(torch.zeros(len(values), dtype=DTYPE), values, keys, weights, groups, None)
    own = keys[:, 0] < groups // 2
    for half, landed in ((energies[: groups // 2], own), (energies[groups // 2 :], ~own)):
        assert_near(half.sum(0), values[landed].sum(0), 1e-13, "total energy")
    assert_near(mass.sum(), torch.tensor(float(len(values)), dtype=DTYPE), 1e-14, "mass")


@given(landings(), st.floats(-1e3, 1e3))
def test_the_mean_stays_in_the_hull(case: tuple[Tensor, Tensor, Tensor, int], score: float) -> None:
    """Between the smallest and the largest energy of a cell's landings and of its empty share, whatever the scores."""
    values, keys, weights, groups = case
    scores = torch.linspace(0, score, len(values), dtype=DTYPE)
    energies, mass = MeanAggregation()(scores, values, keys, weights, groups, None)
    for group in range(groups):
        own = values[((keys == group) & (weights > 0)).any(1)]
        bounds = own if mass[group] >= 1 else torch.cat([own, torch.zeros_like(values[:1])])
        assert (energies[group] >= bounds.amin(0) - 1e-13).all()
        assert (energies[group] <= bounds.amax(0) + 1e-13).all()


@every_kind
@given(case=landings())
def test_cells_without_a_landing_are_empty(kind: Any, case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    values, keys, weights, groups = case
    energies, mass = kind()(torch.ones(len(values), dtype=DTYPE), values, keys, weights, groups, None)
    hit = torch.zeros(groups, dtype=torch.bool)
    hit[keys[weights > 0]] = True
    assert (energies[~hit] == 0).all()
    assert (mass[~hit] == 0).all()
    assert (mass[hit] > 0).all()
