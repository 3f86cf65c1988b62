"""The group softmax with deposit as plain, differentiable torch, one operation after the other: slow and obvious."""

import torch
from torch import Tensor


def group_softmax_reference(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """As `group_softmax_deposit`, for any scores; autograd works out the gradients."""
    flat_keys = keys.reshape(-1)
    flat_weights = weights.reshape(-1)
    flat_scores = scores[:, None].expand_as(weights).reshape(-1)

    mass = flat_weights.new_zeros(num_groups).index_add(0, flat_keys, flat_weights)
    missing = (1 - mass).clamp(min=0)
    # Largest score per group, over real members alone; 0 stands for the empty member, and for groups without any.
    with torch.no_grad():
        member_scores = flat_scores.masked_fill(flat_weights <= 0, -torch.inf)
        floor = torch.where(missing > 0, 0.0, -torch.inf).to(scores.dtype)
        maximum = floor.scatter_reduce(0, flat_keys, member_scores, "amax", include_self=True)
    # The clamp touches members of weight 0 only: others are <= 0 by the maximum.
    exponent = (flat_scores - maximum[flat_keys]).clamp(max=60.0)
    share = flat_weights * exponent.exp()
    # Where a share is missing the maximum is 0 or more; elsewhere the clamp keeps 0 * exp(1e4) from being NaN.
    denominator = (missing * (-maximum.clamp(min=0)).exp()).index_add(0, flat_keys, share)
    normalised = (share / denominator[flat_keys]).view_as(weights)
    deposits = (normalised[:, :, None] * values[:, None, :]).flatten(0, 1)
    return values.new_zeros(num_groups, values.shape[1]).index_add(0, flat_keys, deposits), mass
