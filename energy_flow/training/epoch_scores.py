"""Metrics of one evaluation epoch, computed from the outputs of all its batches.

N rows of the split, D embedding dimension, S cells, E energy dimension
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from energy_flow.metrics.retrieval import ranks, retrieval_metrics
from energy_flow.metrics.task import squared_errors
from energy_flow.training.losses import Candidates, LossSettings, embedding_losses, weighted

_TERM = "term/"  # before the names of loss terms of one's own
_CHUNK = 1024  # rows whose [chunk, N] scores are in memory at a time


class EpochScores:
    """Collect the outputs of an evaluation epoch, then compute its metrics.

    Call `add` for every batch, `gather` once, then `metrics` and `row_scores`.

    Args:
        loss: weights of the loss terms.
        temperature: of the contrastive loss, with the weights of this evaluation.

    Attributes:
        prediction: output embeddings of all rows in row order, [N, D]; after `gather`.
        target: their targets, [N, D]; after `gather`.
    """

    prediction: Tensor
    target: Tensor

    def __init__(self, loss: LossSettings, temperature: float | Tensor) -> None:
        self._loss, self._temperature = loss, temperature
        self._batches: list[dict[str, Tensor]] = []

    def add(
        self,
        prediction: Tensor,
        target: Tensor,
        surface: Tensor,
        target_surface: Tensor,
        rows: Tensor | None,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Keep the parts of a batch that the metrics of the epoch need.

        Embeddings are [B, D], surfaces [B, S, E], rows int64 [B], or None if the batch has no rows. `terms` are loss
        terms of one's own by name, scalars: in the metrics of the epoch a batch counts by its number of rows.
        """
        error = (surface - target_surface).square().mean((1, 2)).float()
        kept = {"prediction": prediction.to(target.dtype), "target": target, "surface": error}
        kept |= {f"{_TERM}{name}": value.expand(len(target)) for name, value in (terms or {}).items()}
        self._batches.append(kept if rows is None else {**kept, "row": rows})

    def gather(self, gather: Callable[[Tensor], Tensor]) -> None:
        """Join all batches and sort them by row. `gather` joins all processes along the first dimension."""
        batches, self._batches = self._batches, []
        joined = {name: gather(torch.cat([batch[name] for batch in batches])) for name in batches[0]}
        joined = _in_row_order(joined)
        self.prediction, self.target, self._surface_error = joined["prediction"], joined["target"], joined["surface"]
        self._terms = {name.removeprefix(_TERM): v.mean() for name, v in joined.items() if name.startswith(_TERM)}

    @functools.cached_property
    def rank(self) -> Tensor:
        """The rank of every row's target among all targets, float64 [N]."""
        with torch.autocast(self.prediction.device.type, enabled=False):
            return ranks(self.prediction, self.target)

    def metrics(self) -> dict[str, float]:
        """Retrieval metrics, all loss terms, and their weighted sum `loss`."""
        with torch.autocast(self.prediction.device.type, enabled=False):
            metrics = retrieval_metrics(self.prediction, self.target, self.rank)
            losses = split_losses(self.prediction, self.target, self._temperature)
        losses = {**losses, "surface": self._surface_error.mean(), **self._terms}
        for name, loss in losses.items():
            # `cosine` is already a metric.
            metrics["cosine_loss" if name == "cosine" else name] = loss.item()
        metrics["loss"] = weighted(losses, self._loss).item()
        return metrics

    def row_scores(self, measure: str) -> Tensor:
        """The score of every row in row order, float64 [N] on the CPU.

        Raises:
            ValueError: the measure is neither rank nor mse.
        """
        if measure == "rank":
            return self.rank.cpu()
        if measure == "mse":
            return squared_errors(self.prediction, self.target).cpu()
        raise ValueError(f"measure = {measure!r}: must be rank or mse")


def split_losses(prediction: Tensor, target: Tensor, temperature: float | Tensor) -> dict[str, Tensor]:
    """`embedding_losses` of a whole split, predictions and targets [N, D], with every target as a candidate.

    It works on chunks of rows, so that no N x N matrix is in memory.
    """
    total: dict[str, Tensor] = {}
    for start in range(0, len(target), _CHUNK):
        rows = slice(start, start + _CHUNK)
        candidates = Candidates.of_rows(target, start, len(target[rows]))
        losses = embedding_losses(prediction[rows], target[rows], temperature, candidates)
        for name, loss in losses.items():
            share = len(target[rows]) / len(target)
            total[name] = total.get(name, target.new_zeros(())) + share * loss
    return total


def _in_row_order(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sort by row and keep every row once: a distributed sampler repeats rows as padding."""
    if "row" not in values:
        return values
    row, order = values["row"].sort(stable=True)
    order = order[torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])]
    return {name: value[order] for name, value in values.items()}
