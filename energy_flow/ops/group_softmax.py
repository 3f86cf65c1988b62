"""Softmax over groups of landings, and the deposit of their energies on cells, as one operation.

N members, K groups per member, G groups, E energy dimension

All paths fill one table [G, P] of sums over the members of a group. Its columns are
[numerator (E) | mass | denominator | maximum, if one is subtracted | padding]:

    numerator = sum(w exp(s - shift) v), mass = sum(w), denominator = sum(w exp(s - shift))

The backward pass needs only this table and the inputs. It reads the table at the keys and sums nothing over members,
so it is deterministic on every path. The keys are indices of the table, so no path searches for distinct keys.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from energy_flow.ops.backend import use_triton

# With scores below this, exp(score) and its sums are far from the largest float32, so no maximum is subtracted.
LARGEST_BOUND = 60.0


def group_softmax_deposit(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, *, bound: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted softmax average per group: sum(w exp(s) v) / (sum(w exp(s)) + max(0, 1 - sum(w))).

    A group with sum(w) < 1 gets one empty member with weight 1 - sum(w), score 0 and value 0. So a group with
    sum(w) >= 1 is a plain weighted softmax, a group without members is 0, and the result is continuous in the weights.

    On a GPU, atomic additions make the sums, in a different order in every run. Under
    `torch.use_deterministic_algorithms(True)` members are sorted by their keys and added in that order. This is slower
    but gives the same bits every time.

    Args:
        scores: [N].
        values: [N, E].
        keys: [N, K] int64 in [0, num_groups): the groups of a member.
        weights: [N, K], >= 0; a weight of 0 means "not a member".
        num_groups: G; to compute it would need a device sync.
        bound: upper bound of |score|. A bound below 60 saves one pass over the members, the one for the maximum of
            every group. None: unknown.

    Returns:
        values [G, E], and mass [G], the sum of weights per group, which has no gradient.

    Raises:
        RuntimeError: this torch has no `scatter_reduce`.
        TypeError: a dtype below float32, whose sums would be wrong (in bfloat16, 256 + 1 = 256).
    """
    if not hasattr(torch.Tensor, "scatter_reduce_"):
        raise RuntimeError(f"torch {torch.__version__} has no scatter_reduce: install torch >= 2.6")
    for name, tensor in (("scores", scores), ("values", values), ("weights", weights)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} are {tensor.dtype}: sums over a group need torch.float32 or torch.float64")
    bounded = bound is not None and bound < LARGEST_BOUND
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.compiler.is_exporting():
        return differentiable_averages(scores, values, keys, weights, num_groups, bounded)
    return _GroupSoftmaxDeposit.apply(scores, values, keys, weights, num_groups, bounded)


class _GroupSoftmaxDeposit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
    ) -> tuple[Tensor, Tensor]:
        members = scores.contiguous(), values.contiguous(), keys.contiguous(), weights.contiguous()
        kernels = use_triton(scores)
        if _order_varies(scores) and torch.are_deterministic_algorithms_enabled():
            table = sorted_sums(*members, num_groups, bounded)
            table = _kernels().padded(table, values.shape[1], bounded) if kernels else table
        elif kernels:
            table = _kernels().sums(*members, num_groups, bounded)
        else:
            table = scattered_sums(*members, num_groups, bounded)
        ctx.save_for_backward(scores, values, keys, weights, table)
        ctx.bounded = bounded
        normalise = _kernels().normalise if kernels else _normalise
        average, mass = normalise(table, values.shape[1], bounded)
        ctx.mark_non_differentiable(mass)
        return average, mass

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, table = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated itself
            return _differentiable_gradients(grad, inputs, len(table), ctx.bounded, ctx.needs_input_grad)
        members = [value.contiguous() for value in inputs]
        for_weights = ctx.needs_input_grad[3]
        gradients: Any = _kernels().gradients if use_triton(table) else _gradients
        grad_scores, grad_values, grad_weights = gradients(grad.contiguous(), *members, table, ctx.bounded, for_weights)
        return grad_scores, grad_values, None, grad_weights, None, None


