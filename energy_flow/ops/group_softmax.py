"""Softmax over groups of landings, and the deposit of their energies on cells, as one operation.

Letters: N members, K groups that a member belongs to, G groups, E energy dimension. All paths fill one table
[G, P] of sums, whose columns are [numerator (E) | mass | denominator | maximum, where one is subtracted | padding]:

    numerator = sum(w exp(s - shift) v), mass = sum(w), denominator = sum(w exp(s - shift)) of the members

It and the inputs are all that the backward needs, which only reads at the keys and so adds nothing up across
members: it is deterministic on every path. The keys say where the sums are, so nothing looks for distinct keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from energy_flow.ops.backend import use_triton

# Below it exp(score) and its sum over any number of members are far from the largest float32: no maximum is needed.
LARGEST_BOUND = 60.0


def group_softmax_deposit(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, *, bound: float | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted softmax average per group: sum(w exp(s) v) / (sum(w exp(s)) + max(0, 1 - sum(w))).

    The share that a thinly hit group misses to a whole weight counts as one empty member of score 0
    and value 0. So a group of weight >= 1 is a plain weighted softmax, a group without members is 0,
    and the result moves continuously with the weights.

    On a GPU the sums are made by atomic additions, in an order of their own in every run. Under
    `torch.use_deterministic_algorithms(True)` members are sorted by their keys first and added in that order:
    slower, and the same bits each time.

    Args:
        scores: [N].
        values: [N, E].
        keys: [N, K] int64 in [0, num_groups): the groups that a member belongs to.
        weights: [N, K], >= 0; a weight of 0 means "not a member".
        num_groups: G, always given: finding it out would need a device sync.
        bound: no |score| is larger, as the caller knows. Below 60 it saves a pass over the members, the one for
            the maximum of every group. None: scores may be anything.

    Returns:
        (values [G, E], mass [G]): mass is the sum of weights per group, and has no gradient.

    Raises:
        RuntimeError: this torch has no `scatter_reduce`.
        TypeError: numbers of less than float32; their sums over a group would be wrong (in bfloat16 256 + 1 is 256).
    """
    if not hasattr(torch.Tensor, "scatter_reduce_"):
        raise RuntimeError(f"torch {torch.__version__} has no scatter_reduce: install torch >= 2.6")
    for name, tensor in (("scores", scores), ("values", values), ("weights", weights)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} are {tensor.dtype}: sums over a group need torch.float32 or torch.float64")
    bounded = bound is not None and bound < LARGEST_BOUND
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
        ctx.save_for_backward(*members, table)
        ctx.bounded = bounded
        normalise = _kernels().normalise if kernels else _normalise
        average, mass = normalise(table, values.shape[1], bounded)
        ctx.mark_non_differentiable(mass)
        return average, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *members, table = ctx.saved_tensors
        for_weights = ctx.needs_input_grad[3]
        gradients: Any = _kernels().gradients if use_triton(table) else _gradients
        on_scores, on_values, on_weights = gradients(grad.contiguous(), *members, table, ctx.bounded, for_weights)
        return on_scores, on_values, None, on_weights, None, None


def _kernels() -> Any:
    # Triton is optional: only those who launch kernels import it.
    from energy_flow.ops import group_softmax_triton

    return group_softmax_triton


def _order_varies(tensor: Tensor) -> bool:
    """Whether sums come about by atomic additions; on a CPU torch adds one member after the other."""
    return tensor.is_cuda


def scattered_sums(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
) -> Tensor:
    """The table of sums, member by member added to its groups.

    One column after the other: torch adds single numbers at an index about twelve times as fast as rows.
    """
    energy_dim = values.shape[1]
    table = values.new_zeros(energy_dim + (2 if bounded else 3), num_groups)
    mass, denominator = table[energy_dim : energy_dim + 2]
    groups = keys.view(-1)
    mass.scatter_add_(0, groups, weights.view(-1))
    maximum = None
    if not bounded:
        # The empty member, where there is one, has score 0.
        maximum = table[energy_dim + 2].masked_fill_(mass >= 1, -torch.inf)
        maximum.scatter_reduce_(0, groups, _member_scores(scores, weights), "amax")
    share = weights * _exponential(scores, keys, maximum)
    denominator.scatter_add_(0, groups, share.view(-1))
    for column, value in zip(table[:energy_dim], values.unbind(1), strict=True):
        column.scatter_add_(0, groups, (share * value[:, None]).view(-1))
    return table.t()


