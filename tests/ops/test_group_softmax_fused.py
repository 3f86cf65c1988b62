"""The fused group softmax against plain torch: each order of summation, with and without a maximum."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from energy_flow.ops import group_softmax
from energy_flow.ops.group_softmax import group_softmax_deposit
from tests.ops.group_softmax_reference import group_softmax_reference
from tests.ops.kernels import DEVICES

NUM_GROUPS = 40
# Numbers of members that give mostly empty and thin groups, mixed groups, and whole groups.
NUM_MEMBERS = [1, 25, 700]
HIGHEST = 3.0


@pytest.fixture(params=["direct", "sorted"])
def summation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The order of summation: direct, or sorted by keys as under deterministic algorithms."""
    if request.param == "sorted":
        monkeypatch.setattr(group_softmax, "_order_varies", lambda tensor: True)
        torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def members(num: int, num_shares: int, energy_dim: int, device: str = "cpu", dtype: torch.dtype = torch.float64):
    """Scores in [0, HIGHEST], values, keys below NUM_GROUPS - 1, and weights. Some weights are 0."""
    generator = torch.Generator().manual_seed(num)
    scores = torch.rand(num, generator=generator, dtype=dtype) * HIGHEST
    values = torch.randn(num, energy_dim, generator=generator, dtype=dtype)
    keys = torch.rand(num, NUM_GROUPS - 1, generator=generator).argsort(dim=1)[:, :num_shares]
    weights = torch.rand(num, num_shares, generator=generator, dtype=dtype)
    weights[::5] = 0
    return tuple(tensor.to(device) for tensor in (scores, values, keys, weights))


Case = tuple[Tensor, Tensor, Tensor, Tensor]


def run(deposit: Callable, case: Case, cotangent: Tensor, **options: float | None) -> list[Tensor]:
    """Averages, mass and the three gradients."""
    scores, values, keys, weights = case
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (scores, values, weights)]
    average, mass = deposit(leaves[0], leaves[1], keys, leaves[2], NUM_GROUPS, **options)
    return [average.detach(), mass.detach(), *torch.autograd.grad(average, leaves, cotangent)]


