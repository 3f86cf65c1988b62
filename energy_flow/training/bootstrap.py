"""How sure a mean over test rows, or the difference of two, is: bootstrap percentile intervals.

S runs (seeds) of a method, N test rows, R draws
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 10_000
LEVEL = 0.95
_BLOCK = 2**24  # numbers of a block of draws that stand at a time


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds `LEVEL` of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_interval(values: Tensor, *, seed: int = 0) -> Interval:
    """Of the mean of `values` [S, N] (or [N]), drawn over rows and over runs.

    Raises:
        ValueError: there is nothing to draw from.
    """
    values = _runs(values)
    return _interval(values.mean(), *_drawn_means([values], seed))


def paired_difference(ours: Tensor, theirs: Tensor, *, seed: int = 0) -> Interval:
    """Of mean(ours) - mean(theirs) on the same test rows, [S, N] and [S', N] (or [N]).

    A draw takes N rows with replacement, the same ones for both, and as many runs as each has, for each by itself: rows
    that are hard for both cancel (Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: the rows aren't as many, or there is nothing to draw from.
    """
    ours, theirs = _runs(ours), _runs(theirs)
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} and {theirs.shape[1]} rows: a pair has the same test rows")
    left, right = _drawn_means([ours, theirs], seed)
    return _interval(ours.mean() - theirs.mean(), left - right)


def compared(methods: Sequence[Tensor], *, seed: int = 0) -> list[tuple[Interval, Interval]]:
    """Of every method [S, N] (or [N]): its mean, and its `paired_difference` to the first one, all from the same draws.

    Raises:
        ValueError: the rows aren't as many, or there is nothing to draw from.
    """
    runs = [_runs(values) for values in methods]
    lengths = {values.shape[1] for values in runs}
    if len(lengths) != 1:
        raise ValueError(f"{sorted(lengths)} rows: methods that are compared have the same test rows")
    drawn, means = _drawn_means(runs, seed), [values.mean() for values in runs]
    return [
        (_interval(mean, draws), _interval(mean - means[0], draws - drawn[0]))
        for mean, draws in zip(means, drawn, strict=True)
    ]


def _runs(values: Tensor) -> Tensor:
    """float64 [S, N] on the CPU."""
    values = values.detach().cpu().double()
    values = values.unsqueeze(0) if values.dim() == 1 else values
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"values {list(values.shape)} must be [N] or [runs, N], neither of them 0")
    return values


def _interval(mean: Tensor, drawn: Tensor) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return Interval(mean.item(), low, high)


def _drawn_means(methods: list[Tensor], seed: int) -> list[Tensor]:
    """Means [R] of every method [S, N]: all methods see the same rows of a draw, each draws its own runs."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = methods[0].shape[1]
    means: list[list[Tensor]] = [[] for _ in methods]
    block = max(1, _BLOCK // num_rows)
    for start in range(0, DRAWS, block):
        num_draws = min(block, DRAWS - start)
        rows = _drawn_shares(num_rows, num_draws, generator)
        for method, found in zip(methods, means, strict=True):
            runs = _drawn_shares(len(method), num_draws, generator)
            found.append((runs * (rows @ method.T)).sum(1))
    return [torch.cat(found) for found in means]


def _drawn_shares(num: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """How large a share each of `num` things has in a draw of `num` with replacement, float64 [num_draws, num]."""
    drawn = torch.randint(num, (num_draws, num), generator=generator)
    counts = torch.zeros(num_draws, num, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand(num_draws, num)) / num
