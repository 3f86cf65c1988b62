"""The weighted softmax average per group against a loop over groups."""

import math

import pytest
import torch
from torch import Tensor

from energy_flow.ops.group_softmax import group_softmax_deposit


def reference(scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """sum(w exp(s) v) / (sum(w exp(s)) + max(0, 1 - sum w)), in a loop over groups."""
    groups, masses = [], []
    for group in range(num_groups):
        members = [(n, k) for n in range(keys.shape[0]) for k in range(keys.shape[1]) if int(keys[n, k]) == group]
        mass = sum((weights[n, k] for n, k in members), torch.zeros((), dtype=scores.dtype))
        masses.append(mass)
        if not members:
            groups.append(torch.zeros_like(values[0]))
            continue
        numerator = sum(weights[n, k] * scores[n].exp() * values[n] for n, k in members)
        denominator = sum(weights[n, k] * scores[n].exp() for n, k in members) + (1 - mass).clamp(min=0)
        groups.append(numerator / denominator)
    return torch.stack(groups), torch.stack(masses)


def landings(seed: int, num: int = 12, shares: int = 4, num_groups: int = 6, energy_dim: int = 2) -> list[Tensor]:
    """Scores, values, keys and weights. Keys of a row differ; its weights sum to 1; the last group is empty."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num, generator=generator, dtype=torch.float64) * 3
    values = torch.randn(num, energy_dim, generator=generator, dtype=torch.float64)
    keys = torch.rand(num, num_groups - 1, generator=generator).argsort(dim=1)[:, :shares]
    weights = torch.rand(num, shares, generator=generator, dtype=torch.float64)
    return [scores, values, keys, weights / weights.sum(dim=1, keepdim=True)]


@pytest.mark.parametrize("bound", [None, 5.0])
def test_second_derivatives(bound: float | None) -> None:
    """In float64, with a maximum per group and with a fixed shift."""
    scores, values, keys, weights = landings(3, num=4)
    inputs = [scores.requires_grad_(), values.requires_grad_(), (0.9 * weights).requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda s, v, w: group_softmax_deposit(s, v, keys, w, 6, bound=bound)[0], inputs)


@pytest.mark.parametrize("num", [1, 3, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_formula(num: int, seed: int) -> None:
    scores, values, keys, weights = landings(seed, num)
    weights[0, 1] = 0.0
    leaves = [leaf.requires_grad_() for leaf in (scores, values, weights)]
    actual, mass = group_softmax_deposit(scores, values, keys, weights, 6)
    expected, expected_mass = reference(scores, values, keys, weights, 6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(mass, expected_mass, rtol=0, atol=1e-13)
    cotangent = torch.randn(actual.shape, dtype=torch.float64)
    actual_grads = torch.autograd.grad((actual * cotangent).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for a, b in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_groups_with_and_without_a_missing_share_are_tested() -> None:
    masses = []
    for num in (1, 3, 12):
        scores, values, keys, weights = landings(0, num)
        masses.append(group_softmax_deposit(scores, values, keys, weights, 6)[1])
    assert all(mass[5] == 0 for mass in masses)
    mass = torch.cat(masses)
    assert ((mass > 0) & (mass < 1)).any()
    assert (mass > 1).any()


@pytest.mark.parametrize("num", [2, 7])
def test_gradcheck(num: int) -> None:
    scores, values, keys, weights = landings(3, num)
    inputs = [scores.requires_grad_(), values.requires_grad_(), weights.requires_grad_()]
    assert torch.autograd.gradcheck(lambda s, v, w: group_softmax_deposit(s, v, keys, w, 6)[0], inputs)


def test_empty_groups_are_zero() -> None:
    scores, values, keys, weights = landings(0, 2)
    actual, mass = group_softmax_deposit(scores, values, keys + 3, weights, 40)
    assert torch.equal(actual[:3], torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(actual[9:], torch.zeros(31, 2, dtype=torch.float64))
    assert torch.equal(mass[9:], torch.zeros(31, dtype=torch.float64))


def test_no_members() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    actual, mass = group_softmax_deposit(none, none.view(0, 2), none.view(0, 4).long(), none.view(0, 4), 3)
    assert torch.equal(actual, torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(mass, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("score", [0.0, 1.0, 500.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_whole_member_gives_its_value(score: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([score], dtype=dtype, requires_grad=True)
    values = torch.tensor([[0.3, -2.0]], dtype=dtype, requires_grad=True)
    actual, _ = group_softmax_deposit(scores, values, torch.tensor([[1]]), torch.ones(1, 1, dtype=dtype), 2)
    assert torch.equal(actual, torch.tensor([[0.0, 0.0], [0.3, -2.0]], dtype=dtype))
    grad_scores, grad_values = torch.autograd.grad(
        (actual * torch.tensor([[5.0, 7.0], [2.0, 3.0]])).sum(), (scores, values)
    )
    assert torch.equal(grad_scores, torch.zeros_like(grad_scores))
    assert torch.equal(grad_values, torch.tensor([[2.0, 3.0]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("scores", "weights", "expected"),
    [
        # Two members with values 1 and 3; the expected numbers are computed by hand.
        ([1e4, -1e4], [1.0, 1.0], 1.0),
        ([1e4, 1e4], [1.0, 1.0], 2.0),
        ([-1e4, -1e4], [1.0, 1.0], 2.0),
        ([1e4, 1e4 - math.log(3)], [0.5, 0.5], 1.5),
        ([1e4, 1e4], [0.1, 0.3], 2.5),  # the empty member (weight 0.6, score 0) is negligible beside e^10000
        ([-1e4, -1e4], [0.1, 0.3], 0.0),  # the empty member dominates e^-10000
        ([0.0, 1e4], [1.0, 0.0], 1.0),  # weight 0 is not a member, even with a huge score
    ],
)
def test_extreme_scores(scores: list[float], weights: list[float], expected: float, dtype: torch.dtype) -> None:
    leaves = [
        torch.tensor(scores, dtype=dtype, requires_grad=True),
        torch.tensor([[1.0], [3.0]], dtype=dtype, requires_grad=True),
        torch.tensor(weights, dtype=dtype)[:, None].requires_grad_(),
    ]
    actual, _ = group_softmax_deposit(leaves[0], leaves[1], torch.zeros(2, 1, dtype=torch.int64), leaves[2], 1)
    # In float32, 10,000 - 9,998.9 is exact to 1e-3 only.
    torch.testing.assert_close(
        actual, torch.tensor([[expected]], dtype=dtype), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-12
    )
    for gradient in torch.autograd.grad(actual.sum(), leaves):
        assert torch.isfinite(gradient).all()


def test_order_of_landings_does_not_matter() -> None:
    scores, values, keys, weights = landings(4)
    order = torch.randperm(len(scores))
    expected, _ = group_softmax_deposit(scores, values, keys, weights, 6)
    actual, _ = group_softmax_deposit(scores[order], values[order], keys[order], weights[order], 6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_whole_weights_make_a_softmax_that_sums_to_one() -> None:
    scores, values, keys, weights = landings(5, 20, shares=1)
    same = torch.full_like(values, 0.7)
    actual, mass = group_softmax_deposit(scores, same, keys, torch.ones_like(weights), 6)
    hit = mass > 0
    assert hit.any()
    assert not hit.all()
    torch.testing.assert_close(actual[hit], torch.full_like(actual[hit], 0.7), rtol=0, atol=1e-14)


def test_groups_are_independent() -> None:
    scores, values, keys, weights = landings(6)
    expected, _ = group_softmax_deposit(scores, values, keys, weights, 6)
    joined, _ = group_softmax_deposit(
        torch.cat([scores, scores + 50]),
        torch.cat([values, -values]),
        torch.cat([keys, keys + 6]),
        weights.repeat(2, 1),
        12,
    )
    torch.testing.assert_close(joined[:6], expected, rtol=0, atol=1e-14)


def test_float32_is_close_to_float64() -> None:
    scores, values, keys, weights = landings(7)
    expected, _ = group_softmax_deposit(scores, values, keys, weights, 6)
    actual, mass = group_softmax_deposit(scores.float(), values.float(), keys, weights.float(), 6)
    assert actual.dtype == mass.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_result_is_continuous_in_a_vanishing_weight() -> None:
    """The result goes to 0 with the weight, even if the landing is the only member."""
    scores, values = torch.tensor([2.0], dtype=torch.float64), torch.tensor([[5.0]], dtype=torch.float64)
    out = [
        float(
            group_softmax_deposit(scores, values, torch.tensor([[0]]), torch.tensor([[w]], dtype=torch.float64), 1)[0]
        )
        for w in (0.0, 1e-9, 1e-6)
    ]
    assert out[0] == 0.0
    assert out[1] == pytest.approx(5 * math.exp(2) * 1e-9, rel=1e-5)
    assert out[2] == pytest.approx(5 * math.exp(2) * 1e-6, rel=1e-4)
