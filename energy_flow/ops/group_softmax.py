"""Softmax over groups of landings, and the deposit of their energies on cells."""

import torch
from torch import Tensor


def group_softmax_deposit(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Weighted softmax average per group: sum(w exp(s) v) / (sum(w exp(s)) + max(0, 1 - sum(w))).

    The share that a thinly hit group misses to a whole weight counts as one empty member of score 0
    and value 0. So a group of weight >= 1 is a plain weighted softmax, a group without members is 0,
    and the result moves continuously with the weights.

    Args:
        scores: [N].
        values: [N, E].
        keys: [N, K] int64 in [0, num_groups): the groups that a member belongs to.
        weights: [N, K], >= 0; a weight of 0 means "not a member".
        num_groups: G, always given: finding it out would need a device sync.

    Returns:
        (values [G, E], mass [G]): mass is the sum of weights per group.

    Raises:
        RuntimeError: this torch has no `scatter_reduce`.
        TypeError: numbers of less than float32; their sums over a group would be wrong (in bfloat16 256 + 1 is 256).
    """
    if not hasattr(torch.Tensor, "scatter_reduce_"):
        raise RuntimeError(f"torch {torch.__version__} has no scatter_reduce: install torch >= 2.6")
    for name, tensor in (("scores", scores), ("values", values), ("weights", weights)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} are {tensor.dtype}: sums over a group need torch.float32 or torch.float64")
    flat_keys = keys.reshape(-1)
    flat_weights = weights.reshape(-1)
    flat_scores = scores[:, None].expand_as(weights).reshape(-1)

    mass = flat_weights.new_zeros(num_groups).index_add(0, flat_keys, flat_weights)
    missing = (1 - mass).clamp(min=0)
    # Largest score per group, over real members alone: a member of weight 0 with a huge score would push all
    # others to underflow. 0 stands for the empty member, and for groups that have nothing else to offer.
    with torch.no_grad():
        member_scores = flat_scores.masked_fill(flat_weights <= 0, -torch.inf)
        floor = torch.where(missing > 0, 0.0, -torch.inf).to(scores.dtype)
        maximum = floor.scatter_reduce(0, flat_keys, member_scores, "amax", include_self=True)
    # The clamp touches members of weight 0 only (others are <= 0 by the maximum): they add nothing to the
    # sums, and their slope in the weight stays finite.
    exponent = (flat_scores - maximum[flat_keys]).clamp(max=60.0)
    share = flat_weights * exponent.exp()
    # Where a share is missing the maximum is 0 or more; elsewhere the clamp keeps 0 * exp(1e4) from being NaN.
    denominator = (missing * (-maximum.clamp(min=0)).exp()).index_add(0, flat_keys, share)
    normalised = (share / denominator[flat_keys]).view_as(weights)
    num_members, num_cells = weights.shape
    deposits = (normalised[:, :, None] * values[:, None, :]).reshape(num_members * num_cells, values.shape[1])
    return values.new_zeros(num_groups, values.shape[1]).index_add(0, flat_keys, deposits), mass