def sorted_sums(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bounded: bool
) -> Tensor:
    """The table of sums, from members sorted by their keys: every group is a segment, added from front to end."""
    energy_dim = values.shape[1]
    ordered, order = keys.view(-1).sort(stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_groups + 1, device=keys.device))
    member = order // keys.shape[1]

    def reduced(data: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(data, how, offsets=offsets, axis=0, unsafe=True)  # unsafe: no waiting for checks

    weight = weights.view(-1)[order]
    mass = reduced(weight, "sum")
    maximum = None
    if not bounded:
        maximum = reduced(_member_scores(scores, weights)[order], "max")
        maximum = torch.where(mass < 1, maximum.clamp(min=0), maximum)
    share = weight * _exponential(scores, keys, maximum).expand_as(weights).reshape(-1)[order]
    sums = reduced(torch.cat([share[:, None] * values[member], share[:, None]], dim=1), "sum")
    columns = [sums[:, :energy_dim], mass[:, None], sums[:, energy_dim:]]
    columns += [] if maximum is None else [maximum[:, None]]
    return torch.cat(columns, dim=1)


def _member_scores(scores: Tensor, weights: Tensor) -> Tensor:
    """What counts for the maximum, [N * K]: a member of weight 0 with a huge score would push all others to 0."""
    return torch.where(weights > 0, scores[:, None], -torch.inf).view(-1)


def _exponential(scores: Tensor, keys: Tensor, shift: Tensor | None) -> Tensor:
    """exp(s - shift), [N, 1] without a shift, else [N, K]."""
    if shift is None:
        return scores.exp()[:, None]
    # The clamp touches members of weight 0 only (others are <= 0 by the maximum): they add nothing to the sums,
    # and their slope in the weight stays finite.
    return (scores[:, None] - shift.index_select(0, keys.view(-1)).view_as(keys)).clamp_(max=LARGEST_BOUND).exp_()


def _empty_member(table: Tensor, energy_dim: int, bounded: bool) -> Tensor | float:
    """exp(0 - shift), [G]; at most 1 where there is no empty member, and its share is 0 times that."""
    return 1.0 if bounded else table[:, energy_dim + 2].clamp(min=0).neg_().exp_()


def _normalise(table: Tensor, energy_dim: int, bounded: bool) -> tuple[Tensor, Tensor]:
    """Averages [G, E] and mass [G]; adds the empty members to the denominators, in place."""
    mass, denominator = table[:, energy_dim], table[:, energy_dim + 1]
    denominator += (1 - mass).clamp_(min=0).mul_(_empty_member(table, energy_dim, bounded))
    average = table.new_empty(len(table), energy_dim)
    for numerator, out in zip(table.unbind(1), average.unbind(1), strict=False):
        torch.div(numerator, denominator, out=out)
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
    """Of scores, values and weights, from what every member reads at its keys.

    With p = exp(s - shift) / denominator and f = grad . (v - average): of values sum_k(w p grad), of scores
    sum_k(w p f), of weights p f, and what the empty member loses by them.
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
    on_values = torch.empty_like(values)
    for column, value, out in zip(per_share, values.unbind(1), on_values.unbind(1), strict=True):
        picked = column.index_select(0, groups).view_as(keys)
        slope.addcmul_(picked, value[:, None])
        out.copy_(_total(picked.mul_(share)))
    on_scores = _total(share.mul_(slope))
    if not for_weights:
        return on_scores, on_values, None
    lost = towards_average.mul_(_empty_member(table, energy_dim, bounded)).mul_(mass <= 1)
    return on_scores, on_values, slope.mul_(exponential).add_(lost.index_select(0, groups).view_as(keys))


def _total(table: Tensor) -> Tensor:
    """Sum over columns; torch takes as long for the sum of one column as for that of four."""
    return table.sum(1) if table.shape[1] > 1 else table.squeeze(1)
