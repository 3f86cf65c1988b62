"""The group softmax with deposit in plain torch with autograd: slow and simple."""

import torch
from torch import Tensor


def group_softmax_reference(
    scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int
) -> tuple[Tensor, Tensor]:
    """`group_softmax_deposit` for any scores; autograd computes the gradients."""
    flat_keys = keys.reshape(-1)
    flat_weights = weights.reshape(-1)
    flat_scores = scores[:, None].expand_as(weights).reshape(-1)

    mass = flat_weights.new_zeros(num_groups).index_add(0, flat_keys, flat_weights)
    missing = (1 - mass).clamp(min=0)
    # The largest score per group over real members; 0 for the empty member and for groups without members.
    with torch.no_grad():
        member_scores = flat_scores.masked_fill(flat_weights <= 0, -torch.inf)
        floor = torch.where(missing > 0, 0.0, -torch.inf).to(scores.dtype)
        maximum = floor.scatter_reduce(0, flat_keys, member_scores, "amax", include_self=True)
    # The clamp only changes members of weight 0: for all others the exponent is <= 0.
    exponent = (flat_scores - maximum[flat_keys]).clamp(max=60.0)
    share = flat_weights * exponent.exp()
    # With an empty member the maximum is 0 or more; otherwise the clamp avoids 0 * exp(1e4) = NaN.
    denominator = (missing * (-maximum.clamp(min=0)).exp()).index_add(0, flat_keys, share)
    normalised = (share / denominator[flat_keys]).view_as(weights)
    deposits = (normalised[:, :, None] * values[:, None, :]).flatten(0, 1)
    return values.new_zeros(num_groups, values.shape[1]).index_add(0, flat_keys, deposits), mass
