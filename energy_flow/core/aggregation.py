"""The ways to aggregate the landings of a cell to its energy. All of them keep the protocol `parts.Aggregation`."""

import torch
from torch import Tensor, nn

from energy_flow.ops.group_softmax import group_softmax_deposit


class SoftmaxAggregation(nn.Module):
    """The average energy of a cell's landings, weighted by their scores.

    energy = sum(w exp(score) energy) / (sum(w exp(score)) + max(0, 1 - sum(w)))
    """

    def forward(
        self, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bound: float | None
    ) -> tuple[Tensor, Tensor]:
        """See `parts.Aggregation`."""
        return group_softmax_deposit(scores, values, keys, weights, num_groups, bound=bound)


class MeanAggregation(nn.Module):
    """The average energy of a cell's landings.

    energy = sum(w energy) / (sum(w) + max(0, 1 - sum(w)))
    """

    def forward(
        self, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bound: float | None
    ) -> tuple[Tensor, Tensor]:
        """See `parts.Aggregation`. Scores and their bound aren't used."""
        return group_softmax_deposit(torch.zeros_like(scores), values, keys, weights, num_groups, bound=0.0)


class SumAggregation(nn.Module):
    """The total energy of a cell's landings. All cells together have the energy of all landings: nothing is lost.

    energy = sum(w energy)
    """

    def forward(
        self, scores: Tensor, values: Tensor, keys: Tensor, weights: Tensor, num_groups: int, bound: float | None
    ) -> tuple[Tensor, Tensor]:
        """See `parts.Aggregation`. Scores and their bound aren't used."""
        groups = keys.flatten()
        deposits = weights[..., None] * values[:, None, :]
        energies = values.new_zeros(num_groups, values.shape[1]).index_add(0, groups, deposits.flatten(0, 1))
        mass = weights.new_zeros(num_groups).index_add(0, groups, weights.detach().flatten())
        return energies, mass
