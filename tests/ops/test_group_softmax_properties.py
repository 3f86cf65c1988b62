"""Properties of the group softmax, with examples from hypothesis."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from energy_flow.ops.group_softmax import group_softmax_deposit

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}  # rounding of sums of up to 40 shares
SCORES = st.one_of(st.sampled_from([0.0, 1e4, -1e4]), st.floats(-5, 5), st.floats(-1e4, 1e4))
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-6, 1.0))


class Members(NamedTuple):
    scores: Tensor  # [N]
    values: Tensor  # [N, E]
    keys: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    num_groups: int

    def deposit(self) -> tuple[Tensor, Tensor]:
        return group_softmax_deposit(*self)

    def shares(self) -> tuple[Tensor, Tensor]:
        """The share of every member in each group, [G, N], and the mass [G]. They are deposits of unit vectors."""
        return self._replace(values=torch.eye(len(self.scores), dtype=self.values.dtype)).deposit()

    @property
    def belongs(self) -> Tensor:
        """Whether a member has a weight in a group, bool [G, N]."""
        groups = torch.arange(self.num_groups)[:, None, None]
        return ((self.keys == groups) & (self.weights > 0)).any(-1)


@st.composite
def members(draw: st.DrawFn, min_size: int = 0) -> Members:
    """Any members, with weights up to 1. The last group has no members."""
    num, num_keys = draw(st.integers(min_size, 10)), draw(st.sampled_from([1, 4]))
    num_groups, energy_dim = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(list(TOLERANCE)))

    def tensor(elements: st.SearchStrategy, *shape: int) -> Tensor:
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(elements, min_size=size, max_size=size)), dtype=dtype).view(shape)

    return Members(
        scores=tensor(SCORES, num),
        values=tensor(st.floats(-10, 10), num, energy_dim),
        keys=tensor(st.integers(0, num_groups - 2), num, num_keys).long(),
        weights=tensor(WEIGHTS, num, num_keys),
        num_groups=num_groups,
    )


def assert_close(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=size * TOLERANCE[actual.dtype])


@given(members(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_order_of_members_does_not_matter(case: Members, random: Any) -> None:
    order = list(range(len(case.scores)))
    random.shuffle(order)
    permuted = Members(*(tensor[order] for tensor in case[:4]), case.num_groups)
    for actual, expected in zip(permuted.deposit(), case.deposit(), strict=True):
        assert_close(actual, expected, size=10)


@given(members(), st.floats(-10, 10))
@settings(max_examples=60)
def test_a_constant_stays_constant_in_whole_groups(case: Members, constant: float) -> None:
    actual, mass = case._replace(values=torch.full_like(case.values, constant)).deposit()
    whole = mass >= 1
    event(f"whole groups: {bool(whole.any())}")
    assert_close(actual[whole], torch.full_like(actual[whole], constant), size=10)


@given(members())
@settings(max_examples=60)
def test_shares_sum_to_one(case: Members) -> None:
    """A member with a weight has a share. The empty member has the rest, which is 0 if the weights sum to 1 or more."""
    shares, mass = case.shares()
    assert (shares >= 0).all()
    assert (shares[~case.belongs] == 0).all()
    total, whole = shares.sum(1), mass >= 1
    assert_close(total[whole], torch.ones_like(total[whole]))
    assert (total <= 1 + TOLERANCE[total.dtype]).all()
    assert (total[mass == 0] == 0).all()


@given(members(min_size=1))
@settings(max_examples=60)
def test_the_result_is_inside_the_convex_hull_of_the_members_and_0(case: Members) -> None:
    """If the weights sum to 1 or more, the hull is without 0."""
    actual, mass = case.deposit()
    shares, _ = case.shares()  # >= 0 with a sum of at most 1, so their product with the values is in the hull
    assert_close(actual, shares @ case.values, size=10)
    others = ~case.belongs[..., None]
    low = case.values.masked_fill(others, torch.inf).amin(1)
    high = case.values.masked_fill(others, -torch.inf).amax(1)
    thin = (mass < 1)[:, None]
    low, high = torch.where(thin, low.clamp(max=0), low), torch.where(thin, high.clamp(min=0), high)
    rounding = 10 * TOLERANCE[actual.dtype]
    assert ((low - rounding <= actual) & (actual <= high + rounding)).all()


@given(members())
def test_groups_without_members_are_zero(case: Members) -> None:
    actual, mass = case.deposit()
    empty = ~case.belongs.any(1)
    assert empty[-1]
    assert torch.equal(actual[empty], torch.zeros_like(actual[empty]))
    assert torch.equal(mass[empty], torch.zeros_like(mass[empty]))
    assert (mass[~empty] > 0).all()


@given(SCORES, st.floats(1e-6, 1.0), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60)
def test_a_single_member_shares_with_the_empty_one(score: float, weight: float, dtype: torch.dtype) -> None:
    """The share is w exp(s) / (w exp(s) + 1 - w), written without overflow; it is 1 if w = 1."""
    scores, weights = torch.tensor([score], dtype=dtype), torch.tensor([[weight]], dtype=dtype)
    shares, mass = Members(scores, torch.ones(1, 1, dtype=dtype), torch.tensor([[1]]), weights, 2).deposit()
    weight, score = float(weights), float(scores)
    expected = 1.0 if weight == 1 else 1 / (1 + (1 - weight) / weight * math.exp(min(-score, 700.0)))
    assert_close(shares, torch.tensor([[0.0], [expected]], dtype=dtype))
    assert torch.equal(mass, torch.tensor([0.0, weight], dtype=dtype))


@given(members(min_size=1))
def test_gradients_are_finite(case: Members) -> None:
    leaves = [tensor.requires_grad_() for tensor in (case.scores, case.values, case.weights)]
    surface, _ = case.deposit()
    for gradient in torch.autograd.grad(surface.sum(), leaves):
        assert torch.isfinite(gradient).all()


def crowd(num: int = 1000) -> Members:
    """Members of one group. They are too many for a sum of weights in bfloat16, where 256 + 1 = 256."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.rand(num, generator=generator), torch.randn(num, 2, generator=generator)
    return Members(scores, values, torch.zeros(num, 1, dtype=torch.int64), torch.ones(num, 1), 2)


def test_autocast_changes_nothing() -> None:
    """The lattice passes at least float32, also under autocast, and the operation must not round it."""
    case = crowd()
    expected, expected_mass = case.deposit()
    with torch.autocast("cpu", torch.bfloat16):
        actual, mass = case.deposit()
    assert torch.equal(actual, expected)
    assert torch.equal(mass, expected_mass)
    assert float(mass[0]) == 1000


def test_inputs_rounded_to_bfloat16_give_nearly_equal_results() -> None:
    """Inputs rounded to bfloat16 have an error of 2^-9, and the sums add no larger one."""
    case = crowd()
    rounded = case._replace(values=case.values.bfloat16().float(), scores=case.scores.bfloat16().float())
    actual, expected = rounded.deposit()[0], case.deposit()[0]
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "which", [("values",), ("weights",), ("values", "weights"), ("scores", "values", "weights")], ids="+".join
)
def test_half_precision_is_refused(which: tuple[str, ...], dtype: torch.dtype) -> None:
    """In bfloat16 the weights of 1,000 members would sum to 256, and the average of a constant 0.7 would be 2.7."""
    case = crowd()
    halved = case._replace(**{name: getattr(case, name).to(dtype) for name in which})
    with pytest.raises(TypeError, match=f"float32.*{dtype}|{dtype}.*float32"):
        halved.deposit()