def cotangent_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_GROUPS, case[1].shape[1], generator=generator, dtype=torch.float64).to(case[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", [None, HIGHEST, 59.0, 60.0])
@pytest.mark.parametrize(("num_shares", "energy_dim"), [(1, 1), (4, 1), (1, 4), (4, 3), (3, 2)])
@pytest.mark.parametrize("num", NUM_MEMBERS)
def test_equals_plain_torch(
    num: int, num_shares: int, energy_dim: int, bound: float | None, device: str, summation: str
) -> None:
    case = members(num, num_shares, energy_dim, device)
    cotangent = cotangent_of(case)
    actual = run(group_softmax_deposit, case, cotangent, bound=bound)
    for found, wanted in zip(actual, run(group_softmax_reference, case, cotangent), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_cases_have_members_of_every_kind() -> None:
    mass = torch.stack([group_softmax_deposit(*members(num, 4, 1), NUM_GROUPS)[1] for num in NUM_MEMBERS])
    assert ((mass > 0) & (mass < 1)).any()
    assert (mass > 1).any()
    assert (mass[:2] == 0).sum() > 2
    assert mass[:, -1].eq(0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", [None, HIGHEST])
def test_float32(bound: float | None, device: str, summation: str) -> None:
    case = members(700, 4, 2, device)
    cotangent = cotangent_of(case)
    expected = run(group_softmax_reference, case, cotangent)
    single = tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in case)
    for found, wanted in zip(run(group_softmax_deposit, single, cotangent.float(), bound=bound), expected, strict=True):
        assert found.dtype == torch.float32
        # Each sum has about 70 rounded terms.
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bound", [None, HIGHEST])
def test_gradcheck(bound: float | None, summation: str) -> None:
    scores, values, keys, weights = members(6, 2, 2)
    weights = weights + 0.1  # away from 0, so that finite differences can decrease a weight
    leaves = [tensor.requires_grad_() for tensor in (scores, values, weights)]
    assert torch.autograd.gradcheck(
        lambda s, v, w: group_softmax_deposit(s, v, keys, w, NUM_GROUPS, bound=bound)[0], leaves
    )


@pytest.mark.parametrize("lowest", [-1e4, 0.0])
def test_huge_scores(lowest: float, summation: str) -> None:
    """Scores from -1e4 to 1e4 in the same group, without a bound or with a huge one."""
    scores, values, keys, weights = members(700, 4, 1)
    case = scores / HIGHEST * (1e4 - lowest) + lowest, values, keys, weights
    cotangent = cotangent_of(case)
    expected = run(group_softmax_reference, case, cotangent)
    for bound in (None, 1e4):
        for found, wanted in zip(run(group_softmax_deposit, case, cotangent, bound=bound), expected, strict=True):
            assert torch.isfinite(found).all()
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bound", [None, HIGHEST])
@pytest.mark.parametrize("which", [0, 1, 3], ids=["scores", "values", "weights"])
def test_nan_stays_in_its_groups(which: int, bound: float | None, summation: str) -> None:
    """NaN only reaches the groups of its member, and in the backward pass the members of these groups."""
    scores, values, keys, weights = members(25, 2, 2)
    finite = scores, values, keys, weights + 0.1
    nonfinite = tuple(tensor.clone() for tensor in finite)
    nonfinite[which][7] = torch.nan
    cotangent = cotangent_of(finite)
    actual = run(group_softmax_deposit, nonfinite, cotangent, bound=bound)
    expected = run(group_softmax_deposit, finite, cotangent, bound=bound)
    groups = torch.zeros(NUM_GROUPS, dtype=torch.bool)
    groups[keys[7]] = True
    near = groups[keys].any(dim=1)
    assert not near.all()
    assert actual[0][groups].isnan().any(dim=1).all()
    for index, (found, wanted) in enumerate(zip(actual, expected, strict=True)):
        affected = groups if index < 2 else near
        torch.testing.assert_close(found[~affected], wanted[~affected], rtol=0, atol=1e-13)
    assert actual[2][7].isnan()


@pytest.mark.parametrize("bound", [None, HIGHEST])
def test_any_memory_layout(bound: float | None, summation: str) -> None:
    case = members(25, 4, 3)
    cotangent = cotangent_of(case)
    expected = run(group_softmax_deposit, case, cotangent, bound=bound)
    scores, values, keys, weights = (tensor.repeat_interleave(2, dim=0)[::2] for tensor in case)
    strided = scores, values.t().contiguous().t(), keys.flip(1).flip(1), weights.t().contiguous().t()
    columns = cotangent.t().contiguous().t()
    for found, wanted in zip(run(group_softmax_deposit, strided, columns, bound=bound), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_mass_has_no_gradient(summation: str) -> None:
    scores, values, keys, weights = members(25, 4, 1)
    average, mass = group_softmax_deposit(scores, values, keys, weights.requires_grad_(), NUM_GROUPS)
    assert average.requires_grad
    assert not mass.requires_grad


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradients_of_some_inputs_alone(wanted: tuple[bool, ...], summation: str) -> None:
    case = members(25, 4, 2)
    cotangent = cotangent_of(case)
    expected = run(group_softmax_deposit, case, cotangent)[2:]
    scores, values, keys, weights = case
    leaves = [tensor.requires_grad_(needed) for tensor, needed in zip((scores, values, weights), wanted, strict=True)]
    average, _ = group_softmax_deposit(scores, values, keys, weights, NUM_GROUPS)
    average.backward(cotangent)
    for leaf, gradient, needed in zip(leaves, expected, wanted, strict=True):
        assert (leaf.grad is not None) == needed
        assert not needed or torch.equal(leaf.grad, gradient)


def test_results_own_their_memory(summation: str) -> None:
    """Writing to the results changes no gradient."""
    case = members(25, 4, 2)
    cotangent = cotangent_of(case)
    expected = run(group_softmax_deposit, case, cotangent)[2:]
    scores, values, keys, weights = case
    leaves = [tensor.requires_grad_() for tensor in (scores, values, weights)]
    average, mass = group_softmax_deposit(scores, values, keys, weights, NUM_GROUPS)
    average.detach().zero_()
    mass.zero_()
    for found, wanted in zip(torch.autograd.grad(average, leaves, cotangent), expected, strict=True):
        assert torch.equal(found, wanted)


def test_deterministic_algorithms_sort_if_the_order_varies(monkeypatch: pytest.MonkeyPatch, summation: str) -> None:
    called = []
    original = group_softmax.sorted_sums
    monkeypatch.setattr(group_softmax, "sorted_sums", lambda *inputs: called.append(True) or original(*inputs))
    group_softmax_deposit(*members(25, 1, 1), NUM_GROUPS)
    assert bool(called) == (summation == "sorted")


def test_a_cpu_needs_no_sorting() -> None:
    assert not group_softmax._order_varies(torch.zeros(1))


def big(num: int = 1 << 18) -> Case:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(num, generator=generator).cuda() * HIGHEST,
        torch.randn(num, 1, generator=generator).cuda(),
        torch.randint(NUM_GROUPS, (num, 4), generator=generator).cuda(),
        torch.rand(num, 4, generator=generator).cuda(),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bound", [None, HIGHEST])
def test_only_sorted_sums_repeat_their_bits(bound: float | None, summation: str) -> None:
    """Sorted sums have the same bits each time. Atomic additions of 2^18 float32 members must not."""
    case = big()
    cotangent = cotangent_of(case)
    runs = [run(group_softmax_deposit, case, cotangent, bound=bound) for _ in range(4)]
    same = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    assert same == (summation == "sorted")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bound", [None, HIGHEST])
def test_nothing_waits_for_the_device_and_graphs_replay(bound: float | None, summation: str) -> None:
    case = big(1 << 12)
    scores, values, keys, weights = (tensor.clone() for tensor in case)
    leaves = [tensor.requires_grad_() for tensor in (scores, values, weights)]
    cotangent = cotangent_of(case)

    def step() -> list[Tensor]:
        average, mass = group_softmax_deposit(scores, values, keys, weights, NUM_GROUPS, bound=bound)
        return [average.detach(), mass, *torch.autograd.grad(average, leaves, cotangent)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        values.mul_(2)
        keys.copy_(keys.flip(0))
    graph.replay()
    for found, wanted in zip(
        results, run(group_softmax_reference, (scores, values, keys, weights), cotangent), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
