"""Retrieval: the ranks of targets among all candidates by cosine, and their metrics.

N predictions, G candidates (the gallery), D embedding dimension
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from energy_flow.errors import EnergyFlowError

SCORE_BLOCK_BYTES = 64 * 2**20
RECALL_AT = (1, 10, 100)


def ranks(prediction: Tensor, gallery: Tensor, gold: Tensor | None = None) -> Tensor:
    """Rank the gold candidate of each prediction by cosine: rank = 1 + #better + #ties / 2.

    The gold score comes from the same matrix product as all others. Computed on its own, it would differ in the last
    bit and change the rank of near or exact ties. Duplicate candidates are scored once and so tie exactly: BLAS does
    not guarantee equal sums for equal columns. The product uses float64, which autocast and TF32 leave alone. It runs
    in blocks of rows; a block of scores takes at most `SCORE_BLOCK_BYTES` (or one row).

    Args:
        prediction: [N, D]; a row of zeros ties with all candidates.
        gallery: [G, D]
        gold: int64 [N], the gallery row of each prediction's target; default: row i for prediction i.

    Returns:
        float64 [N]

    Raises:
        EnergyFlowError: predictions or candidates are not finite; the message has their number.
        ValueError: the shapes don't match.
    """
    _check(prediction, gallery)
    if gold is None:
        if len(prediction) > len(gallery):
            raise ValueError(
                f"{len(prediction)} predictions, {len(gallery)} candidates: give `gold`, the candidate of each "
                "prediction"
            )
        gold = torch.arange(len(prediction), device=gallery.device)
    elif gold.shape != prediction.shape[:1]:
        raise ValueError(f"gold {list(gold.shape)} must be [N] with N = {len(prediction)}")
    distinct, column, counts = torch.unique(gallery, dim=0, return_inverse=True, return_counts=True)
    candidates = F.normalize(distinct.double(), dim=-1).T
    own = column[gold].unsqueeze(-1)  # [N, 1]
    rows = max(1, SCORE_BLOCK_BYTES // (8 * len(distinct)))
    blocks = zip(prediction.split(rows), own.split(rows), strict=True)
    return torch.cat([_block_ranks(block, candidates, gold_column, counts.double()) for block, gold_column in blocks])


@dataclass(frozen=True)
class AllTargets:
    """A gallery with the targets of all splits, for the ranks of the test rows.

    Attributes:
        target: [G, D]
        first: index of the first test row's target; the targets of the other test rows follow it.
    """

    target: Tensor
    first: int

    def ranks(self, prediction: Tensor) -> Tensor:
        """The `ranks` of predictions [N, D] for the first N test rows, float64 [N]."""
        own = torch.arange(self.first, self.first + len(prediction), device=prediction.device)
        return ranks(prediction, self.target.to(prediction.device), own)


def nearest(prediction: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k candidates with the highest cosine for each prediction, best first; ties in the gallery's order.

    As in `ranks`, scores are float64 and duplicate candidates tie exactly.

    Args:
        prediction: [N, D]
        gallery: [G, D]
        k: number of candidates, 1 <= k <= G.

    Returns:
        float64 [N, k]: the cosines.
        int64 [N, k]: the gallery rows.

    Raises:
        EnergyFlowError: predictions or candidates are not finite; the message has their number.
        ValueError: the shapes don't match, or k > G.
    """
    _check(prediction, gallery)
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k = {k}: must be between 1 and the {len(gallery)} candidates")
    distinct, column = torch.unique(gallery, dim=0, return_inverse=True)
    candidates = F.normalize(distinct.double(), dim=-1).T
    rows = max(1, SCORE_BLOCK_BYTES // (8 * len(gallery)))
    blocks = [_best((F.normalize(p.double(), dim=-1) @ candidates)[:, column], k) for p in prediction.split(rows)]
    return torch.cat([scores for scores, _ in blocks]), torch.cat([index for _, index in blocks])


def retrieval_metrics(prediction: Tensor, target: Tensor, rank: Tensor | None = None) -> dict[str, float]:
    """Metrics of retrieving each target among all N targets, and the mean cosine.

    MRR = mean(1 / rank), recall@k = mean(rank <= k). Ties give half ranks, which are not rounded.

    Args:
        prediction: [N, D]
        target: [N, D]
        rank: their `ranks` [N], if already computed.

    Returns:
        mrr, recall@1, recall@10, recall@100, median_rank, cosine

    Raises:
        EnergyFlowError: predictions or targets are not finite; the message has their number.
        ValueError: the shapes differ, or N = 0.
    """
    if prediction.shape != target.shape or len(prediction) == 0:
        raise ValueError(f"prediction {list(prediction.shape)}, target {list(target.shape)}: must both be [N > 0, D]")
    cosine = F.cosine_similarity(prediction.double(), target.double(), dim=-1).mean().item()
    return {**rank_metrics(ranks(prediction, target) if rank is None else rank), "cosine": cosine}


def rank_metrics(rank: Tensor) -> dict[str, float]:
    """The `retrieval_metrics` that depend on the ranks [N > 0] alone: mrr, recall@1, ..., median_rank."""
    middle = rank.sort().values[[(len(rank) - 1) // 2, len(rank) // 2]]
    return {
        "mrr": rank.reciprocal().mean().item(),
        **{f"recall@{k}": (rank <= k).double().mean().item() for k in RECALL_AT},
        "median_rank": middle.mean().item(),
    }


def _block_ranks(prediction: Tensor, candidates: Tensor, gold: Tensor, counts: Tensor) -> Tensor:
    scores = F.normalize(prediction.double(), dim=-1) @ candidates
    # In place, to hold one block only: 1 for a better candidate, 0 for a tie, -1 for a worse one.
    compared = scores.sub_(scores.gather(1, gold)).sign_()
    # #better + #ties / 2; the gold candidate counts as a tie with itself.
    above = (compared @ counts + counts.sum()) / 2
    return 1 + above - 0.5


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest scores of each row and their columns, [B, k]; ties in column order.

    `topk` is fast but takes any of several tied columns. A stable sort repairs the rows where that matters.
    """
    values, index = scores.topk(k)
    ambiguous = (scores >= values[:, -1:]).sum(1) > k  # too many candidates tie for the last places
    index[ambiguous] = scores[ambiguous].sort(descending=True, stable=True).indices[:, :k]
    index = index.sort().values
    values, order = scores.gather(1, index).sort(descending=True, stable=True)
    return values, index.gather(1, order)


def _check(prediction: Tensor, gallery: Tensor) -> None:
    if prediction.dim() != 2 or gallery.dim() != 2 or prediction.shape[1] != gallery.shape[1]:
        raise ValueError(f"prediction {list(prediction.shape)} must be [N, D], gallery {list(gallery.shape)} [G, D]")
    _check_finite(prediction, "predictions")
    _check_finite(gallery, "candidates")


def _check_finite(x: Tensor, name: str) -> None:
    bad = (~x.isfinite().all(dim=-1)).nonzero().squeeze(-1)
    if len(bad):
        some = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
        raise EnergyFlowError(
            f"{len(bad)} of {len(x)} {name} are not finite (rows {some}), so they have no rank. "
            "If training diverged, lower the learning rate or clip the gradient"
        )
