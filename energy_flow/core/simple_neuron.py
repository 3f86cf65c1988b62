"""The network that every cell of the lattice shares."""

import torch
from torch import Tensor, nn


class SimpleNeuron(nn.Module):
    """Computes the features of a flow from its position and energy.

    Positions are normalised to [-1, 1] already. The network runs in the dtype of the positions, also under autocast:
    bfloat16 can't tell neighbouring cells apart.

    Args:
        energy_dim: E.
        features: F.
    """

    def __init__(self, energy_dim: int, features: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 + energy_dim, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, position: Tensor, energy: Tensor) -> Tensor:
        """Positions [..., 3] and energies [..., E] -> features [..., F]."""
        with torch.autocast("cpu" if position.is_meta else position.device.type, enabled=False):  # meta has none
            features: Tensor = self.network(torch.cat([position, energy.to(position.dtype)], dim=-1))
            return features


def neuron_features(
    position: Tensor, energy: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """`SimpleNeuron` as a function: linear2(silu(linear1([position, energy]))), [..., F]."""
    place = torch.cat([position, energy.to(position.dtype)], dim=-1)
    hidden = nn.functional.silu(nn.functional.linear(place, weight1, bias1))
    return nn.functional.linear(hidden, weight2, bias2)


def write_features(
    position: Tensor, energy: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, into: Tensor
) -> None:
    """Write features and energy, the carrier's input, to `into` [N, F + E or more]. Columns beyond F + E become 0."""
    features = neuron_features(position, energy, weight1, bias1, weight2, bias2)
    used = features.shape[1] + energy.shape[1]
    into[:, : features.shape[1]] = features
    into[:, features.shape[1] : used] = energy
    into[:, used:] = 0


def neuron_features_backward(
    position: Tensor,
    energy: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    grad_features: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass of `neuron_features`.

    Args:
        position: [N, 3].
        energy: [N, E].
        weight1, bias1, weight2: of the first linear layer, and the second one's weight.
        grad_features: [N, F].

    Returns:
        Gradients of position, energy, weight1, bias1, weight2 and bias2.
    """
    place = torch.cat([position, energy], dim=-1)
    before = nn.functional.linear(place, weight1, bias1)
    gate = torch.sigmoid(before)
    grad_hidden = grad_features @ weight2
    grad_before = grad_hidden * gate * (1 + before * (1 - gate))
    grad_place = grad_before @ weight1
    return (
        grad_place[:, :3],
        grad_place[:, 3:],
        grad_before.T @ place,
        grad_before.sum(0),
        grad_features.T @ (before * gate),
        grad_features.sum(0),
    )
