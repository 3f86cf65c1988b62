"""How well predictions find their targets among all candidates.

N predictions, G candidates of the gallery, D embedding dimension
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from energy_flow.errors import EnergyFlowError

SCORE_BLOCK_BYTES = 64 * 2**20
RECALL_AT = (1, 10, 100)


def ranks(prediction: Tensor, gallery: Tensor, gold: Tensor | None = None) -> Tensor:
    """The rank of each prediction's gold candidate by cosine: 1 + number of better ones + half the number of ties.

    The gold score is read from the same matrix product as all others: computed apart it differs in the last bit, and
    ranks of near and exact ties move. Copies of a candidate are scored once, so that they tie exactly: no BLAS promises
    that equal columns of a product get equal sums. The product is in float64, which neither autocast nor TF32 touches,
    and runs in chunks of rows: a block of scores takes at most `SCORE_BLOCK_BYTES` (or one row).

    Args:
        prediction: [N, D]; a zero row ties with all candidates.
        gallery: [G, D]
        gold: int64 [N], the gallery row that each prediction should find; default: row i for prediction i.

    Returns:
        float64 [N]

    Raises:
        EnergyFlowError: predictions or candidates are not finite; names how many.
        ValueError: the shapes don't fit.
    """
    _check(prediction, gallery)
    _check_gold(prediction, gallery, gold)
    if gold is None:
        gold = torch.arange(len(prediction), device=gallery.device)
    distinct, column, copies = torch.unique(gallery, dim=0, return_inverse=True, return_counts=True)
    candidates = F.normalize(distinct.double(), dim=-1).T
    own = column[gold].unsqueeze(-1)  # [N, 1]
    rows = max(1, SCORE_BLOCK_BYTES // (8 * len(distinct)))
    blocks = zip(prediction.split(rows), own.split(rows), strict=True)
    return torch.cat([_block_ranks(block, candidates, gold_column, copies.double()) for block, gold_column in blocks])


@dataclass(frozen=True)
class AllTargets:
    """Candidates from more than the test split, among which its rows find their targets.

    Attributes:
        target: [G, D]
        first: the candidate of the first test row; those of the others follow.
    """

    target: Tensor
    first: int

    def ranks(self, prediction: Tensor) -> Tensor:
        """Ranks of predictions [N, D] of the first N test rows, float64 [N], as `ranks`."""
        own = torch.arange(self.first, self.first + len(prediction), device=prediction.device)
        return ranks(prediction, self.target.to(prediction.device), own)


def nearest(prediction: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k candidates of the highest cosine for each prediction, best first; ties in the gallery's order.

    Computed like `ranks`: in float64, copies of a candidate tie exactly.

    Args:
        prediction: [N, D]
        gallery: [G, D]
        k: at most G.

    Returns:
        float64 [N, k]: the cosines.
        int64 [N, k]: the gallery rows.

    Raises:
        EnergyFlowError: predictions or candidates are not finite; names how many.
        ValueError: the shapes don't fit, or there are fewer candidates.
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
    """Retrieval of each target among all N targets, and the mean cosine.

    MRR is the mean of 1 / rank, recall@k the share of ranks <= k; a rank with a half (ties) counts as it is.

    Args:
        prediction: [N, D]
        target: [N, D]
        rank: [N], their `ranks` where they are known already.

    Returns:
        mrr, recall@1, recall@10, recall@100, median_rank, cosine

    Raises:
        EnergyFlowError: predictions or targets are not finite; names how many.
        ValueError: the shapes don't fit, or there is no sample.
    """
    if prediction.shape != target.shape or len(prediction) == 0:
        raise ValueError(f"prediction {list(prediction.shape)}, target {list(target.shape)}: must both be [N > 0, D]")
    cosine = F.cosine_similarity(prediction.double(), target.double(), dim=-1).mean().item()
    return {**rank_metrics(ranks(prediction, target) if rank is None else rank), "cosine": cosine}


def rank_metrics(rank: Tensor) -> dict[str, float]:
    """The part of `retrieval_metrics` that ranks [N > 0] alone decide: mrr, recall@1, recall@10, ..., median_rank."""
    middle = rank.sort().values[[(len(rank) - 1) // 2, len(rank) // 2]]
    return {
        "mrr": rank.reciprocal().mean().item(),
        **{f"recall@{k}": (rank <= k).double().mean().item() for k in RECALL_AT},
        "median_rank": middle.mean().item(),
    }


def _block_ranks(prediction: Tensor, candidates: Tensor, own: Tensor, copies: Tensor) -> Tensor:
    scores = F.normalize(prediction.double(), dim=-1) @ candidates
    # In place, so that there is one block: 1 for a better candidate, 0 for a tie, -1 for a worse one.
    compared = scores.sub_(scores.gather(1, own)).sign_()
    # #better + #ties / 2, where the gold itself counts as a tie.
    above = (compared @ copies + copies.sum()) / 2
    return 1 + above - 0.5


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, [B, k]; ties in order. `topk` leaves open which of them it takes, a sort is slow."""
    values, index = scores.topk(k)
    open_end = (scores >= values[:, -1:]).sum(1) > k  # more candidates share the last place than it has room for
    index[open_end] = scores[open_end].sort(descending=True, stable=True).indices[:, :k]
    index = index.sort().values
    values, order = scores.gather(1, index).sort(descending=True, stable=True)
    return values, index.gather(1, order)


def _check(prediction: Tensor, gallery: Tensor) -> None:
    if prediction.dim() != 2 or gallery.dim() != 2 or prediction.shape[1] != gallery.shape[1]:
        raise ValueError(f"prediction {list(prediction.shape)} must be [N, D], gallery {list(gallery.shape)} [G, D]")
    _check_finite(prediction, "predictions")
    _check_finite(gallery, "candidates")


def _check_gold(prediction: Tensor, gallery: Tensor, gold: Tensor | None) -> None:
    if gold is None and len(prediction) > len(gallery):
        raise ValueError(f"{len(prediction)} predictions, {len(gallery)} candidates: say which are gold")
    if gold is not None and gold.shape != prediction.shape[:1]:
        raise ValueError(f"gold {list(gold.shape)} must be [N] with N = {len(prediction)}")


def _check_finite(x: Tensor, name: str) -> None:
    bad = (~x.isfinite().all(dim=-1)).nonzero().squeeze(-1)
    if len(bad):
        some = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
        raise EnergyFlowError(
            f"{len(bad)} of {len(x)} {name} are not finite (rows {some}): they have no rank; "
            "if training diverged, lower the learning rate or clip the gradient"
        )
