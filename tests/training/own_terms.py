"""Loss terms as a user writes them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowOutput


class Huber(nn.Module):
    """The Huber loss of the embedding."""

    def __init__(self, delta: float = 1.0) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.huber_loss(output.embedding, batch["target"], delta=self.delta)


class Learned(nn.Module):
    """A squared error in a learned basis."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.map(output.embedding) - batch["target"]).square().mean()


class WeightedError:
    """A squared error with a weight per row, which the batches bring along."""

    def __call__(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return (batch["importance"] * (output.embedding - batch["target"]).square().mean(1)).mean()


class PerSample:
    """Not a scalar."""

    def __call__(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return (output.embedding - batch["target"]).square().mean(1)


class Detached:
    """Without a gradient."""

    def __call__(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return output.embedding.detach().mean()


class NotANumber:
    def __call__(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        return output.embedding.mean() * torch.nan


class OneArgument:
    def __call__(self, output: FlowOutput) -> Tensor:
        return output.embedding.mean()


class NotCallable:
    pass