def differentiable_averages(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
) -> tuple[Tensor, Tensor]:
    """`group_softmax_deposit` in plain operations: for derivatives of any order, and for tracers."""
    groups = keys.reshape(-1)
    mass = weights.new_zeros(num_groups).index_add(0, groups, weights.reshape(-1))
    shift, empty = None, torch.ones_like(mass)
    if not bounded:
        floor = torch.zeros_like(mass).masked_fill(mass.detach() >= 1, -torch.inf)
        shift = floor.scatter_reduce(0, groups, _member_scores(scores, weights).detach(), "amax")
        empty = (-shift.clamp(min=0)).exp()
    share = weights * _exponential(scores, keys, shift)
    denominator = share.new_zeros(num_groups).index_add(0, groups, share.reshape(-1)) + (1 - mass).clamp(min=0) * empty
    deposits = (share[..., None] * values[:, None]).flatten(0, 1)
    numerator = values.new_zeros(num_groups, values.shape[1]).index_add(0, groups, deposits)
    return numerator / denominator[:, None], mass.detach()


def _differentiable_gradients(
    grad: Tensor, inputs: list[Tensor], num_groups: int, bounded: bool, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the four inputs, with a graph of their own."""
    scores, values, keys, weights = inputs
    average, _ = differentiable_averages(scores, values, keys, weights, num_groups, bounded)
    needed = [value for value, needs in zip(inputs, wanted, strict=False) if needs]
    found = iter(torch.autograd.grad(average, needed, grad, create_graph=True))
    return (*(next(found) if needs else None for needs in wanted[:4]), None, None)


def _kernels() -> Any:
    from energy_flow.ops import group_softmax_triton  # Triton is optional

    return group_softmax_triton


def _order_varies(tensor: Tensor) -> bool:
    """Whether atomic additions make the sums. On a CPU torch adds one member after the other."""
    return tensor.is_cuda


def scattered_sums(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
) -> Tensor:
    """The table of sums: every member is added to its groups.

    Columns are filled one by one, because torch's indexed addition is about twelve times as fast for single numbers as
    for rows.
    """
    energy_dim = values.shape[1]
    table = values.new_zeros(energy_dim + (2 if bounded else 3), num_groups)
    # By index: torch.export fixes the batch size where a tensor is unpacked and its parts are written to.
    mass, denominator = table[energy_dim], table[energy_dim + 1]
    groups = keys.view(-1)
    mass.scatter_add_(0, groups, weights.view(-1))
    maximum = None
    if not bounded:
        # The empty member, if there is one, has score 0.
        maximum = table[energy_dim + 2].masked_fill_(mass >= 1, -torch.inf)
        maximum.scatter_reduce_(0, groups, _member_scores(scores, weights), "amax")
    share = weights * _exponential(scores, keys, maximum)
    denominator.scatter_add_(0, groups, share.view(-1))
    for column, value in enumerate(values.unbind(1)):
        table[column].scatter_add_(0, groups, (share * value[:, None]).view(-1))
    return table.t()


def sorted_sums(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
) -> Tensor:
    """The table of sums, from members sorted by their keys: every group is a segment, added in order."""
    energy_dim = values.shape[1]
    ordered, order = keys.view(-1).sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_groups + 1, device=keys.device))
    member = order // keys.shape[1]
    # `unsafe` leaves out checks, because they wait for the device.
    reduce_groups = functools.partial(torch.segment_reduce, offsets=offsets, axis=0, unsafe=True)
    weight = weights.view(-1)[order]
    mass = reduce_groups(weight, "sum")
    maximum = None
    if not bounded:
        maximum = reduce_groups(_member_scores(scores, weights)[order], "max")
        maximum = torch.where(mass < 1, maximum.clamp(min=0), maximum)
    share = weight * _exponential(scores, keys, maximum).expand_as(weights).reshape(-1)[order]
    sums = reduce_groups(torch.cat([share[:, None] * values[member], share[:, None]], dim=1), "sum")
    columns = [sums[:, :energy_dim], mass[:, None], sums[:, energy_dim:]]
    columns += [] if maximum is None else [maximum[:, None]]
    return torch.cat(columns, dim=1)


def _member_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores for the maximum, [N * K]: without members of weight 0, because a huge score of one would make others 0."""
    return torch.where(weights > 0, scores[:, None], -torch.inf).reshape(-1)


def _exponential(scores: Tensor, keys: Tensor, shift: Tensor | None) -> Tensor:
    """exp(s - shift): [N, 1] without a shift, else [N, K]."""
    if shift is None:
        return scores.exp()[:, None]
    # The clamp only changes members of weight 0, because s - shift <= 0 for all others. Members of weight 0 add nothing
    # to the sums, but their derivative in the weight must stay finite.
    return (scores[:, None] - shift.index_select(0, keys.reshape(-1)).view(keys.shape)).clamp_(max=LARGEST_BOUND).exp_()


def _empty_member(table: Tensor, energy_dim: int, bounded: bool) -> Tensor | float:
    """exp(0 - shift), [G]. In a group without an empty member it is at most 1 and is multiplied by 0."""
    return 1.0 if bounded else table[:, energy_dim + 2].clamp(min=0).neg_().exp_()


def _normalise(table: Tensor, energy_dim: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Averages [G, E] and mass [G]. Adds the empty members to the denominators in place."""
    mass, denominator = table[:, energy_dim], table[:, energy_dim + 1]
    denominator += (1 - mass).clamp_(min=0).mul_(_empty_member(table, energy_dim, bounded))
    average = table.new_empty(table.shape[0], energy_dim)
    for column in range(energy_dim):
        torch.div(table[:, column], denominator, out=average[:, column])
    return average, mass.clone()


def _gradients(
    grad: Tensor,
    scores: Tensor,
    values: Tensor,
    keys: Tensor,
    weights: Tensor,
    table: Tensor,
    bounded: bool,
    for_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of scores, values and weights; every member reads the table at its keys.

    With p = exp(s - shift) / denominator and f = grad . (v - average):

        grad_values = sum_k(w p grad), grad_scores = sum_k(w p f), grad_weights = p f + e

    e is the effect of the empty member, whose weight falls as w grows: grad . average exp(0 - shift) / denominator if
    mass <= 1, else 0.
    """
    energy_dim, groups = values.shape[1], keys.view(-1)
    mass, denominator = table[:, energy_dim], table[:, energy_dim + 1]
    per_share = [column / denominator for column in grad.unbind(1)]
    towards_average = torch.zeros_like(mass)
    for column, numerator in zip(per_share, table.unbind(1), strict=False):
        towards_average.addcmul_(column, numerator)
    towards_average /= denominator
    shift = None if bounded else table[:, energy_dim + 2]
    exponential = _exponential(scores, keys, shift)
    share = weights * exponential
    slope = towards_average.index_select(0, groups).view_as(keys).neg_()
    grad_values = torch.empty_like(values)
    for column, value, out in zip(per_share, values.unbind(1), grad_values.unbind(1), strict=True):
        picked = column.index_select(0, groups).view_as(keys)
        slope.addcmul_(picked, value[:, None])
        out.copy_(_total(picked.mul_(share)))
    grad_scores = _total(share.mul_(slope))
    if not for_weights:
        return grad_scores, grad_values, None
    lost = towards_average.mul_(_empty_member(table, energy_dim, bounded)).mul_(mass <= 1)
    return grad_scores, grad_values, slope.mul_(exponential).add_(lost.index_select(0, groups).view_as(keys))


def _total(table: Tensor) -> Tensor:
    """Sum over columns. For one column it avoids torch's sum, which takes as long as for four."""
    return table.sum(1) if table.shape[1] > 1 else table.squeeze(1)
