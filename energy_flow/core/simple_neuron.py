"""The network that every cell of the lattice shares."""

import torch
from torch import Tensor, nn


class SimpleNeuron(nn.Module):
    """(position, energy) -> features: what a flow reads at the place where it is.

    Positions are already normalised to [-1, 1] and are used as they are. The network runs in the dtype of
    the positions, also under autocast: bfloat16 can't tell neighbouring cells apart.
    """

    def __init__(self, energy_dim: int, features: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3 + energy_dim, features), nn.SiLU(), nn.Linear(features, features))

    def forward(self, position: Tensor, energy: Tensor) -> Tensor:
        """[..., 3], [..., E] -> [..., F]."""
        with torch.autocast(position.device.type, enabled=False):
            return neuron_features(position, energy, *self.weights)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first layer, then of the second."""
        first, second = (layer for layer in self.network if isinstance(layer, nn.Linear))
        return first.weight, first.bias, second.weight, second.bias


def neuron_features(
    position: Tensor, energy: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Two linear layers with a SiLU between them."""
    place = torch.cat([position, energy.to(position.dtype)], dim=-1)
    hidden = nn.functional.silu(nn.functional.linear(place, weight1, bias1))
    return nn.functional.linear(hidden, weight2, bias2)


def write_features(
    position: Tensor, energy: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, into: Tensor
) -> None:
    """Write features and energy, what the carrier reads, to `into` [N, F + E or more]; what is left of it gets 0."""
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
    """Gradients of position, energy, weight1, bias1, weight2 and bias2 from that of the features, all [N, ·]."""
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
