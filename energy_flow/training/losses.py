"""What a flow lattice is trained on: the distance of its output embedding, and of its surface, to the target's.

B samples of this process, B_total samples of all processes, D embedding dimension, S cells, E energy dimension
"""

from collections.abc import Mapping
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from energy_flow.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossSettings(Settings):
    """Weights of the terms of the loss (0 = only reported) and the temperature of the contrastive one."""

    cosine: Weight
    mse: Weight
    surface: Weight
    contrastive: Weight
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]

    @model_validator(mode="after")
    def _trains_the_whole_model(self) -> Self:
        if self.cosine or self.mse or self.contrastive:
            return self
        remedy = "give one of them a weight > 0, e.g. loss.contrastive=1.0"
        if self.surface:
            raise ValueError(
                f"loss.surface = {self.surface}, with loss.cosine, loss.mse and loss.contrastive = 0: "
                f"the surface loss alone never trains the map out; {remedy}"
            )
        raise ValueError(
            f"loss.cosine, loss.mse, loss.surface and loss.contrastive are all 0: nothing is trained; {remedy}"
        )

    def weights(self) -> dict[str, float]:
        """The weight of each term, by its name."""
        return {"cosine": self.cosine, "mse": self.mse, "surface": self.surface, "contrastive": self.contrastive}


def embedding_losses(
    prediction: Tensor,
    target: Tensor,
    temperature: float,
    *,
    all_targets: Tensor | None = None,
    offset: int = 0,
) -> dict[str, Tensor]:
    """The terms of the loss that compare embeddings, each the mean over this process's samples.

    - `cosine`: 1 - cos(prediction, target).
    - `mse`: the mean squared error over all B * D numbers.
    - `contrastive`: in-batch InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): cross entropy of
      softmax_j(cos(prediction_i, target_j) / temperature) against j = i, over all targets of the (joined) batch.
      A batch of one sample has no negatives: its loss and gradient are 0.

    A target that occurs twice in a batch stays in the denominator twice, as is standard. It raises the loss (to no less
    than log 2 for two) but not the optimum: both copies pull the same way, so the gradient vanishes where the
    probability lies on the copies together.

    All terms are computed in float32 also under autocast (float64 inputs stay float64).

    Args:
        prediction: [B, D]
        target: [B, D]
        temperature: of the contrastive term, > 0.
        all_targets: [B_total, D], the targets of all processes, where there are several; default: `target`. The mean
            over equally large processes of this term and of its gradients is that of one process with the joined batch.
        offset: the row of `all_targets` at which this process's B targets begin.

    Raises:
        ValueError: the shapes don't fit, or the B rows from `offset` lie outside of `all_targets`.
    """
    if prediction.shape != target.shape or prediction.dim() != 2:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must both be [B, D]")
    candidates = target if all_targets is None else all_targets
    if not 0 <= offset <= len(candidates) - len(target):
        raise ValueError(f"rows {offset} to {offset + len(target) - 1} aren't within {len(candidates)} joined targets")
    with torch.autocast(prediction.device.type, enabled=False):
        prediction, target, candidates = _full(prediction), _full(target), _full(candidates)
        direction = F.normalize(prediction, dim=-1)  # [B, D]
        logits = direction @ F.normalize(candidates, dim=-1).T / temperature  # [B, B_total]
        own = torch.arange(offset, offset + len(target), device=target.device)
        return {
            "cosine": 1 - (direction * F.normalize(target, dim=-1)).sum(-1).mean(),
            "mse": F.mse_loss(prediction, target),
            "contrastive": F.cross_entropy(logits, own),
        }


def surface_loss(surface: Tensor, target_surface: Tensor) -> Tensor:
    """Mean squared error between the output surface and the mapped-in surface of the target.

    The target's surface is detached: else the map in could lower this loss by mapping every target to the same surface.

    Args:
        surface: [B, S, E]
        target_surface: [B, S, E]

    Raises:
        ValueError: the shapes differ.
    """
    if surface.shape != target_surface.shape:
        raise ValueError(f"surface {list(surface.shape)} and target surface {list(target_surface.shape)} must agree")
    with torch.autocast(surface.device.type, enabled=False):
        return F.mse_loss(_full(surface), _full(target_surface.detach()))


def weighted(losses: Mapping[str, Tensor], settings: LossSettings) -> Tensor:
    """The loss that is trained: the sum of the terms with a weight > 0, so the others can't touch it, NaN or not.

    Raises:
        KeyError: a term with a weight > 0 is missing.
    """
    terms = [weight * losses[name] for name, weight in settings.weights().items() if weight > 0]
    return torch.stack(terms).sum()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
