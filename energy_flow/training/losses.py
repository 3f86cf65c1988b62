"""Losses of a flow lattice: distances of its output embedding and its output surface to those of the target.

B samples of this process, G candidates, D embedding dimension, S cells, E energy dimension
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from energy_flow.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SHIPPED = ("cosine", "mse", "surface", "contrastive")
# Names in `train/...` and `val/...` that a term of one's own can't have.
_TAKEN = (*SHIPPED, "loss", "cosine_loss", "mrr", "median_rank", "temperature", "skipped")


class LossSettings(Settings):
    """Weights of the loss terms (0: only reported), and options of the contrastive term (config group `loss`)."""

    cosine: Weight
    mse: Weight
    surface: Weight
    contrastive: Weight
    candidates: Literal["batch", "bank"]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    learn_temperature: bool
    terms: dict[str, dict[str, Any] | None] | None = None  # checkpoints of older versions have none

    @model_validator(mode="after")
    def _has_terms(self) -> Self:
        for name, section in (self.terms or {}).items():
            if not name.isidentifier() or name in _TAKEN:
                raise ValueError(
                    f"loss.terms.{name}: must be a name of letters, digits and _, and none of {', '.join(_TAKEN)}"
                )
            weight = _weight_of(section or {})
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (is_number and 0 <= weight < math.inf):
                raise ValueError(f"loss.terms.{name}.weight = {weight!r}: must be a finite number of at least 0")
        return self

    @model_validator(mode="after")
    def _trains_the_whole_model(self) -> Self:
        if self.cosine or self.mse or self.contrastive or any(self.term_weights().values()):
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

    @model_validator(mode="after")
    def _trains_the_temperature(self) -> Self:
        if self.learn_temperature and not self.contrastive:
            raise ValueError(
                "loss.learn_temperature = true, with loss.contrastive = 0: no term has a temperature; "
                "set loss.learn_temperature=false"
            )
        return self

    def weights(self) -> dict[str, float]:
        """The weight of each term, by its name."""
        return {**{name: getattr(self, name) for name in SHIPPED}, **self.term_weights()}

    def term_section(self, name: str) -> dict[str, Any]:
        """The section of a term of one's own."""
        return (self.terms or {}).get(name) or {}

    def term_weights(self) -> dict[str, float]:
        """The weight of each term of one's own, by its name."""
        sections = (self.terms or {}).items()
        return {name: float(_weight_of(section)) for name, section in sections if section is not None}


def _weight_of(section: Mapping[str, Any]) -> Any:
    """The weight of a term of one's own: as its section sets it, or 1."""
    return section.get("weight", 1.0)


class Temperature(nn.Module):
    """The temperature of the contrastive loss: a constant, or a parameter with `learn_temperature`."""

    lowest = 0.01  # of a parameter, as in CLIP (Radford et al. 2021, arXiv 2103.00020): below it training diverges

    def __init__(self, settings: LossSettings) -> None:
        super().__init__()
        self.start = settings.temperature
        self.log = nn.Parameter(torch.tensor(math.log(self.start))) if settings.learn_temperature else None

    def forward(self) -> float | Tensor:
        return self.start if self.log is None else self.log.exp().clamp(min=self.lowest)


@dataclass(frozen=True)
class Candidates:
    """Candidates of the contrastive loss: each prediction must find its own target among them."""

    directions: Tensor  # [G, D], of unit length
    own: Tensor  # int64 [B]: index of each prediction's own target

    def __post_init__(self) -> None:
        if self.directions.dim() != 2 or self.own.dim() != 1:
            raise ValueError(f"directions {list(self.directions.shape)} must be [G, D], own {list(self.own.shape)} [B]")

    @classmethod
    def of_rows(cls, targets: Tensor, start: int, count: int) -> Self:
        """Candidates from targets [G, D], for `count` predictions. Their own targets start at row `start`.

        Raises:
            ValueError: the targets have no such rows.
        """
        if not 0 <= start <= len(targets) - count:
            raise ValueError(f"rows {start} to {start + count - 1} aren't within {len(targets)} targets")
        return cls(directions(targets), torch.arange(start, start + count, device=targets.device))


def directions(embeddings: Tensor) -> Tensor:
    """Normalise embeddings [N, D] to length 1, in float32 at least; zero rows stay zero."""
    return F.normalize(_full(embeddings), dim=-1)


def embedding_losses(
    prediction: Tensor, target: Tensor, temperature: float | Tensor, candidates: Candidates | None = None
) -> dict[str, Tensor]:
    """Compute the loss terms that compare embeddings, each as a mean over the samples of this process.

    - `cosine`: 1 - cos(prediction, target).
    - `mse`: the mean squared error over all B * D numbers.
    - `contrastive`: InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): cross entropy of
      softmax_j(cos(prediction_i, candidate_j) / temperature) against the prediction's own candidate.
      With a single candidate there are no negatives, so loss and gradient are 0.

    A target that occurs twice among the candidates counts twice in the denominator, as usual. This raises the loss (to
    log 2 or more), but doesn't move the optimum: there, the probability of both copies together is 1.

    All terms are computed in float32, also under autocast; float64 inputs stay float64.

    Args:
        prediction: [B, D].
        target: [B, D].
        temperature: of the contrastive term, > 0.
        candidates: of the contrastive term; None: the targets of the batch. They may be the joined targets of several
            processes with equally large batches. Then the mean over processes equals the term of one process with the
            joined batch; the same holds for gradients.

    Raises:
        ValueError: the shapes don't match.
    """
    if prediction.shape != target.shape or prediction.dim() != 2:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must both be [B, D]")
    if candidates is None:
        candidates = Candidates.of_rows(target, 0, len(target))
    if candidates.own.shape != target.shape[:1] or candidates.directions.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"candidates {list(candidates.directions.shape)}, own {list(candidates.own.shape)}: must be [G, D] and [B] "
            f"for targets {list(target.shape)}"
        )
    with torch.autocast(prediction.device.type, enabled=False):
        direction = directions(prediction)
        logits = direction @ candidates.directions.to(direction.dtype).T / temperature  # [B, G]
        return {
            "cosine": 1 - (direction * directions(target)).sum(-1).mean(),
            "mse": F.mse_loss(_full(prediction), _full(target)),
            "contrastive": F.cross_entropy(logits, candidates.own),
        }


def surface_loss(surface: Tensor, target_surface: Tensor) -> Tensor:
    """Mean squared error between the output surface and the mapped-in surface of the target, both [B, S, E].

    The target surface is detached. Otherwise the map in could lower this loss by giving all targets the same surface.

    Raises:
        ValueError: the shapes differ.
    """
    if surface.shape != target_surface.shape:
        raise ValueError(f"surface {list(surface.shape)} and target surface {list(target_surface.shape)} must agree")
    with torch.autocast(surface.device.type, enabled=False):
        return F.mse_loss(_full(surface), _full(target_surface.detach()))


def weighted(losses: Mapping[str, Tensor], settings: LossSettings) -> Tensor:
    """The training loss: the weighted sum of the terms with a weight > 0. A NaN in another term has no effect.

    Raises:
        KeyError: a term with a weight > 0 is missing.
    """
    terms = [weight * losses[name] for name, weight in settings.weights().items() if weight > 0]
    return torch.stack(terms).sum()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
